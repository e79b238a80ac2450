//! What is to be looked at next, and when; and what is to be told as missed?
//!
//! The sampler's plan, apart from the thread that carries it out.

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::look::Hint;
use crate::image::watch::Touched;

/// Something may have been missed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Gap {
    /// About which image; `None`: about any.
    pub image: Option<PathBuf>,
    /// Why, in words.
    pub text: String,
}

impl Gap {
    /// A gap that may concern any image.
    #[must_use]
    pub fn anywhere(text: impl Into<String>) -> Self {
        Self { image: None, text: text.into() }
    }
}

/// Looks after an open: at the first event the lock is not there yet, QEMU opens an image two or three times before it
/// locks.
const LOOK_AGAIN: [Duration; 5] = [
    Duration::ZERO,
    Duration::from_millis(10),
    Duration::from_millis(30),
    Duration::from_millis(70),
    Duration::from_millis(200),
];
/// After hurried looks the next one waits this many times as long as they took: events take a fifth of a core at most, and
/// half of one while looks are so slow that the wait would be felt.
const REST: u32 = 4;
/// So much work is no reason to wait: one look that takes long must not hold up the next.
const BURST: Duration = Duration::from_millis(100);
const LONGEST_REST: Duration = Duration::from_millis(150);
/// Between two lines about gaps.
const GAP_PAUSE: Duration = Duration::from_secs(1);
const SHORTEST_REST: Duration = Duration::from_millis(5);

/// The work of hurried looks that was not yet followed by as much rest as it takes.
struct Debt {
    work: Duration,
    since: Instant,
}

impl Debt {
    /// Adds a look that took so long and is over now. Returns how long to wait before the next hurried one.
    fn add(&mut self, look: Duration, now: Instant) -> Duration {
        let longest = LONGEST_REST.max(look);
        let paid = now.duration_since(self.since) / (REST + 1);
        // What no rest would make up for is forgotten.
        self.work = (self.work.saturating_sub(paid) + look).min(BURST + longest / REST);
        self.since = now;
        (self.work.saturating_sub(BURST) * REST).clamp(SHORTEST_REST, longest)
    }
}

/// How many of `all` are to be looked at now, if each is to have its turn within `round`, and at least `least` of them have
/// it each time. `since` is how long ago the last ones had theirs.
pub(super) fn share_in_turn(all: usize, since: Duration, round: Duration, least: usize) -> usize {
    let share = all as f64 * since.as_secs_f64() / round.as_secs_f64();
    least.max(share.ceil() as usize)
}

/// What is to be looked at, and when.
pub(super) struct Agenda {
    pub(super) tick: Instant,
    /// Whether the tick was brought forward by what others do.
    hurried: bool,
    /// When the cheap question is asked next.
    pub(super) hint: Instant,
    /// Resolved paths that somebody touched, by the time at which they are to be looked at again.
    files: BTreeMap<Instant, HashSet<PathBuf>>,
    /// No hurried look before this.
    rested: Instant,
    debt: Debt,
    /// What is to be told as a gap, and how often it happened.
    gaps: BTreeMap<Gap, u32>,
    /// The next time gaps are told: many of a kind are one line.
    gaps_due: Instant,
}

impl Agenda {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            tick: now,
            hurried: false,
            hint: now,
            files: BTreeMap::new(),
            rested: now,
            debt: Debt { work: Duration::ZERO, since: now },
            gaps: BTreeMap::new(),
            gaps_due: now,
        }
    }

    pub(super) fn gap(&mut self, gap: Gap) {
        *self.gaps.entry(gap).or_default() += 1;
    }

    /// What is to be told now: each kind once, with its number.
    pub(super) fn take_gaps(&mut self) -> Vec<Gap> {
        let now = Instant::now();
        if self.gaps.is_empty() || now < self.gaps_due {
            return Vec::new();
        }
        self.gaps_due = now + GAP_PAUSE;
        let line = |(gap, times): (Gap, u32)| match times {
            0 | 1 => gap,
            _ => Gap { text: format!("{} ({times} times)", gap.text), ..gap },
        };
        std::mem::take(&mut self.gaps).into_iter().map(line).collect()
    }

    pub(super) fn add(&mut self, touched: Touched) {
        let now = Instant::now();
        if touched.lost {
            self.gap(Gap::anywhere("the kernel's queue of file events overflowed: everything is looked at again"));
        }
        if touched.lost || touched.listing {
            self.hurry(now);
        }
        if !touched.files.is_empty() {
            for delay in LOOK_AGAIN {
                self.files.entry(now + delay).or_default().extend(touched.files.iter().cloned());
            }
        }
    }

    /// Brings the tick forward.
    fn hurry(&mut self, now: Instant) {
        let at = now.max(self.rested);
        if at < self.tick {
            (self.tick, self.hurried) = (at, true);
        }
    }

    /// A tick that started at `start` is over, and the next one is due in its time: never back to back, one that takes
    /// long leaves as much time to others. Returns whether it was a hurried one.
    pub(super) fn ticked(&mut self, start: Instant, interval: Duration) -> bool {
        self.tick = (self.tick + interval).max(Instant::now() + start.elapsed());
        std::mem::take(&mut self.hurried)
    }

    /// A hurried look has taken so much work. Ticks that come in their own time need no rest: whoever takes a lock just
    /// then would wait for it.
    pub(super) fn rest(&mut self, work: Duration) {
        let now = Instant::now();
        self.rested = now + self.debt.add(work, now);
    }

    /// What the cheap question found: locks can change without an open, and lists without inotify.
    pub(super) fn take_hint(&mut self, hint: Hint, now: Instant) {
        if hint.listing || hint.recovered {
            self.hurry(now);
        }
        if !hint.files.is_empty() {
            self.files.entry(now).or_default().extend(hint.files);
        }
    }

    /// The files whose time has come, all at once.
    pub(super) fn due(&mut self, now: Instant) -> HashSet<PathBuf> {
        if now < self.rested {
            return HashSet::new();
        }
        let later = self.files.split_off(&(now + Duration::from_nanos(1)));
        std::mem::replace(&mut self.files, later).into_values().flatten().collect()
    }

    pub(super) fn next(&self) -> Instant {
        let files = self.files.keys().next().map(|at| (*at).max(self.rested));
        files.map_or(self.tick, |at| at.min(self.tick)).min(self.hint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn one_slow_look_holds_up_nobody_and_many_take_a_fifth_of_a_core() {
        let start = Instant::now();
        let debt = || Debt { work: Duration::ZERO, since: start };
        let rest = |millis| debt().add(Duration::from_millis(millis), start).as_millis();
        assert_eq!([rest(0), rest(1), rest(100), rest(120), rest(1000)], [5, 5, 5, 80, 1000]);
        for (look, share) in [(2, 0.1..0.29), (10, 0.1..0.25), (30, 0.1..0.25), (400, 0.4..0.51)] {
            let look = Duration::from_millis(look);
            let (mut debt, mut now, mut work) = (debt(), start, Duration::ZERO);
            while now < start + Duration::from_secs(60) {
                now += look;
                work += look;
                now += debt.add(look, now);
            }
            let part = work.as_secs_f64() / now.duration_since(start).as_secs_f64();
            assert!(share.contains(&part), "{look:?} back to back: {part}");
        }
        // And it is forgotten soon.
        let mut debt = Debt { work: BURST * 2, since: start };
        assert_eq!(debt.add(Duration::from_millis(5), start + Duration::from_secs(2)), SHORTEST_REST);
    }

    #[test]
    fn a_share_brings_everybody_their_turn_within_a_round() {
        let share = |all, since| share_in_turn(all, Duration::from_secs(since), Duration::from_secs(5), 100);
        assert_eq!([share(50, 1), share(1000, 0), share(1000, 1), share(1001, 1)], [100, 100, 200, 201]);
        assert!(share(1000, 3600) >= 1000);
    }

    #[test]
    fn who_touches_an_image_waits_after_a_hurried_tick_and_not_after_one_in_its_time() {
        let path = PathBuf::from("/images/a");
        let touched = Touched { files: HashSet::from([path.clone()]), ..Touched::default() };
        let listing = Touched { listing: true, ..Touched::default() };
        let mut agenda = Agenda::new(Instant::now());
        // As the sampler does: only what was hurried is followed by a rest.
        assert!(!agenda.ticked(Instant::now(), HOUR), "the first tick is nobody's doing");
        agenda.add(touched.clone());
        assert!(agenda.next() <= Instant::now());
        assert_eq!(agenda.due(Instant::now()), HashSet::from([path]));
        agenda.add(listing.clone());
        assert!(agenda.tick <= Instant::now());
        assert!(agenda.ticked(Instant::now(), HOUR));
        // Longer than anybody's burst.
        agenda.rest(HOUR);
        agenda.add(touched);
        agenda.add(listing);
        let soon = Instant::now() + HOUR / 2;
        assert!(agenda.due(soon).is_empty() && agenda.tick > soon);
        agenda.hint = agenda.tick;
        assert!(agenda.next() > soon);
    }

    #[test]
    fn touched_files_are_looked_at_again_until_the_lock_must_be_there() {
        let start = Instant::now();
        let mut agenda = Agenda { tick: start + HOUR, hint: start + HOUR, ..Agenda::new(start) };
        let path = PathBuf::from("/images/a");
        agenda.add(Touched { files: HashSet::from([path.clone()]), ..Touched::default() });
        let later = start + Duration::from_millis(60);
        assert_eq!(agenda.due(later), HashSet::from([path.clone()]));
        assert!(agenda.due(later).is_empty(), "the last look is still to come");
        assert!(agenda.next() < start + Duration::from_secs(10));
        assert_eq!(agenda.due(start + Duration::from_secs(60)), HashSet::from([path]));
        assert_eq!(agenda.next(), agenda.tick);
    }
}
