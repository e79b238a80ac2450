//! Is the file server of the tests what it says, and what does the kernel tell about locks that a file server keeps?
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/fuse.rs"]
mod fuse;
mod support;

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use fuse::{Content, Foreign, Fuse, Locking, Mode, Setup};
use nix::errno::Errno;
use qlock::linux::lock_table::LockMode;
use qlock::linux::probe::{self, Asker, LockFound};
use qlock::protocol::Access;
use rustix::fs::{AtFlags, CWD, Mode as FileMode, OFlags, StatxFlags, inotify};
use support::{DEADLINE, Running, have, holding, locked, python, qemu_io, run, wait_for};

/// A pid that no process here has: the kernel gives out none above 4,194,304.
const NOBODY: u32 = 5_000_000;
const RAW: &[(&str, Content<'_>)] = &[("a.raw", Content::Size(1 << 20))];
const DENIES_WRITE: Foreign<'_> = Foreign { name: "a.raw", mode: Mode::Read, start: 201, end: 201, pid: NOBODY };

/// The lines of `/proc/locks` about this file.
fn listed(fuse: &Fuse, inode: u64) -> Vec<String> {
    let (major, minor) = fuse.device().split_once(':').unwrap();
    let number = |n: &str| n.parse::<u32>().unwrap();
    let file = format!(" {:02x}:{:02x}:{inode} ", number(major), number(minor));
    let table = fs::read_to_string("/proc/locks").unwrap();
    table.lines().filter(|l| l.contains(&file)).map(str::to_owned).collect()
}

fn inode(path: &Path) -> u64 {
    fs::metadata(path).unwrap().ino()
}

/// What stands in the way of a write lock on this byte.
fn asked(path: &Path, asker: Asker, byte: u64) -> Result<Option<LockFound>, Errno> {
    let (file, _) = probe::open(path).unwrap();
    probe::first_lock(&file, asker, byte, byte)
}

fn read_lock(byte: u64, pid: i32) -> Result<Option<LockFound>, Errno> {
    Ok(Some(LockFound { mode: LockMode::Read, start: byte, end: Some(byte), pid }))
}

/// What qemu-io says when it cannot open the image for writing; empty if it can.
fn refusal(path: &Path) -> String {
    let output = qemu_io(&["-f", "raw", "-c", "read 0 512"], path).stdin(Stdio::null()).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.success(), text.is_empty(), "{text}");
    text
}

/// The descriptor that a process has of this file.
fn descriptor(holder: &Running, path: &Path) -> PathBuf {
    let links = fs::read_dir(format!("/proc/{}/fd", holder.pid())).unwrap();
    links.map(|l| l.unwrap().path()).find(|l| fs::read_link(l).is_ok_and(|to| to == path)).unwrap()
}

#[test]
fn a_lock_on_another_host_refuses_qemu_and_stands_in_no_list() {
    if !fuse::possible() || !have(&["qemu-io"]) {
        return;
    }
    let mut fuse = Fuse::mount("filer:/vol", RAW, &[DENIES_WRITE]);
    let line = fuse::mount_line(fuse.dir()).unwrap();
    assert!(line.contains(" - fuse.testnfs filer:/vol "), "{line}");

    let path = fuse.path("a.raw");
    assert!(refusal(&path).contains(r#"Failed to get "write" lock"#));
    assert_eq!(locked(&path).to_string(), "-/w");
    assert_eq!(listed(&fuse, inode(&path)), [""; 0]);
    // A pid of another host is nobody here..
    assert_eq!(asked(&path, Asker::Process, 201), read_lock(201, 0));
    assert_eq!(asked(&path, Asker::Description, 201), read_lock(201, -1));
    // ..or, by chance, somebody who has nothing to do with it.
    fuse.unlock("a.raw");
    fuse.lock(Foreign { pid: std::process::id(), ..DENIES_WRITE });
    assert_eq!(asked(&path, Asker::Process, 201), read_lock(201, std::process::id().cast_signed()));

    fuse.unlock("a.raw");
    assert_eq!(refusal(&path), "");
    fuse.lock(Foreign { mode: Mode::Write, start: 0, end: fuse::WITHOUT_END, ..DENIES_WRITE });
    assert!(refusal(&path).contains("Failed to lock byte 100"));
    let all = LockFound { mode: LockMode::Write, start: 0, end: None, pid: 0 };
    assert_eq!(asked(&path, Asker::Process, 100), Ok(Some(all)));
}

#[test]
fn a_lock_of_this_host_that_the_server_keeps_is_told_by_getlk_alone() {
    if !fuse::possible() || !have(&["qemu-io"]) {
        return;
    }
    let mut fuse = Fuse::mount("filer:/vol", RAW, &[]);
    let path = fuse.path("a.raw");
    let holder = holding(&mut qemu_io(&["-f", "raw"], &path), &path, "cw/-");
    assert_eq!(listed(&fuse, inode(&path)), [""; 0]);
    let link = descriptor(&holder, &path);
    let details = fs::read_to_string(link.to_str().unwrap().replace("/fd/", "/fdinfo/")).unwrap();
    assert!(details.contains("ino:") && !details.contains("lock:"), "{details}");
    // Not -1 as elsewhere: the server is told who takes an OFD lock, though not that it is one.
    assert_eq!(asked(&path, Asker::Process, 100), read_lock(100, holder.pid()));
    assert_eq!(asked(&path, Asker::Description, 100), read_lock(100, -1));
    let requests = fuse.requests();
    let took =
        |r: &String| r.starts_with("setlk a.raw read 100 100 ") && r.ends_with(&format!(" pid {}", holder.pid()));
    assert!(requests.iter().any(took), "{requests:#?}");

    // The kernel does not unlock; the server learns of the end as the file is released, a little later.
    holder.end();
    wait_for("the locks to go", || (locked(&path) == Access::NONE).then_some(()));
    let requests = fuse.requests();
    assert!(!requests.iter().any(|r| r.contains(" unlock ")), "{requests:#?}");
    assert!(requests.iter().any(|r| r.starts_with("release a.raw owner none ")), "{requests:#?}");
}

#[test]
fn locks_that_the_kernel_keeps_are_as_on_a_local_file_system() {
    if !fuse::possible() || !have(&["qemu-io"]) {
        return;
    }
    let setup = Setup { locking: Locking::Kernel, kind: "sshfs", ..Setup::default() };
    let mut fuse = Fuse::mount_as(&setup, RAW, &[DENIES_WRITE]);
    let path = fuse.path("a.raw");
    let _holder = holding(&mut qemu_io(&["-f", "raw"], &path), &path, "cw/-");
    let lines = listed(&fuse, inode(&path));
    assert!(lines.len() == 1 && lines[0].contains("OFDLCK") && lines[0].ends_with(" 100 101"), "{lines:?}");
    let local = LockFound { mode: LockMode::Read, start: 100, end: Some(101), pid: -1 };
    assert_eq!(asked(&path, Asker::Process, 100), Ok(Some(local)));
    assert_eq!(fuse.requests().iter().find(|r| r.contains("tlk")), None, "the server is not asked");
}

#[test]
fn a_server_that_cannot_lock() {
    if !fuse::possible() || !have(&["qemu-io"]) {
        return;
    }
    let mut fuse = Fuse::mount("filer:/vol", RAW, &[]);
    let path = fuse.path("a.raw");
    fuse.fail(Some(Errno::ENOLCK), Some(Errno::ENOLCK));
    assert_eq!(asked(&path, Asker::Process, 100), Err(Errno::ENOLCK));
    assert!(refusal(&path).contains("Failed to lock byte 100: No locks available"));
    fuse.fail(Some(Errno::EIO), None);
    assert_eq!(asked(&path, Asker::Description, 100), Err(Errno::EIO));
    assert!(refusal(&path).contains(r#"Failed to get "consistent read" lock: Input/output error"#));
    fuse.fail(None, None);
    assert_eq!(asked(&path, Asker::Process, 100), Ok(None));
    assert_eq!(refusal(&path), "");
}

#[test]
fn images_are_made_and_used_there() {
    if !fuse::possible() || !have(&["qemu-io", "qemu-img", "python3"]) {
        return;
    }
    let mut fuse = Fuse::mount("filer:/vol", &[("text", Content::Bytes(b"as given"))], &[]);
    assert_eq!(fs::read(fuse.path("text")).unwrap(), b"as given");
    let (qcow2, raw) = (fuse.path("a.qcow2"), fuse.path("b.raw"));
    run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&qcow2).arg("16M"));
    run(&mut qemu_io(&["-f", "qcow2", "-c", "write -P 3 1M 64k", "-c", "flush", "-c", "discard 1M 4k"], &qcow2));
    run(&mut qemu_io(&["-f", "qcow2", "-c", "read -P 3 1028k 60k"], &qcow2));
    run(Command::new("qemu-img").args(["convert", "-O", "raw"]).args([&qcow2, &raw]));
    run(Command::new("qemu-img").args(["resize", "-q", "-f", "raw"]).arg(&raw).arg("10G"));
    run(&mut qemu_io(&["-n", "-f", "raw", "-c", "read -P 3 1028k 60k"], &raw));
    assert_eq!(fs::metadata(&raw).unwrap().len(), 10 << 30);
    let mut names: Vec<_> = fs::read_dir(fuse.dir()).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["a.qcow2", "b.raw", "text"]);
    fs::remove_file(&raw).unwrap();
    assert!(!raw.exists());

    // Who waits for a lock gets it as soon as it is free.
    fuse.lock(Foreign { name: "text", mode: Mode::Write, start: 7, end: 7, pid: NOBODY });
    let script = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+b'), fcntl.LOCK_EX, 1, 7)";
    let mut waiter = Running::spawn(&mut python(script, &[&fuse.path("text")]));
    wait_for("the request", || fuse.requests().iter().any(|r| r.starts_with("setlkw text write 7 7 ")).then_some(()));
    assert_eq!(waiter.0.try_wait().unwrap(), None);
    fuse.unlock("text");
    assert!(wait_for("the lock", || waiter.0.try_wait().unwrap()).success());
}

/// A call that is tried on a thread of its own, because it may not come back.
struct Attempt<T> {
    name: &'static str,
    result: Receiver<T>,
}

impl<T: Send + 'static> Attempt<T> {
    fn start(name: &'static str, call: impl FnOnce() -> T + Send + 'static) -> Self {
        let (sender, result) = channel();
        std::thread::spawn(move || sender.send(call()));
        Self { name, result }
    }

    fn result(&self) -> T {
        self.result.recv_timeout(DEADLINE).unwrap_or_else(|e| panic!("{}: {e}", self.name))
    }

    fn assert_blocked(&self) {
        assert!(self.result.recv_timeout(Duration::from_millis(50)).is_err(), "{} came back", self.name);
    }
}

const HOLD_OPEN: &str = r"
import os, sys
f = open(sys.argv[1], 'r+b')
os.chdir(sys.argv[2])
print(flush=True)
sys.stdin.read()
";

/// A process that has the file open and sits in the directory.
fn opener(fuse: &Fuse, path: &Path) -> Running {
    let mut command = python(HOLD_OPEN, &[path, fuse.dir()]);
    let mut opener = Running::spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
    opener.0.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    opener
}

/// The inode, from what the kernel knows of the file.
fn statx_without_asking(path: &Path) -> Result<u64, rustix::io::Errno> {
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    rustix::fs::statx(CWD, path, flags, StatxFlags::BASIC_STATS | StatxFlags::MNT_ID).map(|found| found.stx_ino)
}

/// What comes back while a server does not answer, and what does not. No call that is blocked here has a file of that
/// mount open: to close one asks the server too (`FUSE_FLUSH`), and a process that dies with one hangs in `D`.
#[test]
fn a_stopped_server_blocks_what_asks_it_and_nothing_else() {
    if !fuse::possible() || !have(&["python3"]) {
        return;
    }
    let mut fuse = Fuse::mount("filer:/vol", RAW, &[]);
    let (directory, path) = (fuse.dir().to_owned(), fuse.path("a.raw"));
    let mut opener = opener(&fuse, &path);
    let number = inode(&path);
    let link = descriptor(&opener, &path);
    fuse.stop();

    let free = Attempt::start("what asks no server", {
        let (directory, path, link) = (directory.clone(), path.clone(), link.clone());
        move || {
            assert_eq!(statx_without_asking(&link), Ok(number));
            assert_eq!(statx_without_asking(&link.parent().unwrap().with_file_name("cwd")), Ok(1));
            assert_eq!(statx_without_asking(&directory), Ok(1));
            assert_eq!(fs::read_link(&link).unwrap(), path);
            assert!(fs::read_to_string(link.to_str().unwrap().replace("/fd/", "/fdinfo/")).unwrap().contains("ino:"));
            assert!(fuse::mount_line(&directory).is_some());
            assert_eq!(directory.canonicalize().unwrap(), directory);
            rustix::fs::open(&directory, OFlags::PATH, FileMode::empty()).unwrap();
            let watcher = inotify::init(inotify::CreateFlags::CLOEXEC).unwrap();
            inotify::add_watch(watcher, &directory, inotify::WatchFlags::OPEN).unwrap();
        }
    });
    free.result();

    let on = |of: &PathBuf, name, succeeds: fn(&Path) -> bool| {
        let of = of.clone();
        Attempt::start(name, move || succeeds(&of))
    };
    let blocked = [
        on(&path, "stat", |p| fs::metadata(p).is_ok()),
        on(&directory, "stat of the directory", |p| fs::metadata(p).is_ok()),
        on(&path, "statx without asking, by a path", |p| statx_without_asking(p).is_ok()),
        on(&link, "stat of another's descriptor", |p| fs::metadata(p).is_ok()),
        on(&path, "open", |p| File::open(p).is_ok()),
        on(&path, "open O_PATH", |p| rustix::fs::open(p, OFlags::PATH, FileMode::empty()).is_ok()),
        on(&path, "open and GETLK", |p| asked(p, Asker::Process, 100) == Ok(None)),
        on(&path, "canonicalize", |p| p.canonicalize().is_ok()),
        on(&directory, "statfs", |p| rustix::fs::statfs(p).is_ok()),
        on(&directory, "readdir", |p| fs::read_dir(p).is_ok_and(|entries| entries.count() == 1)),
    ];
    blocked.iter().for_each(Attempt::assert_blocked);
    drop(opener.0.stdin.take());
    let closing = Attempt::start("close at the end of a process", move || opener.0.wait().unwrap());
    closing.assert_blocked();

    fuse.go_on();
    for attempt in blocked {
        assert!(attempt.result(), "{}", attempt.name);
    }
    assert!(closing.result().success());
}

#[test]
fn what_the_kernel_may_remember_it_answers_for_a_stopped_server() {
    if !fuse::possible() {
        return;
    }
    let remembered = Duration::from_secs(3600);
    let mut fuse = Fuse::mount_as(&Setup { remembered, ..Setup::default() }, RAW, &[]);
    let path = fuse.path("a.raw");
    let number = inode(&path);
    fuse.stop();
    let known = Attempt::start("statx by a path that is known", {
        let path = path.clone();
        move || (statx_without_asking(&path), path.canonicalize().unwrap())
    });
    assert_eq!(known.result(), (Ok(number), path.clone()));
    let open = Attempt::start("open", move || drop(File::open(path).unwrap()));
    open.assert_blocked();
    fuse.go_on();
    open.result();
}

/// Nothing is left of what was mounted there.
fn assert_gone(directory: &Path, device: &str) {
    assert_eq!(fuse::mount_line(directory), None);
    assert!(!fs::read_to_string("/proc/mounts").unwrap().contains(directory.to_str().unwrap()));
    assert_eq!(directory.symlink_metadata().unwrap_err().kind(), std::io::ErrorKind::NotFound);
    let connection = PathBuf::from(format!("/sys/fs/fuse/connections/{}", device.split_once(':').unwrap().1));
    // Its number may be given to the next mount at once.
    let taken = || fs::read_to_string("/proc/self/mountinfo").unwrap().contains(&format!(" {device} "));
    wait_for("the connection to go", || (!connection.exists() || taken()).then_some(()));
}

#[test]
fn nothing_is_left_however_it_ends() {
    if !fuse::possible() || !have(&["python3"]) {
        return;
    }
    let mounted = || {
        let fuse = Fuse::mount("filer:/vol", RAW, &[DENIES_WRITE]);
        let was = (fuse.dir().to_owned(), fuse.device().to_owned(), fuse.pid());
        (fuse, was)
    };
    let assert_gone = |(directory, device, pid): (PathBuf, String, i32)| {
        assert_gone(&directory, &device);
        assert!(!Path::new(&format!("/proc/{pid}")).exists(), "the server is ended and reaped");
    };

    let (fuse, was) = mounted();
    let in_use = opener(&fuse, &fuse.path("a.raw"));
    drop(fuse);
    assert_eq!(fuse::mount_line(&was.0), None);
    // The kernel keeps what is in use, though nobody finds it any more.
    in_use.end();
    assert_gone(was);

    // Stopped, while one waits for it and one has a file open.
    let (mut fuse, was) = mounted();
    let in_use = opener(&fuse, &fuse.path("a.raw"));
    fuse.stop();
    let path = fuse.path("a.raw");
    let waiting = Attempt::start("stat", move || fs::metadata(path).map(drop));
    waiting.assert_blocked();
    drop(fuse);
    assert!(waiting.result().is_err());
    in_use.end();
    assert_gone(was);

    let (mut fuse, was) = mounted();
    fuse.kill_server();
    let error = fs::metadata(fuse.path("a.raw")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(Errno::ENOTCONN as i32));
    drop(fuse);
    assert_gone(was);

    let (mut fuse, was) = mounted();
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        fuse.stop();
        let _fuse = fuse;
        panic!("as a test that fails");
    }));
    assert!(panicked.is_err());
    assert_gone(was);
}

const DIE: &str = "QLOCK_TEST_FUSE_DIE";

/// Mounts, stops the server and is killed; no test unless told so.
#[test]
fn die() {
    if std::env::var_os(DIE).is_none() {
        return;
    }
    let mut fuse = Fuse::mount("filer:/vol", RAW, &[]);
    println!("\n{} {}", fuse.dir().display(), fuse.device());
    fuse.stop();
    nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::SIGKILL).unwrap();
}

#[test]
fn nothing_is_left_of_tests_that_were_killed() {
    if !fuse::possible() {
        return;
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    let output = command.args(["--exact", "die", "--nocapture"]).env(DIE, "1").output().unwrap();
    assert_eq!(output.status.signal(), Some(nix::sys::signal::SIGKILL as i32));
    let text = String::from_utf8(output.stdout).unwrap();
    let (directory, device) = text.lines().last().unwrap().split_once(' ').unwrap();
    // The server goes on, sees the end of its input and leaves.
    wait_for("the directory to go", || (!Path::new(directory).exists()).then_some(()));
    assert_gone(Path::new(directory), device);
}
