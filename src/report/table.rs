//! How does one look read on paper: a row an image, and below it what an admin should know?
//!
//! The same words as on the screen. Without a terminal nothing is cut; `ascii` keeps every byte below 0x80.

use std::borrow::Cow;
use std::io::{self, Write};

use crate::monitor::finding::Severity;
use crate::monitor::snapshot::{ByteView, Image, Snapshot};
use crate::monitor::wording::{byte_mark, format_text, holders_text, role_text_at, size_text};
use crate::text::{counted, cut_end, cut_middle, escape, escape_path, pad_end, pad_start, to_ascii, width};

/// How a table is written.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// Columns to keep within; `None`: as many as it takes.
    pub columns: Option<usize>,
    /// Nothing but ASCII.
    pub ascii: bool,
}

const HEAD: [&str; 5] = ["IMAGE", "FORMAT", "SIZE", "ROLE", "HOLDERS"];
const FORMAT: usize = 7;
const SIZE: usize = 6;
const ROLE: usize = 15;

impl Layout {
    /// `text` in the character set of this layout.
    #[must_use]
    pub fn plain<'a>(&self, text: &'a str) -> Cow<'a, str> {
        if self.ascii { to_ascii(text) } else { Cow::Borrowed(text) }
    }

    /// What stands where something is cut out.
    #[must_use]
    pub const fn cut_mark(&self) -> &'static str {
        if self.ascii { ".." } else { "…" }
    }
}

/// The ten marks of an image, permission bytes first; `between` two bytes of a side.
fn marks(image: &Image, between: &str) -> String {
    let row = |bytes: &[ByteView]| bytes.iter().map(|b| byte_mark(b).to_string()).collect::<Vec<_>>().join(between);
    let (permissions, unshared) = image.bytes.split_at(image.bytes.len().min(5));
    format!("{}   {}", row(permissions), row(unshared))
}

/// Narrower than this, bytes stand close together and paths lose the directory that they share.
const WIDE: usize = 120;
/// What a list of holders should have at least.
const HOLDERS_COLUMNS: usize = 20;

/// Writes the table of a snapshot.
///
/// # Errors
/// When `out` cannot be written.
pub fn write(mut out: impl Write, snapshot: &Snapshot, layout: Layout) -> io::Result<()> {
    let narrow = layout.columns.is_some_and(|c| c < WIDE);
    let shared = snapshot
        .images
        .first()
        .and_then(|i| i.path.parent())
        .filter(|parent| narrow && snapshot.images.iter().all(|i| i.path.parent() == Some(*parent)));
    let name = |image: &Image| {
        let path = shared.and_then(|s| image.path.strip_prefix(s).ok()).unwrap_or(&image.path);
        layout.plain(&escape_path(path)).into_owned()
    };
    let names: Vec<String> = snapshot.images.iter().map(name).collect();
    if names.is_empty() {
        writeln!(out, "no images")?;
    } else {
        if let Some(directory) = shared {
            writeln!(out, "{}:", layout.plain(&escape_path(directory)))?;
        }
        let (head, sides, between) = if narrow {
            ("CWURG   CWURG", "PERM    UNSHARE", "")
        } else {
            ("C W U R G   C W U R G", "PERMISSION  UNSHARE", " ")
        };
        let longest = names.iter().map(|n| width(n)).max().unwrap_or_default().max(HEAD[0].len());
        let fixed = 2 + FORMAT + 2 + SIZE + 2 + head.len() + 2 + ROLE + 2;
        let room = layout.columns.map(|c| c.saturating_sub(fixed + HOLDERS_COLUMNS).max(12));
        // One long name does not move every row; on paper it is not cut either.
        let name_columns = room.map_or(longest.min(60), |room| longest.min(room));
        let line = |cells: [&str; 6]| {
            let [name, format, size, marks, role, holders] = cells;
            let name =
                if room.is_some() { cut_middle(name, name_columns, layout.cut_mark()) } else { Cow::Borrowed(name) };
            let name = pad_end(&name, name_columns);
            let (format, size) = (pad_end(format, FORMAT), pad_start(size, SIZE));
            let text = format!("{name}  {format}  {size}  {marks}  {}  {holders}", pad_end(role, ROLE));
            let text = layout.columns.map_or(Cow::Borrowed(text.as_str()), |c| cut_end(&text, c, layout.cut_mark()));
            text.trim_end().to_owned()
        };
        let sides = format!("{}{sides}", " ".repeat(name_columns + 2 + FORMAT + 2 + SIZE + 2));
        writeln!(out, "{sides}")?;
        writeln!(out, "{}", line([HEAD[0], HEAD[1], HEAD[2], head, HEAD[3], HEAD[4]]))?;
        for (image, name) in snapshot.images.iter().zip(&names) {
            let holders = holders_text(image);
            let (holders, marks) = (layout.plain(&holders), marks(image, between));
            let cells = [
                name,
                format_text(image),
                &size_text(image),
                &marks,
                &role_text_at(image, snapshot.taken_at),
                &holders,
            ];
            writeln!(out, "{}", line(cells))?;
        }
    }
    write_notes(&mut out, snapshot, &names, layout)
}

fn write_notes(out: &mut impl Write, snapshot: &Snapshot, names: &[String], layout: Layout) -> io::Result<()> {
    let mut notes = Vec::new();
    for (image, name) in snapshot.images.iter().zip(names) {
        for finding in &image.findings {
            let severity = match finding.severity {
                Severity::Note => "note",
                Severity::Warning => "warning",
                Severity::Danger => "DANGER",
            };
            notes.push(format!("{severity}: {name}: {}", layout.plain(&finding.text)));
        }
    }
    notes.extend(snapshot.findings.iter().map(|f| format!("warning: {}", layout.plain(&f.text))));
    notes.extend(snapshot.troubles.iter().map(|t| format!("warning: {}", layout.plain(&escape(t)))));
    if snapshot.hidden_processes > 0 {
        let processes = counted(snapshot.hidden_processes, "process", "processes");
        notes.push(format!("note: {processes} could not be read: holders may be missing; root sees the most"));
    } else if !snapshot.complete && snapshot.troubles.is_empty() && notes.is_empty() {
        notes.push("note: not every process of this host can be seen from here: holders may be missing".to_owned());
    }
    if !notes.is_empty() {
        writeln!(out)?;
    }
    notes.iter().try_for_each(|note| writeln!(out, "{note}"))
}
