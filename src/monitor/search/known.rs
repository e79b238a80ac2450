//! What is known already of who has what open, and is it still so?
//!
//! Where something hints at a change everything known of a file is read again, elsewhere some of it in turn. A process is
//! known again by its start time; one that was forked a short while ago is asked each time for its name, which exec(2)
//! changes.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Search, matters};
use crate::linux::descriptors::{self, OpenDescriptor};
use crate::linux::identity::FileId;
use crate::linux::process::{self, Brief, ProcessFacts};
use crate::monitor::agenda::share_in_turn;
use crate::monitor::sample::DeletedImage;

/// The descriptors that lead to a file, all read at one time.
pub(super) struct Known {
    pub(super) descriptors: Vec<OpenDescriptor>,
    read_at: Instant,
}

impl Default for Known {
    fn default() -> Self {
        Self { descriptors: Vec::new(), read_at: Instant::now() }
    }
}

pub(super) struct KnownProcess {
    pub(super) facts: Arc<ProcessFacts>,
    learnt_at: Instant,
    /// When its name and start time were last read.
    confirmed_at: Instant,
}

/// Where nothing hints at a change, known descriptors are all read again within this time, some of them at each look, and
/// so are the names of their processes.
const ROUND: Duration = Duration::from_secs(10);
/// So many are read again at each look in any case: on most hosts that is all of them.
const LEAST_TURN: usize = 50;
/// A process that was forked a short while ago may be about to become another program.
const YOUNG: Duration = Duration::from_secs(3);

impl KnownProcess {
    fn is_certain(&self) -> bool {
        self.learnt_at.elapsed() > YOUNG && self.confirmed_at.elapsed() < ROUND
    }
}

impl Search {
    /// Reads what is not known yet of these processes.
    pub(in crate::monitor) fn learn(&mut self, pids: &HashSet<i32>) {
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
            let now = Instant::now();
            let known = |f| KnownProcess { facts: Arc::new(f), learnt_at: now, confirmed_at: now };
            self.facts.extend(facts.map(|f| (pid, known(f))));
        }
    }

    /// What is known of a process.
    pub(in crate::monitor) fn facts(&self, pid: i32) -> Option<&Arc<ProcessFacts>> {
        self.facts.get(&pid).map(|known| &known.facts)
    }

    /// Looks again at descriptors: `None` for one that is closed, or leads elsewhere now. What does not answer is as it
    /// was.
    pub(in crate::monitor) fn again(&mut self, known: Vec<&OpenDescriptor>) -> Vec<Option<OpenDescriptor>> {
        let roots = Arc::clone(&self.roots);
        let questions = known.iter().map(|d| (d.pid, (d.fd, d.file))).collect();
        let now = self.crew.ask(questions, move |pid, (fd, file)| descriptors::again(&roots, pid, fd, file));
        let as_it_was = |now: Option<Result<_, _>>, before: &OpenDescriptor| match now {
            Some(Ok(now)) => now,
            Some(Err(_)) | None => Some(before.clone()),
        };
        now.into_iter().zip(known).map(|(now, before)| as_it_was(now, before)).collect()
    }

    /// Reads the known descriptors of `changed` again, and of other files those that were not read for the longest time.
    pub(in crate::monitor) fn refresh_in_turn(&mut self, changed: &HashSet<FileId>) {
        let mut by_age: Vec<(Instant, FileId, usize)> =
            self.known.iter().map(|(file, known)| (known.read_at, *file, known.descriptors.len())).collect();
        by_age.sort_unstable();
        let all: usize = by_age.iter().map(|(_, _, n)| n).sum();
        let turn = share_in_turn(all, self.turned_at.elapsed(), ROUND, LEAST_TURN);
        self.turned_at = Instant::now();
        let mut count = 0;
        let due = by_age.into_iter().take_while(|(_, _, n)| {
            let room = count < turn;
            count += n;
            room
        });
        let files = due.map(|(_, file, _)| file).chain(changed.iter().copied()).collect();
        self.read_again(&files, |known| !known.is_certain());
    }

    /// Reads the known descriptors of `files` again: what they hold now, and whether they are open still.
    pub(in crate::monitor) fn refresh(&mut self, files: &HashSet<FileId>) {
        self.read_again(files, |_| true);
    }

    fn read_again(&mut self, files: &HashSet<FileId>, is_doubtful: impl Fn(&KnownProcess) -> bool) {
        let known = files.iter().filter_map(|f| self.known.get(f)).flat_map(|k| &k.descriptors);
        let mut pids: Vec<i32> = known.map(|d| d.pid).collect();
        pids.retain(|pid| self.facts.get(pid).is_none_or(&is_doubtful));
        self.confirm(pids);
        let deleted = std::mem::take(&mut self.deleted);
        let now = self.again(deleted.iter().map(|d| &d.descriptor).collect());
        let still = deleted.into_iter().zip(now);
        self.deleted =
            still.filter_map(|(d, now)| Some(DeletedImage { descriptor: now.filter(matters)?, ..d })).collect();
        let known: Vec<OpenDescriptor> =
            files.iter().filter_map(|f| self.known.remove(f)).flat_map(|k| k.descriptors).collect();
        for (now, before) in self.again(known.iter().collect()).into_iter().zip(&known) {
            if now.as_ref() != Some(before) {
                self.altered.insert(before.file);
            }
            let Some(now) = now else { continue };
            self.known.entry(now.file).or_default().descriptors.push(now);
        }
    }

    /// Has another look who these processes are.
    pub(in crate::monitor) fn confirm(&mut self, mut pids: Vec<i32>) {
        pids.sort_unstable();
        pids.dedup();
        let roots = Arc::clone(&self.roots);
        let questions: Vec<(i32, ())> = pids.iter().map(|pid| (*pid, ())).collect();
        let briefs: Vec<Option<Option<Brief>>> = self.crew.ask(questions, move |pid, ()| process::brief(&roots, pid));
        for (pid, now) in pids.into_iter().zip(briefs) {
            let Some(now) = now else { continue };
            let Some(now) = now else {
                self.forget(pid);
                continue;
            };
            let Some(known) = self.facts.get_mut(&pid) else { continue };
            if now.id != known.facts.id {
                // Another process has the pid: what it had is closed, and what it has is not known.
                self.forget(pid);
            } else if now.command != known.facts.command {
                // The same process in another program: exec keeps pid, start time and descriptors.
                self.facts.remove(&pid);
            } else {
                known.confirmed_at = Instant::now();
            }
        }
    }

    /// Forgets files that are no longer watched; one that was deleted while somebody uses it is remembered as such.
    pub(in crate::monitor) fn keep_only(&mut self, files: &HashSet<FileId>) {
        let gone: Vec<OpenDescriptor> =
            self.known.extract_if(|file, _| !files.contains(file)).flat_map(|(_, known)| known.descriptors).collect();
        let still = self.again(gone.iter().collect()).into_iter().flatten().filter(matters).collect();
        self.add_deleted(still);
    }
}
