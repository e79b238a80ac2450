//! Is the newcomer's first command true, and does it leave nothing behind?
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::path::Path;
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::{Scene, bytes_of, have, image, list, output, qlock_top, wait_for};

fn users_of(directory: &Path) -> usize {
    let links = |pid: std::fs::DirEntry| std::fs::read_link(pid.path().join("cwd")).ok();
    std::fs::read_dir("/proc").unwrap().flatten().filter_map(links).filter(|l| l.starts_with(directory)).count()
}

#[test]
fn the_scene_shows_each_kind_of_user() {
    let mut scene = Scene::make();
    let directory = scene.directory.clone();
    let (snapshot, code) = list(&directory);
    assert_eq!(code, 1);
    for (name, bytes, holders) in [
        ("web01.qcow2", "cwr/wr", &["web01"][..]),
        ("web02.qcow2", "cwr/wr", &["web02"]),
        ("base.qcow2", "c/wr", &["web01", "web02"]),
        ("cluster.raw", "cw/-", &["node-a", "node-b"]),
        ("spare.raw", "-/-", &[]),
        ("scratch.raw", "-/-", &[]),
    ] {
        let image = image(&snapshot, &directory.join(name));
        assert_eq!(bytes_of(image), bytes, "{name}");
        let mut vms: Vec<&str> =
            image["holders"].as_array().unwrap().iter().map(|h| h["vm"].as_str().unwrap()).collect();
        vms.sort_unstable();
        assert_eq!(vms, holders, "{name}");
    }
    let export = image(&snapshot, &directory.join("export.raw"));
    assert_eq!((bytes_of(export).as_str(), export["holders"][0]["command"].as_str()), ("cw/r", Some("qemu-nbd-demo")));
    let scratch = image(&snapshot, &directory.join("scratch.raw"));
    assert_eq!(
        (scratch["openers"][0]["mode"].as_str(), scratch["openers"][0]["command"].as_str()),
        (Some("write"), Some("dd-demo"))
    );
    assert_eq!(image(&snapshot, &directory.join("web01.qcow2"))["backing_file"], "base.qcow2");
    let table = String::from_utf8(output(qlock_top().arg("list").arg(&directory)).stdout).unwrap();
    assert!(table.contains("WRITER, NO LOCK") && table.contains("NBD export"), "{table}");

    assert!(users_of(&directory) > 5);
    assert_eq!(scene.end().code(), Some(0));
    assert!(!directory.exists());
    assert_eq!(users_of(&directory), 0);
}

#[test]
fn its_images_are_sound() {
    if !have(&["qemu-img"]) {
        return;
    }
    let scene = Scene::make();
    let directory = &scene.directory;
    for name in ["base.qcow2", "web01.qcow2", "web02.qcow2", "archive.qcow2"] {
        support::run(Command::new("qemu-img").args(["check", "-q", "-U"]).arg(directory.join(name)));
    }
    let chain = support::run(
        Command::new("qemu-img")
            .args(["info", "-U", "--backing-chain", "--output=json"])
            .arg(directory.join("web01.qcow2")),
    );
    let chain: serde_json::Value = serde_json::from_str(&chain).unwrap();
    assert_eq!(chain.as_array().unwrap().len(), 2);
}

#[test]
fn a_signal_cleans_up_and_even_sigkill_ends_the_actors() {
    let mut scene = Scene::make();
    kill(Pid::from_raw(scene.running.pid()), Signal::SIGTERM).unwrap();
    let status = wait_for("the end", || scene.running.0.try_wait().unwrap());
    assert_eq!(status.code(), Some(128 + Signal::SIGTERM as i32));
    assert!(!scene.directory.exists());

    let mut scene = Scene::make();
    scene.running.0.kill().unwrap();
    scene.running.0.wait().unwrap();
    wait_for("the actors' end", || (users_of(&scene.directory) == 0).then_some(()));
}
