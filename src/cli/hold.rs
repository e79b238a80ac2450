//! `hold`: take the locks that a program takes, while a command runs or until it is time.
//!
//! Like flock(1). The locks belong to an open file of this process and end with it, whatever ends it; the command does not
//! inherit them unless asked.

use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use clap::Args;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

use super::exit::{Exit, Failure};
use super::inquiry::{Inquiry, parse_operation};
use super::patience::{no_answer, patiently};
use super::{Common, layout, parse_time, roots};
use crate::hold::{AcquireError, HeldAccess, PATIENCE_STEP};
use crate::image::chain;
use crate::linux::lanes::PATIENCE;
use crate::linux::probe::OpenError;
use crate::monitor::what_if::holders_on;
use crate::protocol::{Access, Operation, Permission, PermissionSet};
use crate::report::why;
use crate::signals::{ENDING, Received, Signals, is_ignored};
use crate::text::{escape, escape_path};

#[derive(Debug, Args)]
pub(super) struct HoldArgs {
    /// An image file or block device.
    #[arg(value_name = "IMAGE")]
    image: PathBuf,
    /// Hold what this program holds, on the image and on the files below it.
    #[arg(long = "as", value_name = "OPERATION", value_parser = parse_operation, required_unless_present_any = ["permissions", "unshare"], conflicts_with_all = ["permissions", "unshare"])]
    operation: Option<&'static Operation>,
    /// Permissions to use: consistent-read, write, write-unchanged, resize.
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = parse_permission)]
    permissions: Vec<Permission>,
    /// Permissions that others must not use.
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = parse_permission)]
    unshare: Vec<Permission>,
    /// Wait this long for whoever is in the way.
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    wait: Option<Duration>,
    /// Let go after this long; a command is ended first, and the status is 124.
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    timeout: Option<Duration>,
    /// The status when somebody is in the way.
    #[arg(short = 'E', long, value_name = "STATUS", default_value_t = 1)]
    conflict_exit_code: u8,
    /// Let the command inherit the locks: they then stay until it and all that it started have ended.
    #[arg(long, requires = "command")]
    inherit: bool,
    /// Run this while the locks are held, and end with its status.
    #[arg(value_name = "COMMAND", last = true)]
    command: Vec<std::ffi::OsString>,
}

fn parse_permission(name: &str) -> Result<Permission, String> {
    let known = || Permission::CURRENT.map(Permission::name).join(", ");
    match Permission::from_name(name) {
        Some(Permission::GraphMod) => Err(format!("no QEMU since 7.0 takes it; there are {}", known())),
        Some(permission) => Ok(permission),
        None => Err(format!("there is no such permission; there are {}", known())),
    }
}

/// What is to be taken of one file, step by step.
struct Wanted {
    path: PathBuf,
    accesses: Vec<Access>,
}

/// Between the end of a command's time and its end by force.
const GRACE: Duration = Duration::from_secs(5);
/// For a reader that is slow to take what is said, once all has been let go.
const LAST_WORDS: Duration = Duration::from_millis(200);

pub(super) fn hold(args: &HoldArgs, common: &Common) -> Result<Exit, Failure> {
    if common.read_only {
        return Err(Failure::error("read-only: hold takes locks, and --read-only or the configuration forbids it"));
    }
    if !args.command.is_empty() && is_ignored(Signal::SIGCHLD) {
        return Err(Failure::error(
            "SIGCHLD is ignored by whoever started this: the end of the command could not be told; start it with \
             env --default-signal=CHLD",
        ));
    }
    // Before any thread is started.
    let mut signals = Signals::take_over(&[ENDING[0], ENDING[1], ENDING[2], Signal::SIGCHLD])?;
    let (image, operation, access) = (args.image.clone(), args.operation, args.access());
    let wanted = patiently(move || wanted(&image, operation, access)).ok_or_else(|| no_answer(&args.image))??;
    let wanted = Arc::new(wanted);
    let deadline = Instant::now() + args.wait.unwrap_or_default();
    let held = loop {
        match attempt(&wanted, deadline, &mut signals)? {
            Attempt::Taken(held) => break held,
            Attempt::Refused(AcquireError::Conflict { .. }) if Instant::now() < deadline => {}
            Attempt::Refused(error) => return refused(args, common, error),
            Attempt::NoAnswer => return Err(no_answer(&args.image)),
            Attempt::Ended(signal) => return Ok(Exit::Signal(signal as i32)),
        }
        // No event tells of a lock that is let go; a signal ends the waiting.
        let step = PATIENCE_STEP.min(deadline.saturating_duration_since(Instant::now()));
        if let Some(received) = next_signal(&mut signals, Some(step))?
            && received.signal != Signal::SIGCHLD
        {
            return Ok(Exit::Signal(received.signal as i32));
        }
    };
    if args.command.is_empty() { keep(args, held, &mut signals) } else { run(args, held, &mut signals) }
}

impl HoldArgs {
    /// What `--permissions` and `--unshare` name.
    fn access(&self) -> Access {
        let set = |list: &[Permission]| list.iter().copied().collect::<PermissionSet>();
        Access::new(set(&self.permissions), set(&self.unshare))
    }
}

enum Attempt {
    Taken(Vec<HeldAccess>),
    Refused(AcquireError),
    NoAnswer,
    Ended(Signal),
}

/// Tries on a thread of its own: where the storage does not answer, a signal must still end this program, and with it
/// whatever that thread may yet take.
fn attempt(wanted: &Arc<Vec<Wanted>>, deadline: Instant, signals: &mut Signals) -> Result<Attempt, Failure> {
    let (over, tell) = io::pipe()?;
    let (answer, answered) = mpsc::channel();
    let wanted = Arc::clone(wanted);
    let take = move || {
        let _ = answer.send(take_all(&wanted));
        drop(tell);
    };
    std::thread::Builder::new().name("attempt".to_owned()).spawn(take)?;
    let until = deadline.max(Instant::now() + PATIENCE);
    loop {
        match answered.try_recv() {
            Ok(Ok(held)) => return Ok(Attempt::Taken(held)),
            Ok(Err(error)) => return Ok(Attempt::Refused(error)),
            Err(mpsc::TryRecvError::Empty) => {}
            Err(mpsc::TryRecvError::Disconnected) => return Err(Failure::error("the attempt ended without an answer")),
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(Attempt::NoAnswer);
        }
        if let (Some(signal), _) = signal_or_end(signals, &over, timeout_of(left))? {
            return Ok(Attempt::Ended(signal));
        }
    }
}

fn wanted(image: &Path, operation: Option<&'static Operation>, access: Access) -> Result<Vec<Wanted>, Failure> {
    let Some(operation) = operation else {
        return Ok(vec![Wanted { path: image.to_owned(), accesses: vec![access] }]);
    };
    // Opened as it will be for the lock, so that what is wrong with it is told in the same words.
    HeldAccess::nothing(image).map_err(failure)?;
    let header = chain::read(image).map(|(_, header)| header);
    let Some(header) = header else {
        let path = escape_path(image);
        return Err(Failure::new(
            Exit::CannotTell,
            format!("{path}: its header cannot be read: its format is unknown"),
        ));
    };
    let Some(recipe) = operation.recipe(header.format.family()) else {
        let path = escape_path(image);
        return Err(Failure::error(format!("{path}: {} is not known for {}", operation.name, header.format.name())));
    };
    let mut wanted = vec![Wanted { path: image.to_owned(), accesses: recipe.accesses() }];
    if !operation.backing.is_empty() {
        let below = chain::below(image);
        if let Some(why) = below.cut_off {
            let path = escape_path(image);
            return Err(Failure::new(
                Exit::CannotTell,
                format!(
                    "{path}: {why}: what {} would lock below the image cannot be told; \
                     --permissions and --unshare lock the image alone",
                    operation.name
                ),
            ));
        }
        wanted.extend(
            below.files.into_iter().map(|f| Wanted { path: f.path, accesses: vec![operation.backing.of(f.family)] }),
        );
    }
    wanted.retain(|w| !w.accesses.is_empty());
    if wanted.is_empty() {
        return Err(Failure::error(format!(
            "{} takes no lock on this image: there is nothing to hold",
            operation.name
        )));
    }
    Ok(wanted)
}

/// All or nothing.
fn take_all(wanted: &[Wanted]) -> Result<Vec<HeldAccess>, AcquireError> {
    // Every file is asked before any is locked, so that one who waits refuses nobody.
    let mut all = wanted.iter().map(|file| HeldAccess::nothing(&file.path)).collect::<Result<Vec<_>, _>>()?;
    for (held, file) in all.iter().zip(wanted) {
        file.accesses.iter().try_for_each(|access| held.check_change(*access))?;
    }
    for (held, file) in all.iter_mut().zip(wanted) {
        file.accesses.iter().try_for_each(|access| held.change(*access))?;
    }
    Ok(all)
}

fn failure(error: AcquireError) -> Failure {
    use nix::errno::Errno;
    let exit = match &error {
        AcquireError::Open { source: OpenError::Errno(Errno::ENOENT | Errno::ENOTDIR), .. } => Exit::NoSuchImage,
        AcquireError::Open { source: OpenError::Errno(Errno::EACCES | Errno::EPERM), .. } => Exit::CannotTell,
        _ => Exit::Error,
    };
    Failure::new(exit, error)
}

/// Says who is in the way.
fn refused(args: &HoldArgs, common: &Common, error: AcquireError) -> Result<Exit, Failure> {
    let AcquireError::Conflict { path, byte, sentence } = &error else {
        return Err(failure(error));
    };
    let mut lines = vec![format!("qlock-top: {}: {sentence}", escape_path(path))];
    if let Ok(inquiry) = Inquiry::make(path, roots(common)) {
        let holders: Vec<_> = inquiry.image().map(|i| holders_on(i, *byte).collect()).unwrap_or_default();
        lines.extend(why::held_by(&inquiry.snapshot, *byte, path, &holders));
    }
    let _ = why::write_lines(&mut io::stderr(), layout(common), &lines);
    Ok(Exit::Status(args.conflict_exit_code))
}

/// Rounded up: a wait of less than a millisecond is none.
fn timeout_of(limit: Duration) -> PollTimeout {
    PollTimeout::try_from(limit + Duration::from_micros(999)).unwrap_or(PollTimeout::MAX)
}

/// Waits once: for a signal that ends this program, and for the other end of `over` to be closed; which of them has come.
fn signal_or_end(
    signals: &mut Signals,
    over: &io::PipeReader,
    timeout: PollTimeout,
) -> Result<(Option<Signal>, bool), Failure> {
    let mut fds = [PollFd::new(signals.as_fd(), PollFlags::POLLIN), PollFd::new(over.as_fd(), PollFlags::empty())];
    match poll(&mut fds, timeout) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => {}
        Err(e) => return Err(Failure::error(e)),
    }
    let closed = fds[1].revents().is_some_and(|r| r.contains(PollFlags::POLLHUP));
    let ending = signals.receive().map(|r| r.signal).filter(|s| *s != Signal::SIGCHLD);
    Ok((ending, closed))
}

fn next_signal(signals: &mut Signals, limit: Option<Duration>) -> Result<Option<Received>, Failure> {
    let timeout = limit.map_or(PollTimeout::NONE, timeout_of);
    match poll(&mut [PollFd::new(signals.as_fd(), PollFlags::POLLIN)], timeout) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(signals.receive()),
        Err(e) => Err(Failure::error(e)),
    }
}

/// Holds until a signal or the timeout. The timeout is kept by a thread of its own: writing may be stuck.
fn keep(args: &HoldArgs, held: Vec<HeldAccess>, signals: &mut Signals) -> Result<Exit, Failure> {
    let lines: Vec<String> =
        held.iter().map(|h| format!("holding {} on {}", h.access(), escape_path(h.path()))).collect();
    let (over, tell) = io::pipe()?;
    let mut leases = Vec::new();
    let mut kept = Vec::new();
    match args.timeout {
        Some(timeout) => {
            for one in held {
                let tell = tell.try_clone()?;
                leases.push(one.lend(timeout, move |_| drop(tell)).map_err(Failure::error)?);
            }
        }
        None => kept = held,
    }
    // While nobody lends, one end stays open: then only a signal ends it.
    let _open = leases.is_empty().then_some(tell);
    // Whoever started this waits for the lines. If nobody reads them, it is held all the same, and signals are heeded.
    let (saying, said) = mpsc::channel::<()>();
    let say = move || {
        let _ = writeln!(io::stdout(), "{}", lines.join("\n")).and_then(|()| io::stdout().flush());
        drop(saying);
    };
    std::thread::Builder::new().name("say".to_owned()).spawn(say)?;
    let exit = end_of_hold(signals, &over)?;
    let_go((leases, kept));
    let _ = said.recv_timeout(LAST_WORDS);
    Ok(exit)
}

/// Lets go, and waits a little for it: where the storage hangs, the end of this program does it.
fn let_go(held: impl Send + 'static) {
    let (letting, gone) = mpsc::channel::<()>();
    let work = move || {
        drop(held);
        drop(letting);
    };
    if std::thread::Builder::new().name("let-go".to_owned()).spawn(work).is_ok() {
        let _ = gone.recv_timeout(PATIENCE);
    }
}

/// Waits for a signal, or until every lease is over.
fn end_of_hold(signals: &mut Signals, over: &io::PipeReader) -> Result<Exit, Failure> {
    loop {
        match signal_or_end(signals, over, PollTimeout::NONE)? {
            (Some(signal), _) => return Ok(Exit::Signal(signal as i32)),
            (None, true) => return Ok(Exit::Fine),
            (None, false) => {}
        }
    }
}

/// Runs the command while the locks are held.
fn run(args: &HoldArgs, held: Vec<HeldAccess>, signals: &mut Signals) -> Result<Exit, Failure> {
    let mut inherited: Vec<OwnedFd> = Vec::new();
    if args.inherit {
        for one in &held {
            let file = one.share()?;
            rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::empty()).map_err(io::Error::from)?;
            inherited.push(file);
        }
    }
    // By way of this program: the signals that come as events here are held back in a child too, until it has let them in.
    let mut child = Command::new("/proc/self/exe")
        .arg0("qlock-top")
        .args(["hold-command", "--"])
        .args(&args.command)
        .spawn()
        .map_err(|e| Failure::error(format!("cannot run /proc/self/exe: {e}")))?;
    let started = Instant::now();
    let (mut told_to_end, mut forced) = (false, false);
    let status = loop {
        let limit = match (args.timeout, told_to_end, forced) {
            (None, ..) | (_, _, true) => None,
            (Some(timeout), false, _) => Some(timeout.saturating_sub(started.elapsed())),
            (Some(timeout), true, _) => Some((timeout + GRACE).saturating_sub(started.elapsed())),
        };
        let received = next_signal(signals, limit)?;
        if let Some(status) = child.try_wait()? {
            break status;
        }
        match received.map(|r| (r.signal, r.by_kernel)) {
            None if limit.is_some_and(|l| l.is_zero()) && told_to_end => {
                forced = true;
                send(&child, Signal::SIGKILL);
            }
            None if limit.is_some_and(|l| l.is_zero()) => {
                told_to_end = true;
                send(&child, Signal::SIGTERM);
            }
            // A terminal that hangs up tells the leader of its session alone, and that may be this process.
            Some((Signal::SIGHUP, true)) => send(&child, Signal::SIGHUP),
            // A key has been told to the command by the terminal, too.
            None | Some((Signal::SIGCHLD, _) | (_, true)) => {}
            Some((signal, false)) => send(&child, signal),
        }
    };
    if args.inherit && !told_to_end {
        // Whatever the command has started may go on, and the locks with it.
        for one in held {
            drop(one.into_file()?);
        }
    } else {
        // Let go for everybody who shares them.
        let_go(held);
    }
    drop(inherited);
    Ok(if told_to_end { Exit::TimedOut } else { exit_of(status) })
}

/// Becomes the command, with signals as they were.
#[derive(Debug, Args)]
pub(super) struct CommandArgs {
    #[arg(last = true, required = true)]
    command: Vec<std::ffi::OsString>,
}

pub(super) fn become_command(args: &CommandArgs) -> Result<Exit, Failure> {
    SigSet::all().thread_unblock().map_err(Failure::error)?;
    let error = Command::new(&args.command[0]).args(&args.command[1..]).exec();
    // As a shell reports it.
    let status = if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 };
    let name = args.command[0].to_string_lossy();
    Err(Failure::new(Exit::Status(status), format!("cannot run {}: {error}", escape(&name))))
}

fn send(child: &Child, signal: Signal) {
    // Not waited for yet, so the pid is still its own.
    if let Ok(pid) = i32::try_from(child.id()) {
        let _ = kill(Pid::from_raw(pid), signal);
    }
}

fn exit_of(status: ExitStatus) -> Exit {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => Exit::Status(u8::try_from(code).unwrap_or(u8::MAX)),
        (None, Some(signal)) => Exit::Signal(signal),
        (None, None) => Exit::Error,
    }
}
