//! What does one make-believe program do: which locks does it take, and when does it end?
//!
//! It ends when its standard input does, so that no actor outlives the demo, whatever becomes of it.

use std::fs::File;
use std::io::{self, BufRead, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use clap::Args;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::SigSet;

use crate::hold::{AcquireError, HeldAccess};
use crate::protocol::Access;

/// What the actor is to do: `hold IMAGE=ACCESS..`, `cycle MILLISECONDS IMAGE=ACCESS..`, `write-unlocked IMAGE` or
/// `obey IMAGE`; what follows is for show, such as `-name guest=web01`.
#[derive(Debug, Args)]
pub struct ActorArgs {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    script: Vec<String>,
}

/// Why an actor gave up.
#[derive(Debug, thiserror::Error)]
pub enum ActorError {
    /// Not a script of ours.
    #[error("no such script: {0}")]
    Script(String),
    /// It could not take its locks.
    #[error(transparent)]
    Acquire(#[from] AcquireError),
    /// It could not open or wait.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Plays a part until standard input ends.
///
/// # Errors
/// [`ActorError`], when the script is wrong or a lock that is to be held all the time is refused.
pub fn act(args: &ActorArgs) -> Result<(), ActorError> {
    // The demo takes signals as events; its children are to end at the first one.
    SigSet::all().thread_unblock().map_err(io::Error::from)?;
    name_yourself()?;
    let script: Vec<&str> = args.script.iter().map(String::as_str).collect();
    match script.as_slice() {
        ["hold", images @ ..] => {
            let held = acquire(images)?;
            ready()?;
            wait(None)?;
            drop(held);
        }
        ["cycle", period, images @ ..] => {
            let period = Duration::from_millis(period.parse().map_err(|_| ActorError::Script(args.script.join(" ")))?);
            ready()?;
            loop {
                // Refused is part of the play: somebody else may hold it now.
                let held = acquire(images).ok();
                if wait(Some(period))? {
                    break;
                }
                drop(held);
                if wait(Some(period))? {
                    break;
                }
            }
        }
        ["write-unlocked", image] => {
            let file = File::options().write(true).open(image)?;
            ready()?;
            wait(None)?;
            drop(file);
        }
        ["obey", image] => obey(Path::new(image))?,
        _ => return Err(ActorError::Script(args.script.join(" "))),
    }
    Ok(())
}

/// Goes over to the access on each line of standard input, and answers `granted` or `refused BYTE`.
fn obey(image: &Path) -> Result<(), ActorError> {
    let mut held = HeldAccess::nothing(image)?;
    ready()?;
    for line in io::stdin().lock().lines() {
        let line = line?;
        let access: Access = line.parse().map_err(|_| ActorError::Script(line))?;
        match held.change(access) {
            Ok(()) => say("granted")?,
            Err(AcquireError::Conflict { byte, .. }) => say(&format!("refused {}", byte.offset()))?,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// The kernel's name for a process is that of its file; the cast is told apart by the name that it was started under.
fn name_yourself() -> io::Result<()> {
    match std::env::args().next() {
        Some(name) => std::fs::write("/proc/self/comm", name),
        None => Ok(()),
    }
}

fn acquire(words: &[&str]) -> Result<Vec<HeldAccess>, ActorError> {
    let images = words.iter().take_while(|w| !w.starts_with('-')).filter_map(|w| w.split_once('='));
    images
        .map(|(image, access)| {
            let access: Access = access.parse().map_err(|_| ActorError::Script(access.to_owned()))?;
            Ok(HeldAccess::acquire(Path::new(image), access)?)
        })
        .collect()
}

fn ready() -> io::Result<()> {
    say("ready")
}

fn say(line: &str) -> io::Result<()> {
    let mut out = io::stdout();
    writeln!(out, "{line}").and_then(|()| out.flush())
}

/// Waits for the end of standard input, at most `limit`; true if it has come.
fn wait(limit: Option<Duration>) -> io::Result<bool> {
    let stdin = io::stdin();
    let deadline = limit.map(|l| Instant::now() + l);
    loop {
        let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
        let timeout = left.map_or(PollTimeout::NONE, |l| PollTimeout::try_from(l).unwrap_or(PollTimeout::MAX));
        let mut fds = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Ok(0) if left.is_some_and(|l| l > Duration::from_millis(1)) => {}
            Ok(n) => return Ok(n > 0),
            Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}
