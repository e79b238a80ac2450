//! How is a text that somebody else wrote shown without letting it act on the terminal or break the columns?
//!
//! File names, command lines and VM names may hold escape sequences, line breaks, right-to-left overrides or bytes that
//! are no UTF-8. Pure; asks nobody.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use unicode_segmentation::UnicodeSegmentation;
use unicode_width::UnicodeWidthStr;

/// Whether a terminal would act on `c`, hide it, or reorder what stands around it.
#[must_use]
pub fn is_treacherous(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}' | '\u{180b}'..='\u{180f}'
            | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{3164}'
            | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{ffa0}' | '\u{fff0}'..='\u{fffb}'
            | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}' | '\u{e0000}'..='\u{e0fff}')
}

/// `text` with each treacherous character written out, such as `\n`, `\x1b` or `\u{202e}`.
#[must_use]
pub fn escape(text: &str) -> Cow<'_, str> {
    if !text.chars().any(is_treacherous) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    text.chars().for_each(|c| push_escaped(&mut out, c));
    Cow::Owned(out)
}

fn push_escaped(out: &mut String, c: char) {
    match c {
        '\n' => out.push_str("\\n"),
        '\r' => out.push_str("\\r"),
        '\t' => out.push_str("\\t"),
        c if (c as u32) < 0x100 && is_treacherous(c) => push_hex(out, c as u32),
        c if is_treacherous(c) => out.extend(c.escape_unicode()),
        c => out.push(c),
    }
}

fn push_hex(out: &mut String, value: u32) {
    // Writing to a String cannot fail.
    let _ = write!(out, "\\x{value:02x}");
}

/// Like [`escape`], for bytes: what is no UTF-8 is written out as `\xff` too.
#[must_use]
pub fn escape_bytes(bytes: &[u8]) -> Cow<'_, str> {
    if let Ok(text) = std::str::from_utf8(bytes) {
        return escape(text);
    }
    let mut out = String::with_capacity(bytes.len() + 16);
    for chunk in bytes.utf8_chunks() {
        chunk.valid().chars().for_each(|c| push_escaped(&mut out, c));
        chunk.invalid().iter().for_each(|b| push_hex(&mut out, u32::from(*b)));
    }
    Cow::Owned(out)
}

/// A path as it is shown to people.
#[must_use]
pub fn escape_path(path: &Path) -> Cow<'_, str> {
    escape_bytes(path.as_os_str().as_bytes())
}

/// `text` in ASCII only: other characters are written out as `\u{e9}`.
#[must_use]
pub fn to_ascii(text: &str) -> Cow<'_, str> {
    if text.is_ascii() {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() * 2);
    for c in text.chars() {
        if c.is_ascii() { out.push(c) } else { out.extend(c.escape_unicode()) }
    }
    Cow::Owned(out)
}

/// Columns that `text` takes in a terminal.
#[must_use]
pub fn width(text: &str) -> usize {
    text.width()
}

/// `text` cut in its middle to at most `columns` columns, with `mark` where something is missing: both ends of a name
/// tell more than its beginning alone.
#[must_use]
pub fn cut_middle<'a>(text: &'a str, columns: usize, mark: &str) -> Cow<'a, str> {
    if width(text) <= columns {
        return Cow::Borrowed(text);
    }
    let Some(room) = columns.checked_sub(width(mark)) else {
        return Cow::Owned(".".repeat(columns));
    };
    let clusters: Vec<&str> = text.graphemes(true).collect();
    let (tail_room, mut used) = (room / 2, 0);
    let tail = clusters.iter().rev().take_while(|c| fits(&mut used, c, tail_room)).count();
    let (head_room, mut used) = (room - used, 0);
    let head = clusters[..clusters.len() - tail].iter().take_while(|c| fits(&mut used, c, head_room)).count();
    Cow::Owned(format!("{}{mark}{}", clusters[..head].concat(), clusters[clusters.len() - tail..].concat()))
}

/// `text` cut at its end to at most `columns` columns.
#[must_use]
pub fn cut_end<'a>(text: &'a str, columns: usize, mark: &str) -> Cow<'a, str> {
    if width(text) <= columns {
        return Cow::Borrowed(text);
    }
    let Some(room) = columns.checked_sub(width(mark)) else {
        return Cow::Owned(".".repeat(columns));
    };
    let mut used = 0;
    let head: String = text.graphemes(true).take_while(|c| fits(&mut used, c, room)).collect();
    Cow::Owned(head + mark)
}

/// Adds the width of `cluster` to `used` if the sum stays within `room`.
fn fits(used: &mut usize, cluster: &str, room: usize) -> bool {
    let sum = *used + width(cluster);
    let fits = sum <= room;
    if fits {
        *used = sum;
    }
    fits
}

/// `text` filled with spaces to `columns` columns.
#[must_use]
pub fn pad_end(text: &str, columns: usize) -> String {
    let missing = columns.saturating_sub(width(text));
    format!("{text}{}", " ".repeat(missing))
}

/// `text` preceded by spaces to `columns` columns.
#[must_use]
pub fn pad_start(text: &str, columns: usize) -> String {
    let missing = columns.saturating_sub(width(text));
    format!("{}{text}", " ".repeat(missing))
}

/// A number of bytes in at most six columns, in units of 1024 with one decimal: `40.0G`, `512`.
#[must_use]
pub fn size(bytes: u64) -> String {
    const UNITS: [char; 6] = ['K', 'M', 'G', 'T', 'P', 'E'];
    if bytes < 1024 {
        return bytes.to_string();
    }
    let mut unit = 0;
    let mut tenths = u128::from(bytes) * 10 / 1024;
    while tenths >= 10240 && unit + 1 < UNITS.len() {
        tenths /= 1024;
        unit += 1;
    }
    format!("{}.{}{}", tenths / 10, tenths % 10, UNITS[unit])
}

/// A span of time in its two largest units: `3d 4h`, `12s`.
#[must_use]
pub fn span(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, m) => format!("{m}m {}s", seconds % 60),
        (0, h, m) => format!("{h}h {m}m"),
        (d, h, _) => format!("{d}d {h}h"),
    }
}

/// "1 image", "2 images".
#[must_use]
pub fn counted(number: usize, singular: &str, plural: &str) -> String {
    format!("{number} {}", if number == 1 { singular } else { plural })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn attacks_are_written_out() {
        for (attack, shown) in [
            ("a\nb", "a\\nb"),
            ("\u{1b}[2J", "\\x1b[2J"),
            ("\u{1b}]0;title\u{7}", "\\x1b]0;title\\x07"),
            ("\u{9b}31m", "\\x9b31m"),
            ("gpj.\u{202e}exe", "gpj.\\u{202e}exe"),
            ("zero\u{200b}width", "zero\\u{200b}width"),
            ("tag\u{e0041}", "tag\\u{e0041}"),
            ("plain name.qcow2", "plain name.qcow2"),
            ("größe-日本.raw", "größe-日本.raw"),
        ] {
            assert_eq!(escape(attack), shown);
        }
        assert_eq!(escape_bytes(b"a\xff\xfeb\x1b"), "a\\xff\\xfeb\\x1b");
    }

    #[test]
    fn names_are_cut_in_the_middle() {
        assert_eq!(cut_middle("web01.qcow2", 20, "…"), "web01.qcow2");
        assert_eq!(cut_middle("a-very-long-name.qcow2", 12, "…"), "a-very…qcow2");
        assert_eq!(cut_middle("日本日本日本", 7, "…"), "日本…本");
        assert_eq!(cut_middle("abc", 0, "…"), "");
        assert_eq!(cut_middle("abcdef", 1, ".."), ".");
    }

    #[test]
    fn sizes_and_spans_are_short() {
        let sizes: Vec<String> = [0, 1023, 1024, 196_616, 42_949_672_960, u64::MAX].into_iter().map(size).collect();
        assert_eq!(sizes, ["0", "1023", "1.0K", "192.0K", "40.0G", "15.9E"]);
        let spans: Vec<String> = [0, 59, 60, 3_725, 273_600].into_iter().map(span).collect();
        assert_eq!(spans, ["0s", "59s", "1m 0s", "1h 2m", "3d 4h"]);
    }

    proptest! {
        #[test]
        fn nothing_treacherous_passes(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let shown = escape_bytes(&bytes);
            prop_assert!(!shown.chars().any(is_treacherous));
        }

        #[test]
        fn a_cut_text_fits(text in "\\PC{0,60}", columns in 0usize..40) {
            let text = escape(&text);
            prop_assert!(width(&cut_middle(&text, columns, "…")) <= columns);
            prop_assert!(width(&cut_end(&text, columns, "..")) <= columns);
        }
    }
}
