//! Which bytes are held, by whom, and what is the verdict on each image?
//!
//! Pure: the same [`Sample`] always gives the same snapshot. A byte is free only if GETLK said so and nobody's descriptor
//! says otherwise; what could not be asked is `unknown` and a state of its own.

use std::path::PathBuf;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::finding::{Finding, findings};
use super::sample::{Answer, ImageSample, Sample};
use crate::image::header::Format;
use crate::linux::descriptors::{OpenDescriptor, OpenMode};
use crate::linux::identity::FileId;
use crate::linux::lock_table::{LockKind, LockMode, LockRecord};
use crate::linux::mounts::Reach;
use crate::linux::process::ProcessFacts;
use crate::protocol::{Access, Family, LockByte, Role};

/// One moment, understood.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    /// When the sample was taken.
    pub taken_at: Timestamp,
    /// On which host.
    pub host: String,
    /// Whether everything that was asked was answered: no hidden process, no unreadable image or directory.
    pub complete: bool,
    /// How many processes could be seen but not read.
    pub hidden_processes: usize,
    /// What could not be listed or read, in words.
    pub troubles: Vec<String>,
    /// Each watched image, by path.
    pub images: Vec<Image>,
}

/// What is known about an image's locks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// No byte is locked.
    Free,
    /// Locked, and each locked byte has a holder here.
    Held,
    /// Locked by a description that no process has: a loop device, a descriptor in flight, a mapping.
    HeldByKernel,
    /// Locked, and this kernel knows no such lock: somebody behind the file server.
    HeldElsewhere,
    /// It cannot be told: the image or a process may not be read.
    Unknown,
    /// The file system does not answer lock questions.
    CannotLock,
    /// No answer in time.
    Stalled,
}

impl Verdict {
    /// As in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Free => "free",
            Self::Held => "held",
            Self::HeldByKernel => "held-by-kernel",
            Self::HeldElsewhere => "held-elsewhere",
            Self::Unknown => "unknown",
            Self::CannotLock => "cannot-lock",
            Self::Stalled => "stalled",
        }
    }

    /// Whether it says for certain that somebody, or nobody, holds the image.
    #[must_use]
    pub const fn is_certain(self) -> bool {
        matches!(self, Self::Free | Self::Held | Self::HeldByKernel | Self::HeldElsewhere)
    }
}

/// Whether a byte is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ByteState {
    /// By nobody, on any host.
    Free,
    /// By somebody.
    Held,
    /// It could not be asked.
    Unknown,
}

/// One of the ten bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ByteView {
    /// Which byte.
    pub byte: LockByte,
    /// Whether it is locked.
    pub state: ByteState,
    /// Who holds it, as places in [`Image::holders`]; empty where nobody can be named.
    pub holders: Vec<usize>,
}

/// A lock that is not made of the ten bytes, or not a read lock: no QEMU takes such.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ForeignRange {
    /// First byte.
    pub start: u64,
    /// Last byte, inclusive; `None`: without end.
    pub end: Option<u64>,
    /// Read or write.
    pub mode: LockMode,
}

/// A process that holds locks on an image through one descriptor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Who.
    pub process: ProcessFacts,
    /// Through which descriptor; `None` if only the lock itself names the process.
    pub fd: Option<i32>,
    /// OFD or POSIX.
    pub lock: LockKind,
    /// The bytes held, foreign ranges left out.
    pub access: Access,
    /// A foreign lock; then `access` is empty.
    pub foreign: Option<ForeignRange>,
}

/// A process that has the image open and holds none of the ten bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opener {
    /// Who.
    pub process: ProcessFacts,
    /// Through which descriptor.
    pub fd: i32,
    /// For reading or for writing.
    pub mode: OpenMode,
}

/// The file system of an image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filesystem {
    /// Such as `ext4` or `nfs4`.
    pub kind: String,
    /// Such as `/dev/vda1` or `filer:/vol`.
    pub source: String,
    /// Whether holders may be on other hosts.
    pub remote: bool,
}

/// An image at one moment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Image {
    /// As it is shown.
    pub path: PathBuf,
    /// The file behind the path.
    pub file: FileId,
    /// Its format; `None` if its header could not be read.
    pub format: Option<Format>,
    /// Length of the disk that a guest sees, in bytes.
    pub virtual_size: Option<u64>,
    /// Length of the file in bytes.
    pub file_size: u64,
    /// The backing file as it stands in the header.
    pub backing_file: Option<String>,
    /// Where it lies.
    pub filesystem: Filesystem,
    /// What can be said of its locks.
    pub verdict: Verdict,
    /// All ten bytes, in order.
    pub bytes: Vec<ByteView>,
    /// Who holds locks on it.
    pub holders: Vec<Holder>,
    /// Who has it open without one.
    pub openers: Vec<Opener>,
    /// What an admin should know about it.
    pub findings: Vec<Finding>,
}

impl Image {
    /// The bytes that are known to be held.
    #[must_use]
    pub fn held(&self) -> Access {
        self.bytes.iter().filter(|b| b.state == ByteState::Held).map(|b| b.byte).collect()
    }

    /// The held bytes whose holder cannot be named.
    #[must_use]
    pub fn ownerless(&self) -> Access {
        self.bytes.iter().filter(|b| b.state == ByteState::Held && b.holders.is_empty()).map(|b| b.byte).collect()
    }

    /// As QEMU would treat it.
    #[must_use]
    pub fn family(&self) -> Family {
        self.format.map_or(Family::Raw, Format::family)
    }

    /// What `holder` does with the image.
    #[must_use]
    pub fn role_of(&self, holder: &Holder) -> Role {
        Role::of(holder.access, self.family())
    }
}

impl Snapshot {
    /// Makes sense of a sample.
    #[must_use]
    pub fn of(sample: &Sample) -> Self {
        let images: Vec<Image> = sample.images.iter().map(|i| understand(i, sample)).collect();
        let answered = |i: &ImageSample| matches!(i.answer, Answer::Bytes(_));
        Self {
            taken_at: sample.taken_at,
            host: sample.host.clone(),
            complete: sample.hidden_processes == 0
                && sample.sees_all_processes
                && sample.troubles.is_empty()
                && sample.images.iter().all(answered),
            hidden_processes: sample.hidden_processes,
            troubles: sample.troubles.clone(),
            images,
        }
    }

    /// Whether two snapshots say the same, whenever they were taken.
    #[must_use]
    pub fn says_the_same(&self, other: &Self) -> bool {
        self.complete == other.complete
            && self.hidden_processes == other.hidden_processes
            && self.troubles == other.troubles
            && self.images == other.images
    }
}

fn understand(image: &ImageSample, sample: &Sample) -> Image {
    let holders = holders(image, sample);
    let openers = openers(image, sample);
    let bytes = bytes(image, &holders);
    let verdict = verdict(image, sample, &bytes);
    let mount = image.mount.as_deref();
    let header = image.header.as_ref();
    let mut understood = Image {
        path: image.path.clone(),
        file: image.file,
        format: header.map(|h| h.format),
        virtual_size: header.and_then(|h| h.virtual_size),
        file_size: image.file_size,
        backing_file: header.and_then(|h| h.backing_file.clone()),
        filesystem: Filesystem {
            kind: mount.map(|m| m.kind.clone()).unwrap_or_default(),
            source: mount.map(|m| m.source.clone()).unwrap_or_default(),
            remote: mount.is_some_and(|m| m.reach == Reach::Remote),
        },
        verdict,
        bytes,
        holders,
        openers,
        findings: Vec::new(),
    };
    understood.findings = findings(&understood, image, sample);
    understood
}

/// Whether a record is a lock that GETLK counts: held, and neither flock nor lease.
fn counts(record: &LockRecord) -> bool {
    !record.waiting && matches!(record.kind, LockKind::Ofd | LockKind::Posix)
}

/// Whether a range can be QEMU's: a read lock on bytes of one of the two rows only. Neighbouring bytes come as one range.
fn is_protocol(record: &LockRecord) -> bool {
    let within = |first, last| first <= record.start && record.end.is_some_and(|end| end <= last);
    record.mode == LockMode::Read && (within(100, 104) || within(200, 204))
}

fn holders(image: &ImageSample, sample: &Sample) -> Vec<Holder> {
    let mut holders: Vec<Holder> = Vec::new();
    let mut descriptors: Vec<&OpenDescriptor> = image.descriptors.iter().collect();
    descriptors.sort_by_key(|d| (d.pid, d.fd));
    for descriptor in descriptors {
        let Some(process) = sample.processes.get(&descriptor.pid) else { continue };
        for kind in [LockKind::Ofd, LockKind::Posix] {
            let locks: Vec<&LockRecord> = descriptor.locks.iter().filter(|r| counts(r) && r.kind == kind).collect();
            // POSIX locks belong to the process and are printed behind each of its descriptors: one is enough.
            let told = |h: &Holder| h.lock == LockKind::Posix && h.process.id == process.id;
            if locks.is_empty() || (kind == LockKind::Posix && holders.iter().any(told)) {
                continue;
            }
            let holder = |access, foreign| Holder {
                process: process.clone(),
                fd: Some(descriptor.fd),
                lock: kind,
                access,
                foreign,
            };
            let access = access_of(locks.iter().copied().filter(|r| is_protocol(r)));
            if !access.is_empty() {
                holders.push(holder(access, None));
            }
            for record in locks.into_iter().filter(|r| !is_protocol(r)) {
                holders.push(holder(Access::NONE, Some(foreign(record))));
            }
        }
    }
    // A POSIX lock names its process in the table, also where the process may not be read.
    for record in image.table_rows.iter().filter(|r| counts(r) && r.kind == LockKind::Posix && r.pid > 0) {
        let Some(process) = i32::try_from(record.pid).ok().and_then(|pid| sample.processes.get(&pid)) else { continue };
        if image.descriptors.iter().any(|d| d.pid == process.id.pid && !d.locks.is_empty()) {
            continue;
        }
        let known = is_protocol(record);
        holders.push(Holder {
            process: process.clone(),
            fd: None,
            lock: LockKind::Posix,
            access: if known { access_of(std::iter::once(record)) } else { Access::NONE },
            foreign: (!known).then(|| foreign(record)),
        });
    }
    holders
}

fn access_of<'a>(records: impl Iterator<Item = &'a LockRecord>) -> Access {
    let covered = |r: &'a LockRecord| LockByte::ALL.into_iter().filter(move |b| r.covers(b.offset()));
    records.flat_map(covered).collect()
}

fn foreign(record: &LockRecord) -> ForeignRange {
    ForeignRange { start: record.start, end: record.end, mode: record.mode }
}

/// Whether a holder's lock lies on `byte`, foreign ranges included.
fn lies_on(holder: &Holder, byte: LockByte) -> bool {
    match holder.foreign {
        Some(range) => range.start <= byte.offset() && range.end.is_none_or(|end| byte.offset() <= end),
        None => holder.access.contains(byte),
    }
}

fn openers(image: &ImageSample, sample: &Sample) -> Vec<Opener> {
    let holds = |pid: i32| {
        let on_a_byte = |r: &LockRecord| counts(r) && LockByte::ALL.iter().any(|b| r.covers(b.offset()));
        image.descriptors.iter().any(|d| d.pid == pid && d.locks.iter().any(on_a_byte))
    };
    let mut openers: Vec<Opener> = image
        .descriptors
        .iter()
        .filter(|d| !holds(d.pid))
        .filter_map(|d| Some(Opener { process: sample.processes.get(&d.pid)?.clone(), fd: d.fd, mode: d.mode }))
        .collect();
    openers.sort_by_key(|o| (o.process.id.pid, o.fd));
    openers
}

fn bytes(image: &ImageSample, holders: &[Holder]) -> Vec<ByteView> {
    let view = |byte: LockByte| {
        let holders: Vec<usize> = (0..holders.len()).filter(|i| lies_on(&holders[*i], byte)).collect();
        let state = match &image.answer {
            Answer::Bytes(found) if found.locked.contains(byte) => ByteState::Held,
            // A descriptor that holds the byte was read after the question: the later word counts.
            _ if !holders.is_empty() => ByteState::Held,
            Answer::Bytes(_) => ByteState::Free,
            Answer::CannotOpen(_) | Answer::CannotLock(_) => ByteState::Unknown,
        };
        ByteView { byte, state, holders }
    };
    LockByte::ALL.into_iter().map(view).collect()
}

fn verdict(image: &ImageSample, sample: &Sample, bytes: &[ByteView]) -> Verdict {
    match image.answer {
        Answer::CannotOpen(_) => return Verdict::Unknown,
        Answer::CannotLock(_) => return Verdict::CannotLock,
        Answer::Bytes(_) => {}
    }
    let held = |b: &&ByteView| b.state == ByteState::Held;
    if !bytes.iter().any(|b| held(&b)) {
        return Verdict::Free;
    }
    let everyone_read = sample.hidden_processes == 0 && sample.sees_all_processes;
    let shared = image.mount.as_ref().is_some_and(|m| m.reach != Reach::Local);
    let without_holder = bytes.iter().filter(held).filter(|b| b.holders.is_empty()).map(|b| {
        let in_table = image.table_rows.iter().any(|r| counts(r) && r.covers(b.byte.offset()));
        match (in_table, everyone_read, shared) {
            (true, true, _) => Verdict::HeldByKernel,
            (false, _, true) => Verdict::HeldElsewhere,
            // On a local file system GETLK and the table must agree; where they do not, a row was missed, or belongs to
            // another pid namespace.
            _ => Verdict::Unknown,
        }
    });
    // The least certain of them speaks for the image.
    without_holder.max().unwrap_or(Verdict::Held)
}
