//! Does `qlock-top hold` take, keep, pass on and let go as it says, whatever ends it?
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/pty.rs"]
mod pty;
mod support;

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output, Stdio};

use nix::fcntl::OFlag;
use nix::libc::SYS_write;
use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pty::Pty;
use qlock::protocol::Access;
use support::{Images, Running, have, holding, locked, output, qlock_top, wait_for};

const PROGRAM: &str = env!("CARGO_BIN_EXE_qlock-top");

/// Goes on for as long as `hold`, which started it, is there: no test leaves it behind.
const GO_ON: &str = "echo ready; while kill -0 $PPID 2>/dev/null; do sleep 0.01; done";

fn one_image() -> (Images, PathBuf) {
    let images = Images::new();
    let path = images.raw("a.raw");
    (images, path)
}

fn hold(image: &Path, words: &[&str]) -> Command {
    let mut command = qlock_top();
    command.arg("hold").arg(image).args(words);
    command
}

/// Somebody else: `hold` as the fixture, which shows `access`.
fn holder(image: &Path, words: &[&str], access: &str) -> Running {
    holding(&mut hold(image, words), image, access)
}

/// `hold --as vm` with a shell script, and the line that the script says when it has begun.
fn with_script(image: &Path, options: &[&str], script: &str) -> (Running, String) {
    let mut command = hold(image, &["--as", "vm"]);
    command.args(options).args(["--", "sh", "-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut running = Running::spawn(&mut command);
    let mut line = String::new();
    BufReader::new(running.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
    (running, line.trim_end().to_owned())
}

fn shows(image: &Path, access: &str) {
    let expected: Access = access.parse().unwrap();
    wait_for(&format!("{access} on {}", image.display()), || (locked(image) == expected).then_some(()));
}

fn end_of(running: &mut Running) -> ExitStatus {
    wait_for("the end of hold", || running.0.try_wait().unwrap())
}

fn send(running: &Running, signal: Signal) {
    kill(Pid::from_raw(running.pid()), signal).unwrap();
}

fn said(output: &Output) -> (String, i32) {
    (String::from_utf8_lossy(&output.stderr).into_owned(), output.status.code().unwrap())
}

/// Ended is enough: whoever inherits a process may take its time to reap it.
fn is_running(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.is_ok_and(|s| s.rsplit(") ").next().is_some_and(|rest| !rest.starts_with('Z')))
}

#[test]
fn a_refused_hold_leaves_no_byte_behind_runs_nothing_and_names_who_is_in_the_way() {
    let (images, path) = one_image();
    let marker = images.path("marker");
    let other = holder(&path, &["--as", "vm"], "cw/w");
    for (options, status) in [(&["--as", "vm"][..], 1), (&["--as", "vm", "-E", "7"], 7), (&["--as", "nbd"], 1)] {
        let refused = output(hold(&path, options).args(["--", "touch"]).arg(&marker));
        let (told, code) = said(&refused);
        assert_eq!(code, status, "{told}");
        let who = format!("qlock-top {}", other.pid());
        for part in ["Failed to get \"write\" lock", "byte 201 (denies write)", path.to_str().unwrap(), &who] {
            assert!(told.contains(part), "{part}: {told}");
        }
        assert!(refused.stdout.is_empty() && !marker.exists());
        assert_eq!(locked(&path), "cw/w".parse().unwrap());
    }
    other.end();
    assert_eq!(locked(&path), Access::NONE);
}

#[test]
fn the_status_of_the_command_is_passed_on() {
    let (images, path) = one_image();
    let no_program = images.path("no\nprogram");
    for (words, status) in [
        (&["true"][..], 0),
        (&["sh", "-c", "exit 7"], 7),
        (&["sh", "-c", "exit 255"], 255),
        // What follows is the command's, whatever it looks like.
        (&["sh", "-c", "exit $#", "--", "--as", "-E", "--"], 3),
        (&["sh", "-c", "kill -TERM $$"], 143),
        (&["sh", "-c", "kill -KILL $$"], 137),
        (&[no_program.to_str().unwrap()], 127),
        (&[path.to_str().unwrap()], 126),
        (&[images.dir().to_str().unwrap()], 126),
        // The locks are there while the command runs.
        (&[PROGRAM, "hold", path.to_str().unwrap(), "--as", "vm", "-E", "9", "--", "true"], 9),
    ] {
        let ended = output(hold(&path, &["--as", "vm", "--"]).args(words));
        let (told, code) = said(&ended);
        assert_eq!(code, status, "{words:?}: {told}");
        assert!(ended.stdout.is_empty(), "the output is the command's: {words:?}");
        assert_eq!(status == 126 || status == 127, told.contains("cannot run"), "{told}");
        assert_eq!(locked(&path), Access::NONE, "{words:?}");
    }
    let (told, _) = said(&output(hold(&path, &["--as", "vm", "--"]).arg(&no_program)));
    assert!(told.contains("no\\nprogram"), "{told}");
}

#[test]
fn the_command_gets_signals_as_they_were() {
    let (_images, path) = one_image();
    let ask = ["grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status"];
    let alone = output(Command::new(ask[0]).args(&ask[1..]));
    let held = output(hold(&path, &["--as", "vm", "--"]).args(ask));
    assert!(!alone.stdout.is_empty());
    assert_eq!(String::from_utf8(held.stdout).unwrap(), String::from_utf8(alone.stdout).unwrap());
}

#[test]
fn the_command_does_not_inherit_the_locks_and_goes_on_without_them() {
    let (_images, path) = one_image();
    let (mut running, command) = with_script(&path, &[], "echo $$; read word");
    assert_eq!(locked(&path), "cw/w".parse().unwrap());
    let image = path.canonicalize().unwrap();
    for link in std::fs::read_dir(format!("/proc/{command}/fd")).unwrap() {
        assert_ne!(std::fs::read_link(link.unwrap().path()).unwrap(), image);
    }
    running.0.kill().unwrap();
    shows(&path, "-/-");
    assert!(is_running(&command));
    drop(running.0.stdin.take());
    wait_for("the end of the command", || (!is_running(&command)).then_some(()));
}

#[test]
fn inherited_locks_stay_until_the_command_and_all_that_it_started_have_ended() {
    let (_images, path) = one_image();
    let (mut running, command) = with_script(&path, &["--inherit"], "echo $$; read word");
    running.0.kill().unwrap();
    // Waiting for a child closes its standard input; asking for its end does not.
    end_of(&mut running);
    assert!(is_running(&command));
    assert_eq!(locked(&path), "cw/w".parse().unwrap());
    drop(running.0.stdin.take());
    shows(&path, "-/-");

    // A shell gives what it starts with & no standard input, unless it is told to.
    let (mut running, _) = with_script(&path, &["--inherit"], "exec 3<&0; cat <&3 >&2 & echo started; exit 3");
    assert_eq!(end_of(&mut running).code(), Some(3));
    assert_eq!(locked(&path), "cw/w".parse().unwrap());
    drop(running.0.stdin.take());
    shows(&path, "-/-");
}

#[test]
fn whatever_ends_hold_ends_the_lock() {
    for signal in [Signal::SIGKILL, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGINT] {
        let (_images, path) = one_image();
        let mut running = holder(&path, &["--as", "vm"], "cw/w");
        send(&running, signal);
        let status = end_of(&mut running);
        assert_eq!(locked(&path), Access::NONE, "{signal}");
        match signal {
            Signal::SIGKILL => assert_eq!(status.signal(), Some(9)),
            other => assert_eq!(status.code(), Some(128 + other as i32)),
        }
    }
}

/// `hold --as vm` on a terminal, in the session that it leads, as `ssh -t HOST qlock-top hold ..` starts it.
fn on_a_terminal(path: &Path, words: &[&str], text: &str) -> Pty {
    let all = [&["hold", path.to_str().unwrap(), "--as", "vm"], words].concat();
    let pty = Pty::start(PROGRAM, &all, &[], 100, 30);
    pty.wait_for(text);
    shows(path, "cw/w");
    pty
}

#[test]
fn a_closed_terminal_ends_the_lock() {
    let (_images, path) = one_image();
    let mut pty = on_a_terminal(&path, &[], "holding cw/w on");
    pty.hang_up();
    shows(&path, "-/-");
    assert_eq!(pty.wait_for_end().code(), Some(128 + Signal::SIGHUP as i32));
}

#[test]
fn a_closed_terminal_ends_the_command_and_with_it_the_lock() {
    let (_images, path) = one_image();
    let mut pty = on_a_terminal(&path, &["--", "sh", "-c", GO_ON], "ready");
    pty.hang_up();
    shows(&path, "-/-");
    assert_eq!(pty.wait_for_end().code(), Some(128 + Signal::SIGHUP as i32));
}

#[test]
fn ctrl_c_reaches_the_command_once_and_its_status_is_passed_on() {
    if !have(&["python3"]) {
        return;
    }
    let (_images, path) = one_image();
    // Ends with the number of times that it has been told.
    let script = "import signal, sys, time\ntold = []\n\
                  signal.signal(signal.SIGINT, lambda *_: (told.append(1), print('told', len(told), flush=True)))\n\
                  signal.signal(signal.SIGTERM, lambda *_: sys.exit(40 + len(told)))\n\
                  print('ready', flush=True)\nwhile True: time.sleep(0.01)";
    let mut pty = on_a_terminal(&path, &["--", "python3", "-c", script], "ready");
    // A second time that follows at once may be lost in the first: not every time.
    for time in 1..=5 {
        pty.keys("\u{3}");
        pty.wait_for(&format!("told {time}"));
    }
    send(&pty.running, Signal::SIGTERM);
    assert_eq!(pty.wait_for_end().code(), Some(45));
    assert_eq!(locked(&path), Access::NONE);
}

#[test]
fn a_signal_to_hold_is_passed_on_and_the_commands_status_is_that_of_hold() {
    for (number, signal) in [Signal::SIGTERM, Signal::SIGHUP].into_iter().enumerate() {
        let (_images, path) = one_image();
        let trapped = 40 + i32::try_from(number).unwrap();
        let name = signal.as_str().trim_start_matches("SIG");
        for (script, status) in
            [(format!("trap 'exit {trapped}' {name}; {GO_ON}"), trapped), (GO_ON.to_owned(), 128 + signal as i32)]
        {
            let (mut running, _) = with_script(&path, &[], &script);
            send(&running, signal);
            assert_eq!(end_of(&mut running).code(), Some(status), "{signal}");
            assert_eq!(locked(&path), Access::NONE, "{signal}");
        }
    }
}

#[test]
fn the_timeout_lets_go_with_0_and_ends_a_command_with_124() {
    let (_images, path) = one_image();
    let timeout = ["--as", "vm", "--timeout", "100ms"];
    let ended = output(&mut hold(&path, &timeout));
    assert_eq!(ended.status.code(), Some(0));
    assert_eq!(String::from_utf8(ended.stdout).unwrap(), format!("holding cw/w on {}\n", path.display()));
    assert_eq!(locked(&path), Access::NONE);
    // One that ends well when it is told to is late all the same.
    for script in [GO_ON.to_owned(), format!("trap 'exit 0' TERM; {GO_ON}")] {
        assert_eq!(output(hold(&path, &timeout).args(["--", "sh", "-c", &script])).status.code(), Some(124));
        assert_eq!(locked(&path), Access::NONE);
    }
    let in_time = output(&mut hold(&path, &["--as", "vm", "--timeout", "1h", "--", "sh", "-c", "exit 3"]));
    assert_eq!(in_time.status.code(), Some(3));
}

#[test]
fn a_time_that_no_clock_can_count_is_long_and_no_fault() {
    let (_images, path) = one_image();
    let long = "5000000000000000h";
    for option in ["--wait", "--timeout"] {
        let ended = output(&mut hold(&path, &["--as", "vm", option, long, "--", "true"]));
        let (told, code) = said(&ended);
        assert!(code == 0 || code == 2, "{option}: {code}: {told}");
    }
    let mut running = Running::spawn(hold(&path, &["--as", "vm", "--timeout", long]).stdout(Stdio::null()));
    // Taken at its word, or refused as wrong usage.
    let code = wait_for("an answer", || match running.0.try_wait().unwrap() {
        Some(status) => Some(status.code()),
        None => (locked(&path) == "cw/w".parse().unwrap()).then_some(Some(2)),
    });
    assert_eq!(code, Some(2));
}

#[test]
fn a_command_that_does_not_listen_is_ended_by_force() {
    let (_images, path) = one_image();
    let script = format!("trap '' TERM; {GO_ON}");
    let (mut running, _) = with_script(&path, &["--timeout", "100ms"], &script);
    assert_eq!(end_of(&mut running).code(), Some(124));
    assert_eq!(locked(&path), Access::NONE);
}

/// A terminal that takes nothing more, because nobody reads it: the other end, and what to write to.
fn full_terminal() -> (File, File) {
    let master = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let open = |flags: OFlag| File::options().write(true).custom_flags(flags.bits()).open(ptsname_r(&master).unwrap());
    let mut filler = open(OFlag::O_NOCTTY | OFlag::O_NONBLOCK).unwrap();
    let mut full = 0;
    wait_for("a full terminal", || {
        let before = full;
        // The kernel moves some of it on a moment later, which makes room again.
        full += 1;
        while filler.write(&[0; 4096]).is_ok() || filler.write(&[0]).is_ok() {
            full = 0;
        }
        (before == 20).then_some(())
    });
    let slave = open(OFlag::O_NOCTTY).unwrap();
    (File::from(std::os::fd::OwnedFd::from(master)), slave)
}

#[test]
fn the_timeout_lets_go_though_nobody_reads_the_terminal() {
    let (_images, path) = one_image();
    let (master, slave) = full_terminal();
    let mut running = Running::spawn(hold(&path, &["--as", "vm", "--timeout", "100ms"]).stdout(slave));
    // It says what it holds when it holds it: some thread of it writes, or it has ended in time.
    let tasks = format!("/proc/{}/task", running.pid());
    let writes = |task: std::fs::DirEntry| {
        let call = std::fs::read_to_string(task.path().join("syscall"));
        call.is_ok_and(|now| now.starts_with(&format!("{SYS_write} 0x1 ")))
    };
    wait_for("the end of the lock", || match running.0.try_wait().unwrap() {
        Some(_) => Some(()),
        None => (std::fs::read_dir(&tasks).ok()?.flatten().any(writes) && locked(&path).is_empty()).then_some(()),
    });
    assert_eq!(locked(&path), Access::NONE);
    drop(master);
    assert_eq!(end_of(&mut running).code(), Some(0));

    let (_master, slave) = full_terminal();
    let mut running =
        Running::spawn(hold(&path, &["--as", "vm", "--timeout", "100ms", "--", "cat", "/dev/zero"]).stdout(slave));
    assert_eq!(end_of(&mut running).code(), Some(124));
    assert_eq!(locked(&path), Access::NONE);
}

#[test]
fn a_signal_ends_it_though_nobody_reads_what_it_says() {
    let (_images, path) = one_image();
    let (_master, slave) = full_terminal();
    let mut running = Running::spawn(hold(&path, &["--as", "vm"]).stdout(slave));
    shows(&path, "cw/w");
    send(&running, Signal::SIGTERM);
    shows(&path, "-/-");
    assert_eq!(end_of(&mut running).code(), Some(143));
}

#[test]
fn it_holds_though_what_it_says_has_no_reader() {
    let (_images, path) = one_image();
    let mut running = Running::spawn(hold(&path, &["--as", "vm"]).stdout(Stdio::piped()));
    drop(running.0.stdout.take());
    shows(&path, "cw/w");
    send(&running, Signal::SIGTERM);
    assert_eq!(end_of(&mut running).code(), Some(143));
}

#[test]
fn read_only_takes_no_lock_and_runs_nothing() {
    let (images, path) = one_image();
    let settings = images.path("settings.toml");
    std::fs::write(&settings, "read-only = true\n").unwrap();
    let marker = images.path("marker");
    for words in [vec!["--read-only"], vec!["--config", settings.to_str().unwrap()]] {
        let refused = output(hold(&path, &["--as", "vm"]).args(&words).args(["--", "touch"]).arg(&marker));
        let (told, code) = said(&refused);
        assert!(code == 2 && told.contains("read-only"), "{told}");
        assert!(!marker.exists() && locked(&path) == Access::NONE);
    }
}

#[test]
fn a_program_is_held_on_the_image_and_on_the_files_below_it() {
    if !have(&["qemu-img"]) {
        return;
    }
    let images = Images::new();
    let (base, middle) = (images.qcow2("base.qcow2"), images.overlay("middle.qcow2", "base.qcow2"));
    let top = images.overlay("top.qcow2", "middle.qcow2");
    let ended = output(&mut hold(&top, &["--as", "vm", "--timeout", "1ms"]));
    let lines = format!(
        "holding cwr/wr on {}\nholding c/wr on {}\nholding c/wr on {}\n",
        top.display(),
        middle.canonicalize().unwrap().display(),
        base.canonicalize().unwrap().display()
    );
    assert_eq!(String::from_utf8(ended.stdout).unwrap(), lines);
    let running = holder(&top, &["--as", "vm"], "cwr/wr");
    shows(&middle, "c/wr");
    shows(&base, "c/wr");
    running.end();
    for path in [&top, &middle, &base] {
        assert_eq!(locked(path), Access::NONE);
    }

    // Refused below, it lets go of what it had above.
    let other = holder(&base, &["--as", "io-as-raw"], "cw/-");
    let (told, code) = said(&output(&mut hold(&top, &["--as", "vm", "--", "true"])));
    assert_eq!(code, 1);
    for part in ["Failed to get shared \"write\" lock", "byte 101 (uses write)", "base.qcow2", &other.pid().to_string()]
    {
        assert!(told.contains(part), "{part}: {told}");
    }
    assert!(!told.contains("top.qcow2"), "{told}");
    assert_eq!((locked(&top), locked(&middle)), (Access::NONE, Access::NONE));
}

#[test]
fn it_is_refused_at_the_step_at_which_the_program_would_be() {
    if !have(&["qemu-img"]) {
        return;
    }
    let images = Images::new();
    let path = images.qcow2("a.qcow2");
    let _other = holder(&path, &["--permissions", "write", "--unshare", "write"], "w/w");
    // The first step of this one only reads, and meets byte 101; the second would have met byte 201 before.
    let (told, _) = said(&output(&mut hold(&path, &["--as", "commit-into-backing", "--", "true"])));
    assert!(told.contains("Failed to get shared \"write\" lock") && told.contains("byte 101"), "{told}");
    let (told, _) = said(&output(&mut hold(&path, &["--as", "vm", "--", "true"])));
    assert!(told.contains("Failed to get \"write\" lock") && told.contains("byte 201"), "{told}");
}

#[test]
fn bytes_are_chosen_one_by_one() {
    let (_images, path) = one_image();
    for (words, access) in [
        (&["--permissions", "write", "--unshare", "write"][..], "w/w"),
        (&["--permissions", "consistent-read,resize"], "cr/-"),
        (&["--unshare", "write-unchanged", "--unshare", "resize"], "-/ur"),
        (
            &["--permissions", "consistent-read,write,write-unchanged,resize", "--unshare", "write,consistent-read"],
            "cwur/cw",
        ),
    ] {
        holder(&path, words, access).end();
        assert_eq!(locked(&path), Access::NONE);
    }
}

#[test]
fn what_cannot_be_held_is_an_error_that_says_what_there_is() {
    let (images, path) = one_image();
    let file = |path: &Path| path.to_str().unwrap().to_owned();
    let (raw, missing, directory) = (file(&path), file(&images.path("missing")), file(images.dir()));
    let known = "consistent-read, write, write-unchanged, resize";
    for (words, status, part) in [
        (&[&raw, "--permissions", "read"][..], 2, known),
        (&[&raw, "--unshare", "read"], 2, known),
        (&[&raw, "--permissions", "graph-mod"], 2, known),
        (&[&raw, "--unshare", "write,graph-mod"], 2, "no QEMU since 7.0 takes it"),
        (&[&raw, "--as", "convert"], 2, "perhaps convert-into-existing, convert-source"),
        (&[&raw, "--as", "xyz"], 2, "known are amend, bench"),
        (&[&raw, "--as", "check"], 2, "check is not known for raw"),
        (&[&raw, "--as", "vm-incoming"], 2, "there is nothing to hold"),
        (&[&raw, "--as", "vm", "--permissions", "write"], 2, "cannot be used with"),
        (&[&raw], 2, "--as"),
        (&[&missing, "--as", "vm"], 4, "missing: No such file or directory"),
        (&[&missing, "--unshare", "write"], 4, "missing: No such file or directory"),
        (&[&directory, "--as", "vm"], 2, "neither a regular file nor a block device"),
        (&["/dev/null", "--unshare", "write"], 2, "neither a regular file nor a block device"),
    ] {
        let marker = images.path("marker");
        let (told, code) = said(&output(qlock_top().arg("hold").args(words).args(["--", "touch"]).arg(&marker)));
        assert!(code == status && told.contains(part), "{words:?}: {code}: {told}");
        assert!(!marker.exists() && locked(&path) == Access::NONE, "{words:?}");
    }
}

#[test]
fn a_timeout_lets_go_of_inherited_locks_too() {
    let (_images, path) = one_image();
    // Away from our pipe, which would else stay open.
    let script = "sleep 1000 >/dev/null 2>&1 & echo $!; wait";
    let ended = output(&mut hold(&path, &["--as", "vm", "--inherit", "--timeout", "100ms", "--", "sh", "-c", script]));
    let left_behind: i32 = String::from_utf8(ended.stdout).unwrap().trim().parse().unwrap();
    assert_eq!(ended.status.code(), Some(124));
    assert_eq!(locked(&path), Access::NONE);
    kill(Pid::from_raw(left_behind), Signal::SIGKILL).unwrap();
}

#[test]
fn one_who_ignores_the_end_of_its_children_is_told_before_anything_is_run() {
    let (images, path) = one_image();
    let marker = images.path("marker");
    let script = "trap '' CHLD; exec \"$@\"";
    let mut command = Command::new("bash");
    command.args(["-c", script, "bash", PROGRAM, "hold"]).arg(&path).args(["--as", "vm", "--", "touch"]).arg(&marker);
    let (told, code) = said(&output(&mut command));
    assert!(code == 2 && told.contains("SIGCHLD is ignored"), "{code}: {told}");
    assert!(!marker.exists());
}
