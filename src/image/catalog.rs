//! Which files are watched?
//!
//! Directories (with or without what is below them), single image files and block devices, as the operator named them.
//! The list is kept by asking each directory for its modification time, which costs one call and works on every file
//! system; `watch` only makes that happen sooner. FIFOs, sockets and character devices are never listed and never opened.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::linux::identity::{FileId, FileKind, FileStatus, status};
use crate::text::escape_path;

/// A file that is watched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// As it is shown: the path that the operator gave, and what was found below it.
    pub path: PathBuf,
    /// The same with every link resolved: what is opened, and what inotify reports.
    pub resolved: PathBuf,
    /// What it was when it was listed.
    pub status: FileStatus,
}

/// Why a path cannot be watched at all.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// Nothing there.
    #[error("{}: no such file or directory", escape_path(.0))]
    NoSuchPath(PathBuf),
    /// A FIFO, socket or character device.
    #[error("{}: neither a directory nor an image (a regular file or block device); nothing was opened", escape_path(.0))]
    NotAnImage(PathBuf),
    /// It may not even be looked at.
    #[error("{}: {source}", escape_path(.path))]
    Unreachable {
        /// Which path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

struct Directory {
    shown: PathBuf,
    id: FileId,
    modified: (i64, u32),
    listed_at: SystemTime,
    images: Vec<Entry>,
    /// Names of symbolic links, broken ones too: what they lead to may change without a change here.
    links: Vec<PathBuf>,
    /// What the links lead to now.
    linked: Vec<Entry>,
    below: Vec<PathBuf>,
}

/// The list of what is watched.
pub struct Catalog {
    given: Vec<PathBuf>,
    recursive: bool,
    /// By resolved path, so that a directory that is reached twice is listed once.
    directories: BTreeMap<PathBuf, Directory>,
    files: Vec<Entry>,
    troubles: Vec<String>,
}

/// A change within this time before a listing may have come after it, unnoticed: file systems keep times in steps of
/// up to two seconds.
const CLOCK_STEP: Duration = Duration::from_secs(2);

impl Catalog {
    /// Lists `given` for the first time.
    ///
    /// # Errors
    /// When a path leads nowhere or to something that is no image.
    pub fn new(given: &[PathBuf], recursive: bool) -> Result<Self, CatalogError> {
        for path in given {
            let kind = status(path).map_err(|e| match e {
                rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR => CatalogError::NoSuchPath(path.clone()),
                e => CatalogError::Unreachable { path: path.clone(), source: e.into() },
            })?;
            if kind.kind == FileKind::Special {
                return Err(CatalogError::NotAnImage(path.clone()));
            }
        }
        let mut catalog = Self {
            given: given.to_vec(),
            recursive,
            directories: BTreeMap::new(),
            files: Vec::new(),
            troubles: Vec::new(),
        };
        catalog.refresh();
        Ok(catalog)
    }

    /// Each watched file, in the order of the paths as shown.
    #[must_use]
    pub fn images(&self) -> Vec<&Entry> {
        let mut all: Vec<&Entry> =
            self.files.iter().chain(self.directories.values().flat_map(|d| d.images.iter().chain(&d.linked))).collect();
        all.sort_by(|a, b| a.path.cmp(&b.path));
        all.dedup_by(|a, b| a.path == b.path);
        all
    }

    /// What inotify is to watch: resolved paths, and whether each is a directory. A single file is watched itself, and so
    /// is a file that a link in a watched directory leads to.
    #[must_use]
    pub fn watch_points(&self) -> BTreeMap<PathBuf, bool> {
        let mut points: BTreeMap<PathBuf, bool> = self.directories.keys().map(|d| (d.clone(), true)).collect();
        for entry in self.images() {
            if entry.resolved.parent().is_none_or(|p| !self.directories.contains_key(p)) {
                points.insert(entry.resolved.clone(), false);
            }
        }
        points
    }

    /// The identity behind each of the [`watch_points`](Self::watch_points): what was removed and made again needs a new
    /// inotify watch.
    #[must_use]
    pub fn watch_ids(&self) -> BTreeMap<PathBuf, FileId> {
        let files = self.images().into_iter().map(|e| (e.resolved.clone(), e.status.id));
        files.chain(self.directories.iter().map(|(path, d)| (path.clone(), d.id))).collect()
    }

    /// Whether a file of this resolved path would be listed.
    #[must_use]
    pub fn covers(&self, path: &Path) -> bool {
        path.parent().is_some_and(|p| self.directories.contains_key(p)) || self.given.iter().any(|g| g == path)
    }

    /// What could not be listed, in words.
    #[must_use]
    pub fn troubles(&self) -> &[String] {
        &self.troubles
    }

    /// Brings the list up to date; true if it changed.
    ///
    /// Nothing here fails: a directory that cannot be read now is told in [`Catalog::troubles`] and asked again next
    /// time.
    pub fn refresh(&mut self) -> bool {
        let before = std::mem::take(&mut self.directories);
        let (files, troubles) = (std::mem::take(&mut self.files), std::mem::take(&mut self.troubles));
        let mut changed = false;
        let mut old = before;
        for path in self.given.clone() {
            match status(&path) {
                Ok(found) if found.kind == FileKind::Directory => match path.canonicalize() {
                    Ok(resolved) => self.take_directory(&path, resolved, &mut old, &mut changed),
                    Err(e) => self.troubles.push(format!("{}: {e}", escape_path(&path))),
                },
                Ok(found) if found.kind == FileKind::Special => {
                    self.troubles.push(format!("{}: is no longer an image", escape_path(&path)));
                }
                Ok(found) => match path.canonicalize() {
                    Ok(resolved) => self.files.push(Entry { path, resolved, status: found }),
                    Err(e) => self.troubles.push(format!("{}: {e}", escape_path(&path))),
                },
                Err(e) => self.troubles.push(format!("{}: {}", escape_path(&path), io::Error::from(e))),
            }
        }
        changed |= !old.is_empty() || !same_files(&files, &self.files);
        changed || troubles != self.troubles
    }

    /// Keeps what is known of a directory if it has not changed, lists it otherwise; then goes on below it.
    fn take_directory(
        &mut self,
        shown: &Path,
        resolved: PathBuf,
        old: &mut BTreeMap<PathBuf, Directory>,
        changed: &mut bool,
    ) {
        let mut to_do = vec![(shown.to_owned(), resolved)];
        while let Some((shown, resolved)) = to_do.pop() {
            if self.directories.contains_key(&resolved) {
                continue;
            }
            let now = match status(&resolved) {
                Ok(now) if now.kind == FileKind::Directory => now,
                // It went away between two questions.
                _ => {
                    *changed = true;
                    continue;
                }
            };
            let known = old.remove(&resolved);
            let directory = match known {
                Some(known) if known.is_current(&now) => {
                    let linked = known.follow_links(&resolved);
                    *changed |= !same_files(&linked, &known.linked);
                    Directory { linked, ..known }
                }
                before => {
                    let directory = self.list(&shown, &resolved, &now);
                    let linked = directory.follow_links(&resolved);
                    let directory = Directory { linked, ..directory };
                    // A directory that was listed again, because it might have changed, often has not.
                    *changed |= before.is_none_or(|before| !before.lists_the_same(&directory));
                    directory
                }
            };
            if self.recursive {
                to_do.extend(directory.below.iter().map(|name| (directory.shown.join(name), resolved.join(name))));
            }
            self.directories.insert(resolved, directory);
        }
    }

    fn list(&mut self, shown: &Path, resolved: &Path, now: &FileStatus) -> Directory {
        let mut directory = Directory {
            shown: shown.to_owned(),
            id: now.id,
            modified: now.modified,
            listed_at: SystemTime::now(),
            images: Vec::new(),
            links: Vec::new(),
            linked: Vec::new(),
            below: Vec::new(),
        };
        let entries = match std::fs::read_dir(resolved) {
            Ok(entries) => entries,
            Err(e) => {
                self.troubles.push(format!("{}: {e}", escape_path(shown)));
                // Not current next time, so that it is asked again.
                directory.listed_at = SystemTime::UNIX_EPOCH;
                return directory;
            }
        };
        for entry in entries {
            let entry = match entry {
                Ok(entry) => entry,
                Err(e) => {
                    self.troubles.push(format!("{}: {e}", escape_path(shown)));
                    directory.listed_at = SystemTime::UNIX_EPOCH;
                    break;
                }
            };
            let name = PathBuf::from(entry.file_name());
            if entry.file_type().is_ok_and(|t| t.is_symlink()) {
                directory.links.push(name);
                continue;
            }
            let target = resolved.join(&name);
            // A name that has gone again is no image.
            let Ok(found) = status(&target) else { continue };
            match found.kind {
                FileKind::Regular | FileKind::Block => {
                    directory.images.push(Entry { path: shown.join(&name), resolved: target, status: found });
                }
                FileKind::Directory => directory.below.push(name),
                FileKind::Special => {}
            }
        }
        // In an order of its own, so that two listings can be compared.
        directory.images.sort_by(|a, b| a.path.cmp(&b.path));
        directory.links.sort();
        directory.below.sort();
        directory
    }
}

fn same_files(a: &[Entry], b: &[Entry]) -> bool {
    let same = |a: &Entry, b: &Entry| a.path == b.path && a.resolved == b.resolved && a.status.id == b.status.id;
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b))
}

impl Directory {
    fn lists_the_same(&self, other: &Self) -> bool {
        self.id == other.id
            && self.below == other.below
            && self.links == other.links
            && same_files(&self.images, &other.images)
            && same_files(&self.linked, &other.linked)
    }

    /// The images that links lead to. Linked directories are not followed: they may lead round in a circle, or out.
    fn follow_links(&self, resolved: &Path) -> Vec<Entry> {
        let follow = |name: &PathBuf| {
            let target = resolved.join(name).canonicalize().ok()?;
            let found = status(&target).ok()?;
            let is_image = matches!(found.kind, FileKind::Regular | FileKind::Block);
            is_image.then(|| Entry { path: self.shown.join(name), resolved: target, status: found })
        };
        self.links.iter().filter_map(follow).collect()
    }

    fn is_current(&self, now: &FileStatus) -> bool {
        let changed_at = u64::try_from(now.modified.0)
            .map_or(SystemTime::UNIX_EPOCH, |s| SystemTime::UNIX_EPOCH + Duration::new(s, now.modified.1));
        let settled = self.listed_at.duration_since(changed_at).is_ok_and(|age| age > CLOCK_STEP);
        self.id == now.id && self.modified == now.modified && settled
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    fn names(catalog: &Catalog, root: &Path) -> Vec<String> {
        let short = |e: &&Entry| e.path.strip_prefix(root).unwrap().display().to_string();
        catalog.images().iter().map(short).collect()
    }

    #[test]
    fn a_directory_is_kept_current_through_every_change() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("images");
        fs::create_dir(&root).unwrap();
        let mut catalog = Catalog::new(std::slice::from_ref(&root), false).unwrap();
        assert!(names(&catalog, &root).is_empty());
        fs::write(root.join("a.raw"), "a").unwrap();
        fs::write(root.join("b.raw"), "b").unwrap();
        assert!(catalog.refresh());
        assert_eq!(names(&catalog, &root), ["a.raw", "b.raw"]);
        let old = catalog.images()[1].status.id;
        fs::rename(root.join("a.raw"), root.join("b.raw")).unwrap();
        assert!(catalog.refresh());
        assert_eq!(names(&catalog, &root), ["b.raw"]);
        assert_ne!(catalog.images()[0].status.id, old, "renamed over: another file under the name");
        fs::remove_dir_all(&root).unwrap();
        assert!(catalog.refresh());
        assert!(names(&catalog, &root).is_empty());
        assert_eq!(catalog.troubles().len(), 1);
        let gone = catalog.watch_ids();
        fs::create_dir(&root).unwrap();
        fs::write(root.join("c.raw"), "c").unwrap();
        assert!(catalog.refresh());
        assert_eq!(names(&catalog, &root), ["c.raw"]);
        assert!(catalog.troubles().is_empty());
        assert_ne!(catalog.watch_ids(), gone);
    }

    #[test]
    fn only_what_can_be_an_image_is_listed() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        fs::write(root.join("disk"), "").unwrap();
        symlink(root.join("disk"), root.join("link")).unwrap();
        symlink("/nowhere", root.join("broken")).unwrap();
        symlink("/dev/null", root.join("null")).unwrap();
        symlink(root, root.join("circle")).unwrap();
        nix::unistd::mkfifo(&root.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(root.join("socket")).unwrap();
        fs::create_dir_all(root.join("sub/deeper")).unwrap();
        fs::write(root.join("sub/deeper/nested"), "").unwrap();
        let flat = Catalog::new(&[root.to_owned()], false).unwrap();
        assert_eq!(names(&flat, root), ["disk", "link"]);
        let deep = Catalog::new(&[root.to_owned()], true).unwrap();
        assert_eq!(names(&deep, root), ["disk", "link", "sub/deeper/nested"]);
        // A link's target elsewhere needs a watch of its own, one in a watched directory does not.
        assert!(deep.watch_points().values().all(|is_directory| *is_directory));
    }

    #[test]
    fn a_link_is_followed_anew_each_time() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("images");
        for version in ["v1", "v2"] {
            fs::create_dir_all(dir.path().join(version)).unwrap();
            fs::write(dir.path().join(version).join("vm.raw"), version).unwrap();
        }
        fs::create_dir(&root).unwrap();
        let current = dir.path().join("current");
        symlink(dir.path().join("v1"), &current).unwrap();
        symlink(current.join("vm.raw"), root.join("vm.raw")).unwrap();
        symlink(dir.path().join("later.raw"), root.join("later.raw")).unwrap();
        let mut catalog = Catalog::new(std::slice::from_ref(&root), false).unwrap();
        assert_eq!(names(&catalog, &root), ["vm.raw"]);
        fs::remove_file(&current).unwrap();
        symlink(dir.path().join("v2"), &current).unwrap();
        fs::write(dir.path().join("later.raw"), "").unwrap();
        assert!(catalog.refresh());
        assert_eq!(names(&catalog, &root), ["later.raw", "vm.raw"]);
        assert!(catalog.images()[1].resolved.ends_with("v2/vm.raw"));
    }

    #[test]
    fn a_file_may_be_named_itself_and_by_two_paths() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        fs::write(&disk, "").unwrap();
        let catalog = Catalog::new(&[disk.clone(), dir.path().to_owned(), disk.clone()], false).unwrap();
        assert_eq!(catalog.images().len(), 1);
        assert!(matches!(Catalog::new(&["/dev/null".into()], false), Err(CatalogError::NotAnImage(_))));
        assert!(matches!(Catalog::new(&["/no/such".into()], false), Err(CatalogError::NoSuchPath(_))));
    }

    #[test]
    fn an_unchanged_directory_is_not_listed_again() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a"), "").unwrap();
        let past = SystemTime::now() - Duration::from_secs(60);
        fs::File::open(dir.path()).unwrap().set_modified(past).unwrap();
        let mut catalog = Catalog::new(&[dir.path().to_owned()], false).unwrap();
        assert!(!catalog.refresh());
    }

    #[test]
    fn a_directory_that_only_might_have_changed_is_no_change() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b", "a", "c"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        // Younger than a step of its clock: it is listed again each time.
        let mut catalog = Catalog::new(&[dir.path().to_owned()], false).unwrap();
        assert!(!catalog.refresh());
        fs::write(dir.path().join("d"), "").unwrap();
        assert!(catalog.refresh());
        assert!(!catalog.refresh());
    }
}
