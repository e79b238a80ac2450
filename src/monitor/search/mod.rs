//! Which processes have the watched files open, and how is that found without walking every descriptor each time?
//!
//! Known descriptors are read again, where nothing hints at a change a few at a time; new processes are walked at once,
//! processes whose number of descriptors changed next, and everything only when the caller cannot explain a lock
//! otherwise. A pid with another start time is another process, here and in every cache.

mod aside;
mod known;
mod walk;

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use aside::Aside;
pub(super) use aside::Wake;
use known::{Known, KnownProcess};
use walk::{Walked, look_at, mappers, walk_one};

use super::sample::DeletedImage;
use crate::linux::crew::Crew;
use crate::linux::descriptors::{self, NotListed, OpenDescriptor, OpenMode, ProcessEntry};
use crate::linux::identity::FileId;
use crate::linux::lanes::PATIENCE;
use crate::linux::process::Users;
use crate::linux::task_files::TaskFiles;
use crate::linux::{ReadError, Roots};

/// How much of the host a search goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Depth {
    /// Processes that were not there the last time.
    New,
    /// Processes that were not there the last time, and some of the others in turn: what nothing hints at is found, too.
    InTurn,
    /// Processes that were not there the last time or have opened or closed something since.
    Changed,
    /// All of them.
    All,
}

/// What is known of who has what open.
pub(super) struct Search {
    roots: Arc<Roots>,
    users: Arc<Users>,
    crew: Crew<i32>,
    aside: Aside,
    seen: HashMap<i32, Seen>,
    /// The processes as they were listed last, and what `/proc/loadavg` said before: while it says the same, none has
    /// started or ended.
    entries: Vec<ProcessEntry>,
    population: String,
    known: HashMap<FileId, Known>,
    /// Files whose descriptors may be others than when this was last taken.
    altered: HashSet<FileId>,
    /// When known descriptors were last read in turn, and the process up to which processes were walked in turn.
    turned_at: Instant,
    walked_to: (Instant, i32),
    /// Tells who has which file open; nothing while that was not tried, or cannot be had.
    task_files: Option<Option<TaskFiles>>,
    facts: HashMap<i32, KnownProcess>,
    /// Whose command line did not come: it is asked again.
    half_known: HashSet<i32>,
    /// Locked files without a name, and the path each had.
    deleted: Vec<DeletedImage>,
}

/// So many descriptors a second are walked in turn.
const WALKED_A_SECOND: f64 = 200.0;
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
            aside: Aside::default(),
            seen: HashMap::new(),
            known: HashMap::new(),
            altered: HashSet::new(),
            entries: Vec::new(),
            population: String::new(),
            turned_at: Instant::now(),
            walked_to: (Instant::now(), 0),
            task_files: None,
            facts: HashMap::new(),
            half_known: HashSet::new(),
            deleted: Vec::new(),
        }
    }

    /// The descriptors known to lead to `file`.
    pub(super) fn descriptors(&self, file: FileId) -> &[OpenDescriptor] {
        self.known.get(&file).map_or(&[], |known| known.descriptors.as_slice())
    }

    /// The files whose descriptors may be others than when this was last asked.
    pub(super) fn take_altered(&mut self) -> HashSet<FileId> {
        std::mem::take(&mut self.altered)
    }

    /// How many processes could be seen but not read, or do not answer.
    pub(super) fn hidden(&self) -> usize {
        self.seen.values().filter(|s| s.hidden).count()
    }

    /// Files that were deleted while somebody holds locks on them; the caller knows which of them were images.
    pub(super) fn deleted(&self) -> &[DeletedImage] {
        &self.deleted
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

    fn forget(&mut self, pid: i32) {
        self.seen.remove(&pid);
        self.facts.remove(&pid);
        self.half_known.remove(&pid);
        self.drop_descriptors(|d| d.pid == pid);
        self.deleted.retain(|d| d.descriptor.pid != pid);
    }

    fn drop_descriptors(&mut self, gone: impl Fn(&OpenDescriptor) -> bool) {
        for (file, known) in &mut self.known {
            let before = known.descriptors.len();
            known.descriptors.retain(|d| !gone(d));
            if known.descriptors.len() != before {
                self.altered.insert(*file);
            }
        }
    }

    /// Every process. On a host with thousands the list is dear, and most often it is as before.
    fn processes(&mut self) -> Result<Vec<ProcessEntry>, ReadError> {
        let population = descriptors::population(&self.roots).unwrap_or_default();
        if population.is_empty() || population != self.population {
            self.entries = descriptors::processes(&self.roots)?;
            // Read before the list: whoever starts between the two makes it another.
            self.population = population;
        }
        Ok(self.entries.clone())
    }

    /// Walks the descriptors of processes for any of `wanted`.
    pub(super) fn scan(&mut self, depth: Depth, wanted: &Arc<HashSet<FileId>>) -> Result<(), ReadError> {
        let entries = self.list()?;
        let in_turn = if depth == Depth::InTurn { self.turn(&entries) } else { HashSet::new() };
        let is_due = |e: &ProcessEntry| in_turn.contains(&e.pid) || self.is_due(e, depth);
        let to_walk: Vec<ProcessEntry> = entries.into_iter().filter(is_due).collect();
        let (roots, theirs) = (Arc::clone(&self.roots), Arc::clone(wanted));
        let questions = to_walk.iter().map(|e| (e.pid, ())).collect();
        let walked = self.crew.ask(questions, move |pid, ()| walk_one(&roots, pid, &theirs));
        self.take_in(to_walk, walked, wanted)
    }

    /// Looks at those descriptors only that the kernel names for files with these numbers, which are those of the
    /// superblock, as in `/proc/locks`. Returns whether it could be asked.
    ///
    /// A descriptor that moves meanwhile may be missed.
    pub(super) fn scan_named(
        &mut self,
        numbers: &HashSet<FileId>,
        wanted: &Arc<HashSet<FileId>>,
    ) -> Result<bool, ReadError> {
        if !self.can_name() {
            return Ok(false);
        }
        let entries = self.list()?;
        let roots = Arc::clone(&self.roots);
        let pids: Vec<(i32, ())> = entries.iter().map(|e| (e.pid, ())).collect();
        // Counted before the kernel is asked: what is opened later then shows as a change.
        let counts = self.crew.ask(pids, move |pid, ()| descriptors::count(&roots, pid).unwrap_or_default());
        let Some(mut named) = self.named(numbers) else { return Ok(false) };
        let (roots, theirs) = (Arc::clone(&self.roots), Arc::clone(wanted));
        // Who did not answer is asked again, and is found to be silent.
        let of_process = |(e, count): (&ProcessEntry, Option<u64>)| {
            (e.pid, (count.unwrap_or_default(), named.remove(&e.pid).unwrap_or_default()))
        };
        let questions = entries.iter().zip(counts).map(of_process).collect();
        let walked = self
            .crew
            .ask(questions, move |pid, (count, fds): (u64, Vec<i32>)| look_at(&roots, pid, count, &fds, &theirs));
        self.take_in(entries, walked, wanted).map(|()| true)
    }

    /// Every process; those that have gone are forgotten.
    fn list(&mut self) -> Result<Vec<ProcessEntry>, ReadError> {
        let entries = self.processes()?;
        let alive: HashSet<i32> = entries.iter().map(|e| e.pid).collect();
        let gone: Vec<i32> = self.seen.keys().filter(|p| !alive.contains(p)).copied().collect();
        gone.into_iter().for_each(|pid| self.forget(pid));
        Ok(entries)
    }

    /// Takes over what was found of processes just now.
    fn take_in(
        &mut self,
        entries: Vec<ProcessEntry>,
        walked: Vec<Option<Walked>>,
        wanted: &HashSet<FileId>,
    ) -> Result<(), ReadError> {
        // Another process may have the pid by now.
        let renewed = |e: &&ProcessEntry| self.seen.get(&e.pid).is_some_and(|s| s.entry_inode != e.entry_inode);
        let renewed = entries.iter().filter(renewed).map(|e| e.pid).filter(|pid| self.facts.contains_key(pid));
        self.confirm(renewed.collect());
        let mut known_anew = HashSet::new();
        let mut exhausted = false;
        let mut found = Vec::new();
        for (entry, walked) in entries.into_iter().zip(walked) {
            let (descriptors, hidden) = match walked {
                Some(Walked { listed: Err(NotListed::Gone), .. }) => {
                    self.forget(entry.pid);
                    continue;
                }
                Some(Walked { count, listed: Ok(of_process), .. }) => {
                    known_anew.insert(entry.pid);
                    found.extend(of_process);
                    (count, false)
                }
                // Kernel threads may not be read either, but have nothing open.
                Some(Walked { count, is_kernel_thread, listed: Err(NotListed::Hidden) }) => {
                    known_anew.insert(entry.pid);
                    (count, !is_kernel_thread)
                }
                // It does not answer, or we have no descriptor left to read it with: what is known of it stays, what it
                // has besides is not known, and it is walked again.
                None | Some(Walked { listed: Err(NotListed::Exhausted), .. }) => {
                    exhausted |= walked.is_some();
                    (u64::MAX, true)
                }
            };
            self.seen.insert(entry.pid, Seen { entry_inode: entry.entry_inode, descriptors, hidden });
        }
        self.drop_descriptors(|d| known_anew.contains(&d.pid));
        self.deleted.retain(|d| !known_anew.contains(&d.descriptor.pid));
        self.add(found, wanted);
        if exhausted { Err(self.exhausted()) } else { Ok(()) }
    }

    /// Adds descriptors that are not known yet.
    fn add(&mut self, found: Vec<OpenDescriptor>, wanted: &HashSet<FileId>) {
        let (wanted, nameless): (Vec<_>, Vec<_>) = found.into_iter().partition(|d| wanted.contains(&d.file));
        for descriptor in wanted {
            self.altered.insert(descriptor.file);
            self.known.entry(descriptor.file).or_default().descriptors.push(descriptor);
        }
        self.add_deleted(nameless.into_iter().filter(matters).collect());
    }

    /// There is no descriptor left to read processes with.
    fn exhausted(&self) -> ReadError {
        ReadError { path: self.roots.proc.clone(), source: std::io::Error::from(rustix::io::Errno::MFILE) }
    }

    /// Which of the processes that are known have which of `files` mapped.
    pub(super) fn mappings(&mut self, files: HashSet<FileId>) -> HashMap<FileId, Vec<i32>> {
        let pids = self.seen.keys().copied().collect();
        mappers(&mut self.crew, &self.roots, pids, files)
    }

    /// The next processes in turn.
    fn turn(&mut self, entries: &[ProcessEntry]) -> HashSet<i32> {
        let (since, after) = self.walked_to;
        let share = WALKED_A_SECOND * since.elapsed().as_secs_f64().max(1.0);
        let mut pids: Vec<i32> = entries.iter().map(|e| e.pid).filter(|pid| *pid > after).collect();
        pids.sort_unstable();
        let mut count = 0.0;
        // Who may not be read, or did not answer, costs nothing more, and must not keep the others waiting.
        let readable = |pid: i32| self.seen.get(&pid).filter(|seen| !seen.hidden);
        let descriptors = |pid: i32| readable(pid).map_or(0, |seen| seen.descriptors).min(100_000);
        let turn: Vec<i32> = pids
            .into_iter()
            .take_while(|pid| {
                let room = count < share;
                // To look at a process costs something, whatever it has open.
                count += 5.0 + descriptors(*pid) as f64;
                room
            })
            .collect();
        // Past the last one it starts anew.
        self.walked_to = (Instant::now(), if count < share { 0 } else { turn.last().copied().unwrap_or_default() });
        turn.into_iter().collect()
    }

    /// Whether the kernel itself can be asked who has which file open.
    pub(super) fn can_name(&mut self) -> bool {
        self.roots.is_host() && self.task_files.get_or_insert_with(|| TaskFiles::load_if_allowed().ok()).is_some()
    }

    /// The descriptors of each process that lead to files with these numbers, or to deleted ones, as the kernel itself
    /// tells; `None` where it cannot be asked.
    fn named(&mut self, numbers: &HashSet<FileId>) -> Option<HashMap<i32, Vec<i32>>> {
        let task_files = self.task_files.as_mut()?.as_mut()?;
        let mut named: HashMap<i32, Vec<i32>> = HashMap::new();
        let pass = task_files.each(|open| {
            let number = FileId { device: open.device, inode: open.inode };
            if open.links == 0 || numbers.contains(&number) {
                named.entry(open.pid).or_default().push(open.fd);
            }
        });
        pass.is_ok().then_some(named)
    }

    fn is_due(&self, entry: &ProcessEntry, depth: Depth) -> bool {
        let Some(seen) = self.seen.get(&entry.pid).filter(|s| s.entry_inode == entry.entry_inode) else {
            return true;
        };
        match depth {
            Depth::New | Depth::InTurn => false,
            Depth::Changed => {
                !seen.hidden && descriptors::count(&self.roots, entry.pid).is_none_or(|n| n != seen.descriptors)
            }
            Depth::All => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linux::identity::status;
    use crate::linux::process;
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
    fn what_the_kernel_names_is_what_a_whole_walk_finds() {
        // On tmpfs, where the kernel's numbers are those of statx.
        let image = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        let id = status(image.path()).unwrap().id;
        let wanted = Arc::new(HashSet::from([id]));
        let second = File::open(image.path()).unwrap();
        let found = |by_name: bool| {
            let mut search = Search::new(Roots::host());
            // Where the kernel does not name them there is nothing to compare.
            if !by_name || !search.scan_named(&HashSet::from([id]), &wanted).unwrap() {
                search.scan(Depth::All, &wanted).unwrap();
            }
            let mut found = search.descriptors(id).to_vec();
            found.sort_by_key(|d| d.fd);
            found
        };
        let named = found(true);
        assert_eq!(named.len(), 2);
        assert_eq!(named, found(false));
        drop(second);
        assert_eq!(found(true).len(), 1);
    }

    #[test]
    fn each_process_has_its_turn() {
        let mut search = Search::new(Roots::host());
        let entries: Vec<ProcessEntry> = (1..=100).map(|pid| ProcessEntry { pid, entry_inode: 1 }).collect();
        let seen = || Seen { entry_inode: 1, descriptors: 20, hidden: false };
        search.seen = (1..=100).map(|pid| (pid, seen())).collect();
        let turns: Vec<HashSet<i32>> = (0..30).map(|_| search.turn(&entries)).collect();
        assert!(turns.iter().all(|turn| turn.len() < 20));
        assert_eq!(turns.iter().flatten().collect::<HashSet<_>>().len(), 100);
        // One that has more than a turn's worth does not keep the others from theirs.
        search.seen.insert(1, Seen { descriptors: 90_000, ..seen() });
        search.walked_to.1 = 0;
        assert_eq!(search.turn(&entries), HashSet::from([1]));
        assert!(search.turn(&entries).contains(&2));
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
        Arc::make_mut(&mut search.facts.get_mut(&pid).unwrap().facts).id.start_time += 1;
        search.refresh(&wanted);
        assert!(search.descriptors(id).iter().all(|d| d.pid != pid));
        search.scan(Depth::InTurn, &wanted).unwrap();
        assert_eq!(search.descriptors(id).iter().filter(|d| d.pid == pid).count(), 1);
        search.learn(&HashSet::from([pid]));
        assert_eq!(search.facts(pid).unwrap().id, process::brief(&Roots::host(), pid).unwrap().id);
    }
}
