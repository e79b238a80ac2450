//! What if the storage does not answer a command?
//!
//! A question is asked by a thread of its own. When it does not come back the command says so and ends.

use std::path::Path;

use super::exit::{Exit, Failure};
use crate::linux::lanes::{Lanes, PATIENCE};
use crate::text::escape_path;

/// The answer, if it comes in time.
pub(super) fn patiently<T: Send + 'static>(question: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let mut lanes = Lanes::new(PATIENCE);
    let batch = lanes.ask(&(), vec![question], |ask| ask());
    lanes.wait(&batch).answers.pop()
}

/// The storage of `path` did not answer.
pub(super) fn no_answer(path: &Path) -> Failure {
    let path = escape_path(path);
    Failure::new(
        Exit::CannotTell,
        format!("{path}: its storage does not answer: see that it comes back; nothing can be told before"),
    )
}
