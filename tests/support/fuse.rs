//! A file server of our own, mounted with FUSE: it lends locks to other hosts, fails as told, and can be stopped.
//!
//! The server is a process of its own, this test binary once more, so that `SIGSTOP` makes it a server that does not
//! answer. A test file that names this module runs [`server`] too, which returns at once unless it is told to serve.
//! Files lie in memory; there are no subdirectories.
#![allow(dead_code, unreachable_pub)]

#[path = "fuse_server.rs"]
mod serving;

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::support::{DEADLINE, am_root, left_out, wait_for};

/// The environment variable that makes [`server`] serve: its [`Orders`].
const ORDERS: &str = "QLOCK_TEST_FUSE";

/// The last byte of a lock without end.
pub const WITHOUT_END: u64 = i64::MAX as u64;

/// Where locks are decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Locking {
    /// By the server (`FUSE_POSIX_LOCKS`), as on a network file system: the kernel keeps no record of any lock.
    Server,
    /// By the kernel, as if the file system were local; what other hosts hold is not seen.
    Kernel,
}

/// How it is mounted.
#[derive(Clone, Debug)]
pub struct Setup<'a> {
    /// As mountinfo shows it, such as `filer:/vol`.
    pub source: &'a str,
    /// `testnfs` is shown as `fuse.testnfs`.
    pub kind: &'a str,
    pub locking: Locking,
    /// How long the kernel may answer lookups and stat from what it knows; zero: every one reaches the server.
    pub remembered: Duration,
}

impl Default for Setup<'_> {
    fn default() -> Self {
        Self { source: "filer:/vol", kind: "testnfs", locking: Locking::Server, remembered: Duration::ZERO }
    }
}

/// What is in a file at the start.
#[derive(Clone, Copy, Debug)]
pub enum Content<'a> {
    /// A hole of that many bytes.
    Size(u64),
    Bytes(&'a [u8]),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Read,
    Write,
}

/// A lock that somebody on another host holds: never checked against others, never in `/proc/locks`.
#[derive(Clone, Copy, Debug)]
pub struct Foreign<'a> {
    pub name: &'a str,
    pub mode: Mode,
    pub start: u64,
    /// The last byte, inclusive.
    pub end: u64,
    /// On that host; means nothing here.
    pub pid: u32,
}

/// True if a test can mount one here; otherwise says why not.
pub fn possible() -> bool {
    if !Path::new("/dev/fuse").exists() {
        left_out("no /dev/fuse");
        return false;
    }
    am_root()
}

/// A mounted file system and its server; both are gone when the test is over, however it ends.
pub struct Fuse {
    point: PathBuf,
    device: String,
    server: Child,
    answers: Receiver<String>,
}

impl Fuse {
    /// Mounts these files with the locks that others hold on them.
    pub fn mount(source: &str, files: &[(&str, Content<'_>)], foreign: &[Foreign<'_>]) -> Self {
        Self::mount_as(&Setup { source, ..Setup::default() }, files, foreign)
    }

    pub fn mount_as(setup: &Setup<'_>, files: &[(&str, Content<'_>)], foreign: &[Foreign<'_>]) -> Self {
        let directory = tempfile::Builder::new().prefix("qlock-fuse-").tempdir().unwrap();
        let point = directory.path().canonicalize().unwrap();
        let orders = Orders {
            point: point.clone(),
            source: setup.source.to_owned(),
            kind: setup.kind.to_owned(),
            locking: setup.locking,
            remembered: setup.remembered,
        };
        // The name of the test that serves, without that of the crate.
        let name = format!("{}::serving::server", module_path!().split_once("::").unwrap().1);
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", &name, "--nocapture"]).env(ORDERS, serde_json::to_string(&orders).unwrap());
        // A group of its own: Ctrl-C ends the tests, and their end makes the server clean up.
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0);
        let mut server = command.spawn().unwrap();
        let (sender, answers) = channel();
        let output = BufReader::new(server.stdout.take().unwrap());
        std::thread::spawn(move || output.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        let _ = directory.keep();
        // From here on it is unmounted whatever happens.
        let mut fuse = Self { point, device: String::new(), server, answers };
        while fuse.next_line() != "ready" {}
        fuse.device = mount_line(&fuse.point).expect("it is mounted").split(' ').nth(2).unwrap().to_owned();
        for (name, content) in files {
            match content {
                Content::Size(size) => File::create(fuse.path(name)).unwrap().set_len(*size).unwrap(),
                Content::Bytes(bytes) => std::fs::write(fuse.path(name), bytes).unwrap(),
            }
        }
        for lock in foreign {
            fuse.lock(*lock);
        }
        fuse
    }

    /// Where it is mounted.
    pub fn dir(&self) -> &Path {
        &self.point
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.point.join(name)
    }

    /// `major:minor` as in mountinfo; the minor is the number of the connection in `/sys/fs/fuse/connections`.
    pub fn device(&self) -> &str {
        &self.device
    }

    pub fn pid(&self) -> i32 {
        i32::try_from(self.server.id()).unwrap()
    }

    /// From now on somebody elsewhere holds this.
    pub fn lock(&mut self, lock: Foreign<'_>) {
        let Foreign { name, mode, start, end, pid } = lock;
        let mode = if mode == Mode::Read { "read" } else { "write" };
        self.tell(&format!("lock {name} {mode} {start} {end} {pid}"));
    }

    /// Nobody elsewhere holds anything on that file any more.
    pub fn unlock(&mut self, name: &str) {
        self.tell(&format!("unlock {name}"));
    }

    /// From now on asking for a lock (`F_GETLK`) and setting or clearing one (`F_SETLK`) fail with these, if any.
    pub fn fail(&mut self, getlk: Option<nix::errno::Errno>, setlk: Option<nix::errno::Errno>) {
        let number = |errno: Option<nix::errno::Errno>| errno.map_or(0, |e| e as i32);
        self.tell(&format!("fail {} {}", number(getlk), number(setlk)));
    }

    /// What the kernel sent about locks since this was last called, such as `setlk a.raw read 100 100 owner O pid P`.
    pub fn requests(&mut self) -> Vec<String> {
        let answer = self.tell("requests");
        answer.split(';').filter(|r| !r.is_empty()).map(str::to_owned).collect()
    }

    /// The server stops answering, until [`Self::go_on`].
    pub fn stop(&mut self) {
        self.signal(Signal::SIGSTOP);
        let pid = Pid::from_raw(self.pid());
        wait_for("the server to stop", || {
            let status = waitid(Id::Pid(pid), WaitPidFlag::WSTOPPED | WaitPidFlag::WNOHANG).unwrap();
            matches!(status, WaitStatus::Stopped(..)).then_some(())
        });
    }

    pub fn go_on(&mut self) {
        self.signal(Signal::SIGCONT);
    }

    /// The server is gone, and what it held: the mount stays, and everything on it fails with `ENOTCONN`.
    pub fn kill_server(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }

    /// Signals the server unless it was reaped: then the pid may be another's.
    fn signal(&mut self, signal: Signal) {
        if let Ok(None) = self.server.try_wait() {
            let _ = kill(Pid::from_raw(self.pid()), signal);
        }
    }

    fn tell(&mut self, command: &str) -> String {
        writeln!(self.server.stdin.as_mut().unwrap(), "{command}").unwrap();
        let answer = self.next_line();
        answer.strip_prefix("ok ").unwrap_or_else(|| panic!("{command}: {answer}")).to_owned()
    }

    fn next_line(&mut self) -> String {
        self.answers.recv_timeout(DEADLINE).unwrap_or_else(|e| panic!("the file server: {e}"))
    }
}

impl Drop for Fuse {
    fn drop(&mut self) {
        // Before a stopped server could go on: who waits for it gets an error, always.
        unmount(&self.point);
        // The connection goes with its last descriptor; only a child that inherited one could still hold it.
        if let Some((_, number)) = self.device.split_once(':') {
            let _ = std::fs::write(format!("/sys/fs/fuse/connections/{number}/abort"), "1");
        }
        self.kill_server();
        // Never recursively: if it should still be mounted, that would go on into it.
        let _ = std::fs::remove_dir(&self.point);
    }
}

/// Takes the mount from the tree at once, whoever has files open on it; whoever waits for the server gets an error.
fn unmount(point: &Path) {
    let _ = umount2(point, MntFlags::MNT_DETACH | MntFlags::MNT_FORCE | MntFlags::UMOUNT_NOFOLLOW);
}

/// The line of mountinfo about what is mounted there.
pub fn mount_line(point: &Path) -> Option<String> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = table.lines().find(|l| l.split(' ').nth(4) == point.to_str());
    line.map(str::to_owned)
}

#[derive(Serialize, Deserialize)]
struct Orders {
    point: PathBuf,
    source: String,
    kind: String,
    locking: Locking,
    remembered: Duration,
}
