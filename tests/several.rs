//! Do the locks of several programs follow the protocol, step by step, as a model of it does?
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{ChildStdin, ChildStdout, Stdio};

use proptest::prelude::*;
use proptest::sample::subsequence;
use qlock::linux::lock_table::{LockKind, LockMode, parse_line};
use qlock::protocol::{Access, LockByte, Permission};
use support::{Images, Running, locked, qlock_top, wait_for};

/// A child that takes what it is told to take.
struct Actor {
    running: Running,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    access: Access,
}

impl Actor {
    fn start(image: &Path) -> Self {
        let mut command = qlock_top();
        command.args(["demo-actor", "obey"]).arg(image).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut running = Running::spawn(&mut command);
        let (stdin, stdout) = (running.0.stdin.take().unwrap(), running.0.stdout.take().unwrap());
        let mut actor = Self { running, stdin, stdout: BufReader::new(stdout), access: Access::NONE };
        assert_eq!(actor.answer(), "ready");
        actor
    }

    fn order(&mut self, access: Access) {
        writeln!(self.stdin, "{access}").unwrap();
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// What the kernel lists behind its descriptors.
    fn listed(&self) -> Access {
        let files = std::fs::read_dir(format!("/proc/{}/fdinfo", self.running.pid())).unwrap();
        let texts = files.map(|f| std::fs::read_to_string(f.unwrap().path()).unwrap());
        let mut listed = Access::NONE;
        for line in texts.collect::<String>().lines().filter_map(|l| l.strip_prefix("lock:")) {
            let lock = parse_line(line).unwrap();
            assert_eq!((lock.kind, lock.mode, lock.waiting), (LockKind::Ofd, LockMode::Read, false), "{line}");
            for offset in lock.start..=lock.end.unwrap() {
                listed = listed.with(LockByte::at(offset).unwrap());
            }
        }
        listed
    }
}

const ACTORS: usize = 4;

#[derive(Clone, Debug)]
enum Step {
    /// One goes over to an access.
    Change(usize, Access),
    /// All do, and nobody waits for anybody.
    Meet([Access; ACTORS]),
    /// One is ended by SIGKILL.
    Kill(usize),
    /// One ends by itself.
    Leave(usize),
}

fn any_access() -> impl Strategy<Value = Access> {
    let set = || subsequence(Permission::CURRENT.to_vec(), 0..=2).prop_map(|list| list.into_iter().collect());
    (set(), set()).prop_map(|(uses, denies)| Access::new(uses, denies))
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0..ACTORS, any_access()).prop_map(|(who, access)| Step::Change(who, access)),
        2 => prop::array::uniform(any_access()).prop_map(Step::Meet),
        2 => (0..ACTORS).prop_map(|who| Step::Change(who, Access::NONE)),
        1 => (0..ACTORS).prop_map(Step::Kill),
        1 => (0..ACTORS).prop_map(Step::Leave),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, max_shrink_iters: 200, ..ProptestConfig::default() })]

    /// Four processes go through random accesses: answers and bytes are always those of the model.
    #[test]
    fn the_kernel_and_the_model_agree_on_four_processes(steps in prop::collection::vec(any_step(), 1..30)) {
        let images = Images::new();
        let path = images.raw("a.raw");
        let mut actors: Vec<Actor> = (0..ACTORS).map(|_| Actor::start(&path)).collect();
        for step in steps {
            match step {
                Step::Change(who, new) => {
                    let others = (0..ACTORS).filter(|i| *i != who).fold(Access::NONE, |sum, i| sum.union(actors[i].access));
                    let actor = &mut actors[who];
                    let stopped_by = if actor.access.is_relaxed_by(new) { None } else { new.first_conflict(others) };
                    let expected = stopped_by.map_or("granted".to_owned(), |b| format!("refused {}", b.offset()));
                    actor.order(new);
                    prop_assert_eq!(actor.answer(), expected, "{} to {} beside {}", actor.access, new, others);
                    actor.access = if stopped_by.is_none() { new } else { actor.access };
                }
                Step::Meet(accesses) => {
                    actors.iter_mut().zip(accesses).for_each(|(actor, access)| actor.order(access));
                    for (actor, access) in actors.iter_mut().zip(accesses) {
                        // Who is let in is up to who comes first; that they get on is not.
                        match actor.answer().as_str() {
                            "granted" => actor.access = access,
                            // To let go nobody has to ask.
                            answer => prop_assert!(answer.starts_with("refused ") && !actor.access.is_relaxed_by(access), "{}", answer),
                        }
                    }
                }
                Step::Kill(who) => std::mem::replace(&mut actors[who], Actor::start(&path)).running.end(),
                Step::Leave(who) => {
                    let Actor { mut running, stdin, .. } = std::mem::replace(&mut actors[who], Actor::start(&path));
                    drop(stdin);
                    let ended = wait_for("its end", || running.0.try_wait().unwrap());
                    prop_assert_eq!(ended.code(), Some(0));
                }
            }
            let all = actors.iter().fold(Access::NONE, |sum, a| sum.union(a.access));
            prop_assert_eq!(locked(&path), all);
            for (number, actor) in actors.iter().enumerate() {
                prop_assert_eq!(actor.listed(), actor.access);
                for other in &actors[..number] {
                    prop_assert_eq!(actor.access.first_conflict(other.access), None);
                }
            }
        }
    }
}
