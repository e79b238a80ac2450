//! What do the kernel and the image itself answer, an image at a time?
//!
//! Opened for reading, asked about its bytes, its header read when it may have changed, closed: by a thread for each
//! mount, so that one that does not answer holds up nothing but its own images.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use nix::errno::Errno;

use super::super::agenda::share_in_turn;
use super::super::sample::{Answer, ImageSample};
use super::Looker;
use crate::image::catalog::Entry;
use crate::image::header::{self, Header};
use crate::image::watch::ImageWatch;
use crate::linux::identity::{FileId, FileKind, FileStatus};
use crate::linux::lock_table::LockRecord;
use crate::linux::mounts::{Mount, Reach};
use crate::linux::probe::{self, Asker, OpenError};
use crate::linux::storage::Lane;

#[derive(Debug)]
pub(super) struct KnownHeader {
    status: FileStatus,
    read_at: Instant,
    header: Option<Arc<Header>>,
}

/// A guest writes all the time and changes the modification time with it; its header is read again this often.
const HEADER_AGE: Duration = Duration::from_secs(5);

/// So many questions at once that their events are many.
const MANY: usize = 16;

/// How one image answered.
#[derive(Debug)]
enum Reply {
    /// It has gone, or been replaced by something else: the next listing says by what.
    Gone,
    CannotOpen(Errno),
    Answered {
        status: FileStatus,
        header: Arc<KnownHeader>,
        answer: Answer,
    },
}

/// Opens, asks and closes; on a thread that may wait for the storage.
fn ask_one(entry: &Entry, known: Option<Arc<KnownHeader>>, watch: Option<&ImageWatch>) -> Reply {
    if let Some(watch) = watch {
        watch.announce(&entry.resolved);
    }
    let (file, status) = match probe::open(&entry.resolved) {
        Ok(opened) => opened,
        Err(OpenError::NotAnImage) => return Reply::Gone,
        Err(OpenError::Errno(errno)) => {
            if let Some(watch) = watch {
                watch.retract(&entry.resolved);
            }
            let gone = matches!(errno, Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP);
            return if gone { Reply::Gone } else { Reply::CannotOpen(errno) };
        }
    };
    let answer = match probe::held_bytes(&file, Asker::Process) {
        Ok(found) => Answer::Bytes(found),
        Err(errno) => Answer::CannotLock(errno as i32),
    };
    let header = known.filter(|k| k.is_fresh(&status)).unwrap_or_else(|| KnownHeader::read(&File::from(file), status));
    Reply::Answered { status, header, answer }
}

impl KnownHeader {
    fn is_fresh(&self, now: &FileStatus) -> bool {
        let same_file = self.status.id == now.id && self.status.size == now.size;
        same_file && (self.status.modified == now.modified || self.read_at.elapsed() < HEADER_AGE)
    }

    fn read(file: &File, status: FileStatus) -> Arc<Self> {
        let header = header::read(file, header::length(file, &status)).ok().map(Arc::new);
        Arc::new(Self { status, read_at: Instant::now(), header })
    }
}

/// An image about which nothing hints at a change is asked within this time, some of them at each tick.
const ROUND: Duration = Duration::from_secs(5);
/// So many are asked at each tick in any case: on most hosts that is all of them.
const LEAST_TURN: usize = 100;

impl Looker {
    /// What is to be asked at a tick: everything about which somebody may have changed something, and some of the others
    /// in turn.
    pub(super) fn due(&mut self) -> Vec<Arc<Entry>> {
        let touched = std::mem::take(&mut self.touched);
        let (since, start) = self.turn;
        let all = self.entries.len();
        let count = share_in_turn(all, since.elapsed(), ROUND, LEAST_TURN).min(all);
        self.turn = (Instant::now(), if all == 0 { 0 } else { (start + count) % all });
        let in_turn = |i: usize| (i + all - start.min(all)) % all < count;
        let watch = self.watch.as_ref().filter(|_| self.resting_until.is_none());
        // Images of one directory stand together.
        let mut directory: (Option<&Path>, bool) = (None, false);
        let mut due = Vec::new();
        for (i, entry) in self.entries.iter().enumerate() {
            let parent = entry.resolved.parent();
            if directory.0 != parent {
                directory = (parent, watch.zip(parent).is_some_and(|(watch, parent)| watch.watches(parent)));
            }
            let is_watched = directory.1 || watch.is_some_and(|watch| watch.watches(&entry.resolved));
            let must = in_turn(i) || touched.contains(&*entry.resolved);
            if must || !is_watched || !self.would_be_hinted_at(entry) {
                due.push(Arc::clone(entry));
            }
        }
        due
    }

    /// Whether nobody can have taken or dropped a lock on it without a word: a lock on a local file is in the table of this
    /// kernel, and the table says what it said when the image was asked last.
    fn would_be_hinted_at(&self, entry: &Entry) -> bool {
        let Some(image) = self.images.get(&entry.resolved) else { return false };
        let local = image.mount.as_ref().is_some_and(|m| m.reach == Reach::Local);
        let asked = matches!(image.answer, Answer::Bytes(_)) && image.file == entry.status.id;
        let same_rows = self.compared == Some(self.table.version()) || !self.has_other_rows(&entry.resolved);
        local && asked && image.rows_certain && same_rows
    }

    /// Asks each of `targets` about its bytes; one that has gone is taken off the list. Returns the files that answer
    /// otherwise than before, or have other rows in the table.
    pub(super) fn ask(&mut self, targets: &mut Vec<Arc<Entry>>) -> HashSet<FileId> {
        let mut changed = HashSet::new();
        let mut lanes: HashMap<&Path, Lane> = HashMap::new();
        let mut questions = Vec::with_capacity(targets.len());
        for entry in &*targets {
            let directory = entry.resolved.parent().unwrap_or(&entry.resolved);
            let lane = lanes.entry(directory).or_insert_with(|| self.storage.lane_of(directory)).clone();
            questions.push((lane, (Arc::clone(entry), self.headers.get(&entry.resolved).cloned())));
        }
        let watch = self.watch.clone();
        // For a few questions it is not worth having anybody wait.
        let events = self.watch.clone().filter(|_| targets.len() >= MANY);
        let events = events.as_ref().map(ImageWatch::hold_back);
        let ask = move |(entry, known): (Arc<Entry>, Option<Arc<KnownHeader>>)| ask_one(&entry, known, watch.as_ref());
        let mut replies = self.storage.answers(questions, ask).into_iter();
        drop(events);
        targets.retain(|entry| {
            let image = match replies.next() {
                Some(Ok(Reply::Answered { status, header, answer })) => {
                    let image = self.describe(entry, status, header.header.clone(), answer);
                    self.headers.insert(entry.resolved.clone(), header);
                    image
                }
                Some(Ok(Reply::CannotOpen(errno))) => {
                    self.describe(entry, entry.status, None, Answer::CannotOpen(errno as i32))
                }
                Some(Ok(Reply::Gone)) => {
                    self.images.remove(&entry.resolved);
                    return false;
                }
                Some(Err(stuck_for)) => self.stalled(entry, stuck_for),
                None => self.stalled(entry, Duration::ZERO),
            };
            let before = self.images.get(&entry.resolved);
            if before.is_some_and(|b| **b == image) {
                return true;
            }
            let same = |b: &Arc<ImageSample>| {
                (b.file, &b.answer, &b.table_rows) == (image.file, &image.answer, &image.table_rows)
            };
            if !before.is_some_and(same) {
                changed.insert(image.file);
            }
            self.images.insert(entry.resolved.clone(), Arc::new(image));
            true
        });
        self.find_backings(targets);
        changed
    }

    /// An image that does not answer is shown as it was known, but for its bytes.
    fn stalled(&self, entry: &Entry, stuck_for: Duration) -> ImageSample {
        let since = Timestamp::now() - stuck_for;
        match self.images.get(&entry.resolved) {
            // The first time that was told stays the time. What is listed of it goes on.
            Some(image) => {
                let since = match image.answer {
                    Answer::Stalled(since) => since,
                    _ => since,
                };
                let table_rows = self.rows_of(image.file, image.mount.as_deref()).0.into();
                ImageSample { answer: Answer::Stalled(since), table_rows, ..ImageSample::clone(image) }
            }
            None => self.describe(entry, entry.status, None, Answer::Stalled(since)),
        }
    }

    /// The rows of the table about a file. The kernel prints the superblock's device, which statx hides on btrfs and
    /// overlayfs.
    ///
    /// Rows that were found by the superblock's device may be about another of its files: then they are not certain.
    pub(super) fn rows_of(&self, file: FileId, mount: Option<&Mount>) -> (&[LockRecord], bool) {
        let rows = |device| self.table.rows(FileId { device, inode: file.inode });
        match mount {
            Some(mount) if mount.lock_device != file.device => {
                let by_statx = rows(file.device);
                (if by_statx.is_empty() { rows(mount.lock_device) } else { by_statx }, false)
            }
            // Every subvolume has a device number of its own for statx, and one of them may be the superblock's.
            Some(mount) => (rows(file.device), mount.kind != "btrfs" && mount.kind != "overlay"),
            None => (rows(file.device), true),
        }
    }

    /// The files behind `entries` as they were opened last: a link's target may have been replaced since it was listed.
    pub(super) fn ids(&self, entries: &[Arc<Entry>]) -> HashSet<FileId> {
        entries.iter().filter_map(|e| self.images.get(&e.resolved)).map(|i| i.file).collect()
    }

    pub(super) fn describe(
        &self,
        entry: &Entry,
        status: FileStatus,
        header: Option<Arc<Header>>,
        answer: Answer,
    ) -> ImageSample {
        let mount = self.storage.mounts().and_then(|m| m.of(&entry.resolved, &status)).cloned();
        let (rows, rows_certain) = self.rows_of(status.id, mount.as_deref());
        let table_rows = rows.into();
        ImageSample {
            path: entry.path.clone(),
            resolved: entry.resolved.clone(),
            backing: None,
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
            rows_certain,
            device: (status.kind == FileKind::Block).then_some(status.rdev),
            loop_devices: Vec::new(),
            mapped_by: Vec::new(),
            mounted_on: None,
            layer: None,
            sought: false,
        }
    }
}
