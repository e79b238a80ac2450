//! What is so now: the one place that asks everybody, in the order that costs least and never calls a held byte free.
//!
//! First the hint (`/proc/locks`), then the truth about held or free (GETLK on each image), then the known holders, then
//! new processes. Only a lock that is still unexplained makes the search go on through processes that changed and at last
//! through all of them; and before it is called ownerless it is asked once more whether it is there at all.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use nix::errno::Errno;

use super::sample::{Answer, Backing, DeletedImage, ImageSample, Sample};
use super::search::{Depth, Search};
use crate::image::catalog::{Catalog, Entry};
use crate::image::header::{self, Header};
use crate::image::watch::ImageWatch;
use crate::linux::descriptors::{OpenDescriptor, OpenMode};
use crate::linux::identity::{FileId, FileKind, FileStatus, status};
use crate::linux::lock_table::{self, LockKind, LockRecord};
use crate::linux::loop_devices::{self, LoopDevice};
use crate::linux::mounts::{Mount, Mounts};
use crate::linux::probe::{self, Asker, BytesFound, OpenError};
use crate::linux::{ReadError, Roots, process};
use crate::protocol::LockByte;

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

struct KnownHeader {
    status: FileStatus,
    read_at: Instant,
    header: Option<Header>,
}

/// When everything was last walked, and what for.
#[derive(Default)]
struct Walks {
    last: Option<Instant>,
    cost: Duration,
    /// The locks that a whole walk could not explain, and when: the same ones are not walked for at every look.
    in_vain: HashMap<FileId, (Instant, Answer, Vec<LockRecord>)>,
    /// The rows and the descriptors that last fitted together.
    explained: HashMap<FileId, (usize, Vec<OpenDescriptor>)>,
}

/// A guest writes all the time and changes the modification time with it; its header is read again this often.
const HEADER_AGE: Duration = Duration::from_secs(5);
/// Whole walks for openers without a lock, and for locks that the last walk did not explain, take at most this part of
/// one core.
const WALK_SHARE: u32 = 100;
const WALK_PAUSE: Duration = Duration::from_secs(10);
/// A lock that comes and goes between our questions looks ownerless; this often it is asked again.
const ATTEMPTS: usize = 4;
/// As long as the kernel takes to close the files of a process that has ended.
const CLOSING: Duration = Duration::from_millis(5);
/// A program opens an image a few milliseconds before it locks it. Who has it open for longer without a lock means to.
const OPENING: Duration = Duration::from_millis(25);

impl Walks {
    /// The time between two whole walks that nothing but time asks for.
    fn pause(&self) -> Duration {
        WALK_PAUSE.max(self.cost * WALK_SHARE)
    }
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
        let all = self.entries.clone();
        self.explain(all, &wanted);
        self.sample()
    }

    fn has_other_rows(&self, resolved: &Path) -> bool {
        let known = |image: &ImageSample| self.rows_of(image.file, image.mount.as_deref()) == image.table_rows;
        self.images.get(resolved).is_some_and(|image| !known(image))
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
        self.scan(Depth::New, &wanted);
        if let Scope::Files(_) = scope {
            // Somebody opened it: who that was shows in the number of its descriptors, lock or no lock.
            self.scan(Depth::Changed, &wanted);
        }
        if self.walks.last.is_none_or(|at| at.elapsed() > self.walks.pause()) {
            self.walk_all(&wanted);
        }
        // Not the targets alone: a process that has ended or gone on leaves other images without a holder, too.
        let all = self.entries.clone();
        self.explain(all, &wanted);
        self.sample()
    }

    /// Goes on searching until each lock has a holder or it is certain that none can be found.
    fn explain(&mut self, mut open: Vec<Entry>, wanted: &HashSet<FileId>) {
        for attempt in 0..ATTEMPTS {
            open.retain(|e| !self.is_explained(&e.resolved) && !self.was_in_vain(&e.resolved));
            if open.is_empty() {
                return;
            }
            if attempt == 0 {
                self.scan(Depth::Changed, wanted);
            } else {
                self.walk_all(wanted);
            }
            if attempt > 0 {
                // A process that ends has no descriptors any more while the kernel still closes them one by one, and
                // nothing tells when it has done.
                std::thread::sleep(CLOSING);
            }
            // It may be gone by now, or the table may have missed a row.
            self.read_table();
            self.ask(&mut open);
            self.search.refresh(&self.ids(&open));
        }
        open.retain(|e| !self.is_explained(&e.resolved));
        for image in open.iter().filter_map(|e| self.images.get(&e.resolved)) {
            let vain = (Instant::now(), image.answer.clone(), image.table_rows.clone());
            self.walks.in_vain.insert(image.file, vain);
        }
    }

    /// Whether a whole walk has not explained the very same locks a short while ago.
    fn was_in_vain(&self, resolved: &Path) -> bool {
        let Some(image) = self.images.get(resolved) else { return false };
        let known = self.walks.in_vain.get(&image.file);
        known.is_some_and(|(at, answer, rows)| {
            at.elapsed() < self.walks.pause() && *answer == image.answer && *rows == image.table_rows
        })
    }

    /// Whether each held byte has a holder, each holder's byte is held, and the table lists no lock of which we know no
    /// owner.
    fn is_explained(&mut self, resolved: &Path) -> bool {
        let Some(image) = self.images.get(resolved) else { return true };
        let Answer::Bytes(found) = &image.answer else { return true };
        let descriptors = self.search.descriptors(image.file);
        let explained = fits(found, descriptors, &image.table_rows, self.walks.explained.get(&image.file));
        if explained {
            let holders = descriptors.iter().filter(|d| !d.locks.is_empty()).cloned().collect();
            self.walks.explained.insert(image.file, (image.table_rows.len(), holders));
            self.walks.in_vain.remove(&image.file);
        }
        explained
    }

    fn walk_all(&mut self, wanted: &HashSet<FileId>) {
        let started = Instant::now();
        self.scan(Depth::All, wanted);
        self.walks.cost = started.elapsed();
        self.walks.last = Some(Instant::now());
        self.walks.in_vain.retain(|file, _| wanted.contains(file));
        self.walks.explained.retain(|file, _| wanted.contains(file));
    }

    fn scan(&mut self, depth: Depth, wanted: &HashSet<FileId>) {
        let result = self.search.scan(depth, wanted);
        self.note(result);
    }

    fn note(&mut self, result: Result<(), ReadError>) {
        if let Err(error) = result {
            let text = error.to_string();
            if !self.troubles.contains(&text) {
                self.troubles.push(text);
            }
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
                    self.troubles.push(format!("{lines} of /proc/locks could not be understood: report this"));
                    self.troubles.dedup();
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

    /// Asks each of `targets` about its bytes; one that has gone is taken off the list.
    fn ask(&mut self, targets: &mut Vec<Entry>) {
        targets.retain(|entry| match self.ask_one(entry) {
            Some(image) => {
                self.images.insert(entry.resolved.clone(), image);
                true
            }
            None => {
                self.images.remove(&entry.resolved);
                false
            }
        });
    }

    fn ask_one(&mut self, entry: &Entry) -> Option<ImageSample> {
        if let Some(watch) = &self.watch {
            watch.announce(&entry.resolved);
        }
        let (file, status) = match probe::open(&entry.resolved) {
            Ok(opened) => opened,
            // Removed or replaced since it was listed: the next listing says by what.
            Err(OpenError::NotAnImage | OpenError::Errno(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP)) => {
                return None;
            }
            Err(OpenError::Errno(errno)) => {
                return Some(self.describe(entry, entry.status, None, Answer::CannotOpen(errno as i32)));
            }
        };
        let answer = match probe::held_bytes(&file, Asker::Process) {
            Ok(found) => Answer::Bytes(found),
            Err(errno) => Answer::CannotLock(errno as i32),
        };
        let header = self.header(&entry.resolved, status, &File::from(file));
        Some(self.describe(entry, status, header, answer))
    }

    /// The rows of the table about a file. The kernel prints the superblock's device, which statx hides on btrfs and
    /// overlayfs.
    fn rows_of(&self, file: FileId, mount: Option<&Mount>) -> &[LockRecord] {
        let rows = |device| {
            let file = Some(FileId { device, inode: file.inode });
            let start = self.table.partition_point(|r| r.file < file);
            let length = self.table[start..].partition_point(|r| r.file == file);
            &self.table[start..start + length]
        };
        let by_statx = rows(file.device);
        match mount {
            Some(mount) if by_statx.is_empty() && mount.lock_device != file.device => rows(mount.lock_device),
            _ => by_statx,
        }
    }

    /// The files behind `entries` as they were opened last: a link's target may have been replaced since it was listed.
    fn ids(&self, entries: &[Entry]) -> HashSet<FileId> {
        entries.iter().filter_map(|e| self.images.get(&e.resolved)).map(|i| i.file).collect()
    }

    fn describe(&self, entry: &Entry, status: FileStatus, header: Option<Header>, answer: Answer) -> ImageSample {
        let mount = self.mounts.as_ref().and_then(|m| m.of(&entry.resolved, &status)).cloned();
        let table_rows = self.rows_of(status.id, mount.as_deref()).to_vec();
        ImageSample {
            path: entry.path.clone(),
            resolved: entry.resolved.clone(),
            backing: header.as_ref().and_then(|h| backing(&entry.resolved, h)),
            file: status.id,
            file_size: if status.kind == FileKind::Block {
                header.as_ref().and_then(|h| h.virtual_size).unwrap_or_default()
            } else {
                status.size
            },
            header,
            mount,
            answer,
            descriptors: Vec::new(),
            table_rows,
            loop_devices: Vec::new(),
        }
    }

    fn header(&mut self, path: &Path, status: FileStatus, file: &File) -> Option<Header> {
        let fresh = |known: &KnownHeader| {
            let same_file = known.status.id == status.id && known.status.size == status.size;
            same_file && (known.status.modified == status.modified || known.read_at.elapsed() < HEADER_AGE)
        };
        if let Some(known) = self.headers.get(path).filter(|k| fresh(k)) {
            return known.header.clone();
        }
        let length = match status.kind {
            // A block device has no size of its own in statx.
            FileKind::Block => rustix::fs::seek(file, rustix::fs::SeekFrom::End(0)).unwrap_or_default(),
            _ => status.size,
        };
        let header = header::read(file, length).ok();
        self.headers.insert(path.to_owned(), KnownHeader { status, read_at: Instant::now(), header: header.clone() });
        header
    }

    /// Has each new writer without a lock seen twice: one that is about to lock, or is being refused, is no danger.
    fn confirm_writers(&mut self) {
        let unlocked = |d: &&OpenDescriptor| d.mode == OpenMode::Write && d.locks.is_empty();
        let files: Vec<FileId> = self.images.values().map(|i| i.file).collect();
        let all: Vec<OpenDescriptor> =
            files.iter().flat_map(|f| self.search.descriptors(*f)).filter(unlocked).cloned().collect();
        let new: HashSet<FileId> = all.iter().filter(|d| !self.confirmed.contains(*d)).map(|d| d.file).collect();
        if !new.is_empty() {
            std::thread::sleep(OPENING);
            self.search.refresh(&new);
        }
        let now = files.iter().flat_map(|f| self.search.descriptors(*f)).filter(unlocked);
        self.confirmed = now.cloned().collect();
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
        let mut loops = None;
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
            let devices = loops.get_or_insert_with(|| loop_devices::read(&self.roots));
            let on_it = devices.iter().filter(|d| d.backing == Some(image.file));
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
            images,
            processes,
            hidden_processes: self.search.hidden(),
            sees_all_processes: process::sees_all(&self.roots, &proc_options.unwrap_or_default()),
            troubles,
            deleted,
        }
    }
}

/// The file that a header names as its backing file. It is looked at, never opened.
fn backing(image: &Path, header: &Header) -> Option<Backing> {
    let path = header::backing_path(image, header.backing_file.as_ref()?)?;
    let is_image = |s: &FileStatus| matches!(s.kind, FileKind::Regular | FileKind::Block);
    let file = status(&path).ok().filter(is_image).map(|s| s.id);
    let path = if file.is_some() { path.canonicalize().unwrap_or(path) } else { path };
    Some(Backing { path, file })
}

/// Whether what GETLK found, what descriptors hold and what the table lists tell the same story.
fn fits(
    found: &BytesFound,
    descriptors: &[OpenDescriptor],
    rows: &[LockRecord],
    before: Option<&(usize, Vec<OpenDescriptor>)>,
) -> bool {
    let counts = |r: &&LockRecord| !r.waiting && matches!(r.kind, LockKind::Ofd | LockKind::Posix);
    let held =
        |byte: LockByte| descriptors.iter().flat_map(|d| &d.locks).filter(counts).any(|r| r.covers(byte.offset()));
    if !LockByte::ALL.into_iter().all(|b| held(b) == found.locked.contains(b)) {
        return false;
    }
    let same = |a: &LockRecord, b: &LockRecord| (a.kind, a.mode, a.start, a.end) == (b.kind, b.mode, b.start, b.end);
    // As many rows of one range as there are owners: with fewer known ones, somebody is missing. POSIX locks are printed
    // behind each descriptor of their process and count once for it.
    let owners = |row: &LockRecord| {
        let has = |d: &&OpenDescriptor| d.locks.iter().filter(counts).any(|r| same(r, row));
        let mut owners: Vec<(i32, i32)> = descriptors
            .iter()
            .filter(has)
            .map(|d| (d.pid, if row.kind == LockKind::Posix { 0 } else { d.fd }))
            .collect();
        owners.sort_unstable();
        owners.dedup();
        owners.len()
    };
    let listed = |row: &LockRecord| owners(row) >= rows.iter().filter(counts).filter(|r| same(r, row)).count();
    if !rows.iter().filter(counts).all(listed) {
        return false;
    }
    // Several descriptors may share one description: then they are more than the rows, and could hide another owner. New
    // rows with the same holders as before mean just that.
    let unchanged = |(_, holders): &(usize, Vec<OpenDescriptor>)| {
        holders.iter().eq(descriptors.iter().filter(|d| !d.locks.is_empty()))
    };
    !before.is_some_and(|b| rows.len() > b.0 && unchanged(b))
}
