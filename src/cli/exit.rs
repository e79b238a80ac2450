//! With which status does a command end, and what does it say when it fails?
//!
//! Scripts depend on the numbers.

use std::fmt;
use std::io;
use std::process::ExitCode;

use crate::image::catalog::CatalogError;
use crate::monitor::sampler::StartError;
use crate::monitor::snapshot::{Snapshot, Verdict};

/// The status that a command ends with; scripts depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Fine, free, granted.
    Fine,
    /// Held, refused.
    Held,
    /// Wrong usage, or an error.
    Error,
    /// It cannot be told.
    CannotTell,
    /// No such image.
    NoSuchImage,
    /// Time was up.
    TimedOut,
    /// Ended by a signal.
    Signal(i32),
    /// The status that the operator chose, or that of the command that was run.
    Status(u8),
}

impl Exit {
    /// The number.
    #[must_use]
    pub fn code(self) -> u8 {
        match self {
            Self::Fine => 0,
            Self::Held => 1,
            Self::Error => 2,
            Self::CannotTell => 3,
            Self::NoSuchImage => 4,
            Self::TimedOut => 124,
            Self::Status(status) => status,
            Self::Signal(number) => u8::try_from(128 + number).unwrap_or(u8::MAX),
        }
    }

    /// The status of a look: what cannot be told counts most, since the answer is not whole then.
    #[must_use]
    pub fn of(snapshot: &Snapshot) -> Self {
        let any = |test: fn(Verdict) -> bool| snapshot.images.iter().any(|i| test(i.verdict));
        if any(|v| !v.is_certain()) || !snapshot.troubles.is_empty() {
            Self::CannotTell
        } else if any(|v| v != Verdict::Free) {
            Self::Held
        } else {
            Self::Fine
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

/// Something that went wrong, with the status it ends in.
#[derive(Debug)]
pub struct Failure {
    exit: Exit,
    message: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Failure {
    pub(super) fn error(message: impl fmt::Display) -> Self {
        Self::new(Exit::Error, message)
    }

    pub(super) fn new(exit: Exit, message: impl fmt::Display) -> Self {
        Self { exit, message: message.to_string() }
    }

    /// The status.
    #[must_use]
    pub fn exit(&self) -> Exit {
        self.exit
    }
}

impl From<CatalogError> for Failure {
    fn from(error: CatalogError) -> Self {
        let exit = match error {
            CatalogError::NoSuchPath(_) => Exit::NoSuchImage,
            CatalogError::NotAnImage(_) => Exit::Error,
            CatalogError::Unreachable { .. } => Exit::CannotTell,
        };
        Self { exit, message: error.to_string() }
    }
}

impl From<StartError> for Failure {
    fn from(error: StartError) -> Self {
        match error {
            StartError::Path(error) => error.into(),
            StartError::Resources(_) => Self::error(error),
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::error(error)
    }
}
