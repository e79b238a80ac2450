//! What was seen at one moment, before anybody thinks about it?
//!
//! Plain data that can be written down and read back: a recorded sample gives the same snapshot on any machine. The time
//! is in it and never asked for.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::image::header::Header;
use crate::linux::descriptors::OpenDescriptor;
use crate::linux::identity::{Device, FileId};
use crate::linux::lock_table::LockRecord;
use crate::linux::mounts::Mount;
use crate::linux::probe::BytesFound;
use crate::linux::process::ProcessFacts;

/// One moment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// When it was taken.
    pub taken_at: Timestamp,
    /// On which host.
    pub host: String,
    /// By which process of that host, if it could hold locks of its own; 0 for a recorded tree.
    pub taken_by: i32,
    /// Each watched image, by path.
    pub images: Vec<Arc<ImageSample>>,
    /// The processes that have one of them open.
    pub processes: BTreeMap<i32, Arc<ProcessFacts>>,
    /// How many processes could be seen but not read.
    pub hidden_processes: usize,
    /// Whether every process of the host can be seen at all: not in a pid namespace of our own, nor with `hidepid`.
    pub sees_all_processes: bool,
    /// What could not be listed or read, in words.
    pub troubles: Vec<String>,
    /// Images that are gone from the watched directories, with locks on them still.
    pub deleted: Vec<DeletedImage>,
}

/// A file without a name that somebody holds locks on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeletedImage {
    /// The path that it had.
    pub path: PathBuf,
    /// Who holds it.
    pub descriptor: OpenDescriptor,
}

/// What GETLK said of the ten bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// Which are locked.
    Bytes(BytesFound),
    /// The image could not be opened, with the errno.
    CannotOpen(i32),
    /// The file system does not answer lock questions, with the errno.
    CannotLock(i32),
    /// The storage does not answer at all, since then.
    Stalled(Timestamp),
}

/// A backing file, as far as it can be found from here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backing {
    /// Its path, links resolved where it exists.
    pub path: PathBuf,
    /// The file there; `None` if there is none that can be an image.
    pub file: Option<FileId>,
    /// Whether its storage answered; otherwise this is what was known before.
    pub answered: bool,
}

/// One image at one moment. Two moments share it where nothing changed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImageSample {
    /// As it is shown.
    pub path: Arc<Path>,
    /// The same with every link resolved.
    pub resolved: Arc<Path>,
    /// The file that was opened and asked.
    pub file: FileId,
    /// Length of the file in bytes.
    pub file_size: u64,
    /// The device that it stands for, if it is a node of a block device.
    pub device: Option<Device>,
    /// What its header says; `None` if it could not be read.
    pub header: Option<Arc<Header>>,
    /// Where its backing file is, if its name is a path.
    pub backing: Option<Backing>,
    /// The file system it lies on.
    pub mount: Option<Arc<Mount>>,
    /// What GETLK said.
    pub answer: Answer,
    /// Each descriptor of a process that leads to it, with the locks behind it.
    pub descriptors: Vec<OpenDescriptor>,
    /// The rows of `/proc/locks` about it.
    pub table_rows: Arc<[LockRecord]>,
    /// Whether those rows can be about no other file. On btrfs and overlayfs the table names the superblock, and several
    /// of its files may have one inode number.
    pub rows_certain: bool,
    /// The loop devices that stand on it.
    pub loop_devices: Vec<String>,
    /// Who had it mapped when a lock without a descriptor was looked for.
    pub mapped_by: Vec<i32>,
    /// Where the file system on this block device is mounted.
    pub mounted_on: Option<PathBuf>,
    /// On an overlay file system: the file of the layer that it is.
    pub layer: Option<FileId>,
    /// Who holds it is still being sought: nobody can say yet that no process does.
    #[serde(default)]
    pub sought: bool,
}

impl Sample {
    /// Whether two samples say the same, whenever they were taken.
    #[must_use]
    pub fn says_the_same(&self, other: &Self) -> bool {
        let same_image = |(a, b): (&Arc<ImageSample>, &Arc<ImageSample>)| Arc::ptr_eq(a, b) || a == b;
        self.images.len() == other.images.len()
            && self.images.iter().zip(&other.images).all(same_image)
            && self.processes == other.processes
            && (self.hidden_processes, self.sees_all_processes) == (other.hidden_processes, other.sees_all_processes)
            && self.troubles == other.troubles
            && self.deleted == other.deleted
            && (&self.host, self.taken_by) == (&other.host, other.taken_by)
    }
}

impl ImageSample {
    /// Whether file, header and answers are those of `other`, whoever has it open and whatever stands around it.
    #[must_use]
    pub fn was_asked_the_same(&self, other: &Self) -> bool {
        let same_mount = match (&self.mount, &other.mount) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b) || a == b,
            (a, b) => a.is_none() && b.is_none(),
        };
        same_mount
            && (self.file, self.file_size, self.device) == (other.file, other.file_size, other.device)
            && self.resolved == other.resolved
            && self.header == other.header
            && self.answer == other.answer
            && (self.rows_certain, &self.table_rows) == (other.rows_certain, &other.table_rows)
    }
}
