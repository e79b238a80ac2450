//! `why`: what would a program be told about an image now, and what is to be done?

use std::io::{self, Write};
use std::path::Path;

use super::commands::unless_closed;
use super::exit::{Exit, Failure};
use super::inquiry::{Inquiry, not_for};
use super::{Common, ListFormat, layout, roots};
use crate::monitor::what_if::{Outcome, WhatIf, what_if, what_if_all, worst_first};
use crate::protocol::Operation;
use crate::report::why;

pub(super) fn why(
    image: &Path,
    operation: Option<&'static Operation>,
    format: ListFormat,
    common: &Common,
) -> Result<Exit, Failure> {
    let inquiry = Inquiry::make(image, roots(common))?;
    let (snapshot, image) = (&inquiry.snapshot, inquiry.image()?);
    let answers = match operation {
        Some(operation) => vec![what_if(snapshot, image, operation).ok_or_else(|| not_for(operation, image))?],
        None => {
            let mut all = what_if_all(snapshot, image);
            worst_first(&mut all);
            all
        }
    };
    let mut out = io::BufWriter::new(io::stdout().lock());
    let written = match (format, operation) {
        (ListFormat::Json, _) => {
            answers.iter().try_for_each(|a| why::write_json(&mut out, common.ascii, snapshot, image, a))
        }
        (ListFormat::Table, None) => why::write_table(&mut out, layout(common), image, &answers),
        (ListFormat::Table, Some(_)) => {
            answers.iter().try_for_each(|a| why::write_text(&mut out, layout(common), snapshot, image, a))
        }
    };
    unless_closed(written.and_then(|()| out.flush()))?;
    Ok(exit_of(&answers))
}

/// What cannot be told counts most.
fn exit_of(answers: &[WhatIf]) -> Exit {
    if answers.iter().any(|a| matches!(a.outcome, Outcome::Unknown(_))) {
        Exit::CannotTell
    } else if answers.iter().any(|a| matches!(a.outcome, Outcome::Refused(_))) {
        Exit::Held
    } else {
        Exit::Fine
    }
}
