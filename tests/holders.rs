//! Does `list` name each real holder, its descriptor and its bytes?
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::path::Path;
use std::process::Command;

use serde_json::Value;
use support::{
    Images, Running, access_of, am_root, bytes_of, have, holding, image, list, locked, python, qemu_io, tell, wait_for,
};

/// Checks that `path` is held by exactly these processes, each with this access through a descriptor of its own.
fn assert_held(path: &Path, holders: &[(&Running, &str)], bytes: &str) -> Value {
    // Some go over to another descriptor after their first lock: for a moment the same bytes are held on two.
    let (image, code) = wait_for("as many descriptors with locks as holders", || {
        let (snapshot, code) = list(path);
        let image = image(&snapshot, path).clone();
        (image["holders"].as_array().unwrap().len() == holders.len()).then_some((image, code))
    });
    assert_eq!(code, 1, "held");
    assert_eq!(image["verdict"], "held", "{image:#}");
    assert_eq!(bytes_of(&image), bytes);
    let named = image["holders"].as_array().unwrap();
    let mut found: Vec<(i64, String)> = named.iter().map(|h| (h["pid"].as_i64().unwrap(), access_of(h))).collect();
    found.sort();
    let mut expected: Vec<(i64, String)> =
        holders.iter().map(|(r, access)| (i64::from(r.pid()), (*access).to_owned())).collect();
    expected.sort();
    assert_eq!(found, expected, "{image:#}");
    for holder in named {
        let link = format!("/proc/{}/fd/{}", holder["pid"], holder["fd"]);
        assert_eq!(std::fs::read_link(&link).unwrap(), path, "{link}");
        assert!(holder["foreign"].is_null());
    }
    // Each held byte points at who holds it, and at nobody else.
    for byte in image["bytes"].as_array().unwrap() {
        let (field, name) =
            (if byte["side"] == "permission" { "permissions" } else { "unshared" }, &byte["permission"]);
        let by: Vec<usize> = (0..named.len()).filter(|i| named[*i][field].as_array().unwrap().contains(name)).collect();
        assert_eq!(byte["holders"], serde_json::json!(by), "{byte}");
        assert_eq!(byte["state"], if by.is_empty() { "free" } else { "held" });
    }
    image
}

#[test]
fn qemu_io_on_qcow2_and_raw_read_write_and_read_only() {
    if !have(&["qemu-io", "qemu-img"]) {
        return;
    }
    let images = Images::new();
    let (qcow2, raw) = (images.qcow2("a.qcow2"), images.raw("b.raw"));
    for (options, path, access) in [
        (&["-f", "qcow2"][..], &qcow2, "cwr/wr"),
        (&["-r", "-f", "qcow2"], &qcow2, "c/wr"),
        (&["-r", "-U", "-f", "qcow2"], &qcow2, "c/-"),
        (&["-f", "raw"], &raw, "cw/-"),
        (&["-r", "-f", "raw"], &raw, "c/-"),
    ] {
        let holder = holding(&mut qemu_io(options, path), path, access);
        let image = assert_held(path, &[(&holder, access)], access);
        let named = &image["holders"][0];
        assert_eq!((named["command"].as_str(), named["lock"].as_str()), (Some("qemu-io"), Some("ofd")));
        drop(holder);
        let (snapshot, code) = list(path);
        assert_eq!((code, support::image(&snapshot, path)["verdict"].as_str()), (0, Some("free")));
    }
}

#[test]
fn the_first_example_by_its_names() {
    if !have(&["qemu-io", "qemu-img"]) {
        return;
    }
    let images = Images::new();
    let path = images.qcow2("a.qcow2");
    let holder = holding(&mut qemu_io(&["-f", "qcow2"], &path), &path, "cwr/wr");
    let image = assert_held(&path, &[(&holder, "cwr/wr")], "cwr/wr");
    assert_eq!(image["holders"][0]["permissions"], serde_json::json!(["consistent-read", "write", "resize"]));
    assert_eq!(image["holders"][0]["unshared"], serde_json::json!(["write", "resize"]));
    assert_eq!((image["format"].as_str(), image["virtual_size"].as_u64()), (Some("qcow2"), Some(16 << 20)));
}

#[test]
fn qemu_nbd_exports() {
    if !have(&["qemu-nbd", "qemu-img"]) {
        return;
    }
    let images = Images::new();
    let (qcow2, raw) = (images.qcow2("a.qcow2"), images.raw("b.raw"));
    for (options, path, access) in [
        (&["-f", "raw"][..], &raw, "cw/r"),
        (&["-r", "-f", "raw"], &raw, "c/r"),
        (&["-f", "qcow2"], &qcow2, "cwr/wr"),
        (&["-r", "-f", "qcow2"], &qcow2, "c/wr"),
    ] {
        let mut command = Command::new("qemu-nbd");
        command.args(["-t", "-k"]).arg(images.path("nbd.sock")).args(options).arg(path);
        let holder = holding(&mut command, path, access);
        assert_held(path, &[(&holder, access)], access);
    }
}

#[test]
fn qemu_storage_daemon() {
    if !have(&["qemu-storage-daemon", "qemu-img"]) {
        return;
    }
    let images = Images::new();
    let path = images.qcow2("a.qcow2");
    for (read_only, access) in [("off", "cwr/wr"), ("on", "c/wr")] {
        let mut command = Command::new("qemu-storage-daemon");
        let file = format!("driver=file,node-name=f,filename={},read-only={read_only}", path.display());
        command.args(["--blockdev", &file, "--blockdev"]);
        command.arg(format!("driver=qcow2,node-name=q,file=f,read-only={read_only}"));
        let holder = holding(&mut command, &path, access);
        let image = assert_held(&path, &[(&holder, access)], access);
        assert_eq!(image["holders"][0]["command"], "qemu-storage-da");
    }
}

/// A VM that never runs: no KVM, no display, stopped before its first instruction.
fn paused_vm(name: &str) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-accel", "tcg", "-S", "-display", "none", "-nodefaults", "-m", "64", "-monitor", "none"]);
    command.args(["-serial", "none", "-name"]).arg(format!("guest={name},debug-threads=on"));
    command
}

#[test]
fn paused_vms_of_every_kind() {
    if !have(&["qemu-system-x86_64", "qemu-img"]) {
        return;
    }
    let images = Images::new();
    let (qcow2, raw) = (images.qcow2("a.qcow2"), images.raw("b.raw"));
    for (drive, device, path, access) in [
        ("if=virtio,format=raw", "", &raw, "cw/w"),
        ("if=virtio,format=raw,readonly=on", "", &raw, "c/w"),
        ("if=none,id=d,format=raw", "virtio-blk-pci,drive=d,share-rw=on", &raw, "cw/-"),
        ("if=virtio,format=raw,snapshot=on", "", &raw, "c/wr"),
        ("if=virtio,format=qcow2", "", &qcow2, "cwr/wr"),
        ("if=virtio,format=qcow2,readonly=on", "", &qcow2, "c/wr"),
        ("if=none,id=d,format=qcow2", "virtio-blk-pci,drive=d,share-rw=on", &qcow2, "cwr/wr"),
        ("if=virtio,format=qcow2,snapshot=on", "", &qcow2, "c/wr"),
    ] {
        let mut command = paused_vm("web01");
        command.arg("-drive").arg(format!("file={},{drive}", path.display()));
        if !device.is_empty() {
            command.args(["-device", device]);
        }
        let holder = holding(&mut command, path, access);
        // QEMU goes over from one descriptor to another while it starts: the same bytes are held on two for a moment.
        let image = wait_for("one descriptor with the locks", || {
            let (snapshot, _) = list(path);
            let image = image(&snapshot, path).clone();
            (image["holders"].as_array().unwrap().len() == 1 && bytes_of(&image) == access).then_some(image)
        });
        assert_eq!(image["holders"][0]["vm"], "web01", "{image:#}");
        assert_held(path, &[(&holder, access)], access);
    }
}

#[test]
fn a_vm_on_an_overlay_holds_the_backing_file_too() {
    if !have(&["qemu-system-x86_64", "qemu-img"]) {
        return;
    }
    let images = Images::new();
    let base = images.qcow2("base.qcow2");
    let overlay = images.overlay("over.qcow2", "base.qcow2");
    let mut command = paused_vm("web02");
    command.arg("-drive").arg(format!("file={},if=virtio,format=qcow2", overlay.display()));
    let vm = holding(&mut command, &overlay, "cwr/wr");
    wait_for("the backing file's locks", || (locked(&base).to_string() == "c/wr").then_some(()));
    assert_held(&base, &[(&vm, "c/wr")], "c/wr");
    let image = wait_for("one descriptor on the overlay", || {
        let (snapshot, _) = list(images.dir());
        let image = image(&snapshot, &overlay).clone();
        (image["holders"].as_array().unwrap().len() == 1).then_some(image)
    });
    assert_eq!(image["backing_file"], "base.qcow2");
    assert_held(&overlay, &[(&vm, "cwr/wr")], "cwr/wr");
}

#[test]
fn two_readers_at_once_are_both_named() {
    if !have(&["qemu-io", "qemu-img"]) {
        return;
    }
    let images = Images::new();
    let path = images.qcow2("a.qcow2");
    let mut reader = qemu_io(&["-r", "-f", "qcow2"], &path);
    let first = holding(&mut reader, &path, "c/wr");
    let second = holding(&mut reader, &path, "c/wr");
    wait_for("the second reader's locks", || {
        let (snapshot, _) = list(&path);
        (image(&snapshot, &path)["holders"].as_array()?.len() == 2).then_some(())
    });
    assert_held(&path, &[(&first, "c/wr"), (&second, "c/wr")], "c/wr");
    first.end();
    assert_held(&path, &[(&second, "c/wr")], "c/wr");
}

const FORK: &str = r"
import fcntl, os, struct, sys
fd = os.open(sys.argv[1], os.O_RDWR)
lock = struct.pack('hhqqi', fcntl.F_RDLCK, 0, 100, 2, 0)
fcntl.fcntl(fd, 37, lock)  # F_OFD_SETLK
child = os.fork()
if child == 0:
    os.read(0, 1)
    os._exit(0)
open(sys.argv[2], 'w').write(str(child))
os.waitpid(child, 0)
";

#[test]
fn a_forked_co_holder_is_named_beside_its_parent() {
    if !have(&["python3"]) {
        return;
    }
    let images = Images::new();
    let path = images.raw("b.raw");
    let told = tempfile::NamedTempFile::new().unwrap();
    let mut parent = holding(&mut python(FORK, &[&path, told.path()]), &path, "cw/-");
    let child: i64 = wait_for("the child's pid", || std::fs::read_to_string(told.path()).ok()?.parse().ok());
    let (snapshot, code) = list(&path);
    assert_eq!(code, 1);
    let image = image(&snapshot, &path);
    let holders = image["holders"].as_array().unwrap();
    let mut pids: Vec<i64> = holders.iter().map(|h| h["pid"].as_i64().unwrap()).collect();
    pids.sort_unstable();
    let mut expected = vec![i64::from(parent.pid()), child];
    expected.sort_unstable();
    assert_eq!(pids, expected, "{image:#}");
    assert!(holders.iter().all(|h| access_of(h) == "cw/-"));
    assert_eq!(image["verdict"], "held");
    tell(&mut parent, "x");
}

const POSIX: &str = r"
import fcntl, sys
f = open(sys.argv[1], 'r+b')
fcntl.lockf(f, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, 100)
second = open(sys.argv[1], 'rb')
sys.stdin.read()
";

#[test]
fn a_posix_locker_is_named_once_and_as_such() {
    if !have(&["python3"]) {
        return;
    }
    let images = Images::new();
    let path = images.raw("b.raw");
    let holder = holding(&mut python(POSIX, &[&path]), &path, "c/-");
    wait_for("the second descriptor", || {
        let links = std::fs::read_dir(format!("/proc/{}/fd", holder.pid())).ok()?;
        let ours = |e: std::fs::DirEntry| std::fs::read_link(e.path()).ok().filter(|l| *l == path);
        (links.flatten().filter_map(ours).count() == 2).then_some(())
    });
    let (snapshot, _) = list(&path);
    let image = image(&snapshot, &path);
    let holders = image["holders"].as_array().unwrap();
    assert_eq!(holders.len(), 1, "{image:#}");
    assert_eq!((holders[0]["pid"].as_i64(), holders[0]["lock"].as_str()), (Some(holder.pid().into()), Some("posix")));
    assert_eq!(access_of(&holders[0]), "c/-");
    assert_eq!(image["verdict"], "held");
    assert!(image["findings"].as_array().unwrap().iter().any(|f| f["code"] == "posix-lock"));
}

#[test]
fn a_locked_file_on_a_block_device_is_named() {
    if !am_root() || !have(&["losetup", "qemu-io"]) {
        return;
    }
    let images = Images::new();
    let backing = images.raw("b.raw");
    let device = support::run(Command::new("losetup").args(["--find", "--show"]).arg(&backing));
    let device = Path::new(device.trim());
    struct Detach<'a>(&'a Path);
    impl Drop for Detach<'_> {
        fn drop(&mut self) {
            let _ = Command::new("losetup").arg("-d").arg(self.0).status();
        }
    }
    let _detach = Detach(device);
    let holder = holding(&mut qemu_io(&["-f", "raw"], device), device, "cw/-");
    let image = assert_held(device, &[(&holder, "cw/-")], "cw/-");
    assert_eq!((image["file_size"].as_u64(), image["virtual_size"].as_u64()), (Some(1 << 20), Some(1 << 20)));
}
