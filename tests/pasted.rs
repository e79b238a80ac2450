//! Does `why -` answer a pasted message for the right image of this host, and only for that?
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::process::{Command, Stdio};

use proptest::prelude::*;
use support::{Images, Running, am_root, have, holding, output, qemu_io, qlock_top, tell, wait_for};

/// What is said to `text`, and the status.
fn paste(text: &[u8], arguments: &[&str]) -> (String, i32) {
    let mut command = qlock_top();
    command.arg("why").args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    // It reads at most a mebibyte: then the rest has no reader.
    let _ = std::io::Write::write_all(&mut stdin, text);
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    (String::from_utf8(said).unwrap(), output.status.code().unwrap())
}

#[test]
fn what_qemu_printed_leads_to_its_holder_and_to_what_is_so_now() {
    if !have(&["qemu-io", "qemu-img"]) {
        return;
    }
    let images = Images::new();
    let path = images.raw("a b [1].raw");
    let holder = holding(&mut qemu_io(&["-f", "raw"], &path), &path, "cw/-");
    let refused =
        output(Command::new("qemu-img").args(["convert", "-f", "raw", "-O", "raw"]).arg(&path).arg("/dev/null"));
    let message = refused.stderr;
    let (said, status) = paste(&message, &["-"]);
    assert_eq!(status, 1, "{said}");
    assert!(said.contains("QEMU said: Failed to get shared \"write\" lock"), "{said}");
    assert!(said.contains(&format!("qemu-io {}", holder.pid())), "{said}");
    // The same through a log that escapes it, and with the program named.
    let escaped = serde_json::to_string(&String::from_utf8(message.clone()).unwrap()).unwrap();
    let (said, status) = paste(escaped.as_bytes(), &["--as", "convert-source"]);
    assert!(status == 1 && said.contains("way out: read along with -U"), "{said}");
    holder.end();
    let (said, status) = paste(&message, &["-"]);
    assert!(status == 0 && said.contains("byte 101 (uses write) is free now"), "{said}");
}

#[test]
fn a_path_inside_a_container_is_found_through_the_mount_namespace_of_its_holder() {
    if !have(&["qemu-io", "unshare", "mount"]) || !am_root() {
        return;
    }
    let images = Images::new();
    let path = images.raw("disk.raw");
    let inside = Images::new();
    // Mounted in a namespace of its own, which ends with the program.
    let script = "mount --bind \"$1\" \"$2\" && exec qemu-io -f raw \"$2/disk.raw\"";
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", script, "sh"]).arg(images.dir()).arg(inside.dir());
    let holder = holding(&mut command, &path, "cw/-");
    let named = inside.path("disk.raw");
    let hint = |name: &str| format!("Failed to get \"write\" lock\nIs another process using the image [{name}]?");
    let (said, status) = paste(hint(named.to_str().unwrap()).as_bytes(), &["-"]);
    assert!(said.contains(path.canonicalize().unwrap().to_str().unwrap()), "{said}");
    assert!(said.contains(&format!("in the mount namespace of qemu-io {}", holder.pid())), "{said}");
    assert!(status == 3 && said.contains("byte 201 (denies write) is free now, but"), "{said}");
    assert!(said.contains(&format!("is in use by qemu-io {}", holder.pid())), "{said}");
    // What is nowhere is not answered for.
    let (said, status) = paste(hint("/nowhere/x.raw").as_bytes(), &["-"]);
    assert!(status == 3 && said.contains("is neither on this host nor in"), "{said}");
    let (said, status) = paste(hint("relative.raw").as_bytes(), &["-"]);
    assert!(status == 3 && said.contains("is a relative name"), "{said}");
}

#[test]
fn a_file_that_only_a_container_has_is_told_and_not_answered_for() {
    if !have(&["unshare", "mount"]) || !am_root() {
        return;
    }
    let inside = Images::new();
    let script = "mount -t tmpfs none \"$1\" && : > \"$1/only.raw\" && echo ready && exec cat";
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", script, "sh"]).arg(inside.dir()).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut holder = Running::spawn(&mut command);
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(holder.0.stdout.take().unwrap()), &mut line).unwrap();
    assert_eq!(line, "ready\n");
    let text = format!(
        "Failed to get \"write\" lock Is another process using the image [{}]?",
        inside.path("only.raw").display()
    );
    let (said, status) = paste(text.as_bytes(), &["-"]);
    assert_eq!(status, 3, "{said}");
    assert!(said.contains("exists in the mount namespace of cat") && said.contains("no path of this host"), "{said}");
    tell(&mut holder, "x");
    drop(holder.0.stdin.take());
    wait_for("the end of the namespace", || holder.0.try_wait().unwrap());
}

#[test]
fn text_without_such_a_message_is_an_error_that_says_what_was_looked_for() {
    let (said, status) = paste(b"No space left on device", &["-"]);
    assert!(status == 2 && said.contains("Failed to lock byte N"), "{said}");
    let (said, status) = paste(&vec![b'x'; 3 << 20], &["-"]);
    assert!(status == 2 && said.contains("holds no lock message"), "{said}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is pasted, what comes out may go to a terminal.
    #[test]
    fn no_text_comes_out_with_a_character_that_acts_on_a_terminal(
        before in any::<Vec<u8>>(),
        name in "[\\x00-\\x1f\\x7f-\\u{9f}\\u{200b}\\u{202e}a-z/\\[\\]]{1,30}",
        json in any::<bool>(),
    ) {
        let hint = format!(" Failed to get \"write\" lock\nIs another process using the image [{name}]?");
        let text = [before, hint.into_bytes()].concat();
        let arguments: &[&str] = if json { &["-", "--format", "json"] } else { &["-"] };
        let (said, _) = paste(&text, arguments);
        prop_assert!(!said.contains("panicked"), "{said}");
        prop_assert!(!said.chars().any(|c| c != '\n' && qlock::text::is_treacherous(c)), "{said:?}");
    }
}

#[test]
fn another_byte_that_is_held_is_never_called_granted() {
    if !have(&["qemu-io"]) {
        return;
    }
    let images = Images::new();
    let path = images.raw("a.raw");
    let holder = holding(&mut qemu_io(&["-r", "-f", "raw"], &path), &path, "c/-");
    let text = format!("Failed to get \"write\" lock\nIs another process using the image [{}]?", path.display());
    let (said, status) = paste(text.as_bytes(), &["-"]);
    assert!(status == 3 && said.contains(&format!("is in use by qemu-io {}", holder.pid())), "{said}");
    let (said, status) = paste(text.as_bytes(), &["-", "--format", "json"]);
    assert!(status == 3 && said.contains(r#""verdict":"unknown""#), "{said}");
    // With the program named it is judged as a whole.
    let (said, status) = paste(text.as_bytes(), &["-", "--as", "create", "--format", "json"]);
    assert!(
        status == 0 && said.contains(r#""destroys_image":true"#) && said.contains(r#""operation":"create""#),
        "{said}"
    );
}

#[test]
fn a_name_from_elsewhere_in_the_text_is_not_answered_for() {
    let images = Images::new();
    let path = images.raw("a.raw");
    let text = format!("systemd: file={}\nsomething: Failed to get \"write\" lock", path.display());
    let (said, status) = paste(text.as_bytes(), &["-"]);
    assert!(status == 3 && said.contains("perhaps another image"), "{said}");
}

#[test]
fn a_lock_call_that_failed_speaks_of_no_holder() {
    let images = Images::new();
    let path = images.raw("a.raw");
    let text = format!("qemu-io: can't open device {}: Failed to lock byte 100: No locks available", path.display());
    let (said, status) = paste(text.as_bytes(), &["-"]);
    assert!(status == 3 && !said.contains("has let go"), "{said}");
}

#[test]
fn of_a_long_text_the_end_counts() {
    let images = Images::new();
    let path = images.raw("a.raw");
    let hint = format!("\nFailed to get \"write\" lock\nIs another process using the image [{}]?", path.display());
    let text = [vec![b'x'; 3 << 20], hint.into_bytes()].concat();
    let (said, status) = paste(&text, &["-"]);
    assert!(status == 0 && said.contains("free now"), "{said}");
}
