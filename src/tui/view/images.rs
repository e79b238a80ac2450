//! The table: an image a row, its ten bytes, its role and its holders.

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::style::Style;

use super::frame::short_path;
use super::{HEAD_ROWS, Model, Piece, Theme, mark_selected, put};
use crate::linux::descriptors::OpenMode;
use crate::monitor::snapshot::{ByteState, ByteView, Image, Verdict};
use crate::monitor::wording::{byte_mark, format_text, holders_text, role_text_at, short_holders_text, size_text};
use crate::protocol::Permission;
use crate::text::{cut_middle, pad_end, pad_start, to_ascii, width};
use crate::tui::sort::{Column, Order, rank};

/// Which columns there is room for.
struct Columns {
    name: usize,
    /// A space between two bytes.
    spaced: bool,
    /// Format and size.
    facts: bool,
    role: usize,
    holders: bool,
}

/// Narrower than this, holders are named without the program that runs the VM.
const WIDE: u16 = 100;
const FORMAT: usize = 7;
const SIZE: usize = 6;
const ROLE: usize = 15;

impl Columns {
    fn of(total: u16, longest_name: usize, longest_holders: usize) -> Self {
        let total = usize::from(total);
        let spaced = total >= 100;
        let facts = total >= 70;
        let role = if total >= 55 { ROLE } else { 0 };
        let marks = if spaced { 21 } else { 11 };
        let fixed = 2 + 2 + marks + if facts { FORMAT + SIZE + 3 } else { 0 } + if role > 0 { role + 2 } else { 0 };
        let rest = total.saturating_sub(fixed);
        // Names and holders share the rest: each gets what it needs if the other leaves it, names at least three fifths.
        let holders = total >= 60;
        let name_room =
            if holders { (rest * 3 / 5).max(12).max(rest.saturating_sub(longest_holders + 2)).min(rest) } else { rest };
        Self { name: longest_name.min(name_room).max(5), spaced, facts, role, holders }
    }
}

pub(super) fn draw(model: &Model, theme: &Theme, buffer: &mut Buffer, area: Rect) {
    let images: Vec<&Image> = (0..model.rows.len()).filter_map(|row| model.image_at(row)).collect();
    let names: Vec<String> = images.iter().map(|i| short_name(model, theme, i)).collect();
    let longest = names.iter().map(|n| width(n)).max().unwrap_or_default();
    let holders = |image: &Image| if area.width < WIDE { short_holders_text(image) } else { holders_text(image) };
    let holders: Vec<String> = images.iter().map(|i| holders(i)).collect();
    let columns = Columns::of(area.width, longest, holders.iter().map(|h| width(h)).max().unwrap_or_default());
    head(model, &columns, theme, buffer, area);
    let body = Rect { y: area.y + HEAD_ROWS, height: area.height.saturating_sub(HEAD_ROWS), ..area };
    if images.is_empty() {
        let text = match (&model.snapshot, model.filter.is_active()) {
            (None, _) => "",
            (Some(_), true) => "  no image fits the filter: Esc clears it",
            (Some(s), false) if !s.troubles.is_empty() => "  no images that could be listed",
            (Some(_), false) => "  no images here yet: they show as soon as there are some",
        };
        put(buffer, theme, body, 0, &[(text.into(), theme.dim)]);
        return;
    }
    let selected = model.selected_row();
    let rows = images.iter().zip(names.iter().zip(&holders)).enumerate().skip(model.top).take(body.height.into());
    for (screen_row, (row, (image, (name, holders)))) in (0u16..).zip(rows) {
        let is_selected = selected == Some(row);
        let role = role_text_at(image, model.shown_at());
        put(buffer, theme, body, screen_row, &cells(&columns, theme, image, (name, holders, &role), is_selected));
        if is_selected {
            mark_selected(buffer, theme, body, screen_row);
        }
    }
}

fn short_name(model: &Model, theme: &Theme, image: &Image) -> String {
    let name = short_path(model, image);
    if theme.ascii { to_ascii(&name).into_owned() } else { name }
}

fn head(model: &Model, columns: &Columns, theme: &Theme, buffer: &mut Buffer, area: Rect) {
    let letters: Vec<String> = Permission::ALL.iter().map(|p| p.letter().to_uppercase().to_string()).collect();
    let (row, permission, gap) =
        if columns.spaced { (letters.join(" "), "PERMISSION", "  ") } else { (letters.concat(), "PERM ", " ") };
    let between = if columns.spaced { "   " } else { " " };
    let before = 2 + columns.name + 2 + if columns.facts { FORMAT + SIZE + 3 } else { 0 };
    // The column that the rows are sorted by carries an arrow.
    let arrow = |column: Column| match model.order_of(column) {
        Some(Order::Usual) => theme.down,
        Some(Order::Reversed) => theme.up,
        None => "",
    };
    let named = |name: &str, column: Column| format!("{name}{}", arrow(column));
    let sides = format!("{}{permission}{gap}UNSHARE{}", " ".repeat(before), arrow(Column::Bytes));
    put(buffer, theme, area, 0, &[(sides.into(), theme.dim)]);
    let mut text = format!("  {}  ", pad_end(&named("IMAGE", Column::Image), columns.name));
    if columns.facts {
        let (format, size) = (named("FORMAT", Column::Format), named("SIZE", Column::Size));
        text += &format!("{} {}  ", pad_end(&format, FORMAT), pad_start(&size, SIZE));
    }
    text += &format!("{row}{between}{row}");
    if columns.role > 0 {
        text += &format!("  {}", pad_end(&named("ROLE", Column::Role), columns.role));
    }
    if columns.holders {
        text += &format!("  {}", named("HOLDERS", Column::Holders));
    }
    put(buffer, theme, area, 1, &[(pad_end(&text, area.width.into()).into(), theme.heading)]);
}

fn cells<'a>(
    columns: &Columns,
    theme: &Theme,
    image: &Image,
    (name, holders, role): (&str, &str, &str),
    is_selected: bool,
) -> Vec<Piece<'a>> {
    let worst = worst_style(theme, image);
    let name = pad_end(&cut_middle(name, columns.name, theme.cut), columns.name);
    let mut pieces: Vec<Piece> = vec![
        (if is_selected { ">" } else { " " }.into(), theme.text),
        (state_mark(image).into(), worst),
        (format!("{name}  ").into(), theme.text),
    ];
    if columns.facts {
        let text = format!("{} {}  ", pad_end(format_text(image), FORMAT), pad_start(&size_text(image), SIZE));
        pieces.push((text.into(), theme.dim));
    }
    for (i, byte) in image.bytes.iter().enumerate() {
        let between = match (i, columns.spaced) {
            (0, _) => "",
            (5, true) => "   ",
            (5, false) | (_, true) => " ",
            (_, false) => "",
        };
        pieces.push((between.into(), theme.text));
        pieces.push((byte_mark(byte).to_string().into(), mark_style(theme, byte)));
    }
    if columns.role > 0 {
        pieces.push((format!("  {}", pad_end(role, columns.role)).into(), worst));
    }
    if columns.holders {
        pieces.push((format!("  {holders}").into(), theme.text));
    }
    pieces
}

/// One character for those who see neither role nor colour.
fn state_mark(image: &Image) -> &'static str {
    match rank(image) {
        0 => "!",
        1 => "?",
        2 => "~",
        _ => " ",
    }
}

fn mark_style(theme: &Theme, byte: &ByteView) -> Style {
    match (byte.state, byte.holders.is_empty()) {
        (ByteState::Free, _) => theme.dim,
        (ByteState::Held, false) => theme.held,
        (ByteState::Held, true) | (ByteState::Unknown, _) => theme.warning,
    }
}

fn worst_style(theme: &Theme, image: &Image) -> Style {
    if image.openers.iter().any(|o| o.mode == OpenMode::Write) {
        theme.danger
    } else if matches!(image.verdict, Verdict::Free | Verdict::Held) {
        theme.text
    } else {
        theme.warning
    }
}
