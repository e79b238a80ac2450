//! A running `watch --format ndjson`, whose events are waited for.
#![allow(dead_code, unreachable_pub)]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

use serde_json::Value;

use crate::everyone::qlock_top;
use crate::support::{DEADLINE, Running};

pub struct Watch {
    pub running: Running,
    /// The line that it begins with.
    pub first: Value,
    lines: Receiver<Value>,
}

impl Watch {
    pub fn start(paths: &[&Path], interval: &str) -> Self {
        let mut command = qlock_top();
        command.args(["watch", "--format", "ndjson", "--interval", interval]).args(paths).stdout(Stdio::piped());
        let mut running = Running::spawn(&mut command);
        let out = BufReader::new(running.0.stdout.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                let value = serde_json::from_str(&line).expect("each line is one object");
                if sender.send(value).is_err() {
                    break;
                }
            }
        });
        let first: Value = lines.recv_timeout(DEADLINE).expect("a first line");
        assert_eq!(first["kind"], "snapshot");
        Self { running, first, lines }
    }

    /// The next event for which `test` is true; what comes before it is passed over.
    pub fn event(&self, what: &str, test: impl Fn(&Value) -> bool) -> Value {
        self.events_until(what, test).pop().unwrap()
    }

    /// All events up to the first for which `test` is true.
    pub fn events_until(&self, what: &str, test: impl Fn(&Value) -> bool) -> Vec<Value> {
        let deadline = Instant::now() + DEADLINE;
        let mut events = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    let found = test(&line);
                    events.push(line);
                    if found {
                        return events;
                    }
                }
                Err(_) => panic!("waited in vain for {what}, saw {events:#?}"),
            }
        }
    }
}
