//! What can be copied about the row under the cursor?
//!
//! Commands are shown and copied, never run. Pure.

use super::model::{Model, Table};
use crate::monitor::advice::{advice, advice_for_image};
use crate::report::json;
use crate::text::escape_path;

/// A thing to copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Clip {
    /// What it is, in a few words.
    pub name: &'static str,
    /// The text; nothing in it acts on a terminal.
    pub text: String,
}

/// Everything that there is to copy about the selected row.
#[must_use]
pub fn clips(model: &Model) -> Vec<Clip> {
    let mut clips = Vec::new();
    let mut add = |name, text: String| clips.push(Clip { name, text });
    match model.table {
        Table::Images => {
            let Some(image) = model.selected_image() else { return clips };
            add("path", escape_path(&image.path).into_owned());
            let process = image.holders.first().map(|h| &h.process).or(image.openers.first().map(|o| &o.process));
            if let Some(process) = process {
                add("pid of the first holder", process.id.pid.to_string());
            }
            if let Some(advice) = advice_for_image(image) {
                add("command that shows more", advice.inspect);
                add("command that ends the holder", advice.release);
            }
            add("row as JSON", json::image_text(image));
        }
        Table::Processes => {
            let rows = model.processes();
            let Some(row) = model.cursor().and_then(|at| rows.get(at)) else { return clips };
            let advice = advice(row.process);
            add("pid", row.process.id.pid.to_string());
            add("command that shows more", advice.inspect);
            add("command that ends it", advice.release);
            add("command line", crate::text::escape(&row.process.command_line).into_owned());
        }
    }
    clips
}
