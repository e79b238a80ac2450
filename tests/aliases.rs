//! Are files told that are one and the same behind names whose locks do not see each other?
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
use std::process::Command;

use everyone::{assert_free, assert_held, assert_let_in, findings, list_of};
use places::{LoopDevice, Mounted, raw_at};
use stream::Watch;
use support::{Images, am_root, bytes_of, have, holding, image, list, qemu_io, run};

fn inode(path: &Path) -> u64 {
    fs::metadata(path).unwrap().ino()
}

/// An overlay file system whose layers lie on two others.
struct Overlay {
    // In this order: what lies on others goes first.
    merged: Mounted,
    upper: Mounted,
    lower: Mounted,
    _images: Images,
}

impl Overlay {
    /// `low.raw` lies in the lower layer, `up.raw` in the upper, `both.raw` in both.
    fn new() -> Self {
        let images = Images::new();
        let directory = images.dir().to_owned();
        Self::named_through(images, &directory)
    }

    /// Its layers are named to the kernel as they stand below `directory`.
    fn named_through(images: Images, directory: &Path) -> Self {
        let (lower, upper) = (Mounted::tmpfs(images.path("lower")), Mounted::tmpfs(images.path("upper")));
        for directory in ["files", "work"] {
            fs::create_dir(upper.path(directory)).unwrap();
        }
        for name in ["low.raw", "both.raw"] {
            lower.raw(name);
        }
        for name in ["files/up.raw", "files/both.raw"] {
            upper.raw(name);
        }
        let [l, u, w] = ["lower", "upper/files", "upper/work"].map(|name| directory.join(name).display().to_string());
        let layers = format!("lowerdir={l},upperdir={u},workdir={w}");
        let merged = Mounted::new(&["-t", "overlay", "overlay", "-o", &layers], images.path("merged"));
        Self { merged, upper, lower, _images: images }
    }

    fn directories(&self) -> [PathBuf; 3] {
        [self.merged.0.clone(), self.upper.path("files"), self.lower.0.clone()]
    }
}

fn can_overlay() -> bool {
    am_root() && have(&["mount", "qemu-io"])
}

#[test]
fn an_overlay_on_two_file_systems_shows_its_own_locks_and_none_of_its_layers() {
    if !can_overlay() {
        return;
    }
    let overlay = Overlay::new();
    let [merged, upper, lower] = overlay.directories();
    let all: [&Path; 3] = [&merged, &upper, &lower];
    // Read-only, so that nothing is copied up.
    for (name, layer) in [("low.raw", &lower), ("up.raw", &upper)] {
        let (above, below) = (merged.join(name), layer.join(name));
        for (held, other) in [(&above, &below), (&below, &above)] {
            let holder = holding(&mut qemu_io(&["-r", "-f", "raw"], held), held, "c/-");
            let (snapshot, code) = list_of(&all);
            assert_eq!(code, 1);
            assert_held(&snapshot, held, &holder, "c/-");
            for seen in snapshot["images"].as_array().unwrap().iter().filter(|i| i["path"] != held.to_str().unwrap()) {
                assert_eq!((seen["verdict"].as_str(), bytes_of(seen).as_str()), (Some("free"), "-/-"), "{seen:#}");
                assert_eq!(seen["holders"], serde_json::json!([]));
            }
            for (path, other) in [(held, other), (other, held)] {
                let told = findings(&snapshot, path, "overlay-alias");
                assert_eq!(told.len(), 1, "{:#}", image(&snapshot, path));
                assert!(told[0].1.contains(other.to_str().unwrap()), "{told:?}");
                assert!(told[0].1.contains("invisible"), "{told:?}");
            }
            let told = findings(&snapshot, held, "overlay-alias");
            assert_eq!(told[0].0, "danger", "in use: {told:?}");
            // Alone nobody knows of the other.
            let (alone, _) = list(held);
            assert_eq!(findings(&alone, held, "overlay-alias"), []);
        }
    }
}

#[test]
fn writing_below_an_overlay_is_not_stopped_by_the_locks_above() {
    if !can_overlay() {
        return;
    }
    let overlay = Overlay::new();
    let [merged, upper, _] = overlay.directories();
    let (above, below) = (merged.join("up.raw"), upper.join("up.raw"));
    for path in [&above, &below] {
        run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(path).arg("1M"));
    }
    let holder = holding(&mut qemu_io(&["-f", "qcow2"], &above), &above, "cwr/wr");
    assert_let_in(&below, "qcow2");
    let (snapshot, _) = list_of(&[&merged, &upper]);
    assert_held(&snapshot, &above, &holder, "cwr/wr");
    assert_free(&snapshot, &below);
}

#[test]
fn what_was_copied_up_is_no_longer_the_file_in_the_lower_layer() {
    if !can_overlay() {
        return;
    }
    let overlay = Overlay::new();
    let [merged, upper, lower] = overlay.directories();
    let name = "both.raw";
    let (snapshot, _) = list_of(&[&merged, &upper, &lower]);
    let told = findings(&snapshot, &merged.join(name), "overlay-alias");
    assert!(told.len() == 1 && told[0].1.contains(upper.join(name).to_str().unwrap()), "{told:?}");
    assert_eq!(findings(&snapshot, &upper.join(name), "overlay-alias").len(), 1);
    assert_eq!(findings(&snapshot, &lower.join(name), "overlay-alias"), [], "hidden by the layer above");

    // Opened for writing, `low.raw` is copied up: from then on it is another file than the one below.
    let (above, below) = (merged.join("low.raw"), lower.join("low.raw"));
    let holder = holding(&mut qemu_io(&["-f", "raw"], &above), &above, "cw/-");
    let copied = upper.join("low.raw");
    let (snapshot, _) = list_of(&[&merged, &upper, &lower]);
    assert_held(&snapshot, &above, &holder, "cw/-");
    assert_eq!(findings(&snapshot, &below, "overlay-alias"), []);
    assert_eq!(findings(&snapshot, &copied, "overlay-alias").len(), 1);
}

#[test]
fn the_layers_of_an_overlay_are_found_though_the_kernel_was_told_another_name() {
    if !can_overlay() {
        return;
    }
    // As a directory of containers that was moved to a larger disk, with a link in its place.
    let links = Images::new();
    let images = Images::new();
    let link = links.path("link");
    std::os::unix::fs::symlink(images.dir(), &link).unwrap();
    let overlay = Overlay::named_through(images, &link);
    let [merged, upper, lower] = overlay.directories();
    let (snapshot, _) = list_of(&[&merged, &upper, &lower]);
    for (name, layer) in [("low.raw", &lower), ("up.raw", &upper)] {
        let (above, below) = (merged.join(name), layer.join(name));
        for (path, other) in [(&above, &below), (&below, &above)] {
            let told = findings(&snapshot, path, "overlay-alias");
            assert!(told.len() == 1 && told[0].1.contains(other.to_str().unwrap()), "{}: {told:?}", path.display());
        }
    }
}

#[test]
fn of_a_part_of_an_overlay_that_is_mounted_elsewhere_the_layers_are_found_too() {
    if !can_overlay() {
        return;
    }
    let overlay = Overlay::new();
    let [merged, upper, _] = overlay.directories();
    // Of the same name as one at the top of the layer, which is another.
    let below = raw_at({
        fs::create_dir(merged.join("part")).unwrap();
        merged.join("part/up.raw")
    });
    let layer = upper.join("part/up.raw");
    assert!(below.exists() && layer.exists());
    let point = overlay.merged.0.with_file_name("bound");
    let part = Mounted::new(&["--bind", merged.join("part").to_str().unwrap()], point);
    let bound = part.path("up.raw");
    let (snapshot, _) = list_of(&[&bound, &layer, &upper.join("up.raw")]);
    assert_eq!(findings(&snapshot, &upper.join("up.raw"), "overlay-alias"), [], "another file");
    for (path, other) in [(&bound, &layer), (&layer, &bound)] {
        let told = findings(&snapshot, path, "overlay-alias");
        assert!(told.len() == 1 && told[0].1.contains(other.to_str().unwrap()), "{told:?}");
    }
}

#[test]
fn who_read_an_overlay_before_it_was_copied_up_is_not_lost() {
    if !can_overlay() {
        return;
    }
    let overlay = Overlay::new();
    let path = overlay.merged.path("low.raw");
    let reader = holding(&mut qemu_io(&["-r", "-f", "raw"], &path), &path, "c/-");
    let before = inode(&path);
    let writer = holding(&mut qemu_io(&["-f", "raw"], &path), &path, "cw/-");
    assert!(overlay.upper.path("files/low.raw").exists(), "it was copied up; inode {before} is {} now", inode(&path));
    let (snapshot, _) = list(&path);
    let seen = image(&snapshot, &path);
    let mut holders: Vec<_> = seen["holders"].as_array().unwrap().iter().map(|h| h["pid"].as_i64().unwrap()).collect();
    holders.sort_unstable();
    let mut expected = [i64::from(reader.pid()), i64::from(writer.pid())];
    expected.sort_unstable();
    assert_eq!((holders.as_slice(), bytes_of(seen).as_str()), (expected.as_slice(), "cw/-"), "{seen:#}");
    assert_eq!(seen["verdict"], "held");
}

#[test]
fn two_nodes_of_one_block_device_are_told_as_aliases_and_only_the_locked_one_is_held() {
    if !am_root() || !have(&["losetup", "qemu-io", "qemu-img"]) {
        return;
    }
    let images = Images::new();
    let disk = images.path("disk");
    run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&disk).arg("16M"));
    fs::File::options().write(true).open(&disk).unwrap().set_len(32 << 20).unwrap();
    let device = LoopDevice::on(&disk);
    let unrelated = LoopDevice::on(&images.raw("other"));
    let nodes = images.path("nodes");
    fs::create_dir(&nodes).unwrap();
    let (a, b, c) = (nodes.join("a"), nodes.join("b"), nodes.join("c"));
    device.node(&a);
    device.node(&b);
    unrelated.node(&c);
    let holder = holding(&mut qemu_io(&["-f", "qcow2"], &a), &a, "cwr/wr");
    assert_let_in(&b, "qcow2");
    let (snapshot, code) = list_of(&[&a, &b, &c]);
    assert_eq!(code, 1);
    assert_held(&snapshot, &a, &holder, "cwr/wr");
    assert_free(&snapshot, &b);
    assert_free(&snapshot, &c);
    for (node, other) in [(&a, &b), (&b, &a)] {
        let told = findings(&snapshot, node, "device-alias");
        assert_eq!(told.len(), 1, "{:#}", image(&snapshot, node));
        assert!(told[0].1.contains(other.to_str().unwrap()) && told[0].1.contains("invisible"), "{told:?}");
    }
    assert_eq!(findings(&snapshot, &a, "device-alias")[0].0, "danger");
    assert_eq!(findings(&snapshot, &c, "device-alias"), []);
    // The node in /dev is one more.
    let (snapshot, _) = list_of(&[device.path(), &b]);
    for node in [device.path(), &b] {
        assert_eq!(findings(&snapshot, node, "device-alias").len(), 1);
    }
    // A link to a node is that node.
    let link = nodes.join("link");
    std::os::unix::fs::symlink(&a, &link).unwrap();
    let (snapshot, _) = list_of(&[&a, &link]);
    assert_eq!(findings(&snapshot, &a, "device-alias"), []);
    let mut watched = Watch::start(&[&a, &b], "200ms");
    let told = watched.first["snapshot"]["images"].as_array().unwrap().len();
    assert_eq!(told, 2);
    let pid = holder.pid();
    holder.end();
    watched.event("its end", |e| e["kind"] == "released" && e["image"] == a.to_str().unwrap() && e["pid"] == pid);
    let _ = watched.running.0.kill();
}
