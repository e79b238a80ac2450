//! What happened between two moments?
//!
//! Two snapshots in, events out, in an order that scripts can rely on: images that went, images that came, then image by
//! image who let go, who took, and which findings came and went. Pure.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::snapshot::{Holder, Image, Snapshot};
use super::wording::{access_text, process_name, range_text};
use crate::linux::identity::ProcessId;
use crate::linux::process::ProcessFacts;
use crate::protocol::Access;

/// What kind of thing happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ChangeKind {
    /// Bytes were taken.
    Acquired,
    /// Bytes were let go.
    Released,
    /// A file appeared, or another file took the path.
    ImageAdded,
    /// A file disappeared.
    ImageRemoved,
    /// There is something new to know.
    Finding,
    /// It is no longer so.
    FindingCleared,
    /// Something may have been missed, and the text says why.
    Gap,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// When it was seen; it happened since the look before.
    pub at: Timestamp,
    /// What kind of thing.
    pub kind: ChangeKind,
    /// To which image; `None` for a gap that concerns them all.
    pub image: Option<PathBuf>,
    /// Who did it, where that is known.
    pub process: Option<Arc<ProcessFacts>>,
    /// Through which descriptor.
    pub fd: Option<i32>,
    /// The bytes taken or let go.
    pub access: Access,
    /// One sentence for people, escaped.
    pub text: String,
}

impl Change {
    /// An event about no process.
    #[must_use]
    pub fn about(kind: ChangeKind, at: Timestamp, image: Option<&Path>, text: String) -> Self {
        Self { at, kind, image: image.map(Path::to_owned), process: None, fd: None, access: Access::NONE, text }
    }
}

/// What happened between `before` and `after`.
#[must_use]
pub fn changes(before: &Snapshot, after: &Snapshot) -> Vec<Change> {
    let at = after.taken_at;
    let key = |i: &'_ Image| (i.path.clone(), i.file);
    let old: BTreeMap<_, &Image> = before.images.iter().map(|i| (key(i), i)).collect();
    let new: BTreeMap<_, &Image> = after.images.iter().map(|i| (key(i), i)).collect();
    let mut all = Vec::new();
    for (_, image) in old.iter().filter(|(k, _)| !new.contains_key(*k)) {
        all.push(Change::about(ChangeKind::ImageRemoved, at, Some(&image.path), "image removed".to_owned()));
    }
    for (key, image) in &new {
        match old.get(key) {
            Some(was) => image_changes(was, image, at, &mut all),
            None => {
                all.push(Change::about(ChangeKind::ImageAdded, at, Some(&image.path), "image added".to_owned()));
                let nothing =
                    Image { holders: Vec::new(), bytes: Vec::new(), findings: Vec::new(), ..(*image).clone() };
                image_changes(&nothing, image, at, &mut all);
            }
        }
    }
    // What cannot be listed or read may hide anything.
    for trouble in after.troubles.iter().filter(|t| !before.troubles.contains(t)) {
        all.push(Change::about(ChangeKind::Gap, at, None, crate::text::escape(trouble).into_owned()));
    }
    for finding in before.findings.iter().filter(|f| !after.findings.contains(f)) {
        all.push(Change::about(ChangeKind::FindingCleared, at, None, finding.text.clone()));
    }
    for finding in after.findings.iter().filter(|f| !before.findings.contains(f)) {
        all.push(Change::about(ChangeKind::Finding, at, None, finding.text.clone()));
    }
    all
}

/// Who holds what, so that two moments can be compared; `None` stands for whoever holds bytes that have no known holder.
///
/// By process and not by descriptor: a QEMU that reopens an image holds the same bytes on two descriptors in turn, and has
/// let nothing go.
type Holdings<'a> = BTreeMap<Option<ProcessId>, Holding<'a>>;

#[derive(Clone, Default)]
struct Holding<'a> {
    holder: Option<&'a Holder>,
    access: Access,
    ranges: Vec<String>,
}

fn holdings(image: &Image) -> Holdings<'_> {
    let mut all = Holdings::new();
    for holder in &image.holders {
        let holding = all.entry(Some(holder.process.id)).or_default();
        holding.holder = Some(holder);
        holding.access = holding.access.union(holder.access);
        holding.ranges.extend(holder.foreign.map(range_text));
    }
    let ownerless = image.ownerless();
    if !ownerless.is_empty() {
        all.insert(None, Holding { access: ownerless, ..Holding::default() });
    }
    all
}

/// What one process took or let go of `image`, if anything.
fn moved(
    image: &Image,
    at: Timestamp,
    kind: ChangeKind,
    holder: Option<&Holder>,
    access: Access,
    ranges: &[String],
) -> Option<Change> {
    if access.is_empty() && ranges.is_empty() {
        return None;
    }
    let what = if access.is_empty() { ranges.join(", ") } else { access_text(access) };
    let who = holder.map_or_else(|| "somebody unknown".to_owned(), |h| process_name(&h.process));
    let verb = if kind == ChangeKind::Acquired { "took" } else { "let go" };
    Some(Change {
        process: holder.map(|h| h.process.clone()),
        fd: holder.and_then(|h| h.fd),
        access,
        ..Change::about(kind, at, Some(&image.path), format!("{who} {verb}: {what}"))
    })
}

fn image_changes(was: &Image, is: &Image, at: Timestamp, all: &mut Vec<Change>) {
    let (old, new) = (holdings(was), holdings(is));
    let nothing = Holding::default();
    let less = |a: &[String], b: &[String]| a.iter().filter(|r| !b.contains(r)).cloned().collect::<Vec<_>>();
    for (key, before) in &old {
        let now = new.get(key).unwrap_or(&nothing);
        let dropped = before.access.difference(now.access);
        if key.is_none() {
            // What was nobody's is let go only if it is free; what cannot be told any more may be held still. What has a
            // holder now is taken off nobody's account, so that whoever counts comes out even.
            let named = dropped.intersection(is.held());
            if !named.is_empty() {
                let text = format!("it is known now who holds: {}", access_text(named));
                all.push(Change { access: named, ..Change::about(ChangeKind::Released, at, Some(&is.path), text) });
            }
            all.extend(moved(is, at, ChangeKind::Released, None, dropped.intersection(is.free()), &[]));
        } else {
            let ranges = less(&before.ranges, &now.ranges);
            all.extend(moved(is, at, ChangeKind::Released, before.holder, dropped, &ranges));
        }
    }
    for (key, now) in &new {
        let before = old.get(key).unwrap_or(&nothing);
        let (taken, ranges) = (now.access.difference(before.access), less(&now.ranges, &before.ranges));
        all.extend(moved(is, at, ChangeKind::Acquired, now.holder, taken, &ranges));
    }
    for finding in was.findings.iter().filter(|f| !is.findings.contains(f)) {
        all.push(Change::about(ChangeKind::FindingCleared, at, Some(&is.path), finding.text.clone()));
    }
    for finding in is.findings.iter().filter(|f| !was.findings.contains(f)) {
        all.push(Change::about(ChangeKind::Finding, at, Some(&is.path), finding.text.clone()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linux::descriptors::OpenDescriptor;
    use crate::monitor::examples::{access, holds, image, process, sample};
    use crate::monitor::sample::{Answer, ImageSample};

    fn snapshot(images: Vec<ImageSample>) -> Snapshot {
        Snapshot::of(&sample(images, &[process(42, "qemu-system-x86", Some("web01")), process(43, "qemu-io", None)]))
    }

    fn held(by: &[(i32, &str)], locked: &str) -> ImageSample {
        ImageSample { descriptors: by.iter().map(|(pid, held)| holds(*pid, held)).collect(), ..image("a", locked) }
    }

    fn told(before: &Snapshot, after: &Snapshot) -> Vec<(ChangeKind, Option<i32>, String)> {
        let short = |c: Change| (c.kind, c.process.map(|p| p.id.pid), c.access.to_string());
        changes(before, after)
            .into_iter()
            .filter(|c| !matches!(c.kind, ChangeKind::Finding | ChangeKind::FindingCleared))
            .map(short)
            .collect()
    }

    #[test]
    fn taking_and_letting_go_name_the_bytes_and_the_process() {
        let (free, vm) = (snapshot(vec![held(&[], "-/-")]), snapshot(vec![held(&[(42, "cw/w")], "cw/w")]));
        assert_eq!(told(&free, &vm), [(ChangeKind::Acquired, Some(42), "cw/w".to_owned())]);
        assert_eq!(told(&vm, &free), [(ChangeKind::Released, Some(42), "cw/w".to_owned())]);
        assert_eq!(told(&vm, &vm), []);
        let mirror = snapshot(vec![held(&[(42, "cw/wr")], "cw/wr")]);
        assert_eq!(told(&vm, &mirror), [(ChangeKind::Acquired, Some(42), "-/r".to_owned())]);
        assert_eq!(
            changes(&free, &vm)[0].text,
            "web01 (qemu-system-x86 42) took: uses consistent read, write; denies write"
        );
    }

    #[test]
    fn a_second_reader_is_an_event_though_no_byte_changes() {
        let one = snapshot(vec![held(&[(42, "c/wr")], "c/wr")]);
        let two = snapshot(vec![held(&[(42, "c/wr"), (43, "c/wr")], "c/wr")]);
        assert_eq!(told(&one, &two), [(ChangeKind::Acquired, Some(43), "c/wr".to_owned())]);
    }

    #[test]
    fn a_holder_that_becomes_known_takes_the_bytes_off_nobodys_account() {
        let (unknown, known) = (snapshot(vec![held(&[], "cw/-")]), snapshot(vec![held(&[(43, "cw/-")], "cw/-")]));
        assert_eq!(
            told(&unknown, &known),
            [(ChangeKind::Released, None, "cw/-".to_owned()), (ChangeKind::Acquired, Some(43), "cw/-".to_owned())]
        );
        assert!(changes(&unknown, &known)[0].text.starts_with("it is known now who holds"));
        let free = snapshot(vec![held(&[], "-/-")]);
        assert_eq!(told(&free, &unknown), [(ChangeKind::Acquired, None, "cw/-".to_owned())]);
        assert_eq!(told(&unknown, &free), [(ChangeKind::Released, None, "cw/-".to_owned())]);
    }

    #[test]
    fn a_reopen_lets_go_only_of_what_is_gone() {
        let on = |fd, held: &str| OpenDescriptor { fd, ..holds(42, held) };
        let before = snapshot(vec![ImageSample { descriptors: vec![on(4, "cwr/wr")], ..image("a", "cwr/wr") }]);
        let after = snapshot(vec![ImageSample { descriptors: vec![on(8, "c/wr")], ..image("a", "c/wr") }]);
        assert_eq!(told(&before, &after), [(ChangeKind::Released, Some(42), "wr/-".to_owned())]);
    }

    #[test]
    fn what_can_no_longer_be_told_was_not_let_go() {
        let unknown = snapshot(vec![held(&[], "cw/-")]);
        let blind = snapshot(vec![ImageSample { answer: Answer::CannotOpen(13), ..image("a", "-/-") }]);
        assert_eq!(told(&unknown, &blind), []);
    }

    #[test]
    fn another_file_under_the_name_is_another_image() {
        let mut replaced = held(&[(43, "c/-")], "c/-");
        replaced.file.inode += 1;
        let (before, after) = (snapshot(vec![held(&[], "-/-")]), snapshot(vec![replaced]));
        assert_eq!(
            told(&before, &after),
            [
                (ChangeKind::ImageRemoved, None, "-/-".to_owned()),
                (ChangeKind::ImageAdded, None, "-/-".to_owned()),
                (ChangeKind::Acquired, Some(43), "c/-".to_owned())
            ]
        );
        assert_eq!(access("-/-"), Access::NONE);
    }
}
