//! Which key does what, and when?
//!
//! One table: the program acts by it, and the bottom bar, the help and the README's list are drawn from it. Pure.

use crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use super::model::{Model, Table};

/// What a key asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// One row up, or one line in a panel that fills the screen.
    Up,
    /// One row down.
    Down,
    /// A screenful up.
    PageUp,
    /// A screenful down.
    PageDown,
    /// To the first row.
    First,
    /// To the last row.
    Last,
    /// The panel one line up.
    ScrollUp,
    /// The panel one line down.
    ScrollDown,
    /// The next panel.
    NextPanel,
    /// The panel before.
    PreviousPanel,
    /// The panel of that number, from 0.
    Panel(usize),
    /// The panel fills the screen; in a list: takes the row.
    Enter,
    /// Leave what is on top: list, large panel, filter.
    Back,
    /// By the next column.
    Sort,
    /// The other way round.
    Reverse,
    /// Type a filter.
    Filter,
    /// Hold the screen still, or let it go on.
    Freeze,
    /// Processes instead of images.
    Processes,
    /// List every finding.
    Findings,
    /// Copy something about the row.
    Copy,
    /// Choose a test lock for the image.
    TestLock,
    /// Let go of the test lock on the image.
    Release,
    /// Let go of every test lock.
    ReleaseAll,
    /// Look less often.
    Slower,
    /// Look more often.
    Faster,
    /// Look at once.
    Look,
    /// Listen to the mouse, or no longer.
    Mouse,
    /// Draw everything again.
    Redraw,
    /// Show or hide the list of keys.
    Help,
    /// Give the terminal to the shell.
    Suspend,
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
    /// One line for the help; empty: said by another line.
    pub help: &'static str,
    /// When it does something.
    pub when: When,
}

/// When a key does something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// Always.
    Always,
    /// While no list lies over the tables.
    NoList,
    /// While the table of images is shown, with its panels.
    Images,
}

impl Binding {
    /// Whether it does something now.
    #[must_use]
    pub fn is_valid(&self, model: &Model) -> bool {
        let list = model.overlay.is_some();
        match self.when {
            When::Always => true,
            When::NoList => !list,
            When::Images => !list && model.table == Table::Images,
        }
    }
}

/// What keys do while a filter is typed: the rest is text.
pub const TYPING: &[(&str, &str)] = &[
    ("Enter", "keep the filter"),
    ("Esc", "forget it"),
    ("Ctrl-W", "forget the last word"),
    ("Ctrl-U", "forget all of it"),
    ("Up Down", "another row"),
];

/// An action is valid in the same places whatever key asks for it.
const fn when(action: Action) -> When {
    match action {
        Action::NextPanel | Action::PreviousPanel | Action::Sort | Action::Reverse | Action::TestLock => When::Images,
        Action::ScrollUp | Action::ScrollDown | Action::Filter | Action::Freeze | Action::Processes => When::NoList,
        _ => When::Always,
    }
}

const fn plain(
    keys: &'static [KeyCode],
    action: Action,
    label: &'static str,
    name: &'static str,
    help: &'static str,
) -> Binding {
    Binding { keys, control: false, action, label, name, help, when: when(action) }
}

const fn control(keys: &'static [KeyCode], action: Action, label: &'static str, help: &'static str) -> Binding {
    Binding { keys, control: true, action, label, name: "", help, when: when(action) }
}

/// Every key while no text is being typed.
pub const KEYMAP: &[Binding] = &[
    plain(&[KeyCode::Char('?'), KeyCode::F(1)], Action::Help, "?", "help", "show or hide this list"),
    plain(&[KeyCode::Char('q')], Action::Quit, "q", "quit", "quit"),
    plain(&[KeyCode::Up, KeyCode::Char('k')], Action::Up, "Up k", "", "one row up"),
    plain(&[KeyCode::Down, KeyCode::Char('j')], Action::Down, "Down j", "", "one row down"),
    plain(&[KeyCode::PageUp], Action::PageUp, "PgUp", "", "a screenful up"),
    plain(&[KeyCode::PageDown], Action::PageDown, "PgDn", "", "a screenful down"),
    plain(&[KeyCode::Home, KeyCode::Char('g')], Action::First, "Home g", "", "to the first row"),
    plain(&[KeyCode::End, KeyCode::Char('G')], Action::Last, "End G", "", "to the last row"),
    plain(&[KeyCode::Tab], Action::NextPanel, "Tab", "panel", "next panel; 1 to 5 take one directly"),
    plain(&[KeyCode::BackTab], Action::PreviousPanel, "Shift-Tab", "", "panel before"),
    plain(&[KeyCode::Char('1')], Action::Panel(0), "1", "", ""),
    plain(&[KeyCode::Char('2')], Action::Panel(1), "2", "", ""),
    plain(&[KeyCode::Char('3')], Action::Panel(2), "3", "", ""),
    plain(&[KeyCode::Char('4')], Action::Panel(3), "4", "", ""),
    plain(&[KeyCode::Char('5')], Action::Panel(4), "5", "", ""),
    plain(&[KeyCode::Char('[')], Action::ScrollUp, "[", "", "panel one line up"),
    plain(&[KeyCode::Char(']')], Action::ScrollDown, "]", "", "panel one line down"),
    plain(&[KeyCode::Enter], Action::Enter, "Enter", "zoom", "panel on the whole screen; in a list: take the row"),
    plain(&[KeyCode::Esc], Action::Back, "Esc", "", "back: from a list, a large panel, a filter"),
    plain(
        &[KeyCode::Char('/')],
        Action::Filter,
        "/",
        "filter",
        "filter by words and pid: vm: user: state: perm: format: path:",
    ),
    plain(&[KeyCode::Char('s')], Action::Sort, "s", "sort", "sort by the next column"),
    plain(&[KeyCode::Char('S')], Action::Reverse, "S", "", "sort the other way round"),
    plain(&[KeyCode::Char('t')], Action::TestLock, "t", "test", "check or take a test lock on the image"),
    plain(&[KeyCode::Char('u')], Action::Release, "u", "", "let go of the test lock on the image"),
    plain(&[KeyCode::Char('U')], Action::ReleaseAll, "U", "", "let go of every test lock"),
    plain(&[KeyCode::Char(' ')], Action::Freeze, "space", "freeze", "hold the screen still, or let it go on"),
    plain(&[KeyCode::Char('p')], Action::Processes, "p", "processes", "processes instead of images, and back"),
    plain(&[KeyCode::Char('f')], Action::Findings, "f", "findings", "list every finding"),
    plain(&[KeyCode::Char('c')], Action::Copy, "c", "copy", "copy path, pid, commands or JSON of the row"),
    plain(&[KeyCode::Char('+'), KeyCode::Char('=')], Action::Slower, "+", "", "look less often"),
    plain(&[KeyCode::Char('-')], Action::Faster, "-", "", "look more often"),
    plain(&[KeyCode::Char('r')], Action::Look, "r", "", "look now instead of at the next tick"),
    plain(&[KeyCode::Char('m')], Action::Mouse, "m", "", "listen to the mouse, or no longer"),
    control(&[KeyCode::Char('l')], Action::Redraw, "Ctrl-L", "draw the screen again"),
    control(&[KeyCode::Char('z')], Action::Suspend, "Ctrl-Z", "back to the shell; fg returns"),
    control(&[KeyCode::Char('c'), KeyCode::Char('d')], Action::Quit, "Ctrl-C", "quit, as Ctrl-D does"),
];

/// What `key` asks for, if anything.
#[must_use]
pub fn action(model: &Model, key: KeyEvent) -> Option<Action> {
    if key.kind == KeyEventKind::Release {
        return None;
    }
    // Shift is in the character already; Alt turns a key into another one that nobody has bound.
    let control = key.modifiers.contains(KeyModifiers::CONTROL);
    let other = key.modifiers.intersects(KeyModifiers::ALT | KeyModifiers::SUPER | KeyModifiers::META);
    let bound = |b: &&Binding| b.control == control && b.keys.contains(&key.code) && b.is_valid(model);
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
            assert!(binding.label.is_ascii() && binding.help.is_ascii());
        }
    }

    #[test]
    fn control_and_alt_make_other_keys() {
        let zone = jiff::tz::TimeZone::UTC;
        let second = std::time::Duration::from_secs(1);
        let model = Model::new("/images".to_owned(), second, (80, 24), jiff::Timestamp::UNIX_EPOCH, zone);
        let key = |code, modifiers| action(&model, KeyEvent::new(code, modifiers));
        assert_eq!(key(KeyCode::Char('q'), KeyModifiers::NONE), Some(Action::Quit));
        assert_eq!(key(KeyCode::Char('G'), KeyModifiers::SHIFT), Some(Action::Last));
        assert_eq!(key(KeyCode::Char('q'), KeyModifiers::CONTROL), None);
        assert_eq!(key(KeyCode::Char('q'), KeyModifiers::ALT), None);
        assert_eq!(key(KeyCode::Char('c'), KeyModifiers::CONTROL), Some(Action::Quit));
        assert_eq!(key(KeyCode::Char('c'), KeyModifiers::NONE), Some(Action::Copy));
    }
}
