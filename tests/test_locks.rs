//! Are test locks of the dashboard real locks, and gone in time, whatever becomes of the terminal or the program?
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/pty.rs"]
mod pty;
mod support;

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pty::Pty;
use qlock::protocol::Access;
use support::{Images, have, holding, locked, output, qemu_io, wait_for};

const PROGRAM: &str = env!("CARGO_BIN_EXE_qlock-top");

fn dashboard(images: &Images, environment: &[(&str, &str)]) -> Pty {
    let pty = Pty::start(PROGRAM, &[images.dir().to_str().unwrap()], environment, 100, 30);
    pty.wait_for("1 image");
    pty
}

fn one_image() -> (Images, PathBuf) {
    let images = Images::new();
    let path = images.raw("a.raw");
    (images, path)
}

fn shows(image: &Path, access: &str) {
    let expected: Access = access.parse().unwrap();
    wait_for(&format!("{access} on {}", image.display()), || (locked(image) == expected).then_some(()));
}

/// Chooses `vm`, and takes it for the shortest time, which is ten seconds.
fn take(pty: &Pty, image: &Path) {
    pty.keys("t");
    pty.wait_for("as which program?");
    pty.keys("\r");
    pty.wait_for("check only");
    pty.keys("-j\r");
    pty.wait_for("TEST LOCK cw/w on a.raw");
    shows(image, "cw/w");
}

#[test]
fn a_test_lock_refuses_qemu_and_is_let_go_by_u() {
    if !have(&["qemu-io"]) {
        return;
    }
    let (images, path) = one_image();
    let mut pty = dashboard(&images, &[]);
    pty.keys("t\r");
    pty.wait_for("check only");
    pty.keys("\r");
    pty.wait_for("it would be granted now; nothing was locked");
    assert_eq!(locked(&path), Access::NONE);
    pty.keys("\u{1b}");
    pty.wait_for("as which program?");
    pty.keys("\u{1b}");
    // Before the next key: Esc and a key at once are that key with Alt.
    pty.wait_for("100 uses consistent read");
    take(&pty, &path);
    let screen = pty.wait_for("OUR TEST LOCK");
    assert!(screen.contains("ends in"), "{screen}");
    let refused = output(&mut qemu_io(&["-f", "raw", "-c", "read 0 512"], &path));
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("Failed to get \"write\" lock"), "{said}");
    pty.keys("u");
    pty.wait_for("let go: released");
    shows(&path, "-/-");
    pty.keys("q");
    assert_eq!(pty.wait_for_end().code(), Some(0));
}

#[test]
fn an_image_in_use_is_asked_about_and_its_holder_named() {
    if !have(&["qemu-io"]) {
        return;
    }
    let (images, path) = one_image();
    let holder = holding(&mut qemu_io(&["-r", "-f", "raw"], &path), &path, "c/-");
    let pty = dashboard(&images, &[]);
    pty.wait_for("1 in use");
    pty.keys("t\rj\r");
    let screen = pty.wait_for("IS IN USE: take a test lock all the same?");
    assert!(screen.contains(">No, go back"), "{screen}");
    // Enter alone is No.
    pty.keys("\r");
    pty.wait_for("check only");
    assert_eq!(locked(&path), "c/-".parse().unwrap());
    // A whole program that would be refused is refused here too, and names the byte.
    pty.keys("\u{1b}");
    pty.wait_for("as which program?");
    pty.keys("\t");
    pty.wait_for("which bytes?");
    // Deny consistent read.
    pty.keys("jjjjj \rj\rj\r");
    let screen = pty.wait_for("not taken:");
    assert!(screen.contains(&format!("qemu-io {}", holder.pid())), "{screen}");
    assert_eq!(locked(&path), "c/-".parse().unwrap());
}

#[test]
fn the_deadline_lets_go_and_says_so() {
    let (images, path) = one_image();
    let pty = dashboard(&images, &[]);
    take(&pty, &path);
    pty.wait_for("its time is up");
    shows(&path, "-/-");
}

#[test]
fn the_deadline_holds_though_nobody_reads_the_terminal() {
    let (images, path) = one_image();
    let pty = dashboard(&images, &[]);
    take(&pty, &path);
    pty.stalled.store(true, Ordering::SeqCst);
    // Fills what the terminal takes without a reader: each asks for a whole new screen.
    for _ in 0..200 {
        pty.keys("\u{c}");
    }
    shows(&path, "-/-");
}

#[test]
fn whatever_ends_the_program_ends_the_lock() {
    for (name, end) in [("quit", "q"), ("Ctrl-C", "\u{3}")] {
        let (images, path) = one_image();
        let mut pty = dashboard(&images, &[]);
        take(&pty, &path);
        pty.keys(end);
        pty.wait_for_end();
        assert_eq!(locked(&path), Access::NONE, "{name}");
    }
    for signal in [Signal::SIGKILL, Signal::SIGTERM, Signal::SIGHUP] {
        let (images, path) = one_image();
        let mut pty = dashboard(&images, &[]);
        take(&pty, &path);
        kill(Pid::from_raw(pty.running.pid()), signal).unwrap();
        pty.wait_for_end();
        shows(&path, "-/-");
    }
    let (images, path) = one_image();
    let mut pty = dashboard(&images, &[]);
    take(&pty, &path);
    pty.hang_up();
    shows(&path, "-/-");
    pty.wait_for_end();
}

#[test]
fn a_program_that_is_stopped_holds_no_test_lock() {
    let (images, path) = one_image();
    let pty = dashboard(&images, &[]);
    take(&pty, &path);
    pty.keys("\u{1a}");
    shows(&path, "-/-");
    kill(Pid::from_raw(pty.running.pid()), Signal::SIGCONT).unwrap();
    pty.wait_for("a stopped program keeps no deadline");
}

#[test]
fn read_only_takes_no_test_lock() {
    let (images, path) = one_image();
    let settings = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(settings.path(), "read-only = true\n").unwrap();
    let settings = settings.path().to_str().unwrap();
    let directory = images.dir().to_str().unwrap();
    for arguments in [vec!["--read-only", directory], vec!["--config", settings, directory]] {
        let pty = Pty::start(PROGRAM, &arguments, &[], 100, 30);
        pty.wait_for("1 image");
        pty.keys("t");
        pty.wait_for("read-only: no test locks");
        pty.keys("\rj\r");
        assert_eq!(locked(&path), Access::NONE);
    }
}
