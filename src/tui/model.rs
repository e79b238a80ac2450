//! What does the screen know?
//!
//! Everything that is drawn follows from this value and nothing else. Pure: no clock, no I/O.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::linux::identity::FileId;
use crate::monitor::snapshot::{Image, Snapshot};

/// What stays the same for an image while rows move.
pub type Key = (PathBuf, FileId);

/// The state of the dashboard.
#[derive(Clone, Debug)]
pub struct Model {
    /// Columns and rows of the terminal.
    pub size: (u16, u16),
    /// What is watched, as the title says it.
    pub title: String,
    /// Time between two looks.
    pub interval: Duration,
    /// The newest snapshot; none until the first look is done.
    pub snapshot: Option<Arc<Snapshot>>,
    /// The image under the cursor.
    pub selected: Option<Key>,
    /// The row where the table begins on the screen.
    pub top: usize,
    /// The list of keys is shown.
    pub help: bool,
    /// The last thing that may have been missed.
    pub gap: Option<String>,
}

impl Model {
    /// A screen on which nothing has been seen yet.
    #[must_use]
    pub fn new(title: String, interval: Duration, size: (u16, u16)) -> Self {
        Self { size, title, interval, snapshot: None, selected: None, top: 0, help: false, gap: None }
    }

    /// The images in the order of the rows.
    #[must_use]
    pub fn images(&self) -> &[Image] {
        self.snapshot.as_ref().map_or(&[], |s| &s.images)
    }

    /// The row of the selected image.
    #[must_use]
    pub fn selected_row(&self) -> Option<usize> {
        let (path, file) = self.selected.as_ref()?;
        self.images().iter().position(|i| i.path == *path && i.file == *file)
    }

    /// The selected image.
    #[must_use]
    pub fn selected_image(&self) -> Option<&Image> {
        self.images().get(self.selected_row()?)
    }
}
