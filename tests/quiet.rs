//! Does the monitor only look? Every system call that it makes is read from strace: it takes no lock, opens nothing for
//! writing, changes no file, sends no signal, starts no program, and touches no file that has nothing to do with images.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/pty.rs"]
mod pty;
#[path = "support/strace.rs"]
mod strace;
mod support;

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pty::Pty;
use qlock::hold::HeldAccess;
use strace::Call;
use support::{Images, Running, have, output, wait_for};

const PROGRAM: &str = env!("CARGO_BIN_EXE_qlock-top");

/// Calls that change a file, another process or the system. A monitor makes none of them.
const HARM: [&str; 56] = [
    "flock",
    "creat",
    "unlink",
    "unlinkat",
    "rename",
    "renameat",
    "renameat2",
    "link",
    "linkat",
    "symlink",
    "symlinkat",
    "mkdir",
    "mkdirat",
    "rmdir",
    "mknod",
    "mknodat",
    "truncate",
    "ftruncate",
    "fallocate",
    "chmod",
    "fchmod",
    "fchmodat",
    "fchmodat2",
    "chown",
    "fchown",
    "lchown",
    "fchownat",
    "utime",
    "utimes",
    "utimensat",
    "futimesat",
    "setxattr",
    "lsetxattr",
    "fsetxattr",
    "removexattr",
    "copy_file_range",
    "sendfile",
    "pwrite64",
    "pwritev",
    "pwritev2",
    "kill",
    "tkill",
    "tgkill",
    "rt_sigqueueinfo",
    "rt_tgsigqueueinfo",
    "pidfd_send_signal",
    "ptrace",
    "process_vm_readv",
    "process_vm_writev",
    "mount",
    "umount2",
    "setns",
    "socket",
    "connect",
    "fork",
    "vfork",
];

/// Commands of fcntl(2) that ask, or change nothing but a descriptor of the program's own.
const HARMLESS_FCNTL: [&str; 7] =
    ["F_GETLK", "F_OFD_GETLK", "F_GETFD", "F_SETFD", "F_GETFL", "F_SETFL", "F_DUPFD_CLOEXEC"];

/// Where a write may go: what the program was started with, and what it wakes itself with.
fn is_own_output(target: &str) -> bool {
    ["pipe:", "/dev/pts/", "/dev/tty", "anon_inode:[eventfd]", "anon_inode:[signalfd]"]
        .iter()
        .any(|o| target.starts_with(o))
}

/// Nothing in `calls` does anything to anybody else.
fn assert_only_looks(calls: &[Call]) {
    assert!(calls.len() > 100, "the log is whole: {} calls", calls.len());
    for call in calls {
        let name = call.name.as_str();
        assert!(!HARM.contains(&name), "{call:?}");
        let arguments = &call.arguments;
        match name {
            "fcntl" => {
                // A call that the end of the program cut off is logged without its end.
                let command = arguments.split(", ").nth(1).unwrap().split(' ').next().unwrap();
                assert!(HARMLESS_FCNTL.contains(&command), "{call:?}");
            }
            "write" | "writev" => assert!(call.descriptor().is_some_and(is_own_output), "{call:?}"),
            // The first one starts it.
            "execve" | "execveat" => assert!(arguments.starts_with(&format!("\"{PROGRAM}\"")), "{call:?}"),
            "clone" | "clone3" => assert!(arguments.contains("CLONE_THREAD"), "no process, only threads: {call:?}"),
            _ => {}
        }
        let writes = |flag: &&str| ["O_WRONLY", "O_RDWR", "O_CREAT", "O_TRUNC", "O_TMPFILE", "O_APPEND"].contains(flag);
        if call.is_open() && call.flags().iter().any(writes) {
            let terminal = call.opened().is_some_and(|o| o.starts_with("/dev/pts/") || o.starts_with("/dev/tty"));
            assert!(terminal && !call.flags().contains(&"O_CREAT"), "{call:?}");
        }
    }
}

/// Images in each state, and the calls of one who looks at them.
struct Scene {
    images: Images,
    log: tempfile::NamedTempFile,
}

impl Scene {
    fn make() -> Self {
        let images = Images::new();
        for name in ["a.raw", "b.raw", "c.raw"] {
            images.raw(name);
        }
        std::os::unix::fs::symlink("b.raw", images.path("link.raw")).unwrap();
        Self { images, log: tempfile::NamedTempFile::new().unwrap() }
    }

    fn traced(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("strace");
        command.args(strace::arguments(self.log.path())).arg(PROGRAM).args(arguments).arg(self.images.dir());
        // Cargo has the linker look among the compiler's libraries first.
        command.env_remove("LD_LIBRARY_PATH").stdin(Stdio::null()).stdout(Stdio::piped());
        command
    }

    fn calls(&self) -> Vec<Call> {
        strace::calls(self.log.path())
    }

    fn hold(&self, name: &str) -> HeldAccess {
        HeldAccess::acquire(&self.images.path(name), "cw/w".parse().unwrap()).unwrap()
    }
}

/// The program that a tracer runs.
fn child_of(tracer: i32) -> Pid {
    let children = fs::read_to_string(format!("/proc/{tracer}/task/{tracer}/children")).unwrap();
    Pid::from_raw(children.split_whitespace().next().unwrap().parse().unwrap())
}

#[test]
fn a_look_takes_no_lock_and_changes_nothing() {
    if !have(&["strace"]) {
        return;
    }
    for format in ["table", "json"] {
        let scene = Scene::make();
        let _held = scene.hold("a.raw");
        let status = output(&mut scene.traced(&["list", "--format", format])).status;
        assert_eq!(status.code(), Some(1));
        let calls = scene.calls();
        assert_only_looks(&calls);
        assert!(calls.iter().any(|c| c.name == "fcntl" && c.arguments.contains("F_GETLK")), "it asks");
    }
}

#[test]
fn watching_takes_no_lock_and_changes_nothing_whatever_happens() {
    if !have(&["strace"]) {
        return;
    }
    let scene = Scene::make();
    let mut watch = Running::spawn(&mut scene.traced(&["watch", "--format", "ndjson", "--interval", "100ms"]));
    let mut lines = BufReader::new(watch.0.stdout.take().unwrap()).lines();
    let mut until = |kind: &str| {
        let kind = format!("\"kind\":\"{kind}\"");
        while !lines.next().unwrap().unwrap().contains(&kind) {}
    };
    until("snapshot");
    for name in ["a.raw", "b.raw"] {
        let held = scene.hold(name);
        until("acquired");
        drop(held);
        until("released");
    }
    let fresh = scene.images.raw("fresh.raw");
    until("image-added");
    fs::remove_file(fresh).unwrap();
    until("image-removed");
    let program = child_of(watch.pid());
    kill(program, Signal::SIGTERM).unwrap();
    wait_for("the end", || watch.0.try_wait().unwrap());
    assert_only_looks(&scene.calls());
}

#[test]
fn the_dashboard_takes_no_lock_and_changes_nothing_whatever_is_pressed() {
    if !have(&["strace"]) {
        return;
    }
    let scene = Scene::make();
    let directory = scene.images.dir().to_str().unwrap();
    let arguments = [&strace::arguments(scene.log.path())[..], &[PROGRAM, directory]].concat();
    let mut pty = Pty::start("strace", &arguments, &[], 120, 40);
    pty.wait_for("4 images");
    let held = scene.hold("b.raw");
    pty.wait_for("2 in use");
    // Panels, lists, filter, sorting, clipboard; a check, which is not a test lock.
    pty.keys("12345jkGgsSr+-m\x0c");
    pty.keys("p");
    pty.wait_for("which images each process uses");
    pty.keys("p");
    pty.wait_for("PERMISSION");
    pty.keys("c1");
    pty.wait_for("sent to the terminal's clipboard");
    pty.keys("/c.raw\r");
    pty.wait_for("> c.raw");
    pty.keys("t");
    pty.wait_for("Enter goes on");
    pty.keys("\r");
    pty.wait_for("check only: ask");
    pty.keys("\r");
    pty.wait_for("nothing was locked");
    drop(held);
    pty.wait_for("0 in use");
    pty.keys("q");
    pty.wait_for_end();
    assert_only_looks(&scene.calls());
}

#[test]
fn questions_about_an_image_take_no_lock_and_change_nothing() {
    if !have(&["strace"]) {
        return;
    }
    for arguments in [&["why"][..], &["why", "--as", "vm"], &["wait", "--as", "vm", "--timeout", "100ms"]] {
        let scene = Scene::make();
        let _held = scene.hold("a.raw");
        let mut command = Command::new("strace");
        command.args(strace::arguments(scene.log.path())).arg(PROGRAM).args(arguments);
        output(command.arg(scene.images.path("a.raw")).stdin(Stdio::null()));
        assert_only_looks(&scene.calls());
    }
}

/// What `list` may touch besides the images, each for its reason. What ends with a slash stands for all below it.
const ALLOWED: [(&str, &str); 14] = [
    ("/sys/kernel/btf/vmlinux", "where the fields lie that a program in the kernel reads"),
    ("/proc/", "who has which file open, which locks there are, what is mounted"),
    ("/proc", "its processes"),
    ("/sys/block", "which loop devices there are, and on which files"),
    ("/sys/block/", "the same"),
    ("/sys/devices/", "where the links of /sys/block lead"),
    ("/sys/fs/cgroup/", "memory limits that the standard library reads for its number of threads"),
    ("/etc/passwd", "names of users; no name service is asked"),
    ("/etc/qlock-top.toml", "the configuration"),
    ("/etc/localtime", "the time zone"),
    ("/usr/share/zoneinfo/", "the time zone"),
    ("/etc/ld.so.cache", "the dynamic linker"),
    ("/etc/ld.so.preload", "the dynamic linker"),
    ("/dev/null", "the standard library, should a standard descriptor be closed"),
];

fn is_allowed(path: &Path, watched: &Path) -> bool {
    let text = path.to_str().unwrap();
    let library =
        ["/lib/", "/lib64/", "/usr/lib/", "/usr/lib64/"].iter().any(|l| text.starts_with(l)) && text.contains(".so");
    let named = ALLOWED.iter().any(|(a, _)| if a.ends_with('/') { text.starts_with(a) } else { text == *a });
    // To resolve the links in the watched path, each directory above is asked whether it is one.
    library || named || path.starts_with(watched) || watched.starts_with(path)
}

#[test]
fn a_look_touches_nothing_but_the_images_and_what_the_kernel_tells() {
    if !have(&["strace"]) {
        return;
    }
    let scene = Scene::make();
    let _held = scene.hold("a.raw");
    // A backing file that is not watched is asked who it is, but never opened.
    let elsewhere = Images::new();
    let base = elsewhere.raw("base.raw");
    let mut header = vec![0; 4096];
    header[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    header[14..16].copy_from_slice(&1024u16.to_be_bytes());
    let name = base.to_str().unwrap();
    header[16..20].copy_from_slice(&u32::try_from(name.len()).unwrap().to_be_bytes());
    header[1024..1024 + name.len()].copy_from_slice(name.as_bytes());
    fs::write(scene.images.path("overlay.qcow2"), header).unwrap();

    output(&mut scene.traced(&["list"]));
    let calls = scene.calls();
    // So is a file that this host happens to have under a loop device: it might be one of the images.
    let under_loop = |call: &&Call| call.descriptor().is_some_and(|d| d.ends_with("/loop/backing_file"));
    let mut asked_only: Vec<PathBuf> =
        calls.iter().filter(|c| c.name == "read").filter(under_loop).filter_map(Call::path).collect();
    asked_only.iter_mut().for_each(|p| *p = p.to_str().unwrap().trim_end_matches("\\n").into());
    asked_only.push(base.clone());
    let mut strangers = BTreeSet::new();
    for call in &calls {
        // Below a directory descriptor, as in /proc/PID/fd, a name is no path of its own.
        let Some(path) = call.path().filter(|p| p.is_absolute() && call.name != "execve") else { continue };
        let asked = !call.is_open() && asked_only.iter().any(|a| a.starts_with(&path));
        if takes_path(&call.name) && !asked && !is_allowed(&path, scene.images.dir()) {
            strangers.insert(path);
        }
    }
    assert_eq!(strangers, BTreeSet::<PathBuf>::new());
    let opened = |path: &Path| calls.iter().any(|c| c.is_open() && c.path().as_deref() == Some(path));
    assert!(opened(&scene.images.path("a.raw")) && opened(Path::new("/proc/locks")) && !opened(&base));
}

fn takes_path(name: &str) -> bool {
    let begins =
        ["open", "stat", "lstat", "newfstatat", "statx", "access", "faccessat", "readlink", "statfs", "getxattr"];
    begins.iter().any(|b| name.starts_with(b)) || name == "chdir"
}
