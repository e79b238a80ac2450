//! Who holds a lock that nobody known holds, and is not found at once?
//!
//! Only a walk through all processes can say that nobody does. On a host with many that takes longer than others can
//! wait: it goes on aside, and until it has come to its end twice nothing is said of the holder but that he is sought.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::sample::{Answer, ImageSample, Sample};
use super::super::search::Wake;
use super::Looker;
use crate::image::catalog::Entry;
use crate::linux::identity::FileId;
use crate::linux::lock_table::LockRecord;

/// What is sought aside.
#[derive(Default)]
pub(super) struct Seek {
    /// Called when a walk is over, and what walks at most may take that are waited for; `None`: all are waited for.
    aside: Option<(Wake, Duration)>,
    sought: HashMap<Arc<Path>, Sought>,
    /// Those for which the walk goes on.
    walking_for: Vec<Arc<Path>>,
}

/// A lock without a holder, and how many walks have not found one.
struct Sought {
    in_vain: u8,
    /// The same for whatever lock there was on this image: one that changes all the time is not walked for for ever.
    in_all: u8,
    answer: Answer,
    rows: Arc<[LockRecord]>,
}

/// A holder who hands the lock to another during a walk is not found by it; by the next one he is.
const WALKS: u8 = 2;
const WALKS_IN_ALL: u8 = 4;

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

    /// Whether a holder is sought aside and it is not known of the very same locks that there is none.
    pub(super) fn is_sought(&self, resolved: &Path) -> bool {
        self.seek.sought.contains_key(resolved) && !self.was_concluded(resolved)
    }

    pub(super) fn is_sought_aside(&self, resolved: &Path) -> bool {
        self.seek.sought.contains_key(resolved)
    }

    /// Seeks the holders of what is locked on `open` aside. Returns whether that is possible.
    pub(super) fn seek(&mut self, open: &[Arc<Entry>], wanted: &Arc<HashSet<FileId>>) -> bool {
        for entry in open {
            let Some(image) = self.images.get(&entry.resolved) else { continue };
            let (answer, rows) = (image.answer.clone(), Arc::clone(&image.table_rows));
            self.seek.sought.insert(Arc::clone(&entry.resolved), Sought { in_vain: 0, in_all: 0, answer, rows });
        }
        let can = self.search.is_walking() || self.walk_aside(wanted);
        if !can {
            open.iter().for_each(|e| drop(self.seek.sought.remove(&e.resolved)));
        }
        can
    }

    /// Starts a walk for all that is sought, or for nothing but to have everybody seen again.
    pub(super) fn walk_aside(&mut self, wanted: &Arc<HashSet<FileId>>) -> bool {
        let Some((wake, _)) = &self.seek.aside else { return false };
        // A lock without a descriptor may belong to a mapping: that is asked when it is the last walk.
        let last = |s: &Sought| s.in_vain + 1 >= WALKS || s.in_all + 1 >= WALKS_IN_ALL;
        let last = self.seek.sought.iter().filter(|(_, s)| last(s));
        let mapped = last.filter_map(|(path, _)| Some(self.mapping_of(self.images.get(path)?)?.0)).collect();
        let wake = Arc::clone(wake);
        self.seek.walking_for = self.seek.sought.keys().cloned().collect();
        self.search.start_walk(wanted, mapped, wake)
    }

    /// Takes over what a walk aside has found, and looks again at what it was for. `None` while none is over.
    pub fn take_search(&mut self) -> Option<Sample> {
        let wanted: Arc<HashSet<FileId>> = Arc::new(self.images.values().map(|i| i.file).collect());
        if !self.search.is_walking() {
            return None;
        }
        let over = self.search.take_walk(&wanted)?;
        self.troubles.clear();
        self.walks.took(over.took);
        self.walks.keep_only(&wanted);
        let walked_for: HashSet<Arc<Path>> = std::mem::take(&mut self.seek.walking_for).into_iter().collect();
        let mut entries: Vec<Arc<Entry>> =
            self.entries.iter().filter(|e| walked_for.contains(&e.resolved)).cloned().collect();
        self.read_table();
        let changed = self.ask(&mut entries);
        self.search.refresh(&self.ids(&entries));
        self.seek.sought.retain(|path, _| self.images.contains_key(path));
        for entry in &entries {
            self.conclude(&entry.resolved, &over.mapped);
        }
        if !self.seek.sought.is_empty() && !self.walk_aside(&wanted) {
            // No thread to be had any more: at the next look they are searched for at once.
            self.seek.sought.clear();
        }
        self.explain(&changed, &wanted);
        Some(self.sample())
    }

    /// What a walk has brought for one image.
    fn conclude(&mut self, resolved: &Arc<Path>, mapped: &HashMap<FileId, Vec<i32>>) {
        let explained = self.is_explained(resolved);
        let Some(image) = self.images.get(resolved).filter(|_| !explained) else {
            self.seek.sought.remove(resolved);
            return;
        };
        let Some(sought) = self.seek.sought.get_mut(resolved) else { return };
        let same = sought.answer == image.answer && sought.rows == image.table_rows;
        sought.in_vain = if same { sought.in_vain + 1 } else { 0 };
        sought.in_all += 1;
        (sought.answer, sought.rows) = (image.answer.clone(), Arc::clone(&image.table_rows));
        if sought.in_vain >= WALKS || sought.in_all >= WALKS_IN_ALL {
            let (vain, file) = ((Instant::now(), sought.answer.clone(), Arc::clone(&sought.rows)), image.file);
            self.seek.sought.remove(resolved);
            let mappers =
                self.images.get(resolved).and_then(|i| self.mapping_of(i)).and_then(|(of, _)| mapped.get(&of));
            match mappers {
                Some(pids) => self.mapped.insert(file, pids.clone()),
                None => self.mapped.remove(&file),
            };
            self.walks.in_vain.insert(file, vain);
        }
    }

    /// A lock without a descriptor may belong to a file that was closed and is mapped still.
    pub(super) fn look_for_mappings(&mut self, ownerless: &[Arc<Entry>]) {
        let files: HashMap<FileId, FileId> =
            ownerless.iter().filter_map(|e| self.mapping_of(self.images.get(&e.resolved)?)).collect();
        if files.is_empty() {
            return;
        }
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
