//! `wait`: when would a program be let in?
//!
//! Asks each file about its bytes over and over, which locks nothing and costs microseconds. Who is in the way is looked
//! for only when time is up: that goes through every process.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::exit::{Exit, Failure};
use super::inquiry::{Inquiry, gone, not_for};
use super::{Common, layout, roots};
use crate::hold::PATIENCE_STEP;
use crate::linux::lanes::PATIENCE;
use crate::linux::probe::{self, Asker, OpenError};
use crate::linux::storage::{Lane, Storage};
use crate::monitor::what_if::{Harm, Outcome, WhatIf, chain, first_refusal, what_if};
use crate::protocol::{Access, HeldByOthers, Judgement, Operation, Recipe, judge};
use crate::report::why;

/// However short the time is: storage that works answers.
const SHORTEST_PATIENCE: Duration = Duration::from_millis(200);
/// Between two looks at everybody who uses an image.
const HARM_STEP: Duration = Duration::from_millis(500);

/// One image that is waited for, with the files that are opened below it.
struct Awaited {
    path: PathBuf,
    recipe: &'static Recipe,
    below: Vec<(PathBuf, Access)>,
}

pub(super) fn wait(
    images: &[PathBuf],
    operation: &'static Operation,
    timeout: Option<Duration>,
    common: &Common,
) -> Result<Exit, Failure> {
    let start = Instant::now();
    let mut awaited: Vec<Arc<Awaited>> = Vec::new();
    for path in images {
        match ask(path, operation, common)? {
            (_, answer) if matches!(answer.outcome, Outcome::Unknown(_)) => return blind(path, operation, common),
            (inquiry, _) => awaited.push(Arc::new(Awaited::of(&inquiry, operation)?)),
        }
    }
    let mut storage =
        Storage::with_patience(&roots(common), timeout.map_or(PATIENCE, |t| t.clamp(SHORTEST_PATIENCE, PATIENCE)));
    loop {
        let mut all_pass = true;
        for (image, answer) in awaited.iter().zip(ask_all(&awaited, &mut storage)) {
            match answer {
                Ok(passes) => all_pass &= passes,
                Err(Trouble::Gone(path)) => return Err(gone(&path)),
                Err(Trouble::Blind) => return blind(&image.path, operation, common),
            }
        }
        // It would be let in, and that may be the danger: somebody may use the image without a lock that stops it.
        if all_pass && harmless(&awaited, operation, common)? {
            return Ok(Exit::Fine);
        }
        let left = timeout.map(|t| t.saturating_sub(start.elapsed()));
        if left == Some(Duration::ZERO) {
            return time_is_up(&awaited, &mut storage, operation, common);
        }
        // No event tells of a lock that is let go: see `PATIENCE_STEP`.
        let step = if all_pass { HARM_STEP } else { PATIENCE_STEP };
        std::thread::sleep(left.map_or(step, |l| l.min(step)));
    }
}

fn ask(path: &Path, operation: &'static Operation, common: &Common) -> Result<(Inquiry, WhatIf), Failure> {
    let inquiry = Inquiry::make(path, roots(common))?;
    let answer = what_if(&inquiry.snapshot, inquiry.image()?, operation);
    match answer {
        Some(answer) => Ok((inquiry, answer)),
        None => Err(not_for(operation, inquiry.image()?)),
    }
}

/// Says what is not known; never "granted".
fn blind(path: &Path, operation: &'static Operation, common: &Common) -> Result<Exit, Failure> {
    tell(path, operation, common)?;
    Ok(Exit::CannotTell)
}

fn tell(path: &Path, operation: &'static Operation, common: &Common) -> Result<(), Failure> {
    let (inquiry, answer) = ask(path, operation, common)?;
    // Standard output stays empty: what is waited for is not there.
    let _ = why::write_text(io::stderr(), layout(common), &inquiry.snapshot, inquiry.image()?, &answer);
    Ok(())
}

/// Whether nobody who uses an image would be harmed by the program; to know that, every process is asked.
fn harmless(awaited: &[Arc<Awaited>], operation: &'static Operation, common: &Common) -> Result<bool, Failure> {
    for image in awaited {
        let (_, answer) = ask(&image.path, operation, common)?;
        if answer.harm != Harm::None {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Storage that does not answer lets nobody in either: it is waited for like a holder.
fn ask_all(awaited: &[Arc<Awaited>], storage: &mut Storage) -> Vec<Result<bool, Trouble>> {
    let questions = awaited.iter().map(|image| (Lane::Given(image.path.clone()), Arc::clone(image)));
    let answers = storage.answers(questions, |image: Arc<Awaited>| image.passes());
    answers.into_iter().map(|answer| answer.unwrap_or(Ok(false))).collect()
}

fn time_is_up(
    awaited: &[Arc<Awaited>],
    storage: &mut Storage,
    operation: &'static Operation,
    common: &Common,
) -> Result<Exit, Failure> {
    let _ = writeln!(io::stderr(), "qlock-top: time is up");
    for (image, answer) in awaited.iter().zip(ask_all(awaited, storage)) {
        let harms = || !matches!(harmless(std::slice::from_ref(image), operation, common), Ok(true));
        if !matches!(answer, Ok(true)) || harms() {
            // What cannot even be told now does not make it another status.
            if let Err(failure) = tell(&image.path, operation, common) {
                let _ = writeln!(io::stderr(), "qlock-top: {failure}");
            }
        }
    }
    Ok(Exit::TimedOut)
}

#[derive(Debug)]
enum Trouble {
    /// Of which file.
    Gone(PathBuf),
    Blind,
}

impl Awaited {
    fn of(inquiry: &Inquiry, operation: &'static Operation) -> Result<Self, Failure> {
        let image = inquiry.image()?;
        let recipe = operation.recipe(image.family()).ok_or_else(|| not_for(operation, image))?;
        // Whoever takes nothing below the image does not open it either.
        let below = if operation.backing.is_empty() {
            Vec::new()
        } else {
            let links = chain(&inquiry.snapshot, image).into_iter().flatten();
            links.map(|l| (l.image.resolved.to_path_buf(), operation.backing.of(l.family))).collect()
        };
        Ok(Self { path: image.path.to_path_buf(), recipe, below })
    }

    fn passes(&self) -> Result<bool, Trouble> {
        let resolved = self.path.canonicalize().map_err(|_| Trouble::Gone(self.path.clone()))?;
        if !matches!(judge(self.recipe, held(&resolved)?), Judgement::Granted) {
            return Ok(false);
        }
        for (path, access) in &self.below {
            if first_refusal(*access, held(path)?).is_some() {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

fn held(resolved: &Path) -> Result<HeldByOthers, Trouble> {
    let (file, _) = probe::open_if_image(resolved).map_err(|e| match e {
        OpenError::Errno(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) | OpenError::NotAnImage => {
            Trouble::Gone(resolved.to_owned())
        }
        OpenError::Errno(_) => Trouble::Blind,
    })?;
    probe::held_bytes(&file, Asker::Process).map(|found| found.held_by_others()).map_err(|_| Trouble::Blind)
}
