//! Which image did somebody open, close, make or remove since we last looked?
//!
//! inotify by way of `notify`. It only makes the sampler look sooner: nothing is believed because of it, and what it does
//! not see (network file systems, locks that change without an open) the timer finds. Our own questions open images too,
//! and the kernel does not say whose open an event was: each is announced here first and its events are left out. While
//! many are asked, the events wait, and come all at once: to be woken for each costs more than the question.

use std::collections::hash_map::RandomState;
use std::collections::{HashMap, HashSet};
use std::hash::BuildHasher;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use notify::event::{AccessKind, AccessMode, ModifyKind};
use notify::{Config, EventKind, EventKindMask, RecommendedWatcher, RecursiveMode, Watcher};

/// What happened since the last time somebody asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Touched {
    /// Files that somebody else opened or closed.
    pub files: HashSet<PathBuf>,
    /// Those of them that somebody had open for writing and closed.
    pub written: HashSet<PathBuf>,
    /// How many more times each of them was opened than closed.
    pub balance: HashMap<PathBuf, i32>,
    /// Something was made, removed or renamed.
    pub listing: bool,
    /// Events come so fast that following them costs more than it tells.
    pub flooded: bool,
    /// The kernel's queue overflowed or the watch failed: anything may have happened.
    pub lost: bool,
}

impl Touched {
    /// Whether nothing happened.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.files.is_empty() && !self.listing && !self.lost && !self.flooded
    }
}

/// Watches directories and files; calls back once when something is to be fetched with [`ImageWatch::take`]. Copies
/// stand for the same.
#[derive(Clone)]
pub struct ImageWatch {
    /// Held while a path is added, which may take as long as its file system does not answer.
    watcher: Arc<Mutex<RecommendedWatcher>>,
    shared: Arc<Shared>,
    /// Set by a flood: nothing is taken in until [`ImageWatch::listen`].
    deaf: Arc<AtomicBool>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// Rung when events need no longer wait.
    go_on: Condvar,
}

/// How events wait while we ask.
#[derive(Default)]
struct Gate {
    /// Since when many are being asked.
    asking_since: Option<Instant>,
    /// Events of our own that have not come yet, counted generously.
    pending: usize,
    /// So many are pending that the kernel's queue would overflow: they are let through until few are left.
    draining: bool,
}

/// Longer than this no event waits, whatever hinders our questions.
const LONGEST_WAIT: Duration = Duration::from_millis(30);
/// The kernel keeps 16,384 events for us (`/proc/sys/fs/inotify/max_queued_events`), and somebody else's must fit too.
const QUEUE: usize = 6_000;

impl Gate {
    fn is_shut(&self, now: Instant) -> Option<Duration> {
        let left = LONGEST_WAIT.saturating_sub(now.duration_since(self.asking_since?));
        (!self.draining && !left.is_zero()).then_some(left)
    }
}

#[derive(Default)]
struct State {
    touched: Touched,
    gate: Gate,
    /// Hashes of paths: a path is hashed by its parts, which is slow, and kept, which is large.
    announced: HashMap<u64, Announced>,
    hashes: RandomState,
    watched: HashSet<PathBuf>,
    watched_directories: HashSet<PathBuf>,
    /// The kernel took a watch away, with what was watched.
    watch_gone: bool,
    /// Events since this moment.
    rate: Option<(Instant, u32)>,
}

/// Opens of our own whose events have not come yet.
struct Announced {
    opens: u32,
    closes: u32,
    since: Instant,
}

/// Events come within milliseconds. An announcement that is older was for a file that no watch covers, or two equal
/// events were merged (inotify(7)); it must not hide what somebody else does.
const ANNOUNCEMENT_LASTS: Duration = Duration::from_secs(1);

/// More events than this in a second are a flood: a host that starts a hundred VMs at once stays far below.
const FLOOD: u32 = 5_000;

/// A poisoned lock is used as it is: the state is a set of hints, whole after each statement.
fn lock<T>(state: &Mutex<T>) -> MutexGuard<'_, T> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ImageWatch {
    /// Starts with nothing watched. `wake` is called on a thread of `notify`.
    ///
    /// # Errors
    /// When the kernel has no inotify instance left (`/proc/sys/fs/inotify/max_user_instances`).
    pub fn new(wake: impl Fn() + Send + 'static) -> notify::Result<Self> {
        let kinds = EventKindMask::CREATE
            | EventKindMask::REMOVE
            | EventKindMask::MODIFY_NAME
            | EventKindMask::ACCESS_OPEN
            | EventKindMask::ACCESS_CLOSE
            | EventKindMask::ACCESS_CLOSE_NOWRITE;
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        let deaf = Arc::new(AtomicBool::new(false));
        let is_deaf = Arc::clone(&deaf);
        let handler = move |event: notify::Result<notify::Event>| {
            // During a flood each event must cost next to nothing: notify reads on until none is left, and only then
            // hears that it is to stop.
            if is_deaf.load(Ordering::Relaxed) {
                return;
            }
            let news = {
                let mut state = theirs.past_the_gate();
                let idle = state.touched.is_empty();
                state.take_event(event, Instant::now());
                is_deaf.store(state.touched.flooded, Ordering::Relaxed);
                (idle || state.touched.flooded) && !state.touched.is_empty()
            };
            if news {
                wake();
            }
        };
        let watcher = RecommendedWatcher::new(handler, Config::default().with_event_kinds(kinds))?;
        if let Err(error) = watcher.watched_paths() {
            // It had no thread to be had, says so to nobody, and would panic when it is dropped.
            std::mem::forget(watcher);
            return Err(error);
        }
        Ok(Self { watcher: Arc::new(Mutex::new(watcher)), shared, deaf })
    }

    /// Watches a directory for what happens in it, or a file. This may wait for the file system, and then so does
    /// whatever else is added or removed.
    ///
    /// # Errors
    /// When it cannot be watched; `MaxFilesWatch` when the user's limit is reached.
    pub fn add(&self, path: &Path, is_directory: bool) -> notify::Result<()> {
        if is_directory {
            lock(&self.shared.state).watched_directories.insert(path.to_owned());
        }
        lock(&self.watcher).watch(path, RecursiveMode::NonRecursive)?;
        lock(&self.shared.state).watched.insert(path.to_owned());
        Ok(())
    }

    /// Takes events in again after a flood.
    pub fn listen(&self) {
        lock(&self.shared.state).rate = None;
        self.deaf.store(false, Ordering::Relaxed);
    }

    /// No longer watches `path`; one that is gone already is fine.
    pub fn remove(&self, path: &Path) {
        if lock(&self.shared.state).watched.remove(path) {
            // A removed directory took its watch along.
            let _ = lock(&self.watcher).unwatch(path);
            lock(&self.shared.state).watched_directories.remove(path);
        }
    }

    /// Whether the kernel has taken a watch away since this was last asked: something else may be at that path by now,
    /// even with the same inode number.
    #[must_use]
    pub fn take_gone(&self) -> bool {
        std::mem::take(&mut lock(&self.shared.state).watch_gone)
    }

    /// Whether `path` is watched.
    #[must_use]
    pub fn watches(&self, path: &Path) -> bool {
        lock(&self.shared.state).watched.contains(path)
    }

    /// Everything that is watched.
    #[must_use]
    pub fn watched(&self) -> Vec<PathBuf> {
        lock(&self.shared.state).watched.iter().cloned().collect()
    }

    /// Says that we are about to open and close `path` for reading, so that the two events are not taken for somebody
    /// else's.
    pub fn announce(&self, path: &Path) {
        // An announcement for what no watch covers would wait in vain for its events.
        let mut state = lock(&self.shared.state);
        let watched = state.watched.contains(path) || path.parent().is_some_and(|p| state.watched.contains(p));
        if watched && state.announce(path, Instant::now()) {
            self.shared.go_on.notify_all();
        }
    }

    /// Takes an announcement back: the open failed, and no event will come.
    pub fn retract(&self, path: &Path) {
        let state = &mut *lock(&self.shared.state);
        for opens in [true, false] {
            state.is_ours(path, opens, Instant::now());
        }
    }

    /// Has events wait until what is returned is dropped, though never for long: many images are about to be asked.
    #[must_use]
    pub fn hold_back(&self) -> HeldBack<'_> {
        lock(&self.shared.state).gate = Gate { asking_since: Some(Instant::now()), ..Gate::default() };
        HeldBack(&self.shared)
    }

    /// What happened, and forgets it.
    #[must_use]
    pub fn take(&self) -> Touched {
        std::mem::take(&mut lock(&self.shared.state).touched)
    }
}

/// Events wait while this lives.
pub struct HeldBack<'a>(&'a Shared);

impl Drop for HeldBack<'_> {
    fn drop(&mut self) {
        lock(&self.0.state).gate = Gate::default();
        self.0.go_on.notify_all();
    }
}

impl Shared {
    /// The state, once an event may be taken in.
    fn past_the_gate(&self) -> MutexGuard<'_, State> {
        let mut state = lock(&self.state);
        while let Some(left) = state.gate.is_shut(Instant::now()) {
            state = match self.go_on.wait_timeout(state, left) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        state
    }
}

impl State {
    fn key(&self, path: &Path) -> u64 {
        self.hashes.hash_one(path.as_os_str().as_bytes())
    }

    /// Whether events had to wait and need no longer.
    fn announce(&mut self, path: &Path, now: Instant) -> bool {
        let fresh = Announced { opens: 0, closes: 0, since: now };
        let announced = self.announced.entry(self.key(path)).or_insert(fresh);
        if now.duration_since(announced.since) > ANNOUNCEMENT_LASTS {
            // Counted from the first that was not answered: renewing it would let the unanswered ones pile up.
            *announced = Announced { opens: 0, closes: 0, since: now };
        }
        announced.opens += 1;
        announced.closes += 1;
        self.gate.pending += 2;
        let full = self.gate.pending > QUEUE && !self.gate.draining;
        self.gate.draining |= full;
        full
    }

    fn take_event(&mut self, event: notify::Result<notify::Event>, now: Instant) {
        let Ok(event) = event else {
            self.touched.lost = true;
            return;
        };
        if event.need_rescan() {
            self.touched.lost = true;
            self.announced.clear();
            return;
        }
        match event.kind {
            EventKind::Access(AccessKind::Open(_) | AccessKind::Close(_)) => {
                let closes_reader = matches!(event.kind, EventKind::Access(AccessKind::Close(AccessMode::Read)));
                let opens = matches!(event.kind, EventKind::Access(AccessKind::Open(_)));
                let writer = matches!(event.kind, EventKind::Access(AccessKind::Close(AccessMode::Write)));
                for path in event.paths {
                    let ours = (opens || closes_reader) && self.is_ours(&path, opens, now);
                    self.count(u32::from(!ours), now);
                    if !ours && !self.watched_directories.contains(&path) {
                        if writer {
                            self.touched.written.insert(path.clone());
                        }
                        *self.touched.balance.entry(path.clone()).or_default() += if opens { 1 } else { -1 };
                        self.touched.files.insert(path);
                    }
                }
            }
            EventKind::Create(_) | EventKind::Remove(_) | EventKind::Modify(ModifyKind::Name(_)) => {
                self.touched.listing = true;
                self.count(1, now);
                for path in event.paths {
                    if matches!(event.kind, EventKind::Remove(_)) && self.watched.remove(&path) {
                        self.watched_directories.remove(&path);
                        self.watch_gone = true;
                    }
                    self.announced.remove(&self.key(&path));
                }
            }
            _ => {}
        }
    }

    /// Counts what others do: our own questions are as many as there are images.
    fn count(&mut self, events: u32, now: Instant) {
        let (since, so_far) = self.rate.get_or_insert((now, 0));
        if now.duration_since(*since) > Duration::from_secs(1) {
            (*since, *so_far) = (now, 0);
        }
        *so_far += events;
        self.touched.flooded |= *so_far > FLOOD;
    }

    fn is_ours(&mut self, path: &Path, opens: bool, now: Instant) -> bool {
        let key = self.key(path);
        let Some(announced) = self.announced.get_mut(&key) else { return false };
        if now.duration_since(announced.since) > ANNOUNCEMENT_LASTS {
            self.announced.remove(&key);
            return false;
        }
        self.gate.pending = self.gate.pending.saturating_sub(1);
        self.gate.draining &= self.gate.pending > QUEUE / 8;
        let left = if opens { &mut announced.opens } else { &mut announced.closes };
        let ours = *left > 0;
        *left = left.saturating_sub(1);
        if announced.opens == 0 && announced.closes == 0 {
            self.announced.remove(&key);
        }
        ours
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::sync::mpsc;

    fn watch() -> (ImageWatch, mpsc::Receiver<()>) {
        let (tx, rx) = mpsc::channel();
        (
            ImageWatch::new(move || {
                let _ = tx.send(());
            })
            .unwrap(),
            rx,
        )
    }

    /// Two images in a watched directory.
    struct Pair {
        _directory: tempfile::TempDir,
        ours: PathBuf,
        theirs: PathBuf,
        watch: ImageWatch,
        woken: mpsc::Receiver<()>,
    }

    impl Pair {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let root = directory.path().canonicalize().unwrap();
            let (ours, theirs) = (root.join("ours"), root.join("theirs"));
            File::create(&ours).unwrap();
            File::create(&theirs).unwrap();
            let (watch, woken) = watch();
            watch.add(&root, true).unwrap();
            Self { _directory: directory, ours, theirs, watch, woken }
        }
    }

    /// Collects until `done` holds of everything that has come.
    fn wait_for(watch: &ImageWatch, woken: &mpsc::Receiver<()>, done: impl Fn(&Touched) -> bool) -> Touched {
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut all = Touched::default();
        loop {
            let new = watch.take();
            all.files.extend(new.files);
            all.listing |= new.listing;
            all.lost |= new.lost;
            if done(&all) {
                return all;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(woken.recv_timeout(left).is_ok(), "nothing more came after {all:?}");
        }
    }

    #[test]
    fn an_open_by_somebody_else_is_told_and_our_own_is_not() {
        let Pair { _directory, ours, theirs, watch, woken } = Pair::new();
        for _ in 0..3 {
            watch.announce(&ours);
            drop(File::open(&ours).unwrap());
        }
        drop(File::open(&theirs).unwrap());
        // Events come in order: when theirs is there, ours has been passed over.
        let touched = wait_for(&watch, &woken, |t| t.files.contains(&theirs));
        assert_eq!(touched.files, HashSet::from([theirs]));
        drop(File::open(&ours).unwrap());
        wait_for(&watch, &woken, |t| t.files.contains(&ours));
    }

    #[test]
    fn an_open_that_failed_is_taken_back() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let image = root.join("a");
        File::create(&image).unwrap();
        let (watch, woken) = watch();
        watch.add(&root, true).unwrap();
        watch.announce(&image);
        watch.retract(&image);
        drop(File::open(&image).unwrap());
        wait_for(&watch, &woken, |t| t.files.contains(&image));
    }

    #[test]
    fn making_renaming_and_removing_change_the_listing() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let (watch, woken) = watch();
        watch.add(&root, true).unwrap();
        File::create(root.join("a")).unwrap();
        wait_for(&watch, &woken, |t| t.listing);
        std::fs::rename(root.join("a"), root.join("b")).unwrap();
        wait_for(&watch, &woken, |t| t.listing);
        std::fs::remove_file(root.join("b")).unwrap();
        wait_for(&watch, &woken, |t| t.listing);
        std::fs::remove_dir(&root).unwrap();
        wait_for(&watch, &woken, |t| t.listing);
        watch.remove(&root);
        std::fs::create_dir(&root).unwrap();
        watch.add(&root, true).unwrap();
        File::create(root.join("c")).unwrap();
        wait_for(&watch, &woken, |t| t.listing);
    }

    #[test]
    fn events_wait_while_we_ask_and_none_is_lost() {
        let Pair { _directory, ours, theirs, watch, woken } = Pair::new();
        let held_back = watch.hold_back();
        watch.announce(&ours);
        drop(File::open(&ours).unwrap());
        drop(File::open(&theirs).unwrap());
        drop(held_back);
        let touched = wait_for(&watch, &woken, |t| t.files.contains(&theirs));
        assert_eq!(touched.files, HashSet::from([theirs.clone()]));
        // Nobody waits for ever, whatever becomes of those who ask.
        let _forgotten = watch.hold_back();
        drop(File::open(&theirs).unwrap());
        wait_for(&watch, &woken, |t| t.files.contains(&theirs));
    }

    #[test]
    fn the_gate_opens_before_the_kernels_queue_is_full() {
        let mut state = State::default();
        let now = Instant::now();
        state.gate.asking_since = Some(now);
        let path = |i: usize| PathBuf::from(format!("/images/{i}"));
        let full = (0..QUEUE).position(|i| state.announce(&path(i), now)).unwrap();
        assert!((QUEUE / 2..QUEUE).contains(&full), "after {full}");
        assert_eq!(state.gate.is_shut(now), None);
        for i in 0..=full {
            assert!(state.is_ours(&path(i), true, now) && state.is_ours(&path(i), false, now));
        }
        assert!(state.gate.is_shut(now).is_some(), "when few are left the others wait again");
        assert_eq!(state.gate.is_shut(now + LONGEST_WAIT), None);
    }

    #[test]
    fn our_own_questions_are_no_flood() {
        let mut state = State::default();
        let now = Instant::now();
        let path = Path::new("/images/a");
        for _ in 0..=FLOOD {
            state.announce(path, now);
            let open = notify::Event::new(EventKind::Access(AccessKind::Open(AccessMode::Any))).add_path(path.into());
            state.take_event(Ok(open), now);
        }
        assert!(state.touched.is_empty());
    }

    #[test]
    fn an_old_announcement_hides_nothing() {
        let mut state = State::default();
        let path = Path::new("/images/a");
        let now = Instant::now();
        state.announce(path, now);
        let open =
            || Ok(notify::Event::new(EventKind::Access(AccessKind::Open(AccessMode::Any))).add_path(path.into()));
        state.take_event(open(), now + Duration::from_secs(2));
        assert!(state.touched.files.contains(path));
    }

    #[test]
    fn a_flood_is_told_and_a_busy_host_is_none() {
        let mut state = State::default();
        let now = Instant::now();
        let event =
            || Ok(notify::Event::new(EventKind::Access(AccessKind::Open(AccessMode::Any))).add_path("/a".into()));
        for i in 0..20_000 {
            state.take_event(event(), now + Duration::from_millis(i));
        }
        assert!(!state.touched.flooded, "a thousand a second");
        for _ in 0..=FLOOD {
            state.take_event(event(), now + Duration::from_secs(60));
        }
        assert!(state.touched.flooded);
    }

    #[test]
    fn an_overflow_means_that_anything_may_have_happened() {
        let mut state = State::default();
        state.announce(Path::new("/images/a"), Instant::now());
        let overflow = notify::Event::new(EventKind::Other).set_flag(notify::event::Flag::Rescan);
        state.take_event(Ok(overflow), Instant::now());
        assert!(state.touched.lost && state.announced.is_empty());
    }
}
