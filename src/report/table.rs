//! How does one look read on paper: a row an image, and below it what an admin should know?
//!
//! The same words as on the screen. Without a terminal nothing is cut; `ascii` keeps every byte below 0x80.

use std::borrow::Cow;
use std::io::{self, Write};

use crate::monitor::finding::Severity;
use crate::monitor::snapshot::{Image, Snapshot};
use crate::monitor::wording::{byte_mark, format_text, holders_text, role_text, size_text};
use crate::text::{counted, cut_end, cut_middle, escape, escape_path, pad_end, pad_start, to_ascii, width};

/// How a table is written.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// Columns to keep within; `None`: as many as it takes.
    pub columns: Option<usize>,
    /// Nothing but ASCII.
    pub ascii: bool,
}

const HEAD: [&str; 4] = ["IMAGE", "FORMAT", "SIZE", "ROLE"];
const MARKS_HEAD: &str = "C W U R G   C W U R G";
const ROLE_COLUMNS: usize = 16;

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

/// The ten marks of an image, permission bytes first.
#[must_use]
pub fn marks(image: &Image) -> String {
    let row = |bytes: &[crate::monitor::snapshot::ByteView]| {
        bytes.iter().map(|b| byte_mark(b).to_string()).collect::<Vec<_>>().join(" ")
    };
    let (permissions, unshared) = image.bytes.split_at(image.bytes.len().min(5));
    format!("{}   {}", row(permissions), row(unshared))
}

/// Writes the table of a snapshot.
///
/// # Errors
/// When `out` cannot be written.
pub fn write(mut out: impl Write, snapshot: &Snapshot, layout: Layout) -> io::Result<()> {
    let names: Vec<String> = snapshot.images.iter().map(|i| layout.plain(&escape_path(&i.path)).into_owned()).collect();
    if names.is_empty() {
        writeln!(out, "no images")?;
    } else {
        let longest = names.iter().map(|n| width(n)).max().unwrap_or_default().max(HEAD[0].len());
        // What stands right of the name, without the holders, takes 60 columns.
        let name_columns = layout.columns.map_or(longest, |c| longest.min(c.saturating_sub(60).max(20)));
        let line = |cells: [&str; 6]| {
            let [name, format, size, marks, role, holders] = cells;
            let name = pad_end(&cut_middle(name, name_columns, layout.cut_mark()), name_columns);
            let text = format!(
                "{name}  {}  {}  {marks}  {}  {holders}",
                pad_end(format, 9),
                pad_start(size, 6),
                pad_end(role, ROLE_COLUMNS)
            );
            let text = match layout.columns {
                Some(columns) => cut_end(&text, columns, layout.cut_mark()).into_owned(),
                None => text,
            };
            text.trim_end().to_owned()
        };
        let sides = format!("{}PERMISSION  UNSHARE", " ".repeat(name_columns + 2 + 9 + 2 + 6 + 2));
        writeln!(out, "{}", sides.trim_end())?;
        writeln!(out, "{}", line([HEAD[0], HEAD[1], HEAD[2], MARKS_HEAD, HEAD[3], "HOLDERS"]))?;
        for (image, name) in snapshot.images.iter().zip(&names) {
            let holders = holders_text(image);
            let holders = layout.plain(&holders);
            writeln!(
                out,
                "{}",
                line([name, format_text(image), &size_text(image), &marks(image), role_text(image), &holders])
            )?;
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
        notes.push(format!("note: {processes} could not be read: holders may be missing; run as root to see them"));
    } else if !snapshot.complete && snapshot.troubles.is_empty() && notes.is_empty() {
        notes.push("note: not every process of this host can be seen from here: holders may be missing".to_owned());
    }
    if !notes.is_empty() {
        writeln!(out)?;
    }
    notes.iter().try_for_each(|note| writeln!(out, "{note}"))
}
