//! Which key does what?
//!
//! One table: the program acts by it, and the bottom bar and the help are drawn from it. Pure.

use crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

/// What a key asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// One image up.
    Up,
    /// One image down.
    Down,
    /// A screenful up.
    PageUp,
    /// A screenful down.
    PageDown,
    /// To the first image.
    First,
    /// To the last image.
    Last,
    /// Look at once.
    Look,
    /// Draw everything again.
    Redraw,
    /// Show or hide the list of keys.
    Help,
    /// Leave what is shown on top, if anything is.
    Back,
    /// End the program.
    Quit,
}

/// A line of the table.
#[derive(Clone, Copy, Debug)]
pub struct Binding {
    /// The keys, any of which will do.
    pub keys: &'static [KeyCode],
    /// With the control key.
    pub control: bool,
    /// What it asks for.
    pub action: Action,
    /// How the keys are written.
    pub label: &'static str,
    /// One word for the bottom bar; empty: not shown there.
    pub name: &'static str,
    /// One line for the help.
    pub help: &'static str,
}

const fn plain(
    keys: &'static [KeyCode],
    action: Action,
    label: &'static str,
    name: &'static str,
    help: &'static str,
) -> Binding {
    Binding { keys, control: false, action, label, name, help }
}

/// Every key.
pub const KEYMAP: &[Binding] = &[
    plain(&[KeyCode::Char('?'), KeyCode::F(1)], Action::Help, "?", "help", "show or hide this list"),
    plain(&[KeyCode::Up, KeyCode::Char('k')], Action::Up, "Up k", "", "one image up"),
    plain(&[KeyCode::Down, KeyCode::Char('j')], Action::Down, "Down j", "select", "one image down"),
    plain(&[KeyCode::PageUp], Action::PageUp, "PgUp", "", "a screenful up"),
    plain(&[KeyCode::PageDown], Action::PageDown, "PgDn", "", "a screenful down"),
    plain(&[KeyCode::Home, KeyCode::Char('g')], Action::First, "Home g", "", "to the first image"),
    plain(&[KeyCode::End, KeyCode::Char('G')], Action::Last, "End G", "", "to the last image"),
    plain(&[KeyCode::Char('r')], Action::Look, "r", "look now", "look now instead of at the next tick"),
    Binding {
        keys: &[KeyCode::Char('l')],
        control: true,
        action: Action::Redraw,
        label: "Ctrl-L",
        name: "",
        help: "draw the screen again",
    },
    plain(&[KeyCode::Esc], Action::Back, "Esc", "", "leave the help"),
    plain(&[KeyCode::Char('q')], Action::Quit, "q", "quit", "quit"),
    Binding {
        keys: &[KeyCode::Char('c'), KeyCode::Char('d')],
        control: true,
        action: Action::Quit,
        label: "Ctrl-C",
        name: "",
        help: "quit, as Ctrl-D does",
    },
];

/// What `key` asks for, if anything.
#[must_use]
pub fn action(key: KeyEvent) -> Option<Action> {
    if key.kind == KeyEventKind::Release {
        return None;
    }
    // Shift is in the character already; Alt turns a key into another one that nobody has bound.
    let control = key.modifiers.contains(KeyModifiers::CONTROL);
    let other = key.modifiers.intersects(KeyModifiers::ALT | KeyModifiers::SUPER | KeyModifiers::META);
    let bound = |b: &&Binding| b.control == control && b.keys.contains(&key.code);
    if other { None } else { KEYMAP.iter().find(bound).map(|b| b.action) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn no_key_is_bound_twice() {
        let mut seen = HashSet::new();
        for binding in KEYMAP {
            for key in binding.keys {
                assert!(seen.insert((binding.control, *key)), "{}", binding.label);
            }
            assert!(!binding.help.is_empty() && binding.label.is_ascii());
        }
    }

    #[test]
    fn control_and_alt_make_other_keys() {
        let key = |code, modifiers| action(KeyEvent::new(code, modifiers));
        assert_eq!(key(KeyCode::Char('q'), KeyModifiers::NONE), Some(Action::Quit));
        assert_eq!(key(KeyCode::Char('G'), KeyModifiers::SHIFT), Some(Action::Last));
        assert_eq!(key(KeyCode::Char('q'), KeyModifiers::CONTROL), None);
        assert_eq!(key(KeyCode::Char('q'), KeyModifiers::ALT), None);
        assert_eq!(key(KeyCode::Char('c'), KeyModifiers::CONTROL), Some(Action::Quit));
        assert_eq!(key(KeyCode::Char('c'), KeyModifiers::NONE), None);
    }
}
