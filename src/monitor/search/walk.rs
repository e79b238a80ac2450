//! What does one process have open, or in its memory?
//!
//! Asked by the threads of a crew, of many processes at a time.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::linux::crew::Crew;
use crate::linux::descriptors::{self, NotListed, OpenDescriptor};
use crate::linux::identity::{FileId, FileKind, FileStatus};
use crate::linux::{Roots, mappings, process};

/// What was found of a process.
pub(super) struct Walked {
    /// How many descriptors it has.
    pub(super) count: u64,
    /// Whether it is hidden because it is a thread of the kernel.
    pub(super) is_kernel_thread: bool,
    /// Those that lead to a wanted file, or to a deleted one, which may have been wanted.
    pub(super) listed: Result<Vec<OpenDescriptor>, NotListed>,
}

impl Walked {
    fn of(roots: &Roots, pid: i32, count: u64, listed: Result<Vec<OpenDescriptor>, NotListed>) -> Self {
        let hidden = matches!(listed, Err(NotListed::Hidden));
        let is_kernel_thread = hidden && process::brief(roots, pid).is_some_and(|b| b.is_kernel_thread);
        Self { count, is_kernel_thread, listed }
    }
}

fn is_wanted(file: &FileStatus, wanted: &HashSet<FileId>) -> bool {
    wanted.contains(&file.id) || (file.links == 0 && file.kind == FileKind::Regular)
}

/// Walks the descriptors of one process.
pub(super) fn walk_one(roots: &Roots, pid: i32, wanted: &HashSet<FileId>) -> Walked {
    // Counted first: what is opened during the walk then shows as a change.
    let count = descriptors::count(roots, pid).unwrap_or_default();
    Walked::of(roots, pid, count, descriptors::of_process(roots, pid, &|file| is_wanted(file, wanted)))
}

/// Looks at these descriptors of a process that had `count` of them before.
pub(super) fn look_at(roots: &Roots, pid: i32, count: u64, fds: &[i32], wanted: &HashSet<FileId>) -> Walked {
    let listed = match descriptors::may_be_read(roots, pid) {
        Some(false) => Err(NotListed::Hidden),
        Some(true) => {
            let found = fds.iter().map(|fd| descriptors::of_one(roots, pid, *fd, &|file| is_wanted(file, wanted)));
            found.filter_map(Result::transpose).collect()
        }
        None if count == 0 => Ok(Vec::new()),
        None => return walk_one(roots, pid, wanted),
    };
    Walked::of(roots, pid, count, listed)
}

/// Which of these processes have which of `files` mapped.
pub(super) fn mappers(
    crew: &mut Crew<i32>,
    roots: &Arc<Roots>,
    pids: Vec<i32>,
    files: HashSet<FileId>,
) -> HashMap<FileId, Vec<i32>> {
    let mut found: HashMap<FileId, Vec<i32>> = HashMap::new();
    if files.is_empty() {
        return found;
    }
    let questions = pids.iter().map(|pid| (*pid, ())).collect();
    let (roots, files) = (Arc::clone(roots), Arc::new(files));
    let asked = crew.ask(questions, move |pid, ()| mappings::of_process(&roots, pid, &files));
    for (pid, mapped) in pids.into_iter().zip(asked) {
        mapped.into_iter().flatten().for_each(|file| found.entry(file).or_default().push(pid));
    }
    found
}
