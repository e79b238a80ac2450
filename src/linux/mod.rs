//! What does the kernel say? A source a file, no opinion.
//!
//! Every reader takes the root that it reads from, so that recorded trees can stand in for `/proc` and `/sys` in tests.
//! Asks the kernel, and `protocol` for the meaning of a byte.

pub mod crew;
pub mod descriptors;
pub mod identity;
mod kernel_types;
pub mod lanes;
pub mod lock_table;
pub mod loop_devices;
pub mod mappings;
pub mod mount_namespaces;
pub mod mounts;
pub mod probe;
pub mod process;
pub mod storage;
pub mod task_files;

use std::io;
use std::path::{Path, PathBuf};

/// Where `/proc` and `/sys` are read from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Roots {
    /// Stands for `/proc`.
    pub proc: PathBuf,
    /// Stands for `/sys`.
    pub sys: PathBuf,
}

impl Roots {
    /// The running kernel.
    #[must_use]
    pub fn host() -> Self {
        Self { proc: "/proc".into(), sys: "/sys".into() }
    }

    /// A recorded tree: `DIR` stands for `/proc`, and `DIR/../sys` for `/sys`.
    #[must_use]
    pub fn recorded(proc: &Path) -> Self {
        Self { proc: proc.to_owned(), sys: proc.parent().unwrap_or(proc).join("sys") }
    }

    /// Whether this is the running kernel rather than a recording.
    #[must_use]
    pub fn is_host(&self) -> bool {
        self.proc == Path::new("/proc")
    }
}

/// A file of the kernel's that could not be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read {path}: {source}", path = crate::text::escape_path(.path))]
pub struct ReadError {
    /// Which file.
    pub path: PathBuf,
    /// Why.
    pub source: io::Error,
}

impl ReadError {
    fn new(path: &Path, source: impl Into<io::Error>) -> Self {
        Self { path: path.to_owned(), source: source.into() }
    }
}
