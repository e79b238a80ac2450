//! What stands around the tables: title, banner, filter line and bar of keys.

use std::path::Path;

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;

use super::{Model, Piece, Theme, piece, put};
use crate::monitor::finding::Severity;
use crate::monitor::snapshot::Image;
use crate::text::{counted, cut_middle, escape, escape_path, pad_end, span, to_ascii, width};
use crate::tui::keymap::KEYMAP;
use crate::tui::model::{Overlay, Panel, Table};
use crate::tui::sort::{Column, Order};
use crate::tui::test_lock::{Stage, seconds_left};

pub(super) fn title(model: &Model, theme: &Theme, buffer: &mut Buffer, area: Rect) {
    let Some(snapshot) = &model.snapshot else {
        let text = format!(" qlock-top  {}   looking ..", escape(&model.title));
        put(buffer, theme, area, 0, &[piece(text, theme.title)]);
        return;
    };
    let images = &snapshot.images;
    let in_use = images.iter().filter(|i| !i.held().is_empty() || !i.openers.is_empty()).count();
    let severity = |s| move |i: &&Image| i.findings.iter().any(|f| f.severity == s);
    let dangers = images.iter().filter(severity(Severity::Danger)).count();
    let unclear = images.iter().filter(|i| !i.verdict.is_certain()).count();
    let mut counts = vec![(counted(images.len(), "image", "images"), theme.title)];
    counts.push((format!("{in_use} in use"), theme.title));
    if dangers > 0 {
        counts.push((counted(dangers, "danger", "dangers"), theme.danger));
    }
    if unclear > 0 {
        counts.push((format!("{unclear} unclear"), theme.warning));
    }
    let mut right = vec![format!("{} s", model.interval.as_secs_f64())];
    let stale = model.staleness();
    if let Some(age) = stale {
        right.push(format!("STALE: looked {} ago", span(age.unsigned_abs())));
    }
    if snapshot.hidden_processes > 0 {
        right.push(format!("{} hidden", counted(snapshot.hidden_processes, "process", "processes")));
    } else if !snapshot.complete {
        right.push("incomplete".to_owned());
    }
    let right = right.join(theme.dot);
    let counted_width = counts.iter().map(|(c, _)| width(c) + width(theme.dot)).sum::<usize>();
    let rest = usize::from(area.width).saturating_sub(counted_width + width(&right) + 4);
    let name = format!(" qlock-top  {}:{}", escape(&snapshot.host), escape(&model.title));
    let name = if theme.ascii { to_ascii(&name).into_owned() } else { name };
    let name = cut_middle(&name, rest.max(10), theme.cut).into_owned();
    let mut pieces: Vec<Piece> = vec![piece(name, theme.title), piece("   ", theme.text)];
    for (i, (text, style)) in counts.into_iter().enumerate() {
        if i > 0 {
            pieces.push(piece(theme.dot, theme.dim));
        }
        pieces.push(piece(text, style));
    }
    let used: usize = pieces.iter().map(|(t, _)| width(t)).sum();
    let gap = usize::from(area.width).saturating_sub(used + width(&right) + 1);
    pieces.push(piece(" ".repeat(gap.max(2)), theme.text));
    let style = if stale.is_some() {
        theme.danger
    } else if snapshot.complete {
        theme.dim
    } else {
        theme.warning
    };
    pieces.push(piece(right, style));
    put(buffer, theme, area, 0, &pieces);
}

/// Whether there is something that must not be overlooked.
pub(super) fn has_banner(model: &Model) -> bool {
    !model.own_locks.is_empty()
        || model.frozen.is_some()
        || model.findings().first().is_some_and(|(_, f)| f.severity > Severity::Note)
}

pub(super) fn banner(model: &Model, theme: &Theme, buffer: &mut Buffer, area: Rect) {
    // A lock of our own comes first: it may be what refuses somebody right now.
    if let Some(first) = model.own_locks.iter().min_by_key(|l| l.until) {
        let left = span(seconds_left(first, model.now));
        let what = match model.own_locks.len() {
            1 => format!("TEST LOCK {} on ", first.access),
            n => format!("{n} TEST LOCKS, next "),
        };
        let name = short_name(model, &first.key.0);
        let keys = if area.width < 60 { String::new() } else { format!("{}u lets go, U all", theme.dot) };
        let end = format!("  ends in {left}{keys} ");
        let frozen = if model.frozen.is_some() { "FROZEN, " } else { "" };
        let room = usize::from(area.width).saturating_sub(width(&end) + width(frozen) + width(&what) + 1);
        let name = if theme.ascii { to_ascii(&name) } else { name.into() };
        let text = format!(" {frozen}{what}{}{end}", cut_middle(&name, room.max(4), theme.cut));
        put(buffer, theme, area, 0, &[piece(pad_end(&text, area.width.into()), theme.own_lock)]);
        return;
    }
    if let Some(frozen) = &model.frozen {
        let age = span(model.now.duration_since(frozen.since).as_secs().unsigned_abs());
        let missed = counted(frozen.missed, "change", "changes");
        let text = format!(" FROZEN for {age}{dot}{missed} since{dot}space goes on", dot = theme.dot);
        put(buffer, theme, area, 0, &[piece(pad_end(&text, area.width.into()), theme.frozen)]);
        return;
    }
    let findings = model.findings();
    let Some((image, worst)) = findings.first() else { return };
    let (word, style) = match worst.severity {
        Severity::Danger => ("DANGER", theme.danger),
        _ => ("warning", theme.warning),
    };
    let about = image.map(|i| format!("{}: ", short_path(model, i))).unwrap_or_default();
    let more = match findings.len() - 1 {
        0 => String::new(),
        n => format!("  (f: {n} more)"),
    };
    let room = usize::from(area.width).saturating_sub(width(word) + 3 + width(&more));
    let text = format!("{about}{}", worst.text);
    let text = if theme.ascii { to_ascii(&text).into_owned() } else { text };
    let text = crate::text::cut_end(&text, room, theme.cut).into_owned();
    put(buffer, theme, area, 0, &[piece(format!(" {word} "), style), piece(text, theme.text), piece(more, theme.dim)]);
}

/// The path below the directory that is watched, if there is only one.
pub(super) fn short_path(model: &Model, image: &Image) -> String {
    short_name(model, &image.path)
}

pub(super) fn short_name(model: &Model, path: &Path) -> String {
    let below = path.strip_prefix(&model.title).ok().filter(|p| !p.as_os_str().is_empty());
    escape_path(below.unwrap_or(path)).into_owned()
}

pub(super) fn filter(model: &Model, theme: &Theme, buffer: &mut Buffer, area: Rect) {
    let cursor = if model.typing { "_" } else { "" };
    let (total, shown) = (model.images().len(), model.rows.len());
    let mut pieces =
        vec![piece(" filter ", theme.key), piece(format!("/{}{cursor}", model.filter.text()), theme.title)];
    if let Some(error) = model.filter.error() {
        pieces.push(piece(format!("  {error}"), theme.warning));
    }
    pieces.push(piece(format!("   {shown} of {total} shown"), theme.dim));
    if model.filter.error().is_none() {
        pieces
            .push(piece(if model.typing { "   Enter keeps it, Esc clears it" } else { "   Esc clears it" }, theme.dim));
    }
    put(buffer, theme, area, 0, &pieces);
}

pub(super) fn bar(model: &Model, theme: &Theme, buffer: &mut Buffer, area: Rect) {
    if let Some(note) = &model.note {
        put(buffer, theme, area, 0, &[piece(format!(" {note}"), theme.title)]);
        return;
    }
    let mut pieces: Vec<Piece> = Vec::new();
    let hint = match &model.overlay {
        Some(Overlay::Help(_)) => Some(" Up Down scroll   Esc or ? goes back"),
        Some(Overlay::Findings(_)) => Some(" Enter goes to the image   Esc goes back"),
        Some(Overlay::TestLock(d)) => Some(match (d.stage, d.by_bytes) {
            (Stage::Choose, false) => " Enter goes on   Tab bytes one by one   Esc goes back",
            (Stage::Choose, true) => " space toggles   Enter goes on   Tab programs   Esc goes back",
            (Stage::Decide { .. }, _) => " Enter does it   + - longer or shorter   Esc goes back",
            (Stage::Confirm { .. }, _) => " Enter answers   Esc goes back",
        }),
        Some(Overlay::Copy { .. }) => Some(" Enter or a number copies   Esc goes back"),
        None if model.zoomed && model.panel == Panel::Events => {
            Some(" what happened to every image   Up Down scroll   Tab next panel   Esc goes back")
        }
        None if model.zoomed => Some(" Up Down scroll   Tab next panel   Esc goes back"),
        None => None,
    };
    if let Some(hint) = hint {
        put(buffer, theme, area, 0, &[piece(hint, theme.dim)]);
        return;
    }
    for binding in KEYMAP.iter().filter(|b| !b.name.is_empty() && b.is_valid(model)) {
        let name = match binding.name {
            "sort" => sort_name(model),
            "processes" if model.table == Table::Processes => "images".to_owned(),
            "freeze" if model.frozen.is_some() => "go on".to_owned(),
            name => name.to_owned(),
        };
        pieces.push(piece(format!(" {}", binding.label), theme.key));
        pieces.push(piece(format!(" {name} "), theme.dim));
    }
    put(buffer, theme, area, 0, &pieces);
}

fn sort_name(model: &Model) -> String {
    let direction = if model.sort.order == Order::Reversed { " reversed" } else { "" };
    match model.sort.column {
        Column::Problems => format!("sort: problems{direction}"),
        column => format!("sort: {}{direction}", column.name()),
    }
}
