//! What do scripts get? The JSON contracts `qlock-top/snapshot/1` and `qlock-top/event/1`.
//!
//! The schemas stand in `assets/schema/`. A path that is no UTF-8 is given readably in `path` and exactly, in hexadecimal,
//! in `path_bytes`. Control and direction characters are written as `\u....`, so that a terminal may show the output.

use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use jiff::Timestamp;
use serde::Serialize;

use crate::linux::descriptors::OpenMode;
use crate::linux::identity::Device;
use crate::linux::lock_table::LockKind;
use crate::monitor::change::{Change, ChangeKind};
use crate::monitor::finding::Finding;
use crate::monitor::snapshot::{ByteState, ForeignRange, Holder, Image, Opener, Snapshot, Verdict};
use crate::protocol::{Permission, PermissionSet, Side};
use crate::text::is_treacherous;

/// The contract of `list --format json`.
pub const SNAPSHOT_SCHEMA: &str = "qlock-top/snapshot/1";
/// The contract of a line of `watch --format ndjson`.
pub const EVENT_SCHEMA: &str = "qlock-top/event/1";

#[derive(Serialize)]
struct SnapshotOut<'a> {
    schema: &'static str,
    taken_at: Timestamp,
    host: &'a str,
    complete: bool,
    hidden_processes: usize,
    images: Vec<ImageOut<'a>>,
}

#[derive(Serialize)]
struct ImageOut<'a> {
    path: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    path_bytes: Option<String>,
    device: Device,
    inode: u64,
    format: Option<&'static str>,
    virtual_size: Option<u64>,
    file_size: u64,
    backing_file: Option<&'a str>,
    filesystem: FilesystemOut<'a>,
    verdict: Verdict,
    bytes: Vec<ByteOut<'a>>,
    holders: Vec<HolderOut<'a>>,
    openers: Vec<OpenerOut<'a>>,
    findings: &'a [Finding],
}

#[derive(Serialize)]
struct FilesystemOut<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    source: &'a str,
    remote: bool,
}

#[derive(Serialize)]
struct ByteOut<'a> {
    byte: u64,
    side: Side,
    permission: Permission,
    state: ByteState,
    holders: &'a [usize],
}

#[derive(Serialize)]
pub(super) struct HolderOut<'a> {
    pid: i32,
    start_time: u64,
    command: &'a str,
    user: &'a str,
    vm: Option<&'a str>,
    unit: Option<&'a str>,
    container: Option<&'a str>,
    fd: Option<i32>,
    lock: LockKind,
    permissions: PermissionSet,
    unshared: PermissionSet,
    foreign: Option<ForeignRange>,
}

#[derive(Serialize)]
struct OpenerOut<'a> {
    pid: i32,
    command: &'a str,
    vm: Option<&'a str>,
    fd: i32,
    mode: OpenMode,
}

/// The exact bytes of a path that is no UTF-8, in hexadecimal.
pub(super) fn exact(path: &Path) -> Option<String> {
    path.to_str().is_none().then(|| path.as_os_str().as_bytes().iter().map(|b| format!("{b:02x}")).collect())
}

fn snapshot_out(snapshot: &Snapshot) -> SnapshotOut<'_> {
    SnapshotOut {
        schema: SNAPSHOT_SCHEMA,
        taken_at: snapshot.taken_at,
        host: &snapshot.host,
        complete: snapshot.complete,
        hidden_processes: snapshot.hidden_processes,
        images: snapshot.images.iter().map(image_out).collect(),
    }
}

fn image_out(image: &Image) -> ImageOut<'_> {
    ImageOut {
        path: image.path.to_string_lossy().into_owned(),
        path_bytes: exact(&image.path),
        device: image.file.device,
        inode: image.file.inode,
        format: image.format.map(|f| f.name()),
        virtual_size: image.virtual_size,
        file_size: image.file_size,
        backing_file: image.backing_file.as_deref(),
        filesystem: FilesystemOut {
            kind: &image.filesystem.kind,
            source: &image.filesystem.source,
            remote: image.filesystem.remote,
        },
        verdict: image.verdict,
        bytes: image
            .bytes
            .iter()
            .map(|b| ByteOut {
                byte: b.byte.offset(),
                side: b.byte.side,
                permission: b.byte.permission,
                state: b.state,
                holders: &b.holders,
            })
            .collect(),
        holders: image.holders.iter().map(holder_out).collect(),
        openers: image.openers.iter().map(opener_out).collect(),
        findings: &image.findings,
    }
}

pub(super) fn holder_out(holder: &Holder) -> HolderOut<'_> {
    let process = &holder.process;
    HolderOut {
        pid: process.id.pid,
        start_time: process.id.start_time,
        command: &process.command,
        user: &process.user,
        vm: process.vm.as_deref(),
        unit: process.unit.as_deref(),
        container: process.container.as_deref(),
        fd: holder.fd,
        lock: holder.lock,
        permissions: holder.access.permissions,
        unshared: holder.access.unshared,
        foreign: holder.foreign,
    }
}

fn opener_out(opener: &Opener) -> OpenerOut<'_> {
    let process = &opener.process;
    OpenerOut {
        pid: process.id.pid,
        command: &process.command,
        vm: process.vm.as_deref(),
        fd: opener.fd,
        mode: opener.mode,
    }
}

#[derive(Serialize)]
struct FirstOut<'a> {
    schema: &'static str,
    at: Timestamp,
    kind: &'static str,
    snapshot: SnapshotOut<'a>,
}

#[derive(Serialize)]
struct ChangeOut<'a> {
    schema: &'static str,
    at: Timestamp,
    kind: ChangeKind,
    image: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    image_bytes: Option<String>,
    pid: Option<i32>,
    command: Option<&'a str>,
    vm: Option<&'a str>,
    fd: Option<i32>,
    permissions: PermissionSet,
    unshared: PermissionSet,
    text: &'a str,
}

/// Writes a snapshot as one object on one line.
///
/// # Errors
/// When `out` cannot be written.
pub fn write_snapshot(out: impl Write, ascii: bool, snapshot: &Snapshot) -> io::Result<()> {
    write_line(out, ascii, &snapshot_out(snapshot))
}

/// Writes the first line of a stream: how things stand.
///
/// # Errors
/// When `out` cannot be written.
pub fn write_first(out: impl Write, ascii: bool, snapshot: &Snapshot) -> io::Result<()> {
    let first =
        FirstOut { schema: EVENT_SCHEMA, at: snapshot.taken_at, kind: "snapshot", snapshot: snapshot_out(snapshot) };
    write_line(out, ascii, &first)
}

/// Writes a line of a stream: what happened.
///
/// # Errors
/// When `out` cannot be written.
pub fn write_change(out: impl Write, ascii: bool, change: &Change) -> io::Result<()> {
    let process = change.process.as_ref();
    let line = ChangeOut {
        schema: EVENT_SCHEMA,
        at: change.at,
        kind: change.kind,
        image: change.image.as_ref().map(|p| p.to_string_lossy().into_owned()),
        image_bytes: change.image.as_deref().and_then(exact),
        pid: process.map(|p| p.id.pid),
        command: process.map(|p| p.command.as_str()),
        vm: process.and_then(|p| p.vm.as_deref()),
        fd: change.fd,
        permissions: change.access.permissions,
        unshared: change.access.unshared,
        text: &change.text,
    };
    write_line(out, ascii, &line)
}

/// One image as an object of a snapshot, on one line.
#[must_use]
pub fn image_text(image: &Image) -> String {
    let mut bytes = Vec::new();
    // Writing to memory cannot fail, and what is written is UTF-8.
    let _ = write_line(&mut bytes, false, &image_out(image));
    String::from_utf8_lossy(&bytes).trim_end().to_owned()
}

pub(super) fn write_line(mut out: impl Write, ascii: bool, value: &impl Serialize) -> io::Result<()> {
    let mut serializer = serde_json::Serializer::with_formatter(&mut out, Harmless { ascii });
    value.serialize(&mut serializer)?;
    out.write_all(b"\n")
}

/// Compact JSON in which nothing acts on a terminal.
struct Harmless {
    /// Nothing but ASCII.
    ascii: bool,
}

impl serde_json::ser::Formatter for Harmless {
    fn write_string_fragment<W: ?Sized + Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        let mut rest = fragment;
        while let Some((at, c)) = rest.char_indices().find(|(_, c)| is_treacherous(*c) || (self.ascii && !c.is_ascii()))
        {
            writer.write_all(&rest.as_bytes()[..at])?;
            c.encode_utf16(&mut [0; 2]).iter().try_for_each(|unit| write!(writer, "\\u{unit:04x}"))?;
            rest = &rest[at + c.len_utf8()..];
        }
        writer.write_all(rest.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn written(text: &str) -> String {
        let mut out = Vec::new();
        write_line(&mut out, false, &text).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn what_would_act_on_a_terminal_is_escaped_and_read_back() {
        let attack = "a\u{1b}[2J\u{9b}31m\u{202e}\u{200b}\u{e0041}\u{7f}é日";
        let json = written(attack);
        assert!(json.contains("\\u009b31m\\u202e\\u200b\\udb40\\udc41\\u007fé日"), "{json}");
        assert_eq!(serde_json::from_str::<String>(&json).unwrap(), attack);
    }

    proptest! {
        #[test]
        fn every_text_comes_back_and_none_acts(text in any::<String>()) {
            let json = written(&text);
            prop_assert!(!json.trim_end().chars().any(is_treacherous));
            prop_assert_eq!(serde_json::from_str::<String>(&json).unwrap(), text);
        }
    }
}
