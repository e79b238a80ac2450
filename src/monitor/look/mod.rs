//! What is so now: the one place that asks everybody, in the order that costs least and never calls a held byte free.
//!
//! First the hint (`/proc/locks`), then the truth about held or free (GETLK on each image), then the known holders, then
//! new processes. Only a lock that is still unexplained makes the search go on through processes that changed and at last
//! through all of them; and before it is called ownerless it is asked once more whether it is there at all.

mod ask;
mod explain;
mod listing;
mod seek;
mod surroundings;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;

use ask::KnownHeader;
use explain::{Opens, Unexplained, Walks};
use seek::Seek;
use surroundings::{KnownBacking, LoopFiles};

use super::sample::{DeletedImage, ImageSample, Sample};
use super::search::{Depth, Search};
use crate::image::catalog::{Catalog, CatalogError, Entry};
use crate::image::watch::ImageWatch;
use crate::linux::descriptors::{OpenDescriptor, OpenMode};
use crate::linux::identity::FileId;
use crate::linux::lock_table::LockTable;
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
    /// Files came or went, or events are listened to again after a rest.
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
    /// Resolved paths of images that somebody opened or closed since the last tick.
    touched: HashSet<PathBuf>,
    opens: Opens,
    /// How long this look has slept, at no cost to anybody.
    slept: Duration,
    /// The first of those that are asked in turn at the next tick, and when it was set.
    turn: (Instant, usize),
    /// What could not be watched, and whether it is a directory.
    failed: Vec<(PathBuf, bool)>,
    resting_until: Option<Instant>,
    /// Events were lost, or something was not watched until now: somebody may have opened an image unheard.
    unheard: bool,
    storage: Storage,
    search: Search,
    host: String,
    entries: Vec<Arc<Entry>>,
    /// By resolved path, without what stands around each.
    images: HashMap<Arc<Path>, Arc<ImageSample>>,
    /// The images of the last sample.
    shown: Vec<Arc<ImageSample>>,
    headers: HashMap<Arc<Path>, Arc<KnownHeader>>,
    backings: HashMap<PathBuf, KnownBacking>,
    loop_files: LoopFiles,
    /// Who has a file mapped whose lock no descriptor explains.
    mapped: HashMap<FileId, Vec<i32>>,
    /// For images on an overlay file system: the file of the layer that each is.
    layers: HashMap<PathBuf, Option<FileId>>,
    table: LockTable,
    /// The table's version that says of no image anything else than is known.
    compared: Option<u64>,
    troubles: Vec<String>,
    walks: Walks,
    seek: Seek,
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
            touched: HashSet::new(),
            opens: Opens::default(),
            slept: Duration::ZERO,
            turn: (Instant::now(), 0),
            failed: Vec::new(),
            resting_until: None,
            unheard: false,
            storage,
            host,
            entries: Vec::new(),
            images: HashMap::new(),
            shown: Vec::new(),
            headers: HashMap::new(),
            backings: HashMap::new(),
            loop_files: LoopFiles::default(),
            layers: HashMap::new(),
            mapped: HashMap::new(),
            table: LockTable::default(),
            compared: None,
            troubles: Vec::new(),
            walks: Walks::default(),
            seek: Seek::default(),
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
        self.touched.extend(files.iter().cloned());
        let changed: HashSet<PathBuf> = files.iter().filter(|f| self.has_other_rows(f)).cloned().collect();
        if !changed.is_empty() {
            return self.look(Scope::Files(&changed));
        }
        let wanted = self.wanted();
        let touched: HashSet<FileId> =
            files.iter().filter_map(|f| self.images.get(f.as_path())).map(|i| i.file).collect();
        self.search.refresh(&touched);
        // Most often it is a program that was just started.
        self.scan(Depth::New, &wanted);
        match self.unexplained_opens(files) {
            Unexplained::None => {}
            Unexplained::Young => self.scan(Depth::Changed, &wanted),
            Unexplained::Old => self.look_for_opener(&wanted),
        }
        self.explain(&HashSet::new(), &wanted);
        self.sample()
    }

    pub(super) fn has_other_rows(&self, resolved: &Path) -> bool {
        let known = |image: &ImageSample| self.rows_of(image.file, image.mount.as_deref()).0 == &*image.table_rows;
        self.images.get(resolved).is_some_and(|image| !known(image))
    }

    /// How much of the looks since this was last asked was spent sleeping.
    pub fn take_slept(&mut self) -> Duration {
        std::mem::take(&mut self.slept)
    }

    /// The path under which a resolved path is shown.
    #[must_use]
    pub fn shown_path(&self, resolved: &Path) -> Option<PathBuf> {
        self.images.get(resolved).map(|i| i.path.to_path_buf())
    }

    /// Whether somebody is known to have the file open for writing.
    #[must_use]
    pub fn knows_a_writer(&self, resolved: &Path) -> bool {
        let writes =
            |image: &Arc<ImageSample>| self.search.descriptors(image.file).iter().any(|d| d.mode == OpenMode::Write);
        self.images.get(resolved).is_none_or(writes)
    }

    /// Asks what costs next to nothing: whether the list of images changed, and which images have other rows in
    /// `/proc/locks` than when they were last looked at. Nothing is believed because of it; it says where to look.
    pub fn hint(&mut self) -> Hint {
        let recovered = self.storage.has_recovered();
        let listing = self.follow_listing(recovered);
        self.go_on_seeking();
        self.read_table();
        let version = Some(self.table.version());
        let mut files = HashSet::new();
        if self.compared != version {
            files = self.images.keys().filter(|path| self.has_other_rows(path)).map(|p| p.to_path_buf()).collect();
            self.compared = version.filter(|_| files.is_empty());
        }
        Hint { listing, files, recovered }
    }

    /// Looks now.
    pub fn look(&mut self, scope: Scope) -> Sample {
        self.troubles.clear();
        if let Scope::Everything = scope {
            let mounts = self.storage.refresh(&self.roots);
            self.note(mounts);
            self.storage.forget_unmounted();
            let recovered = self.storage.has_recovered();
            self.follow_listing(recovered);
            self.go_on_seeking();
            self.watch_again();
            let replaced = self.catalog.take_replaced().into_iter().map(|path| {
                let path = crate::text::escape_path(&path).into_owned();
                format!("{path}: another directory is there now: what happened in between may have been missed")
            });
            self.unwatched.extend(replaced);
        }
        self.read_table();
        let mut targets: Vec<Arc<Entry>> = match scope {
            Scope::Everything => self.due(),
            Scope::Files(paths) => self.entries.iter().filter(|e| paths.contains(&*e.resolved)).cloned().collect(),
        };
        let changed = self.ask(&mut targets);
        let wanted = self.wanted();
        self.search.keep_only(&wanted);
        match scope {
            Scope::Everything => self.search.refresh_in_turn(&changed),
            Scope::Files(_) => self.search.refresh(&self.ids(&targets)),
        }
        match scope {
            _ if self.walks.is_first() => {
                self.walk_first(&wanted);
                self.unheard = false;
            }
            Scope::Everything => self.scan(Depth::InTurn, &wanted),
            Scope::Files(_) => self.scan(Depth::New, &wanted),
        }
        if std::mem::take(&mut self.unheard) {
            self.scan(Depth::Changed, &wanted);
        }
        self.explain(&changed, &wanted);
        if let Scope::Everything = scope {
            self.loop_files.forget();
            self.find_layers();
            self.forget_backings();
        }
        self.sample()
    }

    /// The files behind the images.
    fn wanted(&self) -> Arc<HashSet<FileId>> {
        Arc::new(self.images.values().map(|i| i.file).collect())
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
        let read = self.table.refresh(&self.roots);
        self.note(read);
        if self.table.bad_lines() > 0 {
            let lines = crate::text::counted(self.table.bad_lines() as usize, "line", "lines");
            self.note_once(format!("{lines} of /proc/locks could not be understood: report this"));
        }
    }

    fn sample(&mut self) -> Sample {
        self.confirm_writers();
        let loops = self.loop_devices();
        let mut deleted: Vec<DeletedImage> = self.search.deleted().to_vec();
        deleted.retain(|d| self.catalog.covers(&d.path));
        let mut pids: HashSet<i32> = deleted.iter().map(|d| d.descriptor.pid).collect();
        for image in self.images.values() {
            let certain = image.table_rows.iter().filter(|_| image.rows_certain);
            pids.extend(certain.filter_map(|r| i32::try_from(r.pid).ok()).filter(|pid| *pid > 0));
            pids.extend(self.users(image.file).map(|d| d.pid));
            pids.extend(self.mapped_by(image.file));
        }
        self.search.learn(&pids);
        let processes: BTreeMap<i32, Arc<ProcessFacts>> =
            pids.iter().filter_map(|pid| self.search.facts(*pid).map(|f| (*pid, Arc::clone(f)))).collect();
        let before = std::mem::take(&mut self.shown);
        let mut images: Vec<Arc<ImageSample>> = Vec::with_capacity(before.len());
        for entry in &self.entries {
            // One file under two names is asked once and shown under both.
            let Some(image) = self.images.get(&entry.resolved) else { continue };
            let before = before.get(images.len()).filter(|b| b.path == entry.path);
            images.push(self.show(entry, image, before, &loops, &processes));
        }
        self.shown.clone_from(&images);
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

    /// Who has a file open. Our own output may lie among the images; our own locks are shown.
    fn users(&self, file: FileId) -> impl Iterator<Item = &OpenDescriptor> {
        let other = |d: &&OpenDescriptor| d.pid != self.own_pid || !d.locks.is_empty();
        self.search.descriptors(file).iter().filter(other)
    }

    fn mapped_by(&self, file: FileId) -> &[i32] {
        self.mapped.get(&file).map_or(&[], Vec::as_slice)
    }

    /// What is known of `image` with all that stands around it; `before` where that says the same.
    fn show(
        &self,
        entry: &Entry,
        image: &Arc<ImageSample>,
        before: Option<&Arc<ImageSample>>,
        loops: &[(FileId, String)],
        processes: &BTreeMap<i32, Arc<ProcessFacts>>,
    ) -> Arc<ImageSample> {
        let descriptors = || self.users(image.file).filter(|d| processes.contains_key(&d.pid));
        let backing = self.backing_of(&entry.path, image.header.as_deref());
        let mapped_by = self.mapped_by(image.file);
        let mounted_on = image.device.and_then(|d| self.storage.mounts()?.on_device(d, &image.resolved));
        let mounted_on = mounted_on.map(|m| &m.point);
        // What was found out before stands while the same is sought anew.
        let sought = self.is_sought(&image.resolved) && !self.was_concluded(image);
        let layer = self.layers.get(&*image.resolved).copied().flatten();
        let loop_devices = || loops.iter().filter(|(file, _)| *file == image.file).map(|(_, device)| device);
        let says_the_same = |b: &&Arc<ImageSample>| {
            b.was_asked_the_same(image)
                && b.descriptors.iter().eq(descriptors())
                && b.backing == backing
                && b.mapped_by == mapped_by
                && b.mounted_on.as_ref() == mounted_on
                && b.layer == layer
                && b.sought == sought
                && b.loop_devices.iter().eq(loop_devices())
        };
        if let Some(before) = before.filter(says_the_same) {
            return Arc::clone(before);
        }
        let shown = ImageSample {
            path: entry.path.clone(),
            backing,
            descriptors: descriptors().cloned().collect(),
            mapped_by: mapped_by.to_vec(),
            mounted_on: mounted_on.cloned(),
            layer,
            sought,
            loop_devices: loop_devices().cloned().collect(),
            ..ImageSample::clone(image)
        };
        // Around most images stands nothing.
        if shown == **image { Arc::clone(image) } else { Arc::new(shown) }
    }
}
