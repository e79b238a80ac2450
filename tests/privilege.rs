//! How little is needed to see everything that root sees, and does the systemd unit give just that?
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use support::{
    Images, Running, am_root, have, holding, image, left_out, locked, output, python, qemu_io, qlock_top, run, wait_for,
};

/// All that is needed. The unit, the README and the tests name the same two.
const CAPABILITIES: [&str; 2] = ["cap_sys_ptrace", "cap_dac_read_search"];

/// Real holders of every kind, of images that only root may read, in a directory that only root may enter.
struct Scene {
    _holders: Vec<Running>,
    images: Images,
}

impl Scene {
    fn make() -> Self {
        let images = Images::new();
        let raw = images.raw("shared.raw");
        images.qcow2("base.qcow2");
        let overlay = images.overlay("overlay.qcow2", "base.qcow2");
        let (posix, opened, apart) = (images.raw("posix.raw"), images.raw("opened.raw"), images.raw("apart.raw"));
        images.raw("free.raw");
        for entry in fs::read_dir(images.dir()).unwrap() {
            fs::set_permissions(entry.unwrap().path(), Permissions::from_mode(0o600)).unwrap();
        }
        fs::set_permissions(images.dir(), Permissions::from_mode(0o700)).unwrap();
        let posix_lock =
            "import fcntl,sys\nf=open(sys.argv[1],'r+b')\nfcntl.lockf(f,fcntl.LOCK_SH,1,101)\nsys.stdin.read()";
        let mut open = Command::new("sh");
        open.args(["-c", "exec 3<>\"$1\"; echo open; read line", "sh"]).arg(&opened);
        let mut opener = Running::spawn(open.stdin(Stdio::piped()).stdout(Stdio::piped()));
        let mut line = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(opener.0.stdout.take().unwrap()), &mut line).unwrap();
        assert_eq!(line, "open\n");
        // In namespaces of its own, and under another name for the image.
        let mut container = Command::new("unshare");
        let script = "mount --bind \"$1\" /mnt && exec qemu-io -f raw /mnt/apart.raw";
        container.args(["-mu", "sh", "-c", script, "sh"]).arg(images.dir());
        let mut posix_holder = python(posix_lock, &[&posix]);
        let posix_holder = Running::spawn(posix_holder.stdin(Stdio::piped()));
        wait_for("the POSIX lock", || (!locked(&posix).is_empty()).then_some(()));
        let holders = vec![
            holding(&mut qemu_io(&["-f", "raw"], &raw), &raw, "cw/-"),
            holding(&mut qemu_io(&["-f", "raw"], &raw), &raw, "cw/-"),
            holding(&mut qemu_io(&["-f", "qcow2"], &overlay), &overlay, "cwr/wr"),
            holding(&mut container, &apart, "cw/-"),
            posix_holder,
            opener,
        ];
        Self { _holders: holders, images }
    }
}

/// A copy of the program where everybody may run it, but nobody may write: gone with the test.
struct Copy(tempfile::TempDir);

impl Copy {
    fn make() -> Self {
        let directory = tempfile::Builder::new().prefix("qlock-test-").tempdir().unwrap();
        fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
        let copy = Self(directory);
        fs::copy(env!("CARGO_BIN_EXE_qlock-top"), copy.path()).unwrap();
        fs::set_permissions(copy.path(), Permissions::from_mode(0o755)).unwrap();
        copy
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("qlock-top")
    }
}

/// Nobody, with these capabilities and never any others.
fn nobody_with(capabilities: &[&str]) -> Command {
    let set: String = capabilities.iter().map(|c| format!(",+{}", c.strip_prefix("cap_").unwrap())).collect();
    let mut command = Command::new("setpriv");
    command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]);
    for kind in ["--bounding-set", "--inh-caps", "--ambient-caps"] {
        command.arg(kind).arg(format!("-all{set}"));
    }
    command
}

fn what_is_seen(command: &mut Command) -> (Value, i32) {
    let output = output(command);
    let value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&output.stderr)));
    (value, output.status.code().unwrap())
}

/// What is seen, but for the moment and for processes that neither may read.
fn timeless(mut snapshot: Value) -> Value {
    snapshot["taken_at"] = json!(null);
    snapshot["hidden_processes"] = json!(null);
    snapshot
}

/// Two answers that should be one. Between them a process may end, or a second: then they are asked for again.
fn same<T: PartialEq>(mut ask: impl FnMut() -> (T, T)) -> (T, T) {
    let mut answers = ask();
    for _ in 0..5 {
        if answers.0 == answers.1 {
            break;
        }
        answers = ask();
    }
    answers
}

/// The same from both, down to how many processes neither may read.
fn assert_same_as_root(scene: &Scene, mut as_nobody: impl FnMut() -> Command, arguments: &[&str]) {
    let hidden = |seen: &(Value, i32)| seen.0["hidden_processes"].as_u64().unwrap();
    let (root, nobody) = same(|| {
        let root = what_is_seen(qlock_top().args(arguments).arg(scene.images.dir()));
        let nobody = what_is_seen(as_nobody().args(arguments).arg(scene.images.dir()));
        let hidden = (hidden(&root), hidden(&nobody));
        ((timeless(root.0), root.1, hidden.0), (timeless(nobody.0), nobody.1, hidden.1))
    });
    assert_eq!(image(&root.0, &scene.images.path("shared.raw"))["verdict"], "held");
    assert_eq!(nobody, root);
}

#[test]
fn with_two_capabilities_and_no_root_everything_is_seen_that_root_sees() {
    if !am_root() || !have(&["setpriv", "qemu-io", "qemu-img", "python3", "unshare"]) {
        return;
    }
    let (scene, copy) = (Scene::make(), Copy::make());
    let command = || {
        let mut command = nobody_with(&CAPABILITIES);
        command.arg("--no-new-privs").arg(copy.path());
        command
    };
    assert_same_as_root(&scene, command, &["list", "--format", "json"]);

    for arguments in [&["why", "--as", "convert-source"][..], &["why"], &["why", "--format", "json", "--as", "vm"]] {
        for name in ["shared.raw", "overlay.qcow2", "base.qcow2", "apart.raw", "posix.raw", "opened.raw", "free.raw"] {
            let said = |command: &mut Command| {
                let output = output(command.args(arguments).arg(scene.images.path(name)));
                (String::from_utf8(output.stdout).unwrap(), output.status.code())
            };
            let (nobody, root) = same(|| (said(&mut command()), said(&mut qlock_top())));
            assert_eq!(nobody, root, "{arguments:?} {name}");
        }
    }
}

#[test]
fn neither_of_the_two_capabilities_is_enough_alone_and_neither_lie() {
    if !am_root() || !have(&["setpriv", "qemu-io", "qemu-img", "python3", "unshare"]) {
        return;
    }
    let (scene, copy) = (Scene::make(), Copy::make());
    for one in CAPABILITIES {
        let mut command = nobody_with(&[one]);
        command.arg(copy.path()).args(["list", "--format", "json"]).arg(scene.images.dir());
        let output = output(&mut command);
        assert_eq!(output.status.code(), Some(3), "{one}: {}", String::from_utf8_lossy(&output.stderr));
        if let Ok(seen) = serde_json::from_slice::<Value>(&output.stdout) {
            assert_eq!(seen["complete"], false, "{one}");
            for image in seen["images"].as_array().unwrap() {
                let name = image["path"].as_str().unwrap().rsplit('/').next().unwrap();
                let free = ["free.raw", "opened.raw"].contains(&name);
                assert!(free || image["verdict"] != "free", "{one}: {image}");
            }
        }
    }
}

#[test]
fn a_file_capability_gives_everybody_who_may_run_the_program_the_same_view() {
    if !am_root() || !have(&["setpriv", "setcap", "qemu-io", "qemu-img", "python3", "unshare"]) {
        return;
    }
    let (scene, copy) = (Scene::make(), Copy::make());
    let given = output(Command::new("setcap").arg(format!("{}=ep", CAPABILITIES.join(","))).arg(copy.path()));
    if !given.status.success() {
        return left_out(&format!("setcap: {}", String::from_utf8_lossy(&given.stderr)));
    }
    let command = || {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--inh-caps=-all"]).arg(copy.path());
        command
    };
    assert_same_as_root(&scene, command, &["list", "--format", "json"]);
}

/// The unit's settings: a key may have several values, in their order.
fn unit() -> BTreeMap<String, Vec<String>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/qlock-top-watch.service");
    let text = fs::read_to_string(path).unwrap();
    let mut settings: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for line in text.lines().filter(|l| !l.is_empty() && !l.starts_with(['#', '['])) {
        let (key, value) = line.split_once('=').unwrap_or_else(|| panic!("no setting: {line}"));
        settings.entry(key.to_owned()).or_default().push(value.to_owned());
    }
    settings
}

#[test]
fn the_unit_has_the_capabilities_that_are_needed_and_no_other() {
    let unit = unit();
    let needed: BTreeSet<String> = CAPABILITIES.iter().map(|c| c.to_uppercase()).collect();
    for key in ["AmbientCapabilities", "CapabilityBoundingSet"] {
        let [value] = unit[key].as_slice() else { panic!("{key} stands once") };
        let given: BTreeSet<String> = value.split(' ').map(str::to_owned).collect();
        assert_eq!(given, needed, "{key}");
    }
    for (key, value) in [
        ("DynamicUser", "yes"),
        ("NoNewPrivileges", "yes"),
        ("ProtectSystem", "strict"),
        ("ReadOnlyPaths", "-/var/lib/libvirt/images"),
        // These would hide what is to be seen.
        ("ProtectProc", "default"),
        ("ProcSubset", "all"),
        ("PrivateUsers", "no"),
        ("PrivateDevices", "no"),
    ] {
        assert_eq!(unit[key], [value], "{key}");
    }
}

#[test]
fn the_command_of_the_unit_is_one_that_the_program_takes() {
    let command = &unit()["ExecStart"][0];
    let words: Vec<&str> = command.split(' ').collect();
    assert_eq!((words[0], words.last()), ("/usr/local/bin/qlock-top", Some(&"/var/lib/libvirt/images")));
    let images = Images::new();
    images.raw("a.raw");
    let mut watch = qlock_top();
    watch.args(&words[1..words.len() - 1]).arg(images.dir()).stdout(Stdio::piped());
    let mut watch = Running::spawn(&mut watch);
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(watch.0.stdout.take().unwrap()), &mut line).unwrap();
    let first: Value = serde_json::from_str(&line).unwrap();
    assert_eq!(first["kind"], "snapshot");
}

/// The system calls of each of systemd's sets, by its name.
fn call_sets() -> BTreeMap<String, Vec<String>> {
    let text = run(Command::new("systemd-analyze").args(["--no-pager", "syscall-filter"]));
    let mut sets: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut name = String::new();
    for line in text.lines() {
        let word = line.trim();
        if line.starts_with('@') {
            name = word.to_owned();
        } else if line.starts_with(' ') && !word.is_empty() && !word.starts_with('#') {
            sets.entry(name.clone()).or_default().push(word.to_owned());
        }
    }
    sets
}

fn calls_of(sets: &BTreeMap<String, Vec<String>>, name: &str) -> BTreeSet<String> {
    match sets.get(name) {
        Some(members) => members.iter().flat_map(|m| calls_of(sets, m)).collect(),
        None => BTreeSet::from([name.to_owned()]),
    }
}

#[test]
fn the_units_filter_lets_through_every_call_that_watching_makes() {
    if !have(&["strace", "setpriv", "systemd-analyze"]) {
        return;
    }
    let sets = call_sets();
    assert!(sets.len() > 10, "{sets:?}");
    let mut allowed = BTreeSet::new();
    for setting in &unit()["SystemCallFilter"] {
        let (words, forbids) = setting.strip_prefix('~').map_or((setting.as_str(), false), |rest| (rest, true));
        for name in words.split(' ') {
            assert!(!name.starts_with('@') || sets.contains_key(name), "systemd knows no {name}");
            for call in calls_of(&sets, name) {
                if forbids {
                    allowed.remove(&call)
                } else {
                    allowed.insert(call)
                };
            }
        }
    }
    for never in ["ptrace", "process_vm_readv", "process_vm_writev", "open_by_handle_at", "mount", "bpf", "setns"] {
        assert!(!allowed.contains(never), "{never}");
    }

    let images = Images::new();
    let log = tempfile::NamedTempFile::new().unwrap();
    // With no more rights than the unit gives: with them it may load a program into the kernel.
    let mut watch = if nix::unistd::geteuid().is_root() {
        let mut command = Command::new("setpriv");
        command.args(["--bounding-set", "-sys_admin,-bpf,-perfmon", "--", "strace"]);
        command
    } else {
        Command::new("strace")
    };
    watch.args(["-f", "-qq", "-o"]).arg(log.path()).arg(env!("CARGO_BIN_EXE_qlock-top"));
    watch.args(["--read-only", "watch", "--format", "ndjson", "--interval", "100ms"]).arg(images.dir());
    let mut watch = Running::spawn(watch.stdout(Stdio::piped()));
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(watch.0.stdout.take().unwrap()));
    let mut until = |kind: &str| {
        while serde_json::from_str::<Value>(&lines.next().unwrap().unwrap()).unwrap()["kind"] != kind {}
    };
    until("snapshot");
    let path = images.raw("a.raw");
    until("image-added");
    let held = qlock::hold::HeldAccess::acquire(&path, "cw/w".parse().unwrap()).unwrap();
    until("acquired");
    drop(held);
    until("released");
    let traced = child_of(watch.pid());
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(traced), nix::sys::signal::Signal::SIGTERM).unwrap();
    wait_for("the end", || watch.0.try_wait().unwrap());

    let text = fs::read_to_string(log.path()).unwrap();
    let calls: BTreeSet<String> = text
        .lines()
        .filter_map(|line| {
            let call = line.split_once(' ')?.1.trim_start();
            let call = call.strip_prefix("<... ").unwrap_or(call);
            let name: String =
                call.chars().take_while(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || *c == '_').collect();
            (!name.is_empty()).then_some(name)
        })
        .collect();
    assert!(calls.contains("openat2") && calls.contains("fcntl"), "{calls:?}");
    let refused: Vec<&String> = calls.difference(&allowed).collect();
    assert_eq!(refused, [] as [&String; 0], "what the filter would refuse");
}

/// The child that a tracer runs.
fn child_of(pid: i32) -> i32 {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    children.split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn systemd_finds_no_fault_with_the_unit() {
    if !have(&["systemd-analyze"]) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let text =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/qlock-top-watch.service")).unwrap();
    let path = directory.path().join("qlock-top-watch.service");
    // The program is not installed here.
    fs::write(&path, text.replace("/usr/local/bin/qlock-top", env!("CARGO_BIN_EXE_qlock-top"))).unwrap();
    let verdict = output(Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&path));
    let said = String::from_utf8_lossy(&verdict.stderr);
    let ours: Vec<&str> = said.lines().filter(|l| l.contains("qlock-top-watch")).collect();
    assert_eq!(ours, [] as [&str; 0]);
}
