//! The list of keys, and what the marks mean.

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;

use super::{Piece, Theme, put};
use crate::text::pad_end;
use crate::tui::keymap::KEYMAP;

const MARKS: [(&str, &str); 6] = [
    (".", "free: nobody on any host holds the byte"),
    ("#", "held by one process; 2 to 9: by so many, + by more"),
    ("!", "held, but nobody can be named"),
    ("?", "cannot be told"),
    ("C W U R", "consistent read, write, write unchanged, resize"),
    ("G", "graph-mod: QEMU 6.2 and older only"),
];

pub(super) fn draw(theme: &Theme, buffer: &mut Buffer, area: Rect) {
    let mut lines: Vec<Vec<Piece>> = vec![vec![(" Keys".into(), theme.heading)]];
    let entry = |key: &str, text: &'static str| {
        vec![(format!(" {}", pad_end(key, 9)).into(), theme.key), (text.into(), theme.text)]
    };
    lines.extend(KEYMAP.iter().map(|b| entry(b.label, b.help)));
    lines.push(vec![(" Marks".into(), theme.heading)]);
    lines.extend(MARKS.iter().map(|(mark, text)| entry(mark, text)));
    for (row, pieces) in (0u16..area.height).zip(&lines) {
        put(buffer, theme, area, row, pieces);
    }
}
