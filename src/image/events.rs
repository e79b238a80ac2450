//! What does an event of inotify say, and was it our own doing?
//!
//! Our questions open images too, and the kernel does not say whose open an event was: each is announced here first and
//! its events are left out. While many are asked, the events wait behind a gate. Asks nobody anything.

use std::collections::hash_map::RandomState;
use std::collections::{HashMap, HashSet};
use std::hash::BuildHasher;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use notify::EventKind;
use notify::event::{AccessKind, AccessMode, ModifyKind};

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

/// How events wait while we ask.
#[derive(Default)]
pub(super) struct Gate {
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
    /// Shut from now on: many images are about to be asked.
    pub(super) fn shut(now: Instant) -> Self {
        Self { asking_since: Some(now), ..Self::default() }
    }

    /// How much longer events wait; `None` when they need not.
    pub(super) fn is_shut(&self, now: Instant) -> Option<Duration> {
        let left = LONGEST_WAIT.saturating_sub(now.duration_since(self.asking_since?));
        (!self.draining && !left.is_zero()).then_some(left)
    }
}

/// What has come and was not taken yet, and what is to be left out of it.
#[derive(Default)]
pub(super) struct State {
    pub(super) touched: Touched,
    pub(super) gate: Gate,
    /// Hashes of paths: a path is hashed by its parts, which is slow, and kept, which is large.
    announced: HashMap<u64, Announced>,
    hashes: RandomState,
    pub(super) watched: HashSet<PathBuf>,
    pub(super) watched_directories: HashSet<PathBuf>,
    /// The kernel took a watch away, with what was watched.
    pub(super) watch_gone: bool,
    /// Events since this moment.
    pub(super) rate: Option<(Instant, u32)>,
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

impl State {
    fn key(&self, path: &Path) -> u64 {
        self.hashes.hash_one(path.as_os_str().as_bytes())
    }

    /// Says that we are about to open and close `path`. Returns whether events had to wait and need no longer.
    pub(super) fn announce(&mut self, path: &Path, now: Instant) -> bool {
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

    pub(super) fn take_event(&mut self, event: notify::Result<notify::Event>, now: Instant) {
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

    /// Whether an open, or a close, was one that was announced; that one is then used up.
    pub(super) fn is_ours(&mut self, path: &Path, opens: bool, now: Instant) -> bool {
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

    #[test]
    fn the_gate_opens_before_the_kernels_queue_is_full() {
        let mut state = State::default();
        let now = Instant::now();
        state.gate = Gate::shut(now);
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
