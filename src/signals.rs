//! Which signal asked us to stop, continue or look at the size of the terminal?
//!
//! A signalfd instead of handlers: signals wait in line with every other event, in one poll(2), and nothing runs in
//! between. Must be made before any thread is started, so that all of them leave these signals alone.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// Signals that come as readable events.
pub struct Signals(SignalFd);

/// What ends a session; an exit status of 128 plus its number tells the caller.
pub const ENDING: [Signal; 3] = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM];

impl Signals {
    /// Takes over `signals` for the whole process, but for those that end it and that whoever started it has it ignore,
    /// as nohup(1) does.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn take_over(signals: &[Signal]) -> io::Result<Self> {
        let heeded = |s: &&Signal| !(ENDING.contains(s) && is_ignored(**s));
        let set: SigSet = signals.iter().filter(heeded).copied().collect();
        set.thread_block()?;
        Ok(Self(SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?))
    }
}

/// Whether whoever started this program has it ignore `signal`.
#[must_use]
pub fn is_ignored(signal: Signal) -> bool {
    ignored() & (1 << (signal as u32 - 1)) != 0
}

/// A bit for each signal that is ignored, from the line `SigIgn` of proc_pid_status(5).
fn ignored() -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = text.lines().find_map(|l| l.strip_prefix("SigIgn:"));
    mask.and_then(|m| u64::from_str_radix(m.trim(), 16).ok()).unwrap_or_default()
}

/// A signal that came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// Which.
    pub signal: Signal,
    /// The kernel sent it, as a terminal does to every process in front of it; otherwise a process sent it to this one.
    pub by_kernel: bool,
}

impl Signals {
    /// The next signal that has come, if any.
    pub fn receive(&mut self) -> Option<Received> {
        let info = self.0.read_signal().ok()??;
        let signal = i32::try_from(info.ssi_signo).ok().and_then(|n| Signal::try_from(n).ok())?;
        Some(Received { signal, by_kernel: info.ssi_code == nix::libc::SI_KERNEL })
    }
}

/// The signals that have come; ends when there is none, and may be asked again.
impl Iterator for Signals {
    type Item = Signal;

    fn next(&mut self) -> Option<Signal> {
        self.receive().map(|r| r.signal)
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
