//! When is it looked, and how does whoever shows it hear of it?
//!
//! One thread looks: at every tick of the timer, and sooner when inotify says that somebody opened, closed, made or
//! removed an image. The newest snapshot waits in a slot: a screen that stalls costs no memory and stops no look. What
//! was passed over, or may have been missed, is told as a gap.

use std::io::{self, PipeReader, PipeWriter, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use nix::time::{ClockId, clock_gettime};

use super::agenda::Agenda;
pub use super::agenda::Gap;
use super::look::{Looker, Scope};
use super::sample::Sample;
use super::snapshot::Snapshot;
use crate::image::catalog::CatalogError;
use crate::image::watch::ImageWatch;
use crate::linux::Roots;

/// What is to be watched, and how often.
#[derive(Clone, Debug)]
pub struct Options {
    /// Directories, images and block devices.
    pub paths: Vec<PathBuf>,
    /// Directories with all below them.
    pub recursive: bool,
    /// Time between two ticks.
    pub interval: Duration,
    /// Where `/proc` and `/sys` are read from.
    pub roots: Roots,
}

/// News from the sampler.
#[derive(Clone, Debug, Default)]
pub struct Update {
    /// The newest snapshot, if one came since the last call.
    pub snapshot: Option<Arc<Snapshot>>,
    /// What may have been missed since.
    pub gaps: Vec<Gap>,
    /// The thread has ended: nothing more will come.
    pub ended: bool,
}

/// A thread that looks, and the slot where it puts what it saw.
pub struct Sampler {
    orders: Sender<Order>,
    slot: Arc<Mutex<Slot>>,
    bell: PipeReader,
}

enum Order {
    /// inotify has news.
    Nudge,
    /// A search that went on aside is over.
    Searched,
    /// Look now.
    Look,
    /// The time between two ticks.
    Interval(Duration),
    /// No more.
    Stop,
}

#[derive(Default)]
struct Slot {
    update: Update,
    looked_at: Option<Timestamp>,
    rung: bool,
}

fn lock(slot: &Mutex<Slot>) -> MutexGuard<'_, Slot> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Sampler {
    /// Lists the images, starts watching and starts the thread. The first snapshot follows as an update.
    ///
    /// # Errors
    /// When a path leads nowhere or to something that is no image.
    pub fn start(options: &Options) -> Result<Self, StartError> {
        let (orders, inbox) = mpsc::channel();
        let (bell, ringer) = io::pipe().map_err(StartError::Resources)?;
        let slot = Arc::new(Mutex::new(Slot::default()));
        let nudge = orders.clone();
        let watch = ImageWatch::new(move || {
            // Nobody listens any more when the thread has ended.
            let _ = nudge.send(Order::Nudge);
        });
        let mut gaps = Vec::new();
        let watch = watch
            .map_err(|e| {
                let text = crate::text::escape(&e.to_string()).into_owned();
                let text = format!("inotify is not available ({text}): changes show at the next tick only");
                gaps.push(Gap::anywhere(text));
            })
            .ok();
        let (roots, interval) = (options.roots.clone(), options.interval);
        let mut looker = Looker::new(roots, &options.paths, options.recursive, watch)?;
        let searched = orders.clone();
        looker.search_aside(WALK_BUDGET, move || {
            let _ = searched.send(Order::Searched);
        });
        let out = Out { slot: Arc::clone(&slot), ringer, last: None };
        lock(&slot).update.gaps = gaps;
        std::thread::Builder::new()
            .name("sampler".to_owned())
            .spawn(move || Work { looker, inbox, out, interval }.run())
            .map_err(StartError::Resources)?;
        Ok(Self { orders, slot, bell })
    }

    /// Becomes readable when there is an update; for poll(2).
    #[must_use]
    pub fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// What is new since the last call. Call it when [`bell`](Self::bell) is readable.
    #[must_use]
    pub fn take(&mut self) -> Update {
        let mut slot = lock(&self.slot);
        if slot.rung {
            // One byte for one ring: this cannot wait.
            let _ = io::Read::read(&mut self.bell, &mut [0]);
            slot.rung = false;
        }
        let ended = slot.update.ended;
        std::mem::replace(&mut slot.update, Update { ended, ..Update::default() })
    }

    /// When it was last looked: also a look that found nothing new, which is not published, counts.
    #[must_use]
    pub fn looked_at(&self) -> Option<Timestamp> {
        lock(&self.slot).looked_at
    }

    /// Looks as soon as possible.
    pub fn look_now(&self) {
        let _ = self.orders.send(Order::Look);
    }

    /// Sets the time between two ticks.
    pub fn set_interval(&self, interval: Duration) {
        let _ = self.orders.send(Order::Interval(interval));
    }
}

impl Drop for Sampler {
    /// Asks the thread to end and does not wait for it: it may be waiting for dead storage.
    fn drop(&mut self) {
        let _ = self.orders.send(Order::Stop);
    }
}

/// Why watching could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A path cannot be watched.
    #[error(transparent)]
    Path(#[from] CatalogError),
    /// No descriptor or thread left.
    #[error("cannot start watching: {0}")]
    Resources(io::Error),
}

/// `/proc/locks` and the directories are asked this often between two ticks, in at most this part of one core: with
/// thousands of locks on the host that is less often.
const HINT_PAUSE: Duration = Duration::from_millis(80);
const HINT_SHARE: u32 = 400;
/// After a flood of events nobody listens to them for this long.
const EVENT_REST: Duration = Duration::from_secs(5);

/// The CPU time that our threads have had: on a busy host, or one whose cores sleep, a question takes longer than it costs.
fn work_of_all() -> Duration {
    clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).map(Duration::from).unwrap_or_default()
}

/// What takes longer holds up those who hear of a lock: it goes on aside.
const WALK_BUDGET: Duration = Duration::from_millis(10);

struct Out {
    slot: Arc<Mutex<Slot>>,
    ringer: PipeWriter,
    last: Option<(Sample, Arc<Snapshot>)>,
}

impl Out {
    /// Puts what was seen into the slot if it says something new.
    fn publish(&mut self, sample: Sample, gaps: Vec<Gap>) {
        lock(&self.slot).looked_at = Some(sample.taken_at);
        let news = match &self.last {
            // Most often nothing has changed, and then there is nothing to understand.
            Some((last, _)) if last.says_the_same(&sample) => None,
            last => {
                let snapshot = Snapshot::of(&sample);
                Some(snapshot).filter(|new| last.as_ref().is_none_or(|(_, last)| !last.says_the_same(new)))
            }
        };
        if news.is_none() && gaps.is_empty() {
            return;
        }
        let mut slot = lock(&self.slot);
        slot.update.gaps.extend(gaps);
        if let Some(snapshot) = news {
            let snapshot = Arc::new(snapshot);
            if slot.update.snapshot.is_some() {
                let merged = Gap::anywhere("changes came faster than they were taken: some of them were merged");
                if !slot.update.gaps.contains(&merged) {
                    slot.update.gaps.push(merged);
                }
            }
            slot.update.snapshot = Some(Arc::clone(&snapshot));
            self.last = Some((sample, snapshot));
        }
        self.ring(&mut slot);
    }

    fn ring(&self, slot: &mut Slot) {
        if !slot.rung {
            slot.rung = true;
            // The pipe holds at most this one byte.
            let _ = (&self.ringer).write(&[1]);
        }
    }
}

impl Drop for Out {
    /// Also when the thread panics: whoever waits must hear that nothing more will come.
    fn drop(&mut self) {
        let mut slot = lock(&self.slot);
        slot.update.ended = true;
        self.ring(&mut slot);
    }
}

struct Work {
    looker: Looker,
    inbox: Receiver<Order>,
    out: Out,
    interval: Duration,
}

impl Work {
    fn run(mut self) {
        let start = Instant::now();
        let mut agenda = Agenda::new(start);
        let mut hint_pause = HINT_PAUSE;
        loop {
            let now = Instant::now();
            let (sample, hurried) = if now >= agenda.tick {
                let late = now - agenda.tick;
                if late > self.interval.max(Duration::from_secs(1)) {
                    agenda.gap(Gap::anywhere(format!(
                        "a look came {} s late: the host or its storage is slow",
                        late.as_secs()
                    )));
                }
                let sample = self.looker.look(Scope::Everything);
                // While the list changes all the time, every look is one of these: what was touched has its turn all the
                // same, and does not pile up.
                let due = agenda.due(now);
                let sample = if due.is_empty() { sample } else { self.looker.look_at_touched(&due) };
                // It has asked all that a hint would.
                agenda.hint = Instant::now() + hint_pause;
                (Some(sample), agenda.ticked(now, self.interval))
            } else {
                if now >= agenda.hint {
                    let before = work_of_all();
                    agenda.take_hint(self.looker.hint(), now);
                    // While we wait for each other it is no more than the time; what goes on aside is not part of it.
                    let work = work_of_all().saturating_sub(before).min(now.elapsed());
                    hint_pause = HINT_PAUSE.max(work * HINT_SHARE);
                    agenda.hint = Instant::now() + hint_pause;
                }
                let due = agenda.due(now);
                ((!due.is_empty()).then(|| self.looker.look_at_touched(&due)), true)
            };
            if let Some(sample) = sample {
                let work = now.elapsed().saturating_sub(self.looker.take_slept());
                if hurried {
                    agenda.rest(work);
                }
                self.publish(sample, &mut agenda);
            }
            let wait = agenda.next().saturating_duration_since(Instant::now());
            match self.inbox.recv_timeout(wait) {
                Ok(Order::Nudge) => {
                    let touched = self.looker.watch().map(ImageWatch::take).unwrap_or_default();
                    if touched.flooded {
                        let pause = EVENT_REST.as_secs();
                        agenda.gap(Gap::anywhere(format!(
                            "files are opened and closed too fast to follow: events are left aside for {pause} s"
                        )));
                        self.looker.rest_from_events(EVENT_REST);
                        continue;
                    }
                    // Whoever wrote and is gone before anybody looked held locks that nobody saw.
                    for path in touched.written.iter().filter(|p| !self.looker.knows_a_writer(p)) {
                        let text = "somebody wrote to it and was gone before it could be looked at";
                        agenda.gap(Gap { image: self.looker.shown_path(path), text: text.to_owned() });
                    }
                    self.looker.expect_openers(&touched);
                    agenda.add(touched);
                }
                Ok(Order::Searched) => {
                    if let Some(sample) = self.looker.take_search() {
                        // Nobody's doing, and followed by no rest.
                        self.looker.take_slept();
                        self.publish(sample, &mut agenda);
                    }
                }
                Ok(Order::Look) => agenda.tick = Instant::now(),
                Ok(Order::Interval(interval)) => {
                    self.interval = interval;
                    agenda.tick = agenda.tick.min(Instant::now() + interval);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Ok(Order::Stop) | Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }
}

impl Work {
    fn publish(&mut self, sample: Sample, agenda: &mut Agenda) {
        self.looker.take_unwatched().into_iter().for_each(|text| agenda.gap(Gap::anywhere(text)));
        self.out.publish(sample, agenda.take_gaps());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::monitor::examples::{holds, image, process, sample};
    use crate::monitor::sample::ImageSample;

    fn out() -> (Out, Arc<Mutex<Slot>>, PipeReader) {
        let (bell, ringer) = io::pipe().unwrap();
        let slot = Arc::new(Mutex::new(Slot::default()));
        (Out { slot: Arc::clone(&slot), ringer, last: None }, slot, bell)
    }

    fn seen(held: bool) -> Sample {
        let descriptors = if held { vec![holds(42, "cw/w")] } else { Vec::new() };
        let locked = if held { "cw/w" } else { "-/-" };
        sample(vec![ImageSample { descriptors, ..image("a", locked) }], &[process(42, "qemu-io", None)])
    }

    #[test]
    fn what_nobody_took_in_time_is_told_as_a_gap() {
        let (mut out, slot, _bell) = out();
        out.publish(seen(false), Vec::new());
        assert!(lock(&slot).update.gaps.is_empty());
        out.publish(seen(true), Vec::new());
        out.publish(seen(false), Vec::new());
        let slot = lock(&slot);
        assert_eq!(slot.update.gaps.len(), 1, "once, however many");
        assert!(slot.update.snapshot.as_ref().unwrap().images[0].held().is_empty(), "the newest waits");
    }

    #[test]
    fn a_snapshot_that_says_the_same_wakes_nobody() {
        let (mut out, slot, _bell) = out();
        out.publish(seen(true), Vec::new());
        let mut taken = lock(&slot);
        (taken.update.snapshot, taken.rung) = (None, false);
        drop(taken);
        out.publish(Sample { taken_at: jiff::Timestamp::MAX, ..seen(true) }, Vec::new());
        assert!(!lock(&slot).rung && lock(&slot).update.snapshot.is_none());
        drop(out);
        assert!(lock(&slot).update.ended && lock(&slot).rung, "the end is always told");
    }
}
