//! Do names that somebody else chose act on the terminal, the shell or the script of whoever looks?
//!
//! One list of attacks stands as file name, directory name, backing file, program, command line and VM name at once, and
//! every output is held against it: nothing treacherous comes out as text, and JSON gives back the exact bytes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/pty.rs"]
mod pty;
mod support;

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use pty::Pty;
use qlock::hold::HeldAccess;
use qlock::linux::identity::ProcessId;
use qlock::linux::process::{ProcessFacts, container, unit};
use qlock::monitor::advice::{advice, quote};
use qlock::text::is_treacherous;
use serde_json::Value;
use support::{DEADLINE, Images, Running, am_root, have, left_out, qlock_top, run, wait_for};

const PROGRAM: &str = env!("CARGO_BIN_EXE_qlock-top");

/// What every output must survive. No entry holds a slash, so that each can be the name of a file, and none is longer
/// than such a name may be.
fn attacks() -> Vec<Vec<u8>> {
    let c0 = (1..0x20).chain([0x7f]).collect();
    let c1 = ('\u{80}'..='\u{9f}').collect::<String>().into_bytes();
    let text = [
        "clear\x1b[2J\x1b[H",
        "ask\x1b[6n\x1b[c\x1b[>q",
        "scroll\x1b[2;3r\x1bM\x1bc",
        "title\x1b]0;PWNED\x07",
        "title\x1b]2;PWNED\x1b\\",
        "clipboard\x1b]52;c;UFdORUQ=\x07",
        "device\x1bPqPWNED\x1b\\\x1b_PWNED\x1b\\",
        "c1\u{9b}31m\u{9d}0;PWNED\u{9c}",
        "line\nDANGER: PWNED",
        "back\rPWNED",
        "tab\tand\x08\x08\x08back",
        "gpj.\u{202e}war",
        "isolate\u{2066}\u{2067}\u{2069}\u{200f}",
        "zero\u{200b}width\u{feff}",
        "tag\u{e0041}\u{fe0f}\u{2028}\u{ad}",
        r"\x1b[2J\n\u{202e}\",
        "'quotes\" ' it's",
        "-rf",
        "--help",
        "$(reboot)",
        "both'$(reboot)'\x1b[2J",
        "`reboot`;reboot&|<>!*?#~{}[]",
        " leading and trailing ",
        "gone (deleted)",
        "guest=a,,b,debug-threads=on",
        "a) R 1 (b",
        "日本語-größe",
    ];
    let mut all: Vec<Vec<u8>> = text.iter().map(|t| t.as_bytes().to_vec()).collect();
    all.extend([c0, c1, b"no text \xff\xfe\xc0\xaf\xed\xa0\x80".to_vec(), b"raw c1 \x9b31m\x9d0;PWNED\x9c".to_vec()]);
    all.extend([vec![b'x'; 255], "é".repeat(127).into_bytes(), "e\u{300}\u{301}".repeat(50).into_bytes()]);
    all
}

/// Text that may go to a terminal: UTF-8, and in each line nothing that acts.
fn harmless(output: &[u8], what: &str) -> String {
    let text = String::from_utf8(output.to_vec()).unwrap_or_else(|e| panic!("{what}: {e}"));
    let line = text.split('\n').find(|line| line.chars().any(is_treacherous));
    assert_eq!(line, None, "{what}");
    text
}

/// As much of a qcow2 as names its backing file.
fn qcow2(backing: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 4096];
    image[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    image[14..16].copy_from_slice(&1024u16.to_be_bytes());
    image[16..20].copy_from_slice(&u32::try_from(backing.len()).unwrap().to_be_bytes());
    image[1024..1024 + backing.len()].copy_from_slice(backing);
    image
}

/// A program of that name that waits for the end of its standard input, says in its command line that it runs a VM of
/// that name, and holds `access` on the image: through a descriptor that it inherits as its standard output.
fn holder(programs: &Path, image: &Path, access: &str, command: &[u8], vm: &[u8]) -> Running {
    let program = programs.join(OsStr::from_bytes(command));
    std::os::unix::fs::symlink("/bin/sh", &program).unwrap();
    let held = HeldAccess::acquire(image, access.parse().unwrap()).unwrap();
    let joined = |before: &[u8]| OsString::from_vec([before, vm].concat());
    let mut command = Command::new(program);
    command.arg0(joined(b"qemu-")).args(["-c", "read line", "-name"]).arg(joined(b"guest="));
    command.stdin(Stdio::piped()).stdout(Stdio::from(held.into_file().unwrap())).stderr(Stdio::null());
    Running::spawn(&mut command)
}

/// Each attack on a stage of its own: `DIR/ATTACK/ATTACK` stands on the backing file ATTACK and is held by a program
/// ATTACK that runs the VM ATTACK.
struct Stage {
    /// In the order of `paths`.
    holders: Vec<Running>,
    images: Images,
    paths: Vec<PathBuf>,
    _programs: Images,
}

impl Stage {
    fn set() -> Self {
        Self::of(attacks())
    }

    fn of(attacks: Vec<Vec<u8>>) -> Self {
        let (images, programs) = (Images::new(), Images::new());
        let (mut holders, mut paths) = (Vec::new(), Vec::new());
        for attack in attacks {
            let directory = images.dir().join(OsStr::from_bytes(&attack));
            fs::create_dir(&directory).unwrap();
            let path = directory.join(OsStr::from_bytes(&attack));
            fs::write(&path, qcow2(&attack)).unwrap();
            holders.push(holder(programs.dir(), &path, "cwr/wr", &attack, &attack));
            paths.push(path);
        }
        Self { holders, images, paths, _programs: programs }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = qlock_top();
        command.args(arguments).arg("--recursive").arg(self.images.dir());
        command
    }
}

/// What a command prints, on both ways out; and that none of it acts.
fn told(command: &mut Command) -> (String, String, i32) {
    let output = support::output(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
    let what = format!("{command:?}");
    let (out, err) = (harmless(&output.stdout, &what), harmless(&output.stderr, &what));
    assert!(!err.contains("panicked"), "{what}: {err}");
    (out, err, output.status.code().unwrap())
}

fn json(line: &str) -> Value {
    serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))
}

/// The exact bytes of a path in JSON: `FIELD_bytes` in hexadecimal where it is no UTF-8.
fn exact(object: &Value, field: &str) -> Vec<u8> {
    match object.get(format!("{field}_bytes")) {
        Some(hex) => {
            let hex = hex.as_str().unwrap();
            (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect()
        }
        None => object[field].as_str().unwrap().as_bytes().to_vec(),
    }
}

fn sorted(mut list: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
    list.sort();
    list
}

fn bytes_of(paths: &[PathBuf]) -> Vec<Vec<u8>> {
    sorted(paths.iter().map(|p| p.as_os_str().as_bytes().to_vec()).collect())
}

#[test]
fn a_table_has_one_harmless_row_for_each_hostile_image() {
    let stage = Stage::set();
    for ascii in [&[][..], &["--ascii"]] {
        let (table, _, status) = told(stage.command(&["list"]).args(ascii));
        let rows = table.lines().skip(2).take_while(|l| !l.is_empty()).count();
        assert_eq!((rows, status), (stage.paths.len(), 1), "{table}");
        assert!(!table.lines().any(|l| l.starts_with("DANGER")), "a name made a line of its own: {table}");
        assert!(ascii.is_empty() || table.is_ascii());
    }
}

#[test]
fn json_gives_back_the_exact_bytes_of_every_name() {
    let stage = Stage::set();
    for ascii in [&[][..], &["--ascii"]] {
        let (text, _, _) = told(stage.command(&["list", "--format", "json"]).args(ascii));
        assert!(ascii.is_empty() || text.is_ascii());
        let snapshot = json(&text);
        let listed = snapshot["images"].as_array().unwrap();
        assert_eq!(sorted(listed.iter().map(|i| exact(i, "path")).collect()), bytes_of(&stage.paths));
        for image in listed {
            let path = exact(image, "path");
            let attack = &path[path.iter().rposition(|b| *b == b'/').unwrap() + 1..];
            let lossy = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            let [holder] = image["holders"].as_array().unwrap().as_slice() else { panic!("{image}") };
            // As much as the kernel keeps.
            assert_eq!(holder["command"], lossy(&attack[..attack.len().min(15)]), "{image}");
            assert_eq!(image["backing_file"], lossy(attack));
            assert_eq!(image["verdict"], "held");
            if attack != b"guest=a,,b,debug-threads=on" {
                assert_eq!(holder["vm"], lossy(attack));
            }
        }
    }
}

/// The lines of a program as they come.
fn lines_of(running: &mut Running) -> mpsc::Receiver<Vec<u8>> {
    let mut out = BufReader::new(running.0.stdout.take().unwrap());
    let (to, lines) = mpsc::channel();
    std::thread::spawn(move || {
        let mut line = Vec::new();
        while out.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) && to.send(std::mem::take(&mut line)).is_ok() {}
    });
    lines
}

#[test]
fn a_stream_of_events_stays_harmless_and_exact_while_hostile_images_change() {
    for format in ["text", "ndjson"] {
        let mut stage = Stage::set();
        let mut command = stage.command(&["watch", "--format", format]);
        let mut watch = Running::spawn(command.stdout(Stdio::piped()));
        let lines = lines_of(&mut watch);
        let next = || harmless(&lines.recv_timeout(DEADLINE).unwrap(), format);
        // The first look is whole before anything changes.
        if format == "text" {
            while next().trim_end() != "" {}
        } else {
            assert_eq!(json(&next())["snapshot"]["images"].as_array().unwrap().len(), stage.paths.len());
        }
        stage.holders.clear();
        for path in &stage.paths {
            fs::remove_file(path).unwrap();
        }
        let mut removed = Vec::new();
        while removed.len() < stage.paths.len() {
            let line = next();
            if format == "text" {
                if line.contains("is no longer") || line.contains("gone") || line.contains("removed") {
                    removed.push(line.into_bytes());
                }
            } else if json(&line)["kind"] == "image-removed" {
                removed.push(exact(&json(&line), "image"));
            }
        }
        if format == "ndjson" {
            assert_eq!(sorted(removed), bytes_of(&stage.paths));
        }
    }
}

#[test]
fn why_explains_a_hostile_image_harmlessly_and_names_it_exactly() {
    let stage = Stage::set();
    for path in &stage.paths {
        let (_, _, status) = told(qlock_top().arg("why").arg(path));
        // Its backing file is nowhere: what some programs would be told cannot be known.
        assert_eq!(status, 3, "{path:?}");
        let (text, _, status) = told(qlock_top().args(["why", "--as", "vm"]).arg(path));
        assert!(status == 1 && text.starts_with("refused: vm on "), "{path:?}: {text}");
        let (answer, _, _) = told(qlock_top().args(["why", "--as", "vm", "--format", "json"]).arg(path));
        assert_eq!(exact(&json(&answer), "image"), path.as_os_str().as_bytes());
    }
}

/// What `why -` says to a text, and with which status it ends.
fn paste(text: &[u8], arguments: &[&str]) -> (String, i32) {
    let mut command = qlock_top();
    command.args(["why", "-"]).args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = Running::spawn(&mut command);
    child.0.stdin.take().unwrap().write_all(text).unwrap();
    let mut out = Vec::new();
    child.0.stdout.take().unwrap().read_to_end(&mut out).unwrap();
    child.0.stderr.take().unwrap().read_to_end(&mut out).unwrap();
    (harmless(&out, &format!("{:?}", String::from_utf8_lossy(text))), child.0.wait().unwrap().code().unwrap())
}

#[test]
fn a_pasted_message_about_a_hostile_image_is_answered_harmlessly() {
    let stage = Stage::set();
    let mut found = 0;
    for path in &stage.paths {
        let hint = [b"[", path.as_os_str().as_bytes(), b"]?\n"].concat();
        let message = [b"Failed to get \"write\" lock\nIs another process using the image ", &*hint].concat();
        for arguments in [&[][..], &["--as", "vm"], &["--format", "json"]] {
            let (said, status) = paste(&message, arguments);
            assert!(status == 1 || status == 3, "{path:?}: {said}");
            found += usize::from(status == 1);
        }
        // An errno, a domain and a program are words of the sender's, too.
        let name = path.file_name().unwrap().as_bytes();
        let wrapped = [b"error: Failed to start domain '", name, b"'\n", &*message].concat();
        paste(&wrapped, &[]);
        paste(&[b"qemu-img: Failed to lock byte 101: ", name].concat(), &[]);
    }
    assert!(found > stage.paths.len(), "most are found by the name in the message: {found}");
}

#[test]
fn wait_and_hold_say_who_is_in_the_way_harmlessly() {
    let stage = Stage::set();
    for path in &stage.paths {
        // Raw, so that nothing below it is in question; the locks stay.
        fs::write(path, "").unwrap();
        let (out, err, status) = told(qlock_top().args(["wait", "--as", "vm", "--timeout", "1ms"]).arg(path));
        assert_eq!((out.as_str(), status), ("", 124), "{err}");
        assert!(err.contains("is held by"), "{err}");
        let (_, err, status) = told(qlock_top().args(["hold", "--as", "vm"]).arg(path));
        assert!(status == 1 && err.contains("is held by"), "{err}");
        let one_byte = ["hold", "--permissions", "write-unchanged", "--timeout", "1ms"];
        let (out, _, status) = told(qlock_top().args(one_byte).arg(path));
        assert!(status == 0 && out.starts_with("holding u/- on "), "{status} {out}");
        let mut command = qlock_top();
        command.args(["hold", "--permissions", "write-unchanged"]).arg(path).arg("--").arg(path);
        let (_, err, status) = told(&mut command);
        assert!(status == 126 && err.starts_with("qlock-top: cannot run "), "{status} {err}");
    }
}

#[test]
fn errors_about_hostile_paths_and_arguments_are_harmless() {
    let images = Images::new();
    for attack in attacks() {
        let name = OsStr::from_bytes(&attack);
        let at = |sub: &str| images.path(sub).join(name);
        for sub in ["missing", "directory", "fifo", "file"] {
            fs::create_dir_all(images.path(sub)).unwrap();
        }
        fs::create_dir_all(at("directory")).unwrap();
        nix::unistd::mkfifo(&at("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        fs::write(at("file"), "not toml \x1b[2J = [").unwrap();
        for (path, status) in [(at("missing"), 4), (at("fifo"), 2), (at("file").join("below"), 4)] {
            for arguments in [
                &["list"][..],
                &["watch"],
                &["why"],
                &["wait", "--as", "vm"],
                &["hold", "--as", "vm"],
                &["hold", "--permissions", "write"],
            ] {
                let (out, err, found) = told(qlock_top().args(arguments).arg(&path));
                assert_eq!((out.as_str(), found), ("", status), "{arguments:?} {path:?}: {err}");
                assert!(err.starts_with("qlock-top: "), "{err}");
            }
        }
        told(qlock_top().arg("why").arg(at("directory")));
        told(qlock_top().args(["hold", "--as", "vm"]).arg(at("directory")));
        told(qlock_top().arg("list").arg("--config").arg(at("missing")));
        told(qlock_top().arg("list").arg("--config").arg(at("file")));
        told(qlock_top().args(["list", "/proc/self/exe"]).arg("--proc-root").arg(at("missing")));
    }
}

#[test]
fn an_argument_that_is_none_is_told_harmlessly() {
    // What a shell makes of `qlock-top list *` in a directory of somebody else's.
    let images = Images::new();
    for attack in attacks() {
        let name = OsStr::from_bytes(&attack);
        let dashed = |dashes: &str| OsString::from_vec([dashes.as_bytes(), &attack].concat());
        for argument in [name.to_owned(), dashed("-"), dashed("--"), dashed("--format="), dashed("--interval=")] {
            for command in [&[][..], &["list"], &["watch"], &["why"], &["why", "--as"], &["demo"]] {
                let mut started = qlock_top();
                started.args(command).arg(&argument).current_dir(images.dir());
                let (_, err, _) = told(&mut started);
                assert!(!err.contains("\nDANGER"), "{argument:?}: {err}");
            }
        }
    }
}

#[test]
fn after_two_dashes_a_name_that_looks_like_an_option_is_an_image() {
    let images = Images::new();
    for name in ["-rf", "--help", "-", "--"] {
        images.raw(name);
        let (text, _, status) =
            told(qlock_top().args(["list", "--format", "json", "--", name]).current_dir(images.dir()));
        assert_eq!((status, json(&text)["images"][0]["path"].as_str()), (0, Some(name)));
    }
}

#[test]
fn a_path_as_long_as_a_path_can_be_is_shown_and_a_longer_one_is_told() {
    let images = Images::new();
    // PATH_MAX counts the zero at the end; a directory must leave room for the name of a file.
    let mut directory = images.dir().to_owned();
    while directory.as_os_str().len() < 4095 - 250 {
        directory.push("d".repeat(200.min(4095 - 200 - directory.as_os_str().len())));
    }
    fs::create_dir_all(&directory).unwrap();
    let path = directory.join("i".repeat(4095 - 1 - directory.as_os_str().len()));
    assert_eq!(path.as_os_str().len(), 4095);
    fs::write(&path, qcow2(b"base")).unwrap();
    let longest = vec![path.clone()];
    let listed = |text: &str| -> Vec<Vec<u8>> {
        json(text)["images"].as_array().unwrap().iter().map(|i| exact(i, "path")).collect()
    };
    let (text, _, status) = told(qlock_top().args(["list", "--format", "json", "--recursive"]).arg(images.dir()));
    assert!(listed(&text) == bytes_of(&longest) && status == 0);
    let (table, _, _) = told(qlock_top().arg("list").arg(&path));
    assert!(table.contains(path.to_str().unwrap()), "on paper nothing is cut");
    told(qlock_top().arg("why").arg(&path));

    // Beyond what a path can say: reached step by step, as nobody but its owner can.
    let script = "cd \"$1\" && mkdir \"$2\" && cd -P \"$2\" && : > image.raw";
    run(Command::new("sh").arg("-c").arg(script).arg("sh").arg(&directory).arg("e".repeat(250)));
    let (text, err, status) = told(qlock_top().args(["list", "--format", "json", "--recursive"]).arg(images.dir()));
    assert!(listed(&text) == bytes_of(&longest));
    assert_eq!(status, 3, "what cannot be listed is told: {err:?}");
    assert!(err.contains("File name too long"), "{err}");
}

/// What a program wrote to a terminal, taken apart.
#[derive(Debug, Default)]
struct Written {
    /// Parameters and final byte of each CSI sequence.
    controls: Vec<String>,
    /// The content of each OSC.
    commands: Vec<String>,
    /// Everything else that begins with ESC: the byte behind it.
    other: Vec<char>,
    text: String,
}

fn take_apart(raw: &[u8]) -> Written {
    let text = String::from_utf8(raw.to_vec()).unwrap();
    let mut written = Written::default();
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        match (c, if c == '\x1b' { rest.next() } else { None }) {
            (_, Some('[')) => {
                let mut sequence = String::new();
                for c in rest.by_ref() {
                    sequence.push(c);
                    if ('@'..='~').contains(&c) {
                        break;
                    }
                }
                written.controls.push(sequence);
            }
            (_, Some(']')) => {
                let mut command = String::new();
                while let Some(c) = rest.next() {
                    match c {
                        '\x07' => break,
                        '\x1b' => {
                            assert_eq!(rest.next(), Some('\\'), "{command}");
                            break;
                        }
                        c => command.push(c),
                    }
                }
                written.commands.push(command);
            }
            (_, Some(c)) => written.other.push(c),
            (c, None) => written.text.push(c),
        }
    }
    written
}

/// Nothing but what the program itself may say to a terminal.
fn assert_tame(raw: &[u8]) -> Written {
    let written = take_apart(raw);
    let mut text = written.text.chars();
    assert_eq!(text.find(|c| is_treacherous(*c)), None, "cells hold no control character: frames move by CSI");
    assert_eq!(written.other, []);
    for sequence in &written.controls {
        let known = match sequence.chars().last().unwrap() {
            'm' | 'H' => true,
            'J' => sequence == "2J",
            'h' | 'l' => sequence.starts_with('?'),
            _ => false,
        };
        assert!(known, "{sequence:?}");
    }
    for command in &written.commands {
        assert!(command.starts_with("52;c;"), "neither title nor anything else is set: {command:?}");
    }
    written
}

fn base64(text: &str) -> Vec<u8> {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digits = text.bytes().filter(|b| *b != b'=').map(|b| DIGITS.iter().position(|d| *d == b).unwrap() as u32);
    let (mut out, mut bits, mut count) = (Vec::new(), 0u32, 0);
    for digit in digits {
        (bits, count) = (bits << 6 | digit, count + 6);
        if count >= 8 {
            count -= 8;
            out.push((bits >> count & 0xff) as u8);
        }
    }
    out
}

/// Whether any shell would take every word of `command` as it stands: outside of single quotes nothing but plain
/// characters. `$'` may begin a quotation; a shell that does not know it, such as dash, must find its end all the same.
fn is_plain_for_a_shell(command: &str) -> bool {
    let mut quoted = false;
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:@%+=, ".contains(c);
    let mut rest = command.chars().peekable();
    while let Some(c) = rest.next() {
        match c {
            '\'' => quoted = !quoted,
            '\\' if !quoted => {
                if rest.next() != Some('\'') {
                    return false;
                }
            }
            '$' if !quoted && rest.peek() == Some(&'\'') => {}
            c if quoted || plain(c) => {}
            _ => return false,
        }
    }
    !quoted
}

/// Whether `command` is one of those that this program makes, with nothing in them that a shell would act on.
fn is_safe_command(command: &str) -> bool {
    if command.chars().any(is_treacherous) {
        return false;
    }
    let is_number = |n: &str| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit());
    if let Some(rest) = command.strip_prefix("[ \"$(sed 's/.*) //' /proc/") {
        let Some((pid, rest)) = rest.split_once("/stat | cut -d' ' -f20)\" = ") else { return false };
        let Some((start, kill)) = rest.split_once(" ] && kill ") else { return false };
        return is_number(pid) && is_number(start) && kill == pid;
    }
    if let Some((kubectl, pod)) = command.split_once(" -o json | grep -B20 ") {
        return is_plain_for_a_shell(kubectl) && is_plain_for_a_shell(pod);
    }
    // A comment ends with its line, and there is no other.
    command.starts_with("# ") || is_plain_for_a_shell(command)
}

#[test]
fn the_dashboard_draws_hostile_names_as_text_whatever_is_opened() {
    let stage = Stage::set();
    let arguments = [stage.images.dir().to_str().unwrap(), "--recursive"];
    for (ascii, columns, rows) in [(&[][..], 120, 40), (&["--ascii"], 60, 20)] {
        let pty = Pty::start(PROGRAM, &[&arguments[..], ascii].concat(), &[], columns, rows);
        pty.wait_for(&format!("{} images", stage.paths.len()));
        pty.wait_for("1 Bytes");
        let mut keys = String::from("p");
        // Each panel of each row, as a process and as an image; then the lists.
        keys.push_str(&"j".repeat(stage.paths.len()));
        keys.push('p');
        for _ in &stage.paths {
            keys.push_str("12345j");
        }
        for key in keys.chars() {
            pty.keys(&key.to_string());
        }
        // ESC and a key at once would be another key.
        pty.keys("2\r");
        pty.wait_for("goes back");
        pty.keys("f");
        pty.wait_for("findings, worst first");
        pty.keys("q");
        let mut pty = pty;
        pty.wait_for_end();
        assert_tame(&pty.raw());
    }
}

#[test]
fn no_name_is_wider_or_narrower_on_the_screen_than_it_was_taken_for() {
    // The emulator leaves U+FFFD out, which stands for what is no UTF-8, also at the end of a name that the kernel cut.
    let is_text = |bytes: &[u8]| std::str::from_utf8(bytes).is_ok();
    let whole = attacks().into_iter().filter(|a| is_text(a) && is_text(&a[..a.len().min(15)]));
    let stage = Stage::of(whole.collect());
    let pty = Pty::start(PROGRAM, &[stage.images.dir().to_str().unwrap(), "--recursive"], &[], 120, 40);
    pty.wait_for(&format!("{} images", stage.paths.len()));
    let frame_after = |keys: &str| {
        let written = pty.written();
        pty.keys(keys);
        // A frame ends with the style of before.
        wait_for("a frame", || (pty.written() > written && pty.raw().ends_with(b"\x1b[0m")).then_some(()));
        let mut screen = vt100::Parser::new(40.try_into().unwrap(), 120.try_into().unwrap(), 0);
        screen.process(&pty.raw());
        screen.screen().contents().lines().map(|l| l.trim_end().to_owned()).collect::<Vec<_>>()
    };
    pty.wait_for("> ");
    frame_after("2");
    for _ in 1..stage.paths.len() {
        // What has been drawn over the frame before is what is drawn on an empty screen.
        let over = frame_after("j");
        assert_eq!(over, frame_after("\x0c"));
    }
}

#[test]
fn what_is_copied_of_a_hostile_row_holds_nothing_that_a_terminal_or_a_shell_acts_on() {
    let stage = Stage::set();
    let pty = Pty::start(PROGRAM, &[stage.images.dir().to_str().unwrap(), "--recursive"], &[], 120, 40);
    pty.wait_for(&format!("{} images", stage.paths.len()));
    // Path, pid, two commands, JSON.
    let mut copied = 0;
    for _ in &stage.paths {
        for item in 1..=5 {
            pty.keys(&format!("c{item}"));
            copied = wait_for("the clipboard", || {
                let so_far = whole_payloads(&pty.raw());
                (so_far > copied).then_some(so_far)
            });
        }
        pty.keys("j");
    }
    let raw = pty.raw();
    drop(pty);
    let written = assert_tame(&raw);
    assert_eq!(written.commands.len(), stage.paths.len() * 5);
    for (at, payload) in written.commands.iter().enumerate() {
        let text = harmless(&base64(payload.strip_prefix("52;c;").unwrap()), payload);
        assert!(!text.contains('\n'), "one line, or a shell runs it when pasted: {text:?}");
        match at % 5 {
            1 => assert!(text.parse::<i32>().is_ok(), "{text}"),
            2 | 3 => assert!(is_safe_command(&text), "{text}"),
            4 => drop(json(&text)),
            _ => {}
        }
    }
}

/// How many clipboard sequences have come whole.
fn whole_payloads(raw: &[u8]) -> usize {
    const OPENING: &[u8] = b"\x1b]52;c;";
    let mut found = 0;
    let mut rest = raw;
    while let Some(at) = rest.windows(OPENING.len()).position(|w| w == OPENING) {
        rest = &rest[at + OPENING.len()..];
        let Some(end) = rest.iter().position(|b| *b == b'\x07' || *b == b'\x1b') else { break };
        found += 1;
        rest = &rest[end..];
    }
    found
}

/// A process as `/proc` might describe it.
fn facts(command: &str, vm: Option<&str>, cgroup: &str) -> ProcessFacts {
    ProcessFacts {
        id: ProcessId { pid: 42, start_time: 1042 },
        parent: 1,
        command: command.to_owned(),
        command_line: command.to_owned(),
        uid: 0,
        user: "root".to_owned(),
        vm: vm.map(str::to_owned),
        unit: unit(cgroup),
        container: container(cgroup),
        started: None,
    }
}

#[test]
fn commands_about_a_holder_are_safe_whatever_its_vm_and_cgroup_are_called() {
    let id = "0123456789abcdef".repeat(4);
    for attack in attacks() {
        let name = String::from_utf8_lossy(&attack).into_owned();
        for cgroup in [
            format!("/{name}"),
            format!("/machine.slice/machine-qemu-{name}.scope"),
            format!("/machine.slice/machine-qemu-1.scope/{name}"),
            format!("/system.slice/qemu-{name}.service"),
            format!("/{name}.scope"),
            format!("/1{name}.scope"),
            format!("/lxc.payload.{name}"),
            format!("/lxc/{name}"),
            // Whoever may make a cgroup may write a pod into its name.
            format!("/user.slice/user@1000.service/lxc/a pod {name}"),
            format!("/lxc.payload.a pod {name}.scope"),
            format!("/kubepods/pod{name}/{id}"),
            format!("/docker-{id}.scope/{name}"),
        ] {
            let advice = advice(&facts("qemu-system-x86", Some(&name), &cgroup));
            for command in [&advice.inspect, &advice.release] {
                assert!(is_safe_command(command), "{cgroup:?}: {command:?}");
            }
        }
    }
}

#[test]
fn a_quoted_name_is_one_word_for_every_shell_and_the_name_itself_for_bash() {
    if !have(&["bash", "sh"]) {
        return;
    }
    for attack in attacks() {
        let name = String::from_utf8_lossy(&attack).into_owned();
        let quoted = quote(&name);
        assert!(is_plain_for_a_shell(&quoted) && !quoted.chars().any(is_treacherous), "{name:?}: {quoted}");
        for (shell, exact) in [("bash", true), ("sh", name == quoted || !quoted.starts_with('$'))] {
            let script = format!("set -- {quoted}; printf '%s|%s' $# \"$1\"");
            let said = run(Command::new(shell).args(["-c", &script]).env("LC_ALL", "C.UTF-8"));
            assert!(
                if exact { said == format!("1|{name}") } else { said.starts_with("1|") },
                "{shell} {quoted}: {said:?}"
            );
        }
    }
}

/// A cgroup of the test's, gone with it.
struct Cgroup(PathBuf);

impl Cgroup {
    /// Below the unified hierarchy; `None` where none may be made.
    fn make(name: &str) -> Option<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let line = mounts.lines().find(|l| l.contains(" - cgroup2 "))?;
        let path = Path::new(line.split(' ').nth(4)?).join(name);
        fs::create_dir_all(&path).ok()?;
        Some(Self(path))
    }

    fn take_in(&self, process: &Running) -> bool {
        fs::write(self.0.join("cgroup.procs"), process.pid().to_string()).is_ok()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // A process that was just ended leaves its cgroup a moment later.
        for _ in 0..400 {
            match fs::remove_dir(&self.0) {
                Err(e) if e.raw_os_error() == Some(nix::libc::EBUSY) => std::thread::sleep(Duration::from_millis(5)),
                _ => break,
            }
        }
        // Those above that it was made with; the hierarchy itself cannot be removed.
        let mut above = self.0.parent();
        while let Some(directory) = above.filter(|d| fs::remove_dir(d).is_ok()) {
            above = directory.parent();
        }
    }
}

#[test]
fn a_hostile_cgroup_is_shown_and_advised_about_harmlessly() {
    if !am_root() {
        return;
    }
    let (images, programs) = (Images::new(), Images::new());
    for (i, name) in [
        "machine-qemu\x1b]0;PWNED\x07$(reboot).scope",
        "qemu\u{202e}'; reboot #\x1b[2J.service",
        "lxc.payload.\u{9b}31m\r",
        "qlock-test-lxc/lxc/a pod $(reboot)\x1b[2J",
    ]
    .into_iter()
    .enumerate()
    {
        let image = images.raw(&format!("{i}.raw"));
        let Some(cgroup) = Cgroup::make(name) else {
            return left_out("no cgroup can be made");
        };
        let process = holder(programs.dir(), &image, "cw/w", format!("qemu{i}").as_bytes(), b"it's $(reboot)\x1b[2J");
        if !cgroup.take_in(&process) {
            return left_out("no process can be moved to a cgroup");
        }
        let (text, _, status) = told(qlock_top().args(["why", "--as", "vm"]).arg(&image));
        assert!(status == 1 && text.contains("way out: stop "), "{text}");
        let commands = text.lines().filter_map(|l| l.trim_start().strip_prefix("way out: stop ")?.split_once(": "));
        for (_, command) in commands {
            assert!(is_safe_command(command), "{name:?}: {command}");
        }
        let (text, _, _) = told(qlock_top().args(["list", "--format", "json"]).arg(&image));
        let holder = &json(&text)["images"][0]["holders"][0];
        let shown = format!("{} {}", holder["unit"].as_str().unwrap_or(""), holder["container"].as_str().unwrap_or(""));
        assert!(name.split('/').any(|part| shown.contains(part)) || shown.contains("lxc "), "{holder}");
        let pty = Pty::start(PROGRAM, &[image.to_str().unwrap()], &[], 120, 40);
        pty.wait_for("1 image ");
        pty.keys("2");
        pty.wait_for("uses consistent read");
        pty.keys("p");
        let raw = pty.raw();
        drop(pty);
        assert_tame(&raw);
        drop(process);
    }
}
