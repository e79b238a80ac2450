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
use crate::linux::identity::{FileId, FileKind, status};
use crate::linux::mount_namespaces;
use crate::linux::process;
use crate::monitor::advice::quote;
use crate::monitor::snapshot::ByteState;
use crate::monitor::what_if::{holders_on, what_if};
use crate::protocol::{LockByte, Operation, Report, decode};
use crate::report::why::{self, PastedAnswer};
use crate::text::{counted, escape, escape_path};

/// At most this much is read: no error message is longer.
const LONGEST: u64 = 1 << 20;

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
    let mut bytes = Vec::new();
    stdin.lock().take(LONGEST).read_to_end(&mut bytes)?;
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
    let mut exit = Exit::Fine;
    let mut written = match format {
        ListFormat::Table => why::write_lines(&mut *out, layout, &lines),
        ListFormat::Json => Ok(()),
    };
    for one in &meant {
        let result = Inquiry::make(&one.path, roots(common));
        let (now, held) = match &result {
            Ok(inquiry) => on_image(inquiry, report.message.sentence.byte()),
            Err(failure) => (vec![format!("  cannot tell: {failure}")], None),
        };
        exit = worse(
            exit,
            match held {
                Some(true) => Exit::Held,
                Some(false) => Exit::Fine,
                None => Exit::CannotTell,
            },
        );
        written = written.and_then(|()| match (format, &result) {
            (ListFormat::Table, _) => {
                let mut lines = vec![format!("{}{}", escape_path(&one.path), one.how.as_deref().unwrap_or_default())];
                lines.extend(now.iter().cloned());
                why::write_lines(&mut *out, layout, &lines)?;
                match (&result, operation) {
                    (Ok(inquiry), Some(operation)) => write_operation(&mut *out, inquiry, operation, common),
                    _ => Ok(()),
                }
            }
            (ListFormat::Json, result) => {
                let image = result.as_ref().ok().and_then(|i| i.image().ok());
                let byte = report.message.sentence.byte();
                let holders = image.zip(byte).map(|(i, b)| holders_on(i, b).collect()).unwrap_or_default();
                let said: Vec<&str> = now.iter().map(|l| l.trim_start()).collect();
                let note = format!("{}; {}", report.message.meaning(), said.join("; "));
                let message = format!("{}{errno}", report.message.sentence);
                let answer = PastedAnswer { named, image, note, message, byte, held, holders };
                why::write_pasted_json(&mut *out, common.ascii, &answer)
            }
        });
    }
    (written, exit)
}

fn write_operation(
    out: &mut impl Write,
    inquiry: &Inquiry,
    operation: &'static Operation,
    common: &Common,
) -> io::Result<()> {
    let Ok(image) = inquiry.image() else { return Ok(()) };
    match what_if(&inquiry.snapshot, image, operation) {
        Some(answer) => why::write_text(out, layout(common), &inquiry.snapshot, image, &answer),
        None => Ok(()),
    }
}

/// How the byte of the message stands on an image now, and whether it is held.
fn on_image(inquiry: &Inquiry, byte: Option<LockByte>) -> (Vec<String>, Option<bool>) {
    let Ok(image) = inquiry.image() else { return (vec!["  it has gone meanwhile".to_owned()], None) };
    let Some(byte) = byte else {
        return (vec!["  the byte is none of the ten: see who has the image open in qlock-top list".to_owned()], None);
    };
    let state = image.bytes.iter().find(|b| b.byte == byte).map_or(ByteState::Unknown, |b| b.state);
    let offset = byte.offset();
    match state {
        ByteState::Held => {
            let holders: Vec<_> = holders_on(image, byte).collect();
            let mut lines = why::held_by(&inquiry.snapshot, byte, &image.path, &holders);
            let path = quote(&image.path.to_string_lossy());
            lines.push(format!("  what each program would be told: qlock-top why {path}"));
            (lines, Some(true))
        }
        ByteState::Free => {
            (vec![format!("  byte {offset} ({byte}) is free now: whoever held it has let go; try again")], Some(false))
        }
        ByteState::Unknown => {
            let why = image.findings.first().map(|f| f.text.clone()).unwrap_or_default();
            (vec![format!("  cannot tell whether byte {offset} is held now: {why}")], None)
        }
    }
}

/// The files that the message may mean, or why there is none.
fn find(images: &[String], roots: &Roots) -> (Vec<Meant>, String) {
    let mut meant: Vec<Meant> = Vec::new();
    let mut note = "the message names no image: qlock-top why IMAGE says how one stands".to_owned();
    for named in images {
        let path = Path::new(named);
        let here = status(path).ok().filter(|s| matches!(s.kind, FileKind::Regular | FileKind::Block));
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
             such as with nsenter -t PID -m"
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
