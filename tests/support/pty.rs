//! A terminal that the tests own: what the program writes is read by a terminal emulator, and counted.
#![allow(dead_code, unreachable_pub)]

use std::fs::File;
use std::io::{Read, Write};
use std::num::NonZeroU16;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Command, ExitStatus};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use nix::fcntl::OFlag;
use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::termios::{Termios, tcgetattr};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::support::{Running, wait_for};

pub struct Pty {
    pub running: Running,
    /// None after a hangup.
    master: Option<File>,
    slave: File,
    parser: Arc<Mutex<vt100::Parser>>,
    bytes: Arc<AtomicUsize>,
    raw: Arc<Mutex<Vec<u8>>>,
    /// While set, nobody reads what the program writes.
    pub stalled: Arc<AtomicBool>,
    pub before: Termios,
}

fn size(columns: u16, rows: u16) -> (NonZeroU16, NonZeroU16) {
    (NonZeroU16::new(rows).unwrap(), NonZeroU16::new(columns).unwrap())
}

fn winsize(columns: u16, rows: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

impl Pty {
    /// Starts a program on a terminal of its own, in a session of its own.
    pub fn start(program: &str, arguments: &[&str], environment: &[(&str, &str)], columns: u16, rows: u16) -> Self {
        // Closed on exec from the start: a copy in some child would keep the terminal from ever hanging up.
        let master = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let slave = ptsname_r(&master).unwrap();
        let no_ctty = OFlag::O_NOCTTY.bits();
        let slave = File::options().read(true).write(true).custom_flags(no_ctty).open(slave).unwrap();
        tcsetwinsize(&slave, winsize(columns, rows)).unwrap();
        let before = tcgetattr(&slave).unwrap();
        let end = || slave.try_clone().unwrap();
        let mut command = Command::new("setsid");
        command.arg("--ctty").arg(program).args(arguments).stdin(end()).stdout(end()).stderr(end());
        command.env_remove("NO_COLOR").env("LC_ALL", "C.UTF-8").env("TERM", "xterm-256color");
        command.envs(environment.iter().copied());
        let running = Running::spawn(&mut command);
        // The command keeps copies of the descriptors.
        drop(command);

        let (rows, columns) = size(columns, rows);
        let parser = Arc::new(Mutex::new(vt100::Parser::new(rows, columns, 0)));
        let (bytes, stalled) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let master = File::from(OwnedFd::from(master));
        let mut reader = master.try_clone().unwrap();
        let raw = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&raw);
        let (to, count, stop) = (Arc::clone(&parser), Arc::clone(&bytes), Arc::clone(&stalled));
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            loop {
                if stop.load(Ordering::SeqCst) {
                    std::thread::sleep(std::time::Duration::from_millis(1));
                    continue;
                }
                // Waits only a little, so that a hangup closes this copy of the master too.
                let mut fds = [nix::poll::PollFd::new(std::os::fd::AsFd::as_fd(&reader), nix::poll::PollFlags::POLLIN)];
                match nix::poll::poll(&mut fds, 20u16) {
                    Ok(0) if Arc::strong_count(&count) == 1 => return,
                    Ok(0) => continue,
                    _ => {}
                }
                match reader.read(&mut buffer) {
                    Ok(0) | Err(_) => return,
                    Ok(n) => {
                        count.fetch_add(n, Ordering::SeqCst);
                        log.lock().unwrap().extend(&buffer[..n]);
                        to.lock().unwrap().process(&buffer[..n]);
                    }
                }
            }
        });
        Self { running, master: Some(master), slave, parser, bytes, raw, stalled, before }
    }

    pub fn screen(&self) -> String {
        self.parser.lock().unwrap().screen().contents()
    }

    pub fn with_screen<T>(&self, ask: impl FnOnce(&vt100::Screen) -> T) -> T {
        ask(self.parser.lock().unwrap().screen())
    }

    /// Everything that the program has written so far, as it came.
    pub fn raw(&self) -> Vec<u8> {
        self.raw.lock().unwrap().clone()
    }

    /// Bytes that the program has written so far.
    pub fn written(&self) -> usize {
        self.bytes.load(Ordering::SeqCst)
    }

    /// Waits until the screen shows `text`.
    pub fn wait_for(&self, text: &str) -> String {
        let mut last = String::new();
        let deadline = std::time::Instant::now() + crate::support::DEADLINE;
        while std::time::Instant::now() < deadline {
            last = self.screen();
            if last.contains(text) {
                return last;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        panic!("waited in vain for {text:?} on\n{last}");
    }

    pub fn keys(&self, keys: &str) {
        self.master.as_ref().unwrap().write_all(keys.as_bytes()).unwrap();
    }

    pub fn resize(&self, columns: u16, rows: u16) {
        let (r, c) = size(columns, rows);
        self.parser.lock().unwrap().set_size(r, c);
        tcsetwinsize(self.master.as_ref().unwrap(), winsize(columns, rows)).unwrap();
    }

    pub fn termios(&self) -> Termios {
        tcgetattr(&self.slave).unwrap()
    }

    /// Closes the terminal's other end, as a broken SSH connection does.
    pub fn hang_up(&mut self) {
        self.master = None;
        // The reading thread holds a copy of the master; it leaves when nobody counts any more.
        self.bytes = Arc::new(AtomicUsize::new(0));
    }

    pub fn wait_for_end(&mut self) -> ExitStatus {
        wait_for("the end of the program", || self.running.0.try_wait().unwrap())
    }
}

impl Drop for Pty {
    /// Ends the program in the way that lets it clean up, also when the test fails.
    fn drop(&mut self) {
        self.stalled.store(false, Ordering::SeqCst);
        let pid = nix::unistd::Pid::from_raw(self.running.pid());
        for signal in [nix::sys::signal::Signal::SIGCONT, nix::sys::signal::Signal::SIGTERM] {
            if matches!(self.running.0.try_wait(), Ok(None)) {
                let _ = nix::sys::signal::kill(pid, signal);
            }
        }
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
        while matches!(self.running.0.try_wait(), Ok(None)) && std::time::Instant::now() < deadline {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}
