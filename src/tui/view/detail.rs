//! The panel below the table: the selected image, byte by byte, and what an admin should know about it.

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::style::Style;

use super::{Model, Piece, Theme, put};
use crate::linux::descriptors::OpenMode;
use crate::monitor::finding::Severity;
use crate::monitor::snapshot::{ByteState, ByteView, Holder, Image};
use crate::monitor::wording::{process_name, range_text};
use crate::text::{escape, escape_path, pad_end, size};

pub(super) fn draw(model: &Model, theme: &Theme, buffer: &mut Buffer, area: Rect) {
    put(buffer, theme, area, 0, &[(theme.rule.repeat(area.width.into()).into(), theme.dim)]);
    let Some(image) = model.selected_image() else { return };
    let lines = lines(model, image, theme);
    let room = usize::from(area.height.saturating_sub(1));
    let shown = if lines.len() > room { room.saturating_sub(1) } else { lines.len() };
    for (row, pieces) in (1u16..).zip(&lines[..shown]) {
        put(buffer, theme, area, row, pieces);
    }
    if shown < lines.len() {
        let text = format!(" and {} more lines: a larger terminal shows them", lines.len() - shown);
        put(buffer, theme, area, area.height - 1, &[(text.into(), theme.warning)]);
    }
}

fn lines<'a>(model: &'a Model, image: &'a Image, theme: &Theme) -> Vec<Vec<Piece<'a>>> {
    let mut lines = vec![about(image, theme)];
    if let Some(gap) = &model.gap {
        lines.push(vec![(format!(" may have been missed: {gap}").into(), theme.warning)]);
    }
    for finding in &image.findings {
        let style = match finding.severity {
            Severity::Note => theme.text,
            Severity::Warning => theme.warning,
            Severity::Danger => theme.danger,
        };
        lines.push(vec![(format!(" {}", finding.text).into(), style)]);
    }
    for byte in image.bytes.iter().filter(|b| b.state != ByteState::Free) {
        lines.extend(byte_lines(image, byte, theme));
    }
    for opener in &image.openers {
        let mode = if opener.mode == OpenMode::Write { "writes" } else { "reads" };
        let text = format!(" no lock   {mode}, fd {:<4} {}", opener.fd, process_name(&opener.process));
        lines.push(vec![(text.into(), theme.text)]);
    }
    if lines.len() == 1 {
        lines.push(vec![(" no byte is locked, and nobody has it open".into(), theme.dim)]);
    }
    if let Some(snapshot) = &model.snapshot {
        lines.extend(snapshot.troubles.iter().map(|t| vec![(format!(" {}", escape(t)).into(), theme.warning)]));
    }
    lines
}

fn about<'a>(image: &Image, theme: &Theme) -> Vec<Piece<'a>> {
    let mut facts = vec![image.verdict.name().to_owned(), format!("file {}", size(image.file_size))];
    if let Some(backing) = &image.backing_file {
        facts.push(format!("backing {}", escape(backing)));
    }
    facts.push(format!("{} {}", escape(&image.filesystem.kind), escape(&image.filesystem.source)));
    vec![(format!(" {}  ", escape_path(&image.path)).into(), theme.title), (facts.join(theme.dot).into(), theme.text)]
}

fn byte_lines<'a>(image: &Image, byte: &ByteView, theme: &Theme) -> Vec<Vec<Piece<'a>>> {
    let label = format!(" {} {}", byte.byte.offset(), pad_end(&byte.byte.to_string(), 24));
    let unnamed = |text: &str, style: Style| vec![vec![(label.clone().into(), style), (text.to_owned().into(), style)]];
    match (byte.state, byte.holders.is_empty()) {
        (ByteState::Unknown, _) => unnamed("cannot tell", theme.warning),
        (_, true) => unnamed("held by somebody who cannot be named", theme.warning),
        (_, false) => byte
            .holders
            .iter()
            .filter_map(|i| image.holders.get(*i))
            .enumerate()
            .map(|(i, holder)| {
                let label = if i == 0 { label.clone() } else { " ".repeat(label.len()) };
                vec![(label.into(), theme.held), (holder_text(holder).into(), theme.text)]
            })
            .collect(),
    }
}

fn holder_text(holder: &Holder) -> String {
    let process = &holder.process;
    let mut text = process_name(process);
    if let Some(fd) = holder.fd {
        text += &format!("  fd {fd}");
    }
    if let Some(range) = holder.foreign {
        text += &format!("  foreign lock on {}", range_text(range));
    }
    if holder.lock == crate::linux::lock_table::LockKind::Posix {
        text += "  POSIX";
    }
    if let Some(place) = process.container.as_ref().or(process.unit.as_ref()) {
        text += &format!("  {}", escape(place));
    }
    text
}
