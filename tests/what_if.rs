//! Does `why` say what real QEMU programs are then told, and does `hold` refuse them what the real holder would?
//!
//! Holder and attempt are both real. For each pair the prediction is made first, by the program under test from what the
//! kernel says; then the attempt is made, and verdict and first sentence must be the same. The other way round, `hold`
//! takes the place of the holder.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use qlock::protocol::{Access, Family, Message, Operation};
use serde_json::Value;
use support::{Images, Running, have, holding, locked, output, qemu_io, qlock_top, run, wait_for};

const TOOLS: [&str; 5] = ["qemu-io", "qemu-img", "qemu-nbd", "qemu-storage-daemon", "qemu-system-x86_64"];

/// What there is before anybody comes: images, bases and overlays of both. Made once, copied for each attempt.
struct Template(Images);

impl Template {
    /// `a.qcow2` stands on `base`.
    fn on(base: &str) -> Self {
        let images = Images::new();
        // Something to read.
        for name in ["a.raw", "src.raw"] {
            std::fs::write(images.path(name), vec![0xaa; 1 << 20]).unwrap();
        }
        images.qcow2("base.qcow2");
        images.raw("base.raw");
        let format = base.split_once('.').unwrap().1;
        let create = ["create", "-q", "-f", "qcow2", "-F", format, "-b", base];
        run(Command::new("qemu-img").args(create).arg(images.path("a.qcow2")).arg("16M"));
        run(&mut qemu_io(&["-f", "qcow2", "-c", "write -P 0xaa 0 1M"], &images.path("a.qcow2")));
        for overlay in ["or.qcow2", "or2.qcow2", "hr.qcow2"] {
            let create = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "a.raw"];
            run(Command::new("qemu-img").args(create).arg(images.path(overlay)));
        }
        for overlay in ["oq.qcow2", "oq2.qcow2", "hq.qcow2"] {
            images.overlay(overlay, "a.qcow2");
        }
        Self(images)
    }

    fn scene(&self) -> Images {
        let scene = Images::new();
        for entry in std::fs::read_dir(self.0.dir()).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), scene.dir().join(entry.file_name())).unwrap();
        }
        scene
    }
}

fn vm(options: &str) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-accel", "tcg", "-S", "-display", "none", "-nodefaults", "-m", "64", "-monitor", "none"]);
    command.args(["-serial", "none"]).args(options.split(' '));
    command
}

/// A holder: which image, the command line with `{i}` for it and `{s}` for a socket, and the bytes that it then shows.
struct Holder {
    name: &'static str,
    image: &'static str,
    command: &'static str,
    shows: &'static str,
}

const fn holder(name: &'static str, image: &'static str, command: &'static str, shows: &'static str) -> Holder {
    Holder { name, image, command, shows }
}

const RAW: [Holder; 18] = [
    holder("none", "a.raw", "", "-/-"),
    holder("io", "a.raw", "qemu-io -f raw {i}", "cw/-"),
    holder("io -r", "a.raw", "qemu-io -r -f raw {i}", "c/-"),
    holder("bench", "a.raw", "qemu-img bench -c 2000000000 -s 512 -f raw {i}", "c/-"),
    holder("bench -w", "a.raw", "qemu-img bench -w -c 2000000000 -s 512 -f raw {i}", "cw/-"),
    holder("nbd", "a.raw", "qemu-nbd -t -k {s} -f raw {i}", "cw/r"),
    holder("nbd -r", "a.raw", "qemu-nbd -t -k {s} -r -f raw {i}", "c/r"),
    holder(
        "storage daemon, export",
        "a.raw",
        "qemu-storage-daemon --blockdev file,node-name=f,filename={i} --blockdev raw,node-name=n,file=f \
         --nbd-server addr.type=unix,addr.path={s} --export nbd,id=e,node-name=n,writable=on",
        "cw/r",
    ),
    holder("vm", "a.raw", "-drive if=virtio,format=raw,file={i}", "cw/w"),
    holder("vm readonly", "a.raw", "-drive if=virtio,format=raw,readonly=on,file={i}", "c/w"),
    holder("vm snapshot", "a.raw", "-drive if=virtio,format=raw,snapshot=on,file={i}", "c/wr"),
    holder(
        "vm share-rw",
        "a.raw",
        "-drive if=none,id=d,format=raw,file={i} -device virtio-blk-pci,drive=d,share-rw=on",
        "cw/-",
    ),
    holder("vm cdrom", "a.raw", "-drive if=ide,media=cdrom,format=raw,file={i}", "c/wr"),
    holder("vm nvme", "a.raw", "-drive if=none,id=d,format=raw,file={i} -device nvme,drive=d,serial=x", "cw/wr"),
    holder("vm locking off", "a.raw", "-drive if=virtio,format=raw,file.locking=off,file={i}", "-/-"),
    holder("vm incoming", "a.raw", "-incoming defer -drive if=virtio,format=raw,file={i}", "-/-"),
    holder("io of an overlay", "a.raw", "qemu-io -f qcow2 {d}/hr.qcow2", "c/-"),
    holder("vm of an overlay", "a.raw", "-drive if=virtio,format=qcow2,file={d}/hr.qcow2", "c/wr"),
];

const QCOW2: [Holder; 18] = [
    holder("none", "a.qcow2", "", "-/-"),
    holder("io", "a.qcow2", "qemu-io -f qcow2 {i}", "cwr/wr"),
    holder("io -r", "a.qcow2", "qemu-io -r -f qcow2 {i}", "c/wr"),
    holder("io -r -U", "a.qcow2", "qemu-io -r -U -f qcow2 {i}", "c/-"),
    holder("io as raw", "a.qcow2", "qemu-io -f raw {i}", "cw/-"),
    holder("bench", "a.qcow2", "qemu-img bench -c 2000000000 -s 512 -f qcow2 {i}", "c/wr"),
    holder("bench -w", "a.qcow2", "qemu-img bench -w -c 2000000000 -s 512 -f qcow2 {i}", "cwr/wr"),
    holder("nbd", "a.qcow2", "qemu-nbd -t -k {s} -f qcow2 {i}", "cwr/wr"),
    holder("nbd -r", "a.qcow2", "qemu-nbd -t -k {s} -r -f qcow2 {i}", "c/wr"),
    holder(
        "storage daemon, node",
        "a.qcow2",
        "qemu-storage-daemon --blockdev file,node-name=f,filename={i} --blockdev qcow2,node-name=n,file=f",
        "cwr/wr",
    ),
    holder("vm", "a.qcow2", "-drive if=virtio,format=qcow2,file={i}", "cwr/wr"),
    holder("vm readonly", "a.qcow2", "-drive if=virtio,format=qcow2,readonly=on,file={i}", "c/wr"),
    holder("vm force-share", "a.qcow2", "-drive if=virtio,format=qcow2,readonly=on,force-share=on,file={i}", "c/-"),
    holder("vm as raw", "a.qcow2", "-drive if=virtio,format=raw,file={i}", "cw/w"),
    holder("vm locking off", "a.qcow2", "-drive if=virtio,format=qcow2,file.locking=off,file={i}", "-/-"),
    holder("vm incoming", "a.qcow2", "-incoming defer -drive if=virtio,format=qcow2,file={i}", "-/-"),
    holder("io of an overlay", "a.qcow2", "qemu-io -f qcow2 {d}/hq.qcow2", "c/wr"),
    holder("vm of an overlay", "a.qcow2", "-drive if=virtio,format=qcow2,file={d}/hq.qcow2", "c/wr"),
];

const RAW_BASE: [Holder; 4] = [
    holder("io", "base.raw", "qemu-io -f raw {i}", "cw/-"),
    holder("io -r", "base.raw", "qemu-io -r -f raw {i}", "c/-"),
    holder("vm", "base.raw", "-drive if=virtio,format=raw,file={i}", "cw/w"),
    holder("vm readonly", "base.raw", "-drive if=virtio,format=raw,readonly=on,file={i}", "c/w"),
];

const QCOW2_BASE: [Holder; 4] = [
    holder("io", "base.qcow2", "qemu-io -f qcow2 {i}", "cwr/wr"),
    holder("io as raw", "base.qcow2", "qemu-io -f raw {i}", "cw/-"),
    holder("io -r", "base.qcow2", "qemu-io -r -f qcow2 {i}", "c/wr"),
    holder("vm", "base.qcow2", "-drive if=virtio,format=qcow2,file={i}", "cwr/wr"),
];

impl Holder {
    fn start(&self, scene: &Images) -> Option<Running> {
        if self.command.is_empty() {
            return None;
        }
        let image = scene.path(self.image);
        let fill = |text: &str| {
            let text = text.replace("{i}", image.to_str().unwrap()).replace("{d}", scene.dir().to_str().unwrap());
            text.replace("{s}", scene.path("holder.sock").to_str().unwrap())
        };
        let mut command = if self.command.starts_with('-') {
            vm(&fill(self.command))
        } else {
            let words: Vec<String> = self.command.split_whitespace().map(fill).collect();
            let mut command = Command::new(&words[0]);
            command.args(&words[1..]);
            command
        };
        let running = holding(&mut command, &image, self.shows);
        if self.shows == "-/-" {
            // No lock tells that it has come so far; its open file does.
            let fds = format!("/proc/{}/fd", running.pid());
            let has_it = || {
                let mut links = std::fs::read_dir(&fds).ok()?.flatten().map(|fd| std::fs::read_link(fd.path()));
                links.any(|link| link.is_ok_and(|l| l == image.canonicalize().unwrap())).then_some(())
            };
            wait_for(&format!("{} to open {}", self.name, image.display()), has_it);
        }
        Some(running)
    }
}

/// The image that `operation` is asked about: that of its family.
fn image_of(family: Family) -> &'static str {
    match family {
        Family::Raw => "a.raw",
        Family::Qcow2 => "a.qcow2",
    }
}

/// Every program for the family. `rebase-backing` opens the overlay's old backing file as its new one, too: two opens of
/// one image by one program, which may refuse each other.
fn operations(family: Family) -> Vec<&'static Operation> {
    Operation::ALL.iter().filter(|o| o.recipe(family).is_some()).collect()
}

/// Runs the measured command; nothing, or QEMU's first sentence.
fn attempt(scene: &Images, operation: &Operation, family: Family) -> Option<String> {
    let measured = operation.recipe(family).unwrap().command;
    // The measured commands name their images in the directory that they are run in.
    let mut words: Vec<String> = Vec::new();
    for (i, part) in measured.split('"').enumerate() {
        if i % 2 == 1 { words.push(part.to_owned()) } else { words.extend(part.split_whitespace().map(str::to_owned)) }
    }
    let pid_file = scene.path("attempt.pid");
    let mut command = if words[0].starts_with('-') {
        let mut command = vm("-daemonize");
        command.arg("-pidfile").arg(&pid_file).args(&words);
        command
    } else {
        let socket = scene.path("attempt.sock");
        let words: Vec<String> = words.iter().map(|w| w.replace("{s}", socket.to_str().unwrap())).collect();
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]);
        if words[0] == "qemu-nbd" {
            command.args(["--fork", "--pid-file"]).arg(&pid_file);
        }
        command
    };
    let output = command.current_dir(scene.dir()).stdin(Stdio::null()).output().unwrap();
    if let Ok(pid) = std::fs::read_to_string(&pid_file) {
        let pid = nix::unistd::Pid::from_raw(pid.trim().parse().unwrap());
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        // Ended is enough: whoever inherits it may take its time to reap it.
        let ended = || match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
            Ok(stat) => stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('Z')),
            Err(_) => true,
        };
        wait_for("the server's end", || ended().then_some(()));
        let _ = std::fs::remove_file(&pid_file);
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    let message = Message::find(&errors).map(|m| m.sentence.to_string());
    let shown = String::from_utf8_lossy(&output.stdout);
    // Images that differ are a result.
    let differ = operation.name == "compare" && shown.contains("Content mismatch");
    assert!(output.status.success() || message.is_some() || differ, "{command:?} {}: {shown}{errors}", output.status);
    message
}

/// What `why` says will happen; where, if it is refused.
fn predict(scene: &Images, operation: &Operation, family: Family) -> (Option<String>, Value) {
    let asked = output(qlock_top().arg("why").arg(scene.path(image_of(family))).args([
        "--as",
        operation.name,
        "--format",
        "json",
    ]));
    let said = String::from_utf8(asked.stdout).unwrap();
    let answer: Value = serde_json::from_str(&said)
        .unwrap_or_else(|e| panic!("{}: {e}: {said}{}", operation.name, String::from_utf8_lossy(&asked.stderr)));
    let status = match answer["verdict"].as_str().unwrap() {
        "granted" => 0,
        "refused" => 1,
        other => panic!("{}: {other}: {answer}", operation.name),
    };
    assert_eq!(asked.status.code(), Some(status), "{answer}");
    let byte = answer["byte"].as_u64();
    let sentence = answer["message"].as_str().map(|m| m.lines().next().unwrap().to_owned());
    assert_eq!((status == 1, status == 1), (sentence.is_some(), byte.is_some()), "{answer}");
    (sentence, answer)
}

/// A scene and its holder, kept for as long as attempts leave both as they were.
struct Stage<'a> {
    template: &'a Template,
    holder: &'a Holder,
    /// The holder goes before its images.
    now: Option<(Option<Running>, Images)>,
}

impl<'a> Stage<'a> {
    fn of(template: &'a Template, holder: &'a Holder) -> Self {
        Self { template, holder, now: None }
    }

    fn scene(&mut self) -> &Images {
        let (template, holder) = (self.template, self.holder);
        let (_, scene) = self.now.get_or_insert_with(|| {
            let scene = template.scene();
            (holder.start(&scene), scene)
        });
        scene
    }

    /// After an attempt that may have changed something, all is made anew.
    fn used(&mut self, told: Option<&String>, operation: &Operation, family: Family) {
        let destroys = operation.recipe(family).unwrap().destroys_after_step.is_some();
        if told.is_none() || destroys {
            self.now = None;
        }
    }
}

/// Compares prediction and truth for each program; how many pairs that were.
fn compare(template: &Template, holder: &Holder, family: Family) -> usize {
    let mut differences = Vec::new();
    let operations = operations(family);
    let mut stage = Stage::of(template, holder);
    for operation in &operations {
        let scene = stage.scene();
        let (predicted, answer) = predict(scene, operation, family);
        if predicted.is_some() {
            let on = Path::new(answer["on_image"].as_str().unwrap()).canonicalize().unwrap();
            let expected = scene.path(holder.image).canonicalize().unwrap();
            assert_eq!(on, expected, "the file that refuses is named: {answer}");
            assert!(answer["holders"].as_array().is_some_and(|h| !h.is_empty()), "the holder is named: {answer}");
        }
        let told = attempt(scene, operation, family);
        if predicted != told {
            let name = (holder.name, operation.name);
            differences.push(format!("{name:?}: predicted {predicted:?}, told {told:?}: {answer}"));
        }
        stage.used(told.as_ref(), operation, family);
    }
    assert!(differences.is_empty(), "{differences:#?}");
    operations.len()
}

/// Several at a time: most of the time goes into programs that start.
fn compare_all(base: &str, holders: &[Holder], family: Family, at_least: usize) {
    if !have(&TOOLS) {
        return;
    }
    let template = Template::on(base);
    let next = std::sync::atomic::AtomicUsize::new(0);
    let pairs = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(holder) = holders.get(next.fetch_add(1, std::sync::atomic::Ordering::SeqCst)) {
                    let done = compare(&template, holder, family);
                    pairs.fetch_add(done, std::sync::atomic::Ordering::SeqCst);
                }
            });
        }
    });
    let pairs = pairs.into_inner();
    println!("{pairs} pairs of {} holders", holders.len());
    assert!(pairs >= at_least, "{pairs}");
}

#[test]
fn why_says_what_raw_programs_are_told() {
    compare_all("base.qcow2", &RAW, Family::Raw, 17 * 20);
}

#[test]
fn why_says_what_qcow2_programs_are_told() {
    compare_all("base.qcow2", &QCOW2, Family::Qcow2, 17 * 20);
}

#[test]
fn why_names_the_backing_file_that_refuses_a_program() {
    compare_all("base.qcow2", &QCOW2_BASE, Family::Qcow2, 4 * 20);
}

#[test]
fn why_knows_that_a_raw_backing_file_is_locked_otherwise() {
    compare_all("base.raw", &RAW_BASE, Family::Qcow2, 4 * 20);
}

/// `hold --as OPERATION`, and the accesses that it says it holds.
fn hold(scene: &Images, operation: &str, family: Family) -> Running {
    let image = scene.path(image_of(family));
    let mut command = qlock_top();
    command.arg("hold").arg(&image).args(["--as", operation]).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut running = Running::spawn(&mut command);
    let mut line = String::new();
    BufReader::new(running.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let held = locked(&image);
    assert!(line.starts_with(&format!("holding {held} on ")), "{line}");
    running
}

/// The real holder, and the operation of `hold` that stands for it.
const STAND_INS_RAW: [(&str, &str); 8] = [
    ("io", "io"),
    ("io -r", "io-read-only"),
    ("nbd", "nbd"),
    ("nbd -r", "nbd-read-only"),
    ("vm", "vm"),
    ("vm readonly", "vm-read-only"),
    ("vm share-rw", "vm-share-rw"),
    ("vm nvme", "vm-nvme"),
];
const STAND_INS_QCOW2: [(&str, &str); 7] = [
    ("io", "io"),
    ("io -r", "io-read-only"),
    ("io -r -U", "io-force-share"),
    ("io as raw", "io-as-raw"),
    ("nbd", "nbd"),
    ("vm", "vm"),
    ("vm readonly", "vm-read-only"),
];

/// What each program is told beside `hold`, and beside the real holder.
fn stands_in(holders: &[Holder], stand_ins: &[(&str, &str)], family: Family) {
    if !have(&TOOLS) {
        return;
    }
    let template = Template::on("base.qcow2");
    let mut differences = Vec::new();
    for (real, stand_in) in stand_ins {
        let holder = holders.iter().find(|h| h.name == *real).unwrap();
        let (mut real_stage, mut our_scene) = (Stage::of(&template, holder), None::<(Running, Images)>);
        for operation in operations(family) {
            let scene = real_stage.scene();
            let beside_real = attempt(scene, operation, family);
            real_stage.used(beside_real.as_ref(), operation, family);
            let (_held, scene) = our_scene.get_or_insert_with(|| {
                let scene = template.scene();
                (hold(&scene, stand_in, family), scene)
            });
            let expected: Access = holder.shows.parse().unwrap();
            assert_eq!(locked(&scene.path(image_of(family))), expected, "hold --as {stand_in}");
            let beside_ours = attempt(scene, operation, family);
            if beside_ours.is_none() || operation.recipe(family).unwrap().destroys_after_step.is_some() {
                our_scene = None;
            }
            if beside_real != beside_ours {
                let name = (*stand_in, operation.name);
                differences.push(format!("{name:?}: beside the real {beside_real:?}, beside hold {beside_ours:?}"));
            }
        }
    }
    assert!(differences.is_empty(), "{differences:#?}");
}

#[test]
fn raw_programs_are_told_the_same_beside_hold_as_beside_the_real_holder() {
    stands_in(&RAW, &STAND_INS_RAW, Family::Raw);
}

#[test]
fn qcow2_programs_are_told_the_same_beside_hold_as_beside_the_real_holder() {
    stands_in(&QCOW2, &STAND_INS_QCOW2, Family::Qcow2);
}

#[test]
fn a_hold_that_the_backing_file_refuses_names_that_file_and_its_holder() {
    if !have(&TOOLS) {
        return;
    }
    let scene = Template::on("base.qcow2").scene();
    let base: PathBuf = scene.path("base.qcow2");
    let holder = holding(&mut qemu_io(&["-f", "qcow2"], &base), &base, "cwr/wr");
    let refused = output(qlock_top().arg("hold").arg(scene.path("a.qcow2")).args(["--as", "vm"]));
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(said.contains("base.qcow2: Failed to get"), "{said}");
    assert!(said.contains(&format!("qemu-io {}", holder.pid())), "{said}");
    assert_eq!(locked(&scene.path("a.qcow2")), Access::NONE, "nothing stays on the image either");
}

#[test]
fn hold_keeps_below_the_image_what_the_real_holder_keeps_there() {
    if !have(&TOOLS) {
        return;
    }
    for base in ["base.raw", "base.qcow2"] {
        let template = Template::on(base);
        for (real, stand_in) in STAND_INS_QCOW2 {
            let scene = template.scene();
            let ours = {
                let _held = hold(&scene, stand_in, Family::Qcow2);
                locked(&scene.path(base))
            };
            assert_eq!(ours == Access::NONE, stand_in.ends_with("as-raw"));
            // The image shows its last state before the files below it do.
            let _running = QCOW2.iter().find(|h| h.name == real).unwrap().start(&scene);
            let same = || (locked(&scene.path(base)) == ours).then_some(());
            wait_for(&format!("{real} to hold {ours} on {base}, as hold --as {stand_in} does"), same);
        }
    }
}

/// What `why IMAGE --as io` says, and what qemu-io is then told, with the image that it names.
fn asked_and_told(image: &Path) -> (i32, Option<String>, Option<String>) {
    let asked = output(qlock_top().arg("why").arg(image).args(["--as", "io", "--format", "json"]));
    let answer: Value = serde_json::from_slice(&asked.stdout).unwrap();
    let predicted = answer["message"].as_str().map(|m| format!("{m} {}", answer["on_image"].as_str().unwrap()));
    let told = output(qemu_io(&["-f", "qcow2", "-c", "read 0 512"], image).stdin(Stdio::null()));
    let message = Message::find(&String::from_utf8_lossy(&told.stderr));
    (asked.status.code().unwrap(), predicted, message.map(|m| format!("{} {}", m.sentence, m.image.unwrap())))
}

#[test]
fn a_backing_file_is_looked_for_beside_the_name_that_was_used_and_not_beside_what_a_link_leads_to() {
    if !have(&TOOLS) {
        return;
    }
    let images = Images::new();
    for directory in ["A", "B"] {
        std::fs::create_dir(images.path(directory)).unwrap();
        images.qcow2(&format!("{directory}/base.qcow2"));
    }
    let top = images.path("B/top.qcow2");
    let create = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2"];
    run(Command::new("qemu-img").args(create).arg(&top));
    let link = images.path("A/link.qcow2");
    std::os::unix::fs::symlink("../B/top.qcow2", &link).unwrap();
    for (held, refused) in [("A", &link), ("B", &top)] {
        let base = images.path(held).join("base.qcow2");
        let _holder = holding(&mut qemu_io(&["-f", "qcow2"], &base), &base, "cwr/wr");
        for image in [&link, &top] {
            let (status, predicted, told) = asked_and_told(image);
            assert_eq!(predicted, told, "{} while {held} is held", image.display());
            assert_eq!(status, i32::from(image == refused));
        }
    }
}

#[test]
fn a_data_file_below_the_image_is_not_looked_at_and_so_cannot_be_told() {
    if !have(&TOOLS) {
        return;
    }
    let images = Images::new();
    let base = images.path("base.qcow2");
    let data = format!("data_file={}", images.path("data.raw").display());
    run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", "-o", &data]).arg(&base).arg("16M"));
    let top = images.overlay("top.qcow2", "base.qcow2");
    for words in [&["why"], &["hold"]] {
        let asked = output(qlock_top().args(words).arg(&top).args(["--as", "io"]));
        let said = String::from_utf8([asked.stdout, asked.stderr].concat()).unwrap();
        assert!(asked.status.code() == Some(3) && said.contains("keeps its data in another file"), "{said}");
    }
    assert_eq!(locked(&top), Access::NONE);
}

#[test]
fn a_loop_device_counts_as_use() {
    if !have(&["losetup"]) || !support::am_root() {
        return;
    }
    /// Detached when the test is over.
    struct Loop(String);
    impl Drop for Loop {
        fn drop(&mut self) {
            let _ = Command::new("losetup").args(["-d", &self.0]).status();
        }
    }
    let images = Images::new();
    let path = images.raw("a.raw");
    let _device = Loop(run(Command::new("losetup").args(["-f", "--show"]).arg(&path)).trim().to_owned());
    let asked = output(qlock_top().arg("why").arg(&path).args(["--as", "create"]));
    let said = String::from_utf8(asked.stdout).unwrap();
    assert!(said.contains("DANGER: create IS GRANTED AND OVERWRITES"), "{said}");
}
