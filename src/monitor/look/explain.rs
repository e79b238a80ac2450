//! Does what was seen fit together, and how long is it worth searching on?
//!
//! What GETLK found, what descriptors hold and what `/proc/locks` lists must tell the same story. Where they do not, the
//! search goes deeper, and before a lock is called ownerless it is asked once more whether it is there at all.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::sample::{Answer, ImageSample};
use super::super::search::Depth;
use super::Looker;
use crate::image::catalog::Entry;
use crate::image::watch::Touched;
use crate::linux::descriptors::{OpenDescriptor, OpenMode};
use crate::linux::identity::FileId;
use crate::linux::lock_table::{LockKind, LockRecord};
use crate::linux::probe::BytesFound;
use crate::protocol::LockByte;

/// Whether everything has been walked, how long that takes, and what it was for.
#[derive(Default)]
pub(super) struct Walks {
    done: bool,
    /// The last time that everybody was looked at, by a walk through `/proc` or by what the kernel names.
    cost: Duration,
    /// The last walk through `/proc`.
    whole: Duration,
    /// The locks that whole walks could not explain, and when: the same ones are not walked for at every look.
    in_vain: HashMap<FileId, (Instant, Answer, Arc<[LockRecord]>)>,
    /// When it is next looked whether somebody has opened or received something, as long as there are such.
    recount_at: Option<Instant>,
    /// How many rows last fitted to which descriptors (their hash).
    explained: HashMap<FileId, (usize, u64)>,
}

/// Whole walks for locks that the last walk did not explain take at most this part of the time.
pub(super) const WALK_SHARE: u32 = 100;

/// To count everybody's descriptors costs less than to look at them.
const RECOUNT_PAUSE: Duration = Duration::from_secs(1);

const WALK_PAUSE: Duration = Duration::from_secs(10);

/// A lock that comes and goes between our questions looks ownerless; this often it is asked again.
const ATTEMPTS: usize = 4;

/// As long as the kernel takes to close the files of a process that has ended.
pub(super) const CLOSING: Duration = Duration::from_millis(5);

/// A program opens an image a few milliseconds before it locks it. Who has it open for longer without a lock means to.
const OPENING: Duration = Duration::from_millis(25);

/// Opens that inotify has told of, until a descriptor is found for each.
#[derive(Default)]
pub(super) struct Opens {
    /// For each resolved path: how many descriptors were known before, and when that was.
    waiting: HashMap<PathBuf, (usize, Instant)>,
    walked_at: Option<Instant>,
}

/// Whether an open has an opener.
pub(super) enum Unexplained {
    None,
    /// No new process has it: one that was there before, and has more descriptors than before.
    Young,
    /// None of those either.
    Old,
}

/// Whoever opened it and was started for that has been seen by then.
const PROCESS_SHOWS_WITHIN: Duration = Duration::from_millis(5);

/// Whoever opens a file and closes another meanwhile has as many descriptors as before, and is looked for only when this
/// time has not brought anything to light.
const OPEN_SHOWS_WITHIN: Duration = Duration::from_millis(150);

impl Walks {
    /// Whether nobody knows yet who has what open.
    pub(super) fn is_first(&self) -> bool {
        !self.done
    }

    /// A walk through `/proc` has taken so long.
    pub(super) fn whole(&mut self, cost: Duration) {
        (self.whole, self.cost) = (cost, cost);
    }

    /// Nobody was found who holds what is locked there.
    pub(super) fn give_up(&mut self, image: &ImageSample) {
        let vain = (Instant::now(), image.answer.clone(), Arc::clone(&image.table_rows));
        self.in_vain.insert(image.file, vain);
    }

    /// When it was given up to look who holds the very same locks.
    fn given_up_at(&self, image: &ImageSample) -> Option<Instant> {
        let (at, answer, rows) = self.in_vain.get(&image.file)?;
        (*answer == image.answer && *rows == image.table_rows).then_some(*at)
    }

    /// Forgets what is no longer watched.
    pub(super) fn keep_only(&mut self, wanted: &HashSet<FileId>) {
        self.in_vain.retain(|file, _| wanted.contains(file));
        self.explained.retain(|file, _| wanted.contains(file));
    }

    /// The time between two whole walks for the same lock.
    fn pause(&self) -> Duration {
        WALK_PAUSE.max(self.whole * WALK_SHARE)
    }
}

impl Looker {
    /// Goes on searching until each lock of each image has a holder, or it is certain that none can be found, or only
    /// walks can help that are too long to wait for.
    ///
    /// Of every image, not of those alone that were just asked: a process that has ended or gone on leaves others without
    /// a holder, too.
    /// Nothing but `changed`, and what has other descriptors than before, can need it.
    pub(super) fn explain(&mut self, changed: &HashSet<FileId>, wanted: &Arc<HashSet<FileId>>) {
        if !self.walks.in_vain.is_empty() && self.walks.recount_at.is_none_or(|at| Instant::now() >= at) {
            // A descriptor in flight arrives without a word.
            let started = Instant::now();
            self.scan(Depth::Changed, wanted);
            let pause = RECOUNT_PAUSE.max(started.elapsed() * WALK_SHARE);
            self.walks.recount_at = Some(Instant::now() + pause);
        }
        let mut altered = self.search.take_altered();
        altered.extend(changed);
        altered.extend(self.walks.in_vain.keys());
        if altered.is_empty() {
            return;
        }
        let entries = std::mem::take(&mut self.entries);
        let is_altered = |e: &&Arc<Entry>| self.images.get(&e.resolved).is_some_and(|i| altered.contains(&i.file));
        let mut open: Vec<Arc<Entry>> = entries.iter().filter(is_altered).cloned().collect();
        self.entries = entries;
        for attempt in 0..ATTEMPTS {
            open.retain(|e| self.is_open(e));
            if open.is_empty() {
                return;
            }
            if attempt == 0 {
                self.scan(Depth::Changed, wanted);
            } else {
                // What is sought already is neither sought nor walked for once more.
                open.retain(|e| !self.is_sought(&e.resolved));
                if open.is_empty() {
                    return;
                }
                // What the kernel names is enough to find a holder, and not to say that there is none.
                let named = attempt == 1 && self.walk_named(wanted);
                if !named && self.must_walk_aside() {
                    return self.seek(&open);
                }
                if !named {
                    self.walk_all(wanted);
                }
                // A process that ends has no descriptors any more while the kernel still closes them one by one, and
                // nothing tells when it has done.
                std::thread::sleep(CLOSING);
                self.slept += CLOSING;
            }
            // It may be gone by now, or the table may have missed a row.
            self.read_table();
            let _ = self.ask(&mut open);
            self.search.refresh(&self.ids(&open));
        }
        open.retain(|e| !self.is_explained(&e.resolved));
        self.look_for_mappings(&open);
        open.iter().filter_map(|e| self.images.get(&e.resolved)).for_each(|image| self.walks.give_up(image));
    }

    fn is_open(&mut self, entry: &Entry) -> bool {
        !self.is_explained(&entry.resolved) && !self.was_in_vain(&entry.resolved)
    }

    /// Whether walks have not explained the very same locks a short while ago.
    fn was_in_vain(&self, resolved: &Path) -> bool {
        let given_up_at = self.images.get(resolved).and_then(|image| self.walks.given_up_at(image));
        given_up_at.is_some_and(|at| at.elapsed() < self.walks.pause())
    }

    /// Whether walks have not explained the very same locks, however long ago.
    pub(super) fn was_concluded(&self, image: &ImageSample) -> bool {
        self.walks.given_up_at(image).is_some()
    }

    /// Whether each held byte has a holder, each holder's byte is held, and the table lists no lock of which we know no
    /// owner.
    pub(super) fn is_explained(&mut self, resolved: &Path) -> bool {
        let Some(image) = self.images.get(resolved) else { return true };
        let Answer::Bytes(found) = &image.answer else { return true };
        let descriptors = self.search.descriptors(image.file);
        let rows: &[LockRecord] = if image.rows_certain { &image.table_rows } else { &[] };
        let explained = fits(found, descriptors, rows, self.walks.explained.get(&image.file));
        if explained && descriptors.is_empty() {
            self.walks.explained.remove(&image.file);
            self.walks.in_vain.remove(&image.file);
        } else if explained {
            let before = self.walks.explained.get(&image.file);
            match to_compare(descriptors, rows) {
                Some(explained) => drop(self.walks.explained.insert(image.file, explained)),
                // A row was missed, and what is remembered of the same holders stays.
                None if before.is_some_and(|(_, holders)| *holders == hash_of_holders(descriptors)) => {}
                None => drop(self.walks.explained.remove(&image.file)),
            }
            self.walks.in_vain.remove(&image.file);
        }
        if explained {
            self.seek.found(resolved);
        }
        explained
    }

    /// Remembers what was opened, so that whoever did is found.
    pub fn expect_openers(&mut self, touched: &Touched) {
        self.unheard |= touched.lost;
        for (path, balance) in &touched.balance {
            let Some(image) = self.images.get(path.as_path()) else { continue };
            let known = self.search.descriptors(image.file).len();
            if *balance > 0 {
                self.opens.waiting.entry(path.clone()).or_insert((known, Instant::now()));
            } else {
                self.opens.waiting.remove(path);
            }
        }
    }

    /// Whether one of `files` was opened by somebody who has not been found.
    pub(super) fn unexplained_opens(&mut self, files: &HashSet<PathBuf>) -> Unexplained {
        let (mut unexplained, mut young) = (false, false);
        for path in files {
            let Some((before, since)) = self.opens.waiting.get(path).copied() else { continue };
            let known = self.images.get(path.as_path()).map_or(0, |i| self.search.descriptors(i.file).len());
            let late = since.elapsed() > OPEN_SHOWS_WITHIN;
            if known > before || late {
                self.opens.waiting.remove(path);
            }
            unexplained |= known <= before && late;
            young |= known <= before && since.elapsed() > PROCESS_SHOWS_WITHIN;
        }
        let pause = self.walks.cost * WALK_SHARE;
        let rested = self.opens.walked_at.is_none_or(|at| at.elapsed() > pause);
        if unexplained && rested {
            self.opens.walked_at = Some(Instant::now());
        }
        match (unexplained && rested, young) {
            (true, _) => Unexplained::Old,
            (false, true) => Unexplained::Young,
            (false, false) => Unexplained::None,
        }
    }

    /// Looks at all processes for one who has opened an image and has not locked it.
    pub(super) fn look_for_opener(&mut self, wanted: &Arc<HashSet<FileId>>) {
        if self.walk_named(wanted) {
            return;
        }
        if self.must_walk_aside() { self.seek_opener() } else { self.walk_all(wanted) }
    }

    /// Looks at all processes for the first time.
    pub(super) fn walk_first(&mut self, wanted: &Arc<HashSet<FileId>>) {
        if !self.walk_named(wanted) {
            self.walk_all(wanted);
        }
        self.walks.done = true;
    }

    /// Walks all processes through `/proc`.
    fn walk_all(&mut self, wanted: &Arc<HashSet<FileId>>) {
        let started = Instant::now();
        self.scan(Depth::All, wanted);
        self.walks.whole(started.elapsed());
        self.walks.keep_only(wanted);
    }

    /// Has the kernel name the descriptors of all processes that lead to images, where it can; those that move meanwhile
    /// may be missed.
    fn walk_named(&mut self, wanted: &Arc<HashSet<FileId>>) -> bool {
        let Some(numbers) = self.kernel_numbers() else { return false };
        let started = Instant::now();
        let named = self.search.scan_named(&numbers, wanted);
        self.walks.cost = started.elapsed();
        let was_named = *named.as_ref().unwrap_or(&true);
        self.note(named.map(drop));
        was_named
    }

    /// The numbers by which the kernel itself knows the images; `None` where it may know one of them by others.
    fn kernel_numbers(&self) -> Option<HashSet<FileId>> {
        /// Whose inode numbers are those of statx(2). Of overlayfs and FUSE that is so only under conditions.
        const SAME: [&str; 9] = ["ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "tmpfs", "devtmpfs", "nfs4"];
        let number = |image: &Arc<ImageSample>| {
            let mount = image.mount.as_deref().filter(|m| SAME.contains(&m.kind.as_str()))?;
            Some(FileId { device: mount.lock_device, ..image.file })
        };
        self.images.values().map(number).collect()
    }

    /// Has each new writer without a lock seen twice: one that is about to lock, or is being refused, is no danger.
    pub(super) fn confirm_writers(&mut self) {
        let unlocked = |d: &&OpenDescriptor| d.mode == OpenMode::Write && d.locks.is_empty();
        let files: Vec<FileId> = self.images.values().map(|i| i.file).collect();
        let all: Vec<OpenDescriptor> =
            files.iter().flat_map(|f| self.search.descriptors(*f)).filter(unlocked).cloned().collect();
        let new: HashSet<FileId> = all.iter().filter(|d| !self.confirmed.contains(*d)).map(|d| d.file).collect();
        if !new.is_empty() {
            std::thread::sleep(OPENING);
            self.slept += OPENING;
            self.search.refresh(&new);
        }
        let now = files.iter().flat_map(|f| self.search.descriptors(*f)).filter(unlocked);
        self.confirmed = now.cloned().collect();
    }
}

fn hash_of_holders(descriptors: &[OpenDescriptor]) -> u64 {
    let mut hasher = DefaultHasher::new();
    descriptors.iter().filter(|d| !d.locks.is_empty()).for_each(|d| d.hash(&mut hasher));
    hasher.finish()
}

/// How many rows fit to which descriptors (their hash). `None` where the rows were read before these took what they have:
/// their own rows, when they come, must not be taken for somebody else's.
fn to_compare(descriptors: &[OpenDescriptor], rows: &[LockRecord]) -> Option<(usize, u64)> {
    let listed = |record: &LockRecord| rows.iter().any(|row| same_range(row, record));
    let mut held = descriptors.iter().flat_map(|d| &d.locks).filter(|r| r.counts());
    held.all(listed).then(|| (rows.len(), hash_of_holders(descriptors)))
}

fn same_range(a: &LockRecord, b: &LockRecord) -> bool {
    (a.kind, a.mode, a.start, a.end) == (b.kind, b.mode, b.start, b.end)
}

/// Whether what GETLK found, what descriptors hold and what the table lists tell the same story.
fn fits(
    found: &BytesFound,
    descriptors: &[OpenDescriptor],
    rows: &[LockRecord],
    before: Option<&(usize, u64)>,
) -> bool {
    let counts = |r: &&LockRecord| r.counts();
    let held =
        |byte: LockByte| descriptors.iter().flat_map(|d| &d.locks).filter(counts).any(|r| r.covers(byte.offset()));
    if !LockByte::ALL.into_iter().all(|b| held(b) == found.locked.contains(b)) {
        return false;
    }
    // As many rows of one range as there are owners: with fewer known ones, somebody is missing. POSIX locks are printed
    // behind each descriptor of their process and count once for it.
    let owners = |row: &LockRecord| {
        let has = |d: &&OpenDescriptor| d.locks.iter().filter(counts).any(|r| same_range(r, row));
        let mut owners: Vec<(i32, i32)> = descriptors
            .iter()
            .filter(has)
            .map(|d| (d.pid, if row.kind == LockKind::Posix { 0 } else { d.fd }))
            .collect();
        owners.sort_unstable();
        owners.dedup();
        owners.len()
    };
    let listed = |row: &LockRecord| owners(row) >= rows.iter().filter(counts).filter(|r| same_range(r, row)).count();
    if !rows.iter().filter(counts).all(listed) {
        return false;
    }
    // Several descriptors may share one description: then they are more than the rows, and could hide another owner. New
    // rows with the same holders as before mean just that.
    !before.is_some_and(|(count, holders)| rows.len() > *count && *holders == hash_of_holders(descriptors))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::monitor::examples::{access, holds, rows};

    #[test]
    fn one_more_row_of_the_same_range_is_one_more_owner() {
        let found = BytesFound { locked: access("c/-"), ..BytesFound::default() };
        let row = rows("c/-", "OFDLCK", -1);
        let twice = [row.clone(), row.clone()].concat();
        let one = [holds(42, "c/-")];
        assert!(fits(&found, &one, &row, None));
        assert!(!fits(&found, &one, &twice, None));
        assert!(!fits(&found, &[], &row, None), "nobody has it");
        // Two descriptors may share one description, which is one row. When a second comes it is somebody else's.
        let shared = [holds(42, "c/-"), holds(43, "c/-")];
        let before = to_compare(&shared, &row);
        assert!(fits(&found, &shared, &row, before.as_ref()));
        assert!(!fits(&found, &shared, &twice, before.as_ref()));
    }

    #[test]
    fn rows_that_come_later_than_their_holder_are_his() {
        let found = BytesFound { locked: access("cw/w"), ..BytesFound::default() };
        let holder = [holds(42, "cw/w")];
        assert!(fits(&found, &holder, &[], None), "the table was read before he locked");
        assert_eq!(to_compare(&holder, &[]), None);
        let all = rows("cw/w", "OFDLCK", -1);
        assert_eq!(to_compare(&holder, &all[1..]), None);
        assert_eq!(to_compare(&holder, &all).map(|(rows, _)| rows), Some(all.len()));
    }
}
