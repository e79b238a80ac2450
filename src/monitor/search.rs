//! Which processes have the watched files open, and how is that found without walking every descriptor each time?
//!
//! Known descriptors are read again, new processes are walked at once, processes whose number of descriptors changed
//! next, and everything only when the caller cannot explain a lock otherwise. A pid with another start time is another
//! process, here and in every cache.

use std::collections::{HashMap, HashSet};
use std::num::NonZeroUsize;
use std::path::Path;

use super::sample::DeletedImage;
use crate::linux::descriptors::{self, NotListed, OpenDescriptor, OpenMode, ProcessEntry};
use crate::linux::identity::{FileId, FileKind, FileStatus};
use crate::linux::process::{self, ProcessFacts, Users};
use crate::linux::{ReadError, Roots};

/// How much of the host a search goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Depth {
    /// Processes that were not there the last time.
    New,
    /// Those, and processes that have opened or closed something since.
    Changed,
    /// All of them.
    All,
}

/// What is known of who has what open.
pub(super) struct Search {
    roots: Roots,
    users: Users,
    seen: HashMap<i32, Seen>,
    known: HashMap<FileId, Vec<OpenDescriptor>>,
    facts: HashMap<i32, ProcessFacts>,
    /// Locked files without a name, and the path each had.
    deleted: Vec<DeletedImage>,
}

struct Seen {
    entry_inode: u64,
    descriptors: u64,
    /// A user's process that may not be read.
    hidden: bool,
}

/// Whether it is worth telling that a deleted file is used like that.
fn matters(descriptor: &OpenDescriptor) -> bool {
    !descriptor.locks.is_empty() || descriptor.mode == OpenMode::Write
}

/// Below this many processes a walk is done before threads for it would have started.
const WORTH_THREADS: usize = 64;

impl Search {
    pub(super) fn new(roots: Roots) -> Self {
        let users = Users::read(Path::new("/etc/passwd"));
        Self { roots, users, seen: HashMap::new(), known: HashMap::new(), facts: HashMap::new(), deleted: Vec::new() }
    }

    /// The descriptors known to lead to `file`.
    pub(super) fn descriptors(&self, file: FileId) -> &[OpenDescriptor] {
        self.known.get(&file).map_or(&[], Vec::as_slice)
    }

    /// How many processes could be seen but not read.
    pub(super) fn hidden(&self) -> usize {
        self.seen.values().filter(|s| s.hidden).count()
    }

    /// What is known of a process; reads it the first time.
    pub(super) fn facts(&mut self, pid: i32) -> Option<&ProcessFacts> {
        if !self.facts.contains_key(&pid) {
            self.facts.insert(pid, process::facts(&self.roots, &self.users, pid)?);
        }
        self.facts.get(&pid)
    }

    /// Files that were deleted while somebody holds locks on them; the caller knows which of them were images.
    pub(super) fn deleted(&self) -> &[DeletedImage] {
        &self.deleted
    }

    /// Forgets files that are no longer watched; one that was deleted while somebody uses it is remembered as such.
    pub(super) fn keep_only(&mut self, files: &HashSet<FileId>) {
        let gone: Vec<OpenDescriptor> =
            self.known.extract_if(|file, _| !files.contains(file)).flat_map(|(_, descriptors)| descriptors).collect();
        for old in gone {
            let still = descriptors::again(&self.roots, old.pid, old.fd, old.file).filter(matters);
            self.deleted.extend(still.and_then(|descriptor| self.as_deleted(descriptor)));
        }
    }

    fn as_deleted(&self, descriptor: OpenDescriptor) -> Option<DeletedImage> {
        let path = descriptors::deleted_path(&self.roots, descriptor.pid, descriptor.fd)?;
        Some(DeletedImage { path, descriptor })
    }

    /// Reads the known descriptors of `files` again: what they hold now, and whether they are open still.
    pub(super) fn refresh(&mut self, files: &HashSet<FileId>) {
        let pids: HashSet<i32> = files.iter().filter_map(|f| self.known.get(f)).flatten().map(|d| d.pid).collect();
        for pid in pids {
            let now = process::brief(&self.roots, pid);
            let known = self.facts.get(&pid);
            let same = |f: &ProcessFacts| now.as_ref().is_some_and(|n| n.id == f.id);
            if known.is_some_and(|f| !same(f)) || now.is_none() {
                // Another process has the pid, or none has: what it had is closed, and what it has is not known.
                self.forget(pid);
            } else if known.is_some_and(|f| now.as_ref().is_some_and(|n| n.command != f.command)) {
                // The same process in another program: exec keeps pid, start time and descriptors.
                self.facts.remove(&pid);
            }
        }
        self.deleted.retain_mut(|d| {
            let old = &d.descriptor;
            let now = descriptors::again(&self.roots, old.pid, old.fd, old.file).filter(matters);
            now.map(|now| d.descriptor = now).is_some()
        });
        for file in files {
            if let Some(known) = self.known.get_mut(file) {
                let again = |d: &OpenDescriptor| descriptors::again(&self.roots, d.pid, d.fd, *file);
                *known = known.iter().filter_map(again).collect();
            }
        }
    }

    fn forget(&mut self, pid: i32) {
        self.seen.remove(&pid);
        self.facts.remove(&pid);
        self.known.values_mut().for_each(|v| v.retain(|d| d.pid != pid));
        self.deleted.retain(|d| d.descriptor.pid != pid);
    }

    /// Walks the descriptors of processes for any of `wanted`.
    pub(super) fn scan(&mut self, depth: Depth, wanted: &HashSet<FileId>) -> Result<(), ReadError> {
        let entries = descriptors::processes(&self.roots)?;
        let alive: HashSet<i32> = entries.iter().map(|e| e.pid).collect();
        let gone: Vec<i32> = self.seen.keys().filter(|p| !alive.contains(p)).copied().collect();
        gone.into_iter().for_each(|pid| self.forget(pid));

        let to_walk: Vec<ProcessEntry> = entries.into_iter().filter(|e| self.is_due(e, depth)).collect();
        let walked: HashSet<i32> = to_walk.iter().map(|e| e.pid).collect();
        let results = walk(&self.roots, &to_walk, wanted);
        self.known.values_mut().for_each(|v| v.retain(|d| !walked.contains(&d.pid)));
        self.deleted.retain(|d| !walked.contains(&d.descriptor.pid));
        for (entry, descriptors, result) in results {
            let was_hidden = self.seen.get(&entry.pid).map(|s| s.hidden);
            let hidden = match result {
                Ok(found) => {
                    for descriptor in found {
                        if wanted.contains(&descriptor.file) {
                            self.known.entry(descriptor.file).or_default().push(descriptor);
                        } else if matters(&descriptor) {
                            self.deleted.extend(self.as_deleted(descriptor));
                        }
                    }
                    false
                }
                Err(NotListed::Gone) => {
                    self.forget(entry.pid);
                    continue;
                }
                // Kernel threads may not be read either, but have nothing open.
                Err(NotListed::Hidden) => was_hidden
                    .unwrap_or_else(|| process::brief(&self.roots, entry.pid).is_none_or(|b| !b.is_kernel_thread)),
            };
            self.seen.insert(entry.pid, Seen { entry_inode: entry.entry_inode, descriptors, hidden });
        }
        Ok(())
    }

    fn is_due(&self, entry: &ProcessEntry, depth: Depth) -> bool {
        let Some(seen) = self.seen.get(&entry.pid).filter(|s| s.entry_inode == entry.entry_inode) else {
            return true;
        };
        match depth {
            Depth::New => false,
            Depth::Changed => {
                !seen.hidden && descriptors::count(&self.roots, entry.pid).is_none_or(|n| n != seen.descriptors)
            }
            Depth::All => true,
        }
    }
}

type Walked = (ProcessEntry, u64, Result<Vec<OpenDescriptor>, NotListed>);

fn walk(roots: &Roots, entries: &[ProcessEntry], wanted: &HashSet<FileId>) -> Vec<Walked> {
    // A deleted file may have been one of ours.
    let is_wanted = |s: &FileStatus| wanted.contains(&s.id) || (s.links == 0 && s.kind == FileKind::Regular);
    let one = &|entry: &ProcessEntry| {
        // Counted first: what is opened during the walk then shows as a change.
        let count = descriptors::count(roots, entry.pid).unwrap_or_default();
        (*entry, count, descriptors::of_process(roots, entry.pid, &is_wanted))
    };
    let threads = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    if entries.len() < WORTH_THREADS || threads == 1 {
        return entries.iter().map(one).collect();
    }
    std::thread::scope(|scope| {
        let share = entries.len().div_ceil(threads);
        let mut results = Vec::with_capacity(entries.len());
        let mut workers = Vec::new();
        for chunk in entries.chunks(share) {
            let work = move || chunk.iter().map(one).collect::<Vec<_>>();
            match std::thread::Builder::new().spawn_scoped(scope, work) {
                Ok(worker) => workers.push(worker),
                // No thread to be had: then here.
                Err(_) => results.extend(chunk.iter().map(one)),
            }
        }
        // A worker that panicked has found nothing; its processes stay unseen and are walked next time.
        results.extend(workers.into_iter().flat_map(|w| w.join().unwrap_or_default()));
        results
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linux::identity::status;
    use std::fs::File;

    #[test]
    fn an_opened_file_is_found_by_the_changed_number_of_descriptors() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let id = status(image.path()).unwrap().id;
        let wanted = HashSet::from([id]);
        let pid = i32::try_from(std::process::id()).unwrap();
        let mut search = Search::new(Roots::host());
        let ours = |s: &Search| s.descriptors(id).iter().filter(|d| d.pid == pid).count();
        search.scan(Depth::All, &wanted).unwrap();
        assert_eq!(ours(&search), 1);
        let second = File::open(image.path()).unwrap();
        search.scan(Depth::All, &wanted).unwrap();
        assert_eq!(ours(&search), 2);
        drop(second);
        search.refresh(&wanted);
        assert_eq!(ours(&search), 1);
        assert_eq!(search.facts(pid).unwrap().id.pid, pid);
        search.keep_only(&HashSet::new());
        assert_eq!(ours(&search), 0);
    }

    #[test]
    fn a_pid_with_another_start_time_is_another_process() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let id = status(image.path()).unwrap().id;
        let wanted = HashSet::from([id]);
        let pid = i32::try_from(std::process::id()).unwrap();
        let mut search = Search::new(Roots::host());
        search.scan(Depth::All, &wanted).unwrap();
        search.facts(pid).unwrap();
        // As if somebody else had had our pid when we last looked.
        search.facts.get_mut(&pid).unwrap().id.start_time += 1;
        search.refresh(&wanted);
        assert!(search.descriptors(id).iter().all(|d| d.pid != pid));
        search.scan(Depth::New, &wanted).unwrap();
        assert_eq!(search.descriptors(id).iter().filter(|d| d.pid == pid).count(), 1);
        assert_eq!(search.facts(pid).unwrap().id, process::brief(&Roots::host(), pid).unwrap().id);
    }
}
