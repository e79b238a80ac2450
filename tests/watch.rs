//! Does the stream tell what happens, in order, at once, and what it may have missed?
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Stdio;
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use qlock::hold::HeldAccess;
use qlock::image::watch::ImageWatch;
use serde_json::Value;
use support::{DEADLINE, Images, Running, access_of, have, holding, qemu_io, qlock_top, wait_for};

/// A running `watch --format ndjson`, its lines read by a thread.
struct Watch {
    running: Running,
    lines: Receiver<Value>,
}

impl Watch {
    fn start(path: &Path, interval: &str) -> Self {
        let mut command = qlock_top();
        command.args(["watch", "--format", "ndjson", "--interval", interval]).arg(path).stdout(Stdio::piped());
        let mut running = Running::spawn(&mut command);
        let out = BufReader::new(running.0.stdout.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in out.lines() {
                let value = serde_json::from_str(&line.unwrap()).expect("each line is one object");
                if sender.send(value).is_err() {
                    break;
                }
            }
        });
        let watch = Self { running, lines };
        let first = watch.next();
        assert_eq!((first["kind"].as_str(), first["schema"].as_str()), (Some("snapshot"), Some("qlock-top/event/1")));
        assert_eq!(first["snapshot"]["schema"], "qlock-top/snapshot/1");
        watch
    }

    fn next(&self) -> Value {
        self.lines.recv_timeout(DEADLINE).expect("another line")
    }

    /// The next event for which `test` is true; what comes before it is passed over.
    fn event(&self, what: &str, test: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + DEADLINE;
        let mut others = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) if test(&line) => return line,
                Ok(line) => others.push(format!("{} {}", line["kind"], line["text"])),
                Err(_) => panic!("waited in vain for {what}, saw {others:#?}"),
            }
        }
    }
}

/// Between two ticks of an hour nothing but inotify can have told of it.
const NEVER: &str = "1h";

#[test]
fn a_lock_and_its_release_are_told_without_waiting_for_a_tick() {
    if !have(&["qemu-io", "qemu-img"]) {
        return;
    }
    let images = Images::new();
    let path = images.qcow2("a.qcow2");
    let watch = Watch::start(images.dir(), NEVER);
    for _ in 0..3 {
        let holder = holding(&mut qemu_io(&["-f", "qcow2"], &path), &path, "cwr/wr");
        let mut access = qlock::protocol::Access::NONE;
        // QEMU takes its bytes one after the other: they may come as one event or as several.
        while access.to_string() != "cwr/wr" {
            let event = watch.event("the lock", |e| e["kind"] == "acquired" && e["pid"] == holder.pid());
            assert_eq!((event["image"].as_str(), event["command"].as_str()), (path.to_str(), Some("qemu-io")));
            assert!(event["fd"].is_i64());
            access = access.union(access_of(&event).parse().unwrap());
        }
        let pid = holder.pid();
        holder.end();
        let mut left = access;
        while !left.is_empty() {
            let event = watch.event("the release", |e| e["kind"] == "released" && e["pid"] == pid);
            left = left.difference(access_of(&event).parse().unwrap());
        }
    }
}

#[test]
fn images_that_come_and_go_are_told() {
    let images = Images::new();
    images.raw("a.raw");
    let watch = Watch::start(images.dir(), NEVER);
    let is = |kind: &'static str, name: &'static str| {
        let path = images.path(name);
        move |e: &Value| e["kind"] == kind && e["image"] == path.to_str().unwrap()
    };
    images.raw("b.raw");
    watch.event("the new image", is("image-added", "b.raw"));
    std::fs::rename(images.path("b.raw"), images.path("a.raw")).unwrap();
    // The path stays, the file behind it is another one.
    watch.event("the old a.raw going", is("image-removed", "a.raw"));
    std::fs::remove_file(images.path("a.raw")).unwrap();
    watch.event("a.raw going", is("image-removed", "a.raw"));
}

#[test]
fn a_directory_that_is_removed_and_made_again_is_watched_again() {
    if !have(&["qemu-io"]) {
        return;
    }
    let outer = Images::new();
    let dir = outer.path("images");
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("a.raw"), "x").unwrap();
    let watch = Watch::start(&dir, NEVER);
    std::fs::remove_dir_all(&dir).unwrap();
    watch.event("the image going", |e| e["kind"] == "image-removed");
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("b.raw"), [0; 512]).unwrap();
    let path = dir.join("b.raw");
    watch.event("the image in the new directory", |e| e["kind"] == "image-added");
    let holder = holding(&mut qemu_io(&["-f", "raw"], &path), &path, "cw/-");
    watch.event("its lock", |e| e["kind"] == "acquired" && e["pid"] == holder.pid());
}

#[test]
fn a_single_image_and_a_link_to_one_are_watched() {
    if !have(&["qemu-io"]) {
        return;
    }
    let (images, elsewhere) = (Images::new(), Images::new());
    let path = elsewhere.raw("real.raw");
    std::os::unix::fs::symlink(&path, images.path("link.raw")).unwrap();
    for watched in [path.clone(), images.dir().to_owned()] {
        let watch = Watch::start(&watched, NEVER);
        let holder = holding(&mut qemu_io(&["-f", "raw"], &path), &path, "cw/-");
        let event = watch.event("the lock", |e| e["kind"] == "acquired" && e["pid"] == holder.pid());
        let shown = if watched == path { path.clone() } else { images.path("link.raw") };
        assert_eq!(event["image"], shown.to_str().unwrap());
    }
}

#[test]
fn a_single_image_is_followed_through_replacement_and_removal() {
    if !have(&["qemu-io"]) {
        return;
    }
    let images = Images::new();
    let path = images.raw("a.raw");
    let watch = Watch::start(&path, NEVER);
    std::fs::rename(images.raw("b.raw"), &path).unwrap();
    watch.event("the new file", |e| e["kind"] == "image-added");
    let holder = holding(&mut qemu_io(&["-f", "raw"], &path), &path, "cw/-");
    watch.event("the lock on the new file", |e| e["kind"] == "acquired" && e["pid"] == holder.pid());
    holder.end();
    std::fs::remove_file(&path).unwrap();
    watch.event("the removal", |e| e["kind"] == "image-removed");
    watch.event("that it may hide something", |e| e["kind"] == "gap");
    images.raw("a.raw");
    watch.event("the file made again", |e| e["kind"] == "image-added");
    let holder = holding(&mut qemu_io(&["-f", "raw"], &path), &path, "cw/-");
    watch.event("its lock", |e| e["kind"] == "acquired" && e["pid"] == holder.pid());
}

#[test]
fn a_link_that_comes_to_lead_elsewhere_is_followed() {
    let (images, elsewhere) = (Images::new(), Images::new());
    elsewhere.raw("v1.raw");
    let second = elsewhere.raw("v2.raw");
    std::os::unix::fs::symlink(elsewhere.path("v1.raw"), elsewhere.path("current")).unwrap();
    std::os::unix::fs::symlink(elsewhere.path("current"), images.path("vm.raw")).unwrap();
    let watch = Watch::start(images.dir(), NEVER);
    std::os::unix::fs::symlink(&second, elsewhere.path("next")).unwrap();
    std::fs::rename(elsewhere.path("next"), elsewhere.path("current")).unwrap();
    watch.event("the other file", |e| e["kind"] == "image-added");
    let _held = HeldAccess::acquire(&second, "cw/w".parse().unwrap()).unwrap();
    let event = watch.event("its lock", |e| e["kind"] == "acquired");
    assert_eq!(event["image"], images.path("vm.raw").to_str().unwrap());
}

#[test]
fn a_lock_long_after_the_open_is_told_without_waiting_for_a_tick() {
    let images = Images::new();
    let path = images.raw("a.raw");
    let mut held = HeldAccess::acquire(&path, "-/-".parse().unwrap()).unwrap();
    let watch = Watch::start(images.dir(), NEVER);
    for access in ["cw/w", "c/w", "-/-"] {
        held.change(access.parse().unwrap()).unwrap();
        let kind = if access == "cw/w" { "acquired" } else { "released" };
        watch.event(access, |e| e["kind"] == kind && e["pid"] == std::process::id());
    }
}

#[test]
fn a_process_that_is_killed_leaves_no_false_owner_behind() {
    if !have(&["python3"]) {
        return;
    }
    let images = Images::new();
    let paths: Vec<_> = (0..60).map(|i| images.raw(&format!("{i:02}.raw"))).collect();
    let script = "import fcntl,os,struct,sys\nfor p in sys.argv[1:]:\n  fd=os.open(p,os.O_RDWR)\n  \
                  fcntl.fcntl(fd,37,struct.pack('hhqqi',fcntl.F_RDLCK,0,100,2,0))\nsys.stdin.read()";
    let arguments: Vec<&Path> = paths.iter().map(|p| p.as_path()).collect();
    let holder = holding(&mut support::python(script, &arguments), &paths[59], "cw/-");
    let watch = Watch::start(images.dir(), NEVER);
    let pid = holder.pid();
    holder.end();
    let mut released = 0;
    while released < 60 {
        let line = watch.next();
        assert_ne!(line["kind"], "acquired", "{line}");
        assert!(line["pid"].is_null() || line["pid"] == pid, "{line}");
        released += usize::from(line["kind"] == "released");
    }
}

#[test]
fn what_a_slow_reader_missed_is_told_as_a_gap() {
    let images = Images::new();
    let paths: Vec<_> = (0..300).map(|i| images.raw(&format!("{i:03}.raw"))).collect();
    let mut command = qlock_top();
    command.args(["watch", "--format", "ndjson"]).arg(images.dir()).stdout(Stdio::piped());
    let mut slow = Running::spawn(&mut command);
    let witness = Watch::start(images.dir(), NEVER);
    // Each round is more than a pipe holds, and a second watcher says when it has been seen.
    for _ in 0..4 {
        let held: Vec<_> = paths.iter().map(|p| HeldAccess::acquire(p, "cw/w".parse().unwrap()).unwrap()).collect();
        let last = paths[299].to_str().unwrap();
        witness.event("the last lock", |e| e["kind"] == "acquired" && e["image"] == last);
        drop(held);
        witness.event("the last release", |e| e["kind"] == "released" && e["image"] == last);
    }
    let out = BufReader::new(slow.0.stdout.take().unwrap());
    let merged = out.lines().any(|l| l.unwrap().contains("\"kind\":\"gap\""));
    assert!(merged);
}

#[test]
fn a_deleted_image_that_is_used_is_told_at_once() {
    let images = Images::new();
    let path = images.raw("a.raw");
    let held = HeldAccess::acquire(&path, "cw/w".parse().unwrap()).unwrap();
    let watch = Watch::start(images.dir(), NEVER);
    std::fs::remove_file(&path).unwrap();
    let event = watch.event("the finding", |e| e["kind"] == "finding");
    assert!(event["text"].as_str().unwrap().contains("a.raw is deleted, but"), "{event}");
    drop(held);
    watch.event("its end", |e| e["kind"] == "finding-cleared");
}

#[test]
fn two_watchers_do_not_wake_each_other_for_ever() {
    let images = Images::new();
    let path = images.raw("a.raw");
    let (first, second) = (Watch::start(images.dir(), NEVER), Watch::start(images.dir(), NEVER));
    // One lock, so that both have something to look at, and then nothing any more.
    drop(HeldAccess::acquire(&path, "cw/w".parse().unwrap()).unwrap());
    std::fs::write(images.path("b.raw"), "x").unwrap();
    for watch in [&first, &second] {
        watch.event("the new image", |e| e["kind"] == "image-added");
    }
    let opens = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let count = std::sync::Arc::clone(&opens);
    let third = ImageWatch::new(move || {
        count.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
    })
    .unwrap();
    third.add(images.dir(), true).unwrap();
    wait_for("a second in which nobody opens anything", || {
        let _ = third.take();
        let before = opens.load(std::sync::atomic::Ordering::SeqCst);
        std::thread::sleep(std::time::Duration::from_secs(1));
        (opens.load(std::sync::atomic::Ordering::SeqCst) == before).then_some(())
    });
}

#[test]
fn a_vm_that_stops_leaves_no_unknown_holder_behind() {
    if !have(&["qemu-system-x86_64", "qemu-img"]) {
        return;
    }
    let images = Images::new();
    let base = images.qcow2("base.qcow2");
    let overlay = images.overlay("over.qcow2", "base.qcow2");
    let watch = Watch::start(images.dir(), "1s");
    for _ in 0..8 {
        let mut command = std::process::Command::new("qemu-system-x86_64");
        command.args(["-accel", "tcg", "-S", "-display", "none", "-nodefaults", "-m", "64", "-monitor", "none"]);
        command.args(["-serial", "none", "-drive"]).arg(format!("file={},if=virtio", overlay.display()));
        let vm = holding(&mut command, &base, "c/wr");
        let pid = vm.pid();
        watch.event("the lock on the base", |e| e["kind"] == "acquired" && e["image"] == base.to_str().unwrap());
        vm.end();
        loop {
            let line = watch.next();
            assert!(line["kind"] != "acquired" || line["pid"] == pid, "{line}");
            if line["kind"] == "released" && line["image"] == base.to_str().unwrap() {
                break;
            }
        }
    }
}

#[test]
fn a_refused_attempt_is_no_writer_without_a_lock() {
    if !have(&["qemu-io", "qemu-img"]) {
        return;
    }
    let images = Images::new();
    let path = images.qcow2("a.qcow2");
    let _holder = holding(&mut qemu_io(&["-f", "qcow2"], &path), &path, "cwr/wr");
    let watch = Watch::start(images.dir(), "100ms");
    for _ in 0..40 {
        let status =
            std::process::Command::new("qemu-img").args(["resize", "-q", "-f", "qcow2"]).arg(&path).arg("32M").output();
        assert!(!status.unwrap().status.success());
    }
    images.raw("end.raw");
    loop {
        let line = watch.next();
        assert_ne!(line["kind"], "finding", "{line}");
        if line["kind"] == "image-added" {
            break;
        }
    }
}

#[test]
fn an_opener_without_a_lock_becomes_a_finding() {
    let images = Images::new();
    let path = images.raw("a.raw");
    let watch = Watch::start(images.dir(), NEVER);
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    let event = watch.event("the finding", |e| e["kind"] == "finding");
    assert!(event["text"].as_str().unwrap().contains("for writing without a lock"), "{event}");
    drop(file);
    watch.event("its end", |e| e["kind"] == "finding-cleared");
}

#[test]
fn a_signal_ends_it_and_shows_in_the_status() {
    let images = Images::new();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        let mut watch = Watch::start(images.dir(), NEVER);
        kill(Pid::from_raw(watch.running.pid()), signal).unwrap();
        let status = wait_for("the end", || watch.running.0.try_wait().unwrap());
        assert_eq!(status.signal(), Some(signal as i32));
    }
}

#[test]
fn a_reader_that_goes_away_ends_it() {
    let images = Images::new();
    let mut command = qlock_top();
    command.args(["watch", "--interval", NEVER]).arg(images.dir()).stdout(Stdio::piped());
    let mut running = Running::spawn(&mut command);
    let mut out = BufReader::new(running.0.stdout.take().unwrap());
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    drop(out);
    let status = wait_for("the end, without anything to write", || running.0.try_wait().unwrap());
    assert_eq!(status.code(), Some(0));
}
