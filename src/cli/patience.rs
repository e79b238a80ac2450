//! What if the storage does not answer a command?
//!
//! A question is asked by a thread of its own. When it does not come back the command says so and ends, and the thread
//! ends with it.

use std::path::Path;
use std::sync::mpsc;

use super::exit::{Exit, Failure};
use crate::linux::lanes::PATIENCE;
use crate::text::escape_path;

/// The answer, if it comes in time.
pub(super) fn patiently<T: Send + 'static>(question: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let (answer, answered) = mpsc::channel();
    let ask = move || {
        // Nobody listens any more when it comes late.
        let _ = answer.send(question());
    };
    std::thread::Builder::new().name("question".to_owned()).spawn(ask).ok()?;
    answered.recv_timeout(PATIENCE).ok()
}

/// The storage of `path` did not answer.
pub(super) fn no_answer(path: &Path) -> Failure {
    let path = escape_path(path);
    Failure::new(
        Exit::CannotTell,
        format!("{path}: its storage does not answer: see that it comes back; nothing can be told before"),
    )
}
