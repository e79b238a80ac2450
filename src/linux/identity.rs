//! When are two paths the same file, and two pids the same process?
//!
//! A file is its device and inode, asked with `statx` and `AT_STATX_DONT_SYNC`, which answers from what the kernel knows
//! and does not wait for a dead file server as plain `stat` does (statx(2)). A process is its pid and start time.

use std::fmt;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, Statx, StatxFlags};
use rustix::path::Arg;
use serde::{Deserialize, Serialize};

/// A device number, shown as `major:minor` in decimal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Device {
    /// Driver.
    pub major: u32,
    /// Instance.
    pub minor: u32,
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

impl Device {
    /// Reads `major:minor`, both decimal, as mountinfo and JSON write it.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (major, minor) = text.split_once(':')?;
        Some(Self { major: major.parse().ok()?, minor: minor.parse().ok()? })
    }
}

impl Serialize for Device {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Device {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).ok_or_else(|| serde::de::Error::custom("a device is major:minor"))
    }
}

/// A file, whatever its name: the device of its file system and its inode number, as `statx` reports them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct FileId {
    /// `stx_dev`.
    pub device: Device,
    /// `stx_ino`.
    pub inode: u64,
}

/// A process: pids are used again, start times tell two users of one pid apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ProcessId {
    /// As seen from where /proc is mounted.
    pub pid: i32,
    /// Clock ticks after boot (field 22 of `/proc/PID/stat`).
    pub start_time: u64,
}

/// What kind of thing a path leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FileKind {
    /// A regular file.
    Regular,
    /// A block device.
    Block,
    /// A directory.
    Directory,
    /// FIFO, socket, character device: never opened.
    Special,
}

impl FileKind {
    /// Whether it can be an image: only such is ever opened.
    #[must_use]
    pub const fn can_be_image(self) -> bool {
        matches!(self, Self::Regular | Self::Block)
    }
}

/// What `statx` says of a file, as far as this program asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileStatus {
    /// Which file.
    pub id: FileId,
    /// Of what kind.
    pub kind: FileKind,
    /// Length in bytes; 0 for a block device.
    pub size: u64,
    /// Last change of the content, seconds and nanoseconds since the epoch.
    pub modified: (i64, u32),
    /// The mount it was reached through, as in mountinfo (Linux 5.8).
    pub mount: Option<u64>,
    /// The device that a block device node stands for.
    pub rdev: Device,
    /// Names that lead to it: 0 once it is deleted.
    pub links: u32,
}

impl From<Statx> for FileStatus {
    fn from(s: Statx) -> Self {
        let kind = match FileType::from_raw_mode(s.stx_mode.into()) {
            FileType::RegularFile => FileKind::Regular,
            FileType::BlockDevice => FileKind::Block,
            FileType::Directory => FileKind::Directory,
            _ => FileKind::Special,
        };
        Self {
            id: FileId { device: Device { major: s.stx_dev_major, minor: s.stx_dev_minor }, inode: s.stx_ino },
            kind,
            size: s.stx_size,
            modified: (s.stx_mtime.tv_sec, s.stx_mtime.tv_nsec),
            mount: (s.stx_mask & StatxFlags::MNT_ID.bits() != 0).then_some(s.stx_mnt_id),
            rdev: Device { major: s.stx_rdev_major, minor: s.stx_rdev_minor },
            links: s.stx_nlink,
        }
    }
}

fn mask() -> StatxFlags {
    StatxFlags::TYPE | StatxFlags::INO | StatxFlags::SIZE | StatxFlags::MTIME | StatxFlags::NLINK | StatxFlags::MNT_ID
}

/// The file that `path` leads to, links followed.
///
/// # Errors
/// The errno of statx(2).
pub fn status(path: &Path) -> rustix::io::Result<FileStatus> {
    rustix::fs::statx(CWD, path, AtFlags::STATX_DONT_SYNC, mask()).map(Into::into)
}

/// The same for a name that somebody else chose: an automount is not set off by it.
///
/// # Errors
/// The errno of statx(2).
pub fn status_of_name(path: &Path) -> rustix::io::Result<FileStatus> {
    rustix::fs::statx(CWD, path, AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT, mask()).map(Into::into)
}

/// The file that `name` in the open directory `directory` leads to, links followed.
///
/// # Errors
/// The errno of statx(2).
pub fn status_at(directory: impl AsFd, name: impl Arg) -> rustix::io::Result<FileStatus> {
    rustix::fs::statx(directory, name, AtFlags::STATX_DONT_SYNC, mask()).map(Into::into)
}

/// The file behind an open descriptor.
///
/// # Errors
/// The errno of statx(2).
pub fn status_of(file: impl AsFd) -> rustix::io::Result<FileStatus> {
    rustix::fs::statx(file, c"", AtFlags::STATX_DONT_SYNC | AtFlags::EMPTY_PATH, mask()).map(Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hard_links_are_one_file_and_copies_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b, c) = (dir.path().join("a"), dir.path().join("b"), dir.path().join("c"));
        std::fs::write(&a, "x").unwrap();
        std::fs::hard_link(&a, &b).unwrap();
        std::fs::copy(&a, &c).unwrap();
        assert_eq!(status(&a).unwrap().id, status(&b).unwrap().id);
        assert_ne!(status(&a).unwrap().id, status(&c).unwrap().id);
        let open = std::fs::File::open(&a).unwrap();
        assert_eq!(status_of(&open).unwrap(), status(&a).unwrap());
    }

    #[test]
    fn devices_are_read_back() {
        let device = Device { major: 259, minor: 1_048_575 };
        assert_eq!(Device::parse(&device.to_string()), Some(device));
        assert_eq!(Device::parse("fe:00"), None);
    }
}
