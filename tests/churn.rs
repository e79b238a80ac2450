//! Does it stay right, quiet and small while processes, images, directories and mounts vanish and come back at any point
//! of a look?
//!
//! All four churn for 30 s, or for as many as `QLOCK_CHURN_SECONDS` says: the middle third at full speed, which is too
//! fast for inotify to be listened to, the others at one at which it is. What `watch` has told is added up to a state of
//! its own, which must be what a fresh `list` says when all is quiet again.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/pty.rs"]
mod pty;
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use jsonschema::{Registry, Validator};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use pty::Pty;
use qlock::protocol::Access;
use serde_json::Value;
use support::{Images, Running, access_of, am_root, have, holding, locked, qemu_io, qlock_top, wait_for};

const PROGRAM: &str = env!("CARGO_BIN_EXE_qlock-top");

fn duration() -> Duration {
    let seconds = std::env::var("QLOCK_CHURN_SECONDS").ok().map(|s| s.parse().unwrap());
    Duration::from_secs(seconds.unwrap_or(30))
}

/// What a process uses of the machine.
#[derive(Clone, Copy, Debug, Default)]
struct Size {
    /// Memory that is no copy of a file: pages of the program itself come and go as they are used.
    kilobytes: u64,
    descriptors: u64,
    threads: u64,
}

impl Size {
    fn of(pid: i32) -> Self {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let number = |name: &str| {
            let line = status.lines().find(|l| l.starts_with(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count() as u64;
        Self { kilobytes: number("RssAnon:"), descriptors, threads: number("Threads:") }
    }

    fn most(self, other: Self) -> Self {
        Self {
            kilobytes: self.kilobytes.max(other.kilobytes),
            descriptors: self.descriptors.max(other.descriptors),
            threads: self.threads.max(other.threads),
        }
    }
}

/// The size of one process over the churn: the most of its first third and of its last.
struct Sizes {
    name: &'static str,
    pid: i32,
    early: Size,
    late: Size,
}

impl Sizes {
    fn new(name: &'static str, pid: i32) -> Self {
        Self { name, pid, early: Size::default(), late: Size::default() }
    }

    fn take(&mut self, elapsed: Duration, of: Duration) {
        let now = Size::of(self.pid);
        if elapsed < of / 3 {
            self.early = self.early.most(now);
        } else if elapsed > of * 2 / 3 {
            self.late = self.late.most(now);
        }
    }

    fn assert_flat(&self) {
        let after = Size::of(self.pid);
        let Self { name, early, late, .. } = self;
        eprintln!("{name}: first third {early:?}, last third {late:?}, afterwards {after:?}");
        for later in [*late, after] {
            assert!(later.kilobytes <= early.kilobytes * 3 / 2 + 3 * 1024, "{name} grows: {early:?} {later:?}");
            assert!(later.descriptors <= early.descriptors + 16, "{name} keeps descriptors: {early:?} {later:?}");
            assert!(later.threads <= early.threads + 4, "{name} keeps threads: {early:?} {later:?}");
        }
    }
}

/// Everything mounted below a directory is unmounted when the test is over.
struct Unmount(PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        let Ok(mounts) = fs::read_to_string("/proc/self/mountinfo") else { return };
        let points = mounts.lines().filter_map(|l| l.split(' ').nth(4)).map(Path::new);
        for point in points.filter(|p| p.starts_with(&self.0)).collect::<Vec<_>>().into_iter().rev() {
            let _ = umount2(point, MntFlags::MNT_DETACH);
        }
    }
}

fn mount_tmpfs(point: &Path) -> nix::Result<()> {
    mount(Some("qlock-churn"), point, Some("tmpfs"), MsFlags::empty(), Some("size=4m"))
}

/// Threads that do something over and over until they are told to stop, and how often they did it.
struct Churn {
    stop: Arc<AtomicBool>,
    /// Slow enough for inotify to be listened to, which it is not while events are a flood.
    gently: Arc<AtomicBool>,
    threads: Vec<(&'static str, Arc<AtomicU64>, JoinHandle<()>)>,
}

impl Churn {
    fn new() -> Self {
        let flag = || Arc::new(AtomicBool::new(false));
        Self { stop: flag(), gently: flag(), threads: Vec::new() }
    }

    fn start(&mut self, name: &'static str, mut round: impl FnMut(u64) + Send + 'static) {
        let (stop, gently, rounds) = (Arc::clone(&self.stop), Arc::clone(&self.gently), Arc::new(AtomicU64::new(0)));
        let count = Arc::clone(&rounds);
        let work = move || {
            while !stop.load(Ordering::Relaxed) {
                round(count.load(Ordering::Relaxed));
                count.fetch_add(1, Ordering::Relaxed);
                if gently.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
        };
        self.threads.push((name, rounds, std::thread::spawn(work)));
    }

    /// Stops them all; fails if one of them failed, or never got round.
    fn end(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for (name, rounds, thread) in self.threads.drain(..) {
            assert!(thread.join().is_ok(), "the churn of {name} failed");
            eprintln!("{name}: {} rounds", rounds.load(Ordering::Relaxed));
            assert!(rounds.load(Ordering::Relaxed) > 0, "{name} did not churn");
        }
    }
}

impl Drop for Churn {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for (_, _, thread) in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Numbers without a pattern, the same in each run (xorshift).
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

fn raw(path: &Path) -> std::io::Result<()> {
    File::create(path)?.set_len(1 << 16)
}

/// Files that are made, replaced, linked to, renamed and removed; half of the names have never been there before.
fn churn_images(dir: PathBuf) -> impl FnMut(u64) {
    let mut dice = Dice(0x9e37_79b9);
    move |round| {
        let path = dir.join(format!("{}.raw", dice.below(8)));
        let unique = dir.join(format!("unique-{round}.raw"));
        // Whatever is in the way of one of these is part of the play.
        let _ = match dice.below(6) {
            0 | 1 => raw(&path),
            2 => raw(&unique).and_then(|()| fs::rename(&unique, &path)),
            3 => raw(&unique).and_then(|()| fs::remove_file(&unique)),
            4 => symlink(dir.join("0.raw"), dir.join(format!("link-{}", dice.below(3)))),
            _ => fs::remove_file(dir.join(format!("link-{}", dice.below(3)))).and(fs::remove_file(&path)),
        };
    }
}

/// Directories with images in them that come, change places and go.
fn churn_directories(dir: PathBuf) -> impl FnMut(u64) {
    let mut dice = Dice(0x51_7cc1);
    move |round| {
        let path = dir.join(dice.below(4).to_string());
        let _ = match dice.below(5) {
            0 | 1 => fs::create_dir_all(path.join("below/deeper"))
                .and_then(|()| raw(&path.join("a.raw")))
                .and_then(|()| raw(&path.join("below/deeper/b.raw"))),
            2 => fs::rename(&path, dir.join(format!("moved-{}", round % 3))),
            3 => fs::remove_dir_all(dir.join(format!("moved-{}", round % 3))),
            _ => fs::remove_dir_all(&path),
        };
    }
}

/// Mounts over a directory that has images, in one that comes and goes itself, and over a path that was given.
fn churn_mounts(over: PathBuf, parent: PathBuf, given: PathBuf) -> impl FnMut(u64) {
    let mut dice = Dice(0xdead_beef);
    move |round| {
        let own = parent.join(format!("m{}", round % 2));
        let point = match dice.below(3) {
            0 => &over,
            1 => &given,
            _ => {
                let _ = fs::create_dir(&own);
                &own
            }
        };
        if mount_tmpfs(point).is_ok() {
            let _ = raw(&point.join("mounted.raw"));
            let _ = fs::create_dir(point.join("in-mount")).and_then(|()| raw(&point.join("in-mount/b.raw")));
            // In the way of nobody for long: whoever is looking makes it busy for a moment.
            if umount2(point, MntFlags::empty()).is_err() {
                umount2(point, MntFlags::MNT_DETACH).unwrap();
            }
        }
        if *point == own {
            let _ = fs::remove_dir(&own);
        } else if *point == given && dice.below(2) == 0 {
            let _ = fs::remove_dir_all(&given);
            let _ = fs::create_dir(&given).and_then(|()| raw(&given.join("given.raw")));
        }
    }
}

/// A program that is killed at some point between its start and its end.
fn killed_somewhen(command: &mut Command, dice: &mut Dice) {
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut running = Running::spawn(command);
    let deadline = Instant::now() + Duration::from_millis(dice.below(60));
    while Instant::now() < deadline && matches!(running.0.try_wait(), Ok(None)) {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// QEMU's own programs and ours, on whatever is there now.
fn churn_programs(dirs: Vec<PathBuf>) -> impl FnMut(u64) {
    let mut dice = Dice(0xfeed);
    move |round| {
        let dir = &dirs[usize::try_from(dice.below(dirs.len() as u64)).unwrap()];
        let images: Vec<PathBuf> = fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()).collect();
        let Some(path) = images.get(usize::try_from(dice.below(images.len().max(1) as u64)).unwrap()) else { return };
        match round % 4 {
            0 => killed_somewhen(&mut qemu_io(&["-f", "raw"], path), &mut dice),
            1 => killed_somewhen(&mut qemu_io(&["-f", "raw", "-c", "read 0 512"], path), &mut dice),
            2 => {
                let mut image = path.clone().into_os_string();
                image.push("=cwr/wr");
                killed_somewhen(qlock_top().args(["demo-actor", "hold"]).arg(image), &mut dice);
            }
            _ => {
                let path = dir.join(format!("made-{}.qcow2", dice.below(2)));
                let mut command = Command::new("qemu-img");
                killed_somewhen(command.args(["create", "-q", "-f", "qcow2"]).arg(&path).arg("1M"), &mut dice);
                let _ = fs::remove_file(&path);
            }
        }
    }
}

/// Forks as fast as it can; each child locks an image that it finds, and is killed or ends a moment later.
const STORM: &str = "
import fcntl, os, random, select, signal, struct, sys, time
live, rounds = [], 0
def reap(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
while not select.select([0], [], [], 0)[0]:
    if rounds % 20 == 0:
        paths = [os.path.join(d, f) for top in sys.argv[1:] for d, _, fs in os.walk(top) for f in fs]
    rounds += 1
    if not paths: continue
    path = random.choice(paths)
    pid = os.fork()
    if pid == 0:
        try:
            fd = os.open(path, os.O_RDWR)
            for byte in random.sample([100, 101, 103, 201, 203], 2):
                fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack('hhqqi', fcntl.F_RDLCK, 0, byte, 1, 0))
            if random.random() < 0.2: os.unlink(path)
            time.sleep(random.random() / 20)
        except OSError: pass
        os._exit(0)
    live.append(pid)
    if len(live) > 6: reap(live.pop(random.randrange(len(live))))
for pid in live: reap(pid)
print(rounds)
";

fn storm(dirs: &[&Path]) -> Child {
    support::python(STORM, dirs).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
}

/// What `watch` has told so far, added up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct State {
    /// By image and pid, 0 for what has no holder that is known.
    images: BTreeMap<String, BTreeMap<u64, Access>>,
    /// By image, none for the host's.
    findings: BTreeSet<(Option<String>, String)>,
}

fn access(value: &Value) -> Access {
    access_of(value).parse().unwrap()
}

fn text(value: &Value, field: &str) -> String {
    value[field].as_str().unwrap_or_else(|| panic!("{field} in {value}")).to_owned()
}

impl State {
    fn of(snapshot: &Value) -> Self {
        let mut state = Self::default();
        for image in snapshot["images"].as_array().unwrap() {
            let mut holders = BTreeMap::new();
            for holder in image["holders"].as_array().unwrap() {
                let held: &mut Access = holders.entry(holder["pid"].as_u64().unwrap()).or_default();
                *held = held.union(access(holder));
            }
            let nobody = image["bytes"].as_array().unwrap().iter().filter(|b| {
                let holders = b["holders"].as_array().unwrap();
                b["state"] == "held" && holders.is_empty()
            });
            let nobody: Access =
                nobody.map(|b| qlock::protocol::LockByte::at(b["byte"].as_u64().unwrap()).unwrap()).collect();
            holders.insert(0, nobody);
            holders.retain(|_, access| !access.is_empty());
            let path = text(image, "path");
            let findings = image["findings"].as_array().unwrap().iter();
            state.findings.extend(findings.map(|f| (Some(path.clone()), text(f, "text"))));
            assert!(state.images.insert(path, holders).is_none(), "listed twice: {image}");
        }
        let findings = snapshot["findings"].as_array().into_iter().flatten();
        state.findings.extend(findings.map(|f| (None, text(f, "text"))));
        state
    }

    fn take(&mut self, event: &Value) {
        let image = event["image"].as_str().map(str::to_owned);
        match text(event, "kind").as_str() {
            "snapshot" => *self = Self::of(&event["snapshot"]),
            "image-added" => {
                let before = self.images.insert(image.unwrap(), BTreeMap::new());
                assert_eq!(before, None, "added though it is there: {event}");
            }
            "image-removed" => {
                assert!(self.images.remove(image.as_ref().unwrap()).is_some(), "removed though not there: {event}");
                self.findings.retain(|(of, _)| *of != image);
            }
            "finding" => assert!(self.findings.insert((image, text(event, "text"))), "found twice: {event}"),
            "finding-cleared" => {
                assert!(self.findings.remove(&(image, text(event, "text"))), "cleared though not there: {event}");
            }
            kind @ ("acquired" | "released") => {
                let holders = self.images.get_mut(image.as_ref().unwrap());
                let holders = holders.unwrap_or_else(|| panic!("of an image that is not there: {event}"));
                let held = holders.entry(event["pid"].as_u64().unwrap_or(0)).or_default();
                let moved = access(event);
                if kind == "acquired" {
                    *held = held.union(moved);
                } else {
                    assert!(moved.difference(*held).is_empty(), "let go but never taken: {event}, {held:?}");
                    *held = held.difference(moved);
                }
                holders.retain(|_, access| !access.is_empty());
            }
            "gap" => {}
            other => panic!("unknown kind {other}: {event}"),
        }
    }
}

/// A running `watch` and what it has told.
struct Watch {
    running: Running,
    lines: Receiver<String>,
    errors: JoinHandle<String>,
    state: State,
    kinds: BTreeMap<String, u64>,
    gaps: BTreeMap<String, u64>,
}

impl Watch {
    fn start(paths: &[&Path]) -> Self {
        let mut command = qlock_top();
        command.args(["watch", "--format", "ndjson", "--interval", "100ms", "--recursive"]).args(paths);
        let mut running = Running::spawn(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
        let out = BufReader::new(running.0.stdout.take().unwrap());
        let mut err = running.0.stderr.take().unwrap();
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || out.lines().map_while(Result::ok).try_for_each(|l| sender.send(l)));
        let errors = std::thread::spawn(move || {
            let mut all = String::new();
            err.read_to_string(&mut all).unwrap();
            all
        });
        let (state, kinds, gaps) = Default::default();
        Self { running, lines, errors, state, kinds, gaps }
    }

    /// Takes in what has come, and hands each line to `check`.
    fn take(&mut self, events: &Validator, check: impl Fn(&Value)) {
        for line in self.lines.try_iter() {
            let event: Value = serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line}"));
            let wrong: Vec<String> = events.iter_errors(&event).map(|e| e.to_string()).collect();
            assert!(wrong.is_empty(), "{wrong:?}: {line}");
            check(&event);
            *self.kinds.entry(text(&event, "kind")).or_default() += 1;
            if event["kind"] == "gap" {
                let words: Vec<&str> =
                    event["text"].as_str().unwrap().split(' ').filter(|w| !w.contains('/')).collect();
                *self.gaps.entry(words.join(" ")).or_default() += 1;
            }
            self.state.take(&event);
        }
    }

    fn end(mut self) -> String {
        self.running.0.kill().unwrap();
        self.running.0.wait().unwrap();
        self.errors.join().unwrap()
    }
}

fn schema(name: &str) -> Value {
    let path = format!("{}/assets/schema/{name}", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn event_validator() -> Validator {
    let snapshot = schema("snapshot-1.schema.json");
    let registry = Registry::new().add("urn:qlock-top:snapshot:1", &snapshot).unwrap().prepare().unwrap();
    jsonschema::options().with_registry(&registry).build(&schema("event-1.schema.json")).unwrap()
}

fn list_recursive(paths: &[&Path]) -> Value {
    let mut command = qlock_top();
    let output = support::output(command.args(["list", "--format", "json", "--recursive"]).args(paths));
    let errors = String::from_utf8_lossy(&output.stderr);
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {errors}"))
}

#[test]
fn what_vanishes_and_comes_back_at_any_point_of_a_look_leaves_no_error_no_stale_row_and_no_growth() {
    if !am_root() || !have(&["qemu-io", "qemu-img", "python3"]) {
        return;
    }
    let images = Images::new();
    let root = images.dir().canonicalize().unwrap();
    let (watched, given) = (root.join("watched"), root.join("given"));
    let [files, dirs, over, mounts] = ["images", "dirs", "over", "mounts"].map(|name| watched.join(name));
    for dir in [&files, &dirs, &over, &mounts, &given] {
        fs::create_dir_all(dir).unwrap();
    }
    raw(&over.join("under.raw")).unwrap();
    raw(&given.join("given.raw")).unwrap();
    let _unmount = Unmount(root.clone());
    // What stands still all the time must be told as standing still.
    let kept = watched.join("kept.raw");
    raw(&kept).unwrap();
    let mut keeper = qlock_top();
    let keeper = holding(keeper.args(["demo-actor", "hold"]).arg(format!("{}=cw/w", kept.display())), &kept, "cw/w");

    let paths = [watched.as_path(), given.as_path()];
    let events = event_validator();
    let mut watch = Watch::start(&paths);
    let [a, b] = paths.map(|p| p.to_str().unwrap());
    let mut pty = Pty::start(PROGRAM, &["--recursive", "--interval", "100ms", a, b], &[], 120, 30);
    pty.wait_for("kept.raw");
    wait_for("the first snapshot", || {
        watch.take(&events, |_| {});
        (!watch.kinds.is_empty()).then_some(())
    });

    let mut churn = Churn::new();
    churn.start("images", churn_images(files.clone()));
    churn.start("directories", churn_directories(dirs.clone()));
    churn.start("mounts", churn_mounts(over.clone(), mounts, given.clone()));
    churn.start("programs", churn_programs(vec![files.clone(), over, given.clone()]));
    let mut storm = Running(storm(&[&files, &dirs]));

    let steady = |event: &Value| {
        let quiet = event["image"] != kept.to_str().unwrap() || event["kind"] == "gap";
        assert!(quiet, "nothing happened to it: {event}");
    };
    let comm = fs::read_to_string(format!("/proc/{}/comm", pty.running.pid())).unwrap();
    assert_eq!(comm, "qlock-top\n", "setsid has become it");
    let mut sizes = [Sizes::new("watch", watch.running.pid()), Sizes::new("dashboard", pty.running.pid())];
    let (start, length) = (Instant::now(), duration());
    while start.elapsed() < length {
        std::thread::sleep(Duration::from_millis(100));
        watch.take(&events, steady);
        sizes.iter_mut().for_each(|s| s.take(start.elapsed(), length));
        let middle = length / 3..length * 2 / 3;
        churn.gently.store(!middle.contains(&start.elapsed()), Ordering::Relaxed);
        assert!(watch.running.0.try_wait().unwrap().is_none(), "watch has ended");
        assert!(pty.running.0.try_wait().unwrap().is_none(), "the dashboard has ended: {}", pty.screen());
        assert!(storm.0.try_wait().unwrap().is_none(), "the storm has ended");
    }
    churn.end();
    drop(storm.0.stdin.take());
    let mut rounds = String::new();
    storm.0.stdout.take().unwrap().read_to_string(&mut rounds).unwrap();
    eprintln!("processes: {} rounds", rounds.trim());
    assert!(rounds.trim().parse::<u64>().unwrap() > 0);
    drop(storm);

    let mut fresh = State::default();
    let same = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        wait_for("what was told to be what is", || {
            watch.take(&events, steady);
            fresh = State::of(&list_recursive(&paths));
            (watch.state == fresh).then_some(())
        });
    }));
    assert!(same.is_ok(), "told:\n{:#?}\nis:\n{fresh:#?}", watch.state);
    assert_eq!(locked(&kept).to_string(), "cw/w");
    assert_eq!(fresh.images[kept.to_str().unwrap()].keys().copied().collect::<Vec<_>>(), [keeper.pid() as u64]);
    pty.wait_for(&format!("{} images", fresh.images.len()));
    pty.wait_for("1 in use");
    eprintln!("events: {:?}\ngaps: {:#?}", watch.kinds, watch.gaps);
    for kind in ["acquired", "released", "image-added", "image-removed"] {
        assert!(watch.kinds.contains_key(kind), "nothing was told of {kind}");
    }
    sizes.iter().for_each(Sizes::assert_flat);

    pty.keys("q");
    assert_eq!(pty.wait_for_end().code(), Some(0));
    let written = String::from_utf8_lossy(&pty.raw()).into_owned();
    assert!(!written.contains("panicked"), "{written}");
    assert_eq!(watch.end(), "", "errors are for nobody");
}
