//! What do the kernel and the image itself answer, an image at a time?
//!
//! Opened for reading, asked about its bytes, its header read when it may have changed, closed.

use std::collections::HashSet;
use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::super::sample::{Answer, Backing, ImageSample};
use super::Looker;
use crate::image::catalog::Entry;
use crate::image::header::{self, Header};
use crate::linux::identity::{FileId, FileKind, FileStatus, status};
use crate::linux::lock_table::LockRecord;
use crate::linux::mounts::Mount;
use crate::linux::probe::{self, Asker, OpenError};

pub(super) struct KnownHeader {
    status: FileStatus,
    read_at: Instant,
    header: Option<Header>,
}

/// A guest writes all the time and changes the modification time with it; its header is read again this often.
const HEADER_AGE: Duration = Duration::from_secs(5);

impl Looker {
    /// Asks each of `targets` about its bytes; one that has gone is taken off the list.
    pub(super) fn ask(&mut self, targets: &mut Vec<Entry>) {
        targets.retain(|entry| match self.ask_one(entry) {
            Some(image) => {
                self.images.insert(entry.resolved.clone(), image);
                true
            }
            None => {
                self.images.remove(&entry.resolved);
                false
            }
        });
    }

    fn ask_one(&mut self, entry: &Entry) -> Option<ImageSample> {
        if let Some(watch) = &self.watch {
            watch.announce(&entry.resolved);
        }
        let (file, status) = match probe::open(&entry.resolved) {
            Ok(opened) => opened,
            // Replaced since it was listed: the next listing says by what.
            Err(OpenError::NotAnImage) => return None,
            Err(OpenError::Errno(errno)) => {
                if let Some(watch) = &self.watch {
                    watch.retract(&entry.resolved);
                }
                if matches!(errno, Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) {
                    return None;
                }
                return Some(self.describe(entry, entry.status, None, Answer::CannotOpen(errno as i32)));
            }
        };
        let answer = match probe::held_bytes(&file, Asker::Process) {
            Ok(found) => Answer::Bytes(found),
            Err(errno) => Answer::CannotLock(errno as i32),
        };
        let header = self.header(&entry.resolved, status, &File::from(file));
        Some(self.describe(entry, status, header, answer))
    }

    /// The rows of the table about a file. The kernel prints the superblock's device, which statx hides on btrfs and
    /// overlayfs.
    pub(super) fn rows_of(&self, file: FileId, mount: Option<&Mount>) -> &[LockRecord] {
        let rows = |device| {
            let file = Some(FileId { device, inode: file.inode });
            let start = self.table.partition_point(|r| r.file < file);
            let length = self.table[start..].partition_point(|r| r.file == file);
            &self.table[start..start + length]
        };
        let by_statx = rows(file.device);
        match mount {
            Some(mount) if by_statx.is_empty() && mount.lock_device != file.device => rows(mount.lock_device),
            _ => by_statx,
        }
    }

    /// The files behind `entries` as they were opened last: a link's target may have been replaced since it was listed.
    pub(super) fn ids(&self, entries: &[Entry]) -> HashSet<FileId> {
        entries.iter().filter_map(|e| self.images.get(&e.resolved)).map(|i| i.file).collect()
    }

    pub(super) fn describe(
        &self,
        entry: &Entry,
        status: FileStatus,
        header: Option<Header>,
        answer: Answer,
    ) -> ImageSample {
        let mount = self.mounts.as_ref().and_then(|m| m.of(&entry.resolved, &status)).cloned();
        let table_rows = self.rows_of(status.id, mount.as_deref()).to_vec();
        ImageSample {
            path: entry.path.clone(),
            resolved: entry.resolved.clone(),
            backing: header.as_ref().and_then(|h| backing(&entry.resolved, h)),
            file: status.id,
            file_size: if status.kind == FileKind::Block {
                header.as_ref().and_then(|h| h.virtual_size).unwrap_or_default()
            } else {
                status.size
            },
            header,
            mount,
            answer,
            descriptors: Vec::new(),
            table_rows,
            loop_devices: Vec::new(),
        }
    }

    pub(super) fn header(&mut self, path: &Path, status: FileStatus, file: &File) -> Option<Header> {
        let fresh = |known: &KnownHeader| {
            let same_file = known.status.id == status.id && known.status.size == status.size;
            same_file && (known.status.modified == status.modified || known.read_at.elapsed() < HEADER_AGE)
        };
        if let Some(known) = self.headers.get(path).filter(|k| fresh(k)) {
            return known.header.clone();
        }
        let header = header::read(file, header::length(file, &status)).ok();
        self.headers.insert(path.to_owned(), KnownHeader { status, read_at: Instant::now(), header: header.clone() });
        header
    }
}

/// The file that a header names as its backing file. It is looked at, never opened.
fn backing(image: &Path, header: &Header) -> Option<Backing> {
    let path = header::backing_path(image, header.backing_file.as_ref()?)?;
    let is_image = |s: &FileStatus| matches!(s.kind, FileKind::Regular | FileKind::Block);
    let file = status(&path).ok().filter(is_image).map(|s| s.id);
    let path = if file.is_some() { path.canonicalize().unwrap_or(path) } else { path };
    Some(Backing { path, file })
}
