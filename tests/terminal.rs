//! Does the dashboard show what is so on a real terminal, and give the terminal back whatever happens?
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/pty.rs"]
mod pty;
mod support;

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pty::Pty;
use qlock::hold::HeldAccess;
use support::{Images, have, holding, qemu_io, wait_for};

const PROGRAM: &str = env!("CARGO_BIN_EXE_qlock-top");

fn dashboard(images: &Images, columns: u16, rows: u16) -> Pty {
    Pty::start(PROGRAM, &[images.dir().to_str().unwrap()], &[], columns, rows)
}

fn three_images() -> Images {
    let images = Images::new();
    for name in ["a.raw", "b.raw", "c.raw"] {
        images.raw(name);
    }
    images
}

/// The terminal is as it was: modes, screen, cursor.
fn assert_given_back(pty: &Pty) {
    let (before, after) = (&pty.before, pty.termios());
    assert_eq!(before.local_flags, after.local_flags);
    assert_eq!(before.input_flags, after.input_flags);
    assert_eq!(before.output_flags, after.output_flags);
    assert_eq!(before.control_chars, after.control_chars);
    wait_for("the ordinary screen", || {
        pty.with_screen(|s| !s.alternate_screen() && !s.hide_cursor() && !s.bracketed_paste()).then_some(())
    });
}

#[test]
fn the_first_screen_shows_the_images_and_q_quits() {
    let images = three_images();
    let mut pty = dashboard(&images, 80, 24);
    pty.wait_for("3 images");
    for text in
        ["qlock-top", "IMAGE", "a.raw", "b.raw", "c.raw", "0 in use", "? help", "1 Bytes", "204 denies graph-mod"]
    {
        pty.wait_for(text);
    }
    assert!(pty.with_screen(|s| s.alternate_screen() && s.hide_cursor()));
    assert_ne!(pty.before.local_flags, pty.termios().local_flags, "raw mode");
    pty.keys("q");
    assert_eq!(pty.wait_for_end().code(), Some(0));
    assert_given_back(&pty);
}

#[test]
fn a_lock_shows_and_goes_while_one_looks() {
    if !have(&["qemu-io"]) {
        return;
    }
    let images = three_images();
    let path = images.path("b.raw");
    let pty = dashboard(&images, 120, 40);
    pty.wait_for("3 images");
    let holder = holding(&mut qemu_io(&["-f", "raw"], &path), &path, "cw/-");
    pty.wait_for(&format!("qemu-io {}", holder.pid()));
    let screen = pty.wait_for("1 in use");
    let row = screen.lines().find(|l| l.contains("b.raw")).unwrap();
    assert!(row.contains("# # . . .   . . . . .") && row.contains("writer, shared"), "{row}");
    pty.keys("j");
    let screen = pty.wait_for("100 uses consistent read");
    assert!(screen.contains("101 uses write"), "{screen}");
    holder.end();
    let screen = pty.wait_for("0 in use");
    assert!(!screen.contains("qemu-io"), "{screen}");
}

#[test]
fn the_cursor_stays_on_its_image() {
    let images = three_images();
    let pty = dashboard(&images, 80, 24);
    pty.wait_for("> a.raw");
    pty.keys("G");
    pty.wait_for("> c.raw");
    pty.keys("k");
    pty.wait_for("> b.raw");
    images.raw("aa.raw");
    pty.wait_for("4 images");
    pty.wait_for("> b.raw");
    std::fs::remove_file(images.path("b.raw")).unwrap();
    pty.wait_for("> c.raw");
    pty.keys("\x1b[A");
    pty.wait_for("> aa.raw");
}

#[test]
fn every_size_down_to_one_cell_is_survived() {
    let images = three_images();
    let mut pty = dashboard(&images, 120, 40);
    pty.wait_for("3 images");
    for (columns, rows) in [(80, 24), (60, 16), (40, 10), (200, 60), (2, 300), (300, 2), (1, 1)] {
        pty.resize(columns, rows);
    }
    pty.resize(30, 9);
    pty.wait_for("30x9 is too small: qlock-top\nneeds 40x10");
    pty.resize(40, 10);
    let screen = pty.wait_for("a.raw");
    assert!(screen.lines().all(|l| l.chars().count() <= 40), "{screen}");
    pty.resize(1, 1);
    pty.keys("?jjG");
    pty.resize(80, 24);
    pty.wait_for("Marks");
    pty.keys("\x0c\x1b");
    pty.wait_for("> a.raw");
    pty.keys("G");
    pty.wait_for("> c.raw");
    pty.keys("\x03");
    assert_eq!(pty.wait_for_end().code(), Some(0));
    assert_given_back(&pty);
}

#[test]
fn signals_end_it_and_give_the_terminal_back() {
    let images = three_images();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        let mut pty = dashboard(&images, 80, 24);
        pty.wait_for("3 images");
        kill(Pid::from_raw(pty.running.pid()), signal).unwrap();
        assert_eq!(pty.wait_for_end().code(), Some(128 + signal as i32));
        assert_given_back(&pty);
    }
}

#[test]
fn a_panic_gives_the_terminal_back_and_can_be_read() {
    let images = three_images();
    let arguments = [images.dir().to_str().unwrap()];
    let mut pty = Pty::start(PROGRAM, &arguments, &[("QLOCK_TOP_TEST_PANIC", "1")], 120, 40);
    assert_eq!(pty.wait_for_end().code(), Some(101));
    pty.wait_for("asked to panic by QLOCK_TOP_TEST_PANIC");
    assert_given_back(&pty);
}

#[test]
fn an_error_before_the_screen_leaves_the_terminal_alone() {
    let mut pty = Pty::start(PROGRAM, &["/no/such/path"], &[], 80, 24);
    assert_eq!(pty.wait_for_end().code(), Some(4));
    pty.wait_for("/no/such/path: no such file or directory");
    assert_given_back(&pty);
}

#[test]
fn when_the_terminal_goes_the_program_goes() {
    let images = three_images();
    let mut pty = dashboard(&images, 80, 24);
    pty.wait_for("3 images");
    pty.hang_up();
    assert_eq!(pty.wait_for_end().code(), Some(128 + Signal::SIGHUP as i32));
}

#[test]
fn a_reader_that_stalls_does_not_stop_its_end() {
    let images = three_images();
    let mut pty = dashboard(&images, 120, 40);
    pty.wait_for("3 images");
    pty.stalled.store(true, Ordering::SeqCst);
    // More frames than a terminal's buffer holds.
    for i in 0..200 {
        pty.resize(if i % 2 == 0 { 200 } else { 199 }, 60);
        pty.keys("\x0c");
    }
    kill(Pid::from_raw(pty.running.pid()), Signal::SIGTERM).unwrap();
    assert_eq!(pty.wait_for_end().code(), Some(128 + Signal::SIGTERM as i32));
    pty.stalled.store(false, Ordering::SeqCst);
}

#[test]
fn nothing_is_written_while_nothing_changes() {
    let images = three_images();
    let pty = dashboard(&images, 120, 40);
    pty.wait_for("3 images");
    // The very last bytes of the first frame may still be on their way: the count must stand still between two ticks.
    let mut count = pty.written();
    wait_for("a second without a byte", || {
        let since = Instant::now();
        while since.elapsed() < Duration::from_millis(1500) {
            std::thread::sleep(Duration::from_millis(10));
            if pty.written() != count {
                count = pty.written();
                return None;
            }
        }
        Some(())
    });
    pty.keys("j");
    pty.wait_for("> b.raw");
    assert!(pty.written() - count < 600, "{} bytes for two changed rows and the panel", pty.written() - count);
}

#[test]
fn without_colour_and_without_utf8_it_says_the_same() {
    let images = three_images();
    std::fs::write(images.path("größe.raw"), "x").unwrap();
    let arguments = ["--ascii", "--color", "never", images.dir().to_str().unwrap()];
    let pty = Pty::start(PROGRAM, &arguments, &[], 80, 24);
    let screen = pty.wait_for("gr\\u{f6}\\u{df}e.raw");
    assert!(screen.is_ascii(), "{screen}");
    let coloured = pty.with_screen(|s| {
        let cells = (0..24).flat_map(|row| (0..80).map(move |column| (row, column)));
        cells.filter_map(|(r, c)| s.cell(r, c)).any(|cell| cell.fgcolor() != vt100::Color::Default)
    });
    assert!(!coloured);
}

#[test]
fn the_demo_is_shown_and_cleaned_up() {
    let mut pty = Pty::start(PROGRAM, &["demo"], &[], 120, 40);
    let mut screen = pty.wait_for("9 images");
    for text in ["web01 (qemu-demo", "NBD export", "WRITER, NO LOCK", "backing"] {
        screen = pty.wait_for(text);
    }
    let start = screen.find("/tmp/qlock-top-demo-").unwrap();
    let directory = screen[start..].split_whitespace().next().unwrap().to_owned();
    assert!(std::path::Path::new(&directory).is_dir());
    pty.keys("q");
    assert_eq!(pty.wait_for_end().code(), Some(0));
    assert!(!std::path::Path::new(&directory).exists());
    assert_given_back(&pty);
}

#[test]
fn five_seconds_without_a_change_are_five_seconds_without_a_byte() {
    let images = three_images();
    let pty = dashboard(&images, 120, 40);
    pty.wait_for("3 images");
    let mut count = pty.written();
    wait_for("five seconds without a byte", || {
        let since = Instant::now();
        while since.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(20));
            if pty.written() != count {
                count = pty.written();
                return None;
            }
        }
        Some(())
    });
}

/// The writes to the terminal that strace has seen: their lengths.
fn writes(log: &std::path::Path) -> Vec<usize> {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    // Frames begin with an escape sequence; a write to a pipe or an eventfd does not.
    let frames = text.lines().filter(|l| l.contains("write(") && l.contains("\"\\33["));
    frames.filter_map(|l| l.rsplit("= ").next()?.trim().parse().ok()).collect()
}

#[test]
fn a_changed_row_is_one_write_of_at_most_300_bytes() {
    if !have(&["strace"]) {
        return;
    }
    let images = three_images();
    let log = tempfile::NamedTempFile::new().unwrap();
    let arguments =
        ["-f", "-qq", "-e", "trace=write", "-o", log.path().to_str().unwrap(), PROGRAM, images.dir().to_str().unwrap()];
    let pty = Pty::start("strace", &arguments, &[], 120, 40);
    pty.wait_for("3 images");
    pty.wait_for("204 denies graph-mod");
    pty.keys("j");
    pty.wait_for("> b.raw");
    let first = wait_for("the first two frames in the log", || Some(writes(log.path())).filter(|w| w.len() >= 2));
    // Another row than the selected one, and the first: it stays where it is, and besides it only the count changes.
    let held = HeldAccess::acquire(&images.path("a.raw"), "cw/w".parse().unwrap()).unwrap();
    pty.wait_for("1 in use");
    pty.wait_for("VM disk");
    drop(held);
    pty.wait_for("0 in use");
    let all = wait_for("the frames in the log", || Some(writes(log.path())).filter(|w| w.len() >= first.len() + 2));
    let frames = &all[first.len()..];
    assert!(frames.iter().all(|n| *n <= 300), "{frames:?}");
    assert!(frames.len() <= 6, "a frame is one write: {frames:?}");
}

#[test]
fn a_reader_that_stalls_stops_no_look_and_costs_no_memory() {
    let images = three_images();
    let pty = dashboard(&images, 120, 40);
    pty.wait_for("3 images");
    let memory = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", pty.running.pid())).unwrap();
        let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap().to_owned();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    pty.stalled.store(true, Ordering::SeqCst);
    let before = memory();
    // Ten seconds of changes that nobody reads; the lock is seen all the same, by the file's own answer.
    let since = Instant::now();
    let mut rounds = 0;
    while since.elapsed() < Duration::from_secs(10) {
        let held = HeldAccess::acquire(&images.path("c.raw"), "cw/w".parse().unwrap()).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        drop(held);
        pty.resize(if rounds % 2 == 0 { 119 } else { 120 }, 40);
        rounds += 1;
    }
    assert!(memory() < before + 8 * 1024, "{} kB before, {} kB after {rounds} rounds", before, memory());
    let held = HeldAccess::acquire(&images.path("b.raw"), "cw/w".parse().unwrap()).unwrap();
    pty.stalled.store(false, Ordering::SeqCst);
    pty.resize(120, 40);
    pty.keys("\x0c");
    pty.wait_for("1 in use");
    drop(held);
}

#[test]
fn the_shell_gets_the_terminal_while_it_is_stopped() {
    let images = three_images();
    for by_key in [true, false] {
        let mut pty = dashboard(&images, 80, 24);
        pty.wait_for("3 images");
        let pid = Pid::from_raw(pty.running.pid());
        if by_key {
            pty.keys("\x1a");
        } else {
            kill(pid, Signal::SIGTSTP).unwrap();
        }
        let state = || {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
            stat.rsplit(')').next().unwrap().trim().chars().next().unwrap()
        };
        wait_for("the stop", || (state() == 'T').then_some(()));
        assert_given_back(&pty);
        kill(pid, Signal::SIGCONT).unwrap();
        wait_for("the screen again", || pty.with_screen(|s| s.alternate_screen() && s.hide_cursor()).then_some(()));
        pty.wait_for("3 images");
        assert_ne!(pty.before.local_flags, pty.termios().local_flags, "raw mode");
        pty.keys("j");
        pty.wait_for("> b.raw");
        pty.keys("q");
        assert_eq!(pty.wait_for_end().code(), Some(0));
        assert_given_back(&pty);
    }
}

#[test]
fn a_hangup_ends_the_demo_and_cleans_up() {
    let mut pty = Pty::start(PROGRAM, &["demo"], &[], 120, 40);
    let screen = pty.wait_for("9 images");
    let start = screen.find("/tmp/qlock-top-demo-").unwrap();
    let directory = screen[start..].split_whitespace().next().unwrap().to_owned();
    pty.hang_up();
    pty.wait_for_end();
    assert!(!std::path::Path::new(&directory).exists());
}

#[test]
fn without_sighup_it_still_notices_that_the_terminal_is_gone() {
    let images = three_images();
    // As under nohup: the signal is ignored, only the terminal itself tells.
    let script = format!("trap '' HUP; exec {PROGRAM} {}", images.dir().display());
    let mut pty = Pty::start("sh", &["-c", &script], &[], 80, 24);
    pty.wait_for("3 images");
    pty.hang_up();
    pty.wait_for_end();
}

#[test]
fn the_mouse_is_off_until_it_is_asked_for() {
    let images = three_images();
    let mut pty = dashboard(&images, 80, 24);
    pty.wait_for("3 images");
    let mode = |pty: &Pty| pty.with_screen(|s| (s.mouse_protocol_mode(), s.mouse_protocol_encoding()));
    assert_eq!(mode(&pty).0, vt100::MouseProtocolMode::None);
    pty.keys("m");
    wait_for("modes 1000 and 1006", || {
        (mode(&pty) == (vt100::MouseProtocolMode::PressRelease, vt100::MouseProtocolEncoding::Sgr)).then_some(())
    });
    // A click on the second row of the table.
    pty.keys("\x1b[<0;5;5M\x1b[<0;5;5m");
    pty.wait_for("> b.raw");
    kill(Pid::from_raw(pty.running.pid()), Signal::SIGTERM).unwrap();
    pty.wait_for_end();
    assert_given_back(&pty);
    wait_for("the mouse back", || (mode(&pty).0 == vt100::MouseProtocolMode::None).then_some(()));
}

#[test]
fn hostile_names_are_drawn_harmlessly() {
    let images = Images::new();
    for name in ["a\nb.raw", "c\u{1b}[2J\u{1b}]0;x\u{7}.raw", "d\u{9b}31m.raw", "e\u{202e}f.raw", "g\u{200b}h.raw"] {
        std::fs::write(images.dir().join(name), "x").unwrap();
    }
    let pty = dashboard(&images, 120, 40);
    pty.wait_for("5 images");
    for shown in ["a\\nb.raw", "c\\x1b[2J\\x1b]0;x\\x07.raw", "d\\x9b31m.raw", "e\\u{202e}f.raw", "g\\u{200b}h.raw"] {
        pty.wait_for(shown);
    }
}

#[test]
fn a_terminal_that_can_nothing_gets_a_plain_table() {
    let images = three_images();
    for term in ["dumb", ""] {
        let mut pty = Pty::start(PROGRAM, &[images.dir().to_str().unwrap()], &[("TERM", term)], 80, 24);
        assert_eq!(pty.wait_for_end().code(), Some(0));
        pty.wait_for("a.raw");
        assert!(!pty.with_screen(|s| s.alternate_screen()));
        assert_given_back(&pty);
    }
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|w| w == needle)
}

#[test]
fn copying_goes_to_the_terminal_as_osc_52_and_through_tmux() {
    let images = three_images();
    let path = images.path("a.raw");
    // Base64 of the path, by an independent hand.
    let encoded = support::run(
        std::process::Command::new("sh").arg("-c").arg(format!("printf %s {} | base64 -w0", path.display())),
    );
    for tmux in [false, true] {
        let environment: &[(&str, &str)] = if tmux { &[("TMUX", "/tmp/tmux-0/default,1,0")] } else { &[] };
        let pty = Pty::start(PROGRAM, &[images.dir().to_str().unwrap()], environment, 80, 24);
        pty.wait_for("3 images");
        pty.keys("c1");
        pty.wait_for("sent to the terminal's clipboard");
        let raw = pty.raw();
        assert!(
            contains(&raw, format!("\x1b]52;c;{encoded}\x1b\\").as_bytes())
                || contains(&raw, format!("\x1b]52;c;{encoded}\x07").as_bytes())
        );
        assert_eq!(contains(&raw, format!("\x1bPtmux;\x1b\x1b]52;c;{encoded}").as_bytes()), tmux);
    }
}

#[test]
fn the_terminal_is_never_asked_anything() {
    let images = three_images();
    let mut pty = dashboard(&images, 80, 24);
    pty.wait_for("3 images");
    pty.resize(100, 30);
    pty.keys("?\x1b\x0cfjpq");
    pty.wait_for_end();
    let raw = pty.raw();
    // Cursor position, device attributes, keyboard protocol, colours, window size, terminal version.
    for query in [
        "\x1b[6n",
        "\x1b[?6n",
        "\x1b[c",
        "\x1b[0c",
        "\x1b[>c",
        "\x1b[?u",
        "\x1b]10;?",
        "\x1b]11;?",
        "\x1b[18t",
        "\x1b[>q",
    ] {
        assert!(!contains(&raw, query.as_bytes()), "{query:?}");
    }
}

#[test]
fn a_directory_that_goes_away_is_told_and_shown_again_when_it_is_back() {
    let images = Images::new();
    let (there, away) = (images.path("there"), images.path("away"));
    std::fs::create_dir(&there).unwrap();
    std::fs::File::create(there.join("a.raw")).unwrap();
    let pty = Pty::start(PROGRAM, &[there.to_str().unwrap()], &[], 120, 30);
    pty.wait_for("a.raw");
    std::fs::rename(&there, &away).unwrap();
    pty.wait_for("there: No such file or directory");
    pty.wait_for("0 images");
    std::fs::rename(&away, &there).unwrap();
    pty.wait_for("1 image ");
    pty.wait_for("a.raw");
}
