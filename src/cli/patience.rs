//! What if the storage does not answer a command?
//!
//! A question is asked by a thread of its own. When it does not come back the command says so and ends.

use std::fmt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use super::exit::{Exit, Failure};
use crate::linux::lanes::{Lanes, PATIENCE};
use crate::text::escape_path;

/// The answer, if it comes in time.
pub(super) fn patiently<T: Send + 'static>(question: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let mut lanes = Lanes::new(PATIENCE);
    // Asked once; a lane may be asked the same several times.
    let question = Mutex::new(Some(question));
    let ask = move |()| question.lock().unwrap_or_else(PoisonError::into_inner).take().map(|ask| Answer(ask()));
    let batch = lanes.ask(&(), vec![()], ask);
    lanes.wait(&batch).answers.pop().flatten().map(|answer| answer.0)
}

/// What is answered need not be something that can be shown.
struct Answer<T>(T);

impl<T> fmt::Debug for Answer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an answer")
    }
}

/// The storage of `path` did not answer.
pub(super) fn no_answer(path: &Path) -> Failure {
    let path = escape_path(path);
    Failure::new(
        Exit::CannotTell,
        format!("{path}: its storage does not answer: see that it comes back; nothing can be told before"),
    )
}
