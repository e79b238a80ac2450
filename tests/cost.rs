//! What does a quiet tick cost, counted and not timed: in system calls, and in how the work grows with the host?
//!
//! On a recorded tree of `/proc`, written here: half of the images are held by a process each, and as many processes have
//! nothing to do with them. The locks are real, so that the kernel and the tree tell the same story. Counts do not depend
//! on how busy the machine is.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/strace.rs"]
mod strace;
mod support;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use qlock::hold::HeldAccess;
use qlock::linux::Roots;
use qlock::linux::identity::status;
use qlock::monitor::look::{Looker, Scope};
use qlock::monitor::snapshot::{Snapshot, Verdict};
use support::{Images, am_root, have, holding, left_out, output, qemu_io};

/// Set for the process that is counted: how many images, and how many ticks.
const JOB: &str = "QLOCK_COST_JOB";
/// A path that does not exist: to ask for it marks the end of a tick.
const MARK: &str = "/qlock-end-of-tick";

/// What a tick asks the kernel at 200 images, 100 of them held, and 200 processes, where nothing but asking can tell of a
/// change. Memory and threads are left out: their calls come as the scheduler pleases.
///
/// Of an image: openat2, statx, fcntl, close; a held one is asked about what lies between its locks, too. Of known holders
/// 50 are read again at each tick.
const PER_TICK: [(&str, usize); 6] =
    [("close", 303), ("fcntl", 500), ("openat", 105), ("openat2", 200), ("read", 202), ("statx", 360)];

struct Tree {
    directory: tempfile::TempDir,
    _held: Vec<HeldAccess>,
}

impl Tree {
    fn proc(&self) -> PathBuf {
        self.directory.path().join("proc")
    }

    fn images(&self) -> PathBuf {
        self.directory.path().join("images")
    }

    /// Every second image is held as a VM holds a raw disk.
    fn new(images: usize) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let tree = |path: &str| directory.path().join(path);
        fs::create_dir_all(tree("images")).unwrap();
        fs::create_dir_all(tree("proc/self")).unwrap();
        fs::copy("/proc/self/mountinfo", tree("proc/self/mountinfo")).unwrap();
        let (mut held, mut table) = (Vec::new(), String::new());
        for i in 0..images {
            let image = tree(&format!("images/vm-{i:04}.raw"));
            File::create(&image).unwrap().set_len(64 * 1024).unwrap();
            let pid = 2 * i + 1000;
            let process = tree(&format!("proc/{pid}"));
            describe_process(&process, pid);
            if i % 2 == 1 {
                continue;
            }
            held.push(HeldAccess::acquire(&image, "cw/w".parse().unwrap()).unwrap());
            let id = status(&image).unwrap().id;
            let file = format!("{:02x}:{:02x}:{}", id.device.major, id.device.minor, id.inode);
            let mut fdinfo = "pos:\t0\nflags:\t02100002\n".to_owned();
            for range in ["100 101", "201 201"] {
                writeln!(fdinfo, "lock:\t1: OFDLCK ADVISORY  READ -1 {file} {range}").unwrap();
                writeln!(table, "{i}: OFDLCK ADVISORY  READ -1 {file} {range}").unwrap();
            }
            symlink(&image, process.join("fd/7")).unwrap();
            fs::write(process.join("fdinfo/7"), fdinfo).unwrap();
        }
        fs::write(tree("proc/locks"), table).unwrap();
        // A directory that was just changed may change again within a step of its clock, and is listed each time.
        let past = SystemTime::now() - Duration::from_secs(60);
        File::open(tree("images")).unwrap().set_modified(past).unwrap();
        Self { directory, _held: held }
    }
}

/// A process with a few things open.
fn describe_process(process: &Path, pid: usize) {
    fs::create_dir_all(process.join("fd")).unwrap();
    fs::create_dir_all(process.join("fdinfo")).unwrap();
    let stat = format!("{pid} (qemu-system-x86) S 1 1 1 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 4 0 {pid} 1000 100");
    fs::write(process.join("stat"), format!("{stat}{}\n", " 0".repeat(28))).unwrap();
    fs::write(process.join("cmdline"), format!("qemu-system-x86_64\0-name\0guest=vm{pid}\0")).unwrap();
    fs::write(process.join("cgroup"), "0::/\n").unwrap();
    for fd in 0..5 {
        symlink("/dev/null", process.join(format!("fd/{fd}"))).unwrap();
        fs::write(process.join(format!("fdinfo/{fd}")), "pos:\t0\nflags:\t0100000\n").unwrap();
    }
}

/// No test of its own: what the others run as a process, and count.
#[test]
fn the_process_that_is_counted() {
    let Ok(job) = std::env::var(JOB) else { return };
    let (images, ticks) = job.split_once(' ').unwrap();
    let (images, ticks): (usize, usize) = (images.parse().unwrap(), ticks.parse().unwrap());
    let tree = Tree::new(images);
    let mut looker = Looker::new(Roots::recorded(&tree.proc()), &[tree.images()], false, None).unwrap();
    let mut looks = (0..ticks).map(|_| {
        let sample = looker.look(Scope::Everything);
        assert!(!Path::new(MARK).exists());
        sample
    });
    let first = looks.next().unwrap();
    let snapshot = Snapshot::of(&first);
    let held = |i: &qlock::monitor::snapshot::Image| i.verdict == Verdict::Held && i.holders.len() == 1;
    assert_eq!(snapshot.images.iter().filter(|i| held(i)).count(), images / 2, "tree and kernel agree");
    assert!(looks.all(|sample| sample.says_the_same(&first)), "nothing changes");
}

fn counted(wrapper: &[&str], images: usize, ticks: usize) -> Command {
    let mut command = Command::new(wrapper[0]);
    command.args(&wrapper[1..]).arg(std::env::current_exe().unwrap());
    command.args(["--exact", "the_process_that_is_counted", "--nocapture"]).env(JOB, format!("{images} {ticks}"));
    command
}

#[test]
fn a_quiet_tick_makes_as_many_system_calls_as_it_did() {
    if !have(&["strace"]) {
        return;
    }
    const IMAGES: usize = 200;
    let log = tempfile::NamedTempFile::new().unwrap();
    let wrapper = [vec!["strace"], strace::arguments(log.path())].concat();
    let out = output(&mut counted(&wrapper, IMAGES, 8));
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
    let mut calls = strace::calls(log.path());
    // Whether a descriptor is open is what the standard library asks in debug builds alone.
    calls.retain(|call| !call.arguments.contains("F_GETFD"));
    let is_mark = |call: &strace::Call| call.arguments.contains(MARK);
    // Between two marks lies a tick; the first two still learn. A machine so slow that something grows old meanwhile adds
    // calls to one tick and not to all.
    let ticks: Vec<&[strace::Call]> = calls.split(is_mark).collect();
    let count = |tick: &[strace::Call]| {
        let mut by_name: BTreeMap<String, usize> = PER_TICK.iter().map(|(name, _)| ((*name).to_owned(), 0)).collect();
        tick.iter().for_each(|call| *by_name.entry(call.name.clone()).or_default() += 1);
        by_name.retain(|name, _| PER_TICK.iter().any(|(known, _)| known == name));
        by_name
    };
    let least = ticks[2..8].iter().min_by_key(|tick| count(tick).values().sum::<usize>()).unwrap();
    let counts = count(least);
    println!("a tick: {counts:?}");
    for (name, stored) in PER_TICK {
        let within = counts[name].abs_diff(stored) <= stored / 10;
        assert!(
            within,
            "{name}: {} calls a tick, {stored} are stored; if that is meant, store it: {counts:?}",
            counts[name]
        );
    }
    for i in 0..IMAGES {
        let is_about = |call: &&strace::Call| call.arguments.contains(&format!("/vm-{i:04}.raw"));
        let about = least.iter().filter(is_about).filter(|c| !c.arguments.contains("/proc/")).count();
        let list = || least.iter().filter(is_about).collect::<Vec<_>>();
        assert!(about <= if i % 2 == 1 { 4 } else { 7 }, "image {i} costs {about} calls: {:#?}", list());
    }
}

/// Instructions depend on the compiler, their growth does not: what is quadratic shows at twice the size.
#[test]
fn twice_the_host_is_twice_the_work() {
    if !have(&["valgrind"]) {
        return;
    }
    let instructions = |images: usize, ticks: usize| -> u64 {
        let wrapper = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"];
        let out = output(&mut counted(&wrapper, images, ticks));
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success(), "{said}{}", String::from_utf8_lossy(&out.stdout));
        let line = said.lines().find_map(|l| l.split_once("Collected :")).unwrap_or_else(|| panic!("{said}"));
        line.1.trim().parse().unwrap()
    };
    let per_tick = |images: usize| (instructions(images, 5) - instructions(images, 1)) / 4;
    let (small, large) = (per_tick(100), per_tick(200));
    println!("a tick: {small} instructions at 100 images, {large} at 200");
    assert!(large < small * 23 / 10, "{small} instructions at 100 images, {large} at 200");
}

/// With the program in the kernel and without the right to load it: the same holders, by other calls.
#[test]
fn what_the_kernel_names_is_what_proc_shows() {
    if !am_root() || !have(&["strace", "setpriv", "qemu-io"]) {
        return;
    }
    // The kernel's own numbers are not those of statx on every file system: there the walk goes through /proc.
    let known = ["ext2/ext3", "xfs", "btrfs", "tmpfs", "f2fs"];
    let images = Images::new();
    let kind = output(Command::new("stat").args(["-f", "-c", "%T"]).arg(images.dir()));
    let kind = String::from_utf8(kind.stdout).unwrap();
    let (qcow2, raw) = (images.qcow2("a.qcow2"), images.raw("b.raw"));
    let _writer = holding(&mut qemu_io(&["-f", "qcow2"], &qcow2), &qcow2, "cwr/wr");
    let _reader = holding(&mut qemu_io(&["-r", "-U", "-f", "raw"], &raw), &raw, "c/-");
    let listed = |wrapper: &[&str]| {
        let log = tempfile::NamedTempFile::new().unwrap();
        let strace = [wrapper, &["strace"], &strace::arguments(log.path())].concat();
        let mut command = Command::new(strace[0]);
        command.args(&strace[1..]).arg(env!("CARGO_BIN_EXE_qlock-top"));
        let out = output(command.args(["list", "--format", "json"]).arg(images.dir()));
        let mut seen: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        seen["taken_at"].take();
        let calls = strace::calls(log.path());
        let loads = calls.iter().filter(|c| c.name == "bpf" && c.succeeded()).count();
        let links = calls.iter().filter(|c| c.arguments.contains("/fd>, \"")).count();
        (seen, loads, links)
    };
    let (named, loads, few) = listed(&["env"]);
    let (walked, none, many) = listed(&["setpriv", "--bounding-set", "-sys_admin,-bpf,-perfmon", "--"]);
    assert_eq!(named["images"], walked["images"]);
    assert_eq!(named["images"][0]["holders"].as_array().unwrap().len(), 1, "{named:#}");
    assert_eq!(none, 0, "nothing is asked for that would be refused");
    if known.contains(&kind.trim()) {
        assert!(loads > 0 && few < many, "{loads} calls of bpf(2), {few} links followed and {many} without");
    } else {
        left_out(&format!("the program in the kernel is not used on {}", kind.trim()));
    }
}
