//! How does each role look: with sixteen colours on light and dark ground, without colour, in UTF-8 and in ASCII?
//!
//! Resolved once. Every state that a colour shows is told apart by a character or a word as well.

use ratatui::style::{Color, Modifier, Style};

/// What the terminal and the operator allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Look {
    /// Colours may be used.
    pub color: bool,
    /// Nothing but ASCII.
    pub ascii: bool,
    /// The mouse is listened to from the start.
    pub mouse: bool,
}

/// The styles and characters of a screen.
#[derive(Clone, Copy, Debug)]
pub struct Theme {
    /// Ordinary text.
    pub text: Style,
    /// The line at the top.
    pub title: Style,
    /// Headings of columns and panels.
    pub heading: Style,
    /// What matters little.
    pub dim: Style,
    /// A held byte.
    pub held: Style,
    /// What cannot be told, and warnings.
    pub warning: Style,
    /// Data may be lost.
    pub danger: Style,
    /// A key in the bar.
    pub key: Style,
    /// Laid over the selected row.
    pub selected: Style,
    /// The name of the shown panel.
    pub tab: Style,
    /// The banner of a test lock that is held.
    pub own_lock: Style,
    /// The banner of a frozen screen.
    pub frozen: Style,
    /// A rule between panels.
    pub rule: &'static str,
    /// Where something is cut out.
    pub cut: &'static str,
    /// Between items of a line.
    pub dot: &'static str,
    /// Sorted in the usual direction.
    pub down: &'static str,
    /// Sorted the other way round.
    pub up: &'static str,
    /// In front of a backing file.
    pub below: &'static str,
    /// Nothing but ASCII.
    pub ascii: bool,
}

impl Theme {
    /// The styles for `look`.
    #[must_use]
    pub fn new(look: Look) -> Self {
        let plain = Style::new();
        let color = |style: Style, c: Color| if look.color { style.fg(c) } else { style };
        let bold = plain.add_modifier(Modifier::BOLD);
        Self {
            text: plain,
            title: bold,
            heading: plain.add_modifier(Modifier::UNDERLINED),
            dim: if look.color { plain.add_modifier(Modifier::DIM) } else { plain },
            held: color(bold, Color::Green),
            warning: color(bold, Color::Magenta),
            danger: color(bold.add_modifier(Modifier::REVERSED), Color::Red),
            key: bold,
            selected: plain.add_modifier(Modifier::REVERSED),
            tab: bold.add_modifier(Modifier::REVERSED),
            own_lock: color(bold.add_modifier(Modifier::REVERSED), Color::Yellow),
            frozen: color(bold.add_modifier(Modifier::REVERSED), Color::Blue),
            rule: if look.ascii { "-" } else { "─" },
            cut: if look.ascii { ".." } else { "…" },
            dot: if look.ascii { " | " } else { " · " },
            down: if look.ascii { "v" } else { "▼" },
            up: if look.ascii { "^" } else { "▲" },
            below: if look.ascii { "`-" } else { "└" },
            ascii: look.ascii,
        }
    }
}
