//! Somebody pasted an error message: which lock of which image is it about?
//!
//! QEMU's sentence comes wrapped in what carried it: terminal colours, JSON of Kubernetes events and QMP, journals that
//! write a line break as `\x0a` or `#012`, log prefixes in any language, lines broken by a narrow window. The sentence
//! itself is never translated, so it is looked for letter by letter, whatever white space lies between. Pure.

use super::message::{Message, Sentence};
use super::permission::{LockByte, Permission, Side};

/// What a text says about one refusal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// QEMU's sentence, the errno behind it, and the image in the line after it.
    pub message: Message,
    /// What the image may be called, likeliest first: as in the hint, else as in the option or the prefix before the
    /// sentence. As it was given to QEMU: it may be relative, a link, or a path inside a container.
    pub images: Vec<String>,
    /// The program before the sentence, such as `qemu-img`.
    pub program: Option<String>,
    /// The domain in libvirt's `Failed to start domain`.
    pub domain: Option<String>,
    /// It is the file below the image that was refused: `Could not open backing file`.
    pub on_backing_file: bool,
    /// The images were named earlier in the text, not in the message itself: they may be others.
    pub guessed: bool,
}

/// Messages that hold messages that hold messages: an event in a status in a log.
const DEEPEST: usize = 6;
/// What is read of a text, in bytes; the rest is no error message.
const LONGEST: usize = 1 << 20;
/// Names longer than this are none (`PATH_MAX`).
const LONGEST_NAME: usize = 4096;
/// What stands before a sentence and may name the image, in bytes.
const LOOK_BACK: usize = 8192;

/// Every refusal that `text` tells of, each once, in the order of the text.
#[must_use]
pub fn decode(text: &str) -> Vec<Report> {
    let text = &text[..(0..=LONGEST.min(text.len())).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0)];
    let mut level = without_terminal_codes(text);
    let mut found = reports(&level);
    for _ in 0..DEEPEST {
        let next = without_terminal_codes(&unescape_once(&level));
        if next == level {
            break;
        }
        level = next;
        let deeper = reports(&level);
        // What needs no more unescaping was read better before: a backslash in a name may be its own.
        if found.is_empty() || deeper.len() > found.len() || said(&deeper) > said(&found) {
            found = deeper;
        }
    }
    let mut unique: Vec<Report> = Vec::new();
    for report in found {
        match unique.iter_mut().find(|u| is_same(u, &report)) {
            // A log says it in every layer; one that names the image says more.
            Some(known) if known.images.is_empty() => *known = report,
            Some(_) => {}
            None => unique.push(report),
        }
    }
    unique
}

fn is_same(a: &Report, b: &Report) -> bool {
    let images = a.images.first() == b.images.first() || a.images.is_empty() || b.images.is_empty();
    a.message.sentence == b.message.sentence && images
}

/// How much reports tell: a hint that was cut off by an escape counts less than a whole one.
fn said(reports: &[Report]) -> usize {
    reports.iter().map(|r| usize::from(r.message.image.is_some()) + usize::from(!r.images.is_empty())).sum()
}

/// Without the sequences that colour a terminal and the characters that only move its cursor.
fn without_terminal_codes(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        match c {
            '\u{1b}' => match rest.next() {
                // CSI: to its final byte. OSC: to BEL or ST.
                Some('[') => while rest.next().is_some_and(|c| !('@'..='~').contains(&c)) {},
                Some(']') => {
                    while let Some(c) = rest.next() {
                        if c == '\u{7}' || (c == '\u{1b}' && rest.next_if_eq(&'\\').is_some()) {
                            break;
                        }
                    }
                }
                _ => {}
            },
            '\r' | '\u{7}' | '\u{8}' | '\u{200b}' | '\u{feff}' => {}
            c => out.push(c),
        }
    }
    out
}

/// One layer of JSON, C, HTML or rsyslog escapes less. What is no escape stays.
fn unescape_once(text: &str) -> String {
    const ENTITIES: [(&str, char); 8] = [
        ("&quot;", '"'),
        ("&#34;", '"'),
        ("&#x22;", '"'),
        ("&#39;", '\''),
        ("&apos;", '\''),
        ("&lt;", '<'),
        ("&gt;", '>'),
        ("&amp;", '&'),
    ];
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(['\\', '&', '#']) {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        if let Some((entity, c)) = ENTITIES.iter().find(|(e, _)| rest.starts_with(e)) {
            out.push(*c);
            rest = &rest[entity.len()..];
            continue;
        }
        let (c, length) = escape_at(rest).unwrap_or_else(|| {
            let c = rest.chars().next().unwrap_or_default();
            (c, c.len_utf8())
        });
        out.push(c);
        rest = &rest[length..];
    }
    out + rest
}

/// The character of the escape that `text` begins with, and the escape's length in bytes.
fn escape_at(text: &str) -> Option<(char, usize)> {
    let number = |from: usize, digits: usize, radix: u32| {
        let code = text.get(from..from + digits).filter(|d| d.chars().all(|c| c.is_digit(radix)))?;
        Some((char::from_u32(u32::from_str_radix(code, radix).ok()?)?, from + digits))
    };
    let second = text.chars().nth(1)?;
    match (text.chars().next()?, second) {
        ('\\', 'n') => Some(('\n', 2)),
        ('\\', 't') => Some(('\t', 2)),
        ('\\', 'r') => Some(('\r', 2)),
        ('\\', '"' | '\'' | '\\' | '/') => Some((second, 2)),
        ('\\', 'u') => number(2, 4, 16),
        ('\\', 'x') => number(2, 2, 16),
        ('\\', '0'..='3') => number(1, 3, 8).filter(|(c, _)| c.is_ascii()),
        // rsyslog writes control characters in octal.
        ('#', '0') => number(1, 3, 8).filter(|(c, _)| c.is_ascii_control()),
        _ => None,
    }
}

/// A text without its white space, and where each character stood: what a narrow window broke is whole again.
struct Squeezed<'a> {
    original: &'a str,
    text: String,
    /// For each byte of `text`: where it stood in the original.
    places: Vec<usize>,
}

impl<'a> Squeezed<'a> {
    fn new(original: &'a str) -> Self {
        let (mut text, mut places) = (String::with_capacity(original.len()), Vec::with_capacity(original.len()));
        let mut line_begins = true;
        for (at, c) in original.char_indices() {
            // A mail's or a chat's mark of a quoted line.
            let quoted = line_begins && matches!(c, '>' | '|' | '│');
            line_begins = c == '\n' || (line_begins && (c.is_whitespace() || quoted));
            if c.is_whitespace() || quoted {
                continue;
            }
            // Quotation marks that a word processor has turned.
            let c = if matches!(c, '“' | '”' | '„' | '«' | '»') { '"' } else { c };
            text.push(c);
            places.resize(text.len(), at);
        }
        Self { original, text, places }
    }

    /// The original from the place of byte `at` on.
    fn original_from(&self, at: usize) -> &'a str {
        self.places.get(at).map_or("", |place| &self.original[*place..])
    }
}

fn reports(text: &str) -> Vec<Report> {
    let squeezed = Squeezed::new(text);
    let mut found = Vec::new();
    let mut last_end = 0;
    for (at, opening) in squeezed.text.match_indices("ailedto") {
        let rest = &squeezed.text[at + opening.len()..];
        let Some((sentence, length)) = sentence(rest) else { continue };
        let end = at + opening.len() + length;
        // What the next sentence says is its own.
        let next = rest[length..].find("ailedto").map_or(squeezed.text.len(), |n| end + n);
        let start = squeezed.places.get(at).copied().unwrap_or_default();
        let before_from = last_end.max(start.saturating_sub(LOOK_BACK));
        let before_from = (before_from..=start).find(|i| text.is_char_boundary(*i)).unwrap_or(start);
        let before = &text[before_from..start];
        let hint = hint(&squeezed, end, next);
        let mut images: Vec<String> = hint.iter().flat_map(|h| unwrapped(h)).collect();
        let guessed = hint.is_none() && !named_before(of_message(before)).iter().any(|name| !name.is_empty());
        images.extend(named_before(before));
        images.dedup();
        let message = Message {
            sentence,
            errno: errno(squeezed.original_from(end)),
            image: images.first().cloned().filter(|_| hint.is_some()),
        };
        found.push(Report {
            message,
            images,
            program: program(before),
            domain: domain(far_before(text, start)),
            guessed,
            on_backing_file: squeezed.text[..at].ends_with("Couldnotopenbackingfile:F")
                || squeezed.text[..at].ends_with("Couldnotopenbackingimage:F"),
        });
        last_end = squeezed.places.get(end).copied().unwrap_or(text.len());
    }
    found
}

/// The sentence after `Failed to`, without spaces, and its length.
fn sentence(rest: &str) -> Option<(Sentence, usize)> {
    if let Some(digits) = rest.strip_prefix("lockbyte") {
        let length = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
        let offset = digits[..length].parse().ok()?;
        return Some((Sentence::LockFailed { offset }, "lockbyte".len() + length));
    }
    let after = rest.strip_prefix("get")?;
    let (side, after) = match after.strip_prefix("shared") {
        Some(after) => (Side::Permission, after),
        None => (Side::Unshare, after),
    };
    let after = after.strip_prefix(['"', '\'', '`'])?;
    let known = |p: &Permission| {
        let name: String = p.qemu_name().split(' ').collect();
        let length = after.strip_prefix(name.as_str())?.strip_prefix(['"', '\''])?.strip_prefix("lock")?.len();
        Some((*p, rest.len() - length))
    };
    let (permission, length) = Permission::ALL.iter().find_map(known)?;
    Some((Sentence::Conflict(LockByte { side, permission }), length))
}

/// The path in `Is another process using the image [PATH]?`, which belongs to the sentence that ends at `from`.
fn hint<'a>(squeezed: &Squeezed<'a>, from: usize, to: usize) -> Option<&'a str> {
    const OPENING: &str = "Isanotherprocessusingtheimage[";
    let part = squeezed.text.get(from..to)?;
    let start = from + part.find(OPENING)? + OPENING.len();
    let length = squeezed.text.get(start..to)?.find("]?").filter(|n| (1..=LONGEST_NAME).contains(n))?;
    let first = *squeezed.places.get(start)?;
    let last = *squeezed.places.get(start + length)?;
    squeezed.original.get(first..last)
}

/// A name that a window may have broken: put together without a space, and with one.
fn unwrapped(name: &str) -> Vec<String> {
    if !name.contains('\n') {
        return vec![name.to_owned()];
    }
    let parts: Vec<&str> = name.split('\n').map(|p| p.trim_matches([' ', '\t', '>', '|', '│'])).collect();
    vec![parts.concat(), parts.join(" ")]
}

/// What an errno says, behind the sentence: the lock call itself failed.
fn errno(after: &str) -> Option<String> {
    let after = after.strip_prefix(':')?.trim_start();
    let end = after.find(['\n', '"', '\'', ',', '}', '\\', '<']).unwrap_or(after.len());
    let text = after[..end].trim().trim_end_matches('.');
    // "Failed to lock byte 100: Is another process ..." is a hint and no errno.
    let is_errno = !text.is_empty() && text.len() <= 80 && !text.starts_with("Is another");
    is_errno.then(|| text.to_owned())
}

/// Names of the image in the words before the sentence, the nearest first.
fn named_before(before: &str) -> Vec<String> {
    /// What stands before a name, and what ends it.
    const PLACES: [(&str, &[char]); 11] = [
        ("Could not open '", &['\'']),
        ("Could not open \"", &['"']),
        ("Failed to blk_new_open '", &['\'']),
        ("can't open device ", &[':']),
        ("\"filename\":\"", &['"']),
        ("\"filename\": \"", &['"']),
        ("file.filename=", &[',', ' ', '\n', ':']),
        ("filename=", &[',', ' ', '\n', ':']),
        ("file=", &[',', ' ', '\n', ':']),
        ("-hda ", &[' ', ':', '\n']),
        ("qemu-img: ", &[':']),
    ];
    let mut found: Vec<(usize, String)> = Vec::new();
    for (opening, closing) in PLACES {
        let Some(at) = before.rfind(opening) else { continue };
        let rest = &before[at + opening.len()..];
        let Some(end) = rest.find(closing).filter(|n| (1..=LONGEST_NAME).contains(n)) else { continue };
        // QEMU's options may name a driver or a node there, and a prefix is followed by other words.
        let name = &rest[..end];
        let plausible = opening != "qemu-img: " || (!name.contains(' ') && name.contains(['/', '.']));
        if plausible && !name.contains('\n') {
            found.push((at, name.to_owned()));
        }
    }
    found.sort_by_key(|(at, _)| std::cmp::Reverse(*at));
    found.into_iter().map(|(_, name)| name).collect()
}

/// What of the words before a sentence belongs to its message: the last option of a command line, or the line.
fn of_message(before: &str) -> &str {
    let line = &before[before.rfind('\n').map_or(0, |at| at + 1)..];
    let option =
        line.rmatch_indices(" -").find(|(at, _)| line[at + 2..].starts_with(|c: char| c.is_ascii_alphabetic()));
    option.map_or(line, |(at, _)| &line[at..])
}

/// As much of the text before a sentence as may still be about it.
fn far_before(text: &str, start: usize) -> &str {
    let from = start.saturating_sub(8 * LOOK_BACK);
    let from = (from..=start).find(|i| text.is_char_boundary(*i)).unwrap_or(start);
    &text[from..start]
}

/// The program that speaks: the last word before the sentence that names a QEMU.
fn program(before: &str) -> Option<String> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
    let at = before.rfind("qemu-")?;
    let end = before[at..].find(|c| !is_part(c)).unwrap_or(before.len() - at);
    Some(before[at..at + end].to_owned())
}

/// The domain that libvirt could not start, however it is quoted.
fn domain(before: &str) -> Option<String> {
    let at = before.rfind("Failed to start domain ")? + "Failed to start domain ".len();
    let rest = before[at..].trim_start_matches(['\'', '"', '“', '\\']);
    let end = rest.find(['\'', '"', '”', '\\', '\n', ' ']).unwrap_or(rest.len());
    (1..=255).contains(&end).then(|| rest[..end].to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_name_that_stands_elsewhere_in_the_text_is_a_guess() {
        let guessed = |text: &str| decode(text)[0].guessed;
        assert!(guessed("systemd: file=/etc/passwd\nsome thing: Failed to get \"write\" lock"));
        assert!(guessed("qemu: -blockdev file,filename=/a -device virtio-blk,drive=b: Failed to get \"write\" lock"));
        assert!(!guessed("qemu: -drive file=/a.raw,format=raw: Failed to get \"write\" lock"));
        assert!(!guessed("qemu-img: Could not open '/a.raw': Failed to get \"write\" lock"));
        assert!(!guessed("Failed to get \"write\" lock\nIs another process using the image [/a.raw]?"));
    }

    #[test]
    fn a_plain_message_says_all_that_it_holds() {
        let text = "qemu-img: Could not open 'a.qcow2': Failed to get shared \"write\" lock\n\
                    Is another process using the image [a.qcow2]?\n";
        let [report] = decode(text).try_into().unwrap();
        assert_eq!(report.message.sentence.to_string(), "Failed to get shared \"write\" lock");
        assert_eq!((report.images[0].as_str(), report.program.as_deref()), ("a.qcow2", Some("qemu-img")));
        assert!(!report.on_backing_file);
    }

    #[test]
    fn every_layer_of_escapes_is_taken_off() {
        let mut text = "Failed to get \"write\" lock\nIs another process using the image [/a/b.img]?".to_owned();
        for depth in 0..4 {
            let [report] = decode(&text).try_into().unwrap_or_else(|r| panic!("{depth}: {text}: {r:?}"));
            assert_eq!(report.images, ["/a/b.img"], "{depth}");
            text = serde_json::to_string(&text).unwrap();
        }
    }

    #[test]
    fn a_text_without_such_a_message_has_none() {
        for text in ["", "Failed to ", "Failed to get \"sunshine\" lock", "No such file", "Failed to lock byte"] {
            assert_eq!(decode(text), [], "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "\\PC{0,60}", noise in any::<Vec<u8>>(), cut in 0usize..90) {
            let noise = String::from_utf8_lossy(&noise).into_owned();
            let _ = decode(&noise);
            let whole = format!("{text}: Failed to get \"write\" lock\nIs another process using the image [{text}]?{noise}");
            let cut = (0..=cut.min(whole.len())).rev().find(|i| whole.is_char_boundary(*i)).unwrap();
            let _ = decode(&whole[cut..]);
            let _ = decode(&whole[..whole.len() - (0..=cut).rev().find(|i| whole.is_char_boundary(whole.len() - i)).unwrap()]);
            prop_assert!(!decode(&whole).is_empty());
        }

        #[test]
        fn a_window_of_any_width_changes_nothing(width in 8usize..90, prefix in prop::sample::select(vec!["", "> ", "  ", "| "])) {
            let text = "qemu-system-x86_64: -drive file=/var/lib/images/web01.qcow2,if=virtio: Failed to get \"consistent read\" lock Is another process using the image [/var/lib/images/web01.qcow2]?";
            let broken: Vec<String> = text.as_bytes().chunks(width).map(|c| format!("{prefix}{}", String::from_utf8_lossy(c))).collect();
            let reports = decode(&broken.join("\n"));
            prop_assert_eq!(reports.len(), 1);
            prop_assert_eq!(reports[0].message.sentence.byte().map(LockByte::offset), Some(200));
            prop_assert_eq!(reports[0].images[0].as_str(), "/var/lib/images/web01.qcow2");
        }
    }
}
