//! The panel that says what would be refused now: a row a program; first those that lose data, then those that are refused.

use super::panels::Lines;
use super::{Model, Theme, piece};
use crate::monitor::snapshot::Image;
use crate::monitor::what_if::{Harm, Outcome, what_if_all, worst_first};
use crate::monitor::wording::holder_name;
use crate::text::{escape_path, pad_end};

pub(super) fn lines<'a>(model: &'a Model, image: &'a Image, theme: &Theme) -> Lines<'a> {
    let Some(snapshot) = &model.snapshot else { return Vec::new() };
    let mut answers = what_if_all(snapshot, image);
    worst_first(&mut answers);
    let heading = format!(" {} {} what it would be told now", pad_end("PROGRAM", 26), pad_end("", 8));
    let mut lines = vec![vec![piece(heading, theme.heading)]];
    if model.zoomed {
        let hint =
            format!(" QEMU adds to a refusal: Is another process using the image [{}]?", escape_path(&image.path));
        lines.push(vec![piece(hint, theme.dim)]);
    }
    for answer in &answers {
        let name = pad_end(answer.operation.name, 26);
        lines.push(match &answer.outcome {
            Outcome::Granted if answer.harm == Harm::Overwrites => vec![
                piece(format!(" {name} "), theme.text),
                piece("GRANTED: IT WOULD OVERWRITE AN IMAGE THAT IS IN USE", theme.danger),
            ],
            Outcome::Granted if answer.harm == Harm::WritesBesideWriter => vec![
                piece(format!(" {name} "), theme.text),
                piece("GRANTED: IT WOULD WRITE BESIDE ANOTHER WRITER", theme.danger),
            ],
            Outcome::Granted => vec![piece(format!(" {name} "), theme.text), piece("granted", theme.dim)],
            Outcome::Unknown(why) => {
                vec![piece(format!(" {name} "), theme.text), piece(format!("cannot tell: {why}"), theme.warning)]
            }
            Outcome::Refused(refused) => {
                let mut who: Vec<String> = refused.holders.iter().map(holder_name).collect();
                who.dedup();
                let who = if who.is_empty() { "somebody unknown".to_owned() } else { who.join(", ") };
                let place = if refused.on_image == *image.path {
                    String::new()
                } else {
                    format!(" of {}", escape_path(&refused.on_image))
                };
                let text = format!(" {}   byte {}{place}, {who}", refused.sentence, refused.byte.offset());
                let verdict = if refused.destroys_image {
                    piece("REFUSED TOO LATE: THE IMAGE WOULD BE DELETED", theme.danger)
                } else {
                    piece("refused ", theme.held)
                };
                vec![piece(format!(" {name} "), theme.text), verdict, piece(text, theme.text)]
            }
        });
    }
    if model.zoomed {
        // The programs by their full commands, as they were measured.
        lines.push(vec![piece(" COMMANDS, on an image named a", theme.heading)]);
        let commands =
            answers.iter().filter_map(|a| Some((a.operation.name, a.operation.recipe(image.family())?.command)));
        lines.extend(
            commands.map(|(name, command)| vec![piece(format!(" {} {command}", pad_end(name, 26)), theme.dim)]),
        );
    }
    lines
}
