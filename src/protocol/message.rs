//! How does QEMU word a refusal, and what does such a sentence say?
//!
//! Written exactly as `block/file-posix.c` writes them and read back from text. Asks only [`super::permission`].

use std::fmt;

use super::permission::{LockByte, Permission, Side};

/// QEMU's first line on a refused lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sentence {
    /// `Failed to get "write" lock` or `Failed to get shared "write" lock`: the test found a lock of somebody else.
    /// Without `shared` it is the unshare byte of a permission that is wanted; with it, the permission byte of one that
    /// is to be denied.
    Conflict(LockByte),
    /// `Failed to lock byte 100`: the read lock itself was refused. Somebody holds a write lock there, which no QEMU
    /// does, or the file system cannot lock.
    LockFailed {
        /// Offset of the byte, in bytes.
        offset: u64,
    },
}

impl Sentence {
    /// The sentence for a test that finds `byte` held.
    #[must_use]
    pub const fn conflict(byte: LockByte) -> Self {
        Self::Conflict(byte)
    }

    /// The sentence for a read lock on `byte` that is refused.
    #[must_use]
    pub const fn lock_failed(byte: LockByte) -> Self {
        Self::LockFailed { offset: byte.offset() }
    }

    /// The byte that it is about, where that is one of the ten.
    #[must_use]
    pub fn byte(self) -> Option<LockByte> {
        match self {
            Self::Conflict(byte) => Some(byte),
            Self::LockFailed { offset } => LockByte::at(offset),
        }
    }
}

impl fmt::Display for Sentence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Conflict(LockByte { side: Side::Unshare, permission }) => {
                write!(f, "Failed to get \"{}\" lock", permission.qemu_name())
            }
            Self::Conflict(LockByte { side: Side::Permission, permission }) => {
                write!(f, "Failed to get shared \"{}\" lock", permission.qemu_name())
            }
            Self::LockFailed { offset } => write!(f, "Failed to lock byte {offset}"),
        }
    }
}

/// A sentence as it was found in some text, with what QEMU put around it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// What was refused.
    pub sentence: Sentence,
    /// The text of an errno behind the sentence, such as `No locks available`: the lock call itself failed, nobody need
    /// hold anything.
    pub errno: Option<String>,
    /// The image in `Is another process using the image [PATH]?`, as QEMU was given it.
    pub image: Option<String>,
}

impl Message {
    /// What happened, in one sentence for people.
    #[must_use]
    pub fn meaning(&self) -> String {
        match (self.sentence, &self.errno) {
            (_, Some(_)) => {
                "the lock call itself failed: the file system or its server could not answer. Whatever the \
                             hint says, nobody need hold the image"
                    .to_owned()
            }
            (Sentence::Conflict(LockByte { side: Side::Unshare, permission }), None) => format!(
                "the program wanted to use \"{}\", and somebody else who has the image open denies that",
                permission.qemu_name()
            ),
            (Sentence::Conflict(LockByte { side: Side::Permission, permission }), None) => format!(
                "the program wanted to deny \"{}\" to others, and somebody else uses it",
                permission.qemu_name()
            ),
            (Sentence::LockFailed { offset }, None) => format!(
                "somebody holds a write lock on byte {offset}. No QEMU takes such a lock: another hypervisor does, or a \
                 program that locks the whole file"
            ),
        }
    }

    /// Finds the first of QEMU's lock messages in `text`, wherever it stands in it.
    #[must_use]
    pub fn find(text: &str) -> Option<Self> {
        let (sentence, rest) =
            text.match_indices("Failed to ").find_map(|(at, opening)| read_sentence(&text[at + opening.len()..]))?;
        let line = rest.lines().next().unwrap_or_default();
        let errno = line.strip_prefix(": ").map(|e| e.trim().to_owned()).filter(|e| !e.is_empty());
        let image = rest.find(HINT_OPENING).and_then(|at| {
            let path = &rest[at + HINT_OPENING.len()..];
            path.find(HINT_CLOSING).map(|end| path[..end].to_owned())
        });
        Some(Self { sentence, errno, image })
    }
}

const HINT_OPENING: &str = "Is another process using the image [";
const HINT_CLOSING: &str = "]?";

/// Reads what follows `Failed to `, and gives the rest of the text too.
fn read_sentence(text: &str) -> Option<(Sentence, &str)> {
    if let Some(rest) = text.strip_prefix("lock byte ") {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let offset = rest[..digits].parse().ok()?;
        return Some((Sentence::LockFailed { offset }, &rest[digits..]));
    }
    let rest = text.strip_prefix("get ")?;
    let (side, rest) = match rest.strip_prefix("shared ") {
        Some(rest) => (Side::Permission, rest),
        None => (Side::Unshare, rest),
    };
    let (name, rest) = rest.strip_prefix('"')?.split_once('"')?;
    let permission = Permission::from_name(name)?;
    Some((Sentence::Conflict(LockByte { side, permission }), rest.strip_prefix(" lock")?))
}

impl fmt::Display for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.sentence)?;
        if let Some(errno) = &self.errno {
            write!(f, ": {errno}")?;
        }
        if let Some(image) = &self.image {
            write!(f, "\n{HINT_OPENING}{image}{HINT_CLOSING}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sentence_is_read_back() {
        let sentences = LockByte::ALL
            .into_iter()
            .flat_map(|b| [Sentence::conflict(b), Sentence::lock_failed(b)])
            .collect::<Vec<_>>();
        for sentence in sentences {
            for errno in [None, Some("No locks available".to_owned())] {
                for image in [None, Some("/var/lib/images/a [1]?.qcow2".to_owned())] {
                    let message = Message { sentence, errno: errno.clone(), image: image.clone() };
                    let text = format!("qemu-img: Could not open 'x': {message}\n");
                    let found = Message::find(&text).unwrap();
                    assert_eq!(found.sentence, sentence);
                    assert_eq!(found.errno, errno);
                    assert_eq!(found.image.is_some(), image.is_some());
                }
            }
        }
    }

    #[test]
    fn the_words_are_those_of_qemu() {
        let message = Message::find(
            "qemu-system-x86_64: -drive file=a.raw: Failed to get \"consistent read\" lock\n\
             Is another process using the image [a.raw]?\n",
        )
        .unwrap();
        assert_eq!(message.sentence.byte().map(LockByte::offset), Some(200));
        assert_eq!(message.image.as_deref(), Some("a.raw"));
        assert_eq!(
            Sentence::conflict(LockByte::permission(Permission::WriteUnchanged)).to_string(),
            "Failed to get shared \"write unchanged\" lock"
        );
    }

    #[test]
    fn other_failures_are_not_taken_for_lock_messages() {
        for text in
            ["", "Failed to ", "Failed to get \"sunshine\" lock", "Failed to lock byte x", "Failed to get write lock"]
        {
            assert_eq!(Message::find(text), None, "{text:?}");
        }
        assert!(Message::find("Failed to open x: Failed to lock byte 100: Invalid argument").is_some());
        assert!(Message::find("Failed to lock byte 99999999999999999999999").is_none());
    }
}
