//! What is so now: the one place that asks everybody, in the order that costs least and never calls a held byte free.
//!
//! First the hint (`/proc/locks`), then the truth about held or free (GETLK on each image), then the known holders, then
//! new processes. Only a lock that is still unexplained makes the search go on through processes that changed and at last
//! through all of them; and before it is called ownerless it is asked once more whether it is there at all.

mod ask;
mod explain;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use jiff::Timestamp;

use ask::KnownHeader;
use explain::Walks;

use super::sample::{DeletedImage, ImageSample, Sample};
use super::search::{Depth, Search};
use crate::image::catalog::{Catalog, Entry};
use crate::image::watch::ImageWatch;
use crate::linux::descriptors::{OpenDescriptor, OpenMode};
use crate::linux::identity::FileId;
use crate::linux::lock_table::{self, LockRecord};
use crate::linux::loop_devices::{self, LoopDevice};
use crate::linux::mounts::Mounts;
use crate::linux::{ReadError, Roots, process};

/// How much one look covers.
#[derive(Clone, Copy, Debug)]
pub enum Scope<'a> {
    /// The list of images, and each of them.
    Everything,
    /// The images with these resolved paths; the rest stays as it was.
    Files(&'a HashSet<PathBuf>),
}

/// Where it is worth looking before the next tick.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hint {
    /// Files came or went.
    pub listing: bool,
    /// Resolved paths of images whose locks may have changed.
    pub files: HashSet<PathBuf>,
}

/// Looks at the watched images, and remembers what makes the next look cheap.
pub struct Looker {
    roots: Roots,
    own_pid: i32,
    catalog: Catalog,
    watch: Option<ImageWatch>,
    watched_ids: BTreeMap<PathBuf, FileId>,
    unwatched: Vec<String>,
    resting_until: Option<Instant>,
    mounts: Option<Mounts>,
    search: Search,
    host: String,
    entries: Vec<Entry>,
    images: HashMap<PathBuf, ImageSample>,
    headers: HashMap<PathBuf, KnownHeader>,
    table: Vec<LockRecord>,
    buffer: Vec<u8>,
    troubles: Vec<String>,
    walks: Walks,
    /// Writers without a lock that have been seen for long enough.
    confirmed: HashSet<OpenDescriptor>,
}

impl Looker {
    /// Looks at what `catalog` lists. Without `watch` only the caller's timer makes anybody look.
    #[must_use]
    pub fn new(roots: Roots, catalog: Catalog, watch: Option<ImageWatch>) -> Self {
        let host = nix::unistd::gethostname().map(|h| h.to_string_lossy().into_owned()).unwrap_or_default();
        let mounts = Mounts::read(&roots).ok();
        let mut looker = Self {
            search: Search::new(roots.clone()),
            own_pid: if roots.is_host() { nix::unistd::getpid().as_raw() } else { 0 },
            roots,
            catalog,
            watch,
            watched_ids: BTreeMap::new(),
            unwatched: Vec::new(),
            resting_until: None,
            mounts,
            host,
            entries: Vec::new(),
            images: HashMap::new(),
            headers: HashMap::new(),
            table: Vec::new(),
            buffer: Vec::new(),
            troubles: Vec::new(),
            walks: Walks::default(),
            confirmed: HashSet::new(),
        };
        looker.take_listing();
        looker
    }

    /// What inotify has seen since; `None` without one.
    #[must_use]
    pub fn watch(&self) -> Option<&ImageWatch> {
        self.watch.as_ref()
    }

    /// Looks at files that somebody opened or closed, without opening them: who has them open now, and whether their rows
    /// in `/proc/locks` are others than before. Only then are they asked, so that two watchers that open an image to ask
    /// do not wake each other for ever.
    pub fn look_at_touched(&mut self, files: &HashSet<PathBuf>) -> Sample {
        self.read_table();
        let changed: HashSet<PathBuf> = files.iter().filter(|f| self.has_other_rows(f)).cloned().collect();
        if !changed.is_empty() {
            return self.look(Scope::Files(&changed));
        }
        let wanted: HashSet<FileId> = self.images.values().map(|i| i.file).collect();
        let touched: HashSet<FileId> = files.iter().filter_map(|f| self.images.get(f)).map(|i| i.file).collect();
        self.search.refresh(&touched);
        self.scan(Depth::Changed, &wanted);
        self.explain(&wanted);
        self.sample()
    }

    fn has_other_rows(&self, resolved: &Path) -> bool {
        let known = |image: &ImageSample| self.rows_of(image.file, image.mount.as_deref()) == image.table_rows;
        self.images.get(resolved).is_some_and(|image| !known(image))
    }

    /// The path under which a resolved path is shown.
    #[must_use]
    pub fn shown_path(&self, resolved: &Path) -> Option<PathBuf> {
        self.images.get(resolved).map(|i| i.path.clone())
    }

    /// Whether somebody is known to have the file open for writing.
    #[must_use]
    pub fn knows_a_writer(&self, resolved: &Path) -> bool {
        let writes =
            |image: &ImageSample| self.search.descriptors(image.file).iter().any(|d| d.mode == OpenMode::Write);
        self.images.get(resolved).is_none_or(writes)
    }

    /// Asks what costs next to nothing: whether the list of images changed, and which images have other rows in
    /// `/proc/locks` than when they were last looked at. Nothing is believed because of it; it says where to look.
    pub fn hint(&mut self) -> Hint {
        let listing = self.catalog.refresh();
        let rested = self.resting_until.take_if(|until| Instant::now() >= *until).is_some();
        if let Some(watch) = self.watch.as_ref().filter(|_| rested) {
            watch.listen();
        }
        if listing || rested {
            self.take_listing();
        }
        self.read_table();
        let files = self.images.keys().filter(|path| self.has_other_rows(path)).cloned().collect();
        Hint { listing, files }
    }

    /// Leaves inotify aside for a while: what changes then shows by [`hint`](Self::hint) and by the timer.
    pub fn rest_from_events(&mut self, pause: Duration) {
        if let Some(watch) = &mut self.watch {
            let all: Vec<PathBuf> = watch.watched().cloned().collect();
            all.iter().for_each(|path| watch.remove(path));
            self.resting_until = Some(Instant::now() + pause);
        }
    }

    /// Paths that could not be watched since the last call, in words: changes there show at the next tick only.
    pub fn take_unwatched(&mut self) -> Vec<String> {
        std::mem::take(&mut self.unwatched)
    }

    /// Looks now.
    pub fn look(&mut self, scope: Scope) -> Sample {
        self.troubles.clear();
        if let Scope::Everything = scope {
            if self.catalog.refresh() {
                self.take_listing();
            }
            self.refresh_mounts();
        }
        let mut targets: Vec<Entry> = match scope {
            Scope::Everything => self.entries.clone(),
            Scope::Files(paths) => self.entries.iter().filter(|e| paths.contains(&e.resolved)).cloned().collect(),
        };
        self.read_table();
        self.ask(&mut targets);
        let wanted: HashSet<FileId> = self.images.values().map(|i| i.file).collect();
        self.search.keep_only(&wanted);
        self.search.refresh(&self.ids(&targets));
        // Somebody opened the files: who that was shows in the number of its descriptors, lock or no lock.
        self.scan(if matches!(scope, Scope::Files(_)) { Depth::Changed } else { Depth::New }, &wanted);
        if self.walks.is_due() {
            self.walk_all(&wanted);
        }
        self.explain(&wanted);
        self.sample()
    }

    fn scan(&mut self, depth: Depth, wanted: &HashSet<FileId>) {
        let result = self.search.scan(depth, wanted);
        self.note(result);
    }

    fn note(&mut self, result: Result<(), ReadError>) {
        if let Err(error) = result {
            self.note_once(error.to_string());
        }
    }

    /// One look may meet the same trouble several times.
    fn note_once(&mut self, text: String) {
        if !self.troubles.contains(&text) {
            self.troubles.push(text);
        }
    }

    fn refresh_mounts(&mut self) {
        if let Some(mounts) = &mut self.mounts
            && mounts.refresh().is_ok()
        {
            return;
        }
        match Mounts::read(&self.roots) {
            Ok(mounts) => self.mounts = Some(mounts),
            Err(error) => self.note(Err(error)),
        }
    }

    fn read_table(&mut self) {
        match lock_table::read_table(&self.roots, &mut self.buffer) {
            Ok(lines) => {
                if lines.bad_lines > 0 {
                    let lines = crate::text::counted(lines.bad_lines as usize, "line", "lines");
                    self.note_once(format!("{lines} of /proc/locks could not be understood: report this"));
                }
                self.table = lines.records;
                // The table repeats in order; sorted rows can be found and compared.
                self.table.sort_by_key(|r| (r.file, r.start, r.end, r.kind as u8, r.pid));
            }
            Err(error) => {
                self.table.clear();
                self.note(Err(error));
            }
        }
    }

    /// Takes over the catalog's list, and has inotify watch what is on it.
    fn take_listing(&mut self) {
        self.entries = self.catalog.images().into_iter().cloned().collect();
        let listed: HashSet<&PathBuf> = self.entries.iter().map(|e| &e.resolved).collect();
        self.images.retain(|path, _| listed.contains(path));
        self.headers.retain(|path, _| listed.contains(path));
        let Some(watch) = self.watch.as_mut().filter(|_| self.resting_until.is_none()) else { return };
        let points = self.catalog.watch_points();
        let ids = self.catalog.watch_ids();
        let stale = |path: &&PathBuf| !points.contains_key(*path) || self.watched_ids.get(*path) != ids.get(*path);
        let gone: Vec<PathBuf> = watch.watched().filter(stale).cloned().collect();
        gone.iter().for_each(|path| watch.remove(path));
        let mut failed = Vec::new();
        for (path, is_directory) in points {
            if !watch.watches(&path)
                && let Err(error) = watch.add(&path, is_directory)
            {
                failed.push((path, error));
            }
        }
        if let Some((path, error)) = failed.first() {
            let path = crate::text::escape_path(path);
            let number = crate::text::counted(failed.len(), "path", "paths");
            let limit = matches!(error.kind, notify::ErrorKind::MaxFilesWatch);
            let advice = if limit { "; raise fs.inotify.max_user_watches" } else { "" };
            self.unwatched.push(format!(
                "{number} cannot be watched (first: {path}: {}){advice}: changes there show at the next tick only",
                crate::text::escape(&error.to_string())
            ));
        }
        self.watched_ids = ids;
    }

    fn sample(&mut self) -> Sample {
        self.confirm_writers();
        let mut images: Vec<ImageSample> = self
            .entries
            .iter()
            .filter_map(|e| self.images.get(&e.resolved).map(|i| (e, i)))
            .map(|(e, i)| {
                // One file under two names is asked once and shown under both.
                ImageSample { path: e.path.clone(), ..i.clone() }
            })
            .collect();
        let loops = loop_devices::read(&self.roots);
        let mut processes = BTreeMap::new();
        for image in &mut images {
            // Our own output may lie among the images; our own locks are shown.
            let other = |d: &&OpenDescriptor| d.pid != self.own_pid || !d.locks.is_empty();
            image.descriptors = self.search.descriptors(image.file).iter().filter(other).cloned().collect();
            let owners = image.table_rows.iter().filter_map(|r| i32::try_from(r.pid).ok()).filter(|pid| *pid > 0);
            for pid in image.descriptors.iter().map(|d| d.pid).chain(owners) {
                if !processes.contains_key(&pid) {
                    processes.extend(self.search.facts(pid).map(|f| (pid, f.clone())));
                }
            }
            image.descriptors.retain(|d| processes.contains_key(&d.pid));
            let on_it = loops.iter().filter(|d| d.backing == Some(image.file));
            let mounted = |name: &str| {
                let device = format!("/dev/{name}");
                self.mounts.as_ref().and_then(|m| m.from_source(&device)).map(|m| m.point.clone())
            };
            let words = |d: &LoopDevice| match mounted(&d.name) {
                Some(point) => format!("{}, mounted on {}", d.name, crate::text::escape_path(&point)),
                None => d.name.clone(),
            };
            image.loop_devices = on_it.map(words).collect();
        }
        let mut deleted: Vec<DeletedImage> = self.search.deleted().to_vec();
        deleted.retain(|d| self.catalog.covers(&d.path));
        for image in &deleted {
            let pid = image.descriptor.pid;
            processes.extend(self.search.facts(pid).map(|f| (pid, f.clone())));
        }
        deleted.retain(|d| processes.contains_key(&d.descriptor.pid));
        let proc_options = self.mounts.as_ref().and_then(|m| m.at(&self.roots.proc)).map(|m| m.options.clone());
        let mut troubles = self.catalog.troubles().to_vec();
        troubles.extend(self.troubles.iter().cloned());
        Sample {
            taken_at: Timestamp::now(),
            host: self.host.clone(),
            taken_by: self.own_pid,
            images,
            processes,
            hidden_processes: self.search.hidden(),
            sees_all_processes: process::sees_all(&self.roots, &proc_options.unwrap_or_default()),
            troubles,
            deleted,
        }
    }
}
