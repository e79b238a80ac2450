//! Which files are watched?
//!
//! Directories (with or without what is below them), single image files and block devices, as the operator named them.
//! The list is kept by asking each directory for its modification time, which costs one call and works on every file
//! system; `watch` only makes that happen sooner. FIFOs, sockets and character devices are never listed and never opened.
//! What does not answer keeps the list that it had.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::directory::{Directory, Seen, follow, look, same_files};
use crate::linux::identity::{FileId, FileKind, FileStatus, status};
use crate::linux::storage::Storage;
use crate::text::escape_path;

/// A file that is watched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// As it is shown: the path that the operator gave, and what was found below it.
    pub path: Arc<Path>,
    /// The same with every link resolved: what is opened, and what inotify reports.
    pub resolved: Arc<Path>,
    /// What it was when it was listed.
    pub status: FileStatus,
}

impl Entry {
    pub(super) fn new(shown: PathBuf, resolved: PathBuf, status: FileStatus) -> Arc<Self> {
        let resolved: Arc<Path> = resolved.into();
        // Most often the two are one.
        let path = if shown == *resolved { Arc::clone(&resolved) } else { shown.into() };
        Arc::new(Self { path, resolved, status })
    }
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

/// What a path of the operator's leads to.
#[derive(Clone, Debug)]
enum Found {
    /// With its path without links.
    Directory(PathBuf),
    File(Arc<Entry>),
}

#[derive(Debug)]
enum NotFound {
    Special,
    Errno(rustix::io::Errno),
}

/// The list of what is watched.
#[derive(Debug)]
pub struct Catalog {
    given: Vec<PathBuf>,
    recursive: bool,
    /// What each of `given` led to when it last answered.
    found: HashMap<PathBuf, Found>,
    /// By resolved path, so that a directory that is reached twice is listed once.
    directories: BTreeMap<PathBuf, Arc<Directory>>,
    /// What the links in each directory led to when that was last answered.
    linked: BTreeMap<PathBuf, Vec<Arc<Entry>>>,
    files: Vec<Arc<Entry>>,
    troubles: Vec<String>,
    /// Directories given by the operator that are others than they were.
    replaced: Vec<PathBuf>,
}

fn find(path: &Path) -> Result<Found, NotFound> {
    let found = status(path).map_err(NotFound::Errno)?;
    if found.kind == FileKind::Special {
        return Err(NotFound::Special);
    }
    let errno = |e: io::Error| NotFound::Errno(rustix::io::Errno::from_io_error(&e).unwrap_or(rustix::io::Errno::IO));
    let resolved = path.canonicalize().map_err(errno)?;
    if found.kind == FileKind::Directory {
        return Ok(Found::Directory(resolved));
    }
    Ok(Found::File(Entry::new(path.to_owned(), resolved, found)))
}

fn no_answer(path: &Path) -> String {
    format!("{}: the storage does not answer: what is listed there may be out of date", escape_path(path))
}

impl Catalog {
    /// Lists `given` for the first time. A path that does not answer is told in [`Catalog::troubles`].
    ///
    /// # Errors
    /// When a path leads nowhere or to something that is no image.
    pub fn new(given: &[PathBuf], recursive: bool, storage: &mut Storage) -> Result<Self, CatalogError> {
        let mut catalog = Self {
            given: given.to_vec(),
            recursive,
            found: HashMap::new(),
            directories: BTreeMap::new(),
            linked: BTreeMap::new(),
            files: Vec::new(),
            troubles: Vec::new(),
            replaced: Vec::new(),
        };
        let answers = catalog.ask_given(storage);
        for (path, answer) in given.iter().zip(&answers) {
            let path = || path.clone();
            match answer {
                Ok(Err(NotFound::Errno(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR))) => {
                    return Err(CatalogError::NoSuchPath(path()));
                }
                Ok(Err(NotFound::Errno(e))) => {
                    return Err(CatalogError::Unreachable { path: path(), source: (*e).into() });
                }
                Ok(Err(NotFound::Special)) => return Err(CatalogError::NotAnImage(path())),
                Ok(Ok(_)) | Err(()) => {}
            }
        }
        catalog.take(answers, storage);
        Ok(catalog)
    }

    /// Each watched file, in the order of the paths as shown.
    #[must_use]
    pub fn images(&self) -> Vec<Arc<Entry>> {
        let listed = self.directories.values().flat_map(|d| &d.images);
        let mut all: Vec<Arc<Entry>> =
            self.files.iter().chain(listed).chain(self.linked.values().flatten()).map(Arc::clone).collect();
        all.sort_by(|a, b| a.path.cmp(&b.path));
        all.dedup_by(|a, b| a.path == b.path);
        all
    }

    /// What inotify is to watch: resolved paths, and whether each is a directory. A single file is watched itself, and so
    /// is a file that a link in a watched directory leads to.
    #[must_use]
    pub fn watch_points(&self) -> BTreeMap<PathBuf, bool> {
        let mut points: BTreeMap<PathBuf, bool> = self.directories.keys().map(|d| (d.clone(), true)).collect();
        for entry in self.files.iter().chain(self.linked.values().flatten()) {
            if entry.resolved.parent().is_none_or(|p| !self.directories.contains_key(p)) {
                points.insert(entry.resolved.to_path_buf(), false);
            }
        }
        points
    }

    /// The identity behind each of the [`watch_points`](Self::watch_points): what was removed and made again needs a new
    /// inotify watch.
    #[must_use]
    pub fn watch_ids(&self) -> BTreeMap<PathBuf, FileId> {
        let single = self.files.iter().chain(self.linked.values().flatten());
        let files = single.map(|e| (e.resolved.to_path_buf(), e.status.id));
        files.chain(self.directories.iter().map(|(path, d)| (path.clone(), d.id))).collect()
    }

    /// Whether a file of this resolved path would be listed.
    #[must_use]
    pub fn covers(&self, path: &Path) -> bool {
        path.parent().is_some_and(|p| self.directories.contains_key(p)) || self.given.iter().any(|g| g == path)
    }

    /// Directories given by the operator where another one is now, since this was last asked.
    pub fn take_replaced(&mut self) -> Vec<PathBuf> {
        std::mem::take(&mut self.replaced)
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
    pub fn refresh(&mut self, storage: &mut Storage) -> bool {
        let answers = self.ask_given(storage);
        self.take(answers, storage)
    }

    fn ask_given(&self, storage: &mut Storage) -> Vec<Result<Result<Found, NotFound>, ()>> {
        let questions = self.given.iter().map(|path| (path.clone(), ())).collect();
        storage.ask_names(questions, |path, ()| find(&path)).into_iter().map(|a| a.ok_or(())).collect()
    }

    fn take(&mut self, answers: Vec<Result<Result<Found, NotFound>, ()>>, storage: &mut Storage) -> bool {
        let (files, troubles) = (std::mem::take(&mut self.files), std::mem::take(&mut self.troubles));
        let mut directories = Vec::new();
        for (path, answer) in self.given.clone().into_iter().zip(answers) {
            let found = match answer {
                Ok(Ok(found)) => {
                    self.found.insert(path.clone(), found.clone());
                    Some(found)
                }
                Ok(Err(why)) => {
                    self.found.remove(&path);
                    self.troubles.push(match why {
                        NotFound::Special => format!("{}: is no longer an image", escape_path(&path)),
                        NotFound::Errno(e) => format!("{}: {}", escape_path(&path), io::Error::from(e)),
                    });
                    None
                }
                Err(()) => {
                    self.troubles.push(no_answer(&path));
                    self.found.get(&path).cloned()
                }
            };
            match found {
                Some(Found::Directory(resolved)) => directories.push((path, resolved)),
                Some(Found::File(entry)) => self.files.push(entry),
                None => {}
            }
        }
        let changed = self.list(directories, storage) | !same_files(&files, &self.files);
        changed || troubles != self.troubles
    }

    /// Looks at directories, and at what is below them; true if a list changed.
    fn list(&mut self, mut level: Vec<(PathBuf, PathBuf)>, storage: &mut Storage) -> bool {
        let mut old = std::mem::take(&mut self.directories);
        let mut changed = false;
        while !level.is_empty() {
            let mut once = HashSet::new();
            level.retain(|(_, resolved)| !self.directories.contains_key(resolved) && once.insert(resolved.clone()));
            let questions: Vec<_> = level
                .iter()
                .map(|(shown, resolved)| {
                    let known = old.get(resolved).cloned();
                    (storage.lane_of(resolved), (shown.clone(), resolved.clone(), known))
                })
                .collect();
            let answers = storage.answers(questions, |(shown, resolved, known)| look(&shown, &resolved, known));
            let mut next = Vec::new();
            for ((shown, resolved), answer) in level.into_iter().zip(answers) {
                let before = old.remove(&resolved);
                let directory = match answer {
                    Ok(Seen::Current(directory)) => Some(directory),
                    Ok(Seen::Listed(directory)) => {
                        if before.as_ref().is_some_and(|b| b.id != directory.id) && self.given.contains(&shown) {
                            self.replaced.push(shown.clone());
                        }
                        // A directory that was listed again, because it might have changed, often has not.
                        changed |= before.is_none_or(|before| !before.lists_the_same(&directory));
                        Some(directory)
                    }
                    Ok(Seen::Gone) => {
                        changed = true;
                        None
                    }
                    Err(_) => {
                        let trouble = no_answer(&shown);
                        if !self.troubles.contains(&trouble) {
                            self.troubles.push(trouble);
                        }
                        before
                    }
                };
                let Some(directory) = directory else { continue };
                self.troubles.extend(directory.trouble.clone());
                if self.recursive {
                    next.extend(directory.below.iter().map(|name| (directory.shown.join(name), resolved.join(name))));
                }
                self.directories.insert(resolved, directory);
            }
            level = next;
        }
        changed |= !old.is_empty();
        changed | self.follow_links(storage)
    }

    fn follow_links(&mut self, storage: &mut Storage) -> bool {
        let before = std::mem::take(&mut self.linked);
        let links: Vec<(PathBuf, Arc<Directory>, PathBuf)> = self
            .directories
            .iter()
            .flat_map(|(path, d)| d.links.iter().map(move |link| (path.clone(), Arc::clone(d), link.clone())))
            .collect();
        let questions = links.iter().map(|(path, d, link)| (path.join(link), d.shown.join(link))).collect();
        let answers = storage.ask_names(questions, |link: PathBuf, shown: PathBuf| follow(&link, shown));
        for ((path, directory, link), answer) in links.into_iter().zip(answers) {
            let linked = self.linked.entry(path.clone()).or_default();
            match answer {
                Some(entry) => linked.extend(entry),
                None => {
                    let shown = directory.shown.join(&link);
                    let known = before.get(&path).and_then(|l| l.iter().find(|e| *e.path == shown));
                    linked.extend(known.cloned());
                    self.troubles.push(no_answer(&shown));
                }
            }
        }
        let same = |(a, b): (&Vec<Arc<Entry>>, &Vec<Arc<Entry>>)| same_files(a, b);
        before.len() != self.linked.len()
            || !before.keys().eq(self.linked.keys())
            || !before.values().zip(self.linked.values()).all(same)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::time::{Duration, SystemTime};

    use crate::linux::Roots;

    fn storage() -> Storage {
        Storage::new(&Roots::host())
    }

    fn names(catalog: &Catalog, root: &Path) -> Vec<String> {
        let short = |e: &Arc<Entry>| e.path.strip_prefix(root).unwrap().display().to_string();
        catalog.images().iter().map(short).collect()
    }

    #[test]
    fn a_directory_is_kept_current_through_every_change() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("images");
        fs::create_dir(&root).unwrap();
        let mut catalog = Catalog::new(std::slice::from_ref(&root), false, &mut storage()).unwrap();
        assert!(names(&catalog, &root).is_empty());
        fs::write(root.join("a.raw"), "a").unwrap();
        fs::write(root.join("b.raw"), "b").unwrap();
        assert!(catalog.refresh(&mut storage()));
        assert_eq!(names(&catalog, &root), ["a.raw", "b.raw"]);
        let old = catalog.images()[1].status.id;
        fs::rename(root.join("a.raw"), root.join("b.raw")).unwrap();
        assert!(catalog.refresh(&mut storage()));
        assert_eq!(names(&catalog, &root), ["b.raw"]);
        assert_ne!(catalog.images()[0].status.id, old, "renamed over: another file under the name");
        fs::remove_dir_all(&root).unwrap();
        assert!(catalog.refresh(&mut storage()));
        assert!(names(&catalog, &root).is_empty());
        assert_eq!(catalog.troubles().len(), 1);
        let gone = catalog.watch_ids();
        fs::create_dir(&root).unwrap();
        fs::write(root.join("c.raw"), "c").unwrap();
        assert!(catalog.refresh(&mut storage()));
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
        let flat = Catalog::new(&[root.to_owned()], false, &mut storage()).unwrap();
        assert_eq!(names(&flat, root), ["disk", "link"]);
        let deep = Catalog::new(&[root.to_owned()], true, &mut storage()).unwrap();
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
        let mut catalog = Catalog::new(std::slice::from_ref(&root), false, &mut storage()).unwrap();
        assert_eq!(names(&catalog, &root), ["vm.raw"]);
        fs::remove_file(&current).unwrap();
        symlink(dir.path().join("v2"), &current).unwrap();
        fs::write(dir.path().join("later.raw"), "").unwrap();
        assert!(catalog.refresh(&mut storage()));
        assert_eq!(names(&catalog, &root), ["later.raw", "vm.raw"]);
        assert!(catalog.images()[1].resolved.ends_with("v2/vm.raw"));
    }

    #[test]
    fn a_file_may_be_named_itself_and_by_two_paths() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        fs::write(&disk, "").unwrap();
        let catalog =
            Catalog::new(&[disk.clone(), dir.path().to_owned(), disk.clone()], false, &mut storage()).unwrap();
        assert_eq!(catalog.images().len(), 1);
        assert!(matches!(Catalog::new(&["/dev/null".into()], false, &mut storage()), Err(CatalogError::NotAnImage(_))));
        assert!(matches!(Catalog::new(&["/no/such".into()], false, &mut storage()), Err(CatalogError::NoSuchPath(_))));
    }

    #[test]
    fn an_unchanged_directory_is_not_listed_again() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a"), "").unwrap();
        let past = SystemTime::now() - Duration::from_secs(60);
        fs::File::open(dir.path()).unwrap().set_modified(past).unwrap();
        let mut catalog = Catalog::new(&[dir.path().to_owned()], false, &mut storage()).unwrap();
        assert!(!catalog.refresh(&mut storage()));
    }

    #[test]
    fn a_directory_that_only_might_have_changed_is_no_change() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b", "a", "c"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        // Younger than a step of its clock: it is listed again each time.
        let mut catalog = Catalog::new(&[dir.path().to_owned()], false, &mut storage()).unwrap();
        assert!(!catalog.refresh(&mut storage()));
        fs::write(dir.path().join("d"), "").unwrap();
        assert!(catalog.refresh(&mut storage()));
        assert!(!catalog.refresh(&mut storage()));
    }
}
