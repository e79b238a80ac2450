//! What about this image should an admin know, and how dangerous is it?
//!
//! Each finding is a code for scripts, a severity, and one sentence that says what is so and what to do. Pure; asks the
//! snapshot and the sample that it was made of.

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::sample::{Answer, ImageSample, Sample};
use super::snapshot::{Image, Opener, Verdict};
use super::wording::{process_name, range_text};
use crate::linux::descriptors::OpenMode;
use crate::linux::lock_table::{LockKind, LockMode};
use crate::protocol::{Access, PermissionSet};
use crate::text::{counted, escape};

/// How much it matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// Good to know.
    Note,
    /// Something is not as it should be, or cannot be seen.
    Warning,
    /// Data may be lost.
    Danger,
}

/// Something to know about an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// A stable name for scripts.
    pub code: String,
    /// How much it matters.
    pub severity: Severity,
    /// One sentence for people, escaped.
    pub text: String,
}

fn finding(code: &str, severity: Severity, text: String) -> Finding {
    Finding { code: code.to_owned(), severity, text }
}

/// Everything to be said about `image`, worst first.
#[must_use]
pub fn findings(image: &Image, raw: &ImageSample, sample: &Sample) -> Vec<Finding> {
    let mut all = Vec::new();
    all.extend(unanswered(raw));
    all.extend(without_holder(image, raw, sample));
    all.extend(image.openers.iter().filter(|o| o.mode == OpenMode::Write).map(|o| unlocked_writer(image, o)));
    all.extend(foreign_locks(image));
    all.extend(legacy_bytes(image));
    all.sort_by_key(|f| std::cmp::Reverse(f.severity));
    all
}

fn unanswered(raw: &ImageSample) -> Option<Finding> {
    match raw.answer {
        Answer::Bytes(_) => None,
        Answer::CannotOpen(errno) => Some(finding(
            "cannot-open",
            Severity::Warning,
            format!("cannot be opened for asking ({}): its locks are unknown", Errno::from_raw(errno).desc()),
        )),
        Answer::CannotLock(errno) => Some(finding(
            "cannot-lock",
            Severity::Warning,
            format!(
                "the file system does not answer lock questions ({}): QEMU would fail here too",
                Errno::from_raw(errno).desc()
            ),
        )),
    }
}

fn without_holder(image: &Image, raw: &ImageSample, sample: &Sample) -> Option<Finding> {
    let filesystem = || format!("{} {}", escape(&image.filesystem.kind), escape(&image.filesystem.source));
    match image.verdict {
        Verdict::HeldByKernel if raw.loop_devices.is_empty() => Some(finding(
            "held-by-kernel",
            Severity::Warning,
            "locked by an open file that no process has: a descriptor in flight in a socket, or a mapping".to_owned(),
        )),
        Verdict::HeldByKernel => Some(finding(
            "held-by-kernel",
            Severity::Warning,
            format!("locked through loop device {}: see losetup -l", raw.loop_devices.join(", ")),
        )),
        Verdict::HeldElsewhere => Some(finding(
            "held-elsewhere",
            Severity::Warning,
            format!(
                "locked, but not on this host: look on the others that use {}; or a stale lock there",
                filesystem()
            ),
        )),
        Verdict::Unknown if matches!(raw.answer, Answer::Bytes(_)) => {
            let why = if sample.hidden_processes > 0 {
                let processes = counted(sample.hidden_processes, "process", "processes");
                format!("{processes} may not be read by this user: try again as root")
            } else if sample.sees_all_processes {
                "the kernel's lock table did not list the lock: look again".to_owned()
            } else {
                "processes outside this pid namespace cannot be seen: look from the host".to_owned()
            };
            Some(finding("holder-unknown", Severity::Warning, format!("held, but the holder cannot be told: {why}")))
        }
        _ => None,
    }
}

fn unlocked_writer(image: &Image, opener: &Opener) -> Finding {
    let alone = image.holders.is_empty() && image.openers.iter().all(|o| o.process.id == opener.process.id);
    let who = process_name(&opener.process);
    let (severity, consequence) = if alone {
        (Severity::Warning, "nothing would stop a second writer")
    } else {
        (Severity::Danger, "others use the image at the same time, and no lock stops them")
    };
    finding("unlocked-writer", severity, format!("{who} has it open for writing without a lock: {consequence}"))
}

fn foreign_locks(image: &Image) -> impl Iterator<Item = Finding> {
    image.holders.iter().filter_map(|holder| {
        let who = process_name(&holder.process);
        if let Some(range) = holder.foreign {
            let kind = if range.mode == LockMode::Write { "write" } else { "read" };
            let text = format!("{who} holds a {kind} lock on {}, which is not QEMU's way", range_text(range));
            return Some(finding("foreign-lock", Severity::Note, text));
        }
        (holder.lock == LockKind::Posix).then(|| {
            let text = format!("{who} holds POSIX locks: they are lost when it closes any descriptor of the image");
            finding("posix-lock", Severity::Note, text)
        })
    })
}

fn legacy_bytes(image: &Image) -> Option<Finding> {
    let held = image.held();
    let legacy = Access::new(
        held.permissions.difference(PermissionSet::CURRENT),
        held.unshared.difference(PermissionSet::CURRENT),
    );
    // A range over everything is told as what it is.
    let explained = image.holders.iter().all(|h| h.access.intersection(legacy).is_empty());
    (!legacy.is_empty() && !explained).then(|| {
        let text = "byte 104 or 204 (graph-mod) is held: QEMU 6.2 or older; newer QEMU does not look at it";
        finding("legacy-bytes", Severity::Note, text.to_owned())
    })
}
