//! The dialog for a test lock: what to take, what that would do, and the choice between asking and taking.

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;

use super::frame::short_name;
use super::{Model, Theme, mark_selected, piece, put, wrap};
use crate::protocol::LockByte;
use crate::text::{pad_end, span};
use crate::tui::test_lock::{Stage, TestLock};

pub(super) fn draw(model: &Model, dialog: &TestLock, theme: &Theme, buffer: &mut Buffer, area: Rect) {
    let name = short_name(model, &dialog.key.0);
    let question = match dialog.stage {
        Stage::Choose if dialog.by_bytes => format!(" Test lock on {name}: which bytes?"),
        Stage::Choose => format!(" Test lock on {name}: as which program?"),
        Stage::Decide { .. } => format!(" Test lock on {name}: ask, or take it?"),
        Stage::Confirm { .. } => format!(" {name} IS IN USE: take a test lock all the same?"),
    };
    let style = if matches!(dialog.stage, Stage::Confirm { .. }) { theme.danger } else { theme.heading };
    put(buffer, theme, area, 0, &[piece(question, style)]);

    let columns = usize::from(area.width).saturating_sub(2);
    let mut below: Vec<(String, _)> = Vec::new();
    for text in dialog.consequences(model) {
        below.extend(wrap(&text, columns).into_iter().map(|line| (line, theme.text)));
    }
    if let Some(answer) = &dialog.answer {
        below.extend(wrap(&format!("=> {answer}"), columns).into_iter().map(|line| (line, theme.title)));
    }
    let (rows, selected) = rows(dialog);
    let body = Rect { y: area.y + 1, height: area.height.saturating_sub(1), ..area };
    // The list keeps at least three rows; what is said below it matters more than its other rows.
    let most = usize::from(body.height).saturating_sub(rows.len().min(3) + 1);
    let shown_below = below.len().min(most);
    let skipped = if dialog.answer.is_some() { below.len() - shown_below } else { 0 };
    let list = Rect { height: body.height.saturating_sub(u16::try_from(shown_below + 1).unwrap_or(u16::MAX)), ..body };
    let top = (selected + 1).saturating_sub(list.height.into());
    for (y, (i, text)) in (0u16..list.height).zip(rows.iter().enumerate().skip(top)) {
        let mark = if i == selected { ">" } else { " " };
        put(buffer, theme, list, y, &[piece(format!("{mark}{text}"), theme.text)]);
        if i == selected {
            mark_selected(buffer, theme, list, y);
        }
    }
    let used = u16::try_from(rows.len().saturating_sub(top)).unwrap_or(u16::MAX).min(list.height);
    let place = Rect { y: list.y + used + 1, height: body.bottom().saturating_sub(list.y + used + 1), ..body };
    for (y, (line, style)) in (0u16..place.height).zip(below.into_iter().skip(skipped)) {
        put(buffer, theme, place, y, &[piece(format!(" {line}"), style)]);
    }
}

fn rows(dialog: &TestLock) -> (Vec<String>, usize) {
    match dialog.stage {
        Stage::Choose if dialog.by_bytes => {
            let row = |b: LockByte| {
                let mark = if dialog.bytes.contains(b) { "[x]" } else { "[ ]" };
                format!("{mark} {} {b}", b.offset())
            };
            (LockByte::ALL.into_iter().map(row).collect(), dialog.byte)
        }
        Stage::Choose => {
            let row = |o: &crate::protocol::Operation| {
                let access = o.recipe(dialog.family).map(|r| r.widest_access().to_string()).unwrap_or_default();
                format!("{} {access}", pad_end(o.name, 26))
            };
            (dialog.operations().into_iter().map(row).collect(), dialog.operation)
        }
        Stage::Decide { take } => {
            let limit = span(dialog.limit().as_secs());
            let rows = vec![
                "check only: ask whether it would be granted, lock nothing".to_owned(),
                format!("take it for {limit}, then it is let go by itself"),
            ];
            (rows, usize::from(take))
        }
        Stage::Confirm { yes } => {
            (vec!["No, go back".to_owned(), "Yes, take it: others may be refused".to_owned()], usize::from(yes))
        }
    }
}
