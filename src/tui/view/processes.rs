//! The other table: a process a row, and the images that it uses.

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;

use super::frame::short_path;
use super::{HEAD_ROWS, Model, Theme, mark_selected, piece, put};
use crate::linux::descriptors::OpenMode;
use crate::monitor::wording::process_name;
use crate::protocol::Access;
use crate::text::{escape, pad_end, to_ascii, width};

pub(super) fn draw(model: &Model, theme: &Theme, buffer: &mut Buffer, area: Rect) {
    let rows = model.processes();
    let plain = |text: String| if theme.ascii { to_ascii(&text).into_owned() } else { text };
    let names: Vec<String> = rows.iter().map(|r| plain(process_name(r.process))).collect();
    let name_columns = names.iter().map(|n| width(n)).max().unwrap_or_default().clamp(7, usize::from(area.width) / 2);
    put(buffer, theme, area, 0, &[piece(" which images each process uses: uses/denies, or how it is open", theme.dim)]);
    let head = format!(" {}  {}  IMAGES", pad_end("PROCESS", name_columns), pad_end("USER", 8));
    put(buffer, theme, area, 1, &[piece(pad_end(&head, area.width.into()), theme.heading)]);
    let body = Rect { y: area.y + HEAD_ROWS, height: area.height.saturating_sub(HEAD_ROWS), ..area };
    if rows.is_empty() {
        put(buffer, theme, body, 0, &[piece("  no process that can be seen uses any of these images", theme.dim)]);
        return;
    }
    let selected = model.cursor();
    let shown = rows.iter().zip(&names).enumerate().skip(model.top).take(body.height.into());
    for (screen_row, (i, (row, name))) in (0u16..).zip(shown) {
        let is_selected = selected == Some(i);
        let name = pad_end(&crate::text::cut_middle(name, name_columns, theme.cut), name_columns);
        let user = plain(escape(&row.process.user).into_owned());
        let user = pad_end(&crate::text::cut_end(&user, 8, theme.cut), 8);
        let mark = if is_selected { '>' } else { ' ' };
        let mut pieces = vec![piece(format!("{mark}{name}  {user}  "), theme.text)];
        for (n, (image, access, mode)) in row.uses.iter().enumerate() {
            let between = if n > 0 { ", " } else { "" };
            pieces.push(piece(format!("{between}{} ", short_path(model, image)), theme.text));
            pieces.push(match (access, mode) {
                (access, Some(OpenMode::Write)) if access.is_empty() => piece("WRITES, NO LOCK", theme.danger),
                (access, Some(OpenMode::Read)) if access.is_empty() => piece("reads, no lock", theme.dim),
                (access, _) if *access == Access::NONE => piece("foreign lock", theme.warning),
                (access, _) => piece(access.to_string(), theme.held),
            });
        }
        put(buffer, theme, body, screen_row, &pieces);
        if is_selected {
            mark_selected(buffer, theme, body, screen_row);
        }
    }
}
