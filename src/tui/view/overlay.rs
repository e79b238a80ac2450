//! The lists that lie over the tables: keys and marks, findings, things to copy.

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;

use super::frame::short_path;
use super::{Model, Piece, Theme, mark_selected, piece, put};
use crate::monitor::finding::Severity;
use crate::text::{pad_end, width};
use crate::tui::clip::Clip;
use crate::tui::keymap::{KEYMAP, TYPING};
use crate::tui::model::Overlay;

const MARKS: [(&str, &str); 7] = [
    (".", "free: nobody on any host holds the byte"),
    ("#", "held by one process; 2 to 9: by so many, + by more"),
    ("!", "held, but nobody can be named"),
    ("?", "cannot be told"),
    ("! ~ ?", "before a name: danger, a writer without a lock, cannot tell"),
    ("C W U R", "consistent read, write, write unchanged, resize"),
    ("G", "graph-mod: QEMU 6.2 and older only"),
];

pub(super) fn draw(model: &Model, theme: &Theme, buffer: &mut Buffer, area: Rect) {
    for y in area.top()..area.bottom() {
        for x in area.left()..area.right() {
            buffer[(x, y)].reset();
        }
    }
    match &model.overlay {
        Some(Overlay::Help(top)) => help(theme, buffer, area, *top),
        Some(Overlay::Findings(row)) => findings(model, theme, buffer, area, *row),
        Some(Overlay::TestLock(dialog)) => super::test_lock::draw(model, dialog, theme, buffer, area),
        Some(Overlay::Copy { clips, row }) => copies(clips, theme, buffer, area, *row),
        None => {}
    }
}

fn help_lines(theme: &Theme) -> Vec<Vec<Piece<'static>>> {
    let entry = |key: &str, text: &'static str| {
        vec![piece(format!(" {}", pad_end(key, 10)), theme.key), piece(text, theme.text)]
    };
    let heading = |text: &'static str| vec![piece(text, theme.heading)];
    let mut lines = vec![heading(" Keys")];
    lines.extend(KEYMAP.iter().filter(|b| !b.help.is_empty()).map(|b| entry(b.label, b.help)));
    lines.push(heading(" While a filter is typed"));
    lines.extend(TYPING.iter().map(|(key, text)| entry(key, text)));
    lines.push(heading(" Marks"));
    lines.extend(MARKS.iter().map(|(mark, text)| entry(mark, text)));
    lines
}

/// A column narrower than this would cut most lines.
const HELP_COLUMN: usize = 58;

/// How many lines of the help do not fit a screen of this size.
pub(super) fn help_overhang(size: (u16, u16)) -> usize {
    let theme = Theme::new(crate::tui::Look { color: false, ascii: true, mouse: false });
    let rows = usize::from(size.1.saturating_sub(2));
    let columns = (usize::from(size.0) / HELP_COLUMN).max(1);
    help_lines(&theme).len().saturating_sub(rows * columns)
}

/// Keys and marks, in as many columns as fit.
fn help(theme: &Theme, buffer: &mut Buffer, area: Rect, top: usize) {
    let lines = help_lines(theme);
    let columns = (usize::from(area.width) / HELP_COLUMN).max(1);
    let width = usize::from(area.width) / columns;
    for (i, column) in lines[top.min(lines.len())..].chunks(usize::from(area.height).max(1)).take(columns).enumerate() {
        let x = u16::try_from(i * width).unwrap_or(u16::MAX);
        let place = Rect { x: area.x + x, width: u16::try_from(width - 1).unwrap_or(area.width), ..area };
        for (row, pieces) in (0u16..).zip(column) {
            put(buffer, theme, place, row, pieces);
        }
    }
}

fn findings(model: &Model, theme: &Theme, buffer: &mut Buffer, area: Rect, selected: usize) {
    let all = model.findings();
    put(buffer, theme, area, 0, &[piece(format!(" {} findings, worst first", all.len()), theme.heading)]);
    let body = Rect { y: area.y + 1, height: area.height.saturating_sub(1), ..area };
    if all.is_empty() {
        put(buffer, theme, body, 0, &[piece(" nothing to report", theme.dim)]);
    }
    let top = (selected + 1).saturating_sub(body.height.into());
    for (row, (i, (image, finding))) in (0u16..body.height).zip(all.iter().enumerate().skip(top)) {
        let (word, style) = match finding.severity {
            Severity::Danger => ("DANGER ", theme.danger),
            Severity::Warning => ("warning", theme.warning),
            Severity::Note => ("note   ", theme.dim),
        };
        let about = image.map(|i| format!("{}: ", short_path(model, i))).unwrap_or_default();
        let mark = if i == selected { ">" } else { " " };
        let pieces = [piece(format!("{mark}{word}"), style), piece(format!(" {about}{}", finding.text), theme.text)];
        put(buffer, theme, body, row, &pieces);
        if i == selected {
            mark_selected(buffer, theme, body, row);
        }
    }
    // What did not fit in its row is told in full at the bottom.
    if let Some((_, finding)) = all.get(selected).filter(|(_, f)| width(&f.text) + 20 > usize::from(area.width)) {
        let lines = super::wrap(&finding.text, usize::from(area.width).saturating_sub(2));
        let height = u16::try_from(lines.len()).unwrap_or(u16::MAX);
        if usize::from(body.height) > all.len() + lines.len() {
            let place = Rect { y: area.bottom() - height, height, ..area };
            for (row, line) in (0u16..).zip(lines) {
                put(buffer, theme, place, row, &[piece(format!(" {line}"), theme.text)]);
            }
        }
    }
}

fn copies(clips: &[Clip], theme: &Theme, buffer: &mut Buffer, area: Rect, selected: usize) {
    let heading = " Copy to the clipboard of your terminal (OSC 52); nothing is run";
    put(buffer, theme, area, 0, &[piece(heading, theme.heading)]);
    let body = Rect { y: area.y + 1, height: area.height.saturating_sub(1), ..area };
    if clips.is_empty() {
        put(buffer, theme, body, 0, &[piece(" no row is selected", theme.dim)]);
    }
    // The selected one in full, so that one sees what will be typed.
    let columns = usize::from(area.width).saturating_sub(3);
    let full = clips.get(selected).map(|c| super::wrap(&c.text, columns)).unwrap_or_default();
    let height = u16::try_from(full.len()).unwrap_or(u16::MAX).min(body.height.saturating_sub(2).min(8));
    let list = Rect { height: body.height.saturating_sub(height + 1), ..body };
    let top = (selected + 1).saturating_sub(list.height.into());
    for (row, (i, clip)) in (0u16..list.height).zip(clips.iter().enumerate().skip(top)) {
        let mark = if i == selected { ">" } else { " " };
        let pieces =
            [piece(format!("{mark}{} {}  ", i + 1, clip.name), theme.key), piece(clip.text.as_str(), theme.dim)];
        put(buffer, theme, list, row, &pieces);
        if i == selected {
            mark_selected(buffer, theme, list, row);
        }
    }
    let below = Rect { y: body.bottom() - height, height, ..body };
    for (row, line) in (0u16..).zip(full) {
        put(buffer, theme, below, row, &[piece(format!("   {line}"), theme.text)]);
    }
}
