//! Does the what-if say what real QEMU programs are then told, on the image and through its backing chain?
//!
//! Holder and attempt are both real. For each pair the prediction is made first, from what the kernel says; then the
//! program is run, and verdict and first sentence must be the same.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use qlock::image::catalog::Catalog;
use qlock::linux::Roots;
use qlock::monitor::look::{Looker, Scope};
use qlock::monitor::snapshot::Snapshot;
use qlock::monitor::what_if::{Outcome, what_if};
use qlock::protocol::{Family, Message, Operation};
use support::{Images, Running, have, holding, qemu_io};

const TOOLS: [&str; 4] = ["qemu-io", "qemu-img", "qemu-nbd", "qemu-system-x86_64"];

/// A raw image, and a qcow2 overlay on a base, made anew for each attempt.
struct Scene {
    images: Images,
}

impl Scene {
    fn new() -> Self {
        let images = Images::new();
        images.raw("a.raw");
        images.qcow2("base.qcow2");
        images.overlay("a.qcow2", "base.qcow2");
        images.raw("src.raw");
        Self { images }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.images.path(name)
    }
}

fn vm(options: &str) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-accel", "tcg", "-S", "-display", "none", "-nodefaults", "-m", "64", "-monitor", "none"]);
    command.args(["-serial", "none"]).args(options.split(' '));
    command
}

/// Starts a real holder; the file that it holds and the bytes that it then shows.
fn start(scene: &Scene, holder: &str) -> Option<Running> {
    let (raw, qcow2, base) = (scene.path("a.raw"), scene.path("a.qcow2"), scene.path("base.qcow2"));
    let nbd = |options: &[&str], image: &Path| {
        let mut command = Command::new("qemu-nbd");
        command.args(["-t", "-k"]).arg(scene.path("holder.sock")).args(options).arg(image);
        command
    };
    let drive = |options: &str, image: &Path| vm(&format!("-drive file={},{options}", image.display()));
    Some(match holder {
        "none" => return None,
        "raw io" => holding(&mut qemu_io(&["-f", "raw"], &raw), &raw, "cw/-"),
        "raw io -r" => holding(&mut qemu_io(&["-r", "-f", "raw"], &raw), &raw, "c/-"),
        "raw nbd" => holding(&mut nbd(&["-f", "raw"], &raw), &raw, "cw/r"),
        "raw nbd -r" => holding(&mut nbd(&["-r", "-f", "raw"], &raw), &raw, "c/r"),
        "raw vm" => holding(&mut drive("if=virtio,format=raw", &raw), &raw, "cw/w"),
        "raw vm readonly" => holding(&mut drive("if=virtio,format=raw,readonly=on", &raw), &raw, "c/w"),
        "raw vm snapshot" => holding(&mut drive("if=virtio,format=raw,snapshot=on", &raw), &raw, "c/wr"),
        "qcow2 io" => holding(&mut qemu_io(&["-f", "qcow2"], &qcow2), &qcow2, "cwr/wr"),
        "qcow2 io -r" => holding(&mut qemu_io(&["-r", "-f", "qcow2"], &qcow2), &qcow2, "c/wr"),
        "qcow2 io -r -U" => holding(&mut qemu_io(&["-r", "-U", "-f", "qcow2"], &qcow2), &qcow2, "c/-"),
        "qcow2 io as raw" => holding(&mut qemu_io(&["-f", "raw"], &qcow2), &qcow2, "cw/-"),
        "qcow2 vm" => holding(&mut drive("if=virtio,format=qcow2", &qcow2), &qcow2, "cwr/wr"),
        "base io" => holding(&mut qemu_io(&["-f", "qcow2"], &base), &base, "cwr/wr"),
        "base io as raw" => holding(&mut qemu_io(&["-f", "raw"], &base), &base, "cw/-"),
        "base io -r" => holding(&mut qemu_io(&["-r", "-f", "qcow2"], &base), &base, "c/wr"),
        other => panic!("no such holder: {other}"),
    })
}

/// What the program was told: nothing, or QEMU's sentence.
fn attempt(scene: &Scene, operation: &Operation, family: Family) -> Option<String> {
    let measured = operation.recipe(family).unwrap().command;
    let dir = scene.images.dir();
    // The measured commands name their images in the directory that they are run in.
    let mut words: Vec<String> = Vec::new();
    for (i, part) in measured.split('"').enumerate() {
        if i % 2 == 1 { words.push(part.to_owned()) } else { words.extend(part.split_whitespace().map(str::to_owned)) }
    }
    let is_vm = words[0].starts_with('-');
    let is_server = words[0] == "qemu-nbd";
    let mut command = if is_vm {
        let pidfile = dir.join("vm.pid");
        let mut command = vm("-daemonize");
        command.arg("-pidfile").arg(pidfile).args(&words);
        command
    } else {
        let socket = dir.join("attempt.sock");
        let words = words.iter().map(|w| w.replace("{s}", socket.to_str().unwrap()));
        let mut command = Command::new(words.clone().next().unwrap());
        command.args(words.skip(1));
        if is_server {
            command.args(["--fork", "--pid-file"]).arg(dir.join("vm.pid"));
        }
        command
    };
    let output = command.current_dir(dir).stdin(Stdio::null()).output().unwrap();
    if let Ok(pid) = std::fs::read_to_string(dir.join("vm.pid")) {
        let pid = nix::unistd::Pid::from_raw(pid.trim().parse().unwrap());
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        // Ended is enough: whoever inherits it may take its time to reap it.
        let ended = || match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
            Ok(stat) => stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('Z')),
            Err(_) => true,
        };
        support::wait_for("the server's end", || ended().then_some(()));
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    let message = Message::find(&errors).map(|m| m.sentence.to_string());
    assert!(output.status.success() || message.is_some(), "{command:?}: {errors}");
    message
}

fn predict(scene: &Scene, operation: &'static Operation, family: Family) -> Option<String> {
    let catalog = Catalog::new(&[scene.images.dir().to_owned()], false).unwrap();
    let snapshot = Snapshot::of(&Looker::new(Roots::host(), catalog, None).look(Scope::Everything));
    let name = if family == Family::Raw { "a.raw" } else { "a.qcow2" };
    let image = snapshot.images.iter().find(|i| i.path.ends_with(name)).unwrap();
    match what_if(&snapshot, image, operation).unwrap().outcome {
        Outcome::Granted => None,
        Outcome::Refused(refused) => Some(refused.sentence.to_string()),
        Outcome::Unknown(why) => panic!("{}: {why}", operation.name),
    }
}

/// Every program that is run on the image itself; the others were measured on an overlay of it, which the scene has not.
fn operations(family: Family) -> impl Iterator<Item = &'static Operation> {
    let name = if family == Family::Raw { "a.raw" } else { "a.qcow2" };
    let on_itself =
        move |o: &&Operation| o.name != "rebase-backing" && o.recipe(family).is_some_and(|r| r.command.contains(name));
    Operation::ALL.iter().filter(on_itself)
}

fn compare(holder: &str, family: Family) -> usize {
    let mut differences = Vec::new();
    let mut pairs = 0;
    for operation in operations(family) {
        let scene = Scene::new();
        let _holder = start(&scene, holder);
        let predicted = predict(&scene, operation, family);
        let told = attempt(&scene, operation, family);
        if predicted != told {
            differences.push(format!("{holder}, {}: predicted {predicted:?}, told {told:?}", operation.name));
        }
        pairs += 1;
    }
    assert!(differences.is_empty(), "{differences:#?}");
    pairs
}

#[test]
fn raw_holders_against_every_raw_program() {
    if !have(&TOOLS) {
        return;
    }
    let holders =
        ["none", "raw io", "raw io -r", "raw nbd", "raw nbd -r", "raw vm", "raw vm readonly", "raw vm snapshot"];
    let pairs: usize = holders.iter().map(|h| compare(h, Family::Raw)).sum();
    assert!(pairs >= 8 * 20, "{pairs}");
}

#[test]
fn qcow2_holders_against_every_qcow2_program() {
    if !have(&TOOLS) {
        return;
    }
    let holders = ["none", "qcow2 io", "qcow2 io -r", "qcow2 io -r -U", "qcow2 io as raw", "qcow2 vm"];
    let pairs: usize = holders.iter().map(|h| compare(h, Family::Qcow2)).sum();
    assert!(pairs >= 6 * 20, "{pairs}");
}

#[test]
fn holders_of_the_backing_file_against_every_program_on_the_overlay() {
    if !have(&TOOLS) {
        return;
    }
    let pairs: usize = ["base io", "base io as raw", "base io -r"].iter().map(|h| compare(h, Family::Qcow2)).sum();
    assert!(pairs >= 3 * 20, "{pairs}");
}
