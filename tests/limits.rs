//! What if there are ten thousand images, or nearly no descriptors, threads or inotify watches, or if the watched
//! directory is unmounted, replaced or closed?
//!
//! Limits are set for the program under test alone: by prlimit(1) for one process, for inotify in a user namespace of its
//! own (`/proc/sys/user/max_inotify_watches`), so that nobody else on this host feels them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/pty.rs"]
mod pty;
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, Permissions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::Instant;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use pty::Pty;
use qlock::hold::HeldAccess;
use serde_json::Value;
use support::{DEADLINE, Images, Running, am_root, bytes_of, have, image, left_out, output, wait_for};

const PROGRAM: &str = env!("CARGO_BIN_EXE_qlock-top");
/// Nothing but inotify and the hints between two ticks can have told of it.
const NEVER: &str = "1h";
const OFTEN: &str = "100ms";

/// The program under test, started by other programs (with their arguments) that take something away from it.
fn under(wrapper: &[&str], arguments: &[&str], paths: &[&Path]) -> Command {
    let mut command = match wrapper {
        [] => Command::new(PROGRAM),
        [program, rest @ ..] => {
            let mut command = Command::new(program);
            command.args(rest).arg(PROGRAM);
            command
        }
    };
    command.env_remove("NO_COLOR").args(arguments).args(paths).stdin(Stdio::null());
    command
}

/// What a program has said that was to list something: its answer if it gave one, its status, and all that it wrote.
fn listed(command: &mut Command) -> (Option<Value>, i32, String) {
    let out = output(command);
    let all = [out.stdout.clone(), out.stderr].concat();
    (serde_json::from_slice(&out.stdout).ok(), out.status.code().unwrap(), String::from_utf8(all).unwrap())
}

struct Watch {
    running: Running,
    lines: Receiver<String>,
    first: Value,
}

impl Watch {
    fn start(mut command: Command) -> Self {
        let mut running = Running::spawn(command.stdout(Stdio::piped()));
        let out = BufReader::new(running.0.stdout.take().unwrap());
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || out.lines().map_while(Result::ok).try_for_each(|l| sender.send(l)));
        let first = lines.recv_timeout(DEADLINE).unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let first: Value = serde_json::from_str(&first).unwrap();
        assert_eq!(first["kind"], "snapshot");
        Self { running, lines, first }
    }

    fn of(path: &Path, interval: &str) -> Self {
        Self::start(under(&[], &["watch", "--format", "ndjson", "--recursive", "--interval", interval], &[path]))
    }

    /// Waits for an event for which `wanted` holds; what comes before it is passed over.
    fn event(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + DEADLINE;
        let mut others = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(line) = self.lines.recv_timeout(left) else { panic!("waited in vain for {what}, saw {others:#?}") };
            let event: Value = serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line}"));
            if wanted(&event) {
                return event;
            }
            others.push(format!("{} {} {}", event["kind"], event["image"], event["text"]));
        }
    }

    fn image_event(&self, kind: &str, path: &Path) -> Value {
        self.event(&format!("{kind} of {}", path.display()), |e| {
            e["kind"] == kind && e["image"] == path.to_str().unwrap()
        })
    }

    /// Waits for a gap that says each of `words`.
    fn gap(&self, words: &[&str]) -> Value {
        self.event(&format!("a gap with {words:?}"), |e| {
            let text = e["text"].as_str().unwrap_or_default();
            e["kind"] == "gap" && words.iter().all(|w| text.contains(w))
        })
    }

    /// Sees that a lock on `path` is told, and its end.
    fn tells_of_a_lock_on(&self, path: &Path) {
        let held = HeldAccess::acquire(path, "cw/w".parse().unwrap()).unwrap();
        self.image_event("acquired", path);
        drop(held);
        self.image_event("released", path);
    }

    /// Sees that `path` is told of when it is opened: no lock shows in any table, and there is no tick.
    fn tells_at_once_of_an_opener_of(&self, path: &Path) {
        let file = File::options().write(true).open(path).unwrap();
        let found = self.image_event("finding", path);
        assert!(found["text"].as_str().unwrap().contains("without a lock"), "{found}");
        drop(file);
        self.image_event("finding-cleared", path);
    }
}

/// How many paths a process has inotify watch.
fn inotify_watches(pid: i32) -> usize {
    let entries = fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten();
    let texts = entries.filter_map(|e| fs::read_to_string(e.path()).ok());
    texts.map(|t| t.lines().filter(|l| l.starts_with("inotify wd:")).count()).sum()
}

/// A tmpfs, unmounted when the test is over.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn mount(point: &Path) -> Self {
        mount(Some("qlock-test"), point, Some("tmpfs"), MsFlags::empty(), Some("size=8m")).unwrap();
        Self(point.to_owned())
    }

    /// In the ordinary way, which must not be in vain for long: nothing is held open there.
    fn unmount(self) {
        wait_for("the unmount", || umount2(&self.0, MntFlags::empty()).ok());
        std::mem::forget(self);
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

fn raw(path: &Path) -> PathBuf {
    File::create(path).unwrap().set_len(1 << 16).unwrap();
    path.to_owned()
}

/// Takes byte 100 and byte 201 of each image that it reads the name of, and keeps them.
const HOLD_ALL: &str = "
import fcntl, os, struct, sys
kept = []
for path in open(sys.argv[1]).read().split():
    fd = os.open(path, os.O_RDWR)
    for byte in 100, 201:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack('hhqqi', fcntl.F_RDLCK, 0, byte, 1, 0))
    kept.append(fd)
print('ready', flush=True)
sys.stdin.read()
";

const IMAGES: usize = 10_000;
const PROCESSES: usize = 10;

#[test]
fn of_ten_thousand_images_of_which_half_are_held_each_is_told_rightly_also_with_64_descriptors() {
    if !have(&["python3", "prlimit"]) {
        return;
    }
    let (images, lists) = (Images::new(), Images::new());
    let paths: Vec<PathBuf> = (0..IMAGES).map(|i| raw(&images.path(&format!("{i:05}.raw")))).collect();
    let mut holders = Vec::new();
    // Each process holds every twentieth image: the odd ones are free.
    let mut expected: BTreeMap<&str, u64> = BTreeMap::new();
    for process in 0..PROCESSES {
        let mine: Vec<&str> =
            paths.iter().skip(2 * process).step_by(2 * PROCESSES).map(|p| p.to_str().unwrap()).collect();
        let list = lists.path(&process.to_string());
        fs::write(&list, mine.join("\n")).unwrap();
        let mut command = support::python(HOLD_ALL, &[&list]);
        let mut running = Running::spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
        expected.extend(mine.iter().map(|path| (*path, running.pid() as u64)));
        let mut line = String::new();
        BufReader::new(running.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        holders.push(running);
    }
    assert_eq!(expected.len(), IMAGES / 2);
    let check = |snapshot: &Value| {
        let seen = snapshot["images"].as_array().unwrap();
        assert_eq!(seen.len(), IMAGES);
        for image in seen {
            let path = image["path"].as_str().unwrap();
            let pids: Vec<u64> =
                image["holders"].as_array().unwrap().iter().map(|h| h["pid"].as_u64().unwrap()).collect();
            let (bytes, verdict) = (bytes_of(image), image["verdict"].as_str().unwrap());
            match expected.get(path) {
                Some(pid) => assert_eq!((&*bytes, verdict, &*pids), ("c/w", "held", &[*pid][..]), "{path}"),
                None => assert_eq!((&*bytes, verdict, &*pids), ("-/-", "free", &[][..]), "{path}"),
            }
        }
    };
    for wrapper in [&[][..], &["prlimit", "--nofile=64"]] {
        let (snapshot, code, said) = listed(&mut under(wrapper, &["list", "--format", "json"], &[images.dir()]));
        check(&snapshot.unwrap_or_else(|| panic!("{said}")));
        assert_eq!(code, 1);
    }
    let watch =
        under(&["prlimit", "--nofile=64"], &["watch", "--format", "ndjson", "--interval", "1s"], &[images.dir()]);
    let watch = Watch::start(watch);
    check(&watch.first["snapshot"]);
    watch.tells_of_a_lock_on(&paths[IMAGES - 1]);
    // The one that ends lets go of all of its five hundred.
    let gone = holders.pop().unwrap();
    let mut released: BTreeSet<&str> =
        expected.iter().filter(|(_, pid)| **pid == gone.pid() as u64).map(|(path, _)| *path).collect();
    assert_eq!(released.len(), IMAGES / 2 / PROCESSES);
    gone.end();
    while !released.is_empty() {
        let event = watch.event("a release", |e| e["kind"] == "released");
        released.remove(event["image"].as_str().unwrap());
    }
}

#[test]
fn with_hardly_any_descriptors_the_answer_is_right_or_says_what_is_missing() {
    if !am_root() || !have(&["prlimit"]) {
        return;
    }
    let images = Images::new();
    let (held, free) = (images.raw("held.raw"), images.raw("free.raw"));
    let _held = HeldAccess::acquire(&held, "cw/w".parse().unwrap()).unwrap();
    for limit in 4..=20 {
        let limit = format!("--nofile={limit}");
        let (snapshot, code, said) =
            listed(&mut under(&["prlimit", &limit], &["list", "--format", "json"], &[images.dir()]));
        assert!(!said.contains("panicked"), "{limit}: {said}");
        if code == 1 {
            let snapshot = snapshot.unwrap();
            let (held, free) = (image(&snapshot, &held), image(&snapshot, &free));
            assert_eq!((bytes_of(held), held["verdict"].as_str()), ("cw/w".into(), Some("held")), "{limit}");
            assert_eq!(held["holders"][0]["pid"], std::process::id(), "{limit}");
            assert_eq!((bytes_of(free), free["verdict"].as_str()), ("-/-".into(), Some("free")), "{limit}");
        } else {
            assert!(matches!(code, 2 | 3) && said.contains("Too many open files"), "{limit}: {code} {said}");
        }
    }
}

#[test]
fn a_watch_and_a_dashboard_need_no_more_than_64_descriptors() {
    if !have(&["prlimit"]) {
        return;
    }
    let images = Images::new();
    let path = images.raw("a.raw");
    for limit in ["--nofile=64", "--nofile=16"] {
        let arguments = ["watch", "--format", "ndjson", "--interval", OFTEN];
        let watch = Watch::start(under(&["prlimit", limit], &arguments, &[images.dir()]));
        watch.tells_of_a_lock_on(&path);
        watch.tells_at_once_of_an_opener_of(&path);
    }
    let arguments = ["--nofile=64", PROGRAM, images.dir().to_str().unwrap()];
    let mut pty = Pty::start("prlimit", &arguments, &[], 100, 24);
    pty.wait_for("a.raw");
    let _held = HeldAccess::acquire(&path, "cw/w".parse().unwrap()).unwrap();
    pty.wait_for("1 in use");
    pty.keys("q");
    assert_eq!(pty.wait_for_end().code(), Some(0));
}

#[test]
fn a_watch_with_hardly_any_descriptors_says_so_and_is_whole_when_it_may_have_more() {
    if !have(&["prlimit"]) {
        return;
    }
    let images = Images::new();
    let path = images.raw("a.raw");
    let (_, code, said) = listed(&mut under(&["prlimit", "--nofile=4"], &["watch"], &[images.dir()]));
    assert!(code == 2 && said.contains("Too many open files") && said.lines().count() == 1, "{code}: {said}");
    for limit in 5..=14 {
        let limit = format!("--nofile={limit}:64");
        let arguments = ["watch", "--format", "ndjson", "--interval", OFTEN];
        let watch = Watch::start(under(&["prlimit", &limit], &arguments, &[images.dir()]));
        let snapshot = &watch.first["snapshot"];
        let listed = snapshot["images"].as_array().unwrap().len() == 1;
        if !listed {
            assert_eq!(snapshot["complete"], false, "{limit}");
            watch.gap(&["Too many open files"]);
        }
        let pid = watch.running.pid().to_string();
        support::run(Command::new("prlimit").args(["--pid", &pid, "--nofile=64:64"]));
        if !listed {
            watch.image_event("image-added", &path);
        }
        let held = HeldAccess::acquire(&path, "cw/w".parse().unwrap()).unwrap();
        watch.event("the lock with its holder", |e| e["kind"] == "acquired" && e["pid"] == std::process::id());
        drop(held);
    }
}

/// The program under test where another user may run it, and that user: nobody else has its number.
struct Stranger {
    /// The images, readable for all.
    images: Images,
    copy: Images,
    user: u32,
}

impl Stranger {
    fn new() -> Self {
        let (images, copy) = (Images::new(), Images::new());
        let user = 200_000 + std::process::id() % 100_000;
        for dir in [images.dir(), copy.dir()] {
            fs::set_permissions(dir, Permissions::from_mode(0o755)).unwrap();
        }
        fs::copy(PROGRAM, copy.path("qlock-top")).unwrap();
        fs::set_permissions(copy.path("qlock-top"), Permissions::from_mode(0o755)).unwrap();
        Self { images, copy, user }
    }

    /// Arguments of setpriv(1).
    fn run(&self, wrapper: &[&str], arguments: &[&str]) -> Vec<String> {
        let user = self.user.to_string();
        let mut all: Vec<String> = ["--reuid", &user, "--regid", &user, "--clear-groups"].map(str::to_owned).into();
        all.extend(wrapper.iter().map(|s| (*s).to_owned()));
        all.push(self.copy.path("qlock-top").to_str().unwrap().to_owned());
        all.extend(arguments.iter().map(|s| (*s).to_owned()));
        all
    }

    fn command(&self, wrapper: &[&str], arguments: &[&str]) -> Command {
        let mut command = Command::new("setpriv");
        command.args(self.run(wrapper, arguments)).arg(self.images.dir()).stdin(Stdio::null());
        command
    }
}

#[test]
fn without_threads_the_answer_is_right_or_says_what_is_missing() {
    if !am_root() || !have(&["setpriv", "prlimit"]) {
        return;
    }
    let stranger = Stranger::new();
    let path = stranger.images.raw("a.raw");
    fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    for limit in 1..=12 {
        let limit = format!("--nproc={limit}");
        let wrapper = ["prlimit", &limit];
        let (snapshot, code, said) = listed(&mut stranger.command(&wrapper, &["list", "--format", "json"]));
        let snapshot = snapshot.unwrap_or_else(|| panic!("{limit}: {said}"));
        assert_eq!((code, bytes_of(image(&snapshot, &path))), (0, "-/-".to_owned()), "{limit}: {said}");

        let watch = ["watch", "--format", "ndjson", "--interval", OFTEN];
        let mut command = stranger.command(&wrapper, &watch);
        let mut running = Running::spawn(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
        let mut first = String::new();
        let mut out = BufReader::new(running.0.stdout.take().unwrap());
        if out.read_line(&mut first).unwrap() == 0 {
            let mut said = String::new();
            std::io::Read::read_to_string(&mut running.0.stderr.take().unwrap(), &mut said).unwrap();
            let status = wait_for("its end", || running.0.try_wait().unwrap());
            let told = said.contains("Resource temporarily unavailable") && said.lines().count() == 1;
            assert!(status.code() == Some(2) && told, "{limit}: {status} {said}");
        } else {
            let held = HeldAccess::acquire(&path, "cw/w".parse().unwrap()).unwrap();
            while !first.contains("\"kind\":\"acquired\"") {
                first.clear();
                assert!(out.read_line(&mut first).unwrap() > 0, "{limit}: it has ended");
            }
            drop(held);
        }
    }
}

#[test]
fn what_cannot_be_read_at_the_start_is_told_in_the_stream_too() {
    if !am_root() || !have(&["setpriv"]) {
        return;
    }
    let stranger = Stranger::new();
    stranger.images.raw("a.raw");
    let closed = stranger.images.path("closed");
    fs::create_dir(&closed).unwrap();
    fs::set_permissions(&closed, Permissions::from_mode(0o700)).unwrap();
    let arguments = ["watch", "--format", "ndjson", "--recursive", "--interval", OFTEN];
    let watch = Watch::start(stranger.command(&[], &arguments));
    assert_eq!(watch.first["snapshot"]["complete"], false);
    // That it cannot be watched is another thing.
    let told = format!("{}: Permission denied", closed.display());
    watch.event("why", |e| e["kind"] == "gap" && e["text"].as_str().unwrap().starts_with(&told));
}

/// A user namespace of its own with this many inotify watches or instances.
const LIMITED: &str = "echo \"$2\" > /proc/sys/user/\"$1\" || exit 77; shift 2; exec \"$@\"";

fn user_namespaces() -> bool {
    if !am_root() || !have(&["unshare", "nsenter"]) {
        return false;
    }
    let limited = ["--user", "--map-root-user", "sh", "-c", LIMITED, "sh", "max_inotify_watches", "3", "true"];
    let works = output(Command::new("unshare").args(limited)).status.success();
    if !works {
        left_out("no user namespace with limits of its own can be had");
    }
    works
}

fn with_limit(limit: &str, number: &str, interval: &str, path: &Path) -> Watch {
    let wrapper = ["unshare", "--user", "--map-root-user", "sh", "-c", LIMITED, "sh", limit, number];
    let arguments = ["watch", "--format", "ndjson", "--recursive", "--interval", interval];
    Watch::start(under(&wrapper, &arguments, &[path]))
}

fn six_directories() -> (Images, Vec<PathBuf>) {
    let images = Images::new();
    let paths = (1..6).map(|i| images.path(&i.to_string())).map(|dir| {
        fs::create_dir(&dir).unwrap();
        raw(&dir.join("a.raw"))
    });
    let paths = paths.collect();
    (images, paths)
}

#[test]
fn when_inotify_watches_run_out_it_is_told_and_changes_show_all_the_same() {
    if !user_namespaces() {
        return;
    }
    let (images, paths) = six_directories();
    let watch = with_limit("max_inotify_watches", "3", OFTEN, images.dir());
    watch.gap(&["3 paths cannot be watched", "fs.inotify.max_user_watches"]);
    assert_eq!(inotify_watches(watch.running.pid()), 3);
    for path in &paths {
        watch.tells_of_a_lock_on(path);
        watch.image_event("image-added", &raw(&path.with_file_name("b.raw")));
        fs::remove_file(path).unwrap();
        watch.image_event("image-removed", path);
    }
}

#[test]
fn when_the_limit_of_inotify_watches_is_raised_they_are_taken_up_again() {
    if !user_namespaces() {
        return;
    }
    let (images, _) = six_directories();
    let watch = with_limit("max_inotify_watches", "3", OFTEN, images.dir());
    watch.gap(&["cannot be watched"]);
    let pid = watch.running.pid();
    let raise = "echo 100 > /proc/sys/user/max_inotify_watches";
    let enter = ["-U", "--preserve-credentials", "-t", &pid.to_string(), "sh", "-c", raise].map(str::to_owned);
    support::run(Command::new("nsenter").args(enter));
    wait_for("all six to be watched", || (inotify_watches(pid) == 6).then_some(()));
}

#[test]
fn without_any_inotify_it_is_told_and_changes_show_all_the_same() {
    if !user_namespaces() {
        return;
    }
    let (images, paths) = six_directories();
    let watch = with_limit("max_inotify_instances", "0", OFTEN, images.dir());
    watch.gap(&["inotify is not available"]);
    for path in &paths {
        watch.tells_of_a_lock_on(path);
        watch.image_event("image-added", &raw(&path.with_file_name("b.raw")));
    }
}

#[test]
fn a_directory_that_is_unmounted_is_told_and_watched_again_when_it_is_back() {
    if !am_root() {
        return;
    }
    let images = Images::new();
    let point = images.path("mnt");
    fs::create_dir(&point).unwrap();
    let mounted = Tmpfs::mount(&point);
    let path = raw(&point.join("a.raw"));
    let watch = Watch::of(&point, NEVER);
    let mut pty = Pty::start(PROGRAM, &[point.to_str().unwrap()], &[], 120, 24);
    pty.wait_for("1 image");
    mounted.unmount();
    watch.image_event("image-removed", &path);
    pty.wait_for("no images");
    let _mounted = Tmpfs::mount(&point);
    raw(&path);
    watch.image_event("image-added", &path);
    watch.tells_at_once_of_an_opener_of(&path);
    pty.wait_for("1 image");
    pty.keys("q");
    assert_eq!(pty.wait_for_end().code(), Some(0));
}

#[test]
fn what_is_mounted_anew_before_anybody_could_look_is_watched_again() {
    if !am_root() {
        return;
    }
    let images = Images::new();
    let point = images.path("mnt");
    fs::create_dir(&point).unwrap();
    let mut mounted = Tmpfs::mount(&point);
    raw(&point.join("0.raw"));
    let watch = Watch::of(&point, NEVER);
    for round in 1..5 {
        mounted.unmount();
        // The device number and the inode number of its root are those that were free just now.
        mounted = Tmpfs::mount(&point);
        let path = raw(&point.join(format!("{round}.raw")));
        watch.image_event("image-added", &path);
        watch.tells_at_once_of_an_opener_of(&path);
    }
}

#[test]
fn a_directory_that_is_made_anew_before_anybody_could_look_is_watched_again() {
    let images = Images::new();
    let dir = images.path("dir");
    fs::create_dir(&dir).unwrap();
    let watch = Watch::of(&dir, NEVER);
    for round in 1..5 {
        fs::remove_dir_all(&dir).unwrap();
        // Many file systems give it the inode number that was free just now.
        fs::create_dir(&dir).unwrap();
        let path = raw(&dir.join(format!("{round}.raw")));
        watch.image_event("image-added", &path);
        watch.tells_at_once_of_an_opener_of(&path);
    }
}

#[test]
fn a_directory_that_is_replaced_by_another_is_told_and_watched() {
    let images = Images::new();
    let [dir, other, away] = ["dir", "other", "away"].map(|name| images.path(name));
    fs::create_dir(&dir).unwrap();
    fs::create_dir(&other).unwrap();
    let old = raw(&dir.join("old.raw"));
    raw(&other.join("new.raw"));
    let new = dir.join("new.raw");
    let watch = Watch::of(&dir, NEVER);
    let mut pty = Pty::start(PROGRAM, &[dir.to_str().unwrap()], &[], 120, 24);
    pty.wait_for("old.raw");
    fs::rename(&dir, &away).unwrap();
    watch.image_event("image-removed", &old);
    // Not there at all: that is something to be told.
    watch.gap(&[dir.to_str().unwrap(), "No such file or directory"]);
    pty.wait_for("No such file or directory");
    fs::rename(&other, &dir).unwrap();
    watch.image_event("image-added", &new);
    watch.tells_at_once_of_an_opener_of(&new);
    pty.wait_for("new.raw");
    wait_for("the dashboard to take it back", || (!pty.screen().contains("No such file")).then_some(()));
    // Without a moment in which it is not there.
    rustix::fs::renameat_with(rustix::fs::CWD, &dir, rustix::fs::CWD, &away, rustix::fs::RenameFlags::EXCHANGE)
        .unwrap();
    watch.image_event("image-added", &old);
    watch.tells_at_once_of_an_opener_of(&old);
    pty.wait_for("old.raw");
    pty.keys("q");
    assert_eq!(pty.wait_for_end().code(), Some(0));
}

#[test]
fn a_directory_that_becomes_another_one_is_told_as_a_gap() {
    if !am_root() {
        return;
    }
    let images = Images::new();
    let point = images.path("mnt");
    fs::create_dir(&point).unwrap();
    raw(&point.join("under.raw"));
    let watch = Watch::of(&point, OFTEN);
    let mut pty = Pty::start(PROGRAM, &[point.to_str().unwrap()], &[], 120, 24);
    pty.wait_for("under.raw");
    pty.keys("5\r");
    let mounted = Tmpfs::mount(&point);
    let words = [point.to_str().unwrap(), "another directory"];
    watch.gap(&words);
    pty.wait_for("another directory");
    mounted.unmount();
    watch.gap(&words);
    pty.keys("q");
    assert_eq!(pty.wait_for_end().code(), Some(0));
}

#[test]
fn a_directory_that_becomes_unreadable_is_told_and_taken_up_again() {
    if !am_root() || !have(&["setpriv"]) {
        return;
    }
    let stranger = Stranger::new();
    let dir = stranger.images.dir().to_owned();
    let path = stranger.images.raw("a.raw");
    chown(&path, Some(stranger.user), None).unwrap();
    let mode = |mode| fs::set_permissions(&dir, Permissions::from_mode(mode)).unwrap();
    // A mode changes nothing that inotify is asked to tell: the tick finds it.
    let watch = Watch::start(stranger.command(&[], &["watch", "--format", "ndjson", "--interval", OFTEN]));
    let mut arguments = stranger.run(&[], &["--interval", OFTEN]);
    arguments.push(dir.to_str().unwrap().to_owned());
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut pty = Pty::start("setpriv", &arguments, &[], 120, 24);
    pty.wait_for("a.raw");
    for closed in [0o000, 0o311] {
        mode(closed);
        // One in which nothing may be looked up, and one that may not be listed. That is no reason to look at it anew
        // until something changes in it.
        raw(&dir.join("b.raw"));
        watch.gap(&[dir.to_str().unwrap(), "Permission denied"]);
        pty.wait_for("Permission denied");
        mode(0o755);
        watch.image_event("image-added", &dir.join("b.raw"));
        pty.wait_for("2 images");
        wait_for("the dashboard to take it back", || (!pty.screen().contains("Permission denied")).then_some(()));
        watch.tells_of_a_lock_on(&path);
        fs::remove_file(dir.join("b.raw")).unwrap();
        watch.image_event("image-removed", &dir.join("b.raw"));
        pty.wait_for("1 image");
    }
    pty.keys("q");
    assert_eq!(pty.wait_for_end().code(), Some(0));
}
