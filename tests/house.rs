//! Is the house in order: who may use whom, what stays pure, and is what the README says true?
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn sources(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// A source file: its path below `src`, and its code without comments and unit tests.
fn code(path: &Path) -> (String, String) {
    let name = path.strip_prefix(root().join("src")).unwrap().to_str().unwrap().to_owned();
    let text = fs::read_to_string(path).unwrap();
    let text = text.split("#[cfg(test)]\nmod tests").next().unwrap();
    let lines = text.lines().filter(|l| !l.trim_start().starts_with("//"));
    (name, lines.collect::<Vec<_>>().join("\n"))
}

fn all_code() -> Vec<(String, String)> {
    let all: Vec<_> = sources(&root().join("src")).iter().map(|p| code(p)).collect();
    assert!(all.len() > 30, "the walk finds the sources");
    all
}

/// What each room may use. `lib.rs` and `main.rs` only name the rooms.
const ARROW: [(&str, &[&str]); 12] = [
    ("protocol", &[]),
    ("text", &[]),
    ("signals", &[]),
    ("linux", &["protocol", "text"]),
    ("hold", &["protocol", "text", "linux"]),
    ("image", &["protocol", "text", "linux"]),
    ("monitor", &["protocol", "text", "linux", "image"]),
    ("report", &["protocol", "text", "linux", "image", "monitor"]),
    ("tui", &["protocol", "text", "signals", "linux", "image", "monitor", "report", "hold"]),
    ("demo", &["protocol", "text", "hold"]),
    ("config", &["text"]),
    ("cli", &["protocol", "text", "signals", "linux", "image", "monitor", "report", "hold", "tui", "demo", "config"]),
];

fn room(name: &str) -> &str {
    name.split(['/', '.']).next().unwrap()
}

/// The rooms that a file names with `crate::`.
fn used_rooms(code: &str) -> BTreeSet<&str> {
    let word = |rest: &'_ str| rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or("").len();
    code.match_indices("crate::").map(|(at, found)| &code[at + found.len()..]).map(|rest| &rest[..word(rest)]).collect()
}

#[test]
fn each_room_uses_only_what_stands_left_of_it() {
    for (name, code) in all_code().iter().filter(|(n, _)| n != "lib.rs" && n != "main.rs") {
        let room = room(name);
        let (_, allowed) =
            ARROW.iter().find(|(r, _)| *r == room).unwrap_or_else(|| panic!("{name}: a room without a place"));
        for used in used_rooms(code) {
            assert!(!used.is_empty(), "{name}: name the rooms one by one, so that they can be checked");
            assert!(used == room || allowed.contains(&used), "{name} uses {used}");
        }
    }
}

#[test]
fn pure_files_do_no_io_and_ask_no_clock() {
    let pure = [
        "text.rs",
        "protocol/",
        "monitor/sample.rs",
        "monitor/snapshot.rs",
        "monitor/understand.rs",
        "monitor/finding.rs",
        "monitor/alias.rs",
        "monitor/change.rs",
        "monitor/wording.rs",
        "monitor/what_if.rs",
        "monitor/advice.rs",
        "monitor/way_out.rs",
        "tui/model.rs",
        "tui/update.rs",
        "tui/keymap.rs",
        "tui/theme.rs",
        "tui/filter.rs",
        "tui/sort.rs",
        "tui/clip.rs",
        "tui/test_lock.rs",
        "tui/view/",
    ];
    let impure = [
        "std::fs",
        "std::io",
        "std::net",
        "std::process",
        "std::thread",
        "std::env",
        "std::sync::Mutex",
        "Instant",
        "SystemTime",
        "Timestamp::now",
        "rustix::",
        "nix::",
        "procfs::",
        "notify::",
        "println!",
    ];
    let mut checked = 0;
    for (name, code) in all_code().iter().filter(|(n, _)| pure.iter().any(|p| n.starts_with(p))) {
        checked += 1;
        // The names of errnos are a table.
        let code = code.replace("nix::errno::Errno", "");
        for word in impure {
            // "unix::" is not "nix::".
            let whole = |at: usize| !code[..at].ends_with(|c: char| c.is_alphanumeric());
            let said = code.match_indices(word).any(|(at, _)| whole(at));
            assert!(!said, "{name} is pure, but says {word}");
        }
    }
    assert!(checked > 15);
}

#[test]
fn only_hold_sets_a_lock_and_nothing_is_unsafe() {
    for (name, code) in all_code() {
        // bpf(2) has no safe wrapper: one file, with its reason.
        let is_unsafe = code.contains("unsafe {") || code.contains("unsafe fn") || code.contains("allow(unsafe_code)");
        assert_eq!(is_unsafe, name == "linux/task_files.rs", "{name}");
        for setter in ["F_OFD_SETLK", "F_SETLK", "flock(", "lockf("] {
            assert!(name == "hold.rs" || !code.contains(setter), "{name} says {setter}");
        }
        if name != "demo/actor.rs" && name != "demo/qcow2.rs" && name != "demo/mod.rs" {
            for opening in [".write(true)", "File::create", "OFlags::RDWR", "OFlags::WRONLY", "O_RDWR", "O_WRONLY"] {
                // The terminal's own description is the one thing that is opened for writing.
                assert!(name == "tui/terminal.rs" || !code.contains(opening), "{name} says {opening}");
            }
        }
    }
}

#[test]
fn nothing_lies_among_the_sources_but_sources() {
    fn all(directory: &Path) -> Vec<PathBuf> {
        let entries = fs::read_dir(directory).unwrap().map(|e| e.unwrap().path());
        entries.flat_map(|p| if p.is_dir() { all(&p) } else { vec![p] }).collect()
    }
    for path in all(&root().join("src")) {
        assert!(path.extension().is_some_and(|e| e == "rs"), "{}", path.display());
    }
}

#[test]
fn every_file_opens_with_the_question_that_it_answers() {
    for path in sources(&root().join("src")) {
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("//! "), "{}", path.display());
    }
}

#[test]
fn the_top_level_holds_what_belongs_there() {
    let allowed = [
        "Cargo.toml",
        "Cargo.lock",
        "src",
        "assets",
        "tests",
        "README.md",
        "CHANGELOG.md",
        "target",
        "proptest-regressions",
    ];
    for entry in fs::read_dir(root()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let fine = allowed.contains(&name.as_str()) || name.starts_with('.') || name.starts_with("LICENSE");
        assert!(fine, "{name} is at the top level");
    }
}

fn readme() -> String {
    fs::read_to_string(root().join("README.md")).unwrap()
}

/// The shell blocks of the README.
fn shell_blocks(readme: &str) -> Vec<&str> {
    readme.split("```sh\n").skip(1).map(|b| b.split("```").next().unwrap().trim_end()).collect()
}

#[test]
fn the_readme_begins_with_exactly_two_commands() {
    let readme = readme();
    let start = readme.split("## Start").nth(1).unwrap().split("\n## ").next().unwrap();
    assert_eq!(shell_blocks(start), ["cargo run --release -- demo", "cargo test"]);
    let ci = fs::read_to_string(root().join(".ci/run")).unwrap();
    assert!(ci.lines().any(|l| l.trim_end() == "cargo test"), "CI runs the README's test command");
}

#[test]
fn the_readme_names_every_key_mark_and_command() {
    let readme = readme();
    for binding in qlock::tui::keymap::KEYMAP.iter().filter(|b| !b.help.is_empty()) {
        let row = format!("| `{}` | {} |", binding.label, binding.help);
        assert!(readme.contains(&row), "the README lacks: {row}");
    }
    let help = support::output(support::qlock_top().arg("--help"));
    let help = String::from_utf8(help.stdout).unwrap();
    let commands = help.split("Commands:\n").nth(1).unwrap().split("\n\n").next().unwrap();
    let names: Vec<&str> = commands
        .lines()
        // What is indented further goes on with the line before.
        .filter_map(|l| l.strip_prefix("  ").filter(|l| !l.starts_with(' ')))
        .filter_map(|l| l.split_whitespace().next())
        .filter(|n| *n != "help")
        .collect();
    assert_eq!(names, ["list", "watch", "why", "wait", "hold", "demo"]);
    for name in names {
        assert!(readme.contains(&format!("`qlock-top {name}")), "the README does not name {name}");
    }
}

#[test]
fn the_readme_shows_a_screenshot_that_was_taken() {
    let screenshots = root().join("assets/screenshots");
    let shown = fs::read_to_string(screenshots.join("images-80x24.txt")).unwrap();
    assert!(readme().contains(shown.trim_end()), "the README shows images-80x24.txt");
    assert_eq!(fs::read_dir(screenshots).unwrap().count(), 3);
}

#[test]
fn every_verdict_and_exit_status_is_in_the_readme() {
    let readme = readme();
    for verdict in ["free", "held", "held-by-kernel", "held-elsewhere", "unknown", "cannot-lock", "stalled"] {
        assert!(readme.contains(&format!("| `{verdict}` |")), "{verdict}");
    }
    for status in [0, 1, 2, 3, 4, 124] {
        assert!(readme.contains(&format!("| {status} |")), "{status}");
    }
}

#[test]
fn every_test_that_the_security_page_names_is_there() {
    let page = fs::read_to_string(root().join("assets/SECURITY.md")).unwrap();
    let named: BTreeSet<&str> = page.split('`').filter(|word| word.ends_with(".rs")).collect();
    assert!(named.len() > 10, "{named:?}");
    for name in named {
        let there = root().join(name).is_file() || root().join("src").join(name).is_file();
        assert!(there, "the security page names {name}");
    }
}
