//! Does storage that does not answer hold up nothing but itself, and is it whole again when it comes back?
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/fuse.rs"]
mod fuse;
#[path = "support/pty.rs"]
mod pty;
mod support;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use fuse::{Content, Foreign, Fuse, Mode, Setup};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pty::Pty;
use serde_json::Value;
use support::{DEADLINE, Images, Running, have, holding, image, list, output, qemu_io, qlock_top, wait_for};

const PROGRAM: &str = env!("CARGO_BIN_EXE_qlock-top");
const RAW: &[(&str, Content<'_>)] = &[("far.raw", Content::Size(1 << 20))];

/// A file server as it is mounted most often: the kernel may answer for a while from what it knows.
fn mount(remembered: Duration) -> Fuse {
    Fuse::mount_as(&Setup { remembered, ..Setup::default() }, RAW, &[])
}

/// Storage that does not answer, beside some that does.
struct Scene {
    fuse: Fuse,
    /// Ended after the mount has been given up: before, its end would wait for the server to hear of it.
    open_there: Option<Running>,
    images: Images,
    near: PathBuf,
}

impl Scene {
    fn new(remembered: Duration) -> Self {
        let images = Images::new();
        let near = images.raw("near.raw");
        Self { fuse: mount(remembered), open_there: None, images, near }
    }

    fn far(&self) -> PathBuf {
        self.fuse.path("far.raw")
    }
}

/// The lines that a program writes.
fn lines(running: &mut Running) -> Receiver<String> {
    let (line, lines) = mpsc::channel();
    let out = BufReader::new(running.0.stdout.take().unwrap());
    std::thread::spawn(move || out.lines().map_while(Result::ok).try_for_each(|l| line.send(l)));
    lines
}

/// Waits for an event for which `wanted` holds.
fn event(lines: &Receiver<String>, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let line = lines.recv_timeout(left).unwrap_or_else(|_| panic!("waited in vain for {what}"));
        let value: Value = serde_json::from_str(&line).unwrap();
        if wanted(&value) {
            return value;
        }
    }
}

fn watch(paths: &[&Path], interval: &str) -> Running {
    let mut command = qlock_top();
    command.args(["watch", "--format", "ndjson", "--interval", interval]).args(paths).stdout(Stdio::piped());
    Running::spawn(&mut command)
}

#[test]
fn one_look_says_stalled_of_what_does_not_answer_and_the_truth_of_the_rest() {
    if !fuse::possible() || !have(&["qemu-io"]) {
        return;
    }
    for remembered in [Duration::ZERO, Duration::from_secs(3600)] {
        let mut scene = Scene::new(remembered);
        let _holder = holding(&mut qemu_io(&["-f", "raw"], &scene.near), &scene.near, "cw/-");
        // So that the kernel knows the names, where it may remember them.
        let (before, _) = list(scene.fuse.dir());
        assert_eq!(image(&before, &scene.far())["verdict"], "free");
        scene.fuse.stop();
        let out = output(qlock_top().args(["list", "--format", "json"]).arg(scene.images.dir()).arg(scene.fuse.dir()));
        assert_eq!(out.status.code(), Some(3));
        let snapshot: Value = serde_json::from_slice(&out.stdout).unwrap();
        assert_eq!(image(&snapshot, &scene.near)["verdict"], "held");
        assert_eq!(snapshot["complete"], false);
        let told = String::from_utf8(out.stderr).unwrap();
        assert!(told.contains("does not answer"), "{told}");
        // Named by its path, it is listed even where its directory cannot be.
        let out = output(qlock_top().args(["list"]).arg(scene.far()).arg(&scene.near));
        let table = String::from_utf8(out.stdout).unwrap();
        assert!(out.status.code() == Some(3) && table.contains("near.raw"), "{table}");
        assert!(table.contains("does not answer") || table.contains("stalled"), "{table}");
        scene.fuse.go_on();
        let (after, _) = list(scene.fuse.dir());
        assert_eq!(image(&after, &scene.far())["verdict"], "free");
    }
}

#[test]
fn a_watch_goes_on_beside_storage_that_hangs_and_has_it_again_when_it_is_back() {
    if !fuse::possible() || !have(&["qemu-io", "python3"]) {
        return;
    }
    for remembered in [Duration::ZERO, Duration::from_secs(3600)] {
        let mut scene = Scene::new(remembered);
        let far = scene.far();
        let mut running = watch(&[scene.images.dir(), scene.fuse.dir()], "200ms");
        let lines = lines(&mut running);
        event(&lines, "the first snapshot", |e| e["kind"] == "snapshot" && e["snapshot"]["images"][1].is_object());
        // Something that holds it up in the walk through descriptors too: a file there that is open.
        let script = "import sys; f = open(sys.argv[1]); print('open', flush=True); sys.stdin.read()";
        let mut other = support::python(script, &[&far]);
        let mut other = Running::spawn(other.stdin(Stdio::piped()).stdout(Stdio::piped()));
        BufReader::new(other.0.stdout.take().unwrap()).read_line(&mut String::new()).unwrap();
        scene.open_there = Some(other);
        scene.fuse.stop();
        let stalled = event(&lines, "the finding", |e| e["kind"] == "finding" && e["image"] == far.to_str().unwrap());
        assert!(stalled["text"].as_str().unwrap().contains("has not answered since"), "{stalled}");
        assert!(stalled["text"].as_str().unwrap().contains("fuse.testnfs filer:/vol"), "{stalled}");
        for _ in 0..2 {
            let holder = holding(&mut qemu_io(&["-f", "raw"], &scene.near), &scene.near, "cw/-");
            let pid = holder.pid();
            event(&lines, "a lock elsewhere", |e| e["kind"] == "acquired" && e["pid"] == pid);
            holder.end();
            event(&lines, "its release", |e| e["kind"] == "released" && e["pid"] == pid);
        }
        scene.fuse.go_on();
        event(&lines, "the recovery", |e| e["kind"] == "finding-cleared" && e["image"] == far.to_str().unwrap());
        scene.fuse.lock(Foreign { name: "far.raw", mode: Mode::Read, start: 201, end: 201, pid: 5_000_000 });
        event(&lines, "what is held there", |e| {
            e["kind"] == "finding" && e["text"].as_str().unwrap().contains("filer")
        });
    }
}

#[test]
fn the_recovery_is_seen_long_before_the_next_tick() {
    if !fuse::possible() {
        return;
    }
    let mut scene = Scene::new(Duration::ZERO);
    let mut running = watch(&[scene.fuse.dir()], "2s");
    let lines = lines(&mut running);
    event(&lines, "the first snapshot", |e| e["kind"] == "snapshot");
    scene.fuse.stop();
    event(&lines, "the finding", |e| e["kind"] == "finding");
    scene.fuse.go_on();
    event(&lines, "the recovery", |e| e["kind"] == "finding-cleared");
}

#[test]
fn the_dashboard_says_for_how_long_stays_live_and_quits_at_once() {
    if !fuse::possible() || !have(&["qemu-io"]) {
        return;
    }
    let mut scene = Scene::new(Duration::ZERO);
    let arguments = [scene.images.dir().to_str().unwrap(), scene.fuse.dir().to_str().unwrap(), "--interval", "200ms"];
    let mut pty = Pty::start(PROGRAM, &arguments, &[], 120, 30);
    pty.wait_for("2 images");
    scene.fuse.stop();
    pty.wait_for("stalled 3s");
    pty.wait_for("stalled 4s");
    let _holder = holding(&mut qemu_io(&["-f", "raw"], &scene.near), &scene.near, "cw/-");
    pty.wait_for("1 in use");
    pty.keys("q");
    assert_eq!(pty.wait_for_end().code(), Some(0));
}

#[test]
fn a_dashboard_on_storage_that_never_answered_starts_says_so_and_quits() {
    if !fuse::possible() {
        return;
    }
    let mut scene = Scene::new(Duration::ZERO);
    scene.fuse.stop();
    let mut pty = Pty::start(PROGRAM, &[scene.fuse.dir().to_str().unwrap()], &[], 120, 30);
    pty.wait_for("does not answer");
    pty.keys("q");
    assert_eq!(pty.wait_for_end().code(), Some(0));
    let mut pty = Pty::start(PROGRAM, &[scene.fuse.dir().to_str().unwrap()], &[], 120, 30);
    pty.wait_for("does not answer");
    scene.fuse.go_on();
    pty.wait_for("far.raw");
    pty.keys("q");
    assert_eq!(pty.wait_for_end().code(), Some(0));
}

#[test]
fn an_overlay_whose_base_hangs_is_live_and_its_base_cannot_be_told() {
    if !fuse::possible() || !have(&["qemu-img", "qemu-io"]) {
        return;
    }
    let mut scene = Scene::new(Duration::ZERO);
    let top = scene.images.path("top.qcow2");
    let create = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", scene.far().to_str().unwrap()].map(str::to_owned);
    support::run(Command::new("qemu-img").args(create).arg(&top));
    let _holder = holding(&mut qemu_io(&["-r", "-U", "-f", "raw"], &top), &top, "c/-");
    scene.fuse.stop();
    let (snapshot, _) = list(scene.images.dir());
    assert_eq!(image(&snapshot, &top)["verdict"], "held");
    let why = output(qlock_top().arg("why").arg(&top).args(["--as", "vm"]));
    let said = String::from_utf8(why.stdout).unwrap();
    assert!(why.status.code() == Some(3) && said.contains("does not answer"), "{said}");
}

#[test]
fn commands_about_an_image_that_does_not_answer_end_and_say_so() {
    if !fuse::possible() {
        return;
    }
    let mut scene = Scene::new(Duration::ZERO);
    let far = scene.far();
    scene.fuse.stop();
    for arguments in [vec!["why"], vec!["why", "--as", "vm"], vec!["hold", "--as", "vm"]] {
        let out = output(qlock_top().args(&arguments).arg(&far));
        let said = String::from_utf8([out.stdout, out.stderr].concat()).unwrap();
        assert!(out.status.code() == Some(3) && said.contains("does not answer"), "{arguments:?}: {said}");
    }
    let message = format!("Failed to get \"write\" lock\nIs another process using the image [{}]?", far.display());
    let mut pasted = qlock_top();
    let mut pasted = pasted.args(["why", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(&mut pasted.stdin.take().unwrap(), message.as_bytes()).unwrap();
    let out = pasted.wait_with_output().unwrap();
    let said = String::from_utf8(out.stdout).unwrap();
    assert!(out.status.code() == Some(3) && said.contains("does not answer"), "{said}");
}

#[test]
fn a_wait_outlasts_storage_that_hangs_and_its_time_counts_all_the_same() {
    if !fuse::possible() {
        return;
    }
    let mut scene = Scene::new(Duration::ZERO);
    let far = scene.far();
    let held = Foreign { name: "far.raw", mode: Mode::Read, start: 201, end: 201, pid: 5_000_000 };
    scene.fuse.lock(held);
    let wait = |timeout: &str| {
        let mut command = qlock_top();
        command.arg("wait").arg(&far).args(["--as", "io", "--timeout", timeout]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Running::spawn(&mut command)
    };
    let mut short = wait("2s");
    let mut long = wait("1h");
    // Both have asked, and been refused, when they have opened it a few times.
    let mut asked = 0;
    wait_for("both to ask", || {
        asked += scene.fuse.requests().iter().filter(|r| r.starts_with("getlk")).count();
        (asked > 100).then_some(())
    });
    scene.fuse.stop();
    let status = wait_for("the end of its time", || short.0.try_wait().unwrap());
    assert_eq!(status.code(), Some(124));
    assert!(long.0.try_wait().unwrap().is_none());
    scene.fuse.go_on();
    scene.fuse.unlock("far.raw");
    let status = wait_for("the wait to be over", || long.0.try_wait().unwrap());
    assert_eq!(status.code(), Some(0));
}

#[test]
fn a_signal_ends_a_hold_that_waits_for_storage() {
    if !fuse::possible() {
        return;
    }
    let mut scene = Scene::new(Duration::ZERO);
    let far = scene.far();
    scene.fuse.lock(Foreign { name: "far.raw", mode: Mode::Read, start: 201, end: 201, pid: 5_000_000 });
    let mut command = qlock_top();
    let mut running = Running::spawn(command.arg("hold").arg(&far).args(["--as", "io", "--wait", "1h"]));
    let mut asked = 0;
    wait_for("it to ask", || {
        asked += scene.fuse.requests().iter().filter(|r| r.starts_with("getlk")).count();
        (asked > 3).then_some(())
    });
    scene.fuse.stop();
    kill(Pid::from_raw(running.pid()), Signal::SIGTERM).unwrap();
    let status = wait_for("its end", || running.0.try_wait().unwrap());
    assert_eq!(status.code(), Some(143));
}

#[test]
fn a_process_that_is_stuck_in_exec_holds_up_nobody_who_asks_what_it_has_open() {
    if !fuse::possible() || !have(&["qemu-io", "python3"]) {
        return;
    }
    let mut scene = Scene::new(Duration::ZERO);
    let _holder = holding(&mut qemu_io(&["-f", "raw"], &scene.near), &scene.near, "cw/-");
    let script = "import os, sys; f = open(sys.argv[1]); print('open', flush=True); sys.stdin.readline(); \
                  os.execv('/bin/true', ['true'])";
    let mut stuck = support::python(script, &[&scene.far()]);
    let mut stuck = Running::spawn(stuck.stdin(Stdio::piped()).stdout(Stdio::piped()));
    BufReader::new(stuck.0.stdout.take().unwrap()).read_line(&mut String::new()).unwrap();
    scene.fuse.stop();
    support::tell(&mut stuck, "\n");
    let stat = format!("/proc/{}/stat", stuck.pid());
    scene.open_there = Some(stuck);
    // It is stuck when whoever asks about it is.
    let (answer, answered) = mpsc::channel();
    std::thread::spawn(move || while answer.send(std::fs::read(&stat).is_ok()).is_ok() {});
    wait_for("nobody to have an answer", || answered.recv_timeout(Duration::from_millis(500)).is_err().then_some(()));
    let (snapshot, code) = list(scene.images.dir());
    let near = image(&snapshot, &scene.near);
    assert_eq!((near["verdict"].as_str(), near["holders"][0]["command"].as_str()), (Some("held"), Some("qemu-io")));
    assert!(code == 1 && snapshot["hidden_processes"].as_u64() >= Some(1), "it counts as one that cannot be read");
    let refused = output(qlock_top().arg("hold").arg(&scene.near).args(["--as", "vm"]));
    assert_eq!(refused.status.code(), Some(1));
}

#[test]
fn what_a_name_leads_to_holds_up_neither_its_disk_nor_other_names() {
    if !fuse::possible() || !have(&["qemu-img", "qemu-io"]) {
        return;
    }
    let mut scene = Scene::new(Duration::ZERO);
    let link = |name: &str, to: &Path| std::os::unix::fs::symlink(to, scene.images.path(name)).unwrap();
    // A link to a file, and a backing name that goes through a link to the directory.
    link("a-link.raw", &scene.far());
    link("nfs", scene.fuse.dir());
    let elsewhere = Images::new();
    let linked = elsewhere.raw("linked.raw");
    link("z-link.raw", &linked);
    let top = scene.images.path("top.qcow2");
    let create = ["create", "-q", "-f", "qcow2", "-u", "-F", "raw", "-b", "nfs/far.raw"];
    support::run(Command::new("qemu-img").args(create).arg(&top).arg("1M"));
    scene.fuse.stop();
    let (snapshot, code) = list(scene.images.dir());
    assert_eq!(code, 3);
    for healthy in [&scene.near, &top, &scene.images.path("z-link.raw")] {
        assert_eq!(image(&snapshot, healthy)["verdict"], "free", "{}", healthy.display());
    }
    // More names than there are threads.
    let many: Vec<PathBuf> = (0..20).map(|i| scene.images.raw(&format!("many-{i}.raw"))).collect();
    let out = output(qlock_top().args(["list", "--format", "json"]).arg(scene.images.path("a-link.raw")).args(&many));
    let snapshot: Value = serde_json::from_slice(&out.stdout).unwrap();
    many.iter().for_each(|path| assert_eq!(image(&snapshot, path)["verdict"], "free"));
    assert!(String::from_utf8_lossy(&out.stderr).contains("a-link.raw: the storage does not answer"));
    // And it stays live.
    let mut running = watch(&[scene.images.dir()], "200ms");
    let lines = lines(&mut running);
    event(&lines, "the first snapshot", |e| e["kind"] == "snapshot");
    let holder = holding(&mut qemu_io(&["-f", "raw"], &scene.near), &scene.near, "cw/-");
    event(&lines, "a lock beside it", |e| e["kind"] == "acquired" && e["pid"] == holder.pid());
}

#[test]
fn slow_storage_is_not_taken_for_dead() {
    if !have(&["strace"]) {
        return;
    }
    let images = Images::new();
    for i in 0..100 {
        images.raw(&format!("{i}.raw"));
    }
    // 20 ms for each question: listing them takes longer than patience lasts.
    let mut slow = Command::new("strace");
    slow.args(["-f", "-qq", "-o", "/dev/null", "-e", "trace=statx", "-e", "inject=statx:delay_enter=20000"]);
    let out = output(slow.args([PROGRAM, "list", "--format", "json"]).arg(images.dir()));
    let snapshot: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(snapshot["images"].as_array().unwrap().len(), 100, "{}", String::from_utf8_lossy(&out.stderr));
}

#[test]
fn a_signal_ends_a_hold_whose_storage_has_gone() {
    if !fuse::possible() {
        return;
    }
    let mut scene = Scene::new(Duration::ZERO);
    let mut command = qlock_top();
    command.arg("hold").arg(scene.far()).args(["--as", "io", "--timeout", "1h"]).stdout(Stdio::piped());
    let mut running = Running::spawn(&mut command);
    let lines = lines(&mut running);
    assert!(lines.recv_timeout(DEADLINE).unwrap().starts_with("holding "));
    scene.fuse.stop();
    kill(Pid::from_raw(running.pid()), Signal::SIGTERM).unwrap();
    // It has said its last word; the kernel lets its open file go only when the server is heard of again.
    let status = format!("/proc/{}/status", running.pid());
    let zombie = || std::fs::read_to_string(&status).map_or(true, |s| s.contains("State:\tZ")).then_some(());
    wait_for("the end of its main thread", zombie);
    scene.fuse.go_on();
    let status = wait_for("its end", || running.0.try_wait().unwrap());
    assert_eq!(status.code(), Some(143));
}
