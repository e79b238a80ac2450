//! What does the screen become when something happens, and what is to be done outside?
//!
//! Pure: a message and a model in, the model changed and a list of effects out.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers, MouseButton, MouseEvent, MouseEventKind};
use jiff::Timestamp;

use super::clip::clips;
use super::keymap::{self, Action};
use super::model::{EVENTS_KEPT, Frozen, Key, Model, Overlay, Panel, Table};
use super::test_lock::{self, LockNews};
use super::view::{self, Target};
use crate::monitor::change::{Change, ChangeKind, changes};
use crate::monitor::finding::Finding;
use crate::monitor::sampler::Gap;
use crate::monitor::snapshot::{Image, Snapshot};
use crate::protocol::Access;

/// Something that happened.
#[derive(Clone, Debug)]
pub enum Msg {
    /// A key.
    Key(KeyEvent),
    /// Text was pasted.
    Paste(String),
    /// The mouse, while it is listened to.
    Mouse(MouseEvent),
    /// The terminal has this many columns and rows now.
    Size(u16, u16),
    /// A new snapshot.
    Snapshot(Arc<Snapshot>),
    /// Something may have been missed, and why.
    Gap(Gap),
    /// Something became of a test lock.
    Lock(LockNews),
    /// What time it is, and when it was last looked.
    Clock {
        /// Now.
        now: Timestamp,
        /// The last look.
        looked_at: Option<Timestamp>,
    },
}

/// Something to be done outside the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// End the program.
    Quit,
    /// Have the sampler look now.
    LookNow,
    /// Write every cell again.
    Redraw,
    /// Give the terminal back and stop, until the shell has us go on.
    Suspend,
    /// Time between two looks.
    SetInterval(Duration),
    /// Put text on the operator's clipboard.
    Copy(String),
    /// Listen to the mouse or not.
    Mouse(bool),
    /// Ask whether a test lock would be granted; lock nothing.
    CheckLock {
        /// Of which image.
        key: Key,
        /// Its path with every link resolved.
        resolved: Arc<Path>,
        /// What would be taken, step by step.
        accesses: Vec<Access>,
    },
    /// Take a test lock.
    TakeLock {
        /// On which image.
        key: Key,
        /// Its path with every link resolved.
        resolved: Arc<Path>,
        /// What is to be taken, step by step.
        accesses: Vec<Access>,
        /// For how long at most.
        limit: Duration,
    },
    /// Let go of a test lock.
    ReleaseLock(u64),
}

const INTERVALS: [u64; 9] = [100, 250, 500, 1_000, 2_000, 5_000, 10_000, 30_000, 60_000];

/// Takes in what happened.
pub fn update(model: &mut Model, msg: Msg) -> Vec<Effect> {
    let mut effects = Vec::new();
    match msg {
        Msg::Key(key) => {
            model.note = None;
            let control = key.modifiers.contains(KeyModifiers::CONTROL);
            if model.typing {
                effects.extend(type_key(model, key));
            } else if matches!(model.overlay, Some(Overlay::TestLock(_))) && !control {
                effects.extend(test_lock::key(model, key));
            } else {
                effects.extend(keymap::action(model, key).map(|action| act(model, action)).unwrap_or_default());
            }
        }
        Msg::Paste(text) => {
            // A paste is no command: it goes into the field that is being typed, or nowhere.
            if model.typing {
                model.filter.push(&text.replace(['\n', '\r', '\t'], " "));
                arrange(model);
            }
        }
        Msg::Mouse(mouse) => {
            model.note = None;
            effects.extend(point(model, mouse));
        }
        Msg::Size(columns, rows) => model.size = (columns, rows),
        Msg::Snapshot(snapshot) => take_snapshot(model, snapshot),
        Msg::Gap(gap) => remember(model, Change::about(ChangeKind::Gap, model.now, gap.image.as_deref(), gap.text)),
        Msg::Lock(news) => test_lock::take_news(model, news),
        Msg::Clock { now, looked_at } => (model.now, model.looked_at) = (now, looked_at),
    }
    keep_in_sight(model);
    effects
}

/// A key while the filter is being typed.
fn type_key(model: &mut Model, key: KeyEvent) -> Option<Effect> {
    if key.kind == KeyEventKind::Release {
        return None;
    }
    let control = key.modifiers.contains(KeyModifiers::CONTROL);
    match key.code {
        KeyCode::Char('c' | 'd') if control => return Some(Effect::Quit),
        KeyCode::Char('l') if control => return Some(Effect::Redraw),
        KeyCode::Char('z') if control => return Some(Effect::Suspend),
        KeyCode::Char('w') if control => model.filter.pop_word(),
        KeyCode::Char('u') if control => model.filter.clear(),
        KeyCode::Char(c) if !control => model.filter.push(c.encode_utf8(&mut [0; 4])),
        KeyCode::Backspace if !model.filter.text().is_empty() => model.filter.pop(),
        KeyCode::Backspace | KeyCode::Enter => (model.typing, model.anchor) = (false, None),
        KeyCode::Esc => {
            model.filter.clear();
            arrange(model);
            (model.typing, model.anchor) = (false, None);
        }
        KeyCode::Up | KeyCode::Down => {
            let up = key.code == KeyCode::Up;
            move_cursor(model, |row, last| if up { row.saturating_sub(1) } else { (row + 1).min(last) });
            model.anchor = model.selected.clone();
        }
        _ => {}
    }
    arrange(model);
    None
}

fn act(model: &mut Model, action: Action) -> Vec<Effect> {
    match action {
        Action::Release => test_lock::release_one(model),
        Action::ReleaseAll => test_lock::release_all(model),
        action => act_at_most_once(model, action).into_iter().collect(),
    }
}

fn act_at_most_once(model: &mut Model, action: Action) -> Option<Effect> {
    match action {
        Action::TestLock => test_lock::open(model),
        Action::Release | Action::ReleaseAll => {}
        Action::Quit => return Some(Effect::Quit),
        Action::Look => return Some(Effect::LookNow),
        Action::Redraw => return Some(Effect::Redraw),
        Action::Suspend => return Some(Effect::Suspend),
        Action::Mouse => {
            model.mouse = !model.mouse;
            model.note = Some(if model.mouse { "mouse on" } else { "mouse off" }.to_owned());
            return Some(Effect::Mouse(model.mouse));
        }
        Action::Slower => return set_interval(model, |i| INTERVALS.into_iter().find(|n| *n > i)),
        Action::Faster => return set_interval(model, |i| INTERVALS.into_iter().rev().find(|n| *n < i)),
        Action::Help => toggle(model, Overlay::Help(0)),
        Action::Findings => toggle(model, Overlay::Findings(0)),
        Action::Copy => {
            let clips = clips(model);
            toggle(model, Overlay::Copy { clips, row: 0 });
        }
        Action::Back => back(model),
        Action::Enter => return enter(model),
        Action::Filter => {
            (model.typing, model.anchor) = (true, model.selected.clone());
        }
        Action::Sort => {
            model.sort.next();
            arrange(model);
        }
        Action::Reverse => {
            model.sort.reverse();
            arrange(model);
        }
        Action::Freeze => freeze(model),
        Action::Processes => {
            model.table = if model.table == Table::Images { Table::Processes } else { Table::Images };
            model.top = 0;
            keep_process(model);
        }
        Action::NextPanel => turn_panel(model, 1),
        Action::PreviousPanel => turn_panel(model, Panel::ALL.len() - 1),
        // The numbers of a list take a row of it.
        Action::Panel(number) => match model.overlay {
            Some(Overlay::Copy { .. }) => return copy(model, number),
            Some(_) => {}
            None if model.table == Table::Processes => {}
            None => show_panel(model, Panel::ALL.get(number).copied().unwrap_or(model.panel)),
        },
        Action::ScrollUp => model.scroll = model.scroll.saturating_sub(1),
        Action::ScrollDown => model.scroll += 1,
        Action::Up | Action::Down | Action::PageUp | Action::PageDown | Action::First | Action::Last => {
            go(model, action)
        }
    }
    None
}

/// A movement: of the list on top, of the panel that fills the screen, or of the cursor.
fn go(model: &mut Model, action: Action) {
    let page = view::page(model).max(1);
    let to = |at: usize, last: usize| match action {
        Action::Up => at.saturating_sub(1),
        Action::Down => (at + 1).min(last),
        Action::PageUp => at.saturating_sub(page),
        Action::PageDown => (at + page).min(last),
        Action::First => 0,
        _ => last,
    };
    let findings = model.findings().len().saturating_sub(1);
    let lowest_help = view::lowest_help(model);
    match &mut model.overlay {
        Some(Overlay::Help(top)) => *top = to(*top, lowest_help),
        Some(Overlay::Findings(row)) => *row = to(*row, findings),
        Some(Overlay::Copy { clips, row }) => *row = to(*row, clips.len().saturating_sub(1)),
        // It has keys of its own.
        Some(Overlay::TestLock(_)) => {}
        None if model.zoomed => model.scroll = to(model.scroll, usize::MAX - page),
        None => move_cursor(model, to),
    }
}

fn move_cursor(model: &mut Model, to: impl Fn(usize, usize) -> usize) {
    if let Some(last) = model.row_count().checked_sub(1) {
        select(model, to(model.cursor().unwrap_or_default(), last));
    }
}

fn select(model: &mut Model, row: usize) {
    model.scroll = 0;
    match model.table {
        Table::Images => model.selected = model.image_at(row).map(|i| (i.path.clone(), i.file)),
        Table::Processes => {
            model.process_row = row;
            model.selected_process = model.processes().get(row).map(|p| p.process.id);
        }
    }
}

fn toggle(model: &mut Model, overlay: Overlay) {
    let same = |o: &Overlay| std::mem::discriminant(o) == std::mem::discriminant(&overlay);
    model.overlay = if model.overlay.as_ref().is_some_and(same) { None } else { Some(overlay) };
}

fn back(model: &mut Model) {
    if model.overlay.take().is_some() {
    } else if model.zoomed {
        model.zoomed = false;
    } else if model.filter.is_active() {
        model.filter.clear();
        arrange(model);
    } else if model.table == Table::Processes {
        model.table = Table::Images;
    }
}

fn enter(model: &mut Model) -> Option<Effect> {
    match model.overlay {
        Some(Overlay::Copy { row, .. }) => return copy(model, row),
        Some(Overlay::Findings(row)) => {
            let image = model.findings().get(row).and_then(|(image, _)| image.map(|i| (i.path.clone(), i.file)));
            model.overlay = None;
            if let Some(key) = image {
                model.table = Table::Images;
                // A filter that hides the image is in the way.
                model.selected = Some(key);
                if model.selected_row().is_none() {
                    model.filter.clear();
                    arrange(model);
                }
                show_panel(model, Panel::Bytes);
            }
        }
        Some(Overlay::Help(_)) => model.overlay = None,
        Some(Overlay::TestLock(_)) => {}
        None => model.zoomed = !model.zoomed,
    }
    None
}

fn copy(model: &mut Model, row: usize) -> Option<Effect> {
    let Some(Overlay::Copy { clips, .. }) = &model.overlay else { return None };
    let clip = clips.get(row)?.clone();
    model.overlay = None;
    // Whether the terminal takes it, nobody tells.
    model.note = Some(format!("sent to the terminal's clipboard: {}", clip.text));
    Some(Effect::Copy(clip.text))
}

fn show_panel(model: &mut Model, panel: Panel) {
    (model.panel, model.scroll) = (panel, 0);
}

fn turn_panel(model: &mut Model, by: usize) {
    let at = Panel::ALL.iter().position(|p| *p == model.panel).unwrap_or_default();
    show_panel(model, Panel::ALL[(at + by) % Panel::ALL.len()]);
}

fn set_interval(model: &mut Model, next: impl Fn(u64) -> Option<u64>) -> Option<Effect> {
    let now = u64::try_from(model.interval.as_millis()).unwrap_or(u64::MAX);
    let interval = Duration::from_millis(next(now)?);
    model.interval = interval;
    model.note = Some(format!("looks every {} s", interval.as_secs_f64()));
    Some(Effect::SetInterval(interval))
}

/// The screen goes on, with what has come meanwhile.
pub(super) fn thaw(model: &mut Model) {
    if let Some(live) = model.frozen.take().and_then(|f| f.live) {
        show(model, live);
    }
}

fn freeze(model: &mut Model) {
    match model.frozen {
        Some(_) => thaw(model),
        None => model.frozen = Some(Frozen { since: model.now, live: None, missed: 0, events: model.events.len() }),
    }
}

fn take_snapshot(model: &mut Model, snapshot: Arc<Snapshot>) {
    let newest = model.frozen.as_ref().and_then(|f| f.live.clone()).or_else(|| model.snapshot.clone());
    if let Some(before) = newest {
        let happened = changes(&before, &snapshot);
        if let Some(frozen) = &mut model.frozen {
            frozen.missed += happened.len();
        }
        happened.into_iter().for_each(|change| remember(model, change));
    }
    match &mut model.frozen {
        Some(frozen) if model.snapshot.is_some() => frozen.live = Some(snapshot),
        _ => show(model, snapshot),
    }
}

fn remember(model: &mut Model, change: Change) {
    model.events.push_back(change);
    if model.events.len() > EVENTS_KEPT {
        model.events.pop_front();
        if let Some(frozen) = &mut model.frozen {
            frozen.events = frozen.events.saturating_sub(1);
        }
    }
}

/// The selection follows the image; when that is gone, the one under the same name, or what stands in its row now.
fn show(model: &mut Model, snapshot: Arc<Snapshot>) {
    let row = model.selected_row().unwrap_or_default();
    model.troubles = snapshot.troubles.iter().map(|t| Finding::of_trouble(t)).collect();
    model.snapshot = Some(snapshot);
    keep_selection(model, row);
    keep_process(model);
}

/// Filters and sorts anew; the cursor stays on its image, or in its row if that is no longer shown.
fn arrange(model: &mut Model) {
    let row = model.selected_row().unwrap_or_default();
    keep_selection(model, row);
    keep_process(model);
}

fn keep_selection(model: &mut Model, row: usize) {
    model.arrange();
    if let Some(anchor) = model.anchor.clone() {
        let before = model.selected.replace(anchor);
        if model.selected_row().is_some() {
            return;
        }
        model.selected = before;
    }
    if model.selected_row().is_some() {
        return;
    }
    let path = model.selected.take().map(|(path, _)| path);
    let same_name = |i: &Image| Some(&i.path) == path.as_ref();
    let by_name = (0..model.rows.len()).find(|r| model.image_at(*r).is_some_and(same_name));
    let row = by_name.unwrap_or(row.min(model.rows.len().saturating_sub(1)));
    model.selected = model.image_at(row).map(|i| (i.path.clone(), i.file));
}

fn keep_process(model: &mut Model) {
    if model.table == Table::Processes {
        let processes: Vec<_> = model.processes().iter().map(|p| p.process.id).collect();
        if !model.selected_process.is_some_and(|id| processes.contains(&id)) {
            // What stands in its row now, as for images.
            let row = model.process_row.min(processes.len().saturating_sub(1));
            model.selected_process = processes.get(row).copied();
        }
    }
}

fn point(model: &mut Model, mouse: MouseEvent) -> Option<Effect> {
    match mouse.kind {
        MouseEventKind::ScrollUp | MouseEventKind::ScrollDown => {
            let up = mouse.kind == MouseEventKind::ScrollUp;
            let in_panel =
                matches!(view::target(model, mouse.column, mouse.row), Some(Target::Panel(_) | Target::InPanel));
            return act_at_most_once(
                model,
                match (in_panel, up) {
                    (true, true) => Action::ScrollUp,
                    (true, false) => Action::ScrollDown,
                    (false, true) => Action::Up,
                    (false, false) => Action::Down,
                },
            );
        }
        MouseEventKind::Down(MouseButton::Left) => {}
        _ => return None,
    }
    match view::target(model, mouse.column, mouse.row)? {
        Target::Row(row) => select(model, row),
        Target::Panel(panel) => show_panel(model, panel),
        Target::InPanel => {}
    }
    None
}

fn keep_in_sight(model: &mut Model) {
    let rows = view::table_rows(model);
    let selected = model.cursor().unwrap_or_default();
    // No empty rows at the end while others are hidden above.
    model.top = model.top.min(model.row_count().saturating_sub(rows)).min(selected);
    if rows > 0 && selected >= model.top + rows {
        model.top = selected + 1 - rows;
    }
    model.scroll = model.scroll.min(view::lowest_scroll(model));
    if let Some(Overlay::Help(top)) = model.overlay {
        model.overlay = Some(Overlay::Help(top.min(view::lowest_help(model))));
    }
    if let Some(Overlay::Findings(row)) = model.overlay {
        model.overlay = Some(Overlay::Findings(row.min(model.findings().len().saturating_sub(1))));
    }
}
