//! What does the model look like?
//!
//! Model in, cells out; a file a panel. Nothing here decides anything.

mod detail;
mod help;
mod images;

use std::borrow::Cow;

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::style::Style;
use ratatui::text::{Line, Span};

use super::keymap::KEYMAP;
use super::model::Model;
use super::theme::Theme;
use crate::monitor::finding::Severity;
use crate::monitor::snapshot::{Image, Verdict};
use crate::text::{counted, cut_end, cut_middle, escape, to_ascii, width};

/// The smallest terminal that shows anything but a sentence.
pub const SMALLEST: (u16, u16) = (40, 10);
const HEAD_ROWS: u16 = 3;
const BAR_ROWS: u16 = 1;

/// Where the panels are.
struct Places {
    title: Rect,
    table: Rect,
    detail: Option<Rect>,
    bar: Rect,
}

fn places(model: &Model) -> Option<Places> {
    let (columns, rows) = model.size;
    if columns < SMALLEST.0 || rows < SMALLEST.1 {
        return None;
    }
    let room = rows - BAR_ROWS - 1;
    // The table gets what it needs, at most what leaves half of a small screen or a dozen rows of a large one for the
    // panel below. What the panel says does not move the rule between them.
    let needs = u16::try_from(model.images().len()).unwrap_or(u16::MAX).max(1).saturating_add(HEAD_ROWS - 1);
    let table = if rows < 16 { room } else { needs.min((room / 2).max(room.saturating_sub(12))) };
    let detail = room - table;
    Some(Places {
        title: Rect::new(0, 0, columns, 1),
        table: Rect::new(0, 1, columns, table),
        detail: (detail > 0).then(|| Rect::new(0, 1 + table, columns, detail)),
        bar: Rect::new(0, rows - 1, columns, 1),
    })
}

/// How many images the table can show at once.
#[must_use]
pub fn table_rows(model: &Model) -> usize {
    places(model).map_or(0, |p| usize::from(p.table.height.saturating_sub(HEAD_ROWS - 1)))
}

/// Draws the whole screen.
pub fn draw(model: &Model, theme: &Theme, buffer: &mut Buffer) {
    let Some(places) = places(model) else {
        too_small(model, theme, buffer);
        return;
    };
    title(model, theme, buffer, places.title);
    if model.help {
        let all = Rect::new(0, 1, model.size.0, model.size.1 - 1 - BAR_ROWS);
        help::draw(theme, buffer, all);
    } else {
        images::draw(model, theme, buffer, places.table);
        if let Some(area) = places.detail {
            detail::draw(model, theme, buffer, area);
        }
    }
    bar(theme, buffer, places.bar);
}

/// One plain sentence, over as many rows as it takes.
fn too_small(model: &Model, theme: &Theme, buffer: &mut Buffer) {
    let ((columns, rows), (least_columns, least_rows)) = (model.size, SMALLEST);
    let sentence = format!("{columns}x{rows} is too small: qlock-top needs {least_columns}x{least_rows}");
    let mut lines = vec![String::new()];
    for word in sentence.split(' ') {
        if let Some(line) = lines.last_mut().filter(|l| l.is_empty() || l.len() + 1 + word.len() <= columns.into()) {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        } else {
            lines.push(word.to_owned());
        }
    }
    for (row, line) in (0u16..).zip(lines) {
        put(buffer, theme, buffer.area, row, &[(line.into(), theme.text)]);
    }
}

type Piece<'a> = (Cow<'a, str>, Style);

/// Writes pieces of text into row `row` of `area`, cut at its end.
fn put(buffer: &mut Buffer, theme: &Theme, area: Rect, row: u16, pieces: &[Piece]) {
    if row >= area.height {
        return;
    }
    let mut room = usize::from(area.width);
    let mut spans = Vec::new();
    for (text, style) in pieces {
        let text = if theme.ascii { to_ascii(text) } else { Cow::Borrowed(text.as_ref()) };
        let shown = cut_end(&text, room, theme.cut).into_owned();
        room -= width(&shown).min(room);
        spans.push(Span::styled(shown, *style));
    }
    buffer.set_line(area.x, area.y + row, &Line::from(spans), area.width);
}

fn title(model: &Model, theme: &Theme, buffer: &mut Buffer, area: Rect) {
    let Some(snapshot) = &model.snapshot else {
        let text = format!(" qlock-top  {}   looking ..", escape(&model.title));
        put(buffer, theme, area, 0, &[(text.into(), theme.title)]);
        return;
    };
    let images = &snapshot.images;
    let in_use = images.iter().filter(|i| i.verdict != Verdict::Free || !i.openers.is_empty()).count();
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
    let mut pieces: Vec<Piece> = vec![(name.into(), theme.title), ("   ".into(), theme.text)];
    for (i, (text, style)) in counts.into_iter().enumerate() {
        if i > 0 {
            pieces.push((theme.dot.into(), theme.dim));
        }
        pieces.push((text.into(), style));
    }
    let used: usize = pieces.iter().map(|(t, _)| width(t)).sum();
    let gap = usize::from(area.width).saturating_sub(used + width(&right) + 1);
    pieces.push((" ".repeat(gap).into(), theme.text));
    pieces.push((right.into(), if snapshot.complete { theme.dim } else { theme.warning }));
    put(buffer, theme, area, 0, &pieces);
}

fn bar(theme: &Theme, buffer: &mut Buffer, area: Rect) {
    let mut pieces: Vec<Piece> = Vec::new();
    for binding in KEYMAP.iter().filter(|b| !b.name.is_empty()) {
        pieces.push((format!(" {}", binding.label).into(), theme.key));
        pieces.push((format!(" {} ", binding.name).into(), theme.dim));
    }
    put(buffer, theme, area, 0, &pieces);
}
