//! Do names that somebody else chose act on the terminal of whoever looks at the dashboard, on a clipboard, or on a shell
//! into which an advised command is typed?
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/attacks.rs"]
mod attacks;
#[path = "support/pty.rs"]
mod pty;
mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use attacks::{Stage, attacks, harmless, holder, json, told};
use pty::Pty;
use qlock::linux::identity::ProcessId;
use qlock::linux::process::{ProcessFacts, container, unit};
use qlock::monitor::advice::{advice, quote};
use qlock::text::is_treacherous;
use support::{Images, Running, am_root, have, left_out, qlock_top, run, wait_for};

const PROGRAM: &str = env!("CARGO_BIN_EXE_qlock-top");

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
