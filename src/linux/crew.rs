//! What if one of many questions is never answered, and nobody can say which before?
//!
//! A process that is stuck in exec(2), closing a file on a dead mount, keeps everybody waiting who asks what it has open
//! (`exec_update_lock`), and one with a stuck mapping whoever reads its command line. So a few threads ask, and a process
//! that does not answer is left out, with its thread, until it does.

use std::collections::HashMap;
use std::hash::Hash;
use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use super::lanes::{Answers, Lanes};

/// The threads that ask, about processes or names.
pub struct Crew<K> {
    lanes: Lanes<u64>,
    threads: usize,
    /// The lanes that are asked in; one that is stuck is replaced.
    free: Vec<u64>,
    next: u64,
    /// What does not answer, and the lane that waits for each.
    silent: HashMap<K, u64>,
}

/// Once one has not answered, others that do not are given up sooner.
const IMPATIENCE: Duration = Duration::from_millis(250);
/// However many do not answer, nobody waits longer than about this.
const LONGEST: Duration = Duration::from_secs(3);
/// Below this many questions a second thread would be woken for nothing.
const WORTH_THREADS: usize = 64;

impl<K: Clone + Eq + Hash + Send + 'static> Crew<K> {
    /// As many threads as there are cores, once there is work for them.
    #[must_use]
    pub fn new(patience: Duration) -> Self {
        let threads = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let free: Vec<u64> = (0..threads as u64).collect();
        Self { lanes: Lanes::new(patience), threads, next: threads as u64, free, silent: HashMap::new() }
    }

    /// How many ask at once, at most.
    #[must_use]
    pub fn threads(&self) -> u32 {
        u32::try_from(self.threads).unwrap_or(u32::MAX)
    }

    /// How many do not answer now.
    #[must_use]
    pub fn silent(&self) -> usize {
        self.silent.len()
    }

    /// Whether something that did not answer has done so meanwhile.
    #[must_use]
    pub fn has_recovered(&mut self) -> bool {
        let lanes = &mut self.lanes;
        self.silent.values().any(|lane| lanes.stuck_since(lane).is_none())
    }

    /// Asks each of `questions` about what it names; `None` where there was no answer.
    pub fn ask<Q, A>(
        &mut self,
        questions: Vec<(K, Q)>,
        ask: impl Fn(K, Q) -> A + Clone + Send + 'static,
    ) -> Vec<Option<A>>
    where
        Q: Clone + Send + 'static,
        A: Send + 'static,
    {
        let lanes = &mut self.lanes;
        let back: Vec<u64> =
            self.silent.extract_if(|_, lane| lanes.stuck_since(lane).is_none()).map(|(_, l)| l).collect();
        back.into_iter().for_each(|lane| self.give_back(lane));
        let mut all: Vec<Option<A>> = (0..questions.len()).map(|_| None).collect();
        let mut open: Vec<usize> =
            (0..questions.len()).filter(|i| !self.silent.contains_key(&questions[*i].0)).collect();
        let mut patience = None;
        let started = Instant::now();
        while !open.is_empty() {
            if patience.is_some() && started.elapsed() > LONGEST {
                // So many do not answer that the others are left for the next time.
                break;
            }
            let threads = if open.len() < WORTH_THREADS { 1 } else { self.threads };
            let share = open.len().div_ceil(threads);
            let chunks: Vec<(u64, Vec<usize>)> = open.chunks(share).map(|c| (self.free_lane(), c.to_vec())).collect();
            let batches: Vec<_> = chunks
                .into_iter()
                .map(|(lane, places)| {
                    let of_lane = places.iter().map(|i| questions[*i].clone()).collect();
                    let ask = ask.clone();
                    (lane, self.lanes.ask(&lane, of_lane, move |(key, question)| ask(key, question)), places)
                })
                .collect();
            open.clear();
            for (lane, batch, places) in batches {
                let Answers { answers, stuck_since } = self.lanes.wait_for(&batch, patience);
                let answered = answers.len();
                for (place, answer) in places.iter().zip(answers) {
                    all[*place] = Some(answer);
                }
                if stuck_since.is_none() {
                    // A question that panicked has no answer, and what came after it was not asked.
                    self.give_back(lane);
                    continue;
                }
                patience = Some(IMPATIENCE);
                if let Some(culprit) = places.get(answered) {
                    let key = questions[*culprit].0.clone();
                    open.extend(places[answered + 1..].iter().filter(|i| questions[**i].0 != key));
                    self.silent.insert(key, lane);
                }
            }
        }
        all
    }

    /// A thread that was replaced while it was stuck is not needed any more.
    fn give_back(&mut self, lane: u64) {
        if self.free.len() < self.threads {
            self.free.push(lane);
        } else {
            self.lanes.retain(|l| *l != lane);
        }
    }

    fn free_lane(&mut self) -> u64 {
        self.free.pop().unwrap_or_else(|| {
            self.next += 1;
            self.next
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::sync::{Arc, Mutex};

    #[test]
    fn processes_that_do_not_answer_are_left_out_until_they_do() {
        let mut crew = Crew::new(Duration::from_millis(20));
        let (go_on, wait) = mpsc::channel::<()>();
        let wait = Arc::new(Mutex::new(wait));
        let ask = move |pid: i32, add: i32| {
            if pid == 7 || pid == 190 {
                let _ = wait.lock().unwrap_or_else(std::sync::PoisonError::into_inner).recv();
            }
            pid + add
        };
        let questions = || (0..200).map(|pid| (pid, 1)).collect::<Vec<_>>();
        let deadline = std::time::Instant::now() + Duration::from_secs(60);
        let expected = |pid: i32| (pid != 7 && pid != 190).then_some(pid + 1);
        // On a busy machine others may be late once.
        while !crew.ask(questions(), ask.clone()).into_iter().eq((0..200).map(expected)) {
            assert!(std::time::Instant::now() < deadline);
        }
        assert_eq!(crew.silent(), 2);
        drop(go_on);
        while crew.ask(questions(), ask.clone()).iter().any(Option::is_none) {
            assert!(std::time::Instant::now() < deadline);
        }
        assert_eq!(crew.silent(), 0);
    }
}
