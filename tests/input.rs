//! What happens with paths and names that nobody hoped for?
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Stdio;

use qlock::text::is_treacherous;
use support::{Images, Running, list, output, qlock_top, wait_for};

fn status_and_error(arguments: &[&OsStr]) -> (i32, String) {
    let output = output(qlock_top().args(arguments));
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn each_wrong_path_has_its_status_and_names_itself() {
    let images = Images::new();
    let fifo = images.path("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    for command in ["list", "watch"] {
        for (path, code, reason) in [
            (Path::new("/no/such/path"), 4, "no such file or directory"),
            (&images.path("missing\n\u{1b}[2J"), 4, "missing\\n\\x1b[2J"),
            (&fifo, 2, "neither a directory nor an image"),
            (Path::new("/dev/null"), 2, "nothing was opened"),
        ] {
            let (found, error) = status_and_error(&[command.as_ref(), path.as_os_str()]);
            assert_eq!(found, code, "{command} {}: {error}", path.display());
            assert!(error.contains(reason) && error.starts_with("qlock-top: "), "{error}");
            assert!(!error.trim_end().chars().any(is_treacherous), "{error:?}");
        }
    }
    let (code, error) = status_and_error(&["list".as_ref(), "--format".as_ref(), "xml".as_ref()]);
    assert_eq!(code, 2, "{error}");
}

#[test]
fn an_empty_directory_has_no_images_and_that_is_fine() {
    let images = Images::new();
    let (snapshot, code) = list(images.dir());
    assert_eq!((code, snapshot["images"].as_array().unwrap().len()), (0, 0));
    let table = output(qlock_top().arg("list").arg(images.dir()));
    assert!(String::from_utf8(table.stdout).unwrap().starts_with("no images\n"));
}

#[test]
fn fifos_and_sockets_among_the_images_are_left_alone() {
    let images = Images::new();
    images.raw("a.raw");
    nix::unistd::mkfifo(&images.path("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(images.path("socket")).unwrap();
    std::os::unix::fs::symlink("/dev/zero", images.path("zero")).unwrap();
    let (snapshot, code) = list(images.dir());
    assert_eq!((code, snapshot["images"].as_array().unwrap().len()), (0, 1));
}

#[test]
fn ten_thousand_files_are_listed() {
    let images = Images::new();
    for i in 0..10_000 {
        File::create(images.path(&format!("{i:05}.raw"))).unwrap();
    }
    let (snapshot, code) = list(images.dir());
    assert_eq!((code, snapshot["images"].as_array().unwrap().len()), (0, 10_000));
}

/// Names that act on a terminal, hide, turn text round, or are no text at all.
const ATTACKS: [&[u8]; 7] = [
    b"line\nbreak.raw",
    b"clear\x1b[2J\x1b[H.raw",
    b"title\x1b]0;pwned\x07.raw",
    "c1\u{9b}31m.raw".as_bytes(),
    "gpj.\u{202e}war.raw".as_bytes(),
    "zero\u{200b}width.raw".as_bytes(),
    b"latin-\xe9\xff.raw",
];

#[test]
fn hostile_names_reach_no_terminal_and_come_back_from_json() {
    let images = Images::new();
    for name in ATTACKS {
        File::create(images.dir().join(OsStr::from_bytes(name))).unwrap();
    }
    for arguments in [&["list"][..], &["list", "--ascii"], &["list", "--format", "json"]] {
        let output = output(qlock_top().args(arguments).arg(images.dir()));
        assert_eq!(output.status.code(), Some(0));
        let text = String::from_utf8(output.stdout).unwrap();
        let acting: Vec<char> = text.chars().filter(|c| *c != '\n' && is_treacherous(*c)).collect();
        assert!(acting.is_empty(), "{arguments:?}: {acting:?}");
        if arguments.contains(&"--ascii") {
            assert!(text.is_ascii());
        }
        if !arguments.contains(&"json") {
            let rows = text.lines().skip(2).take_while(|l| !l.is_empty()).count();
            assert_eq!(rows, ATTACKS.len(), "a row a name: {text}");
        }
    }
    let (snapshot, _) = list(images.dir());
    let mut names: Vec<Vec<u8>> = snapshot["images"].as_array().unwrap().iter().map(exact_name).collect();
    names.sort();
    let mut expected: Vec<Vec<u8>> = ATTACKS.iter().map(|n| n.to_vec()).collect();
    expected.sort();
    assert_eq!(names, expected);
}

fn exact_name(image: &serde_json::Value) -> Vec<u8> {
    let bytes = match image.get("path_bytes") {
        Some(hex) => {
            let hex = hex.as_str().unwrap();
            (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect()
        }
        None => image["path"].as_str().unwrap().as_bytes().to_vec(),
    };
    let slash = bytes.iter().rposition(|b| *b == b'/').unwrap();
    bytes[slash + 1..].to_vec()
}

#[test]
fn a_closed_pipe_is_quiet() {
    let images = Images::new();
    for i in 0..500 {
        images.raw(&format!("{i}.raw"));
    }
    for arguments in [&["list"][..], &["list", "--format", "json"], &["watch"], &["watch", "--format", "ndjson"]] {
        let mut command = qlock_top();
        command.args(arguments).arg(images.dir()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut running = Running::spawn(&mut command);
        drop(running.0.stdout.take());
        let status = wait_for("the end", || running.0.try_wait().unwrap());
        assert_eq!(status.code(), Some(0), "{arguments:?}");
        let mut error = String::new();
        std::io::Read::read_to_string(&mut running.0.stderr.take().unwrap(), &mut error).unwrap();
        assert_eq!(error, "", "{arguments:?}");
    }
}

#[test]
fn without_a_terminal_the_dashboard_is_a_table() {
    let images = Images::new();
    images.raw("a.raw");
    let output = output(qlock_top().arg(images.dir()));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("IMAGE") && text.contains("a.raw") && !text.contains('\u{1b}'), "{text}");
    assert_eq!(output.status.code(), Some(0));
}
