//! Which processes have the watched files open, and how is that found without walking every descriptor each time?
//!
//! Known descriptors are read again, new processes are walked at once, processes whose number of descriptors changed
//! next, and everything only when the caller cannot explain a lock otherwise. A pid with another start time is another
//! process, here and in every cache.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::sample::DeletedImage;
use crate::linux::crew::Crew;
use crate::linux::descriptors::{self, NotListed, OpenDescriptor, OpenMode, ProcessEntry};
use crate::linux::identity::{FileId, FileKind, FileStatus};
use crate::linux::lanes::PATIENCE;
use crate::linux::mappings;
use crate::linux::process::{self, Brief, ProcessFacts, Users};
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
    roots: Arc<Roots>,
    users: Arc<Users>,
    crew: Crew<i32>,
    seen: HashMap<i32, Seen>,
    known: HashMap<FileId, Vec<OpenDescriptor>>,
    facts: HashMap<i32, ProcessFacts>,
    /// Whose command line did not come: it is asked again.
    half_known: HashSet<i32>,
    /// Locked files without a name, and the path each had.
    deleted: Vec<DeletedImage>,
}

struct Seen {
    entry_inode: u64,
    descriptors: u64,
    /// A user's process that may not be read, or does not answer.
    hidden: bool,
}

/// Whether it is worth telling that a deleted file is used like that.
fn matters(descriptor: &OpenDescriptor) -> bool {
    !descriptor.locks.is_empty() || descriptor.mode == OpenMode::Write
}

impl Search {
    pub(super) fn new(roots: Roots) -> Self {
        let users = Arc::new(Users::read(Path::new("/etc/passwd")));
        let (roots, crew) = (Arc::new(roots), Crew::new(PATIENCE));
        Self {
            roots,
            users,
            crew,
            seen: HashMap::new(),
            known: HashMap::new(),
            facts: HashMap::new(),
            half_known: HashSet::new(),
            deleted: Vec::new(),
        }
    }

    /// The descriptors known to lead to `file`.
    pub(super) fn descriptors(&self, file: FileId) -> &[OpenDescriptor] {
        self.known.get(&file).map_or(&[], Vec::as_slice)
    }

    /// How many processes could be seen but not read, or do not answer.
    pub(super) fn hidden(&self) -> usize {
        self.seen.values().filter(|s| s.hidden).count()
    }

    /// Reads what is not known yet of these processes.
    pub(super) fn learn(&mut self, pids: &HashSet<i32>) {
        let unknown = |pid: &&i32| !self.facts.contains_key(pid) || self.half_known.contains(pid);
        let unknown: Vec<(i32, ())> = pids.iter().filter(unknown).map(|pid| (*pid, ())).collect();
        let (roots, users) = (Arc::clone(&self.roots), Arc::clone(&self.users));
        let asked = self.crew.ask(unknown.clone(), move |pid, ()| process::facts(&roots, &users, pid));
        for ((pid, ()), facts) in unknown.into_iter().zip(asked) {
            self.half_known.remove(&pid);
            let facts = facts.unwrap_or_else(|| {
                self.half_known.insert(pid);
                process::facts_of_stuck(&self.roots, &self.users, pid)
            });
            self.facts.extend(facts.map(|f| (pid, f)));
        }
    }

    /// What is known of a process.
    pub(super) fn facts(&self, pid: i32) -> Option<&ProcessFacts> {
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
        let still = self.again(gone.iter().collect()).into_iter().flatten().filter(matters).collect();
        self.add_deleted(still);
    }

    /// Adds those of `descriptors` whose file has no name any more.
    fn add_deleted(&mut self, descriptors: Vec<OpenDescriptor>) {
        let roots = Arc::clone(&self.roots);
        let questions = descriptors.iter().map(|d| (d.pid, d.fd)).collect();
        let paths: Vec<Option<Option<PathBuf>>> =
            self.crew.ask(questions, move |pid, fd| descriptors::deleted_path(&roots, pid, fd));
        let deleted = descriptors.into_iter().zip(paths);
        let named = deleted.filter_map(|(descriptor, path)| Some(DeletedImage { path: path??, descriptor }));
        self.deleted.extend(named);
    }

    /// Looks again at descriptors: `None` for one that is closed, or leads elsewhere now. What does not answer is as it
    /// was.
    fn again(&mut self, known: Vec<&OpenDescriptor>) -> Vec<Option<OpenDescriptor>> {
        let roots = Arc::clone(&self.roots);
        let questions = known.iter().map(|d| (d.pid, (d.fd, d.file))).collect();
        let now = self.crew.ask(questions, move |pid, (fd, file)| descriptors::again(&roots, pid, fd, file));
        let as_it_was = |now: Option<Result<_, _>>, before: &OpenDescriptor| match now {
            Some(Ok(now)) => now,
            Some(Err(_)) | None => Some(before.clone()),
        };
        now.into_iter().zip(known).map(|(now, before)| as_it_was(now, before)).collect()
    }

    /// Reads the known descriptors of `files` again: what they hold now, and whether they are open still.
    pub(super) fn refresh(&mut self, files: &HashSet<FileId>) {
        let mut pids: Vec<i32> = files.iter().filter_map(|f| self.known.get(f)).flatten().map(|d| d.pid).collect();
        pids.sort_unstable();
        pids.dedup();
        let roots = Arc::clone(&self.roots);
        let questions: Vec<(i32, ())> = pids.iter().map(|pid| (*pid, ())).collect();
        let briefs: Vec<Option<Option<Brief>>> = self.crew.ask(questions, move |pid, ()| process::brief(&roots, pid));
        for (pid, now) in pids.into_iter().zip(briefs) {
            let Some(now) = now else { continue };
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
        let deleted = std::mem::take(&mut self.deleted);
        let now = self.again(deleted.iter().map(|d| &d.descriptor).collect());
        let still = deleted.into_iter().zip(now);
        self.deleted =
            still.filter_map(|(d, now)| Some(DeletedImage { descriptor: now.filter(matters)?, ..d })).collect();
        let known: Vec<OpenDescriptor> = files.iter().filter_map(|f| self.known.remove(f)).flatten().collect();
        for now in self.again(known.iter().collect()).into_iter().flatten() {
            self.known.entry(now.file).or_default().push(now);
        }
    }

    fn forget(&mut self, pid: i32) {
        self.seen.remove(&pid);
        self.facts.remove(&pid);
        self.half_known.remove(&pid);
        self.known.values_mut().for_each(|v| v.retain(|d| d.pid != pid));
        self.deleted.retain(|d| d.descriptor.pid != pid);
    }

    /// Walks the descriptors of processes for any of `wanted`.
    pub(super) fn scan(&mut self, depth: Depth, wanted: &Arc<HashSet<FileId>>) -> Result<(), ReadError> {
        let entries = descriptors::processes(&self.roots)?;
        let alive: HashSet<i32> = entries.iter().map(|e| e.pid).collect();
        let gone: Vec<i32> = self.seen.keys().filter(|p| !alive.contains(p)).copied().collect();
        gone.into_iter().for_each(|pid| self.forget(pid));

        let to_walk: Vec<ProcessEntry> = entries.into_iter().filter(|e| self.is_due(e, depth)).collect();
        let walked: HashSet<i32> = to_walk.iter().map(|e| e.pid).collect();
        let results = self.walk(&to_walk, wanted);
        let mut silent = HashSet::new();
        let mut exhausted = false;
        let mut found = Vec::new();
        for (entry, result) in to_walk.into_iter().zip(results) {
            let (descriptors, hidden) = match result {
                Some((count, _, Ok(of_process))) => {
                    found.extend(of_process);
                    (count, false)
                }
                Some((_, _, Err(NotListed::Gone))) => {
                    self.forget(entry.pid);
                    continue;
                }
                // Kernel threads may not be read either, but have nothing open.
                Some((count, is_kernel_thread, Err(NotListed::Hidden))) => (count, !is_kernel_thread),
                // It does not answer, or we have no descriptor left to read it with: what is known of it stays, what it
                // has besides is not known, and it is walked again.
                None | Some((_, _, Err(NotListed::Exhausted))) => {
                    exhausted |= result.is_some();
                    silent.insert(entry.pid);
                    (u64::MAX, true)
                }
            };
            self.seen.insert(entry.pid, Seen { entry_inode: entry.entry_inode, descriptors, hidden });
        }
        let known_anew = |pid: i32| walked.contains(&pid) && !silent.contains(&pid);
        self.known.values_mut().for_each(|v| v.retain(|d| !known_anew(d.pid)));
        self.deleted.retain(|d| !known_anew(d.descriptor.pid));
        let mut nameless = Vec::new();
        for descriptor in found {
            if wanted.contains(&descriptor.file) {
                self.known.entry(descriptor.file).or_default().push(descriptor);
            } else if matters(&descriptor) {
                nameless.push(descriptor);
            }
        }
        self.add_deleted(nameless);
        if exhausted {
            let path = self.roots.proc.clone();
            let source = std::io::Error::from(rustix::io::Errno::MFILE);
            return Err(ReadError { path, source });
        }
        Ok(())
    }

    /// Which of the processes that are known have which of `files` mapped.
    pub(super) fn mappings(&mut self, files: HashSet<FileId>) -> HashMap<FileId, Vec<i32>> {
        let (roots, files) = (Arc::clone(&self.roots), Arc::new(files));
        let questions: Vec<(i32, ())> = self.seen.keys().map(|pid| (*pid, ())).collect();
        let pids: Vec<i32> = questions.iter().map(|(pid, ())| *pid).collect();
        let asked = self.crew.ask(questions, move |pid, ()| mappings::of_process(&roots, pid, &files));
        let mut found: HashMap<FileId, Vec<i32>> = HashMap::new();
        for (pid, mapped) in pids.into_iter().zip(asked) {
            mapped.unwrap_or_default().into_iter().for_each(|file| found.entry(file).or_default().push(pid));
        }
        found
    }

    /// Walks the descriptors of processes: how many each has, and those that lead to a wanted file, or to a deleted one,
    /// which may have been wanted.
    fn walk(&mut self, entries: &[ProcessEntry], wanted: &Arc<HashSet<FileId>>) -> Vec<Option<Walked>> {
        let (roots, wanted) = (Arc::clone(&self.roots), Arc::clone(wanted));
        let questions = entries.iter().map(|e| (e.pid, ())).collect();
        self.crew.ask(questions, move |pid, ()| {
            let is_wanted = |s: &FileStatus| wanted.contains(&s.id) || (s.links == 0 && s.kind == FileKind::Regular);
            // Counted first: what is opened during the walk then shows as a change.
            let count = descriptors::count(&roots, pid).unwrap_or_default();
            let listed = descriptors::of_process(&roots, pid, &is_wanted);
            let hidden = matches!(listed, Err(NotListed::Hidden));
            let is_kernel_thread = hidden && process::brief(&roots, pid).is_some_and(|b| b.is_kernel_thread);
            (count, is_kernel_thread, listed)
        })
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

/// How many descriptors a process has, whether it is hidden because it is a thread of the kernel, and what was found.
type Walked = (u64, bool, Result<Vec<OpenDescriptor>, NotListed>);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linux::identity::status;
    use std::fs::File;

    #[test]
    fn an_opened_file_is_found_by_the_changed_number_of_descriptors() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let id = status(image.path()).unwrap().id;
        let wanted = Arc::new(HashSet::from([id]));
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
        search.learn(&HashSet::from([pid]));
        assert_eq!(search.facts(pid).unwrap().id.pid, pid);
        search.keep_only(&HashSet::new());
        assert_eq!(ours(&search), 0);
    }

    #[test]
    fn a_pid_with_another_start_time_is_another_process() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let id = status(image.path()).unwrap().id;
        let wanted = Arc::new(HashSet::from([id]));
        let pid = i32::try_from(std::process::id()).unwrap();
        let mut search = Search::new(Roots::host());
        search.scan(Depth::All, &wanted).unwrap();
        search.learn(&HashSet::from([pid]));
        // As if somebody else had had our pid when we last looked.
        search.facts.get_mut(&pid).unwrap().id.start_time += 1;
        search.refresh(&wanted);
        assert!(search.descriptors(id).iter().all(|d| d.pid != pid));
        search.scan(Depth::New, &wanted).unwrap();
        assert_eq!(search.descriptors(id).iter().filter(|d| d.pid == pid).count(), 1);
        search.learn(&HashSet::from([pid]));
        assert_eq!(search.facts(pid).unwrap().id, process::brief(&Roots::host(), pid).unwrap().id);
    }
}
