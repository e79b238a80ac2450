//! Names that nobody should ever give to anything, and a stage where everything has them.
#![allow(dead_code, unreachable_pub)]

use std::ffi::{OsStr, OsString};
use std::fs;

use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::support::{Images, Running, qlock_top};
use qlock::hold::HeldAccess;
use qlock::text::is_treacherous;
use serde_json::Value;

/// What every output must survive. No entry holds a slash, so that each can be the name of a file, and none is longer
/// than such a name may be.
pub fn attacks() -> Vec<Vec<u8>> {
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
pub fn harmless(output: &[u8], what: &str) -> String {
    let text = String::from_utf8(output.to_vec()).unwrap_or_else(|e| panic!("{what}: {e}"));
    let line = text.split('\n').find(|line| line.chars().any(is_treacherous));
    assert_eq!(line, None, "{what}");
    text
}

/// As much of a qcow2 as names its backing file.
pub fn qcow2(backing: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 4096];
    image[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    image[14..16].copy_from_slice(&1024u16.to_be_bytes());
    image[16..20].copy_from_slice(&u32::try_from(backing.len()).unwrap().to_be_bytes());
    image[1024..1024 + backing.len()].copy_from_slice(backing);
    image
}

/// A program of that name that waits for the end of its standard input, says in its command line that it runs a VM of
/// that name, and holds `access` on the image: through a descriptor that it inherits as its standard output.
pub fn holder(programs: &Path, image: &Path, access: &str, command: &[u8], vm: &[u8]) -> Running {
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
pub struct Stage {
    /// In the order of `paths`.
    pub holders: Vec<Running>,
    pub images: Images,
    pub paths: Vec<PathBuf>,
    _programs: Images,
}

impl Stage {
    pub fn set() -> Self {
        Self::of(attacks())
    }

    pub fn of(attacks: Vec<Vec<u8>>) -> Self {
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

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = qlock_top();
        command.args(arguments).arg("--recursive").arg(self.images.dir());
        command
    }
}

/// What a command prints, on both ways out; and that none of it acts.
pub fn told(command: &mut Command) -> (String, String, i32) {
    let output = crate::support::output(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
    let what = format!("{command:?}");
    let (out, err) = (harmless(&output.stdout, &what), harmless(&output.stderr, &what));
    assert!(!err.contains("panicked"), "{what}: {err}");
    (out, err, output.status.code().unwrap())
}

pub fn json(line: &str) -> Value {
    serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))
}

/// The exact bytes of a path in JSON: `FIELD_bytes` in hexadecimal where it is no UTF-8.
pub fn exact(object: &Value, field: &str) -> Vec<u8> {
    match object.get(format!("{field}_bytes")) {
        Some(hex) => {
            let hex = hex.as_str().unwrap();
            (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect()
        }
        None => object[field].as_str().unwrap().as_bytes().to_vec(),
    }
}

pub fn sorted(mut list: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
    list.sort();
    list
}

pub fn bytes_of(paths: &[PathBuf]) -> Vec<Vec<u8>> {
    sorted(paths.iter().map(|p| p.as_os_str().as_bytes().to_vec()).collect())
}
