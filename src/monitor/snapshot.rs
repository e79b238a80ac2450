//! What is known of each image at one moment?
//!
//! The values that screens, tables and streams are made of; `understand` makes them of a [`Sample`]. Pure.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::alias::aliases;
use super::finding::{Finding, findings_between, findings_of_host};
use super::sample::{Answer, Backing, ImageSample, Sample};
use super::understand::understand;
use crate::image::header::Format;
use crate::linux::descriptors::OpenMode;
use crate::linux::identity::FileId;
use crate::linux::lock_table::{LockKind, LockMode};
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
    /// What an admin should know that is about none of them alone.
    pub findings: Vec<Finding>,
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
    pub process: Arc<ProcessFacts>,
    /// Through which descriptor; `None` if only the lock itself names the process.
    pub fd: Option<i32>,
    /// OFD or POSIX.
    pub lock: LockKind,
    /// The bytes held, foreign ranges left out.
    pub access: Access,
    /// A foreign lock; then `access` is empty.
    pub foreign: Option<ForeignRange>,
    /// The process that looked holds it itself: a test lock of the operator's.
    pub ours: bool,
}

/// A process that has the image open and holds none of the ten bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opener {
    /// Who.
    pub process: Arc<ProcessFacts>,
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
    pub path: Arc<Path>,
    /// The same with every link resolved.
    pub resolved: Arc<Path>,
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
    /// Where that is, if its name is a path.
    pub backing: Option<Backing>,
    /// The format that the header names for it.
    pub backing_format: Option<String>,
    /// Part of it lies in other files that are not followed, such as a qcow2's `data_file`.
    pub data_elsewhere: bool,
    /// Where it lies.
    pub filesystem: Filesystem,
    /// What can be said of its locks.
    pub verdict: Verdict,
    /// Who holds it is still being sought.
    #[serde(default)]
    pub sought: bool,
    /// Since when its storage has not answered.
    pub stalled_since: Option<Timestamp>,
    /// All ten bytes, in order.
    pub bytes: Vec<ByteView>,
    /// The bytes under a write lock, which no QEMU takes.
    pub write_locked: Access,
    /// Who holds locks on it.
    pub holders: Vec<Holder>,
    /// Who has it open without one.
    pub openers: Vec<Opener>,
    /// What an admin should know about it.
    pub findings: Vec<Finding>,
    /// The loop devices that stand on it, each with where its file system is mounted.
    pub loop_devices: Vec<String>,
    /// Where the file system on this block device is mounted.
    pub mounted_on: Option<PathBuf>,
    /// How many of the watched images stand on it directly.
    pub overlays: usize,
}

impl Image {
    /// The bytes that are known to be held.
    #[must_use]
    pub fn held(&self) -> Access {
        self.bytes.iter().filter(|b| b.state == ByteState::Held).map(|b| b.byte).collect()
    }

    /// Whether anybody at all is known to use it, with a lock or without.
    #[must_use]
    pub fn is_in_use(&self) -> bool {
        !self.held().is_empty()
            || !self.holders.is_empty()
            || !self.openers.is_empty()
            || !self.loop_devices.is_empty()
            || self.mounted_on.is_some()
    }

    /// The bytes that are known to be free.
    #[must_use]
    pub fn free(&self) -> Access {
        self.bytes.iter().filter(|b| b.state == ByteState::Free).map(|b| b.byte).collect()
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
        let mut images: Vec<Image> = sample.images.iter().map(|i| understand(i, sample)).collect();
        let mut overlays: HashMap<FileId, usize> = HashMap::new();
        let below = sample.images.iter().filter_map(|i| i.backing.as_ref()?.file);
        below.for_each(|file| *overlays.entry(file).or_default() += 1);
        images.iter_mut().for_each(|i| i.overlays = overlays.get(&i.file).copied().unwrap_or_default());
        findings_between(&mut images);
        aliases(&mut images, &sample.images);
        let findings = findings_of_host(&mut images, sample);
        let answered = |i: &Arc<ImageSample>| matches!(i.answer, Answer::Bytes(_));
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
            findings,
        }
    }

    /// Whether two snapshots say the same, whenever they were taken.
    #[must_use]
    pub fn says_the_same(&self, other: &Self) -> bool {
        self.complete == other.complete
            && self.hidden_processes == other.hidden_processes
            && self.troubles == other.troubles
            && self.findings == other.findings
            && self.images == other.images
    }
}
