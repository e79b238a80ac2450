//! What about this image should an admin know, and how dangerous is it?
//!
//! Each finding is a code for scripts, a severity, and one sentence that says what is so and what to do. Pure; asks the
//! snapshot and the sample that it was made of.

use std::collections::HashMap;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::sample::{Answer, ImageSample, Sample};
use super::snapshot::{Holder, Image, Opener, Verdict};
use super::wording::{filesystem_text, openers_text, process_name, range_text};
use crate::linux::descriptors::OpenMode;
use crate::linux::identity::FileId;
use crate::linux::lock_table::{LockKind, LockMode};
use crate::linux::mounts::Reach;
use crate::linux::process::ProcessFacts;
use crate::protocol::{Access, LockByte, Permission, PermissionSet};
use crate::text::{counted, escape, escape_path};

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

impl Finding {
    /// Something could not be listed or read.
    #[must_use]
    pub fn of_trouble(trouble: &str) -> Self {
        finding("cannot-look", Severity::Warning, escape(trouble).into_owned())
    }
}

pub(super) fn finding(code: &str, severity: Severity, text: String) -> Finding {
    Finding { code: code.to_owned(), severity, text }
}

/// Everything to be said about `image`, worst first.
#[must_use]
pub fn findings(image: &Image, raw: &ImageSample, sample: &Sample) -> Vec<Finding> {
    let mut all = Vec::new();
    all.extend(unanswered(image, raw));
    all.extend(without_holder(image, raw, sample));
    if !may_be_held_by_openers(image, raw) {
        let writes = |o: &&Opener| o.mode == OpenMode::Write && !is_lock_manager(image, o);
        all.extend(image.openers.iter().filter(writes).map(|o| unlocked_writer(image, o)));
    }
    all.extend(shared_writers(image));
    all.extend(loop_device(image, raw));
    all.extend(mounted(image));
    all.extend(local_locks(image, raw));
    all.extend(foreign_locks(image));
    all.extend(legacy_bytes(image));
    all.sort_by_key(|f| std::cmp::Reverse(f.severity));
    all
}

fn unanswered(image: &Image, raw: &ImageSample) -> Option<Finding> {
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
        Answer::Stalled(since) => Some(finding(
            "stalled",
            Severity::Warning,
            format!(
                "its storage ({}) has not answered since {since:.0}: whether it is locked cannot be told",
                filesystem_text(image)
            ),
        )),
    }
}

/// Whether the image lies on a FUSE mount whose server keeps the locks: then a descriptor does not show what it holds.
fn may_be_held_by_openers(image: &Image, raw: &ImageSample) -> bool {
    let fuse = raw.mount.as_ref().is_some_and(|m| m.reach == Reach::Fuse);
    let unlisted = |b: LockByte| !raw.table_rows.iter().any(|r| r.counts() && r.covers(b.offset()));
    fuse && image.ownerless().bytes().any(unlisted) && !image.openers.is_empty()
}

/// The owners that the server of a mount names. It may name any number, also that of an innocent process here.
fn word_of_server(raw: &ImageSample) -> String {
    let Answer::Bytes(found) = &raw.answer else { return String::new() };
    let mut pids: Vec<u32> = found.locks.iter().map(|l| l.pid.unsigned_abs()).filter(|pid| *pid > 1).collect();
    pids.sort_unstable();
    pids.dedup();
    match pids.as_slice() {
        [] => String::new(),
        [pid] => format!(" (its server names pid {pid} there)"),
        many => {
            let many: Vec<String> = many.iter().map(u32::to_string).collect();
            format!(" (its server names pids {} there)", many.join(", "))
        }
    }
}

/// Those who have the file in their memory.
fn mappers(raw: &ImageSample, sample: &Sample) -> String {
    let names: Vec<String> =
        raw.mapped_by.iter().filter_map(|pid| sample.processes.get(pid)).map(|p| process_name(p)).collect();
    names.join(", ")
}

fn without_holder(image: &Image, raw: &ImageSample, sample: &Sample) -> Option<Finding> {
    match image.verdict {
        Verdict::HeldByKernel if raw.loop_devices.is_empty() => Some(finding(
            "held-by-kernel",
            Severity::Warning,
            match mappers(raw, sample) {
                who if who.is_empty() => {
                    "locked by an open file that no process has, most likely a descriptor in flight in a unix socket"
                        .to_owned()
                }
                who => format!(
                    "locked by an open file that no process has: {who} has it mapped still and may be the one, or a \
                     descriptor is in flight in a unix socket"
                ),
            },
        )),
        Verdict::HeldByKernel => Some(finding(
            "held-by-kernel",
            Severity::Warning,
            format!(
                "locked by an open file that no process has: most likely loop device {}: see losetup -l",
                raw.loop_devices.join("; ")
            ),
        )),
        Verdict::HeldElsewhere => Some(finding(
            "held-elsewhere",
            Severity::Warning,
            format!(
                "locked, but not on this host: look on the others that use {}{}; or a stale lock there",
                filesystem_text(image),
                word_of_server(raw)
            ),
        )),
        Verdict::Unknown if matches!(raw.answer, Answer::Bytes(_)) => {
            // No numbers here: they change with every process on the host, and this does not.
            let why = if may_be_held_by_openers(image, raw) {
                &format!(
                    "the server of {} keeps the locks; here {} has it open, and other hosts may too",
                    filesystem_text(image),
                    openers_text(image)
                )
            } else if raw.sought {
                "all processes are still being searched"
            } else if sample.hidden_processes > 0 {
                "it may be one of the processes that may not be read; root sees the most"
            } else if sample.sees_all_processes {
                "the kernel's lock table did not list the lock: look again"
            } else {
                "processes outside this pid namespace cannot be seen: look from the host"
            };
            let device = match raw.loop_devices.first() {
                Some(device) => format!("; loop device {device} stands on it and may be the one"),
                None => String::new(),
            };
            Some(finding(
                "holder-unknown",
                Severity::Warning,
                format!("held, but the holder cannot be told: {why}{device}"),
            ))
        }
        _ => None,
    }
}

/// libvirt's lock manager has each image open for writing, holds its byte 0 or 1, and writes nothing.
fn is_lock_manager(image: &Image, opener: &Opener) -> bool {
    let manages = |h: &Holder| {
        h.lock == LockKind::Posix
            && h.foreign.is_some_and(|f| f.mode == LockMode::Write && f.end.is_some_and(|end| end <= 1))
    };
    let mut its = image.holders.iter().filter(|h| h.process.id == opener.process.id).peekable();
    its.peek().is_some() && its.all(manages)
}

fn mounted(image: &Image) -> Option<Finding> {
    image.mounted_on.as_ref().map(|point| {
        let text = format!("its file system is mounted on {}: what is written there asks no lock", escape_path(point));
        finding("mounted", if image.held().is_empty() { Severity::Note } else { Severity::Danger }, text)
    })
}

fn unlocked_writer(image: &Image, opener: &Opener) -> Finding {
    let same = |p: &ProcessFacts| p.id == opener.process.id;
    let alone = image.holders.iter().all(|h| same(&h.process))
        && image.openers.iter().all(|o| same(&o.process))
        && image.ownerless().is_empty()
        && image.loop_devices.is_empty()
        && image.mounted_on.is_none();
    let who = process_name(&opener.process);
    let (severity, consequence) = if alone {
        (Severity::Warning, "nothing would stop a second writer")
    } else {
        (Severity::Danger, "others use the image at the same time, and no lock stops them")
    };
    finding("unlocked-writer", severity, format!("{who} has it open for writing without a lock: {consequence}"))
}

/// Two that write and both let others write: nothing but a cluster file system inside keeps the content whole.
fn shared_writers(image: &Image) -> Option<Finding> {
    let mut writers: Vec<&ProcessFacts> = image
        .holders
        .iter()
        .filter(|h| !h.ours && h.access.permissions.contains(Permission::Write))
        .map(|h| &*h.process)
        .collect();
    writers.sort_by_key(|p| p.id);
    writers.dedup_by_key(|p| p.id);
    (writers.len() > 1).then(|| {
        let who: Vec<String> = writers.iter().map(|p| process_name(p)).collect();
        let text =
            format!("{} all write to it and let each other: safe only with a cluster file system", who.join(", "));
        finding("shared-writers", Severity::Warning, text)
    })
}

fn loop_device(image: &Image, raw: &ImageSample) -> Option<Finding> {
    let told_already = image.verdict == Verdict::HeldByKernel;
    (!raw.loop_devices.is_empty() && !told_already).then(|| {
        let text = format!("loop device {} stands on it: its writes ask no lock", raw.loop_devices.join("; "));
        finding("loop-device", if image.held().is_empty() { Severity::Note } else { Severity::Danger }, text)
    })
}

fn local_locks(image: &Image, raw: &ImageSample) -> Option<Finding> {
    let mount = raw.mount.as_ref().filter(|m| image.filesystem.remote || m.kind.starts_with("nfs"))?;
    let keeps = |o: &&String| ["nolock", "local_lock=all", "local_lock=posix"].contains(&o.as_str());
    mount.options.iter().find(keeps).map(|option| {
        let text = format!("mounted with {}: locks are kept on this host, other hosts do not see them", escape(option));
        finding("local-locks", Severity::Warning, text)
    })
}

/// What only shows when images are looked at together; added to the findings of each.
pub fn findings_between(images: &mut [Image]) {
    let written = |base: &Image, user: &Image| {
        let writes = |h: &&Holder| h.access.permissions.contains(Permission::Write);
        let other = |h: &&Holder| user.holders.iter().all(|u| u.process.id != h.process.id);
        base.holders.iter().filter(writes).find(other).map(|h| process_name(&h.process))
    };
    let mut found = Vec::new();
    let mut by_file: HashMap<FileId, Vec<usize>> = HashMap::new();
    images.iter().enumerate().for_each(|(i, image)| by_file.entry(image.file).or_default().push(i));
    for user in images.iter().filter(|i| !i.holders.is_empty()) {
        let Some(file) = user.backing.as_ref().and_then(|b| b.file) else { continue };
        for i in by_file.get(&file).into_iter().flatten().copied() {
            let base = &images[i];
            found.extend(written(base, user).map(|who| {
                let text = format!(
                    "{who} writes to it while {}, which stands on it, is in use: that overlay is being ruined",
                    escape_path(&user.path)
                );
                (i, finding("base-written", Severity::Danger, text))
            }));
        }
    }
    for (i, finding) in found {
        images[i].findings.insert(0, finding);
    }
}

/// What concerns none of the listed images alone. Where it says of the host what would be said of each image, it is said
/// of them more quietly.
#[must_use]
pub fn findings_of_host(images: &mut [Image], sample: &Sample) -> Vec<Finding> {
    let mut all = Vec::new();
    for image in &sample.deleted {
        let who = sample.processes.get(&image.descriptor.pid).map(|p| process_name(p)).unwrap_or_default();
        let text = format!(
            "{} is deleted, but {who} holds it: its space is free only when that ends",
            escape_path(&image.path)
        );
        all.push(finding("deleted-image", Severity::Warning, text));
    }
    // With locking off throughout, as Proxmox VE has it, every image would carry the same warning: said once, plainly.
    let is_qemu = |p: &ProcessFacts| p.vm.is_some() || p.command.starts_with("qemu-system") || p.command == "kvm";
    let mut unlocked: Vec<_> = images
        .iter()
        .flat_map(|i| &i.openers)
        .filter(|o| o.mode == OpenMode::Write && is_qemu(&o.process))
        .map(|o| o.process.id)
        .collect();
    unlocked.sort_unstable();
    unlocked.dedup();
    let locks = images.iter().flat_map(|i| &i.holders).any(|h| is_qemu(&h.process));
    if unlocked.len() > 1 && !locks {
        let text = format!(
            "{} here write to images and none holds a lock: locking is off, as Proxmox VE has it. Who has what open can \
             still be seen; what would be refused cannot: nothing would",
            counted(unlocked.len(), "VM", "VMs")
        );
        all.push(finding("locking-off", Severity::Warning, text));
        for finding in images.iter_mut().flat_map(|i| &mut i.findings).filter(|f| f.code == "unlocked-writer") {
            if finding.severity == Severity::Warning {
                finding.severity = Severity::Note;
            }
        }
    }
    all
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
    let explained = image.holders.iter().any(|h| h.foreign.is_some());
    (!legacy.is_empty() && !explained).then(|| {
        let text = "byte 104 or 204 (graph-mod) is held: QEMU 6.2 or older; newer QEMU does not look at it";
        finding("legacy-bytes", Severity::Note, text.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linux::mounts::Mount;
    use crate::monitor::examples::{descriptor, holds, image, mount, process, sample};
    use crate::monitor::sample::{Backing, DeletedImage};
    use crate::monitor::snapshot::Snapshot;
    use std::sync::Arc;

    fn codes(images: Vec<ImageSample>) -> Vec<(String, Severity)> {
        let people = [process(42, "qemu-system-x86", Some("a")), process(43, "qemu-system-x86", Some("b"))];
        let snapshot = Snapshot::of(&sample(images, &people));
        let all = snapshot.images.into_iter().flat_map(|i| i.findings).chain(snapshot.findings);
        all.map(|f| (f.code, f.severity)).collect()
    }

    fn has(images: Vec<ImageSample>, code: &str, severity: Severity) -> bool {
        codes(images).contains(&(code.to_owned(), severity))
    }

    #[test]
    fn two_writers_that_share_are_told() {
        let two = ImageSample { descriptors: vec![holds(42, "cw/-"), holds(43, "cw/-")], ..image("a", "cw/-") };
        assert!(has(vec![two], "shared-writers", Severity::Warning));
        let one = ImageSample { descriptors: vec![holds(42, "cw/-")], ..image("a", "cw/-") };
        assert_eq!(codes(vec![one]), []);
    }

    #[test]
    fn a_base_that_is_written_under_an_overlay_in_use_is_a_danger() {
        let base = ImageSample { descriptors: vec![holds(43, "cwr/-")], ..image("base", "cwr/-") };
        let mut top = ImageSample { descriptors: vec![holds(42, "cwr/wr")], ..image("top", "cwr/wr") };
        top.backing = Some(Backing { path: base.path.to_path_buf(), file: Some(base.file), answered: true });
        top.file.inode = 100;
        assert!(has(vec![top.clone(), base.clone()], "base-written", Severity::Danger));
        // A commit job of the same process writes to it rightly.
        let own = ImageSample { descriptors: vec![holds(42, "cwr/-")], ..base };
        assert!(!has(vec![top, own], "base-written", Severity::Danger));
    }

    #[test]
    fn a_loop_device_is_a_danger_only_on_a_held_image() {
        let with_loop = |locked, held: Vec<_>| ImageSample {
            loop_devices: vec!["loop3".to_owned()],
            descriptors: held,
            ..image("a", locked)
        };
        assert!(has(vec![with_loop("cw/w", vec![holds(42, "cw/w")])], "loop-device", Severity::Danger));
        assert!(has(vec![with_loop("-/-", vec![])], "loop-device", Severity::Note));
        assert!(has(vec![with_loop("cw/w", vec![])], "held-by-kernel", Severity::Warning));
    }

    #[test]
    fn locks_that_stay_on_this_host_are_told() {
        let nolock = Arc::new(Mount { options: vec!["nolock".to_owned()], ..(*mount("nfs", Reach::Remote)).clone() });
        assert!(has(vec![ImageSample { mount: Some(nolock), ..image("a", "-/-") }], "local-locks", Severity::Warning));
    }

    #[test]
    fn a_host_without_locking_is_told_once() {
        let open = |pid| descriptor(pid, 3, OpenMode::Write, Vec::new());
        let off = |pid| ImageSample { descriptors: vec![open(pid)], ..image("a", "-/-") };
        assert!(has(vec![off(42), off(43)], "locking-off", Severity::Warning));
        assert!(!has(vec![off(42)], "locking-off", Severity::Warning));
        let locked = ImageSample { descriptors: vec![holds(43, "cw/w")], ..image("b", "cw/w") };
        assert!(!has(vec![off(42), off(43), locked], "locking-off", Severity::Warning));
    }

    #[test]
    fn a_deleted_image_that_is_held_is_told() {
        let mut sample = sample(Vec::new(), &[process(42, "qemu-system-x86", Some("a"))]);
        sample.deleted.push(DeletedImage { path: "/images/old.raw".into(), descriptor: holds(42, "cw/w") });
        let findings = Snapshot::of(&sample).findings;
        assert_eq!(findings[0].code, "deleted-image");
        assert!(findings[0].text.starts_with("/images/old.raw is deleted, but a (qemu-system-x86 42)"));
    }
}
