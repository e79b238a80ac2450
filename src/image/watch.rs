//! Which image did somebody open, close, make or remove since we last looked?
//!
//! inotify by way of `notify`. It only makes the sampler look sooner: nothing is believed because of it, and what it does
//! not see (network file systems, locks that change without an open) the timer finds. Our own questions are announced
//! here first. While many are asked, the events wait, and come all at once: to be woken for each costs more than the
//! question.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use notify::{Config, EventKindMask, RecommendedWatcher, RecursiveMode, Watcher};

pub use super::events::Touched;
use super::events::{Gate, State};

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
        lock(&self.shared.state).gate = Gate::shut(Instant::now());
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::fs::File;
    use std::path::PathBuf;
    use std::sync::mpsc;
    use std::time::Duration;

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
}
