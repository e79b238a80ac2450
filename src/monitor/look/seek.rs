//! Who holds a lock that nobody known holds, and is not found at once?
//!
//! Only walks through all processes can say that nobody does. On a host with many that takes longer than others can wait:
//! they go on aside, and until two have come to their end without a holder nothing is said of him but that he is sought.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::sample::{Answer, ImageSample, Sample};
use super::super::search::{Depth, Wake};
use super::Looker;
use super::explain::{CLOSING, WALK_SHARE};
use crate::image::catalog::Entry;
use crate::linux::identity::FileId;
use crate::linux::lock_table::LockRecord;

/// What is sought aside.
#[derive(Default)]
pub(super) struct Seek {
    /// Called when a walk is over, and how long one may take that is waited for; `None`: all are waited for.
    aside: Option<(Wake, Duration)>,
    sought: HashMap<Arc<Path>, Sought>,
    /// Those for which the walk goes on.
    walking_for: HashSet<Arc<Path>>,
    /// Somebody has opened an image and was not found.
    for_opener: bool,
    pace: Pace,
}

/// A lock without a holder.
#[derive(Debug, PartialEq)]
struct Sought {
    /// How many walks in a row have not found one.
    walks: u8,
    file: FileId,
    answer: Answer,
    rows: Arc<[LockRecord]>,
}

/// A holder who hands the lock to another during a walk is not found by it; by the next one he is.
const WALKS: u8 = 2;
/// What could not be started is tried again after this time.
const TRY_AGAIN: Duration = Duration::from_secs(1);

/// How often is it walked? As often as it takes to come to a conclusion, and then not for long: where locks come and go
/// whose holders may not be seen, there is always something to seek.
#[derive(Default)]
struct Pace {
    in_a_row: u8,
    rested_at: Option<Instant>,
    /// From then on, the next walk is the first in a row.
    forgotten_at: Option<Instant>,
}

impl Pace {
    fn is_due(&self, now: Instant) -> bool {
        self.rested_at.is_none_or(|at| now >= at)
    }

    fn walked(&mut self, took: Duration, now: Instant) {
        let first = self.forgotten_at.is_none_or(|at| now >= at);
        self.in_a_row = if first { 1 } else { self.in_a_row + 1 };
        let long = took * WALK_SHARE;
        self.rested_at = Some(now + if self.in_a_row < WALKS { took } else { long });
        if first {
            self.forgotten_at = Some(now + long);
        }
    }

    fn failed(&mut self, now: Instant) {
        self.rested_at = Some(now + TRY_AGAIN);
    }
}

impl Seek {
    /// What is locked there has its holders.
    pub(super) fn found(&mut self, resolved: &Path) {
        self.sought.remove(resolved);
        // If somebody else takes it, the walk that goes on began before that.
        self.walking_for.remove(resolved);
    }
}

impl Sought {
    fn new(image: &ImageSample) -> Self {
        Self { walks: 0, file: image.file, answer: image.answer.clone(), rows: Arc::clone(&image.table_rows) }
    }

    /// A walk has not found a holder of what is locked now. Returns whether that is enough.
    fn walked_in_vain(&mut self, image: &ImageSample) -> bool {
        let now = Self { walks: self.walks, ..Self::new(image) };
        let same = *self == now;
        *self = Self { walks: if same { self.walks + 1 } else { 0 }, ..now };
        self.walks >= WALKS
    }
}

impl Looker {
    /// Lets walks through all processes that take longer than `patience` go on aside. `wake` is called when one is over:
    /// then there is something to [take](Self::take_search).
    pub fn search_aside(&mut self, patience: Duration, wake: impl Fn() + Send + Sync + 'static) {
        self.seek.aside = Some((Arc::new(wake), patience));
    }

    /// Whether a walk through all processes takes longer than anybody should wait for it.
    pub(super) fn must_walk_aside(&self) -> bool {
        self.seek.aside.as_ref().is_some_and(|(_, patience)| self.search.estimate() > *patience)
    }

    /// Whether the holder of what is locked is sought aside.
    pub(super) fn is_sought(&self, resolved: &Path) -> bool {
        self.seek.sought.contains_key(resolved)
    }

    /// Seeks the holders of what is locked on `open` aside.
    pub(super) fn seek(&mut self, open: &[Arc<Entry>]) {
        for entry in open {
            let Some(image) = self.images.get(&entry.resolved) else { continue };
            self.seek.sought.entry(Arc::clone(&entry.resolved)).or_insert_with(|| Sought::new(image));
        }
        self.go_on_seeking();
    }

    /// Seeks aside whoever has opened an image without locking it.
    pub(super) fn seek_opener(&mut self) {
        self.seek.for_opener = true;
        self.go_on_seeking();
    }

    /// Starts a walk if there is something to seek and none goes on.
    pub(super) fn go_on_seeking(&mut self) {
        let Some((wake, _)) = &self.seek.aside else { return };
        let now = Instant::now();
        let nothing = self.seek.sought.is_empty() && !self.seek.for_opener;
        if nothing || self.search.is_walking() || !self.seek.pace.is_due(now) {
            return;
        }
        // A lock without a descriptor may belong to a mapping: that is asked by the walk that may be the last.
        let last = self.seek.sought.iter().filter(|(_, s)| s.walks + 1 >= WALKS);
        let mapped = last.filter_map(|(path, _)| Some(self.mapping_of(self.images.get(path)?)?.0)).collect();
        let wake = Arc::clone(wake);
        if self.search.start_walk(&self.wanted(), mapped, wake) {
            self.seek.walking_for = self.seek.sought.keys().cloned().collect();
            self.seek.for_opener = false;
        } else {
            self.seek.pace.failed(now);
        }
    }

    /// Takes over what a walk aside has found, and looks again at what it was for. `None` while none is over.
    pub fn take_search(&mut self) -> Option<Sample> {
        if !self.search.is_walking() {
            return None;
        }
        let wanted = self.wanted();
        let over = self.search.take_walk(&wanted);
        if self.search.is_walking() {
            return None;
        }
        self.troubles.clear();
        let walked_for = std::mem::take(&mut self.seek.walking_for);
        let mut open: Vec<Arc<Entry>> =
            self.entries.iter().filter(|e| walked_for.contains(&e.resolved)).cloned().collect();
        let mut changed = HashSet::new();
        for again in [false, true] {
            if again {
                // A process that ends has no descriptors any more while the kernel still closes them.
                std::thread::sleep(CLOSING);
                self.slept += CLOSING;
            }
            // Who came, or opened something, since the walk began.
            self.scan(Depth::Changed, &wanted);
            self.read_table();
            changed.extend(self.ask(&mut open));
            self.search.refresh(&self.ids(&open));
            open.retain(|e| !self.is_explained(&e.resolved));
            if open.is_empty() {
                break;
            }
        }
        self.seek.sought.retain(|path, _| self.images.contains_key(path));
        match over {
            Some(over) => {
                self.walks.whole(over.took);
                self.walks.keep_only(&wanted);
                self.seek.pace.walked(over.took, Instant::now());
                self.note(over.exhausted.map_or(Ok(()), Err));
                open.iter().for_each(|e| self.conclude(&e.resolved, &over.mapped));
            }
            None => self.seek.pace.failed(Instant::now()),
        }
        self.go_on_seeking();
        self.explain(&changed, &wanted);
        Some(self.sample())
    }

    /// A walk has found no holder for what is locked on this image.
    fn conclude(&mut self, resolved: &Arc<Path>, mapped: &HashMap<FileId, Vec<i32>>) {
        let Some((image, sought)) = self.images.get(resolved).zip(self.seek.sought.get_mut(resolved)) else { return };
        if !sought.walked_in_vain(image) {
            return;
        }
        let image = Arc::clone(image);
        self.seek.sought.remove(resolved);
        match self.mapping_of(&image).and_then(|(of, _)| mapped.get(&of)) {
            Some(pids) => self.mapped.insert(image.file, pids.clone()),
            None => self.mapped.remove(&image.file),
        };
        self.walks.give_up(&image);
    }

    /// A lock without a descriptor may belong to a file that was closed and is mapped still.
    pub(super) fn look_for_mappings(&mut self, ownerless: &[Arc<Entry>]) {
        let files: HashMap<FileId, FileId> =
            ownerless.iter().filter_map(|e| self.mapping_of(self.images.get(&e.resolved)?)).collect();
        let found = self.search.mappings(files.keys().copied().collect());
        self.mapped.retain(|file, _| !files.values().any(|f| f == file));
        self.mapped.extend(found.into_iter().filter_map(|(file, pids)| Some((*files.get(&file)?, pids))));
    }

    /// The file as `/proc/PID/maps` names it, and as we do. `None` where no row is listed: then it is no lock of this
    /// kernel's, and no reason to read every process's mappings.
    fn mapping_of(&self, image: &ImageSample) -> Option<(FileId, FileId)> {
        let device = image.mount.as_ref().map_or(image.file.device, |m| m.lock_device);
        let in_table = image.rows_certain && image.table_rows.iter().any(LockRecord::counts);
        in_table.then_some((FileId { device, ..image.file }, image.file))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::monitor::examples::image;

    #[test]
    fn only_two_walks_for_the_very_same_locks_are_enough() {
        let (one, other) = (image("a", "cw/w"), image("a", "c/w"));
        let mut sought = Sought::new(&one);
        assert!(!sought.walked_in_vain(&one));
        assert!(sought.walked_in_vain(&one));
        // Locks that change all the time were never walked for twice.
        let mut sought = Sought::new(&one);
        for now in [&one, &other, &one, &other, &one] {
            assert!(!sought.walked_in_vain(now));
        }
        // The same bytes of another file at that path are other locks.
        let inode = one.file.inode + 1;
        let replaced = ImageSample { file: FileId { inode, ..one.file }, ..one.clone() };
        let mut sought = Sought::new(&one);
        assert!(!sought.walked_in_vain(&one));
        assert!(!sought.walked_in_vain(&replaced));
        assert!(!sought.walked_in_vain(&replaced));
        assert!(sought.walked_in_vain(&replaced));
    }

    #[test]
    fn two_walks_come_soon_and_more_take_a_small_part_of_the_time() {
        let (start, took) = (Instant::now(), Duration::from_millis(100));
        let mut pace = Pace::default();
        assert!(pace.is_due(start));
        pace.walked(took, start);
        assert!(!pace.is_due(start) && pace.is_due(start + took));
        pace.walked(took, start + took * 2);
        assert!(!pace.is_due(start + took * 50));
        // Whatever there is to seek.
        let (mut pace, mut now, mut walks) = (Pace::default(), start, 0);
        while now < start + Duration::from_secs(100) {
            now += Duration::from_millis(10);
            if pace.is_due(now) {
                now += took;
                pace.walked(took, now);
                walks += 1;
            }
        }
        assert!((18..=22).contains(&walks), "{walks} walks of 0.1 s in 100 s");
        pace.failed(now);
        assert!(!pace.is_due(now) && pace.is_due(now + TRY_AGAIN));
    }
}
