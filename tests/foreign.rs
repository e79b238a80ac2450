//! Are locks that are not QEMU's shown as what they are, and counted as the kernel counts them against QEMU?
//!
//! Each is taken by a program that is not QEMU; what `why` then says is compared with what real QEMU is told.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/everyone.rs"]
mod everyone;
#[path = "support/places.rs"]
mod places;
mod support;
#[path = "support/told.rs"]
mod told;

use std::path::{Path, PathBuf};
use std::process::Command;

use everyone::{list, qlock_top};
use places::ready;
use serde_json::{Value, json};
use support::{Images, Running, access_of, bytes_of, have, holding, image, locked, output, python, qemu_io};

const TOOLS: [&str; 4] = ["python3", "qemu-io", "qemu-img", "qemu-system-x86_64"];
const SIZE: i64 = 1 << 20;

/// Takes `KIND MODE START LENGTH` of the image, length 0 without end, as often as asked.
const LOCKER: &str = "
import fcntl, os, struct, sys
fd = os.open(sys.argv[1], os.O_RDWR)
for lock in sys.argv[2:]:
    kind, mode, start, length = lock.split()
    mode = {'read': fcntl.F_RDLCK, 'write': fcntl.F_WRLCK}[mode]
    if kind == 'flock':
        fcntl.flock(fd, fcntl.LOCK_NB | (fcntl.LOCK_SH if mode == fcntl.F_RDLCK else fcntl.LOCK_EX))
    else:
        command = {'ofd': 37, 'posix': fcntl.F_SETLK}[kind]
        fcntl.fcntl(fd, command, struct.pack('hhqqi', mode, 0, int(start), int(length), 0))
print(flush=True)
sys.stdin.read()
";

fn locker(path: &Path, locks: &[&str]) -> Running {
    let mut command = python(LOCKER, &[path]);
    ready(command.args(locks)).0
}

fn images() -> (Images, PathBuf, PathBuf) {
    let images = Images::new();
    let (raw, qcow2) = (images.raw("a.raw"), images.qcow2("a.qcow2"));
    (images, raw, qcow2)
}

/// What is shown of `path`.
fn seen(path: &Path) -> Value {
    let (snapshot, _) = list(path);
    image(&snapshot, path).clone()
}

/// The foreign ranges that `holder` is shown to hold, and as which kind of lock.
fn ranges(seen: &Value, holder: &Running) -> Vec<(Value, String)> {
    let holders = seen["holders"].as_array().unwrap().iter();
    let foreign = holders.filter(|h| !h["foreign"].is_null());
    foreign
        .map(|h| {
            assert_eq!(h["pid"], holder.pid(), "{h}");
            assert_eq!(access_of(h), "-/-", "{h}");
            (h["foreign"].clone(), h["lock"].as_str().unwrap().to_owned())
        })
        .collect()
}

/// The texts of the findings of this code.
fn findings(seen: &Value, code: &str) -> Vec<String> {
    let all = seen["findings"].as_array().unwrap().iter().filter(|f| f["code"] == code);
    all.map(|f| f["text"].as_str().unwrap().to_owned()).collect()
}

/// A lock, and what each program is told because of it.
struct Case {
    lock: &'static str,
    shown: Value,
    bytes: &'static str,
    /// What `io`, `io-read-only`, `vm` and `vm-read-only` of a raw image are told, in QEMU's words; empty: let in.
    told: [&'static str; 4],
}

const PROGRAMS: [&str; 4] = ["io", "io-read-only", "vm", "vm-read-only"];

const NO_100: &str = "Failed to lock byte 100";
const NO_101: &str = "Failed to lock byte 101";
const NO_201: &str = "Failed to lock byte 201";
const READ: &str = "Failed to get \"consistent read\" lock";
const WRITE: &str = "Failed to get \"write\" lock";
const SHARED_WRITE: &str = "Failed to get shared \"write\" lock";

fn cases() -> Vec<Case> {
    let range = |start: i64, end: Value, mode: &str| json!({"start": start, "end": end, "mode": mode});
    let case = |lock, shown, bytes, told| Case { lock, shown, bytes, told };
    vec![
        case("ofd read 0 0", range(0, Value::Null, "read"), "cwurg/cwurg", [READ; 4]),
        case("ofd write 0 0", range(0, Value::Null, "write"), "cwurg/cwurg", [NO_100; 4]),
        case("posix write 0 0", range(0, Value::Null, "write"), "cwurg/cwurg", [NO_100; 4]),
        case("posix read 0 0", range(0, Value::Null, "read"), "cwurg/cwurg", [READ; 4]),
        // cloud-hypervisor, on a file of this size.
        case("ofd write 0 1048576", range(0, json!(SIZE - 1), "write"), "cwurg/cwurg", [NO_100; 4]),
        case("ofd read 0 1048576", range(0, json!(SIZE - 1), "read"), "cwurg/cwurg", [READ; 4]),
        case("ofd write 101 1", range(101, json!(101), "write"), "w/-", [NO_101, "", NO_101, SHARED_WRITE]),
        case("posix write 101 1", range(101, json!(101), "write"), "w/-", [NO_101, "", NO_101, SHARED_WRITE]),
        case("ofd write 201 1", range(201, json!(201), "write"), "-/w", [WRITE, "", NO_201, NO_201]),
        // Only what nobody asks for, and only a part of the bytes.
        case("ofd write 103 1", range(103, json!(103), "write"), "r/-", [""; 4]),
        case("ofd read 101 100", range(101, json!(200), "read"), "wurg/c", [READ; 4]),
        case("ofd write 90 11", range(90, json!(100), "write"), "c/-", [NO_100; 4]),
        case("ofd write 105 95", range(105, json!(199), "write"), "-/-", [""; 4]),
        case("ofd write 205 0", range(205, Value::Null, "write"), "-/-", [""; 4]),
    ]
}

#[test]
fn a_foreign_lock_is_shown_with_kind_and_range_and_refuses_whom_the_kernel_refuses() {
    if !have(&TOOLS) {
        return;
    }
    let (_images, path, _) = images();
    for case in cases() {
        let holder = locker(&path, &[case.lock]);
        let shown = seen(&path);
        let kind = case.lock.split(' ').next().unwrap();
        assert_eq!(ranges(&shown, &holder), [(case.shown, kind.to_owned())], "{}: {shown:#}", case.lock);
        let bytes: qlock::protocol::Access = case.bytes.parse().unwrap();
        assert_eq!(bytes_of(&shown), bytes.to_string(), "{}", case.lock);
        let verdict = if bytes.is_empty() { "free" } else { "held" };
        assert_eq!(shown["verdict"], verdict, "{}", case.lock);
        for byte in shown["bytes"].as_array().unwrap() {
            let by = if byte["state"] == "held" { json!([0]) } else { json!([]) };
            assert_eq!(byte["holders"], by, "{}: {byte}", case.lock);
        }
        let told = told::assert_told_as_predicted(&path, "raw", &PROGRAMS);
        let words: Vec<&str> = told.iter().map(|(words, _)| words.as_deref().unwrap_or_default()).collect();
        assert_eq!(words, case.told, "{}", case.lock);
        for (_, answer) in told.iter().filter(|(words, _)| words.is_some()) {
            assert_eq!(answer["holders"][0]["pid"], holder.pid(), "{}: {answer}", case.lock);
        }
    }
}

#[test]
fn a_formatted_image_is_refused_by_foreign_locks_on_the_bytes_that_its_format_takes() {
    if !have(&TOOLS) {
        return;
    }
    let (_images, _, path) = images();
    for lock in [
        "ofd write 103 1",
        "ofd write 203 1",
        "ofd read 203 1",
        "ofd write 203 40",
        "posix write 102 1",
        "ofd write 104 1",
        "ofd read 0 0",
        "posix write 0 0",
    ] {
        let holder = locker(&path, &[lock]);
        let told = told::assert_told_as_predicted(&path, "qcow2", &PROGRAMS);
        for (_, answer) in told.iter().filter(|(words, _)| words.is_some()) {
            assert_eq!(answer["holders"][0]["pid"], holder.pid(), "{lock}: {answer}");
        }
    }
}

#[test]
fn the_words_for_people_name_the_range_and_who_holds_it() {
    if !have(&TOOLS) {
        return;
    }
    let (_images, path, _) = images();
    for (lock, range) in [
        ("ofd write 0 0", "write lock on bytes 0 to the end"),
        ("posix read 0 1048576", "read lock on bytes 0 to 1048575"),
        ("ofd write 101 1", "write lock on byte 101"),
    ] {
        let holder = locker(&path, &[lock]);
        let texts = findings(&seen(&path), "foreign-lock");
        assert_eq!(texts.len(), 1, "{texts:?}");
        assert!(texts[0].contains(range) && texts[0].contains(&format!("python3 {}", holder.pid())), "{texts:?}");
        let out = output(qlock_top().args(["why", "--as", "vm"]).arg(&path));
        let text = String::from_utf8(out.stdout).unwrap();
        assert_eq!(out.status.code(), Some(1), "{text}");
        let range = range.split_once(" lock on ").unwrap().1;
        assert!(text.contains(&format!("foreign lock on {range}")), "{text}");
        assert!(text.contains(&format!("python3 {}", holder.pid())), "{text}");
    }
}

#[test]
fn what_virtlockd_and_libvirt_lock_stands_in_nobodys_way() {
    if !have(&TOOLS) {
        return;
    }
    let (_images, raw, qcow2) = images();
    for (path, format) in [(&raw, "raw"), (&qcow2, "qcow2")] {
        let holder = locker(path, &["posix write 0 1", "posix write 1 1"]);
        let shown = seen(path);
        let mut ranges = ranges(&shown, &holder);
        ranges.sort_by_key(|(range, _)| range["start"].as_i64());
        // Neighbours of one kind may be one range to the kernel.
        let covered = (&ranges[0].0["start"], &ranges[ranges.len() - 1].0["end"]);
        assert_eq!(covered, (&json!(0), &json!(1)), "{shown:#}");
        assert!(ranges.iter().all(|(range, kind)| range["mode"] == "write" && kind == "posix"), "{shown:#}");
        assert_eq!((shown["verdict"].as_str(), bytes_of(&shown).as_str()), (Some("free"), "-/-"));
        for (words, answer) in told::assert_told_as_predicted(path, format, &PROGRAMS) {
            assert_eq!(words, None, "{answer}");
        }
        // Beside a real VM's locks, which are told apart from them.
        let vm = holding(&mut qemu_io(&["-f", format], path), path, if format == "raw" { "cw/-" } else { "cwr/wr" });
        let shown = seen(path);
        for byte in shown["bytes"].as_array().unwrap().iter().filter(|b| b["state"] == "held") {
            let by = byte["holders"].as_array().unwrap();
            assert_eq!(by.len(), 1, "{byte}");
            assert_eq!(shown["holders"][usize::try_from(by[0].as_u64().unwrap()).unwrap()]["pid"], vm.pid());
        }
    }
}

/// virtlockd has the image open for reading and writing (`virLockSpaceResourceNew`), and never writes to it.
#[test]
fn who_locks_only_what_virtlockd_locks_is_no_danger_beside_a_vm() {
    if !have(&TOOLS) {
        return;
    }
    let (_images, path, _) = images();
    let _virtlockd = locker(&path, &["posix write 0 1"]);
    let dangers = |shown: &Value| {
        let findings = shown["findings"].as_array().unwrap();
        findings.iter().filter(|f| f["severity"] == "danger").count()
    };
    let alone = seen(&path);
    assert_eq!(dangers(&alone), 0, "it is not beside itself: {:#}", alone["findings"]);
    let _vm = holding(&mut qemu_io(&["-f", "raw"], &path), &path, "cw/-");
    let shown = seen(&path);
    assert_eq!(dangers(&shown), 0, "so it is with each image on such a host: {:#}", shown["findings"]);
}

#[test]
fn flock_is_independent_and_counts_for_nothing() {
    if !have(&TOOLS) {
        return;
    }
    let (_images, path, _) = images();
    for lock in ["flock read 0 0", "flock write 0 0"] {
        let holder = locker(&path, &[lock]);
        let shown = seen(&path);
        assert_eq!((shown["verdict"].as_str(), bytes_of(&shown).as_str()), (Some("free"), "-/-"), "{shown:#}");
        assert_eq!(shown["holders"], json!([]));
        assert_eq!(shown["openers"][0]["pid"], holder.pid(), "{shown:#}");
        assert_eq!(findings(&shown, "foreign-lock"), [""; 0]);
        assert_eq!(findings(&shown, "unlocked-writer").len(), 1);
        for program in PROGRAMS {
            let (sentence, answer) = told::predicted(&path, program);
            assert_eq!((sentence, told::attempt(&path, "raw", program)), (None, None), "{answer}");
        }
    }
}

#[test]
fn flock_of_util_linux_on_an_image_that_qemu_uses_changes_nothing() {
    if !have(&["flock", "qemu-io"]) {
        return;
    }
    let (_images, path, _) = images();
    let vm = holding(&mut qemu_io(&["-f", "raw"], &path), &path, "cw/-");
    let mut command = Command::new("flock");
    let (_locker, _) = ready(command.args(["-x"]).arg(&path).args(["sh", "-c", "echo; cat"]));
    let shown = seen(&path);
    assert_eq!((shown["verdict"].as_str(), bytes_of(&shown).as_str()), (Some("held"), "cw/-"), "{shown:#}");
    let pids: Vec<_> = shown["holders"].as_array().unwrap().iter().map(|h| h["pid"].as_i64().unwrap()).collect();
    assert_eq!(pids, [i64::from(vm.pid())]);
    // util-linux opens it for reading.
    assert_eq!(findings(&shown, "unlocked-writer"), [""; 0], "{shown:#}");
    assert!(!shown["openers"].as_array().unwrap().is_empty());
}

#[test]
fn a_write_lock_that_getlk_names_after_a_read_lock_is_found() {
    if !have(&TOOLS) {
        return;
    }
    let (_images, path, _) = images();
    // Over one range of several locks GETLK names the first only; each byte has its own answer all the same.
    let holder = locker(&path, &["ofd read 100 1", "ofd write 101 1", "ofd read 102 1", "ofd write 201 1"]);
    let shown = seen(&path);
    assert_eq!(bytes_of(&shown), "cwu/w", "{shown:#}");
    assert_eq!(shown["verdict"], "held");
    let told = told::assert_told_as_predicted(&path, "raw", &PROGRAMS);
    let words: Vec<&str> = told.iter().map(|(words, _)| words.as_deref().unwrap_or_default()).collect();
    assert_eq!(words, [NO_101, "", NO_101, NO_201]);
    assert_eq!(told[0].1["holders"][0]["pid"], holder.pid());
}

#[test]
fn a_lock_that_waits_is_nobodys_yet() {
    if !have(&TOOLS) {
        return;
    }
    let (_images, path, _) = images();
    let vm = holding(&mut qemu_io(&["-f", "raw"], &path), &path, "cw/-");
    // F_OFD_SETLKW on all of it: it waits for the VM, and is listed behind an arrow.
    let script = "import fcntl, os, struct, sys; fd = os.open(sys.argv[1], os.O_RDWR); \
                  fcntl.fcntl(fd, 38, struct.pack('hhqqi', fcntl.F_WRLCK, 0, 0, 0, 0)); print(flush=True); \
                  sys.stdin.read()";
    let mut waiter = python(script, &[&path]);
    let waiter = Running::spawn(waiter.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped()));
    let inode = std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(&path).unwrap());
    support::wait_for("it to wait", || {
        let table = std::fs::read_to_string("/proc/locks").unwrap();
        table.lines().any(|l| l.contains("->") && l.contains(&format!(":{inode} "))).then_some(())
    });
    let shown = seen(&path);
    assert_eq!(bytes_of(&shown), "cw/-", "{shown:#}");
    assert_eq!(ranges(&shown, &waiter), []);
    let pids: Vec<_> = shown["holders"].as_array().unwrap().iter().map(|h| h["pid"].as_i64().unwrap()).collect();
    assert_eq!(pids, [i64::from(vm.pid())]);
    told::assert_told_as_predicted(&path, "raw", &["io", "vm"]);
    vm.end();
    support::wait_for("its turn", || (locked(&path).bytes().count() == 10).then_some(()));
    assert_eq!(ranges(&seen(&path), &waiter).len(), 1);
}
