//! What does somebody see who may not read other users' processes?
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use support::{Images, am_root, bytes_of, have, holding, image, qemu_io};

/// Runs the program as nobody; from a copy, since the build directory may be closed to others.
fn as_nobody(images: &Images, arguments: &[&str]) -> (String, String, i32) {
    let copy = images.0.path().with_extension("bin");
    std::fs::copy(env!("CARGO_BIN_EXE_qlock-top"), &copy).unwrap();
    std::fs::set_permissions(&copy, Permissions::from_mode(0o755)).unwrap();
    std::fs::set_permissions(images.dir(), Permissions::from_mode(0o755)).unwrap();
    let output = Command::new("setpriv")
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
        .arg(&copy)
        .args(arguments)
        .arg(images.dir())
        .output()
        .unwrap();
    std::fs::remove_file(&copy).unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (text(output.stdout), text(output.stderr), output.status.code().unwrap())
}

fn list_as_nobody(images: &Images) -> (Value, i32) {
    let (out, err, code) = as_nobody(images, &["list", "--format", "json"]);
    (serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out} {err}")), code)
}

fn set_mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

#[test]
fn bytes_are_right_holders_unknown_and_the_status_says_so() {
    if !am_root() || !have(&["setpriv", "qemu-io"]) {
        return;
    }
    let images = Images::new();
    let (held, free) = (images.raw("held.raw"), images.raw("free.raw"));
    set_mode(&held, 0o644);
    set_mode(&free, 0o644);
    let _holder = holding(&mut qemu_io(&["-f", "raw"], &held), &held, "cw/-");
    let (snapshot, code) = list_as_nobody(&images);
    assert_eq!(code, 3);
    assert_eq!(snapshot["complete"], false);
    assert!(snapshot["hidden_processes"].as_u64().unwrap() > 0);
    let seen = image(&snapshot, &held);
    assert_eq!((bytes_of(seen), seen["verdict"].as_str()), ("cw/-".to_owned(), Some("unknown")));
    assert_eq!(seen["holders"], serde_json::json!([]));
    assert_eq!(seen["findings"][0]["code"], "holder-unknown");
    assert_eq!(image(&snapshot, &free)["verdict"], "free");

    let (table, _, code) = as_nobody(&images, &["list"]);
    assert_eq!(code, 3);
    assert!(table.contains("held, by whom?") && table.contains("could not be read"), "{table}");
    assert!(table.contains("! ! . . .   . . . . ."), "held bytes without a name are marked: {table}");
}

#[test]
fn an_unreadable_image_is_unknown_and_never_free() {
    if !am_root() || !have(&["setpriv"]) {
        return;
    }
    let images = Images::new();
    let path = images.raw("secret.raw");
    set_mode(&path, 0o600);
    let (snapshot, code) = list_as_nobody(&images);
    assert_eq!((code, snapshot["complete"].as_bool()), (3, Some(false)));
    let seen = image(&snapshot, &path);
    assert_eq!(seen["verdict"], "unknown");
    assert!(seen["bytes"].as_array().unwrap().iter().all(|b| b["state"] == "unknown"));
    let finding = &seen["findings"][0];
    assert_eq!(finding["code"], "cannot-open");
    assert!(finding["text"].as_str().unwrap().contains("Permission denied"), "{finding}");
    let (table, _, _) = as_nobody(&images, &["list"]);
    assert!(table.contains("? ? ? ? ?   ? ? ? ? ?") && table.contains("cannot tell"), "{table}");
}

#[test]
fn an_unreadable_directory_is_told() {
    if !am_root() || !have(&["setpriv"]) {
        return;
    }
    let images = Images::new();
    images.raw("a.raw");
    let below = images.path("below");
    std::fs::create_dir(&below).unwrap();
    set_mode(&below, 0o700);
    let (table, _, code) = as_nobody(&images, &["list", "--recursive"]);
    assert_eq!(code, 3);
    assert!(table.contains("below: Permission denied"), "{table}");
}
