//! What is shown below the table about the selected row: bytes, holders, chain, events. `what_if` has a file of its own.

use std::path::PathBuf;

use jiff::Timestamp;
use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::style::Style;
use unicode_segmentation::UnicodeSegmentation;

use super::frame::{short_name, short_path};
use super::{Model, Piece, Theme, piece, put, what_if};
use crate::linux::descriptors::OpenMode;
use crate::linux::lock_table::LockKind;
use crate::linux::process::ProcessFacts;
use crate::monitor::advice::advice;
use crate::monitor::change::ChangeKind;
use crate::monitor::finding::Severity;
use crate::monitor::snapshot::{ByteState, ByteView, Holder, Image, Snapshot, Verdict};
use crate::monitor::what_if::chain;
use crate::monitor::wording::{access_text, holder_name, holders_text, process_name, range_text, role_text_at};
use crate::text::{cut_middle, escape, escape_path, pad_end, size, span, to_ascii, width};
use crate::tui::model::{Panel, Table};
use crate::tui::theme::Look;

pub(super) type Lines<'a> = Vec<Vec<Piece<'a>>>;

pub(super) fn draw(model: &Model, theme: &Theme, buffer: &mut Buffer, area: Rect) {
    put(buffer, theme, area, 0, &tabs(model, theme, area.width));
    let lines = lines(model, theme);
    let room = usize::from(area.height.saturating_sub(1));
    let top = model.scroll.min(lines.len().saturating_sub(room));
    let below = lines.len().saturating_sub(top + room);
    for (row, pieces) in (1u16..area.height).zip(lines.iter().skip(top)) {
        put(buffer, theme, area, row, pieces);
    }
    if below > 0 && room > 0 {
        // The last line that fits gives way.
        let hint = if model.zoomed { "Down shows them" } else { "] or Enter shows them" };
        let text = pad_end(&format!(" {} more lines: {hint}", below + 1), area.width.into());
        put(buffer, theme, area, area.height - 1, &[piece(text, theme.dim)]);
    }
}

/// " 1 Bytes  2 Holders ..": the name of the shown one stands out.
fn tabs<'a>(model: &Model, theme: &Theme, columns: u16) -> Vec<Piece<'a>> {
    let mut pieces = vec![piece(theme.rule, theme.dim)];
    if model.table == Table::Processes {
        pieces.push(piece(" Process ", theme.tab));
    } else {
        for (i, panel) in Panel::ALL.into_iter().enumerate() {
            let style = if panel == model.panel { theme.tab } else { theme.dim };
            pieces.push(piece(format!(" {} {} ", i + 1, panel.name()), style));
        }
    }
    let used: usize = pieces.iter().map(|(t, _)| width(t)).sum();
    let room = usize::from(columns).saturating_sub(used);
    // Which image the panel is about, also where the panel has the whole screen.
    let name = match model.selected_image() {
        Some(image) if model.table == Table::Images && room > 12 => {
            let name = short_path(model, image);
            let name = if theme.ascii { to_ascii(&name).into_owned() } else { name };
            format!(" {} ", cut_middle(&name, room - 4, theme.cut))
        }
        _ => String::new(),
    };
    pieces.push(piece(theme.rule.repeat(room.saturating_sub(width(&name) + 1)), theme.dim));
    pieces.push(piece(name, theme.title));
    pieces.push(piece(theme.rule, theme.dim));
    pieces
}

/// The panel whose name stands at this column of the row of names.
pub(super) fn tab_at(column: u16) -> Option<Panel> {
    let mut end = 1;
    Panel::ALL.into_iter().find(|panel| {
        end += panel.name().len() + 4;
        usize::from(column) < end
    })
}

/// How many lines the shown panel has.
pub(super) fn line_count(model: &Model) -> usize {
    lines(model, &Theme::new(Look { color: false, ascii: true, mouse: false })).len()
}

/// The lines of the shown panel; on the whole screen nothing is cut, but goes on in the next line.
fn lines<'a>(model: &'a Model, theme: &Theme) -> Lines<'a> {
    let lines = uncut_lines(model, theme);
    if !model.zoomed {
        return lines;
    }
    lines.into_iter().flat_map(|line| wrap_pieces(line, usize::from(model.size.0), theme)).collect()
}

/// A line in as many rows as it takes; the later ones are indented.
fn wrap_pieces<'a>(line: Vec<Piece<'a>>, columns: usize, theme: &Theme) -> Lines<'a> {
    const INDENT: usize = 5;
    let mut rows: Lines = vec![Vec::new()];
    let mut used = 0;
    for (text, style) in line {
        let text = escape(&text).into_owned();
        let mut rest = if theme.ascii { to_ascii(&text).into_owned() } else { text };
        while !rest.is_empty() {
            let room = columns.saturating_sub(used).max(1);
            if width(&rest) <= room {
                used += width(&rest);
                rows.last_mut().into_iter().for_each(|row| row.push((rest.clone().into(), style)));
                break;
            }
            // At a space if there is one in the later half of the room, else where the room ends.
            let end = fitting(&rest, room);
            let at_space = rest[..end].rfind(' ').filter(|at| *at > end / 2);
            let end = at_space.map_or(end, |at| at + 1);
            let tail = rest.split_off(end);
            rows.last_mut().into_iter().for_each(|row| row.push((rest.clone().into(), style)));
            rows.push(vec![piece(" ".repeat(INDENT.min(columns / 2)), style)]);
            used = INDENT.min(columns / 2);
            rest = tail;
        }
    }
    rows
}

/// The length in bytes of what fits into so many columns: at least one character.
pub(super) fn fitting(text: &str, columns: usize) -> usize {
    let mut used = 0;
    let mut end = 0;
    for cluster in text.graphemes(true) {
        used += width(cluster);
        if used > columns && end > 0 {
            break;
        }
        end += cluster.len();
    }
    end
}

fn uncut_lines<'a>(model: &'a Model, theme: &Theme) -> Lines<'a> {
    if model.table == Table::Processes {
        return process(model, theme);
    }
    let Some(image) = model.selected_image() else {
        return if model.panel == Panel::Events { events(model, None, theme) } else { Vec::new() };
    };
    match model.panel {
        Panel::Bytes => bytes(model, image, theme),
        Panel::Holders => holders(model, image, theme),
        Panel::WhatIf => what_if::lines(model, image, theme),
        Panel::Chain => chain_lines(model, image, theme),
        Panel::Events => events(model, Some(image).filter(|_| !model.zoomed), theme),
    }
}

/// The path, and what the header and the file system say.
fn about<'a>(image: &Image, now: Timestamp, theme: &Theme) -> Vec<Piece<'a>> {
    let writers = image.openers.iter().filter(|o| o.mode == OpenMode::Write).count();
    let state = match (image.verdict, writers) {
        // "free" would be true of the locks and false of the image.
        (Verdict::Free, 1..) => "no byte held, OPEN FOR WRITING".to_owned(),
        (Verdict::Stalled, _) => role_text_at(image, now).into_owned(),
        (verdict, _) => verdict.name().to_owned(),
    };
    let mut facts = vec![state, format!("file {}", size(image.file_size))];
    if let Some(backing) = &image.backing_file {
        facts.push(format!("backing {}", escape(backing)));
    }
    facts.push(format!("{} {}", escape(&image.filesystem.kind), escape(&image.filesystem.source)));
    vec![piece(format!(" {}  ", escape_path(&image.path)), theme.title), piece(facts.join(theme.dot), theme.text)]
}

fn bytes<'a>(model: &'a Model, image: &'a Image, theme: &Theme) -> Lines<'a> {
    let mut lines = vec![about(image, model.shown_at(), theme)];
    for finding in &image.findings {
        let style = match finding.severity {
            Severity::Note => theme.text,
            Severity::Warning => theme.warning,
            Severity::Danger => theme.danger,
        };
        lines.push(vec![piece(format!(" {}", finding.text), style)]);
    }
    for byte in &image.bytes {
        lines.extend(byte_lines(model, image, byte, theme));
    }
    for opener in &image.openers {
        let mode = if opener.mode == OpenMode::Write { "writes" } else { "reads" };
        let text = format!(" no lock, {mode:<18} {}  fd {}", process_name(&opener.process), opener.fd);
        lines.push(vec![piece(text, theme.text)]);
    }
    if let Some(snapshot) = &model.snapshot {
        lines.extend(snapshot.troubles.iter().map(|t| vec![piece(format!(" {}", escape(t)), theme.warning)]));
    }
    lines
}

fn byte_lines<'a>(model: &Model, image: &Image, byte: &ByteView, theme: &Theme) -> Lines<'a> {
    let label = format!(" {} {}", byte.byte.offset(), pad_end(&byte.byte.to_string(), 24));
    let whole = |text: &str, style: Style| vec![vec![piece(format!("{label}{text}"), style)]];
    match (byte.state, byte.holders.is_empty()) {
        (ByteState::Free, _) => whole("free", theme.dim),
        (ByteState::Unknown, _) => whole("cannot tell", theme.warning),
        (ByteState::Held, true) => whole("held by somebody who cannot be named", theme.warning),
        (ByteState::Held, false) => {
            let named = byte.holders.iter().filter_map(|i| image.holders.get(*i)).enumerate();
            named
                .map(|(i, holder)| {
                    let label = if i == 0 { label.clone() } else { " ".repeat(width(&label)) };
                    vec![piece(label, theme.held), piece(holder_text(model, holder), theme.text)]
                })
                .collect()
        }
    }
}

/// Name, descriptor, age, unit or container, and what is unusual about the lock.
fn holder_text(model: &Model, holder: &Holder) -> String {
    let process = &holder.process;
    let mut parts = vec![holder_name(holder)];
    parts.extend(holder.fd.map(|fd| format!("fd {fd}")));
    parts.extend(age(model, process));
    parts.extend(holder.foreign.map(|range| format!("foreign lock on {}", range_text(range))));
    if holder.lock == LockKind::Posix {
        parts.push("POSIX".to_owned());
    }
    parts.extend(process.container.as_ref().or(process.unit.as_ref()).map(|p| escape(p).into_owned()));
    parts.join("  ")
}

/// How long a process has run, in steps that do not change while one looks.
fn age(model: &Model, process: &ProcessFacts) -> Option<String> {
    let seconds = model.shown_at().duration_since(process.started?).as_secs().max(0).unsigned_abs();
    Some(match seconds {
        0..60 => "<1m".to_owned(),
        60..3_600 => format!("{}m", seconds / 60),
        _ => span(seconds),
    })
}

fn holders<'a>(model: &'a Model, image: &'a Image, theme: &Theme) -> Lines<'a> {
    let mut lines = Vec::new();
    for holder in &image.holders {
        let what = match holder.foreign {
            Some(range) => format!("foreign lock on {}", range_text(range)),
            None => format!("{} ({}): {}", image.role_of(holder).label(), holder.access, access_text(holder.access)),
        };
        lines.push(vec![
            piece(format!(" {}", holder_name(holder)), theme.title),
            piece(format!("  {what}"), theme.held),
        ]);
        lines.extend(about_process(model, &holder.process, holder.fd, theme));
    }
    for opener in &image.openers {
        let (what, style) = match opener.mode {
            OpenMode::Write => ("has it open for WRITING, NO LOCK", theme.danger),
            OpenMode::Read => ("has it open for reading, no lock", theme.text),
        };
        lines.push(vec![piece(format!(" {}  ", process_name(&opener.process)), theme.title), piece(what, style)]);
        lines.extend(about_process(model, &opener.process, Some(opener.fd), theme));
    }
    if !image.ownerless().is_empty() {
        let text = format!(" held, but by nobody that can be named: {}", access_text(image.ownerless()));
        lines.push(vec![piece(text, theme.warning)]);
    }
    if lines.is_empty() {
        let all_seen = model.snapshot.as_ref().is_some_and(|s| s.complete);
        let text =
            if all_seen { " nobody holds it, and nobody has it open" } else { " nobody that can be seen has it open" };
        lines.push(vec![piece(text, theme.dim)]);
    }
    lines
}

fn about_process<'a>(model: &Model, process: &ProcessFacts, fd: Option<i32>, theme: &Theme) -> Lines<'a> {
    let mut facts = vec![format!("user {}", escape(&process.user)), format!("parent {}", process.parent)];
    facts.extend(fd.map(|fd| format!("fd {fd}")));
    facts.extend(age(model, process).map(|a| format!("runs for {a}")));
    facts.extend(process.unit.as_ref().map(|u| format!("unit {}", escape(u))));
    facts.extend(process.container.as_ref().map(|c| format!("container {}", escape(c))));
    vec![
        vec![piece(format!("   {}", facts.join(theme.dot)), theme.text)],
        vec![piece(format!("   {}", escape(&process.command_line)), theme.dim)],
        vec![piece(format!("   more: {}", advice(process).inspect), theme.dim)],
    ]
}

/// Everything that stands on an image, directly or on another overlay, with its height above it; each once.
fn overlays_of<'a>(snapshot: &'a Snapshot, image: &Image) -> Vec<(usize, &'a Image)> {
    let mut found: Vec<(usize, &Image)> = Vec::new();
    let mut level = vec![image.file];
    for height in 1.. {
        let stands_on = |i: &&Image| i.backing.as_ref().and_then(|b| b.file).is_some_and(|f| level.contains(&f));
        let new = |i: &&Image| i.file != image.file && found.iter().all(|(_, known)| known.path != i.path);
        let next: Vec<&Image> = snapshot.images.iter().filter(stands_on).filter(new).collect();
        if next.is_empty() {
            break;
        }
        level = next.iter().map(|i| i.file).collect();
        found.extend(next.into_iter().map(|i| (height, i)));
    }
    found
}

fn chain_lines<'a>(model: &'a Model, image: &'a Image, theme: &Theme) -> Lines<'a> {
    let Some(snapshot) = &model.snapshot else { return Vec::new() };
    let state = |i: &Image| {
        let holders = holders_text(i);
        let role = role_text_at(i, model.shown_at());
        if holders.is_empty() { role.into_owned() } else { format!("{role}  {holders}") }
    };
    let mut lines = Vec::new();
    let overlays = overlays_of(snapshot, image);
    for (height, overlay) in overlays.iter().rev() {
        lines.push(vec![
            piece(format!("  +{height} {}", short_path(model, overlay)), theme.text),
            piece(format!("  stands on it   {}", state(overlay)), theme.dim),
        ]);
    }
    lines.push(vec![
        piece(format!(" > {}", short_path(model, image)), theme.title),
        piece(format!("   {}", state(image)), theme.text),
    ]);
    let below = chain(snapshot, image);
    for (depth, below) in below.iter().enumerate() {
        let depth = depth + 1;
        lines.push(match below {
            Ok(link) => vec![
                piece(format!("  -{depth} {} {}", theme.below, short_path(model, link.image)), theme.text),
                piece(format!("   {}", state(link.image)), theme.dim),
            ],
            Err(why) => vec![piece(format!("  -{depth} {} {why}", theme.below), theme.warning)],
        });
    }
    if overlays.is_empty() && below.is_empty() {
        lines.push(vec![piece("   no backing file, and none of the watched images stands on it", theme.dim)]);
    } else {
        lines.push(vec![piece(
            format!("   {} above, {} below", overlays.len(), below.iter().filter(|l| l.is_ok()).count()),
            theme.dim,
        )]);
    }
    lines
}

/// What happened to the selected image; on the whole screen to all of them, also to those that are gone.
fn events<'a>(model: &'a Model, image: Option<&'a Image>, theme: &Theme) -> Lines<'a> {
    let concerns = |path: &Option<PathBuf>| path.as_ref().is_none_or(|p| image.is_none_or(|i| *p == *i.path));
    let today = model.shown_at().to_zoned(model.zone.clone()).date();
    let line = |change: &crate::monitor::change::Change| {
        let at = change.at.to_zoned(model.zone.clone());
        let time = at.strftime(if at.date() == today { "%T" } else { "%m-%d %T" }).to_string();
        let about = match (&change.image, image) {
            (Some(path), None) => format!("{}: ", short_name(model, path)),
            _ => String::new(),
        };
        let (word, style) = match change.kind {
            ChangeKind::Gap => ("MAY HAVE MISSED: ", theme.warning),
            ChangeKind::FindingCleared => ("no longer: ", theme.dim),
            ChangeKind::Finding => ("", theme.warning),
            _ => ("", theme.text),
        };
        vec![piece(format!(" {time}  "), theme.dim), piece(format!("{about}{word}{}", change.text), style)]
    };
    let shown = model.frozen.as_ref().map_or(model.events.len(), |f| f.events);
    let lines: Lines = model.events.iter().take(shown).rev().filter(|c| concerns(&c.image)).map(line).collect();
    if lines.is_empty() {
        vec![vec![piece(" nothing has happened since this program started", theme.dim)]]
    } else {
        lines
    }
}

/// What the selected process uses.
fn process<'a>(model: &'a Model, theme: &Theme) -> Lines<'a> {
    let rows = model.processes();
    let Some(row) = model.cursor().and_then(|at| rows.get(at)) else { return Vec::new() };
    let mut lines = vec![vec![piece(format!(" {}", process_name(row.process)), theme.title)]];
    lines.extend(about_process(model, row.process, None, theme));
    for (image, access, mode) in &row.uses {
        let what = match (access.is_empty(), mode) {
            (true, Some(OpenMode::Write)) => piece("WRITES, NO LOCK", theme.danger),
            (true, Some(OpenMode::Read)) => piece("reads, no lock", theme.text),
            (true, None) => piece("foreign lock", theme.warning),
            (false, _) => piece(format!("{access}: {}", access_text(*access)), theme.held),
        };
        lines.push(vec![piece(format!(" {}  ", short_path(model, image)), theme.text), what]);
    }
    lines
}
