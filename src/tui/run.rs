//! What comes next: a key, a signal, news from the sampler, or the end of the terminal?
//!
//! One poll(2) over all of them. The terminal is polled here and decoded by crossterm only when it is known to have
//! something: crossterm's own poll never returns after a hangup.

use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use crossterm::event::{self, Event};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use ratatui::buffer::Buffer;
use ratatui::layout::Rect;

use super::locks::Locks;
use super::model::Model;
use super::terminal::{self, Screen};
use super::theme::{Look, Theme};
use super::update::{Effect, Msg, update};
use super::view;
use crate::monitor::sampler::{Options, Sampler, StartError};
use crate::signals::Signals;
use crate::text::escape_path;

/// The signals that the dashboard takes as events.
pub const SIGNALS: [Signal; 6] =
    [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM, Signal::SIGWINCH, Signal::SIGTSTP, Signal::SIGCONT];

/// Why the dashboard ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The operator quit.
    Quit,
    /// The terminal is gone.
    Hangup,
    /// A signal asked for it.
    Signal(Signal),
}

/// Why the dashboard failed.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Watching could not start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The terminal failed.
    #[error("the terminal failed: {0}")]
    Terminal(#[from] io::Error),
    /// The thread that looks has ended, which it never should.
    #[error("watching ended because of a fault in this program")]
    SamplerEnded,
}

/// How often the clock is looked at, in milliseconds.
const CLOCK: u16 = 1000;

/// After the terminal has gone, this long is left for an orderly end.
const GRACE: Duration = Duration::from_millis(700);

/// Runs the dashboard until it ends. The terminal is then as it was.
///
/// # Errors
/// [`RunError`].
pub fn run(options: &Options, look: Look, read_only: bool, signals: Signals) -> Result<End, RunError> {
    let mut sampler = Sampler::start(options)?;
    let title = options.paths.iter().map(|p| escape_path(p).into_owned()).collect::<Vec<_>>().join(" ");
    let mut locks = Locks::new()?;
    let mut screen = Screen::take_over()?;
    let mut model = Model::new(title, options.interval, terminal::size(&screen), Timestamp::now(), TimeZone::system());
    if look.mouse {
        model.mouse = true;
        screen.listen_to_mouse(true)?;
    }
    model.read_only = read_only;
    let result = turn(&mut model, &Theme::new(look), &mut sampler, &mut locks, &mut screen, signals);
    // First the locks, then the terminal: it may be stuck.
    drop(locks);
    drop(screen);
    result
}

/// The terminal that keys come from: where crossterm reads them.
fn input() -> io::Result<OwnedFd> {
    let stdin = io::stdin();
    if stdin.is_terminal() { stdin.as_fd().try_clone_to_owned() } else { Ok(File::open("/dev/tty")?.into()) }
}

/// Ends the process when the terminal goes away and the loop does not notice: a decoder that is in the middle of a key at
/// that moment reads an endless nothing.
fn watch_for_hangup(input: OwnedFd) -> io::Result<()> {
    let wait = move || {
        loop {
            let mut fds = [PollFd::new(input.as_fd(), PollFlags::empty())];
            match poll(&mut fds, PollTimeout::NONE) {
                Err(Errno::EINTR) => {}
                _ => break,
            }
        }
        std::thread::sleep(GRACE);
        std::process::exit(128 + Signal::SIGHUP as i32);
    };
    std::thread::Builder::new().name("hangup".to_owned()).spawn(wait).map(drop)
}

fn turn(
    model: &mut Model,
    theme: &Theme,
    sampler: &mut Sampler,
    locks: &mut Locks,
    screen: &mut Screen,
    mut signals: Signals,
) -> Result<End, RunError> {
    let input = input()?;
    watch_for_hangup(input.try_clone()?)?;
    let (mut stale, mut resumed) = (true, false);
    loop {
        if stale {
            let mut frame = Buffer::empty(Rect::new(0, 0, model.size.0, model.size.1));
            view::draw(model, theme, &mut frame);
            stale = match screen.show(frame) {
                Ok(shown) => !shown,
                Err(e) if is_hangup(&e) => return Ok(End::Hangup),
                Err(e) => return Err(e.into()),
            };
        }
        let (keys, signalled, rung, writable, lock_news) = {
            let out = if screen.is_behind() { PollFlags::POLLOUT } else { PollFlags::empty() };
            let mut fds = [
                PollFd::new(input.as_fd(), PollFlags::POLLIN),
                PollFd::new(signals.as_fd(), PollFlags::POLLIN),
                PollFd::new(sampler.bell(), PollFlags::POLLIN),
                PollFd::new(screen.as_fd(), out),
                PollFd::new(locks.bell(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, CLOCK) {
                Ok(_) => {}
                Err(Errno::EINTR) => continue,
                Err(e) => return Err(io::Error::from(e).into()),
            }
            let gone = PollFlags::POLLHUP | PollFlags::POLLERR | PollFlags::POLLNVAL;
            let hung_up = |fd: &PollFd| fd.revents().is_some_and(|r| r.intersects(gone));
            if hung_up(&fds[0]) || hung_up(&fds[3]) {
                return Ok(End::Hangup);
            }
            let ready = |fd: &PollFd| fd.any().unwrap_or_default();
            (ready(&fds[0]), ready(&fds[1]), ready(&fds[2]), ready(&fds[3]), ready(&fds[4]))
        };
        if writable {
            match screen.flush() {
                Err(e) if is_hangup(&e) => return Ok(End::Hangup),
                other => other?,
            }
        }
        let (was_stale, idle) = (model.staleness(), !(keys || signalled || rung || lock_news));
        update(model, Msg::Clock { now: Timestamp::now(), looked_at: sampler.looked_at() });
        // Time alone changes nothing on the screen, but for what tells of time.
        stale |= idle && (model.tells_time() || model.staleness() != was_stale);
        let mut messages = Vec::new();
        while let Some(signal) = signalled.then(|| signals.next()).flatten() {
            match signal {
                Signal::SIGWINCH => messages.push(size_of(screen)),
                Signal::SIGTSTP => {
                    suspend(screen, locks, model)?;
                    resumed = true;
                }
                // That of our own stop: the terminal has been taken again already.
                Signal::SIGCONT if resumed => {
                    resumed = false;
                    messages.push(size_of(screen));
                }
                // After a stop that was not ours the shell has changed the modes, and perhaps the size.
                Signal::SIGCONT => {
                    screen.take_again(model.mouse)?;
                    messages.push(size_of(screen));
                }
                ending => return Ok(End::Signal(ending)),
            }
        }
        while keys && event::poll(Duration::ZERO)? {
            match event::read()? {
                Event::Key(key) => messages.push(Msg::Key(key)),
                Event::Mouse(mouse) => messages.push(Msg::Mouse(mouse)),
                Event::Paste(text) => messages.push(Msg::Paste(text)),
                // Sizes come with their signal.
                Event::Resize(..) | Event::FocusGained | Event::FocusLost => {}
            }
        }
        if rung {
            let news = sampler.take();
            messages.extend(news.gaps.into_iter().map(Msg::Gap));
            messages.extend(news.snapshot.map(Msg::Snapshot));
            if news.ended {
                return Err(RunError::SamplerEnded);
            }
        }
        if lock_news {
            messages.extend(locks.take().into_iter().map(Msg::Lock));
        }
        for message in messages {
            stale = true;
            for effect in update(model, message) {
                match effect {
                    Effect::Quit => return Ok(End::Quit),
                    Effect::LookNow => sampler.look_now(),
                    Effect::Redraw => screen.redraw(),
                    Effect::Suspend => {
                        suspend(screen, locks, model)?;
                        resumed = true;
                    }
                    Effect::SetInterval(interval) => sampler.set_interval(interval),
                    Effect::Copy(text) => screen.copy(&text)?,
                    Effect::Mouse(on) => screen.listen_to_mouse(on)?,
                    Effect::CheckLock { key, resolved, accesses } => locks.check(key, resolved, accesses),
                    Effect::TakeLock { key, resolved, accesses, limit } => {
                        locks.take_lock(key, resolved, accesses, limit);
                    }
                    Effect::ReleaseLock(id) => locks.release(id),
                }
            }
        }
        #[cfg(debug_assertions)]
        panic_if_asked(model);
    }
}

fn size_of(screen: &Screen) -> Msg {
    let (columns, rows) = terminal::size(screen);
    Msg::Size(columns, rows)
}

/// Gives the terminal to the shell and stops; goes on when the shell has us continue.
fn suspend(screen: &mut Screen, locks: &mut Locks, model: &mut Model) -> io::Result<()> {
    // A program that is stopped keeps no deadline.
    if !model.own_locks.is_empty() {
        model.own_locks.clear();
        model.note = Some("test locks were let go: a stopped program keeps no deadline".to_owned());
    }
    locks.release_all();
    terminal::give_back();
    kill(Pid::this(), Signal::SIGSTOP)?;
    screen.take_again(model.mouse)
}

/// The terminal is gone: a write says so by one of these.
fn is_hangup(e: &io::Error) -> bool {
    matches!(e.raw_os_error().map(Errno::from_raw), Some(Errno::EIO | Errno::ENXIO | Errno::EPIPE))
}

/// For the test that a panic gives the terminal back; not in release builds.
#[cfg(debug_assertions)]
#[allow(clippy::panic)]
fn panic_if_asked(model: &Model) {
    if model.snapshot.is_some() && std::env::var_os("QLOCK_TOP_TEST_PANIC").is_some() {
        panic!("asked to panic by QLOCK_TOP_TEST_PANIC");
    }
}
