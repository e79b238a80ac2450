//! Where names, devices and inode numbers lie: does the right image show the lock, and no other?
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/everyone.rs"]
mod everyone;
#[path = "support/places.rs"]
mod places;
#[path = "support/stream.rs"]
mod stream;
mod support;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use everyone::{assert_free, assert_held, assert_let_in, findings, list_of};
use places::{Disk, Mounted, raw_at, ready};
use serde_json::Value;
use stream::Watch;
use support::{
    Images, Running, access_of, am_root, have, holding, image, list, locked, output, python, qemu_io, run, tell,
    wait_for,
};

fn inode(path: &Path) -> u64 {
    fs::metadata(path).unwrap().ino()
}

fn device(path: &Path) -> u64 {
    fs::metadata(path).unwrap().dev()
}

/// The device that `/proc/locks` prints for locks of this kind on this inode.
fn devices_in_table(kind: &str, inode: u64) -> Vec<String> {
    let table = fs::read_to_string("/proc/locks").unwrap();
    let fields = table.lines().filter(|l| l.contains(kind)).filter_map(|l| l.split_whitespace().nth(5));
    let of_inode = fields.filter_map(|f| f.rsplit_once(':')).filter(|(_, i)| i.parse() == Ok(inode));
    let mut devices: Vec<String> = of_inode.map(|(device, _)| device.to_owned()).collect();
    devices.sort();
    devices.dedup();
    devices
}

/// One image in a subvolume of btrfs, the same in its snapshot, and one at the top: three files of one inode number.
fn btrfs(images: &Images) -> (Disk, [PathBuf; 3]) {
    let disk = Disk::new(images, "btrfs", "btrfs", 128 << 20);
    let subvolume = disk.mounted.path("live");
    let btrfs = |arguments: &[&str]| run(Command::new("btrfs").args(arguments).current_dir(disk.mounted.dir()));
    btrfs(&["subvolume", "create", "live"]);
    let live = subvolume.join("a.qcow2");
    run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&live).arg("16M"));
    btrfs(&["subvolume", "snapshot", "live", "kept"]);
    let kept = disk.mounted.path("kept/a.qcow2");
    let top = disk.mounted.raw("a.raw");
    (disk, [live, kept, top])
}

fn can_btrfs() -> bool {
    let there = am_root() && have(&["mkfs.btrfs", "btrfs", "qemu-img", "qemu-io"]);
    let known = || fs::read_to_string("/proc/filesystems").unwrap().contains("btrfs");
    if there && !known() {
        support::left_out("the kernel knows no btrfs");
    }
    there && known()
}

#[test]
fn a_btrfs_subvolume_and_its_snapshot_are_two_images_though_the_lock_table_calls_them_one() {
    if !can_btrfs() {
        return;
    }
    let images = Images::new();
    let (_disk, [live, kept, top]) = btrfs(&images);
    assert_eq!(inode(&live), inode(&kept));
    assert_eq!(inode(&live), inode(&top), "the first file of each tree");
    let (a, b, c) = (device(&live), device(&kept), device(&top));
    assert!(a != b && b != c && a != c, "statx tells them apart");
    let all: [&Path; 3] = [live.parent().unwrap(), kept.parent().unwrap(), top.parent().unwrap()];

    for (held, others) in [(&live, [&kept, &top]), (&kept, [&live, &top])] {
        let holder = holding(&mut qemu_io(&["-f", "qcow2"], held), held, "cwr/wr");
        let (snapshot, code) = list_of(&all);
        assert_eq!(code, 1);
        assert_held(&snapshot, held, &holder, "cwr/wr");
        others.iter().for_each(|other| assert_free(&snapshot, other));
        assert_let_in(others[0], "qcow2");
        // Alone it is no other either.
        for path in [held, others[0], others[1]] {
            let (alone, code) = list(path);
            assert_eq!(code, i32::from(path == held));
            assert_eq!(image(&alone, path)["verdict"], if path == held { "held" } else { "free" });
        }
    }
}

#[test]
fn both_a_btrfs_image_and_its_snapshot_held_each_by_its_own() {
    if !can_btrfs() {
        return;
    }
    let images = Images::new();
    let (_disk, [live, kept, top]) = btrfs(&images);
    let on_live = holding(&mut qemu_io(&["-f", "qcow2"], &live), &live, "cwr/wr");
    let on_kept = holding(&mut qemu_io(&["-r", "-f", "qcow2"], &kept), &kept, "c/wr");
    assert_eq!(devices_in_table("OFDLCK", inode(&live)).len(), 1, "one device for both");
    let paths: Vec<&Path> = [&live, &kept, &top].map(PathBuf::as_path).to_vec();
    let (snapshot, _) = list_of(&paths);
    assert_held(&snapshot, &live, &on_live, "cwr/wr");
    assert_held(&snapshot, &kept, &on_kept, "c/wr");
    assert_free(&snapshot, &top);

    let watch = Watch::start(&paths, "200ms");
    let pid = on_kept.pid();
    on_kept.end();
    let events = watch.events_until("the end of one", |e| e["kind"] == "released" && e["pid"] == pid);
    assert!(events.iter().all(|e| e["image"] == kept.to_str().unwrap()), "{events:#?}");
    let (snapshot, _) = list_of(&paths);
    assert_held(&snapshot, &live, &on_live, "cwr/wr");
    assert_free(&snapshot, &kept);
}

const POSIX: &str = "import fcntl, sys; f = open(sys.argv[1], 'r+b'); fcntl.lockf(f, fcntl.LOCK_SH, 1, 100); \
                     print(flush=True); sys.stdin.read()";

#[test]
fn a_posix_lock_in_one_btrfs_subvolume_is_nobodys_in_another() {
    if !can_btrfs() || !have(&["python3"]) {
        return;
    }
    let images = Images::new();
    let (_disk, [live, kept, top]) = btrfs(&images);
    for held in [&live, &kept, &top] {
        let (holder, _) = ready(&mut python(POSIX, &[held]));
        let (snapshot, _) = list_of(&[&live, &kept, &top]);
        for path in [&live, &kept, &top] {
            if path == held {
                assert_held(&snapshot, path, &holder, "c/-");
            } else {
                assert_free(&snapshot, path);
            }
        }
    }
}

#[test]
fn a_lock_on_btrfs_whose_description_is_in_flight_is_held_by_the_kernel_on_its_image_alone() {
    if !can_btrfs() || !have(&["python3"]) {
        return;
    }
    let images = Images::new();
    let (_disk, [live, kept, top]) = btrfs(&images);
    let (_sender, _) = ready(&mut python(IN_FLIGHT, &[&kept]));
    let (snapshot, _) = list_of(&[&live, &kept, &top]);
    assert_eq!(image(&snapshot, &kept)["verdict"], "held-by-kernel", "{:#}", image(&snapshot, &kept));
    assert_free(&snapshot, &live);
    assert_free(&snapshot, &top);
}

const IN_FLIGHT: &str = "
import array, fcntl, os, socket, struct, sys
fd = os.open(sys.argv[1], os.O_RDWR)
fcntl.fcntl(fd, 37, struct.pack('hhqqi', fcntl.F_RDLCK, 0, 100, 1, 0))  # F_OFD_SETLK
ours, theirs = socket.socketpair()
ours.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [fd]))])
os.close(fd)
print(flush=True)
sys.stdin.read()
";

#[test]
fn a_bind_mount_shows_the_file_behind_it_under_every_name() {
    if !am_root() || !have(&["mount", "qemu-io"]) {
        return;
    }
    let images = Images::new();
    let there = images.path("there");
    fs::create_dir(&there).unwrap();
    let (path, other) = (raw_at(there.join("a.raw")), raw_at(there.join("b.raw")));
    let bound = Mounted::new(&["--bind", there.to_str().unwrap()], images.path("bound"));
    let again = bound.path("a.raw");
    for held in [&path, &again] {
        let holder = holding(&mut qemu_io(&["-f", "raw"], held), held, "cw/-");
        let (snapshot, _) = list_of(&[&there, bound.dir()]);
        assert_held(&snapshot, &path, &holder, "cw/-");
        assert_held(&snapshot, &again, &holder, "cw/-");
        assert_free(&snapshot, &other);
        for path in [&path, &again] {
            assert_eq!(findings(&snapshot, path, "device-alias"), []);
            assert_eq!(findings(&snapshot, path, "shared-writers"), []);
        }
    }
    // A file that covers another: the one that is seen counts.
    let covered = images.raw("covered.raw");
    let cover = Mounted::new(&["--bind", other.to_str().unwrap()], covered.clone());
    let holder = holding(&mut qemu_io(&["-f", "raw"], &other), &other, "cw/-");
    let (snapshot, _) = list_of(&[&covered, &other]);
    assert_held(&snapshot, &covered, &holder, "cw/-");
    assert_held(&snapshot, &other, &holder, "cw/-");
    drop(cover);
    let (snapshot, _) = list(&covered);
    assert_free(&snapshot, &covered);
}

/// qemu-io in a mount namespace of its own, after `script`.
fn in_private_namespace(script: &str, options: &[&str], path: &Path) -> Command {
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c"]);
    command.arg(format!("{script} && exec qemu-io {} \"$0\"", options.join(" "))).arg(path);
    command
}

#[test]
fn a_holder_that_sees_another_file_at_the_path_holds_that_one() {
    if !am_root() || !have(&["unshare", "mount", "qemu-io"]) {
        return;
    }
    let images = Images::new();
    let (path, other) = (images.raw("a.raw"), images.raw("b.raw"));
    // What it calls a.raw is b.raw here.
    let script = format!("mount --bind {} {}", other.display(), path.display());
    let holder = holding(&mut in_private_namespace(&script, &["-f", "raw"], &path), &other, "cw/-");
    let command = fs::read_to_string(format!("/proc/{}/cmdline", holder.pid())).unwrap();
    assert!(command.contains("a.raw"), "{command}");
    let (snapshot, _) = list(images.dir());
    assert_held(&snapshot, &other, &holder, "cw/-");
    assert_free(&snapshot, &path);
    assert_let_in(&path, "raw");
    let watch = Watch::start(&[images.dir()], "200ms");
    let pid = holder.pid();
    holder.end();
    let released = watch.event("its end", |e| e["kind"] == "released" && e["pid"] == pid);
    assert_eq!(released["image"], other.to_str().unwrap());
}

#[test]
fn a_holder_whose_file_exists_only_in_its_own_namespace_holds_none_of_ours() {
    if !am_root() || !have(&["unshare", "mount", "qemu-io"]) {
        return;
    }
    let images = Images::new();
    let path = images.raw("a.raw");
    let told = images.path("told");
    fs::create_dir(&told).unwrap();
    let script = format!("mount -t tmpfs none {0} && truncate -s 1M {1}", images.dir().display(), path.display());
    let mut command = in_private_namespace(&script, &["-f", "raw"], &path);
    let holder = Running::spawn(command.stdin(Stdio::piped()).stdout(Stdio::null()));
    let fds = PathBuf::from(format!("/proc/{}/fd", holder.pid()));
    let fdinfo = |link: fs::DirEntry| fs::read_to_string(fds.with_file_name("fdinfo").join(link.file_name())).ok();
    wait_for("its locks", || {
        let locks = |e| fdinfo(e).filter(|text| text.contains("OFDLCK") && text.contains(" 100 101"));
        fs::read_dir(&fds).ok()?.flatten().find_map(locks)
    });
    // The kernel writes the link as if it were ours.
    let links = || fs::read_dir(&fds).unwrap().flatten().filter_map(|e| fs::read_link(e.path()).ok());
    assert!(links().any(|l| l == path));
    let (snapshot, code) = list(images.dir());
    assert_eq!(code, 0);
    assert_free(&snapshot, &path);
}

#[test]
fn hard_links_are_one_image_under_two_names() {
    if !have(&["qemu-io"]) {
        return;
    }
    let images = Images::new();
    let (path, copy) = (images.raw("a.raw"), images.path("copy.raw"));
    let linked = images.path("linked.raw");
    fs::hard_link(&path, &linked).unwrap();
    fs::copy(&path, &copy).unwrap();
    let holder = holding(&mut qemu_io(&["-f", "raw"], &linked), &path, "cw/-");
    let (snapshot, _) = list(images.dir());
    assert_held(&snapshot, &path, &holder, "cw/-");
    assert_held(&snapshot, &linked, &holder, "cw/-");
    assert_free(&snapshot, &copy);
    for path in [&path, &linked] {
        assert_eq!(image(&snapshot, path)["findings"], serde_json::json!([]), "no lock is missed: no alias");
    }
    // The name through which it was opened goes, the other stays.
    fs::remove_file(&linked).unwrap();
    let (snapshot, _) = list(images.dir());
    assert_held(&snapshot, &path, &holder, "cw/-");
}

fn named<'a>(kind: &'a str, path: &'a Path) -> impl Fn(&Value) -> bool + 'a {
    move |e| e["kind"] == kind && e["image"] == path.to_str().unwrap()
}

/// All that is told of one image.
fn about<'a>(events: &'a [Value], path: &Path) -> Vec<&'a str> {
    let of = events.iter().filter(|e| e["image"] == path.to_str().unwrap());
    of.map(|e| e["kind"].as_str().unwrap()).collect()
}

#[test]
fn an_image_that_is_renamed_keeps_its_holder_under_the_new_name() {
    if !have(&["qemu-io"]) {
        return;
    }
    let images = Images::new();
    let (old, other) = (images.raw("old.raw"), images.raw("other.raw"));
    let new = images.path("new.raw");
    let holder = holding(&mut qemu_io(&["-f", "raw"], &old), &old, "cw/-");
    let watch = Watch::start(&[images.dir()], "1h");
    fs::rename(&old, &new).unwrap();
    let mut events = watch.events_until("the new name's holder", |e| {
        named("acquired", &new)(e) && e["pid"] == holder.pid() && access_of(e) == "cw/-"
    });
    if about(&events, &old).is_empty() {
        events.extend(watch.events_until("the old name", named("image-removed", &old)));
    }
    assert_eq!(about(&events, &old), ["image-removed"], "{events:#?}");
    assert_eq!(about(&events, &new), ["image-added", "acquired"], "{events:#?}");
    let (snapshot, _) = list(images.dir());
    assert_held(&snapshot, &new, &holder, "cw/-");
    assert_free(&snapshot, &other);
    let pid = holder.pid();
    holder.end();
    watch.event("its end", |e| named("released", &new)(e) && e["pid"] == pid);
}

#[test]
fn an_image_that_is_deleted_while_it_is_held_is_told_until_its_holder_ends() {
    if !have(&["qemu-io"]) {
        return;
    }
    let images = Images::new();
    let (path, other) = (images.raw("a.raw"), images.raw("b.raw"));
    let holder = holding(&mut qemu_io(&["-f", "raw"], &path), &path, "cw/-");
    let watch = Watch::start(&[images.dir()], "200ms");
    fs::remove_file(&path).unwrap();
    let told = |kind: &'static str| {
        let (path, pid) = (path.clone(), holder.pid());
        move |e: &Value| {
            let text = e["text"].as_str().unwrap_or_default();
            let named = text.contains(path.to_str().unwrap()) && text.contains(&format!("qemu-io {pid}"));
            e["kind"] == kind && named && text.contains("is deleted")
        }
    };
    let mut events = watch.events_until("the finding", told("finding"));
    if about(&events, &path).is_empty() {
        events.extend(watch.events_until("its removal", named("image-removed", &path)));
    }
    assert_eq!(about(&events, &path), ["image-removed"], "{events:#?}");
    // Somebody who comes later is told, too.
    let (snapshot, _) = list(images.dir());
    assert!(snapshot["images"].as_array().unwrap().iter().all(|i| i["path"] != path.to_str().unwrap()));
    assert_free(&snapshot, &other);
    let table = String::from_utf8(output(support::qlock_top().arg("list").arg(images.dir())).stdout).unwrap();
    assert!(table.contains("is deleted") && table.contains(&format!("qemu-io {}", holder.pid())), "{table}");
    // Another file takes the path: it is held by nobody.
    images.raw("a.raw");
    watch.event("the new file", named("image-added", &path));
    let (snapshot, _) = list(images.dir());
    assert_free(&snapshot, &path);
    let cleared = told("finding-cleared");
    holder.end();
    watch.event("the end of its holder", cleared);
}

#[test]
fn an_image_that_is_replaced_by_another_is_free_and_the_old_one_is_told() {
    if !have(&["qemu-io"]) {
        return;
    }
    let images = Images::new();
    let (path, new) = (images.raw("a.raw"), images.raw("a.raw.new"));
    let old = holding(&mut qemu_io(&["-f", "raw"], &path), &path, "cw/-");
    let (was, is) = (inode(&path), inode(&new));
    let watch = Watch::start(&[images.dir()], "200ms");
    fs::rename(&new, &path).unwrap();
    let events = watch.events_until("the finding", |e| {
        e["kind"] == "finding" && e["text"].as_str().unwrap().contains(&format!("qemu-io {} holds it", old.pid()))
    });
    assert_eq!(about(&events, &path), ["image-removed", "image-added"], "{events:#?}");
    assert_eq!(about(&events, &new), ["image-removed"], "{events:#?}");
    let (snapshot, code) = list(images.dir());
    assert_eq!((image(&snapshot, &path)["inode"].as_u64(), was != is, code), (Some(is), true, 0));
    assert_free(&snapshot, &path);
    // Who opens the path now holds the new file, and the old holder has no part in it.
    let second = holding(&mut qemu_io(&["-f", "raw"], &path), &path, "cw/-");
    let (snapshot, _) = list(images.dir());
    assert_held(&snapshot, &path, &second, "cw/-");
    assert_eq!(findings(&snapshot, &path, "shared-writers"), []);
    watch.event("the second holder", |e| named("acquired", &path)(e) && e["pid"] == second.pid());
    let pid = old.pid();
    old.end();
    let events = watch.events_until("the end of the first", |e| {
        e["kind"] == "finding-cleared" && e["text"].as_str().unwrap().contains(&format!("qemu-io {pid} holds it"))
    });
    let wrong = |e: &&Value| e["kind"] == "released";
    assert_eq!(events.iter().find(wrong), None, "it held nothing of what is there now");
}

#[test]
fn two_images_that_change_names_change_holders() {
    if !have(&["qemu-io"]) {
        return;
    }
    let images = Images::new();
    let (a, b) = (images.raw("a.raw"), images.raw("b.raw"));
    let writer = holding(&mut qemu_io(&["-f", "raw"], &a), &a, "cw/-");
    let reader = holding(&mut qemu_io(&["-r", "-f", "raw"], &b), &b, "c/-");
    let watch = Watch::start(&[images.dir()], "200ms");
    let exchange = rustix::fs::RenameFlags::EXCHANGE;
    rustix::fs::renameat_with(rustix::fs::CWD, &a, rustix::fs::CWD, &b, exchange).unwrap();
    watch.event("the reader's new name", |e| named("acquired", &a)(e) && e["pid"] == reader.pid());
    let (snapshot, _) = list(images.dir());
    assert_held(&snapshot, &a, &reader, "c/-");
    assert_held(&snapshot, &b, &writer, "cw/-");
}

#[test]
fn a_descriptor_that_goes_over_to_another_image_takes_its_locks_along() {
    if !have(&["python3"]) {
        return;
    }
    let images = Images::new();
    let (a, b) = (images.raw("a.raw"), images.raw("b.raw"));
    // The same number leads to another file, and to one with locks of its own.
    let script = "
import fcntl, os, struct, sys
lock = lambda fd, byte: fcntl.fcntl(fd, 37, struct.pack('hhqqi', fcntl.F_RDLCK, 0, byte, 1, 0))
fd = os.open(sys.argv[1], os.O_RDWR)
lock(fd, 100)
print(flush=True)
sys.stdin.readline()
other = os.open(sys.argv[2], os.O_RDWR)
lock(other, 101)
os.dup2(other, fd)
os.close(other)
sys.stdin.read()
";
    let (mut holder, _) = ready(&mut python(script, &[&a, &b]));
    let watch = Watch::start(&[images.dir()], "200ms");
    let (snapshot, _) = list(images.dir());
    assert_held(&snapshot, &a, &holder, "c/-");
    assert_free(&snapshot, &b);
    tell(&mut holder, "\n");
    wait_for("the change", || (locked(&b).to_string() == "w/-" && locked(&a).is_empty()).then_some(()));
    let (snapshot, _) = list(images.dir());
    assert_held(&snapshot, &b, &holder, "w/-");
    assert_free(&snapshot, &a);
    watch.event("the new lock", |e| named("acquired", &b)(e) && e["pid"] == holder.pid());
}
