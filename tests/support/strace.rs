//! Which system calls did a program make? Reads what `strace -f -y -o LOG` wrote.
#![allow(dead_code, unreachable_pub)]

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

/// How strace is to be called, before the program: with the path behind each descriptor.
pub fn arguments(log: &Path) -> Vec<&str> {
    vec!["-f", "-qq", "-y", "-s", "4096", "-o", log.to_str().unwrap()]
}

/// One call, whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// Of which thread.
    pub thread: i32,
    pub name: String,
    pub arguments: String,
    pub result: String,
}

impl Call {
    fn of(thread: i32, line: &str) -> Option<Self> {
        let (name, rest) = line.split_once('(')?;
        let (arguments, result) = rest.rsplit_once(" = ")?;
        let arguments = arguments.trim_end().strip_suffix(')')?;
        Some(Self { thread, name: name.to_owned(), arguments: arguments.to_owned(), result: result.to_owned() })
    }

    /// The first string among the arguments: the path, for calls that take one.
    pub fn path(&self) -> Option<PathBuf> {
        let rest = self.arguments.split_once('"')?.1;
        let mut end = 0;
        let mut characters = rest.char_indices();
        while let Some((at, c)) = characters.next() {
            match c {
                '\\' => drop(characters.next()),
                '"' => {
                    end = at;
                    break;
                }
                _ => {}
            }
        }
        Some(PathBuf::from(&rest[..end]))
    }

    /// What the descriptor that is the first argument leads to.
    pub fn descriptor(&self) -> Option<&str> {
        let first = self.arguments.split(", ").next()?;
        first.split_once('<')?.1.strip_suffix('>')
    }

    /// What the descriptor that is the result leads to.
    pub fn opened(&self) -> Option<&str> {
        self.result.split_once('<')?.1.strip_suffix('>')
    }

    pub fn succeeded(&self) -> bool {
        !self.result.starts_with('-') && !self.result.starts_with('?')
    }

    pub fn is_open(&self) -> bool {
        ["open", "openat", "openat2", "creat"].contains(&self.name.as_str())
    }

    /// The flags of a call that opens.
    pub fn flags(&self) -> Vec<&str> {
        self.arguments.split([' ', ',', '|', '=', '{', '}']).filter(|w| w.starts_with("O_")).collect()
    }
}

/// Every call, in the order in which they returned. A call that never did, as of a thread that was ended, has the
/// result `?`.
pub fn calls(log: &Path) -> Vec<Call> {
    let mut begun: HashMap<i32, String> = HashMap::new();
    let mut calls = Vec::new();
    for line in String::from_utf8_lossy(&fs::read(log).unwrap()).lines() {
        let (thread, line) = line.split_once(' ').unwrap_or_else(|| panic!("no line of strace: {line}"));
        let (thread, line) = (thread.parse().unwrap(), line.trim_start());
        if line.starts_with(['-', '+']) {
            continue;
        }
        if let Some(start) = line.strip_suffix(" <unfinished ...>") {
            begun.insert(thread, start.to_owned());
            continue;
        }
        let whole = match line.strip_prefix("<... ").and_then(|l| l.split_once(" resumed>")) {
            Some((_, rest)) => match begun.remove(&thread) {
                Some(start) => format!("{start}{rest}"),
                None => continue,
            },
            None => line.to_owned(),
        };
        calls.push(Call::of(thread, &whole).unwrap_or_else(|| panic!("not understood: {whole}")));
    }
    calls.extend(begun.into_iter().filter_map(|(thread, start)| Call::of(thread, &format!("{start}) = ?"))));
    calls
}
