//! Which image and which program does the operator mean, and how do they stand now?
//!
//! What `why`, `wait` and `hold` have in common: an image with the files of its backing chain, wherever they lie.

use std::path::{Path, PathBuf};

use super::exit::{Exit, Failure};
use super::patience::{no_answer, patiently};
use crate::image::chain;
use crate::linux::Roots;
use crate::linux::identity::{FileKind, status};
use crate::monitor::look::{Looker, Scope};
use crate::monitor::snapshot::{Image, Snapshot};
use crate::protocol::{Family, Operation};
use crate::text::escape_path;

/// An image, what it stands on, and everybody who uses any of it, at this moment.
pub(super) struct Inquiry {
    pub(super) snapshot: Snapshot,
    path: PathBuf,
}

impl Inquiry {
    /// Looks at `image` and the files below it.
    pub(super) fn make(image: &Path, roots: Roots) -> Result<Self, Failure> {
        let (path, name) = (image.to_owned(), image.to_owned());
        let is_directory = move || status(&path).is_ok_and(|s| s.kind == FileKind::Directory);
        if patiently(is_directory) == Some(true) {
            let path = escape_path(image);
            return Err(Failure::error(format!(
                "{path} is a directory: name one image; qlock-top list {path} shows all"
            )));
        }
        let mut paths = vec![image.to_owned()];
        // Where the chain does not answer, the look that follows says which file of it.
        let below = patiently(move || chain::below(&name)).unwrap_or_default().files;
        paths.extend(below.into_iter().map(|f| f.path));
        let snapshot = Snapshot::of(&Looker::new(roots, &paths, false, None)?.look(Scope::Everything));
        let inquiry = Self { snapshot, path: image.to_owned() };
        match inquiry.snapshot.images.iter().any(|i| *i.path == inquiry.path) {
            true => Ok(inquiry),
            // It could not even be found: the only thing that can be wrong with a path that was there.
            false if !inquiry.snapshot.troubles.is_empty() => Err(no_answer(image)),
            false => Err(gone(image)),
        }
    }

    /// The image itself.
    pub(super) fn image(&self) -> Result<&Image, Failure> {
        self.snapshot.images.iter().find(|i| *i.path == self.path).ok_or_else(|| gone(&self.path))
    }
}

pub(super) fn gone(image: &Path) -> Failure {
    Failure::new(Exit::NoSuchImage, format!("{}: no such file or directory any more", escape_path(image)))
}

/// The program of that name, or which names there are.
pub(super) fn parse_operation(name: &str) -> Result<&'static Operation, String> {
    Operation::named(name).ok_or_else(|| {
        // Those that share a word with what was meant come first.
        let words: Vec<&str> = name.split('-').filter(|w| w.len() > 1).collect();
        let near = |o: &&Operation| words.iter().any(|w| o.name.contains(w));
        let close: Vec<&str> = Operation::ALL.iter().filter(near).map(|o| o.name).collect();
        let all: Vec<&str> = Operation::ALL.iter().map(|o| o.name).collect();
        if close.is_empty() {
            format!("there is no such program; known are {}", all.join(", "))
        } else {
            format!("there is no such program; perhaps {}? `qlock-top why IMAGE` lists all", close.join(", "))
        }
    })
}

/// The program exists, but not for this format.
pub(super) fn not_for(operation: &Operation, image: &Image) -> Failure {
    let format = image.format.map_or("unknown", |f| f.name());
    let other = match image.family() {
        Family::Raw => "qcow2",
        Family::Qcow2 => "raw",
    };
    Failure::error(format!(
        "{}: its format is {format}, and {} is known for {other} images only; `qlock-top why {0}` lists what there is",
        escape_path(&image.path),
        operation.name
    ))
}
