//! Do names that somebody else chose act on the terminal, the shell or the script of whoever looks?
//!
//! One list of attacks stands as file name, directory name, backing file, program, command line and VM name at once, and
//! every output is held against it: nothing treacherous comes out as text, and JSON gives back the exact bytes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/attacks.rs"]
mod attacks;
mod support;

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::process::{Command, Stdio};
use std::sync::mpsc;

use attacks::{Stage, attacks, bytes_of, exact, harmless, json, qcow2, sorted, told};
use support::{DEADLINE, Images, Running, qlock_top, run};

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
