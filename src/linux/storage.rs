//! Which thread is to ask about a file, so that a dead mount holds up nothing but itself?
//!
//! Decided by the path's text and the mount table alone: to ask the file itself on which mount it lies would be a
//! question that may not come back.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::crew::Crew;
use super::lanes::{Answers, Lanes, PATIENCE};
use super::mounts::{Mount, Mounts};
use super::{ReadError, Roots};

/// Where a question goes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Lane {
    /// About files on this mount, by paths without links.
    Mount(u64),
    /// About this path alone.
    Given(PathBuf),
    /// Having inotify watch a path.
    Watch,
}

/// The mounts, and who asks about what lies on them.
pub struct Storage {
    lanes: Lanes<Lane>,
    /// For names that may lead anywhere.
    names: Crew<PathBuf>,
    mounts: Option<Mounts>,
}

impl Storage {
    /// Reads the mounts of this process. Where they cannot be read, everything is one mount.
    #[must_use]
    pub fn new(roots: &Roots) -> Self {
        Self::with_patience(roots, PATIENCE)
    }

    /// The same, with another time after which a lane counts as stuck.
    #[must_use]
    pub fn with_patience(roots: &Roots, patience: Duration) -> Self {
        Self { lanes: Lanes::new(patience), names: Crew::new(patience), mounts: Mounts::read(roots).ok() }
    }

    /// Reads the mounts again if something was mounted or unmounted since.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn refresh(&mut self, roots: &Roots) -> Result<(), ReadError> {
        if let Some(mounts) = &mut self.mounts
            && mounts.refresh().is_ok()
        {
            return Ok(());
        }
        self.mounts = Some(Mounts::read(roots)?);
        Ok(())
    }

    /// The mounts, if they could be read.
    #[must_use]
    pub fn mounts(&self) -> Option<&Mounts> {
        self.mounts.as_ref()
    }

    fn mount_of(&self, path: &Path) -> u64 {
        let absolute = if path.is_relative() { std::env::current_dir().ok().map(|d| d.join(path)) } else { None };
        let path = absolute.as_deref().unwrap_or(path);
        self.mounts.as_ref().and_then(|m| m.above(path)).map_or(0, |(id, _): (u64, &Mount)| id)
    }

    /// The lane for a path without links.
    #[must_use]
    pub fn lane_of(&self, path: &Path) -> Lane {
        Lane::Mount(self.mount_of(path))
    }

    /// Asks about names that may lead anywhere: as the operator gave them, as a header has them, links. `None` for those
    /// that do not answer; they hold up no other.
    pub fn ask_names<Q, A>(
        &mut self,
        questions: Vec<(PathBuf, Q)>,
        ask: impl Fn(PathBuf, Q) -> A + Clone + Send + 'static,
    ) -> Vec<Option<A>>
    where
        Q: Clone + Send + 'static,
        A: Send + 'static,
    {
        self.names.ask(questions, ask)
    }

    /// Puts each question to its lane, and has the answers in the order of the questions: `Err` with the time since when
    /// the lane is stuck where none came. The lanes are asked side by side.
    pub fn answers<Q, A>(
        &mut self,
        questions: impl IntoIterator<Item = (Lane, Q)>,
        ask: impl Fn(Q) -> A + Clone + Send + 'static,
    ) -> Vec<Result<A, Duration>>
    where
        Q: Send + 'static,
        A: Send + 'static,
    {
        // For each lane, the places of its questions among all of them.
        let mut by_lane: BTreeMap<Lane, (Vec<usize>, Vec<Q>)> = BTreeMap::new();
        let mut all = Vec::new();
        for (lane, question) in questions {
            let (places, of_lane) = by_lane.entry(lane).or_default();
            places.push(all.len());
            of_lane.push(question);
            all.push(Err(Duration::ZERO));
        }
        let batches: Vec<_> = by_lane
            .into_iter()
            .map(|(lane, (places, questions))| (places, self.lanes.ask(&lane, questions, ask.clone())))
            .collect();
        for (places, batch) in batches {
            let Answers { answers, stuck_since } = self.lanes.wait(&batch);
            let stuck_for = stuck_since.map_or(Duration::ZERO, |since| since.elapsed());
            let mut answers = answers.into_iter();
            for place in places {
                all[place] = answers.next().ok_or(stuck_for);
            }
        }
        all
    }

    /// Whether nothing comes back in `lane` now.
    pub fn is_stuck(&mut self, lane: &Lane) -> bool {
        self.lanes.stuck_since(lane).is_some()
    }

    /// Whether something that was stuck is no more, since this was last asked.
    pub fn has_recovered(&mut self) -> bool {
        let names = self.names.has_recovered();
        !self.lanes.recovered().is_empty() || names
    }

    /// Ends the threads for mounts that are no more.
    pub fn forget_unmounted(&mut self) {
        let Some(mounts) = &self.mounts else { return };
        self.lanes.retain(|lane| match lane {
            Lane::Mount(id) => *id == 0 || mounts.has(*id),
            Lane::Given(_) | Lane::Watch => true,
        });
    }
}
