//! Who touches the terminal, and how is it given back as it was, whatever happens?
//!
//! Raw mode, the alternate screen and every byte that is written. A frame is one write(2) of what has changed; nothing is
//! written when nothing has. The terminal is written to without waiting, through an open file description of its own, so
//! that a reader that stalls stops neither the program nor its end.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossterm::clipboard::CopyToClipboard;
use crossterm::cursor::{Hide, Show};
use crossterm::event::{DisableBracketedPaste, EnableBracketedPaste};
use crossterm::style::ResetColor;
use crossterm::terminal::{self, Clear, ClearType, EnterAlternateScreen, LeaveAlternateScreen};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use ratatui::backend::{Backend, CrosstermBackend};
use ratatui::buffer::Buffer;
use ratatui::layout::Rect;

/// Whether the terminal is to be given back: set before it is taken, so that the panic hook knows.
static TAKEN: AtomicBool = AtomicBool::new(false);

/// Whether the mouse is listened to, so that it is given back too.
static MOUSE: AtomicBool = AtomicBool::new(false);
/// Clicks and the wheel (1000) in the form without a limit of 223 columns (1006); no movements.
const MOUSE_ON: &[u8] = b"\x1b[?1000h\x1b[?1006h";
const MOUSE_OFF: &[u8] = b"\x1b[?1006l\x1b[?1000l";

/// How long a stalled terminal may hold up the end.
const PATIENCE: Duration = Duration::from_millis(200);

/// The terminal, taken over until it is dropped.
pub(super) struct Screen {
    out: File,
    pending: Vec<u8>,
    shown: Buffer,
    redraw: bool,
}

/// Gives the terminal back: the modes that [`Screen::take_over`] switched on, and the termios of before.
///
/// Does nothing if it has been given back already; never waits long and never fails.
pub(super) fn give_back() {
    if !TAKEN.swap(false, Ordering::SeqCst) {
        return;
    }
    let mut bytes = Vec::new();
    if MOUSE.swap(false, Ordering::SeqCst) {
        bytes.extend(MOUSE_OFF);
    }
    let queued = crossterm::queue!(bytes, DisableBracketedPaste, ResetColor, Show, LeaveAlternateScreen);
    if let (Ok(()), Ok(out)) = (queued, open_output()) {
        let deadline = Instant::now() + PATIENCE;
        let mut rest = bytes.as_slice();
        while !rest.is_empty() && wait_writable(&out, deadline) {
            match (&out).write(rest) {
                Ok(n) => rest = &rest[n..],
                Err(e) if is_temporary(&e) => {}
                Err(_) => break,
            }
        }
    }
    // After a hangup there is nothing left to restore.
    let _ = terminal::disable_raw_mode();
}

fn is_temporary(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

fn wait_writable(out: &File, deadline: Instant) -> bool {
    let left = deadline.saturating_duration_since(Instant::now());
    let mut fds = [PollFd::new(out.as_fd(), PollFlags::POLLOUT)];
    let ready = poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO));
    ready.is_ok_and(|n| n > 0) && fds[0].revents().is_some_and(|r| r == PollFlags::POLLOUT)
}

/// The terminal behind standard output, opened anew: not to wait is a property of the description, which standard output
/// shares with the shell. Where it may not be opened (after su), standard output itself.
fn open_output() -> io::Result<File> {
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    File::options()
        .write(true)
        .custom_flags(flags)
        .open("/proc/self/fd/1")
        .or_else(|_| io::stdout().as_fd().try_clone_to_owned().map(File::from))
}

/// Columns and rows of a terminal, by ioctl: nothing is ever asked of the terminal itself. A serial line that does not
/// know its size counts as 80x24.
pub(super) fn size(terminal: impl AsFd) -> (u16, u16) {
    match rustix::termios::tcgetwinsize(terminal) {
        // No screen is larger than this; a terminal that says so would cost gigabytes.
        Ok(size) if size.ws_col > 0 && size.ws_row > 0 => (size.ws_col.min(1000), size.ws_row.min(500)),
        _ => (80, 24),
    }
}

impl Screen {
    /// Takes the terminal over, guard and panic hook first.
    pub(super) fn take_over() -> io::Result<Self> {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            // First the terminal, so that the message can be read.
            give_back();
            hook(info);
        }));
        let mut screen =
            Self { out: open_output()?, pending: Vec::new(), shown: Buffer::empty(Rect::ZERO), redraw: true };
        screen.enter()?;
        Ok(screen)
    }

    fn enter(&mut self) -> io::Result<()> {
        TAKEN.store(true, Ordering::SeqCst);
        terminal::enable_raw_mode()?;
        crossterm::queue!(self.pending, EnterAlternateScreen, Hide, EnableBracketedPaste)?;
        self.redraw = true;
        Ok(())
    }

    /// Takes the terminal again after the shell had it.
    pub(super) fn take_again(&mut self, mouse: bool) -> io::Result<()> {
        // What crossterm believes of the modes is from before: it must set them anew.
        terminal::disable_raw_mode()?;
        self.pending.clear();
        self.enter()?;
        if mouse { self.listen_to_mouse(true) } else { Ok(()) }
    }

    /// Has the terminal send clicks and the wheel, or no longer.
    pub(super) fn listen_to_mouse(&mut self, on: bool) -> io::Result<()> {
        MOUSE.store(on, Ordering::SeqCst);
        self.pending.extend(if on { MOUSE_ON } else { MOUSE_OFF });
        self.flush()
    }

    /// Puts text on the clipboard of the operator's own terminal, through ssh and tmux (OSC 52).
    pub(super) fn copy(&mut self, text: &str) -> io::Result<()> {
        let mut plain = Vec::new();
        crossterm::queue!(plain, CopyToClipboard::to_clipboard_from(text))?;
        self.pending.extend(&plain);
        if std::env::var_os("TMUX").is_some() {
            // tmux may keep it to itself; wrapped, and with each ESC doubled, it goes on to the terminal outside.
            self.pending.extend(b"\x1bPtmux;");
            for byte in plain {
                self.pending.extend(std::iter::repeat_n(byte, if byte == 0x1b { 2 } else { 1 }));
            }
            self.pending.extend(b"\x1b\\");
        }
        self.flush()
    }

    /// Writes every cell with the next frame, whatever is there.
    pub(super) fn redraw(&mut self) {
        self.redraw = true;
    }

    /// Whether bytes wait for the terminal to take them.
    pub(super) fn is_behind(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Shows `next` if the terminal has taken the frame before; otherwise says false, and the newest frame is to be
    /// offered again when it has.
    pub(super) fn show(&mut self, next: Buffer) -> io::Result<bool> {
        // What was queued while taking over goes out together with the first frame.
        if self.is_behind() && !self.shown.area.is_empty() {
            return Ok(false);
        }
        if self.redraw || self.shown.area != next.area {
            crossterm::queue!(self.pending, ResetColor, Clear(ClearType::All))?;
            self.shown = Buffer::empty(next.area);
            self.redraw = false;
        }
        let mut updates = self.shown.diff_iter(&next).peekable();
        if updates.peek().is_some() {
            CrosstermBackend::new(&mut self.pending).draw(updates)?;
        }
        self.shown = next;
        self.flush()?;
        Ok(true)
    }

    /// Writes as much as the terminal takes now.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        while !self.pending.is_empty() {
            match self.out.write(&self.pending) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => drop(self.pending.drain(..n)),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

impl AsFd for Screen {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.out.as_fd()
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        give_back();
    }
}
