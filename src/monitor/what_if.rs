//! What would be refused now, by whom, and what would be lost?
//!
//! Judges a known program against the image and the files below it, as QEMU would open them: step by step on the image,
//! then each file of the backing chain. Pure. What is not known is never "granted".

use std::path::PathBuf;

use super::snapshot::{ByteState, Holder, Image, Snapshot};
use crate::image::header::family_of_backing;
use crate::linux::descriptors::OpenMode;
use crate::protocol::{
    Access, Family, HeldByOthers, Judgement, LockByte, Operation, Permission, PermissionSet, Sentence, judge,
};

/// The answer for one program.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// Every step passes, on the image and on every file below it.
    Granted,
    /// A step does not.
    Refused(Refused),
    /// It cannot be told, and why.
    Unknown(String),
}

/// Where and by whom a program is stopped.
#[derive(Clone, Debug, PartialEq)]
pub struct Refused {
    /// The first byte, in QEMU's order, that somebody else holds.
    pub byte: LockByte,
    /// The image, or the file of its backing chain, that the byte is on.
    pub on_image: PathBuf,
    /// What QEMU says.
    pub sentence: Sentence,
    /// Who holds that byte; empty where nobody can be named.
    pub holders: Vec<Holder>,
    /// The image has been truncated by an earlier step, and `qemu-img` then deletes it.
    pub destroys_image: bool,
}

/// What a program would be told, and what it would do to the image.
#[derive(Clone, Debug, PartialEq)]
pub struct WhatIf {
    /// Which program.
    pub operation: &'static Operation,
    /// Granted, refused or unknown.
    pub outcome: Outcome,
    /// It is not refused, and that is the danger.
    pub harm: Harm,
}

/// What a program that is granted would do to somebody who uses the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Harm {
    /// Nothing.
    None,
    /// Throw the content away that somebody has open.
    Overwrites,
    /// Write while somebody else writes without a lock that would stop it.
    WritesBesideWriter,
    /// Stand on a file that somebody writes to without a lock.
    BaseIsWritten,
}

/// Every program that there is for the format of `image`.
#[must_use]
pub fn what_if_all(snapshot: &Snapshot, image: &Image) -> Vec<WhatIf> {
    Operation::ALL.iter().filter_map(|operation| what_if(snapshot, image, operation)).collect()
}

/// Sorts answers: first those that lose data, then what is refused, what cannot be told, what is granted.
pub fn worst_first(answers: &mut [WhatIf]) {
    let loses = |a: &WhatIf| a.harm != Harm::None || matches!(&a.outcome, Outcome::Refused(r) if r.destroys_image);
    let rank = |a: &WhatIf| match a.outcome {
        _ if loses(a) => 0,
        Outcome::Refused(_) => 1,
        Outcome::Unknown(_) => 2,
        Outcome::Granted => 3,
    };
    answers.sort_by_key(|a| (rank(a), a.operation.name));
}

/// What `operation` would be told now; `None` if there is no such program for the format of `image`.
#[must_use]
pub fn what_if(snapshot: &Snapshot, image: &Image, operation: &'static Operation) -> Option<WhatIf> {
    let recipe = operation.recipe(image.family())?;
    let outcome = if image.format.is_none() {
        Outcome::Unknown(format!("{} cannot be read: its format is unknown", crate::text::escape_path(&image.path)))
    } else if recipe.steps.is_empty() {
        below(snapshot, image, operation)
    } else if let Some(why) = unknown(image) {
        Outcome::Unknown(why)
    } else {
        match judge(recipe, held_by_others(image)) {
            Judgement::Refused(r) => Outcome::Refused(Refused {
                byte: r.byte,
                on_image: image.path.to_path_buf(),
                sentence: r.sentence,
                holders: holders_of(image, r.byte),
                destroys_image: r.destroys_image,
            }),
            Judgement::Granted => below(snapshot, image, operation),
        }
    };
    // Whether those other files are opened is the format's own business: only what asks nothing of the image leaves them.
    let outcome = match outcome {
        Outcome::Granted if image.data_elsewhere && !recipe.steps.is_empty() => Outcome::Unknown(data_elsewhere(image)),
        other => other,
    };
    let widest = recipe.widest_access();
    let writes = widest.permissions.contains(Permission::Write) || widest.permissions.contains(Permission::Resize);
    let beside_writer = image.openers.iter().any(|o| o.mode == OpenMode::Write)
        || !image.loop_devices.is_empty()
        || image.mounted_on.is_some()
        || image.holders.iter().any(|h| h.access.permissions.contains(Permission::Write));
    let written_below = || {
        let written = |i: &Image| i.openers.iter().any(|o| o.mode == OpenMode::Write) || !i.loop_devices.is_empty();
        chain(snapshot, image).into_iter().flatten().any(|l| written(l.image))
    };
    let harm = match outcome {
        Outcome::Granted if recipe.destroys_after_step.is_some() && image.is_in_use() => Harm::Overwrites,
        Outcome::Granted if writes && beside_writer => Harm::WritesBesideWriter,
        Outcome::Granted if !operation.backing.is_empty() && written_below() => Harm::BaseIsWritten,
        _ => Harm::None,
    };
    Some(WhatIf { operation, outcome, harm })
}

/// The programs that somebody who holds `access` on an image of `family` refuses, in the order of their names.
#[must_use]
pub fn refused_beside(access: Access, family: Family) -> Vec<&'static Operation> {
    let others = HeldByOthers::read(access.without_legacy());
    let refused =
        |o: &&Operation| o.recipe(family).is_some_and(|recipe| matches!(judge(recipe, others), Judgement::Refused(_)));
    Operation::ALL.iter().filter(refused).collect()
}

/// Who holds a byte that somebody who wants `access` needs free: the first such byte in QEMU's order.
#[must_use]
pub fn conflict(image: &Image, access: Access) -> Option<(LockByte, Sentence, Vec<&Holder>)> {
    let others = held_by_others(image);
    let (byte, sentence) = first_refusal(access.without_legacy(), others)?;
    Some((byte, sentence, holders_on(image, byte).collect()))
}

/// The first byte at which others refuse `access`, if it is taken in one step: their write locks before the test.
#[must_use]
pub fn first_refusal(access: Access, others: HeldByOthers) -> Option<(LockByte, Sentence)> {
    let blocked = access.bytes().find(|b| others.write_locked.contains(*b)).map(|b| (b, Sentence::lock_failed(b)));
    blocked.or_else(|| access.first_conflict(others.locked).map(|b| (b, Sentence::conflict(b))))
}

/// Whether a reader that denies nothing to others (`-U`, `force-share=on`) would be let in, through the whole chain.
#[must_use]
pub fn shared_reader_passes(snapshot: &Snapshot, image: &Image) -> bool {
    let reader = Access::new(PermissionSet::NONE.with(Permission::ConsistentRead), PermissionSet::NONE);
    let passes = |i: &Image| unknown(i).is_none() && first_refusal(reader, held_by_others(i)).is_none();
    passes(image) && chain(snapshot, image).into_iter().all(|link| link.is_ok_and(|l| passes(l.image)))
}

/// One file of a backing chain.
#[derive(Clone, Copy, Debug)]
pub struct Link<'a> {
    /// Which.
    pub image: &'a Image,
    /// How QEMU treats it there.
    pub family: Family,
}

/// The files below the image, nearest first; `Err` with the reason where the chain cannot be followed.
#[must_use]
pub fn chain<'a>(snapshot: &'a Snapshot, image: &'a Image) -> Vec<Result<Link<'a>, String>> {
    let mut chain = Vec::new();
    let mut seen = vec![image.file];
    let mut top = image;
    while let Some(name) = &top.backing_file {
        let shown = crate::text::escape(name);
        let Some(backing) = &top.backing else {
            chain.push(Err(format!("{shown} is no path: it is not followed")));
            break;
        };
        if !backing.answered {
            chain.push(Err(format!("{shown}: its storage does not answer")));
            break;
        }
        let Some(file) = backing.file else {
            chain.push(Err(format!("{shown} is missing or no image: QEMU could not open it")));
            break;
        };
        if seen.contains(&file) {
            chain.push(Err(format!("{shown} is in the chain already: it goes round in a circle")));
            break;
        }
        seen.push(file);
        let by_path = snapshot.images.iter().find(|i| i.file == file && *i.resolved == backing.path);
        match by_path.or_else(|| snapshot.images.iter().find(|i| i.file == file)) {
            Some(image) => {
                let family = family_of_backing(top.backing_format.as_deref(), image.format);
                chain.push(Ok(Link { image, family }));
                if family == Family::Raw {
                    // Whatever it looks like: what is opened as raw has nothing below it.
                    break;
                }
                top = image;
            }
            None => {
                chain.push(Err(format!("{shown} is not among the watched images")));
                break;
            }
        }
    }
    chain
}

fn below(snapshot: &Snapshot, image: &Image, operation: &Operation) -> Outcome {
    if operation.backing.is_empty() {
        return Outcome::Granted;
    }
    for link in chain(snapshot, image) {
        let (backing, access) = match link {
            Ok(link) => (link.image, operation.backing.of(link.family)),
            Err(why) => return Outcome::Unknown(format!("backing file {why}")),
        };
        if let Some(why) = unknown(backing) {
            return Outcome::Unknown(why);
        }
        if backing.data_elsewhere {
            return Outcome::Unknown(data_elsewhere(backing));
        }
        if let Some((byte, sentence)) = first_refusal(access, held_by_others(backing)) {
            return Outcome::Refused(Refused {
                byte,
                on_image: backing.path.to_path_buf(),
                sentence,
                holders: holders_of(backing, byte),
                destroys_image: false,
            });
        }
    }
    Outcome::Granted
}

fn data_elsewhere(image: &Image) -> String {
    format!(
        "{} keeps its data in another file, which QEMU would lock too and which is not looked at here",
        crate::text::escape_path(&image.path)
    )
}

fn unknown(image: &Image) -> Option<String> {
    if image.stalled_since.is_some() {
        return Some(format!("the storage of {} does not answer", crate::text::escape_path(&image.path)));
    }
    let asked = image.bytes.iter().all(|b| b.state != ByteState::Unknown);
    (!asked).then(|| format!("the locks of {} cannot be told", crate::text::escape_path(&image.path)))
}

fn held_by_others(image: &Image) -> HeldByOthers {
    HeldByOthers { locked: image.held(), write_locked: image.write_locked }
}

/// Who holds `byte` of `image`, as far as they can be named.
pub fn holders_on(image: &Image, byte: LockByte) -> impl Iterator<Item = &Holder> {
    let on_byte = image.bytes.iter().find(|b| b.byte == byte).map(|b| b.holders.as_slice()).unwrap_or_default();
    on_byte.iter().filter_map(|i| image.holders.get(*i))
}

fn holders_of(image: &Image, byte: LockByte) -> Vec<Holder> {
    holders_on(image, byte).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;
    use std::sync::Arc;

    use crate::linux::identity::FileId;
    use crate::monitor::examples::{descriptor, holds, image, process, sample};
    use crate::monitor::sample::{Answer, Backing, ImageSample};

    fn ask(images: Vec<ImageSample>, operation: &str) -> WhatIf {
        let snapshot = Snapshot::of(&sample(images, &[process(42, "qemu-system-x86", Some("web01"))]));
        what_if(&snapshot, &snapshot.images[0], Operation::named(operation).unwrap()).unwrap()
    }

    fn on(base: FileId) -> ImageSample {
        let mut top = image("top.qcow2", "-/-");
        Arc::make_mut(top.header.as_mut().unwrap()).backing_file = Some("base.qcow2".to_owned());
        top.backing = Some(Backing { path: "/images/base.qcow2".into(), file: Some(base), answered: true });
        top.file.inode = 100;
        top
    }

    #[test]
    fn a_running_vm_refuses_a_writer_and_lets_a_force_share_reader_in() {
        let held = || ImageSample { descriptors: vec![holds(42, "cwr/wr")], ..image("a", "cwr/wr") };
        let Outcome::Refused(refused) = ask(vec![held()], "check").outcome else { panic!("granted") };
        assert_eq!((refused.byte.offset(), refused.holders.len()), (101, 1));
        assert_eq!(refused.sentence.to_string(), "Failed to get shared \"write\" lock");
        assert_eq!(ask(vec![held()], "check-force-share").outcome, Outcome::Granted);
    }

    #[test]
    fn overwriting_what_somebody_reads_is_granted_and_told() {
        let held = ImageSample { descriptors: vec![holds(42, "c/-")], ..image("a", "c/-") };
        let answer = ask(vec![held], "create");
        assert_eq!((answer.outcome, answer.harm), (Outcome::Granted, Harm::Overwrites));
        assert_eq!(ask(vec![image("a", "-/-")], "create").harm, Harm::None);
    }

    #[test]
    fn writing_under_a_vm_that_holds_no_lock_is_granted_and_told() {
        let writer = || descriptor(42, 3, OpenMode::Write, Vec::new());
        let open = || ImageSample { descriptors: vec![writer()], ..image("a", "-/-") };
        assert_eq!(ask(vec![open()], "snapshot-create").harm, Harm::WritesBesideWriter);
        assert_eq!(ask(vec![open()], "info").harm, Harm::None);
        assert_eq!(ask(vec![open()], "create").harm, Harm::Overwrites);
    }

    #[test]
    fn a_refusal_may_come_from_the_backing_file() {
        let base = image("base.qcow2", "cwr/wr");
        let answer = ask(vec![on(base.file), base.clone()], "vm");
        let Outcome::Refused(refused) = answer.outcome else { panic!("{:?}", answer.outcome) };
        assert_eq!((refused.on_image.to_str(), refused.byte.offset()), (Some("/images/base.qcow2"), 101));
        assert_eq!(ask(vec![on(base.file), base], "info").outcome, Outcome::Granted, "info opens nothing below");
    }

    #[test]
    fn what_cannot_be_seen_is_not_granted() {
        let base = image("base.qcow2", "-/-");
        assert!(matches!(ask(vec![on(base.file)], "vm").outcome, Outcome::Unknown(_)));
        let blind = || ImageSample { answer: Answer::CannotOpen(13), ..image("a", "-/-") };
        assert!(matches!(ask(vec![blind()], "vm").outcome, Outcome::Unknown(_)));
        // Not even what locks nothing is granted on an image of which not even the format is known.
        let unread = ImageSample { header: None, ..blind() };
        assert!(matches!(ask(vec![unread], "info").outcome, Outcome::Unknown(_)));
        let mut elsewhere = image("a", "-/-");
        Arc::make_mut(elsewhere.header.as_mut().unwrap()).data_elsewhere = true;
        assert!(matches!(ask(vec![elsewhere], "vm").outcome, Outcome::Unknown(_)));
        let mut circle = on(FileId { inode: 100, ..base.file });
        circle.path = Path::new("/images/top.qcow2").into();
        let Outcome::Unknown(why) = ask(vec![circle], "vm").outcome else { panic!("granted") };
        assert!(why.contains("circle"), "{why}");
    }
}
