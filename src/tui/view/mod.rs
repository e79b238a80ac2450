//! What does the model look like?
//!
//! Model in, cells out; a file a panel. Nothing here decides anything.

mod frame;
mod images;
mod overlay;
mod panels;
mod processes;
mod test_lock;
mod what_if;

use std::borrow::Cow;

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::style::Style;
use ratatui::text::{Line, Span};

use super::model::{Model, Panel, Table};
use super::theme::Theme;
use crate::text::{cut_end, escape, to_ascii, width};

/// The smallest terminal that shows anything but a sentence.
pub const SMALLEST: (u16, u16) = (40, 10);
/// What a panel needs to show the ten bytes: its names, the path, a byte a row.
const PANEL_ROWS: u16 = 12;
/// The two rows of headings above a table.
const HEAD_ROWS: u16 = 2;

/// Where everything is.
struct Places {
    title: Rect,
    /// What must not be overlooked: frozen, or the worst finding.
    banner: Option<Rect>,
    table: Option<Rect>,
    panel: Option<Rect>,
    filter: Option<Rect>,
    bar: Rect,
}

/// What a click is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// A row of the table.
    Row(usize),
    /// The name of a panel.
    Panel(Panel),
    /// Somewhere else in the panel.
    InPanel,
}

fn places(model: &Model) -> Option<Places> {
    let (columns, rows) = model.size;
    if columns < SMALLEST.0 || rows < SMALLEST.1 {
        return None;
    }
    let strip = |y, height| Rect::new(0, y, columns, height);
    let banner = frame::has_banner(model);
    let filter = model.typing || model.filter.is_active();
    let first = 1 + u16::from(banner);
    let room = rows - first - 1 - u16::from(filter);
    // The table gets what it needs, at most what leaves enough for the ten bytes below. What the panel says does not move
    // the rule between them.
    let needs = u16::try_from(model.row_count()).unwrap_or(u16::MAX).max(1).saturating_add(HEAD_ROWS);
    let table = match (model.zoomed, rows < 16) {
        (true, _) => 0,
        (false, true) => room,
        (false, false) => needs.min(room.saturating_sub(PANEL_ROWS).max(HEAD_ROWS + 3)),
    };
    Some(Places {
        title: strip(0, 1),
        banner: banner.then(|| strip(1, 1)),
        table: (table > 0).then(|| strip(first, table)),
        panel: (table < room).then(|| strip(first + table, room - table)),
        filter: filter.then(|| strip(rows - 2, 1)),
        bar: strip(rows - 1, 1),
    })
}

/// How many rows the table can show at once.
#[must_use]
pub fn table_rows(model: &Model) -> usize {
    let height = places(model).and_then(|p| p.table).map_or(0, |t| t.height);
    height.saturating_sub(HEAD_ROWS).into()
}

/// How far a key for a whole page goes.
#[must_use]
pub fn page(model: &Model) -> usize {
    if model.zoomed { panel_room(model) } else { table_rows(model) }
}

/// Lines that the panel has room for, below its rule.
fn panel_room(model: &Model) -> usize {
    places(model).and_then(|p| p.panel).map_or(0, |p| p.height.saturating_sub(1).into())
}

/// The last line at which a panel may begin and still fill its room.
#[must_use]
pub fn lowest_scroll(model: &Model) -> usize {
    if model.scroll == 0 { 0 } else { panels::line_count(model).saturating_sub(panel_room(model)) }
}

/// The last line at which the help may begin.
#[must_use]
pub fn lowest_help(model: &Model) -> usize {
    let (columns, rows) = model.size;
    overlay::help_overhang((columns, rows.saturating_sub(u16::from(!model.own_locks.is_empty()))))
}

/// What is at this place of the screen.
#[must_use]
pub fn target(model: &Model, column: u16, row: u16) -> Option<Target> {
    if model.overlay.is_some() {
        return None;
    }
    let places = places(model)?;
    if let Some(table) = places.table.filter(|t| row >= t.y + HEAD_ROWS && row < t.bottom()) {
        let at = model.top + usize::from(row - table.y - HEAD_ROWS);
        return (at < model.row_count()).then_some(Target::Row(at));
    }
    let panel = places.panel.filter(|p| row >= p.y && row < p.bottom())?;
    let named = panels::tab_at(column).filter(|_| row == panel.y && model.table == Table::Images);
    Some(named.map_or(Target::InPanel, Target::Panel))
}

/// Draws the whole screen.
pub fn draw(model: &Model, theme: &Theme, buffer: &mut Buffer) {
    let Some(places) = places(model) else {
        too_small(model, theme, buffer);
        return;
    };
    frame::title(model, theme, buffer, places.title);
    if let Some(area) = places.banner {
        frame::banner(model, theme, buffer, area);
    }
    if let Some(area) = places.table {
        match model.table {
            Table::Images => images::draw(model, theme, buffer, area),
            Table::Processes => processes::draw(model, theme, buffer, area),
        }
    }
    if let Some(area) = places.panel {
        panels::draw(model, theme, buffer, area);
    }
    if model.overlay.is_some() {
        // What counts down stays in sight.
        let banner = places.banner.filter(|_| !model.own_locks.is_empty());
        let top = banner.unwrap_or(places.title).bottom();
        overlay::draw(model, theme, buffer, Rect::new(0, top, model.size.0, places.bar.y - top));
    }
    if let Some(area) = places.filter {
        frame::filter(model, theme, buffer, area);
    }
    frame::bar(model, theme, buffer, places.bar);
}

/// One plain sentence, over as many rows as it takes.
fn too_small(model: &Model, theme: &Theme, buffer: &mut Buffer) {
    let ((columns, rows), (least_columns, least_rows)) = (model.size, SMALLEST);
    let sentence = format!("{columns}x{rows} is too small: qlock-top needs {least_columns}x{least_rows}");
    for (row, line) in (0u16..).zip(wrap(&sentence, columns.into())) {
        put(buffer, theme, buffer.area, row, &[(line.into(), theme.text)]);
    }
}

/// `text` in lines of at most `columns` columns, broken at spaces where there are any.
fn wrap(text: &str, columns: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ').flat_map(|word| pieces_of(word, columns)) {
        match lines.last_mut() {
            Some(line) if line.is_empty() => line.push_str(word),
            Some(line) if width(line) + 1 + width(word) <= columns => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

/// A word in parts that each fit into a line.
fn pieces_of(word: &str, columns: usize) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = word;
    while width(rest) > columns.max(1) {
        let (part, tail) = rest.split_at(panels::fitting(rest, columns.max(1)));
        parts.push(part);
        rest = tail;
    }
    parts.push(rest);
    parts
}

type Piece<'a> = (Cow<'a, str>, Style);

/// A piece of text that is made while drawing.
fn piece<'a>(text: impl Into<Cow<'a, str>>, style: Style) -> Piece<'a> {
    (text.into(), style)
}

/// Writes pieces of text into row `row` of `area`, cut at its end.
fn put(buffer: &mut Buffer, theme: &Theme, area: Rect, row: u16, pieces: &[Piece]) {
    if row >= area.height {
        return;
    }
    let mut room = usize::from(area.width);
    let mut spans = Vec::new();
    for (text, style) in pieces {
        // What others wrote is escaped where it is put into words; this is the last door before the terminal.
        let text = escape(text);
        let text = if theme.ascii { Cow::Owned(to_ascii(&text).into_owned()) } else { text };
        let shown = cut_end(&text, room, theme.cut).into_owned();
        room -= width(&shown).min(room);
        spans.push(Span::styled(shown, *style));
    }
    buffer.set_line(area.x, area.y + row, &Line::from(spans), area.width);
}

/// Lays the style of the selection over a row.
fn mark_selected(buffer: &mut Buffer, theme: &Theme, area: Rect, row: u16) {
    buffer.set_style(Rect { y: area.y + row, height: 1, ..area }, theme.selected);
}
