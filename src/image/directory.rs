//! What does one directory hold that can be an image?
//!
//! Listed when its modification time has changed, or may have; what its links lead to is asked each time. Asked by the
//! threads of `linux::storage`: nothing here returns while its file system does not answer.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::catalog::Entry;
use crate::linux::identity::{FileId, FileKind, FileStatus, status};
use crate::linux::lanes::still_going;
use crate::text::escape_path;

/// A change within this time before a listing may have come after it, unnoticed: file systems keep times in steps of
/// up to two seconds.
const CLOCK_STEP: Duration = Duration::from_secs(2);

/// A directory as it was listed last.
#[derive(Debug)]
pub(super) struct Directory {
    pub(super) shown: PathBuf,
    pub(super) id: FileId,
    modified: (i64, u32),
    listed_at: SystemTime,
    pub(super) images: Vec<Arc<Entry>>,
    /// Names of symbolic links, broken ones too: what they lead to may change without a change here.
    pub(super) links: Vec<PathBuf>,
    pub(super) below: Vec<PathBuf>,
    /// Why not all of it could be listed.
    pub(super) trouble: Option<String>,
}

/// How it stands with a directory.
#[derive(Debug)]
pub(super) enum Seen {
    /// As it was.
    Current(Arc<Directory>),
    /// Listed anew.
    Listed(Arc<Directory>),
    /// It is no directory, or has gone.
    Gone,
}

/// Keeps what is known of a directory if it has not changed, lists it otherwise.
pub(super) fn look(shown: &Path, resolved: &Path, known: Option<Arc<Directory>>) -> Seen {
    let now = match status(resolved) {
        Ok(now) if now.kind == FileKind::Directory => now,
        // It went away between two questions.
        _ => return Seen::Gone,
    };
    match known {
        Some(known) if known.is_current(&now) => Seen::Current(known),
        known => {
            let mut listed = Directory::list(shown, resolved, &now);
            known.iter().for_each(|known| listed.share_paths(known));
            Seen::Listed(Arc::new(listed))
        }
    }
}

impl Directory {
    fn list(shown: &Path, resolved: &Path, now: &FileStatus) -> Self {
        let mut directory = Self {
            shown: shown.to_owned(),
            id: now.id,
            modified: now.modified,
            listed_at: SystemTime::now(),
            images: Vec::new(),
            links: Vec::new(),
            below: Vec::new(),
            trouble: None,
        };
        if let Err(error) = directory.read(resolved) {
            directory.trouble = Some(format!("{}: {error}", escape_path(shown)));
        }
        if directory.trouble.is_some() {
            // Not current next time, so that it is asked again.
            directory.listed_at = SystemTime::UNIX_EPOCH;
        }
        // In an order of its own, so that two listings can be compared.
        directory.images.sort_by(|a, b| a.path.cmp(&b.path));
        directory.links.sort();
        directory.below.sort();
        directory
    }

    fn read(&mut self, resolved: &Path) -> std::io::Result<()> {
        for entry in std::fs::read_dir(resolved)? {
            still_going();
            let entry = entry?;
            let name = PathBuf::from(entry.file_name());
            if entry.file_type().is_ok_and(|t| t.is_symlink()) {
                self.links.push(name);
                continue;
            }
            let target = resolved.join(&name);
            let found = match status(&target) {
                Ok(found) => found,
                // A name that has gone again is no image.
                Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => continue,
                Err(error) => {
                    let path = escape_path(&target);
                    self.trouble = Some(format!("{path}: {}", std::io::Error::from(error)));
                    continue;
                }
            };
            match found.kind {
                FileKind::Regular | FileKind::Block => {
                    let path = self.shown.join(&name);
                    self.images.push(Entry::new(path, target, found));
                }
                FileKind::Directory => self.below.push(name),
                FileKind::Special => {}
            }
        }
        Ok(())
    }

    /// Paths that were known before are kept: others have them too.
    fn share_paths(&mut self, known: &Self) {
        for image in &mut self.images {
            let Ok(i) = known.images.binary_search_by(|k| k.path.cmp(&image.path)) else { continue };
            let known = &known.images[i];
            if known.resolved == image.resolved {
                *image = Arc::new(Entry { status: image.status, ..Entry::clone(known) });
            }
        }
    }

    pub(super) fn lists_the_same(&self, other: &Self) -> bool {
        self.id == other.id
            && self.below == other.below
            && self.links == other.links
            && same_files(&self.images, &other.images)
    }

    fn is_current(&self, now: &FileStatus) -> bool {
        let changed_at = u64::try_from(now.modified.0)
            .map_or(SystemTime::UNIX_EPOCH, |s| SystemTime::UNIX_EPOCH + Duration::new(s, now.modified.1));
        let settled = self.listed_at.duration_since(changed_at).is_ok_and(|age| age > CLOCK_STEP);
        self.id == now.id && self.modified == now.modified && settled
    }
}

/// The image that a link leads to. Linked directories are not followed: they may lead round in a circle, or out.
pub(super) fn follow(link: &Path, shown: PathBuf) -> Option<Arc<Entry>> {
    let resolved = link.canonicalize().ok()?;
    let found = status(&resolved).ok()?;
    found.kind.can_be_image().then(|| Entry::new(shown, resolved, found))
}

/// Whether two lists show the same files under the same names.
pub(super) fn same_files(a: &[Arc<Entry>], b: &[Arc<Entry>]) -> bool {
    let same = |a: &Entry, b: &Entry| a.path == b.path && a.resolved == b.resolved && a.status.id == b.status.id;
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| Arc::ptr_eq(a, b) || same(a, b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_is_listed_again_keeps_its_paths_and_not_what_was_known_of_them() {
        let dir = tempfile::tempdir().unwrap();
        let list = |known| match look(dir.path(), dir.path(), known) {
            Seen::Listed(listed) => listed,
            other => panic!("{other:?}"),
        };
        std::fs::write(dir.path().join("a"), "").unwrap();
        let first = list(None);
        std::fs::write(dir.path().join("a"), "longer").unwrap();
        std::fs::write(dir.path().join("b"), "").unwrap();
        let again = list(Some(Arc::clone(&first)));
        assert_eq!(again.images.iter().map(|e| e.status.size).collect::<Vec<_>>(), [6, 0]);
        assert!(Arc::ptr_eq(&again.images[0].path, &first.images[0].path));
        assert!(Arc::ptr_eq(&first.images[0].path, &first.images[0].resolved), "and one path is enough");
    }
}
