//! Which images does the operator want to see?
//!
//! Words and `key:value` pairs, all of which must fit; `!` in front turns one round. What is not understood is explained
//! and left out, so that typing never empties the screen by mistake. Pure.

use crate::linux::process::ProcessFacts;
use crate::monitor::finding::Severity;
use crate::monitor::snapshot::{Image, Verdict};
use crate::monitor::wording::{format_text, role_text};
use crate::protocol::Permission;

/// What is typed, and what it means.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    text: String,
    terms: Vec<Term>,
    error: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Term {
    wanted: bool,
    test: Test,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Test {
    Word(String),
    Pid(i32),
    Vm(String),
    User(String),
    State(State),
    Permission(Permission),
    Format(String),
    Path(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Verdict(Verdict),
    InUse,
    Unclear,
    Found(Severity),
}

/// The keys, for the explanation.
pub const KEYS: &str = "pid: vm: user: state: perm: format: path:";
const VERDICTS: [Verdict; 7] = [
    Verdict::Free,
    Verdict::Held,
    Verdict::HeldByKernel,
    Verdict::HeldElsewhere,
    Verdict::Unknown,
    Verdict::CannotLock,
    Verdict::Stalled,
];
/// No terminal line is longer.
const LONGEST: usize = 200;

impl Filter {
    /// What has been typed.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// What is wrong with it, and what would be right.
    #[must_use]
    pub fn error(&self) -> Option<&str> {
        self.error.as_deref()
    }

    /// Whether anything has been typed.
    #[must_use]
    pub fn is_active(&self) -> bool {
        !self.text.trim().is_empty()
    }

    /// Adds typed or pasted text; what is no text is left out.
    pub fn push(&mut self, text: &str) {
        self.text.extend(text.chars().filter(|c| !crate::text::is_treacherous(*c)));
        if let Some((end, _)) = self.text.char_indices().nth(LONGEST) {
            self.text.truncate(end);
        }
        self.understand();
    }

    /// Takes the last character away.
    pub fn pop(&mut self) {
        self.text.pop();
        self.understand();
    }

    /// Takes the last word away.
    pub fn pop_word(&mut self) {
        let end = self.text.trim_end().rfind(' ').map_or(0, |at| at + 1);
        self.text.truncate(end);
        self.understand();
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    fn understand(&mut self) {
        self.error = None;
        self.terms.clear();
        for word in self.text.split_whitespace() {
            match term(word) {
                Ok(term) => self.terms.push(term),
                Err(error) => self.error = Some(error),
            }
        }
    }

    /// Whether `image` is to be shown.
    #[must_use]
    pub fn matches(&self, image: &Image) -> bool {
        self.terms.iter().all(|term| term.test.fits(image) == term.wanted)
    }
}

fn term(word: &str) -> Result<Term, String> {
    let (wanted, word) = match word.strip_prefix('!') {
        Some(rest) => (false, rest),
        None => (true, word),
    };
    if word.is_empty() {
        return Err("! turns the word behind it round: !free".to_owned());
    }
    let lower = word.to_lowercase();
    let test = match lower.split_once(':') {
        None => Test::Word(lower),
        Some((key, "")) if KEYS.split(' ').any(|k| k.trim_end_matches(':') == key) => {
            return Err(format!("{key}: what? {}", example(key)));
        }
        Some((key, value)) => pair(key, value)?,
    };
    Ok(Term { wanted, test })
}

fn example(key: &str) -> &'static str {
    match key {
        "pid" => "a number, such as pid:4242",
        "state" => {
            "free, held, held-by-kernel, held-elsewhere, unknown, cannot-lock, stalled, in-use, unclear, warning or danger"
        }
        "perm" => "consistent-read, write, write-unchanged, resize or graph-mod, or a letter c w u r g",
        "format" => "such as format:qcow2",
        "user" => "such as user:root",
        "path" => "such as path:/srv",
        _ => "such as vm:web01",
    }
}

fn pair(key: &str, value: &str) -> Result<Test, String> {
    let wrong = || format!("{key}: {value} is not one of {}", example(key));
    Ok(match key {
        "pid" => Test::Pid(value.parse().map_err(|_| format!("pid: wants {}", example(key)))?),
        "vm" => Test::Vm(value.to_owned()),
        "user" => Test::User(value.to_owned()),
        "format" => Test::Format(value.to_owned()),
        "path" => Test::Path(value.to_owned()),
        "perm" => {
            let letter = |p: &Permission| value.chars().eq([p.letter()]);
            let found = Permission::from_name(value).or_else(|| Permission::ALL.into_iter().find(letter));
            Test::Permission(found.ok_or_else(wrong)?)
        }
        "state" => Test::State(match value {
            "in-use" => State::InUse,
            "unclear" => State::Unclear,
            "note" => State::Found(Severity::Note),
            "warning" => State::Found(Severity::Warning),
            "danger" => State::Found(Severity::Danger),
            name => State::Verdict(VERDICTS.into_iter().find(|v| v.name() == name).ok_or_else(wrong)?),
        }),
        _ => return Err(format!("{key}: is unknown; there are {KEYS}")),
    })
}

impl Filter {
    /// Whether a process fits what the filter says of processes; what it says of images does not matter here.
    #[must_use]
    pub fn matches_process(&self, process: &ProcessFacts) -> bool {
        let fits = |term: &Term| match &term.test {
            Test::Pid(pid) => process.id.pid == *pid,
            Test::Vm(name) => process.vm.as_ref().is_some_and(|vm| vm.to_lowercase().contains(name)),
            Test::User(name) => process.user.to_lowercase().contains(name),
            _ => term.wanted,
        };
        self.terms.iter().all(|term| fits(term) == term.wanted)
    }
}

impl Test {
    fn fits(&self, image: &Image) -> bool {
        let contains = |text: &str, part: &str| text.to_lowercase().contains(part);
        let path = || image.path.to_string_lossy();
        let by = |test: &dyn Fn(&ProcessFacts) -> bool| processes(image).any(test);
        match self {
            Self::Word(word) => {
                contains(&path(), word)
                    || contains(&role_text(image), word)
                    || by(&|p| {
                        contains(&p.command, word)
                            || p.vm.as_ref().is_some_and(|vm| contains(vm, word))
                            || p.id.pid.to_string() == *word
                    })
            }
            Self::Pid(pid) => by(&|p| p.id.pid == *pid),
            Self::Vm(name) => by(&|p| p.vm.as_ref().is_some_and(|vm| contains(vm, name))),
            Self::User(name) => by(&|p| contains(&p.user, name)),
            Self::Format(name) => contains(format_text(image), name),
            Self::Path(part) => contains(&path(), part),
            Self::Permission(p) => {
                let held = image.held();
                held.permissions.contains(*p) || held.unshared.contains(*p)
            }
            Self::State(State::Verdict(verdict)) => image.verdict == *verdict,
            Self::State(State::InUse) => !image.held().is_empty() || !image.openers.is_empty(),
            Self::State(State::Unclear) => !image.verdict.is_certain(),
            Self::State(State::Found(severity)) => image.findings.iter().any(|f| f.severity == *severity),
        }
    }
}

fn processes(image: &Image) -> impl Iterator<Item = &ProcessFacts> {
    image.holders.iter().map(|h| &*h.process).chain(image.openers.iter().map(|o| &*o.process))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::monitor::examples::{holds, image, process, sample};
    use crate::monitor::sample::ImageSample;
    use crate::monitor::snapshot::Snapshot;
    use proptest::prelude::*;

    fn filter(text: &str) -> Filter {
        let mut filter = Filter::default();
        filter.push(text);
        filter
    }

    fn shown(text: &str) -> Vec<String> {
        let held = ImageSample { descriptors: vec![holds(42, "cw/w")], ..image("web01.qcow2", "cw/w") };
        let snapshot = Snapshot::of(&sample(
            vec![held, image("spare.raw", "-/-")],
            &[process(42, "qemu-system-x86", Some("Web01"))],
        ));
        let filter = filter(text);
        let name = |i: &Image| i.path.file_name().unwrap().to_string_lossy().into_owned();
        snapshot.images.iter().filter(|i| filter.matches(i)).map(name).collect()
    }

    #[test]
    fn words_and_pairs_must_all_fit() {
        let web = ["web01.qcow2"];
        for text in
            ["web", "WEB", "42", "pid:42", "vm:web", "user:root", "state:held", "state:in-use", "perm:write", "perm:w"]
        {
            assert_eq!(shown(text), web, "{text}");
        }
        assert_eq!(shown("path:spare"), ["spare.raw"]);
        assert_eq!(shown("!state:held"), ["spare.raw"]);
        assert_eq!(shown("web spare"), [] as [&str; 0]);
        assert_eq!(shown("format:qcow2").len(), 2);
        assert_eq!(shown("perm:resize"), [] as [&str; 0]);
    }

    #[test]
    fn what_is_not_understood_is_explained_and_hides_nothing() {
        for (text, part) in [
            ("vm:", "such as vm:web01"),
            ("pid:x", "a number"),
            ("state:fre", "is not one of free"),
            ("colour:red", "there are pid: vm:"),
            ("!", "!free"),
            ("perm:x", "consistent-read"),
        ] {
            assert!(filter(text).error().unwrap().contains(part), "{text}: {:?}", filter(text).error());
            assert_eq!(shown(text).len(), 2, "{text}");
        }
        assert_eq!(filter("state:free").error(), None);
    }

    #[test]
    fn typing_can_be_undone() {
        let mut typed = filter("vm:web state:held");
        typed.pop_word();
        assert_eq!(typed.text(), "vm:web ");
        typed.pop();
        typed.pop();
        assert_eq!(typed.text(), "vm:we");
        typed.push("\u{1b}[A\n\u{202e}b");
        assert_eq!(typed.text(), "vm:we[Ab");
        typed.clear();
        assert!(!typed.is_active());
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic_or_grow_without_end(text in "\\PC{0,300}|([a-z]{0,6}:?!? ?){0,20}") {
            let filter = filter(&text);
            prop_assert!(filter.text().chars().count() <= LONGEST);
            let _ = shown(&text);
        }
    }
}
