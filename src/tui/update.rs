//! What does the screen become when something happens, and what is to be done outside?
//!
//! Pure: a message and a model in, the model changed and a list of effects out.

use std::sync::Arc;

use crossterm::event::KeyEvent;

use super::keymap::{self, Action};
use super::model::Model;
use super::view;
use crate::monitor::snapshot::{Image, Snapshot};

/// Something that happened.
#[derive(Clone, Debug)]
pub enum Msg {
    /// A key.
    Key(KeyEvent),
    /// The terminal has this many columns and rows now.
    Size(u16, u16),
    /// A new snapshot.
    Snapshot(Arc<Snapshot>),
    /// Something may have been missed, and why.
    Gap(String),
}

/// Something to be done outside the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// End the program.
    Quit,
    /// Have the sampler look now.
    LookNow,
    /// Write every cell again.
    Redraw,
}

/// Takes in what happened.
pub fn update(model: &mut Model, msg: Msg) -> Vec<Effect> {
    let mut effects = Vec::new();
    match msg {
        Msg::Key(key) => effects.extend(keymap::action(key).and_then(|action| act(model, action))),
        Msg::Size(columns, rows) => model.size = (columns, rows),
        Msg::Snapshot(snapshot) => take_snapshot(model, snapshot),
        Msg::Gap(text) => model.gap = Some(text),
    }
    keep_selection_in_sight(model);
    effects
}

fn act(model: &mut Model, action: Action) -> Option<Effect> {
    let page = view::table_rows(model).max(1);
    match action {
        Action::Quit => return Some(Effect::Quit),
        Action::Look => return Some(Effect::LookNow),
        Action::Redraw => return Some(Effect::Redraw),
        Action::Help => model.help = !model.help,
        Action::Back => model.help = false,
        Action::Up => move_selection(model, |row, _| row.saturating_sub(1)),
        Action::Down => move_selection(model, |row, last| (row + 1).min(last)),
        Action::PageUp => move_selection(model, |row, _| row.saturating_sub(page)),
        Action::PageDown => move_selection(model, |row, last| (row + page).min(last)),
        Action::First => move_selection(model, |_, _| 0),
        Action::Last => move_selection(model, |_, last| last),
    }
    None
}

fn move_selection(model: &mut Model, to: impl Fn(usize, usize) -> usize) {
    if let Some(last) = model.images().len().checked_sub(1) {
        let row = model.selected_row().unwrap_or_default();
        select(model, to(row, last));
    }
}

fn select(model: &mut Model, row: usize) {
    model.selected = model.images().get(row).map(|i| (i.path.clone(), i.file));
}

/// The selection follows the image; when that is gone, the one under the same name, or what stands in its row now.
fn take_snapshot(model: &mut Model, snapshot: Arc<Snapshot>) {
    let row = model.selected_row().unwrap_or_default();
    model.snapshot = Some(snapshot);
    if model.selected_row().is_some() {
        return;
    }
    let path = model.selected.take().map(|(path, _)| path);
    let same_name = |i: &Image| Some(&i.path) == path.as_ref();
    let last = model.images().len().saturating_sub(1);
    let row = model.images().iter().position(same_name).unwrap_or(row.min(last));
    select(model, row);
}

fn keep_selection_in_sight(model: &mut Model) {
    let rows = view::table_rows(model);
    let selected = model.selected_row().unwrap_or_default();
    // No empty rows at the end while others are hidden above.
    let lowest_top = model.images().len().saturating_sub(rows);
    model.top = model.top.min(lowest_top).min(selected);
    if rows > 0 && selected >= model.top + rows {
        model.top = selected + 1 - rows;
    }
}
