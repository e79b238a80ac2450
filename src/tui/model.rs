//! What does the screen know?
//!
//! Everything that is drawn follows from this value and nothing else. Pure: no clock, no I/O; the time is told by messages.

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::clip::Clip;
use super::filter::Filter;
use super::sort::{Order, Sort};
use super::test_lock::{OwnLock, TestLock};
use crate::linux::descriptors::OpenMode;
use crate::linux::identity::{FileId, ProcessId};
use crate::linux::process::ProcessFacts;
use crate::monitor::change::Change;
use crate::monitor::finding::Finding;
use crate::monitor::snapshot::{Image, Snapshot};
use crate::protocol::Access;

/// What stays the same for an image while rows move.
pub type Key = (Arc<Path>, FileId);

/// Which table fills the screen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// An image a row.
    Images,
    /// A process a row, with the images it uses.
    Processes,
}

/// What is shown below the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Panel {
    /// The ten bytes.
    Bytes,
    /// The processes.
    Holders,
    /// Each program: granted or refused.
    WhatIf,
    /// The files below and above.
    Chain,
    /// What happened.
    Events,
}

impl Panel {
    /// In the order of their numbers.
    pub const ALL: [Self; 5] = [Self::Bytes, Self::Holders, Self::WhatIf, Self::Chain, Self::Events];

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bytes => "Bytes",
            Self::Holders => "Holders",
            Self::WhatIf => "What if",
            Self::Chain => "Chain",
            Self::Events => "Events",
        }
    }
}

/// What lies over the tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Overlay {
    /// The list of keys; the line where it begins.
    Help(usize),
    /// Every finding; the row under the cursor.
    Findings(usize),
    /// The dialog for a test lock.
    TestLock(TestLock),
    /// What can be copied, as it was when the list was opened: it must not change under a finger that is about to press.
    Copy {
        /// The things.
        clips: Vec<Clip>,
        /// The row under the cursor.
        row: usize,
    },
}

/// A snapshot that stays on the screen while others come.
#[derive(Clone, Debug)]
pub struct Frozen {
    /// When it was frozen.
    pub since: Timestamp,
    /// The newest snapshot, to go on with.
    pub live: Option<Arc<Snapshot>>,
    /// What has happened since.
    pub missed: usize,
    /// So many of the events are shown.
    pub events: usize,
}

/// A process and what it uses.
#[derive(Clone, Debug)]
pub struct ProcessRow<'a> {
    /// Who.
    pub process: &'a ProcessFacts,
    /// Each image, with the bytes held on it; an opener's mode where none is.
    pub uses: Vec<(&'a Image, Access, Option<OpenMode>)>,
}

/// The state of the dashboard.
#[derive(Clone, Debug)]
pub struct Model {
    /// Columns and rows of the terminal.
    pub size: (u16, u16),
    /// What is watched, as the title says it.
    pub title: String,
    /// Time between two looks.
    pub interval: Duration,
    /// The time, as of the last message that told it.
    pub now: Timestamp,
    /// What could not be listed or read, as findings.
    pub troubles: Vec<Finding>,
    /// In which times of day are shown.
    pub zone: TimeZone,
    /// When it was last looked; what is shown is as old as that.
    pub looked_at: Option<Timestamp>,
    /// The snapshot that is shown; none until the first look is done.
    pub snapshot: Option<Arc<Snapshot>>,
    /// Set while the screen is frozen.
    pub frozen: Option<Frozen>,
    /// Which images are shown, in which order: places in the snapshot.
    pub rows: Vec<usize>,
    /// By what the rows are sorted.
    pub sort: Sort,
    /// Which rows are shown.
    pub filter: Filter,
    /// The filter is being typed.
    pub typing: bool,
    /// The image that was selected when that began: it is selected again whenever it is shown.
    pub anchor: Option<Key>,
    /// Which table.
    pub table: Table,
    /// The image under the cursor.
    pub selected: Option<Key>,
    /// The process under the cursor in the other table.
    pub selected_process: Option<ProcessId>,
    /// The row in which it was.
    pub process_row: usize,
    /// The row where the table begins on the screen.
    pub top: usize,
    /// Which panel.
    pub panel: Panel,
    /// The panel fills the screen.
    pub zoomed: bool,
    /// The line where the panel begins.
    pub scroll: usize,
    /// What lies over it all.
    pub overlay: Option<Overlay>,
    /// What happened, oldest first.
    pub events: VecDeque<Change>,
    /// The mouse is listened to.
    pub mouse: bool,
    /// The test locks that this program holds, oldest first.
    pub own_locks: Vec<OwnLock>,
    /// No lock is ever taken.
    pub read_only: bool,
    /// An answer to the last key.
    pub note: Option<String>,
}

/// So many events are remembered.
pub const EVENTS_KEPT: usize = 1000;

impl Model {
    /// A screen on which nothing has been seen yet.
    #[must_use]
    pub fn new(title: String, interval: Duration, size: (u16, u16), now: Timestamp, zone: TimeZone) -> Self {
        Self {
            size,
            title,
            interval,
            now,
            zone,
            looked_at: None,
            snapshot: None,
            frozen: None,
            rows: Vec::new(),
            sort: Sort::default(),
            filter: Filter::default(),
            typing: false,
            anchor: None,
            table: Table::Images,
            selected: None,
            selected_process: None,
            process_row: 0,
            top: 0,
            panel: Panel::Bytes,
            zoomed: false,
            scroll: 0,
            overlay: None,
            events: VecDeque::new(),
            mouse: false,
            own_locks: Vec::new(),
            troubles: Vec::new(),
            read_only: false,
            note: None,
        }
    }

    /// The time that the screen tells of: it stands still while the screen is frozen.
    #[must_use]
    pub fn shown_at(&self) -> Timestamp {
        self.frozen.as_ref().map_or(self.now, |f| f.since)
    }

    /// Every image of the snapshot that is shown.
    #[must_use]
    pub fn images(&self) -> &[Image] {
        self.snapshot.as_ref().map_or(&[], |s| &s.images)
    }

    /// The image in a row of the table.
    #[must_use]
    pub fn image_at(&self, row: usize) -> Option<&Image> {
        self.images().get(*self.rows.get(row)?)
    }

    /// The image of that name and file, whether it is shown or not.
    #[must_use]
    pub fn image_of(&self, key: &Key) -> Option<&Image> {
        self.images().iter().find(|i| i.path == key.0 && i.file == key.1)
    }

    /// The row of the selected image.
    #[must_use]
    pub fn selected_row(&self) -> Option<usize> {
        let (path, file) = self.selected.as_ref()?;
        let images = self.images();
        self.rows.iter().position(|i| images.get(*i).is_some_and(|i| i.path == *path && i.file == *file))
    }

    /// The selected image.
    #[must_use]
    pub fn selected_image(&self) -> Option<&Image> {
        self.image_at(self.selected_row()?)
    }

    /// Filters and sorts the images of the snapshot anew.
    pub(super) fn arrange(&mut self) {
        let Some(snapshot) = self.snapshot.clone() else { return };
        let mut rows: Vec<usize> =
            (0..snapshot.images.len()).filter(|i| self.filter.matches(&snapshot.images[*i])).collect();
        self.sort.arrange(&mut rows, &snapshot.images);
        self.rows = rows;
    }

    /// The processes that use the images shown, by pid.
    #[must_use]
    pub fn processes(&self) -> Vec<ProcessRow<'_>> {
        let mut all: BTreeMap<ProcessId, ProcessRow> = BTreeMap::new();
        for image in self.rows.iter().filter_map(|i| self.images().get(*i)) {
            let holders = image.holders.iter().map(|h| (&h.process, h.access, None));
            let openers = image.openers.iter().map(|o| (&o.process, Access::NONE, Some(o.mode)));
            for (process, access, mode) in holders.chain(openers) {
                let row = all.entry(process.id).or_insert_with(|| ProcessRow { process, uses: Vec::new() });
                match row.uses.last_mut().filter(|(last, ..)| last.path == image.path) {
                    Some((_, known, known_mode)) => {
                        *known = known.union(access);
                        *known_mode = known_mode.or(mode);
                    }
                    None => row.uses.push((image, access, mode)),
                }
            }
        }
        all.into_values().filter(|row| self.filter.matches_process(row.process)).collect()
    }

    /// How many rows the table has.
    #[must_use]
    pub fn row_count(&self) -> usize {
        match self.table {
            Table::Images => self.rows.len(),
            Table::Processes => self.processes().len(),
        }
    }

    /// The row under the cursor.
    #[must_use]
    pub fn cursor(&self) -> Option<usize> {
        match self.table {
            Table::Images => self.selected_row(),
            Table::Processes => self.processes().iter().position(|p| Some(p.process.id) == self.selected_process),
        }
    }

    /// Every finding with the image it is about, worst first; of equals, what could not be looked at comes first.
    #[must_use]
    pub fn findings(&self) -> Vec<(Option<&Image>, &Finding)> {
        let Some(snapshot) = &self.snapshot else { return Vec::new() };
        let of_images = snapshot.images.iter().flat_map(|i| i.findings.iter().map(move |f| (Some(i), f)));
        let of_host = self.troubles.iter().chain(&snapshot.findings).map(|f| (None, f));
        let mut all: Vec<_> = of_host.chain(of_images).collect();
        all.sort_by_key(|(_, f)| std::cmp::Reverse(f.severity));
        all
    }

    /// Seconds since the last look, when that is longer ago than it should be.
    #[must_use]
    pub fn staleness(&self) -> Option<i64> {
        let age = self.now.duration_since(self.looked_at?).as_secs();
        let allowed = i64::try_from(self.interval.as_secs()).unwrap_or(i64::MAX).saturating_mul(2).saturating_add(3);
        (age > allowed).then_some(age)
    }

    /// Whether something on the screen tells of time, and so changes with it.
    #[must_use]
    pub fn tells_time(&self) -> bool {
        self.frozen.is_some() || !self.own_locks.is_empty() || self.images().iter().any(|i| i.stalled_since.is_some())
    }

    /// The direction of the sort, for a heading.
    #[must_use]
    pub fn order_of(&self, column: super::sort::Column) -> Option<Order> {
        (self.sort.column == column).then_some(self.sort.order)
    }
}
