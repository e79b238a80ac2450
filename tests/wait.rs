//! Do `wait` and `hold --wait` come through when the other lets go and not before, and are they, as `why`, never told
//! "granted" of what cannot be told?
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output, Stdio};
use std::time::Instant;

use nix::libc::SYS_clock_nanosleep;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use qlock::linux::probe::{Asker, first_lock};
use qlock::protocol::{Access, Family, LockByte, Operation};
use serde_json::Value;
use support::{
    DEADLINE, Images, Running, am_root, have, holding, locked, output, python, qemu_io, qlock_top, run, wait_for,
};

fn one_image() -> (Images, PathBuf) {
    let images = Images::new();
    let path = images.raw("a.raw");
    (images, path)
}

/// Somebody who is in the way, as `access` on `image`.
fn holder(image: &Path, operation: &str, access: &str) -> Running {
    holding(qlock_top().arg("hold").arg(image).args(["--as", operation]), image, access)
}

fn wait(images: &[&Path], words: &[&str]) -> Command {
    let mut command = qlock_top();
    command.arg("wait").args(images).args(words);
    command
}

/// One that has looked at everything, and now waits between two questions.
fn waiting(images: &[&Path], operation: &str) -> Running {
    let mut command = wait(images, &["--as", operation]);
    let running = Running::spawn(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
    let call = format!("/proc/{}/syscall", running.pid());
    let sleep = format!("{SYS_clock_nanosleep} ");
    let sleeps = || std::fs::read_to_string(&call).is_ok_and(|now| now.starts_with(&sleep));
    wait_for("somebody who waits", || sleeps().then_some(()));
    running
}

/// While it asks over and over, it adds nothing to what the other holds: a byte taken for a moment could refuse somebody.
fn only_asks(running: &mut Running, image: &Path, access: &str) {
    let pid = running.pid();
    let pauses = || {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let count = status.lines().find_map(|l| l.strip_prefix("voluntary_ctxt_switches:")).unwrap();
        count.trim().parse::<u64>().unwrap()
    };
    let expected: Access = access.parse().unwrap();
    let file = std::fs::File::open(image).unwrap();
    let others = || LockByte::ALL.into_iter().filter(|b| !expected.contains(*b));
    let (start, deadline) = (pauses(), Instant::now() + DEADLINE);
    while pauses() < start + 10 {
        for _ in 0..1000 {
            for byte in others() {
                let found = first_lock(&file, Asker::Process, byte.offset(), byte.offset()).unwrap();
                assert_eq!(found, None, "{byte}");
            }
        }
        assert!(Instant::now() < deadline, "it does not ask again");
    }
    assert_eq!(locked(image), expected);
    assert!(running.0.try_wait().unwrap().is_none());
}

fn end_of(running: &mut Running) -> ExitStatus {
    wait_for("the end of wait", || running.0.try_wait().unwrap())
}

fn errors(mut running: Running) -> String {
    let mut text = String::new();
    std::io::Read::read_to_string(&mut running.0.stderr.take().unwrap(), &mut text).unwrap();
    text
}

/// What was said on standard error, and the status; standard output must be empty.
fn said(output: &Output) -> (String, i32) {
    assert!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
    (String::from_utf8_lossy(&output.stderr).into_owned(), output.status.code().unwrap())
}

#[test]
fn a_free_image_is_not_waited_for_and_nothing_is_said() {
    let (_images, path) = one_image();
    assert_eq!(said(&output(&mut wait(&[&path], &["--as", "vm"]))), (String::new(), 0));
    // Somebody who is not in the way does not matter.
    let _other = holder(&path, "vm", "cw/w");
    assert_eq!(said(&output(&mut wait(&[&path], &["--as", "io-read-only"]))), (String::new(), 0));
}

#[test]
fn it_returns_when_the_other_has_let_go_and_locks_nothing_until_then() {
    let (_images, path) = one_image();
    let other = holder(&path, "vm", "cw/w");
    let mut running = waiting(&[&path], "vm");
    only_asks(&mut running, &path, "cw/w");
    other.end();
    assert_eq!(end_of(&mut running).code(), Some(0));
    assert_eq!(locked(&path), Access::NONE);
    assert_eq!(errors(running), "");
}

#[test]
fn when_time_is_up_the_last_holder_is_named() {
    let (_images, path) = one_image();
    let first = holder(&path, "convert-source", "c/wr");
    let mut running = Running::spawn(
        wait(&[&path], &["--as", "vm", "--timeout", "1h"]).stdout(Stdio::piped()).stderr(Stdio::piped()),
    );
    assert!(running.0.try_wait().unwrap().is_none());
    let (told, code) = said(&output(&mut wait(&[&path], &["--as", "vm", "--timeout", "0s"])));
    assert_eq!(code, 124);
    assert!(told.contains(&format!("qlock-top {}", first.pid())), "{told}");
    first.end();
    assert_eq!(end_of(&mut running).code(), Some(0));

    let second = holder(&path, "vm", "cw/w");
    let (told, code) = said(&output(&mut wait(&[&path], &["--as", "vm", "--timeout", "200ms"])));
    assert_eq!(code, 124);
    let who = format!("qlock-top {}", second.pid());
    for part in
        ["time is up", "refused: vm on", "Failed to get \"write\" lock", "byte 201", path.to_str().unwrap(), &who]
    {
        assert!(told.contains(part), "{part}: {told}");
    }
}

/// Takes a POSIX write lock on one byte.
fn write_lock(byte: u64) -> String {
    let lock = format!("fcntl.lockf(f, fcntl.LOCK_EX, 1, {byte})");
    format!("import fcntl, sys\nf = open(sys.argv[1], 'r+b')\n{lock}\nsys.stdin.read()")
}

#[test]
fn a_write_lock_that_no_qemu_takes_is_waited_for_too() {
    if !have(&["python3"]) {
        return;
    }
    let (_images, path) = one_image();
    let other = holding(&mut python(&write_lock(100), &[&path]), &path, "c/-");
    let (told, code) = said(&output(&mut wait(&[&path], &["--as", "vm", "--timeout", "0s"])));
    assert!(code == 124 && told.contains("Failed to lock byte 100"), "{told}");
    let mut running = waiting(&[&path], "vm");
    other.end();
    assert_eq!(end_of(&mut running).code(), Some(0));
}

#[test]
fn of_several_images_all_must_be_ready() {
    let images = Images::new();
    let (first, second, third) = (images.raw("first.raw"), images.raw("second.raw"), images.raw("third.raw"));
    let (one, two) = (holder(&first, "vm", "cw/w"), holder(&second, "vm", "cw/w"));
    let all: [&Path; 3] = [&third, &first, &second];
    let mut running = waiting(&all, "vm");
    one.end();
    let (told, code) = said(&output(&mut wait(&all, &["--as", "vm", "--timeout", "100ms"])));
    assert_eq!(code, 124);
    // Only those that are not ready are told.
    assert!(told.contains("second.raw") && !told.contains("first.raw") && !told.contains("third.raw"), "{told}");
    assert!(running.0.try_wait().unwrap().is_none());
    two.end();
    assert_eq!(end_of(&mut running).code(), Some(0));
    let (told, code) = said(&output(&mut wait(&[&first, &images.path("missing")], &["--as", "vm"])));
    assert!(code == 4 && told.contains("missing"), "{told}");
}

#[test]
fn the_files_below_an_image_are_waited_for_where_the_program_opens_them() {
    if !have(&["qemu-img", "python3"]) {
        return;
    }
    let images = Images::new();
    let (base, top) = (images.qcow2("base.qcow2"), images.overlay("top.qcow2", "base.qcow2"));
    let other = holder(&base, "vm", "cwr/wr");
    let (told, code) = said(&output(&mut wait(&[&top], &["--as", "vm", "--timeout", "0s"])));
    assert!(code == 124 && told.contains("of ") && told.contains("base.qcow2"), "{told}");
    assert_eq!(said(&output(&mut wait(&[&top], &["--as", "io-as-raw"]))), (String::new(), 0));
    let mut running = waiting(&[&top], "vm");
    other.end();
    assert_eq!(end_of(&mut running).code(), Some(0));

    // A byte that the program only locks there, and does not test.
    let stranger = holding(&mut python(&write_lock(201), &[&base]), &base, "-/w");
    let mut running = waiting(&[&top], "vm");
    assert!(running.0.try_wait().unwrap().is_none());
    stranger.end();
    assert_eq!(end_of(&mut running).code(), Some(0));
}

#[test]
fn an_image_that_vanishes_is_not_waited_for_any_longer() {
    let (images, path) = one_image();
    let _other = holder(&path, "vm", "cw/w");
    let mut running = waiting(&[&path], "vm");
    std::fs::remove_file(&path).unwrap();
    assert_eq!(end_of(&mut running).code(), Some(4));
    let told = errors(running);
    assert!(told.contains("a.raw: no such file or directory any more"), "{told}");

    // Something else in its place is no image either.
    let path = images.raw("b.raw");
    let _other = holder(&path, "vm", "cw/w");
    let mut running = waiting(&[&path], "vm");
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    assert_eq!(end_of(&mut running).code(), Some(4));
}

fn hold(image: &Path, words: &[&str]) -> Command {
    let mut command = qlock_top();
    command.arg("hold").arg(image).args(words).stdout(Stdio::null());
    command
}

/// `hold --wait`, once it listens to signals.
fn waiting_to_hold(image: &Path, operation: &str) -> Running {
    let running = Running::spawn(&mut hold(image, &["--as", operation, "--wait", "1h"]));
    let directory = format!("/proc/{}/fd", running.pid());
    let is_signals =
        |l: std::fs::DirEntry| std::fs::read_link(l.path()).is_ok_and(|l| l.ends_with("anon_inode:[signalfd]"));
    wait_for("somebody who waits", || std::fs::read_dir(&directory).ok()?.flatten().any(is_signals).then_some(()));
    running
}

#[test]
fn hold_refuses_nobody_while_it_waits_and_holds_when_the_other_has_let_go() {
    let (_images, path) = one_image();
    let other = holder(&path, "vm", "cw/w");
    let mut running = waiting_to_hold(&path, "convert-source");
    only_asks(&mut running, &path, "cw/w");
    other.end();
    let expected: Access = "c/wr".parse().unwrap();
    wait_for("its turn", || (locked(&path) == expected).then_some(()));
}

#[test]
fn hold_is_refused_when_it_has_waited_in_vain_and_a_signal_ends_the_waiting() {
    let (_images, path) = one_image();
    let other = holder(&path, "vm", "cw/w");
    let (told, code) = said(&output(&mut hold(&path, &["--as", "vm", "--wait", "100ms", "--", "true"])));
    assert!(code == 1 && told.contains(&format!("qlock-top {}", other.pid())), "{told}");
    for signal in [Signal::SIGTERM, Signal::SIGHUP, Signal::SIGINT] {
        let mut running = waiting_to_hold(&path, "vm");
        kill(Pid::from_raw(running.pid()), signal).unwrap();
        assert_eq!(end_of(&mut running).code(), Some(128 + signal as i32));
    }
    assert_eq!(locked(&path), "cw/w".parse().unwrap());
}

#[test]
fn a_broken_chain_and_data_elsewhere_are_never_granted() {
    if !have(&["qemu-img"]) {
        return;
    }
    let images = Images::new();
    images.qcow2("base.qcow2");
    let broken = images.overlay("broken.qcow2", "base.qcow2");
    std::fs::remove_file(images.path("base.qcow2")).unwrap();
    let elsewhere = images.path("elsewhere.qcow2");
    let option = format!("data_file={}", images.path("data.raw").display());
    run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", "-o", &option]).arg(&elsewhere).arg("1M"));
    for path in [&broken, &elsewhere] {
        let (told, code) = said(&output(&mut wait(&[path], &["--as", "vm"])));
        assert!(code == 3 && told.contains("cannot tell: vm on"), "{told}");
        let why = output(qlock_top().arg("why").arg(path).args(["--as", "vm"]));
        assert_eq!(why.status.code(), Some(3));
        let json = output(qlock_top().arg("why").arg(path).args(["--as", "vm", "--format", "json"]));
        assert_eq!(serde_json::from_slice::<Value>(&json.stdout).unwrap()["verdict"], "unknown");
        assert_eq!(json.status.code(), Some(3));
    }
}

#[test]
fn an_image_that_may_not_be_read_is_never_granted() {
    if !am_root() || !have(&["setpriv"]) {
        return;
    }
    let (images, path) = one_image();
    let program = images.path("qlock-top");
    // A copy, since the build directory may be closed to others.
    std::fs::copy(env!("CARGO_BIN_EXE_qlock-top"), &program).unwrap();
    for (file, mode) in [(images.dir(), 0o755), (&program, 0o755), (&path, 0o600)] {
        std::fs::set_permissions(file, Permissions::from_mode(mode)).unwrap();
    }
    let marker = images.path("marker");
    for words in [&["wait"][..], &["why"], &["hold"]] {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]).arg(&program).args(words);
        command.arg(&path).args(["--as", "vm"]).stdin(Stdio::null());
        if words == ["hold"] {
            command.args(["--", "touch"]).arg(&marker);
        }
        let ended = output(&mut command);
        let told = String::from_utf8([ended.stdout, ended.stderr].concat()).unwrap();
        assert_eq!(ended.status.code(), Some(3), "{words:?}: {told}");
        assert!(told.contains("a.raw") && !told.contains("granted:"), "{words:?}: {told}");
    }
    assert!(!marker.exists());
}

#[test]
fn what_cannot_be_asked_is_an_error_that_says_what_can() {
    let (images, path) = one_image();
    let missing = images.path("missing");
    for command in ["why", "wait"] {
        for (image, operation, status, part) in [
            (images.dir(), "vm", 2, "is a directory: name one image"),
            (Path::new("/dev/null"), "vm", 2, "/dev/null"),
            (&missing, "vm", 4, "missing: no such file or directory"),
            (&path, "convert", 2, "perhaps convert-into-existing"),
            (&path, "xyz", 2, "known are amend, bench"),
            (&path, "check", 2, "its format is raw, and check is known for qcow2 images only"),
        ] {
            let (told, code) = said(&output(qlock_top().arg(command).arg(image).args(["--as", operation])));
            assert!(code == status && told.contains(part), "{command} --as {operation}: {code}: {told}");
        }
    }
    assert_eq!(said(&output(qlock_top().arg("wait").arg(&path))).1, 2);
    assert_eq!(said(&output(qlock_top().args(["wait", "--as", "vm"]))).1, 2);
    assert_eq!(said(&output(&mut wait(&[&path], &["--as", "vm", "--timeout", "1 day"]))).1, 2);
}

#[test]
fn why_answers_for_every_program_one_object_a_line() {
    let (_images, path) = one_image();
    let programs = Operation::ALL.iter().filter(|o| o.recipe(Family::Raw).is_some()).count();
    let ask = || {
        let answer = output(qlock_top().arg("why").arg(&path).args(["--format", "json"]));
        let text = String::from_utf8(answer.stdout).unwrap();
        let lines: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(lines.len(), programs);
        assert!(lines.iter().all(|l| l["schema"] == "qlock-top/why/1" && l["image"] == path.to_str().unwrap()));
        (lines, answer.status.code().unwrap())
    };
    let (lines, code) = ask();
    assert!(code == 0 && lines.iter().all(|l| l["verdict"] == "granted"));
    let other = holder(&path, "vm", "cw/w");
    let (lines, code) = ask();
    let vm = lines.iter().find(|l| l["operation"] == "vm").unwrap();
    assert_eq!((code, vm["verdict"].as_str(), vm["byte"].as_u64()), (1, Some("refused"), Some(201)));
    assert_eq!(vm["holders"][0]["pid"], other.pid());
}

#[test]
fn a_reader_that_has_gone_is_no_error() {
    let (_images, path) = one_image();
    for words in [&[][..], &["--format", "json"], &["--as", "vm"]] {
        let mut command = qlock_top();
        command.arg("why").arg(&path).args(words).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut running = Running::spawn(&mut command);
        drop(running.0.stdout.take());
        assert_eq!(end_of(&mut running).code(), Some(0), "{words:?}");
        assert_eq!(errors(running), "", "{words:?}");
    }
}

#[test]
fn a_program_that_would_destroy_what_somebody_uses_waits_for_its_end() {
    if !have(&["qemu-io"]) {
        return;
    }
    let images = Images::new();
    let path = images.raw("a.raw");
    // Its lock lets `create` in, which would throw its content away.
    let holder = holding(&mut qemu_io(&["-r", "-f", "raw"], &path), &path, "c/-");
    let ended = output(qlock_top().arg("wait").arg(&path).args(["--as", "create", "--timeout", "100ms"]));
    let told = String::from_utf8(ended.stderr).unwrap();
    assert!(ended.status.code() == Some(124) && told.contains("DANGER: create IS GRANTED AND OVERWRITES"), "{told}");
    holder.end();
    let ended = output(qlock_top().arg("wait").arg(&path).args(["--as", "create", "--timeout", "1h"]));
    assert_eq!(ended.status.code(), Some(0));
}

#[test]
fn no_time_at_all_is_enough_for_a_free_image() {
    let (_images, path) = one_image();
    for timeout in ["0s", "1ms"] {
        let ended = output(qlock_top().arg("wait").arg(&path).args(["--as", "vm", "--timeout", timeout]));
        assert_eq!(ended.status.code(), Some(0), "{timeout}");
    }
}
