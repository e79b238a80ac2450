//! How is a holder, a lock or an image put into words, the same on the screen, in tables and in streams?
//!
//! Pure. Whatever others wrote is escaped here, so that what comes out may go to a terminal.

use std::borrow::Cow;

use jiff::Timestamp;

use super::snapshot::{ByteState, ByteView, ForeignRange, Holder, Image, Verdict};
use crate::linux::descriptors::OpenMode;
use crate::linux::process::ProcessFacts;
use crate::protocol::{Access, Role};
use crate::text::{escape, size, span};

/// "web01 (qemu-system-x86 4242)", or "dd 9912" for a process that runs no VM.
#[must_use]
pub fn process_name(process: &ProcessFacts) -> String {
    let (command, pid) = (escape(&process.command), process.id.pid);
    match &process.vm {
        Some(vm) => format!("{} ({command} {pid})", escape(vm)),
        None => format!("{command} {pid}"),
    }
}

/// "web01 4242" or "dd 9912": for where there is little room.
#[must_use]
pub fn short_process_name(process: &ProcessFacts) -> String {
    format!("{} {}", escape(process.vm.as_ref().unwrap_or(&process.command)), process.id.pid)
}

/// Instead of a name, for locks that this very program holds.
pub const OURS: &str = "OUR TEST LOCK";

/// The name of a holder; our own locks are told apart.
#[must_use]
pub fn holder_name(holder: &Holder) -> String {
    let name = process_name(&holder.process);
    if holder.ours { format!("{OURS} ({name})") } else { name }
}

/// "bytes 0 to 9", "byte 101", "bytes 0 to the end".
#[must_use]
pub fn range_text(range: ForeignRange) -> String {
    match range.end {
        Some(end) if end == range.start => format!("byte {end}"),
        Some(end) => format!("bytes {} to {end}", range.start),
        None => format!("bytes {} to the end", range.start),
    }
}

/// "uses consistent read, write; denies write": what a set of bytes says.
#[must_use]
pub fn access_text(access: Access) -> String {
    let names = |set: crate::protocol::PermissionSet| set.iter().map(|p| p.qemu_name()).collect::<Vec<_>>().join(", ");
    match (access.permissions.is_empty(), access.unshared.is_empty()) {
        (true, true) => "holds nothing".to_owned(),
        (false, true) => format!("uses {}", names(access.permissions)),
        (true, false) => format!("denies {}", names(access.unshared)),
        (false, false) => format!("uses {}; denies {}", names(access.permissions), names(access.unshared)),
    }
}

/// The mark of a byte in a table: `.` free, `#` one holder, a count from two on, `?` held by nobody that can be named
/// or not known.
#[must_use]
pub fn byte_mark(byte: &ByteView) -> char {
    match (byte.state, byte.holders.len()) {
        (ByteState::Free, _) => '.',
        (ByteState::Unknown, _) => '?',
        (ByteState::Held, 0) => '!',
        (ByteState::Held, 1) => '#',
        (ByteState::Held, n) => u32::try_from(n).ok().and_then(|n| char::from_digit(n, 10)).unwrap_or('+'),
    }
}

/// What the image is used for, in at most 15 columns.
#[must_use]
pub fn role_text(image: &Image) -> Cow<'static, str> {
    let all_read = || image.holders.iter().all(|h| matches!(image.role_of(h), Role::Reader | Role::BackingFile));
    if image.verdict == Verdict::Held && image.openers.is_empty() && all_read() {
        // What the set of bytes leaves open, the neighbours tell.
        return match image.overlays {
            0 => "reader".into(),
            n => format!("backing of {n}").into(),
        };
    }
    plain_role(image).into()
}

/// The same at a moment: with how long it has not answered.
#[must_use]
pub fn role_text_at(image: &Image, now: Timestamp) -> Cow<'static, str> {
    match image.stalled_since {
        Some(since) => format!("stalled {}", span(now.duration_since(since).as_secs().unsigned_abs())).into(),
        None => role_text(image),
    }
}

fn plain_role(image: &Image) -> &'static str {
    if image.openers.iter().any(|o| o.mode == OpenMode::Write) {
        return "WRITER, NO LOCK";
    }
    match image.verdict {
        Verdict::HeldElsewhere => return "held elsewhere",
        Verdict::HeldByKernel => return "held by kernel",
        Verdict::Unknown if image.holders.is_empty() && image.held().is_empty() => return "cannot tell",
        Verdict::Unknown if image.holders.is_empty() => return "held, by whom?",
        Verdict::CannotLock => return "cannot lock",
        Verdict::Stalled => return "stalled",
        Verdict::Free if image.openers.is_empty() => return "-",
        Verdict::Free => return "open, no lock",
        Verdict::Held | Verdict::Unknown => {}
    }
    // The one who holds most names the role; the others are in the list of holders.
    let most = image.holders.iter().filter(|h| h.foreign.is_none()).max_by_key(|h| h.access.bytes().count());
    most.map_or("foreign lock", |h| match image.role_of(h) {
        Role::None => "-",
        Role::Writer if h.process.command.starts_with("qemu-nbd") => Role::NbdExport.label(),
        role => role.label(),
    })
}

/// "nfs4 filer:/vol": the file system that the image lies on.
#[must_use]
pub fn filesystem_text(image: &Image) -> String {
    format!("{} {}", escape(&image.filesystem.kind), escape(&image.filesystem.source))
}

/// Who has the image open and holds none of the ten bytes, each process once.
#[must_use]
pub fn openers_text(image: &Image) -> String {
    let mut who: Vec<String> = image.openers.iter().map(|o| process_name(&o.process)).collect();
    who.dedup();
    who.join(", ")
}

/// Who holds the image or has it open, the holders first, each process once; and where nobody can be named, why.
#[must_use]
pub fn holders_text(image: &Image) -> String {
    list_holders(image, process_name)
}

/// The same with short names.
#[must_use]
pub fn short_holders_text(image: &Image) -> String {
    list_holders(image, short_process_name)
}

fn list_holders(image: &Image, process_name: fn(&ProcessFacts) -> String) -> String {
    let mut names: Vec<String> = Vec::new();
    let mut add = |name: String| {
        if !names.contains(&name) {
            names.push(name);
        }
    };
    image.holders.iter().for_each(|h: &Holder| add(if h.ours { OURS.to_owned() } else { process_name(&h.process) }));
    for opener in &image.openers {
        let how = if opener.mode == OpenMode::Write { "writes" } else { "reads" };
        add(format!("{} {how} unlocked", process_name(&opener.process)));
    }
    if matches!(image.verdict, Verdict::HeldElsewhere) {
        add(format!("not on this host ({})", filesystem_text(image)));
    } else if !image.verdict.is_certain() || image.verdict == Verdict::HeldByKernel {
        image.findings.first().into_iter().for_each(|f| add(f.text.clone()));
    }
    names.join(", ")
}

/// The size that a guest sees, or of the file where the header does not say.
#[must_use]
pub fn size_text(image: &Image) -> String {
    if image.format.is_none() && image.file_size == 0 {
        // A block device that may not be opened does not tell.
        return "?".to_owned();
    }
    size(image.virtual_size.unwrap_or(image.file_size))
}

/// The name of the format, or `?`.
#[must_use]
pub fn format_text(image: &Image) -> &'static str {
    image.format.map_or("?", |f| f.name())
}
