//! What if a walk through all processes takes longer than others can wait?
//!
//! Then it goes on on threads of its own while others look. What it finds is as old as the walk: only what was not known
//! is taken from it, and read once more before it is believed.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::time::{Duration, Instant};

use super::{Search, Walked, mappers, matters, walk_one};
use crate::linux::ReadError;
use crate::linux::crew::Crew;
use crate::linux::descriptors::{self, NotListed, OpenDescriptor, ProcessEntry};
use crate::linux::identity::FileId;
use crate::linux::lanes::PATIENCE;

/// Called when a walk is over.
pub(in crate::monitor) type Wake = Arc<dyn Fn() + Send + Sync>;

/// The walk that goes on aside, if any.
#[derive(Default)]
pub(super) struct Aside {
    /// Those who walk. A process that does not answer keeps one of them waiting, so they are not made anew each time.
    crew: Option<Crew<i32>>,
    going_on: Option<Receiver<Found>>,
}

struct Found {
    crew: Crew<i32>,
    entries: Vec<ProcessEntry>,
    walked: Vec<Option<Walked>>,
    over: WalkOver,
}

/// A walk that has come to its end.
pub(in crate::monitor) struct WalkOver {
    pub(in crate::monitor) took: Duration,
    /// Who has which of the files mapped that this was asked about.
    pub(in crate::monitor) mapped: HashMap<FileId, Vec<i32>>,
    /// There were no descriptors left to read everybody with.
    pub(in crate::monitor) exhausted: Option<ReadError>,
}

/// Rings when it goes, also when what goes is a thread that panics.
struct Bell(Wake);

impl Drop for Bell {
    fn drop(&mut self) {
        (self.0)();
    }
}

impl Search {
    /// How long a walk through all processes is likely to take, going by what they had open last.
    pub(in crate::monitor) fn estimate(&self) -> Duration {
        // Of one core; a process costs as much as ten of its descriptors.
        const OF_ONE: Duration = Duration::from_micros(3);
        let of_process = |descriptors: u64| 10 + u32::try_from(descriptors.min(100_000)).unwrap_or_default();
        let all: u32 = self.seen.values().map(|s| if s.hidden { 10 } else { of_process(s.descriptors) }).sum();
        OF_ONE * all / self.crew.threads()
    }

    /// Whether a walk goes on aside.
    pub(in crate::monitor) fn is_walking(&self) -> bool {
        self.aside.going_on.is_some()
    }

    /// Starts a walk through all processes, for any of `wanted` and for whoever has one of `mapped` in memory. `wake` is
    /// called when it is over. Returns whether there was a thread to be had for it.
    pub(in crate::monitor) fn start_walk(
        &mut self,
        wanted: &Arc<HashSet<FileId>>,
        mapped: HashSet<FileId>,
        wake: Wake,
    ) -> bool {
        let Ok(entries) = self.processes() else { return false };
        let (roots, wanted) = (Arc::clone(&self.roots), Arc::clone(wanted));
        let mut crew = self.aside.crew.take().unwrap_or_else(|| Crew::new(PATIENCE));
        let (found, going_on) = mpsc::channel();
        let walk = move || {
            // Rung after the other end has been told or dropped: whoever is woken must see that it is over.
            let (_bell, found) = (Bell(wake), found);
            let started = Instant::now();
            let theirs = Arc::clone(&roots);
            let questions = entries.iter().map(|e| (e.pid, ())).collect();
            let walked = crew.ask(questions, move |pid, ()| walk_one(&theirs, pid, &wanted));
            let mapped = mappers(&mut crew, &roots, entries.iter().map(|e| e.pid).collect(), mapped);
            let over = WalkOver { took: started.elapsed(), mapped, exhausted: None };
            // Nobody waits for it any more when the program is ending.
            let _ = found.send(Found { crew, entries, walked, over });
        };
        let started = std::thread::Builder::new().name("walker".to_owned()).spawn(walk).is_ok();
        self.aside.going_on = Some(going_on).filter(|_| started);
        started
    }

    /// Takes over what the walk aside has found; `None` while none has come to its end. One that broke off has found
    /// nothing: then no walk goes on any more.
    pub(in crate::monitor) fn take_walk(&mut self, wanted: &HashSet<FileId>) -> Option<WalkOver> {
        let found = match self.aside.going_on.as_ref()?.try_recv() {
            Ok(found) => found,
            Err(TryRecvError::Empty) => return None,
            Err(TryRecvError::Disconnected) => {
                self.aside.going_on = None;
                return None;
            }
        };
        self.aside = Aside { crew: Some(found.crew), going_on: None };
        let mut over = found.over;
        let mut exhausted = false;
        let mut new: Vec<OpenDescriptor> = Vec::new();
        for (entry, walked) in found.entries.iter().zip(found.walked) {
            let Some(seen) = self.seen.get_mut(&entry.pid).filter(|s| s.entry_inode == entry.entry_inode) else {
                // It has gone, or is new and was walked as such.
                continue;
            };
            match walked {
                Some(Walked { listed: Ok(descriptors), .. }) => {
                    if seen.hidden {
                        // It can be read again. How many it has now is not known: it counts as changed.
                        (seen.hidden, seen.descriptors) = (false, u64::MAX);
                    }
                    let worth = |d: &OpenDescriptor| wanted.contains(&d.file) || matters(d);
                    new.extend(descriptors.into_iter().filter(worth));
                }
                Some(Walked { listed: Err(NotListed::Gone), .. }) => {}
                Some(Walked { is_kernel_thread, listed: Err(NotListed::Hidden), .. }) => {
                    seen.hidden = !is_kernel_thread;
                }
                // What it has is not known, and it is walked again.
                None | Some(Walked { listed: Err(NotListed::Exhausted), .. }) => {
                    (seen.hidden, seen.descriptors) = (true, u64::MAX);
                    exhausted |= walked.is_some();
                }
            }
        }
        over.exhausted = exhausted.then(|| self.exhausted());
        new.retain(|d| !self.knows(d));
        let roots = Arc::clone(&self.roots);
        let questions = new.iter().map(|d| (d.pid, (d.fd, d.file))).collect();
        let now = self.crew.ask(questions, move |pid, (fd, file)| descriptors::again(&roots, pid, fd, file));
        // What does not answer now is not believed.
        self.add(now.into_iter().filter_map(|d| d?.ok()?).collect(), wanted);
        Some(over)
    }

    fn knows(&self, new: &OpenDescriptor) -> bool {
        let same = |known: &OpenDescriptor| (known.pid, known.fd, known.file) == (new.pid, new.fd, new.file);
        self.descriptors(new.file).iter().any(same) || self.deleted.iter().any(|d| same(&d.descriptor))
    }
}

#[cfg(test)]
mod tests {
    use super::super::Depth;
    use super::*;
    use crate::linux::Roots;
    use crate::linux::identity::status;
    use std::fs::File;

    #[test]
    fn a_walk_aside_finds_what_changed_without_a_word_and_takes_nothing_away() {
        let images = tempfile::tempdir().unwrap();
        let path = |name: &str| images.path().join(name);
        let ids: Vec<FileId> = ["known", "new"]
            .map(|name| {
                File::create(path(name)).unwrap();
                status(&path(name)).unwrap().id
            })
            .to_vec();
        let wanted = Arc::new(ids.iter().copied().collect::<HashSet<_>>());
        let known = File::open(path("known")).unwrap();
        let mut search = Search::new(Roots::host());
        search.scan(Depth::All, &wanted).unwrap();
        // As many descriptors as before: only a walk can tell. Another test may open something meanwhile, which is as well.
        let new = File::open(path("new")).unwrap();
        drop(known);
        assert!(search.estimate() > Duration::ZERO && search.take_walk(&wanted).is_none());
        assert!(walk(&mut search, &wanted).unwrap().took > Duration::ZERO);
        let pid = i32::try_from(std::process::id()).unwrap();
        let of = |search: &Search, id: FileId| search.descriptors(id).iter().filter(|d| d.pid == pid).count();
        assert_eq!(
            (of(&search, ids[0]), of(&search, ids[1])),
            (1, 1),
            "what is closed is found out when it is read again"
        );
        assert!(search.take_altered().contains(&ids[1]));
        search.refresh(&wanted);
        assert_eq!((of(&search, ids[0]), of(&search, ids[1])), (0, 1));
        drop(new);
    }

    /// Walks aside until that is over.
    fn walk(search: &mut Search, wanted: &Arc<HashSet<FileId>>) -> Option<WalkOver> {
        let (wake, woken) = mpsc::channel();
        assert!(search.start_walk(wanted, HashSet::new(), Arc::new(move || wake.send(()).unwrap_or_default())));
        woken.recv_timeout(Duration::from_secs(60)).unwrap();
        let over = search.take_walk(wanted);
        assert!(!search.is_walking());
        over
    }

    #[test]
    fn who_can_be_read_is_told_anew_by_each_walk() {
        let wanted = Arc::new(HashSet::new());
        let mut search = Search::new(Roots::host());
        search.scan(Depth::All, &wanted).unwrap();
        let pid = i32::try_from(std::process::id()).unwrap();
        let before = search.hidden();
        let ours = search.seen.get_mut(&pid).unwrap();
        (ours.hidden, ours.descriptors) = (true, u64::MAX);
        assert!(walk(&mut search, &wanted).is_some());
        assert_eq!((search.seen[&pid].hidden, search.seen[&pid].descriptors), (false, u64::MAX));
        // A pid that another process has by now is not meant.
        search.seen.get_mut(&pid).unwrap().hidden = true;
        search.seen.get_mut(&pid).unwrap().entry_inode += 1;
        assert!(walk(&mut search, &wanted).is_some());
        assert!(search.seen[&pid].hidden && search.hidden() > before.saturating_sub(1));
    }

    #[test]
    fn a_walk_that_breaks_off_is_over_and_has_found_nothing() {
        let mut search = Search::new(Roots::host());
        let (found, going_on) = mpsc::channel();
        search.aside.going_on = Some(going_on);
        assert!(search.take_walk(&HashSet::new()).is_none() && search.is_walking(), "it goes on");
        drop(found);
        assert!(search.take_walk(&HashSet::new()).is_none() && !search.is_walking());
    }
}
