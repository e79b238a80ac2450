//! How do changes come out as they happen, each line whole and at once?
//!
//! The snapshot first, then a line an event, flushed. Whoever reads may rely on order, and on a `gap` line wherever
//! something may have been missed.

use std::io::{self, Write};
use std::sync::Arc;

use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::json;
use super::table::{self, Layout};
use crate::monitor::change::{Change, ChangeKind, changes};
use crate::monitor::sampler::Update;
use crate::monitor::snapshot::Snapshot;
use crate::text::escape_path;

/// Lines for people or for scripts.
#[derive(Clone, Copy, Debug)]
pub enum Format {
    /// Text, in the given character set.
    Text(Layout),
    /// One JSON object a line.
    Ndjson {
        /// Nothing but ASCII.
        ascii: bool,
    },
}

/// Writes what a sampler tells, line by line.
pub struct Stream<W> {
    out: W,
    format: Format,
    last: Option<Arc<Snapshot>>,
}

impl<W: Write> Stream<W> {
    /// A stream that has not begun.
    pub fn new(out: W, format: Format) -> Self {
        Self { out, format, last: None }
    }

    /// Writes everything that an update tells.
    ///
    /// # Errors
    /// When the reader has gone or the output fails.
    pub fn write(&mut self, update: &Update) -> io::Result<()> {
        // Nothing stands before the snapshot, not even a gap.
        if let (None, Some(snapshot)) = (&self.last, &update.snapshot) {
            match self.format {
                Format::Text(layout) => table::write(&mut self.out, snapshot, layout)?,
                Format::Ndjson { ascii } => {
                    json::write_first(&mut self.out, ascii, snapshot)?;
                    // A table ends with what could not be read; the object has no place for it.
                    for trouble in &snapshot.troubles {
                        let text = crate::text::escape(trouble).into_owned();
                        self.line(&Change::about(ChangeKind::Gap, snapshot.taken_at, None, text))?;
                    }
                }
            }
        }
        let at = update.snapshot.as_ref().map_or_else(Timestamp::now, |s| s.taken_at);
        for gap in &update.gaps {
            self.line(&Change::about(ChangeKind::Gap, at, gap.image.as_deref(), gap.text.clone()))?;
        }
        if let Some(snapshot) = &update.snapshot
            && let Some(last) = self.last.replace(Arc::clone(snapshot))
        {
            changes(&last, snapshot).iter().try_for_each(|change| self.line(change))?;
        }
        self.out.flush()
    }

    fn line(&mut self, change: &Change) -> io::Result<()> {
        match self.format {
            Format::Ndjson { ascii } => json::write_change(&mut self.out, ascii, change)?,
            Format::Text(layout) => {
                let time = change.at.to_zoned(TimeZone::system()).strftime("%F %T").to_string();
                let text = match (&change.image, change.kind) {
                    (Some(image), ChangeKind::Gap) => format!("{time}  {}  GAP: {}", escape_path(image), change.text),
                    (None, ChangeKind::Gap) => format!("{time}  GAP: {}", change.text),
                    (Some(image), ChangeKind::FindingCleared) => {
                        format!("{time}  {}  no longer: {}", escape_path(image), change.text)
                    }
                    (Some(image), _) => format!("{time}  {}  {}", escape_path(image), change.text),
                    (None, _) => format!("{time}  {}", change.text),
                };
                writeln!(self.out, "{}", layout.plain(&text))?;
            }
        }
        self.out.flush()
    }
}
