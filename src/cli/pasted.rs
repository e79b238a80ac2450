//! `why -`: somebody pasted an error message; what does it mean, and how does that image stand on this host now?
//!
//! The message names the image as QEMU knew it. Where that is a path inside a container, the file is looked for through
//! the mount namespaces of this host; what cannot be found here is told as such and never answered for.

use std::io::{self, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};

use super::commands::unless_closed;
use super::exit::{Exit, Failure};
use super::inquiry::Inquiry;
use super::patience::patiently;
use super::{Common, ListFormat, layout, roots};
use crate::linux::Roots;
use crate::linux::identity::{FileId, status};
use crate::linux::mount_namespaces;
use crate::linux::process;
use crate::monitor::advice::quote_path;
use crate::monitor::snapshot::{ByteState, Image};
use crate::monitor::what_if::{Outcome, holders_on, what_if};
use crate::monitor::wording::holders_text;
use crate::protocol::{Operation, Report, decode};
use crate::report::why::{self, PastedAnswer};
use crate::text::{counted, escape, escape_path};

/// As much of a long text is kept, and the end of it: what is printed last is what went wrong.
const LONGEST: usize = 1 << 20;

/// A file on this host that the message may mean.
struct Meant {
    path: PathBuf,
    file: FileId,
    /// How it was found, where that needs saying.
    how: Option<String>,
}

pub(super) fn explain(
    operation: Option<&'static Operation>,
    format: ListFormat,
    common: &Common,
) -> Result<Exit, Failure> {
    let stdin = io::stdin();
    if stdin.is_terminal() {
        let _ = writeln!(io::stderr(), "Paste the message, then press Ctrl-D on an empty line:");
    }
    let bytes = end_of(stdin.lock())?;
    let reports = decode(&String::from_utf8_lossy(&bytes));
    if reports.is_empty() {
        return Err(Failure::error(
            "the text holds no lock message of QEMU's: looked for `Failed to get \"...\" lock` and `Failed to lock byte N`",
        ));
    }
    let mut out = io::BufWriter::new(io::stdout().lock());
    let mut exit = Exit::Fine;
    for (i, report) in reports.iter().enumerate() {
        if i > 0 && matches!(format, ListFormat::Table) {
            unless_closed(writeln!(out))?;
        }
        let (written, one) = answer(&mut out, report, operation, format, common);
        exit = worse(exit, one);
        unless_closed(written)?;
    }
    unless_closed(out.flush())?;
    Ok(exit)
}

/// Reads to the end and keeps the last of it.
fn end_of(mut input: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    loop {
        if input.by_ref().take(LONGEST as u64).read_to_end(&mut bytes)? == 0 {
            return Ok(bytes);
        }
        bytes.drain(..bytes.len().saturating_sub(LONGEST));
    }
}

/// What cannot be told counts most.
fn worse(a: Exit, b: Exit) -> Exit {
    let rank = |e: Exit| match e {
        Exit::CannotTell => 2,
        Exit::Held => 1,
        _ => 0,
    };
    if rank(b) > rank(a) { b } else { a }
}

fn answer(
    out: &mut impl Write,
    report: &Report,
    operation: Option<&'static Operation>,
    format: ListFormat,
    common: &Common,
) -> (io::Result<()>, Exit) {
    let layout = layout(common);
    let errno = report.message.errno.as_ref().map(|e| format!(": {}", escape(e))).unwrap_or_default();
    let mut lines = vec![format!("QEMU said: {}{errno}", report.message.sentence)];
    lines.push(format!("  that means: {}", report.message.meaning()));
    if let Some(domain) = &report.domain {
        lines.push(format!("  while libvirt started domain {}", escape(domain)));
    }
    if report.on_backing_file {
        lines.push("  on a file below the image: its backing file".to_owned());
    }
    let named = report.images.first().map_or("", String::as_str);
    let (images, from) = (report.images.clone(), roots(common));
    let found = patiently(move || find(&images, &from));
    let (meant, note) =
        found.unwrap_or_else(|| (Vec::new(), "the storage of the image that it names does not answer".to_owned()));
    if meant.is_empty() {
        lines.push(format!("  cannot tell: {note}"));
        let answer = PastedAnswer {
            named,
            image: None,
            note: format!("{}; cannot tell: {note}", report.message.meaning()),
            message: format!("{}{errno}", report.message.sentence),
            byte: report.message.sentence.byte(),
            held: None,
            holders: Vec::new(),
        };
        let written = match format {
            ListFormat::Table => why::write_lines(out, layout, &lines),
            ListFormat::Json => why::write_pasted_json(out, common.ascii, &answer),
        };
        return (written, Exit::CannotTell);
    }
    // What is only guessed to be meant is shown and not answered for.
    let mut exit = if report.guessed { Exit::CannotTell } else { Exit::Fine };
    let mut written = match format {
        ListFormat::Table => why::write_lines(&mut *out, layout, &lines),
        ListFormat::Json => Ok(()),
    };
    for one in &meant {
        let result = Inquiry::make(&one.path, roots(common));
        let asked = match (&result, operation) {
            (Ok(inquiry), Some(operation)) => inquiry.image().ok().zip(Some(inquiry)).and_then(|(image, inquiry)| {
                let answer = what_if(&inquiry.snapshot, image, operation)?;
                Some((inquiry, image, answer))
            }),
            _ => None,
        };
        let (mut now, mut held) = match &result {
            Ok(inquiry) => on_image(inquiry, report),
            Err(failure) => (vec![format!("  cannot tell: {failure}")], None),
        };
        if let Some((_, _, answer)) = &asked {
            // The program is known: what it would be told now counts, and not the one byte that stopped it then.
            held = match answer.outcome {
                Outcome::Granted => Some(false),
                Outcome::Refused(_) => Some(true),
                Outcome::Unknown(_) => None,
            };
        } else if let (Some(operation), Ok(_)) = (operation, &result) {
            now.push(format!("  {} is not known for an image of this format", operation.name));
            held = None;
        }
        exit = worse(
            exit,
            match held {
                Some(true) => Exit::Held,
                Some(false) => Exit::Fine,
                None => Exit::CannotTell,
            },
        );
        let guess = if report.guessed { " (named earlier in the text: perhaps another image)" } else { "" };
        let how = format!("{}{guess}", one.how.as_deref().unwrap_or_default());
        written = written.and_then(|()| match (format, &result) {
            (ListFormat::Table, _) => {
                let mut lines = vec![format!("{}{how}", escape_path(&one.path))];
                lines.extend(now.iter().cloned());
                why::write_lines(&mut *out, layout, &lines)?;
                match &asked {
                    Some((inquiry, image, answer)) => {
                        why::write_text(&mut *out, layout, &inquiry.snapshot, image, answer)
                    }
                    None => Ok(()),
                }
            }
            (ListFormat::Json, _) if asked.is_some() && !report.guessed => match &asked {
                Some((inquiry, image, answer)) => {
                    why::write_json(&mut *out, common.ascii, &inquiry.snapshot, image, answer)
                }
                None => Ok(()),
            },
            (ListFormat::Json, result) => {
                let held = held.filter(|_| !report.guessed);
                let image = result.as_ref().ok().and_then(|i| i.image().ok());
                let byte = report.message.sentence.byte();
                let holders = image.zip(byte).map(|(i, b)| holders_on(i, b).collect()).unwrap_or_default();
                let said: Vec<&str> = now.iter().map(|l| l.trim_start()).collect();
                let note = format!("{};{how} {}", report.message.meaning(), said.join("; "));
                let message = format!("{}{errno}", report.message.sentence);
                let answer = PastedAnswer { named, image, note, message, byte, held, holders };
                why::write_pasted_json(&mut *out, common.ascii, &answer)
            }
        });
    }
    (written, exit)
}

/// How what the message is about stands on an image now, and whether somebody is in the way; `None`: cannot tell.
fn on_image(inquiry: &Inquiry, report: &Report) -> (Vec<String>, Option<bool>) {
    let Ok(image) = inquiry.image() else { return (vec!["  it has gone meanwhile".to_owned()], None) };
    let path = quote_path(&image.path);
    if report.message.errno.is_some() {
        let text = match image.findings.iter().find(|f| f.code == "cannot-lock" || f.code == "stalled") {
            Some(finding) => format!("  still so: {}", finding.text),
            None => {
                "  lock questions are answered there now; whether locks can be taken shows only when one is".to_owned()
            }
        };
        return (vec![text], None);
    }
    let Some(byte) = report.message.sentence.byte() else {
        return (vec!["  the byte is none of the ten: see who has the image open in qlock-top list".to_owned()], None);
    };
    let others: Vec<&Image> = inquiry.snapshot.images.iter().filter(|i| i.path != image.path).collect();
    let below = report.on_backing_file && report.message.image.is_none();
    if below && others.is_empty() {
        return (vec!["  cannot tell: the file below it that was meant cannot be found".to_owned()], None);
    }
    let concerned = if below { others } else { vec![image] };
    let state = |i: &Image| i.bytes.iter().find(|b| b.byte == byte).map_or(ByteState::Unknown, |b| b.state);
    let offset = byte.offset();
    if let Some(held) = concerned.iter().find(|i| state(i) == ByteState::Held) {
        let holders: Vec<_> = holders_on(held, byte).collect();
        let mut lines = why::held_by(&inquiry.snapshot, byte, &held.path, &holders);
        lines.push(format!("  what each program would be told: qlock-top why {path}"));
        return (lines, Some(true));
    }
    if let Some(unknown) = concerned.iter().find(|i| state(i) == ByteState::Unknown) {
        let why = unknown.findings.first().map(|f| f.text.clone()).unwrap_or_default();
        return (vec![format!("  cannot tell whether byte {offset} is held now: {why}")], None);
    }
    match concerned.iter().find(|i| i.is_in_use()) {
        // That byte is free, and others may stop the same program.
        Some(used) => {
            let text = format!(
                "  byte {offset} ({byte}) is free now, but {} is in use by {}: what a program would be told depends on \
                 which it is: qlock-top why {path}",
                escape_path(&used.path),
                holders_text(used)
            );
            (vec![text], None)
        }
        None => {
            (vec![format!("  byte {offset} ({byte}) is free now: whoever held it has let go; try again")], Some(false))
        }
    }
}

/// The files that the message may mean, or why there is none.
fn find(images: &[String], roots: &Roots) -> (Vec<Meant>, String) {
    let mut meant: Vec<Meant> = Vec::new();
    let mut note = "the message names no image: qlock-top why IMAGE says how one stands".to_owned();
    for named in images {
        let named = &plain(named);
        let path = Path::new(named);
        let here = status(path).ok();
        if here.is_some_and(|s| !s.kind.can_be_image()) || path.starts_with("/proc") || path.starts_with("/sys") {
            note = format!("{} is no image here: it is a directory or a device", escape(named));
            continue;
        }
        if let Some(found) = here {
            let how = path.is_relative().then(|| " (the name in the message, from this directory)".to_owned());
            meant.push(Meant { path: path.to_owned(), file: found.id, how });
        }
        let shown = escape(named);
        if path.is_relative() {
            note =
                format!("{shown} is a relative name, and no such image is in this directory: go to where it was used");
        } else {
            match mount_namespaces::find(roots, path) {
                Ok(search) => {
                    note = inside(&search, named, &mut meant, roots);
                }
                Err(error) => note = format!("{shown} is not here, and other mount namespaces cannot be seen: {error}"),
            }
        }
        if !meant.is_empty() {
            break;
        }
    }
    (meant, note)
}

/// The file in one of QEMU's descriptions of a node: `file:PATH`, `json:{..}`.
fn plain(named: &str) -> String {
    fn file_name(value: &serde_json::Value) -> Option<&str> {
        let of = |key: &str| value.get(key).and_then(serde_json::Value::as_str);
        of("filename").or_else(|| of("file.filename")).or_else(|| file_name(value.get("file")?))
    }
    let parsed = named.strip_prefix("json:").and_then(|j| serde_json::from_str::<serde_json::Value>(j).ok());
    let name = parsed.as_ref().and_then(file_name).unwrap_or(named);
    name.strip_prefix("file:").unwrap_or(name).to_owned()
}

/// Adds what other mount namespaces have under the name; says what is to be said where that is nothing.
fn inside(search: &mount_namespaces::Search, named: &str, meant: &mut Vec<Meant>, roots: &Roots) -> String {
    let shown = escape(named);
    let mut unreachable = Vec::new();
    for found in search.found.iter() {
        if meant.iter().any(|m| m.file == found.file) {
            continue;
        }
        let command = process::brief(roots, found.pid).map(|b| escape(&b.command).into_owned());
        let of = format!("{} {}", command.unwrap_or_default(), found.pid);
        match &found.here {
            Some(here) => {
                let how = Some(format!(" (which is {shown} in the mount namespace of {of})"));
                meant.push(Meant { path: here.clone(), file: found.file, how });
            }
            None => unreachable.push(of),
        }
    }
    if let Some(of) = unreachable.first() {
        return format!(
            "{shown} exists in the mount namespace of {of} only, and no path of this host leads to it: run qlock-top there, \
             such as with nsenter -t {} -m",
            of.rsplit(' ').next().unwrap_or("PID")
        );
    }
    let others = counted(search.looked_into, "other mount namespace", "other mount namespaces");
    let hidden = match search.hidden {
        0 => String::new(),
        n => format!(" ({} would not be read: root sees the most)", counted(n, "process", "processes")),
    };
    format!(
        "{shown} is neither on this host nor in {others}{hidden}: run qlock-top on the host that printed the message"
    )
}
