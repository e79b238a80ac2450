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
use crate::linux::identity::{FileId, FileKind, FileStatus, status};
use crate::linux::lock_table::{self, LockKind, LockRecord};
use crate::linux::loop_devices::{self, LoopDevice};
use crate::linux::mounts::Mounts;
use crate::linux::probe::{self, Asker, OpenError};
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

/// Looks at the watched images, and remembers what makes the next look cheap.
pub struct Looker {
    roots: Roots,
    catalog: Catalog,
    watch: Option<ImageWatch>,
    watched_ids: BTreeMap<PathBuf, FileId>,
    unwatched: Vec<String>,
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
    /// The locks that a whole walk could not explain: the same ones are not walked for at every look.
    in_vain: HashMap<FileId, ImageSignature>,
}

type ImageSignature = (Answer, Vec<LockRecord>);

/// A guest writes all the time and changes the modification time with it; its header is read again this often.
const HEADER_AGE: Duration = Duration::from_secs(5);
/// Whole walks for openers without a lock, and for locks that the last walk did not explain, take at most this part of
/// one core.
const WALK_SHARE: u32 = 100;
const WALK_PAUSE: Duration = Duration::from_secs(10);
/// A lock that comes and goes between our questions looks ownerless; this often it is asked again.
const ATTEMPTS: usize = 3;

impl Looker {
    /// Looks at what `catalog` lists. Without `watch` only the caller's timer makes anybody look.
    #[must_use]
    pub fn new(roots: Roots, catalog: Catalog, watch: Option<ImageWatch>) -> Self {
        let host = nix::unistd::gethostname().map(|h| h.to_string_lossy().into_owned()).unwrap_or_default();
        let mounts = Mounts::read(&roots).ok();
        let mut looker = Self {
            search: Search::new(roots.clone()),
            roots,
            catalog,
            watch,
            watched_ids: BTreeMap::new(),
            unwatched: Vec::new(),
            mounts,
            host,
            entries: Vec::new(),
            images: HashMap::new(),
            headers: HashMap::new(),
            table: Vec::new(),
            buffer: Vec::new(),
            troubles: Vec::new(),
            walks: Walks::default(),
        };
        looker.take_listing();
        looker
    }

    /// What inotify has seen since; `None` without one.
    #[must_use]
    pub fn watch(&self) -> Option<&ImageWatch> {
        self.watch.as_ref()
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
        self.search.refresh(&ids(&targets));
        self.scan(Depth::New, &wanted);
        if let Scope::Files(_) = scope {
            // Somebody opened it: who that was shows in the number of its descriptors, lock or no lock.
            self.scan(Depth::Changed, &wanted);
        }
        if self.walks.last.is_none_or(|at| at.elapsed() > WALK_PAUSE.max(self.walks.cost * WALK_SHARE)) {
            self.walk_all(&wanted);
        }
        self.explain(&targets, &wanted);
        self.sample()
    }

    /// Goes on searching until each lock of `targets` has a holder or it is certain that none can be found.
    fn explain(&mut self, targets: &[Entry], wanted: &HashSet<FileId>) {
        let mut open: Vec<Entry> = targets.to_vec();
        for attempt in 0..ATTEMPTS {
            open.retain(|e| self.images.get(&e.resolved).is_some_and(|i| !self.is_explained(i)));
            if open.is_empty() {
                return;
            }
            if attempt == 0 {
                self.scan(Depth::Changed, wanted);
            } else if self.is_worth_a_walk(&open) {
                self.walk_all(wanted);
            }
            // It may be gone by now, or the table may have missed a row.
            self.read_table();
            self.ask(&mut open);
            self.search.refresh(&ids(&open));
        }
        for entry in open {
            if let Some(image) = self.images.get(&entry.resolved).filter(|i| !self.is_explained(i)) {
                self.walks.in_vain.insert(image.file, (image.answer.clone(), image.table_rows.clone()));
            }
        }
    }

    fn is_worth_a_walk(&self, open: &[Entry]) -> bool {
        let known = |image: &ImageSample| {
            let (answer, rows) = self.walks.in_vain.get(&image.file)?;
            Some(*answer == image.answer && *rows == image.table_rows)
        };
        let images = open.iter().filter_map(|e| self.images.get(&e.resolved));
        images.into_iter().any(|image| known(image) != Some(true))
    }

    /// Whether each held byte has a holder, and the table lists no lock of which we know no owner.
    fn is_explained(&self, image: &ImageSample) -> bool {
        let Answer::Bytes(found) = &image.answer else { return true };
        let descriptors = self.search.descriptors(image.file);
        let records = || descriptors.iter().flat_map(|d| &d.locks);
        let counts = |r: &&LockRecord| !r.waiting && matches!(r.kind, LockKind::Ofd | LockKind::Posix);
        let held = |byte: LockByte| records().filter(counts).any(|r| r.covers(byte.offset()));
        let same =
            |a: &LockRecord, b: &LockRecord| (a.kind, a.mode, a.start, a.end) == (b.kind, b.mode, b.start, b.end);
        // As many rows of one range as there are owners: with fewer known ones, somebody is missing.
        let listed = |row: &LockRecord| {
            let rows = image.table_rows.iter().filter(counts).filter(|r| same(r, row)).count();
            records().filter(counts).filter(|r| same(r, row)).count() >= rows
        };
        found.locked.bytes().all(held) && image.table_rows.iter().filter(counts).all(listed)
    }

    fn walk_all(&mut self, wanted: &HashSet<FileId>) {
        let started = Instant::now();
        self.scan(Depth::All, wanted);
        self.walks.cost = started.elapsed();
        self.walks.last = Some(Instant::now());
        self.walks.in_vain.retain(|file, _| wanted.contains(file));
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
        let Some(watch) = &mut self.watch else { return };
        let points = self.catalog.watch_points();
        let ids = self.catalog.directory_ids();
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

    fn describe(&self, entry: &Entry, status: FileStatus, header: Option<Header>, answer: Answer) -> ImageSample {
        let mount = self.mounts.as_ref().and_then(|m| m.of(&entry.resolved, &status)).cloned();
        // What the kernel prints in lock lines: the superblock's device, which statx hides on btrfs and overlayfs.
        let device = mount.as_ref().map_or(status.id.device, |m| m.lock_device);
        let listed = |device| Some(FileId { device, inode: status.id.inode });
        let rows = |file: Option<FileId>| {
            let start = self.table.partition_point(|r| r.file < file);
            self.table[start..].iter().take_while(move |r| r.file == file).cloned()
        };
        let mut table_rows: Vec<LockRecord> = rows(listed(status.id.device)).collect();
        if table_rows.is_empty() && device != status.id.device {
            table_rows = rows(listed(device)).collect();
        }
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

    fn sample(&mut self) -> Sample {
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
            image.descriptors = self.search.descriptors(image.file).to_vec();
            let owners = image.table_rows.iter().filter_map(|r| i32::try_from(r.pid).ok()).filter(|pid| *pid > 0);
            for pid in image.descriptors.iter().map(|d| d.pid).chain(owners) {
                if !processes.contains_key(&pid) {
                    processes.extend(self.search.facts(pid).map(|f| (pid, f.clone())));
                }
            }
            image.descriptors.retain(|d| processes.contains_key(&d.pid));
            let held = matches!(&image.answer, Answer::Bytes(found) if !found.locked.is_empty());
            if held || !image.descriptors.is_empty() {
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

fn ids(entries: &[Entry]) -> HashSet<FileId> {
    entries.iter().map(|e| e.status.id).collect()
}
