//! How is it explained why a program is refused: to people in sentences, to scripts as `qlock-top/why/1`?
//!
//! What would lose data is said first and loudly. A refusal is told in QEMU's own words, with the byte, the file that it
//! is on, everybody who holds it, and the least dangerous way out.

use std::io::{self, Write};
use std::path::Path;

use jiff::Timestamp;
use serde::Serialize;

use super::json::{HolderOut, exact, holder_out, write_line};
use super::table::Layout;
use crate::monitor::finding::Severity;
use crate::monitor::snapshot::{Holder, Image, Snapshot};
use crate::monitor::way_out::ways_out;
use crate::monitor::what_if::{Harm, Outcome, WhatIf};
use crate::monitor::wording::{access_text, process_name, range_text};
use crate::protocol::LockByte;
use crate::text::{escape, escape_path, pad_end, span};

/// The contract of `why --format json`.
pub const WHY_SCHEMA: &str = "qlock-top/why/1";

#[derive(Serialize)]
struct WhyOut<'a> {
    schema: &'static str,
    image: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    image_bytes: Option<String>,
    operation: Option<&'a str>,
    verdict: &'static str,
    byte: Option<u64>,
    on_image: String,
    message: Option<String>,
    destroys_image: bool,
    holders: Vec<HolderOut<'a>>,
    advice: String,
}

/// Writes the answer for one program as one object on one line.
///
/// # Errors
/// When `out` cannot be written.
pub fn write_json(out: impl Write, ascii: bool, snapshot: &Snapshot, image: &Image, answer: &WhatIf) -> io::Result<()> {
    let refused = match &answer.outcome {
        Outcome::Refused(refused) => Some(refused),
        Outcome::Granted | Outcome::Unknown(_) => None,
    };
    let holders = match refused {
        Some(refused) => refused.holders.iter().map(holder_out).collect(),
        // Granted, and the danger is for those who use it.
        None if answer.harm != Harm::None => image.holders.iter().map(holder_out).collect(),
        None => Vec::new(),
    };
    let mut advice: Vec<String> = match &answer.outcome {
        Outcome::Unknown(why) => vec![format!("cannot tell: {why}")],
        _ => Vec::new(),
    };
    advice.extend(ways_out(snapshot, image, answer));
    let line = WhyOut {
        schema: WHY_SCHEMA,
        image: image.path.to_string_lossy().into_owned(),
        image_bytes: exact(&image.path),
        operation: Some(answer.operation.name),
        verdict: verdict_name(&answer.outcome),
        byte: refused.map(|r| r.byte.offset()),
        on_image: refused.map_or(&*image.path, |r| &r.on_image).to_string_lossy().into_owned(),
        message: refused.map(|r| r.sentence.to_string()),
        destroys_image: refused.is_some_and(|r| r.destroys_image) || answer.harm == Harm::Overwrites,
        holders,
        advice: advice.join("; "),
    };
    write_line(out, ascii, &line)
}

fn verdict_name(outcome: &Outcome) -> &'static str {
    match outcome {
        Outcome::Granted => "granted",
        Outcome::Refused(_) => "refused",
        Outcome::Unknown(_) => "unknown",
    }
}

/// What became of a message that somebody pasted, for scripts.
#[derive(Clone, Debug)]
pub struct PastedAnswer<'a> {
    /// The path that the message names, as it was found.
    pub named: &'a str,
    /// The image on this host, if it could be found.
    pub image: Option<&'a Image>,
    /// Where else it is to be looked for, if it could not.
    pub note: String,
    /// QEMU's sentence.
    pub message: String,
    /// The byte that it is about.
    pub byte: Option<LockByte>,
    /// Whether somebody is in the way now; `None`: cannot tell.
    pub held: Option<bool>,
    /// Who holds it.
    pub holders: Vec<&'a Holder>,
}

/// Writes the answer to a pasted message as one object on one line.
///
/// # Errors
/// When `out` cannot be written.
pub fn write_pasted_json(out: impl Write, ascii: bool, answer: &PastedAnswer) -> io::Result<()> {
    let path = answer.image.map_or_else(|| answer.named.to_owned(), |i| i.path.to_string_lossy().into_owned());
    let line = WhyOut {
        schema: WHY_SCHEMA,
        image_bytes: answer.image.and_then(|i| exact(&i.path)),
        operation: None,
        verdict: match answer.held {
            Some(true) => "refused",
            Some(false) => "granted",
            None => "unknown",
        },
        byte: answer.byte.map(LockByte::offset),
        on_image: path.clone(),
        image: path,
        message: Some(answer.message.clone()),
        destroys_image: false,
        holders: answer.holders.iter().map(|h| holder_out(h)).collect(),
        advice: answer.note.clone(),
    };
    write_line(out, ascii, &line)
}

/// Writes the answer for one program in sentences.
///
/// # Errors
/// When `out` cannot be written.
pub fn write_text(
    mut out: impl Write,
    layout: Layout,
    snapshot: &Snapshot,
    image: &Image,
    answer: &WhatIf,
) -> io::Result<()> {
    let (name, path) = (answer.operation.name, escape_path(&image.path));
    let mut lines = Vec::new();
    match (&answer.outcome, answer.harm) {
        (Outcome::Refused(r), _) if r.destroys_image => lines.push(format!(
            "DANGER: {name} IS REFUSED TOO LATE: it truncates {path} first, is refused then, and DELETES it"
        )),
        (Outcome::Granted, Harm::Overwrites) => {
            lines.push(format!("DANGER: {name} IS GRANTED AND OVERWRITES {path}, WHICH IS IN USE"));
        }
        (Outcome::Granted, Harm::WritesBesideWriter) => {
            lines.push(format!("DANGER: {name} IS GRANTED AND WRITES TO {path} BESIDE ANOTHER WRITER"));
        }
        (Outcome::Granted, Harm::BaseIsWritten) => {
            lines.push(format!("DANGER: {name} IS GRANTED, BUT A FILE BELOW {path} IS WRITTEN TO WITHOUT A LOCK"));
        }
        (Outcome::Granted, Harm::None) => lines.push(format!("granted: {name} on {path}")),
        (Outcome::Refused(_), _) => lines.push(format!("refused: {name} on {path}")),
        (Outcome::Unknown(why), _) => lines.push(format!("cannot tell: {name} on {path}: {why}")),
    }
    if let Some(recipe) = answer.operation.recipe(image.family()) {
        lines.push(format!("  {name} was measured as: {}", recipe.command));
    }
    match &answer.outcome {
        Outcome::Refused(refused) => {
            lines.push(format!("  QEMU says: {}", refused.sentence));
            let holders: Vec<&Holder> = refused.holders.iter().collect();
            lines.extend(held_by(snapshot, refused.byte, &refused.on_image, &holders));
        }
        Outcome::Granted if answer.harm != Harm::None => lines.extend(users(snapshot, image)),
        Outcome::Granted | Outcome::Unknown(_) => {}
    }
    lines.extend(ways_out(snapshot, image, answer).into_iter().map(|way| format!("  way out: {way}")));
    write_lines(&mut out, layout, &lines)
}

/// "byte 101 (uses write) of /a is held by" and who that is, a line each.
pub(crate) fn held_by(snapshot: &Snapshot, byte: LockByte, on: &Path, holders: &[&Holder]) -> Vec<String> {
    let on = escape_path(on);
    if holders.is_empty() {
        let offset = byte.offset();
        return vec![format!("  byte {offset} ({byte}) of {on} is held by somebody who cannot be named")];
    }
    let mut lines = vec![format!("  byte {} ({byte}) of {on} is held by", byte.offset())];
    lines.extend(holders.iter().map(|h| format!("    {}", holder_text(h, snapshot.taken_at))));
    lines
}

/// Who uses an image, with a lock or without.
fn users(snapshot: &Snapshot, image: &Image) -> Vec<String> {
    let mut lines = vec![format!("  {} is used by", escape_path(&image.path))];
    lines.extend(image.holders.iter().map(|h| format!("    {}", holder_text(h, snapshot.taken_at))));
    lines.extend(image.openers.iter().map(|o| {
        let how = match o.mode {
            crate::linux::descriptors::OpenMode::Write => "open for writing, without a lock",
            crate::linux::descriptors::OpenMode::Read => "open for reading, without a lock",
        };
        format!("    {}  {how}  fd {}", process_name(&o.process), o.fd)
    }));
    lines
}

fn holder_text(holder: &Holder, now: Timestamp) -> String {
    let process = &holder.process;
    let mut parts = vec![process_name(process)];
    parts.push(match holder.foreign {
        Some(range) => format!("foreign lock on {}", range_text(range)),
        None => access_text(holder.access),
    });
    if let Some(started) = process.started {
        parts.push(format!("running for {}", span(now.duration_since(started).as_secs().unsigned_abs())));
    }
    parts.push(format!("user {}", escape(&process.user)));
    parts.extend(holder.fd.map(|fd| format!("fd {fd}")));
    parts.extend(process.unit.as_ref().map(|u| escape(u).into_owned()));
    parts.extend(process.container.as_ref().map(|c| format!("container {}", escape(c))));
    parts.join("  ")
}

/// Writes the answers for every program, dangers first, a row each.
///
/// # Errors
/// When `out` cannot be written.
pub fn write_table(mut out: impl Write, layout: Layout, image: &Image, answers: &[WhatIf]) -> io::Result<()> {
    let mut lines = vec![format!("{}  {}", escape_path(&image.path), image.verdict.name())];
    lines.extend(image.findings.iter().filter(|f| f.severity > Severity::Note).map(|f| format!("  {}", f.text)));
    lines.push(format!("{}  {}", pad_end("PROGRAM", NAME), "WHAT IT WOULD BE TOLD NOW"));
    for answer in answers {
        let said = match (&answer.outcome, answer.harm) {
            (Outcome::Granted, Harm::None) => "granted".to_owned(),
            (Outcome::Granted, Harm::Overwrites) => "GRANTED: IT WOULD OVERWRITE AN IMAGE THAT IS IN USE".to_owned(),
            (Outcome::Granted, Harm::WritesBesideWriter) => "GRANTED: IT WOULD WRITE BESIDE ANOTHER WRITER".to_owned(),
            (Outcome::Granted, Harm::BaseIsWritten) => "GRANTED: BUT A FILE BELOW IT IS BEING WRITTEN".to_owned(),
            (Outcome::Unknown(why), _) => format!("cannot tell: {why}"),
            (Outcome::Refused(refused), _) => {
                let mut who: Vec<String> = refused.holders.iter().map(|h| process_name(&h.process)).collect();
                who.dedup();
                let who = if who.is_empty() { "somebody who cannot be named".to_owned() } else { who.join(", ") };
                let place = if refused.on_image == *image.path {
                    String::new()
                } else {
                    format!(" of {}", escape_path(&refused.on_image))
                };
                let late = if refused.destroys_image { "TOO LATE, THE IMAGE WOULD BE DELETED: " } else { "" };
                format!("refused: {late}{}, byte {}{place}: {who}", refused.sentence, refused.byte.offset())
            }
        };
        lines.push(format!("{}  {said}", pad_end(answer.operation.name, NAME)));
    }
    write_lines(&mut out, layout, &lines)
}

/// The longest name of a program.
const NAME: usize = 26;

/// Writes lines in the layout's characters.
///
/// # Errors
/// When `out` cannot be written.
pub fn write_lines(out: &mut impl Write, layout: Layout, lines: &[String]) -> io::Result<()> {
    lines.iter().try_for_each(|line| writeln!(out, "{}", layout.plain(line)))
}
