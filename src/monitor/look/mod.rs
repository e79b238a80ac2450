//! What is so now: the one place that asks everybody, in the order that costs least and never calls a held byte free.
//!
//! First the hint (`/proc/locks`), then the truth about held or free (GETLK on each image), then the known holders, then
//! new processes. Only a lock that is still unexplained makes the search go on through processes that changed and at last
//! through all of them; and before it is called ownerless it is asked once more whether it is there at all.

mod ask;
mod explain;
mod listing;
mod surroundings;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use jiff::Timestamp;

use ask::KnownHeader;
use explain::Walks;
use surroundings::{KnownBacking, LoopFiles};

use super::sample::{DeletedImage, ImageSample, Sample};
use super::search::{Depth, Search};
use crate::image::catalog::{Catalog, CatalogError, Entry};
use crate::image::watch::ImageWatch;
use crate::linux::descriptors::{OpenDescriptor, OpenMode};
use crate::linux::identity::FileId;
use crate::linux::lock_table::{self, LockRecord};
use crate::linux::process::ProcessFacts;
use crate::linux::storage::Storage;
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
    /// Storage that did not answer does so again.
    pub recovered: bool,
}

/// Looks at the watched images, and remembers what makes the next look cheap.
pub struct Looker {
    roots: Roots,
    own_pid: i32,
    catalog: Catalog,
    watch: Option<ImageWatch>,
    watched_ids: BTreeMap<PathBuf, FileId>,
    unwatched: Vec<String>,
    /// What could not be watched, and whether it is a directory.
    failed: Vec<(PathBuf, bool)>,
    resting_until: Option<Instant>,
    storage: Storage,
    search: Search,
    host: String,
    entries: Vec<Arc<Entry>>,
    images: HashMap<PathBuf, ImageSample>,
    headers: HashMap<PathBuf, Arc<KnownHeader>>,
    backings: HashMap<PathBuf, KnownBacking>,
    loop_files: LoopFiles,
    /// Who has a file mapped whose lock no descriptor explains.
    mapped: HashMap<FileId, Vec<i32>>,
    /// For images on an overlay file system: the file of the layer that each is.
    layers: HashMap<PathBuf, Option<FileId>>,
    table: Vec<LockRecord>,
    buffer: Vec<u8>,
    troubles: Vec<String>,
    walks: Walks,
    /// Writers without a lock that have been seen for long enough.
    confirmed: HashSet<OpenDescriptor>,
}

impl Looker {
    /// Lists `paths`, to be looked at; directories with all below them if `recursive`. Without `watch` only the caller's
    /// timer makes anybody look.
    ///
    /// # Errors
    /// When a path leads nowhere or to something that is no image.
    pub fn new(
        roots: Roots,
        paths: &[PathBuf],
        recursive: bool,
        watch: Option<ImageWatch>,
    ) -> Result<Self, CatalogError> {
        let host = nix::unistd::gethostname().map(|h| h.to_string_lossy().into_owned()).unwrap_or_default();
        let mut storage = Storage::new(&roots);
        let catalog = Catalog::new(paths, recursive, &mut storage)?;
        let mut looker = Self {
            search: Search::new(roots.clone()),
            own_pid: if roots.is_host() { nix::unistd::getpid().as_raw() } else { 0 },
            roots,
            catalog,
            watch,
            watched_ids: BTreeMap::new(),
            unwatched: Vec::new(),
            failed: Vec::new(),
            resting_until: None,
            storage,
            host,
            entries: Vec::new(),
            images: HashMap::new(),
            headers: HashMap::new(),
            backings: HashMap::new(),
            loop_files: LoopFiles::default(),
            layers: HashMap::new(),
            mapped: HashMap::new(),
            table: Vec::new(),
            buffer: Vec::new(),
            troubles: Vec::new(),
            walks: Walks::default(),
            confirmed: HashSet::new(),
        };
        looker.take_listing();
        Ok(looker)
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
        let wanted: Arc<HashSet<FileId>> = Arc::new(self.images.values().map(|i| i.file).collect());
        let touched: HashSet<FileId> = files.iter().filter_map(|f| self.images.get(f)).map(|i| i.file).collect();
        self.search.refresh(&touched);
        self.scan(Depth::Changed, &wanted);
        self.explain(&wanted);
        self.sample()
    }

    fn has_other_rows(&self, resolved: &Path) -> bool {
        let known = |image: &ImageSample| self.rows_of(image.file, image.mount.as_deref()).0 == image.table_rows;
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
        let recovered = self.storage.has_recovered();
        let listing = self.catalog.refresh(&mut self.storage);
        let rested = self.resting_until.take_if(|until| Instant::now() >= *until).is_some();
        if let Some(watch) = self.watch.as_ref().filter(|_| rested) {
            watch.listen();
        }
        if listing || rested || recovered {
            self.take_listing();
        }
        self.read_table();
        let files = self.images.keys().filter(|path| self.has_other_rows(path)).cloned().collect();
        Hint { listing, files, recovered }
    }

    /// Looks now.
    pub fn look(&mut self, scope: Scope) -> Sample {
        self.troubles.clear();
        if let Scope::Everything = scope {
            let mounts = self.storage.refresh(&self.roots);
            self.note(mounts);
            self.storage.forget_unmounted();
            if self.catalog.refresh(&mut self.storage) {
                self.take_listing();
            }
            self.watch_again();
            let replaced = self.catalog.take_replaced().into_iter().map(|path| {
                let path = crate::text::escape_path(&path).into_owned();
                format!("{path}: another directory is there now: what happened in between may have been missed")
            });
            self.unwatched.extend(replaced);
        }
        let mut targets: Vec<Arc<Entry>> = match scope {
            Scope::Everything => self.entries.clone(),
            Scope::Files(paths) => self.entries.iter().filter(|e| paths.contains(&e.resolved)).cloned().collect(),
        };
        self.read_table();
        self.ask(&mut targets);
        let wanted: Arc<HashSet<FileId>> = Arc::new(self.images.values().map(|i| i.file).collect());
        self.search.keep_only(&wanted);
        self.search.refresh(&self.ids(&targets));
        // Somebody opened the files: who that was shows in the number of its descriptors, lock or no lock.
        match scope {
            _ if self.walks.is_due() => self.walk_all(&wanted),
            Scope::Everything => self.scan(Depth::New, &wanted),
            Scope::Files(_) => self.scan(Depth::Changed, &wanted),
        }
        self.explain(&wanted);
        if let Scope::Everything = scope {
            self.loop_files.forget();
            self.find_layers();
            self.forget_backings();
        }
        self.sample()
    }

    fn scan(&mut self, depth: Depth, wanted: &Arc<HashSet<FileId>>) {
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

    fn sample(&mut self) -> Sample {
        self.confirm_writers();
        let mut images: Vec<ImageSample> = self
            .entries
            .iter()
            .filter_map(|e| self.images.get(&e.resolved).map(|i| (e, i)))
            .map(|(e, i)| {
                // One file under two names is asked once and shown under both.
                let backing = self.backing_of(&e.path, i.header.as_ref());
                ImageSample { path: e.path.clone(), backing, ..i.clone() }
            })
            .collect();
        let loops = self.loop_devices();
        let mut deleted: Vec<DeletedImage> = self.search.deleted().to_vec();
        deleted.retain(|d| self.catalog.covers(&d.path));
        let mut pids: HashSet<i32> = deleted.iter().map(|d| d.descriptor.pid).collect();
        for image in &mut images {
            // Our own output may lie among the images; our own locks are shown.
            let other = |d: &&OpenDescriptor| d.pid != self.own_pid || !d.locks.is_empty();
            image.descriptors = self.search.descriptors(image.file).iter().filter(other).cloned().collect();
            let certain = image.table_rows.iter().filter(|_| image.rows_certain);
            let owners = certain.filter_map(|r| i32::try_from(r.pid).ok()).filter(|pid| *pid > 0);
            pids.extend(image.descriptors.iter().map(|d| d.pid).chain(owners));
            image.mapped_by = self.mapped.get(&image.file).cloned().unwrap_or_default();
            pids.extend(&image.mapped_by);
        }
        self.search.learn(&pids);
        let processes: BTreeMap<i32, ProcessFacts> =
            pids.iter().filter_map(|pid| self.search.facts(*pid).map(|f| (*pid, f.clone()))).collect();
        for image in &mut images {
            image.descriptors.retain(|d| processes.contains_key(&d.pid));
            let mount = image.device.and_then(|d| self.storage.mounts()?.on_device(d, &image.resolved));
            image.mounted_on = mount.map(|m| m.point.clone());
            image.layer = self.layers.get(&image.resolved).copied().flatten();
            image.loop_devices = loops.iter().filter(|(file, _)| *file == image.file).map(|(_, d)| d.clone()).collect();
        }
        deleted.retain(|d| processes.contains_key(&d.descriptor.pid));
        let proc_options = self.storage.mounts().and_then(|m| m.at(&self.roots.proc)).map(|m| m.options.clone());
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
