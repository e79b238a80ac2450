//! Is whoever has an image open without a lock listed, with what it may do, and is it told how dangerous that is?
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/everyone.rs"]
mod everyone;
#[path = "support/places.rs"]
mod places;
#[path = "support/stream.rs"]
mod stream;
mod support;

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use everyone::{list, list_of};
use places::{Disk, LoopDevice, Mounted, ready};
use serde_json::{Value, json};
use stream::Watch;
use support::{
    DEADLINE, Images, Running, am_root, bytes_of, have, holding, image, locked, python, qemu_io, run, wait_for,
};

/// A VM that never runs, with options.
fn paused_vm(name: &str, options: &[&str]) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-accel", "tcg", "-S", "-display", "none", "-nodefaults", "-m", "64", "-monitor", "none"]);
    command.args(["-serial", "none", "-name"]).arg(format!("guest={name},debug-threads=on")).args(options);
    command
}

/// Starts a program and waits until it has `path` open; it gets an input that does not end.
fn opening(command: &mut Command, path: &Path) -> Running {
    let running = Running::spawn(command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()));
    let fds = format!("/proc/{}/fd", running.pid());
    let path = path.canonicalize().unwrap();
    wait_for(&format!("{command:?} to open {}", path.display()), || {
        let mut links = fs::read_dir(&fds).ok()?.flatten().map(|fd| fs::read_link(fd.path()));
        links.any(|link| link.is_ok_and(|l| l == path)).then_some(())
    });
    running
}

/// Writes what it reads into the image, and reads slowly.
fn dd_onto(path: &Path) -> Running {
    let mut command = Command::new("dd");
    opening(command.args(["bs=1", "conv=notrunc", "status=none"]).arg(format!("of={}", path.display())), path)
}

/// Reads the image, and writes what it has read to where nobody takes it.
fn cp_from(path: &Path, images: &Images) -> Running {
    let fifo = images.dir().with_extension("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let reading = opening(Command::new("cp").arg(path).arg(&fifo), path);
    fs::remove_file(&fifo).unwrap();
    reading
}

/// What is shown of `path` once it has as many openers; a program may still be opening.
fn seen(path: &Path, openers: usize) -> Value {
    wait_for("the openers", || {
        let (snapshot, _) = list(path);
        let seen = image(&snapshot, path).clone();
        (seen["openers"].as_array().unwrap().len() == openers).then_some(seen)
    })
}

/// Who has it open without a lock: pid, command, VM, mode; in the order of pids.
fn openers(seen: &Value) -> Vec<(i64, &str, Option<&str>, &str)> {
    let openers = seen["openers"].as_array().unwrap().iter();
    openers
        .map(|o| {
            let text = |field: &str| o[field].as_str();
            (o["pid"].as_i64().unwrap(), text("command").unwrap(), text("vm"), text("mode").unwrap())
        })
        .collect()
}

/// The findings of this code: severity and text.
fn findings<'a>(seen: &'a Value, code: &str) -> Vec<(&'a str, &'a str)> {
    let all = seen["findings"].as_array().unwrap().iter().filter(|f| f["code"] == code);
    all.map(|f| (f["severity"].as_str().unwrap(), f["text"].as_str().unwrap())).collect()
}

/// The severity of the only `unlocked-writer`, which names `who`.
fn severity<'a>(seen: &'a Value, who: &Running) -> &'a str {
    let told = findings(seen, "unlocked-writer");
    assert!(told.len() == 1 && told[0].1.contains(&format!(" {}", who.pid())), "{seen:#}");
    told[0].0
}

#[test]
fn a_vm_with_locking_off_is_an_opener_that_writes_or_reads() {
    if !have(&["qemu-system-x86_64", "qemu-img"]) {
        return;
    }
    let images = Images::new();
    let (raw, qcow2) = (images.raw("a.raw"), images.qcow2("a.qcow2"));
    for (path, format) in [(&raw, "raw"), (&qcow2, "qcow2")] {
        for (read_only, mode) in [("off", "write"), ("on", "read")] {
            let drive =
                format!("if=virtio,file={},format={format},file.locking=off,readonly={read_only}", path.display());
            let vm = opening(&mut paused_vm("unsafe", &["-drive", &drive]), path);
            let shown = wait_for("its one descriptor", || {
                let shown = seen(path, 1);
                (openers(&shown)[0].3 == mode).then_some(shown)
            });
            let expected = (i64::from(vm.pid()), "qemu-system-x86", Some("unsafe"), mode);
            assert_eq!(openers(&shown), [expected], "{shown:#}");
            assert_eq!((shown["verdict"].as_str(), bytes_of(&shown).as_str()), (Some("free"), "-/-"));
            assert_eq!(shown["holders"], json!([]));
            if mode == "write" {
                assert_eq!(severity(&shown, &vm), "warning", "alone");
            } else {
                assert_eq!(shown["findings"], json!([]));
            }
            assert_eq!(list(path).1, 0, "no lock is held");
        }
    }
}

#[test]
fn a_vm_that_waits_for_its_migration_is_an_opener_that_reads() {
    if !have(&["qemu-system-x86_64", "qemu-img"]) {
        return;
    }
    let images = Images::new();
    let path = images.qcow2("a.qcow2");
    let drive = format!("if=virtio,format=qcow2,file={}", path.display());
    let vm = opening(&mut paused_vm("guest", &["-incoming", "defer", "-drive", &drive]), &path);
    let shown = seen(&path, 1);
    assert_eq!(openers(&shown), [(i64::from(vm.pid()), "qemu-system-x86", Some("guest"), "read")], "{shown:#}");
    assert_eq!(findings(&shown, "unlocked-writer"), [], "it opens for writing when it takes over");
    assert_eq!((shown["verdict"].as_str(), bytes_of(&shown).as_str()), (Some("free"), "-/-"), "{shown:#}");
    // The source of the migration still writes, as it should.
    let source = holding(&mut qemu_io(&["-f", "qcow2"], &path), &path, "cwr/wr");
    let shown = seen(&path, 1);
    assert_eq!(
        (shown["verdict"].as_str(), shown["holders"][0]["pid"].as_i64()),
        (Some("held"), Some(source.pid().into()))
    );
    assert_eq!(openers(&shown)[0].0, i64::from(vm.pid()));
}

#[test]
fn dd_onto_an_image_is_a_warning_alone_and_a_danger_beside_anybody() {
    if !have(&["dd", "qemu-io", "cp"]) {
        return;
    }
    let images = Images::new();
    let path = images.raw("a.raw");
    let dd = dd_onto(&path);
    let shown = seen(&path, 1);
    assert_eq!(openers(&shown), [(i64::from(dd.pid()), "dd", None, "write")]);
    assert_eq!(severity(&shown, &dd), "warning");

    for (options, access) in [(&["-f", "raw"][..], "cw/-"), (&["-r", "-f", "raw"], "c/-")] {
        let holder = holding(&mut qemu_io(options, &path), &path, access);
        let shown = seen(&path, 1);
        assert_eq!(severity(&shown, &dd), "danger", "beside {options:?}: {shown:#}");
        assert_eq!(shown["findings"][0]["code"], "unlocked-writer", "said first");
        assert_eq!(openers(&shown)[0].0, i64::from(dd.pid()), "who holds locks is no opener");
        assert_eq!((shown["verdict"].as_str(), bytes_of(&shown).as_str()), (Some("held"), access));
        holder.end();
    }
    let cp = cp_from(&path, &images);
    let shown = seen(&path, 2);
    assert_eq!(severity(&shown, &dd), "danger", "beside a reader without a lock");
    cp.end();
    let second = dd_onto(&path);
    let shown = seen(&path, 2);
    let told = findings(&shown, "unlocked-writer");
    assert!(told.len() == 2 && told.iter().all(|(severity, _)| *severity == "danger"), "{shown:#}");
    second.end();
    assert_eq!(severity(&seen(&path, 1), &dd), "warning", "alone again");
}

#[test]
fn a_writer_without_a_lock_beside_a_lock_whose_owner_cannot_be_named_is_a_danger() {
    if !am_root() || !have(&["dd", "python3"]) {
        return;
    }
    let images = Images::new();
    let path = images.raw("a.raw");
    let script = "
import array, fcntl, os, socket, struct, sys
fd = os.open(sys.argv[1], os.O_RDWR)
fcntl.fcntl(fd, 37, struct.pack('hhqqi', fcntl.F_RDLCK, 0, 100, 2, 0))  # F_OFD_SETLK
ours, theirs = socket.socketpair()
ours.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [fd]))])
os.close(fd)
print(flush=True)
sys.stdin.read()
";
    let (_sender, _) = ready(&mut python(script, &[&path]));
    let dd = dd_onto(&path);
    let shown = seen(&path, 1);
    assert_eq!((shown["verdict"].as_str(), bytes_of(&shown).as_str()), (Some("held-by-kernel"), "cw/-"), "{shown:#}");
    assert_eq!(severity(&shown, &dd), "danger", "somebody uses it: {shown:#}");
}

#[test]
fn cp_from_an_image_is_an_opener_that_reads() {
    if !have(&["cp", "qemu-io"]) {
        return;
    }
    let images = Images::new();
    let path = images.raw("a.raw");
    let cp = cp_from(&path, &images);
    let shown = seen(&path, 1);
    assert_eq!(openers(&shown), [(i64::from(cp.pid()), "cp", None, "read")]);
    assert_eq!(shown["findings"], json!([]), "it does no harm");
    assert_eq!((shown["verdict"].as_str(), list(&path).1), (Some("free"), 0));
    let _holder = holding(&mut qemu_io(&["-f", "raw"], &path), &path, "cw/-");
    let shown = seen(&path, 1);
    assert_eq!(openers(&shown), [(i64::from(cp.pid()), "cp", None, "read")]);
    assert_eq!(findings(&shown, "unlocked-writer"), []);
}

#[test]
fn two_descriptors_of_one_writer_are_one_user_and_its_own_lock_makes_it_a_holder() {
    if !have(&["python3"]) {
        return;
    }
    let images = Images::new();
    let path = images.raw("a.raw");
    let script = "import os, sys; a = os.open(sys.argv[1], os.O_RDWR); b = os.open(sys.argv[1], os.O_WRONLY); \
                  c = os.open(sys.argv[1], os.O_RDONLY); d = os.open(sys.argv[1], os.O_PATH); \
                  print(flush=True); sys.stdin.read()";
    let (writer, _) = ready(&mut python(script, &[&path]));
    let shown = seen(&path, 3);
    let modes: Vec<_> = openers(&shown).iter().map(|o| (o.0, o.3)).collect();
    let pid = i64::from(writer.pid());
    assert_eq!(modes, [(pid, "write"), (pid, "write"), (pid, "read")], "O_PATH can neither read nor write");
    assert!(findings(&shown, "unlocked-writer").iter().all(|(severity, _)| *severity == "warning"), "{shown:#}");
    writer.end();
    let script = "import fcntl, os, struct, sys; a = os.open(sys.argv[1], os.O_RDWR); b = os.open(sys.argv[1], os.O_RDWR); \
                  fcntl.fcntl(a, 37, struct.pack('hhqqi', fcntl.F_RDLCK, 0, 100, 2, 0)); print(flush=True); \
                  sys.stdin.read()";
    let (_holder, _) = ready(&mut python(script, &[&path]));
    let shown = seen(&path, 0);
    assert_eq!((shown["verdict"].as_str(), findings(&shown, "unlocked-writer").len()), (Some("held"), 0));
}

#[test]
fn a_loop_device_on_an_image_that_nobody_locks_is_told() {
    if !am_root() || !have(&["losetup", "dd", "qemu-io"]) {
        return;
    }
    let images = Images::new();
    let (path, other) = (images.raw("a.raw"), images.raw("b.raw"));
    let device = LoopDevice::on(&path);
    let (snapshot, code) = list(images.dir());
    assert_eq!(code, 0);
    let shown = image(&snapshot, &path);
    let told = findings(shown, "loop-device");
    assert!(told.len() == 1 && told[0].1.contains(&format!("loop device {} stands on it", device.name())), "{told:?}");
    assert_eq!(shown["verdict"], "free");
    assert_eq!(findings(image(&snapshot, &other), "loop-device"), []);

    // It writes and asks no lock: beside somebody who does, that is a danger.
    let holder = holding(&mut qemu_io(&["-f", "raw"], &path), &path, "cw/-");
    let shown = seen(&path, 0);
    assert_eq!((findings(&shown, "loop-device")[0].0, shown["verdict"].as_str()), ("danger", Some("held")));
    holder.end();
    drop(device);
    wait_for("the device to go", || findings(&seen(&path, 0), "loop-device").is_empty().then_some(()));
}

#[test]
fn a_writer_without_a_lock_beside_a_loop_device_is_a_danger() {
    if !am_root() || !have(&["losetup", "dd"]) {
        return;
    }
    let images = Images::new();
    let path = images.raw("a.raw");
    let _device = LoopDevice::on(&path);
    let dd = dd_onto(&path);
    assert_eq!(severity(&seen(&path, 1), &dd), "danger", "the loop device uses it, too");
}

#[test]
fn a_mounted_loop_device_names_where() {
    if !am_root() || !have(&["losetup", "mount", "mkfs.ext4", "qemu-io"]) {
        return;
    }
    let images = Images::new();
    let disk = Disk::new(&images, "guest", "ext4", 16 << 20);
    let path = images.path("guest.disk");
    let point = disk.mounted.0.clone();
    let shown = seen(&path, 0);
    let told = findings(&shown, "loop-device");
    let words = format!("loop device {}, mounted on {}", disk.device.name(), point.display());
    assert!(told.len() == 1 && told[0].1.contains(&words), "{told:?}");
    let holder = holding(&mut qemu_io(&["-f", "raw"], &path), &path, "cw/-");
    let shown = seen(&path, 0);
    assert_eq!(findings(&shown, "loop-device")[0].0, "danger");
    holder.end();
    // A file in it that is an image, too.
    let within = disk.mounted.raw("within.raw");
    let holder = holding(&mut qemu_io(&["-f", "raw"], &within), &within, "cw/-");
    let (snapshot, _) = list_of(&[&path, &within]);
    let shown = image(&snapshot, &within);
    assert_eq!(
        (shown["verdict"].as_str(), shown["holders"][0]["pid"].as_i64()),
        (Some("held"), Some(holder.pid().into()))
    );
    assert_eq!(image(&snapshot, &path)["verdict"], "free");
}

#[test]
fn a_mounted_partition_of_an_image_names_where() {
    if !am_root() || !have(&["losetup", "mount", "mkfs.ext4", "addpart"]) {
        return;
    }
    let images = Images::new();
    let path = images.path("whole.disk");
    File::create(&path).unwrap().set_len(32 << 20).unwrap();
    let device = LoopDevice::on(&path);
    // From sector 2048 to the end, as a partition table would have it; not every kernel reads one.
    run(Command::new("addpart").arg(device.path()).args(["1", "2048", "63488"]));
    struct Partition<'a>(&'a Path);
    impl Drop for Partition<'_> {
        fn drop(&mut self) {
            // Whoever was started with a copy of the mounts keeps it busy until it ends.
            let gone = || Command::new("delpart").arg(self.0).arg("1").output().is_ok_and(|o| o.status.success());
            let deadline = Instant::now() + DEADLINE;
            while !gone() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
    let _partition = Partition(device.path());
    let partition = format!("{}p1", device.path().display());
    run(Command::new("mkfs.ext4").arg("-q").arg(&partition));
    let mounted = Mounted::new(&["-t", "ext4", &partition], images.path("guest"));
    let shown = seen(&path, 0);
    let told = findings(&shown, "loop-device");
    assert!(told.len() == 1 && told[0].1.contains(device.name()), "{told:?}");
    assert!(told[0].1.contains(mounted.dir().to_str().unwrap()), "{told:?}");
}

#[test]
fn a_block_device_that_is_mounted_names_where() {
    if !am_root() || !have(&["losetup", "mount", "mkfs.ext4"]) {
        return;
    }
    let images = Images::new();
    let disk = Disk::new(&images, "guest", "ext4", 16 << 20);
    let point = disk.mounted.0.clone();
    let shown = seen(disk.device.path(), 0);
    let told = shown["findings"].as_array().unwrap();
    assert!(told.iter().any(|f| f["text"].as_str().unwrap().contains(point.to_str().unwrap())), "{shown:#}");
}

#[test]
fn an_opener_is_told_as_it_comes_and_goes() {
    if !have(&["dd"]) {
        return;
    }
    let images = Images::new();
    let path = images.raw("a.raw");
    let watch = Watch::start(&[images.dir()], "1h");
    for _ in 0..3 {
        let dd = dd_onto(&path);
        let named = |kind: &'static str, pid: i32| {
            move |e: &Value| e["kind"] == kind && e["text"].as_str().unwrap().starts_with(&format!("dd {pid} "))
        };
        let told = watch.event("the writer", named("finding", dd.pid()));
        assert_eq!(told["image"], path.to_str().unwrap());
        let pid = dd.pid();
        dd.end();
        watch.event("its end", named("finding-cleared", pid));
    }
    assert!(locked(&path).is_empty());
}
