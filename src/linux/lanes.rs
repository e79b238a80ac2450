//! What if the storage does not answer?
//!
//! A question about a file on a dead mount may not come back for hours, and whoever asked cannot be woken. So questions
//! are asked by threads, one for each lane, which is most often a mount. Whoever wants to know waits for as long as
//! answers keep coming and no longer. Only one request at a time is in flight in a lane: while one is stuck nothing more
//! is asked there, and when it comes back the lane is as it was.

use std::cell::RefCell;
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Longer than storage that works takes. A disk that has to spin up is told as not answering until it does.
pub const PATIENCE: Duration = Duration::from_secs(1);

type Job = Box<dyn FnOnce() + Send>;

/// The threads that ask, by what they ask about.
pub struct Lanes<K> {
    lanes: HashMap<K, Worker>,
    patience: Duration,
}

struct Worker {
    jobs: Sender<Job>,
    /// The request that did not come back in time.
    stuck: Option<Stuck>,
}

struct Stuck {
    since: Instant,
    request: Arc<dyn Request>,
}

trait Request: Send + Sync {
    fn has_come_back(&self) -> bool;
    fn beat(&self);
}

thread_local! {
    /// What this thread is asking.
    static ASKING: RefCell<Option<Arc<dyn Request>>> = const { RefCell::new(None) };
}

/// Says that a question with many parts comes on: slow storage is not dead. Does nothing on a thread that asks nothing.
pub fn still_going() {
    ASKING.with_borrow(|asking| asking.iter().for_each(|request| request.beat()));
}

/// What was asked in one lane.
pub struct Batch<K, A> {
    lane: K,
    shared: Arc<Shared<A>>,
}

struct Shared<A> {
    state: Mutex<State<A>>,
    finished: Condvar,
}

struct State<A> {
    answers: Vec<A>,
    /// When the last answer came, or the first question was asked.
    progress: Instant,
    finished: bool,
    /// Nobody waits for the rest.
    given_up: bool,
}

/// What came back.
#[derive(Debug)]
pub struct Answers<A> {
    /// In the order of the questions; fewer than them if the lane is stuck.
    pub answers: Vec<A>,
    /// Since when nothing has come back.
    pub stuck_since: Option<Instant>,
}

fn lock<T>(state: &Mutex<T>) -> MutexGuard<'_, T> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A question that panics is a fault of this program, but must not leave its lane without a thread.
fn run(job: Job) {
    let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(job));
}

impl<A> Shared<A> {
    fn new(finished: bool) -> Arc<Self> {
        let state = State { answers: Vec::new(), progress: Instant::now(), finished, given_up: false };
        Arc::new(Self { state: Mutex::new(state), finished: Condvar::new() })
    }

    fn run<Q>(self: &Arc<Self>, questions: Vec<Q>, ask: impl Fn(Q) -> A)
    where
        A: Send + 'static,
    {
        /// Also when a question panics.
        struct Finish<'a, A>(&'a Shared<A>);
        impl<A> Drop for Finish<'_, A> {
            fn drop(&mut self) {
                ASKING.set(None);
                lock(&self.0.state).finished = true;
                self.0.finished.notify_all();
            }
        }
        let _finish = Finish(self);
        ASKING.set(Some(Arc::clone(self) as Arc<dyn Request>));
        lock(&self.state).progress = Instant::now();
        for question in questions {
            if lock(&self.state).given_up {
                break;
            }
            let answer = ask(question);
            let mut state = lock(&self.state);
            state.answers.push(answer);
            state.progress = Instant::now();
        }
    }
}

impl<A: Send> Request for Shared<A> {
    fn has_come_back(&self) -> bool {
        lock(&self.state).finished
    }

    fn beat(&self) {
        lock(&self.state).progress = Instant::now();
    }
}

impl<K: Clone + Eq + Hash> Lanes<K> {
    /// No lanes yet; each is made when it is first asked in.
    #[must_use]
    pub fn new(patience: Duration) -> Self {
        Self { lanes: HashMap::new(), patience }
    }

    /// Has `ask` answer each of `questions` in `lane`, and returns at once; [`wait`](Self::wait) has the answers.
    ///
    /// Nothing is asked in a lane that is stuck.
    pub fn ask<Q, A>(&mut self, lane: &K, questions: Vec<Q>, ask: impl Fn(Q) -> A + Send + 'static) -> Batch<K, A>
    where
        Q: Send + 'static,
        A: Send + 'static,
    {
        let nothing = || Batch { lane: lane.clone(), shared: Shared::new(true) };
        if questions.is_empty() || self.stuck_since(lane).is_some() {
            return nothing();
        }
        let shared = Shared::new(false);
        let theirs = Arc::clone(&shared);
        let job: Job = Box::new(move || theirs.run(questions, ask));
        let left_over = match self.worker(lane) {
            // Its thread lives for as long as the worker does.
            Some(worker) => worker.jobs.send(job).err().map(|unsent| unsent.0),
            None => Some(job),
        };
        if let Some(job) = left_over {
            // No thread to be had: then here, as long as it may take.
            run(job);
        }
        Batch { lane: lane.clone(), shared }
    }

    fn worker(&mut self, lane: &K) -> Option<&Worker> {
        if !self.lanes.contains_key(lane) {
            let (jobs, inbox) = mpsc::channel::<Job>();
            let work = move || inbox.iter().for_each(run);
            std::thread::Builder::new().name("asker".to_owned()).spawn(work).ok()?;
            self.lanes.insert(lane.clone(), Worker { jobs, stuck: None });
        }
        self.lanes.get(lane)
    }

    /// Waits until all has come back, or until nothing more has come for as long as patience lasts.
    pub fn wait<A>(&mut self, batch: &Batch<K, A>) -> Answers<A>
    where
        A: Send + 'static,
    {
        self.wait_for(batch, None)
    }

    /// The same with another patience.
    pub fn wait_for<A>(&mut self, batch: &Batch<K, A>, patience: Option<Duration>) -> Answers<A>
    where
        A: Send + 'static,
    {
        let patience = patience.unwrap_or(self.patience);
        let mut state = lock(&batch.shared.state);
        let stuck_since = loop {
            if state.finished {
                break None;
            }
            let left = patience.saturating_sub(state.progress.elapsed());
            if left.is_zero() {
                state.given_up = true;
                break Some(state.progress);
            }
            state = match batch.shared.finished.wait_timeout(state, left) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        };
        let answers = std::mem::take(&mut state.answers);
        drop(state);
        if let (Some(since), Some(worker)) = (stuck_since, self.lanes.get_mut(&batch.lane)) {
            let request: Arc<dyn Request> = Arc::clone(&batch.shared) as _;
            worker.stuck = Some(Stuck { since, request });
        }
        Answers { answers, stuck_since: stuck_since.or_else(|| self.stuck_since(&batch.lane)) }
    }

    /// Since when nothing comes back in `lane`.
    pub fn stuck_since(&mut self, lane: &K) -> Option<Instant> {
        let worker = self.lanes.get_mut(lane)?;
        if worker.stuck.as_ref().is_some_and(|s| s.request.has_come_back()) {
            worker.stuck = None;
        }
        worker.stuck.as_ref().map(|s| s.since)
    }

    /// The lanes that were stuck and are no more, since this was last asked.
    pub fn recovered(&mut self) -> Vec<K> {
        let back = |worker: &Worker| worker.stuck.as_ref().is_some_and(|s| s.request.has_come_back());
        let recovered: Vec<K> = self.lanes.iter().filter(|(_, w)| back(w)).map(|(lane, _)| lane.clone()).collect();
        for lane in &recovered {
            if let Some(worker) = self.lanes.get_mut(lane) {
                worker.stuck = None;
            }
        }
        recovered
    }

    /// Ends the threads of lanes for which `keep` is false, as soon as nothing is in flight there.
    pub fn retain(&mut self, keep: impl Fn(&K) -> bool) {
        self.lanes.retain(|lane, _| keep(lane));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn answers_come_in_the_order_of_the_questions() {
        let mut lanes = Lanes::new(LONG);
        let first = lanes.ask(&1, (0..100).collect(), |n| n * 2);
        let second = lanes.ask(&2, vec![7], |n| n + 1);
        assert_eq!(lanes.wait(&first).answers, (0..100).map(|n| n * 2).collect::<Vec<_>>());
        let answers = lanes.wait(&second);
        assert_eq!((answers.answers, answers.stuck_since), (vec![8], None));
        let none = lanes.ask(&3, Vec::<i32>::new(), |n| n);
        assert!(lanes.wait(&none).answers.is_empty());
    }

    #[test]
    fn a_lane_that_is_stuck_is_left_alone_until_it_comes_back() {
        let mut lanes = Lanes::new(Duration::from_millis(20));
        let (go_on, wait) = mpsc::channel::<()>();
        let wait = Mutex::new(wait);
        let asked = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&asked);
        let batch = lanes.ask(&'a', vec![1, 2, 3], move |n| {
            lock(&log).push(n);
            if n == 2 {
                let _ = lock(&wait).recv();
            }
            n
        });
        let answers = lanes.wait(&batch);
        assert_eq!(answers.answers, [1], "what came before is not lost");
        let since = answers.stuck_since.unwrap();
        // Others are not held up, and here nothing more is asked.
        let other = lanes.ask(&'b', vec![5], |n| n);
        assert_eq!(lanes.wait(&other).answers, [5]);
        let again = lanes.ask(&'a', vec![6], |n| n);
        let answers = lanes.wait(&again);
        assert_eq!((answers.answers, answers.stuck_since), (vec![], Some(since)));
        assert!(lanes.recovered().is_empty());
        drop(go_on);
        let deadline = Instant::now() + LONG;
        let recovered = loop {
            let recovered = lanes.recovered();
            if !recovered.is_empty() {
                break recovered;
            }
            assert!(Instant::now() < deadline);
            std::thread::yield_now();
        };
        assert_eq!(recovered, ['a']);
        assert_eq!(*lock(&asked), [1, 2], "what nobody waits for is not asked any more");
        let batch = lanes.ask(&'a', vec![9], |n| n);
        assert_eq!(lanes.wait(&batch).answers, [9]);
    }

    #[test]
    fn a_question_that_comes_on_slowly_is_waited_for() {
        let mut lanes = Lanes::new(Duration::from_millis(400));
        let batch = lanes.ask(&1, vec![10], |parts| {
            for _ in 0..parts {
                std::thread::sleep(Duration::from_millis(60));
                still_going();
            }
            parts
        });
        assert_eq!(lanes.wait(&batch).answers, [10]);
    }

    #[test]
    fn a_question_that_panics_costs_its_answer_only() {
        let mut lanes = Lanes::new(LONG);
        let batch = lanes.ask(&1, vec![1, 2], |n| if n == 2 { panic!("on purpose") } else { n });
        assert_eq!(lanes.wait(&batch).answers, [1]);
        let batch = lanes.ask(&1, vec![3], |n| n);
        assert_eq!(lanes.wait(&batch).answers, [3]);
    }
}
