//! What can be copied about the row under the cursor?
//!
//! Commands are shown and copied, never run. Pure.

use super::model::{Model, Table};
use crate::linux::process::ProcessFacts;
use crate::monitor::advice::{advice, advice_for_ownerless};
use crate::monitor::wording::short_process_name;
use crate::report::json;
use crate::text::escape_path;

/// A thing to copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Clip {
    /// What it is, in a few words.
    pub name: String,
    /// The text; nothing in it acts on a terminal.
    pub text: String,
}

/// Everything that there is to copy about the selected row.
#[must_use]
pub fn clips(model: &Model) -> Vec<Clip> {
    let mut clips = Vec::new();
    let mut add = |name: String, text: String| clips.push(Clip { name, text });
    match model.table {
        Table::Images => {
            let Some(image) = model.selected_image() else { return clips };
            add("path".to_owned(), escape_path(&image.path).into_owned());
            let holders = image.holders.iter().map(|h| &*h.process);
            let mut users: Vec<&ProcessFacts> = holders.chain(image.openers.iter().map(|o| &*o.process)).collect();
            users.dedup_by_key(|p| p.id);
            for process in users {
                let (name, advice) = (short_process_name(process), advice(process));
                add(format!("pid of {name}"), process.id.pid.to_string());
                add(format!("more about {name}"), advice.inspect);
                add(format!("end {name}"), advice.release);
            }
            if let Some(advice) = advice_for_ownerless(image) {
                add("more about it".to_owned(), advice.inspect);
            }
            add("row as JSON".to_owned(), json::image_text(image));
        }
        Table::Processes => {
            let rows = model.processes();
            let Some(row) = model.cursor().and_then(|at| rows.get(at)) else { return clips };
            let advice = advice(row.process);
            add("pid".to_owned(), row.process.id.pid.to_string());
            add("command that shows more".to_owned(), advice.inspect);
            add("command that ends it".to_owned(), advice.release);
            add("command line".to_owned(), crate::text::escape(&row.process.command_line).into_owned());
        }
    }
    clips
}
