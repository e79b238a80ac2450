//! Who carries test locks out, so that the screen never waits for storage?
//!
//! Each request has a thread of its own; a lock that was taken is kept by the thread of its [`Lease`], which lets go at the
//! deadline whatever the terminal, the screen or a scan are doing. All of them are let go when this is dropped.

use std::collections::{HashMap, HashSet};
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant};

use jiff::Timestamp;

use super::model::Key;
use super::test_lock::{LockNews, OwnLock};
use crate::hold::{Ending, HeldAccess, Lease};
use crate::protocol::Access;
use crate::text::escape;

/// How long the end of the program waits for a file server to take an unlock; the kernel lets go at its exit all the same.
const PATIENCE: Duration = Duration::from_millis(200);

enum News {
    Taken { id: u64, key: Key, lease: Lease },
    Other(LockNews),
}

/// The test locks of this program.
pub(super) struct Locks {
    leases: HashMap<u64, Lease>,
    /// Ended before it was told that they were taken.
    over: HashSet<u64>,
    next: u64,
    /// Goes up when all is let go: what was asked for before is not wanted any more.
    round: Arc<AtomicU64>,
    news: Receiver<News>,
    teller: Teller,
    bell: PipeReader,
}

#[derive(Clone)]
struct Teller {
    news: Sender<News>,
    ringer: Arc<PipeWriter>,
}

impl Teller {
    /// When nobody listens any more, a lease in the message is dropped with it, and so let go.
    fn tell(&self, news: News) {
        if self.news.send(news).is_ok() {
            let _ = (&*self.ringer).write(&[1]);
        }
    }
}

impl Locks {
    pub(super) fn new() -> io::Result<Self> {
        let (bell, ringer) = io::pipe()?;
        let (sender, news) = mpsc::channel();
        let teller = Teller { news: sender, ringer: Arc::new(ringer) };
        Ok(Self { leases: HashMap::new(), over: HashSet::new(), next: 1, round: Arc::default(), news, teller, bell })
    }

    /// Becomes readable when there is news.
    pub(super) fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// What has happened; call it when the bell is readable.
    pub(super) fn take(&mut self) -> Vec<LockNews> {
        // At least one byte is there: this does not wait.
        let _ = (&self.bell).read(&mut [0; 64]);
        let mut all = Vec::new();
        while let Ok(news) = self.news.try_recv() {
            match news {
                // Its end was told before its beginning.
                News::Taken { id, .. } if self.over.remove(&id) => {}
                News::Taken { id, key, lease } => {
                    let left = lease.until().saturating_duration_since(Instant::now());
                    let until = Timestamp::now() + left;
                    all.push(LockNews::Taken(OwnLock { id, key, access: lease.access(), until }));
                    self.leases.insert(id, lease);
                }
                News::Other(LockNews::Ended { id, by_deadline }) => {
                    if self.leases.remove(&id).is_none() && by_deadline {
                        self.over.insert(id);
                    }
                    all.push(LockNews::Ended { id, by_deadline });
                }
                News::Other(other) => all.push(other),
            }
        }
        all
    }

    /// Asks whether a lock would be granted; takes none.
    pub(super) fn check(&self, key: Key, resolved: Arc<Path>, accesses: Vec<Access>) {
        let teller = self.teller.clone();
        let (asked, name) = (key.clone(), resolved.clone());
        let work = move || {
            let held = open(&key, &resolved);
            let result =
                held.and_then(|h| accesses.iter().try_for_each(|a| h.check_change(*a).map_err(|e| e.to_string())));
            teller.tell(News::Other(LockNews::Checked { key, result }));
        };
        self.spawn(work, &asked, &name);
    }

    /// Takes a lock, for at most `limit` from now.
    pub(super) fn take_lock(&mut self, key: Key, resolved: Arc<Path>, accesses: Vec<Access>, limit: Duration) {
        let id = self.next;
        self.next += 1;
        let teller = self.teller.clone();
        let requested = Instant::now();
        let (asked, name) = (key.clone(), resolved.clone());
        let (round, of_now) = (Arc::clone(&self.round), self.round.load(Ordering::SeqCst));
        let work = move || match take(&key, &resolved, &accesses, id, requested + limit, &teller) {
            Ok(lease) if round.load(Ordering::SeqCst) != of_now => {
                drop(lease);
                let why = "all test locks were let go meanwhile; nothing is held".to_owned();
                teller.tell(News::Other(LockNews::Refused { key, why }));
            }
            Ok(lease) => teller.tell(News::Taken { id, key, lease }),
            Err(why) => teller.tell(News::Other(LockNews::Refused { key, why })),
        };
        self.spawn(work, &asked, &name);
    }

    fn spawn(&self, work: impl FnOnce() + Send + 'static, key: &Key, resolved: &Path) {
        if let Err(e) = std::thread::Builder::new().name("test-lock".to_owned()).spawn(work) {
            let why = format!("no thread for {}: {e}", crate::text::escape_path(resolved));
            self.teller.tell(News::Other(LockNews::Refused { key: key.clone(), why }));
        }
    }

    /// Lets go of one; that it is gone comes as news.
    pub(super) fn release(&mut self, id: u64) {
        if let Some(lease) = self.leases.remove(&id) {
            lease.release_soon();
        }
    }

    /// Lets go of all, and waits a little for it.
    pub(super) fn release_all(&mut self) {
        self.round.fetch_add(1, Ordering::SeqCst);
        // Taken meanwhile, and not told yet.
        while let Ok(news) = self.news.try_recv() {
            match news {
                News::Taken { id, lease, .. } => drop(self.leases.insert(id, lease)),
                News::Other(_) => {}
            }
        }
        let deadline = Instant::now() + PATIENCE;
        let mut leases: Vec<Lease> = self.leases.drain().map(|(_, lease)| lease).collect();
        leases.iter_mut().for_each(Lease::let_go);
        leases.iter().for_each(|l| l.wait_until(deadline));
        leases.into_iter().for_each(Lease::release_soon);
    }
}

impl Drop for Locks {
    fn drop(&mut self) {
        self.release_all();
    }
}

/// The image, if it is still the one that was chosen.
fn open(key: &Key, resolved: &Path) -> Result<HeldAccess, String> {
    let held = HeldAccess::nothing(resolved).map_err(|e| e.to_string())?;
    match held.file() {
        Ok(file) if file == key.1 => Ok(held),
        Ok(_) => Err("another file has taken its name: look again".to_owned()),
        Err(e) => Err(escape(&e.to_string()).into_owned()),
    }
}

fn take(
    key: &Key,
    resolved: &Path,
    accesses: &[Access],
    id: u64,
    until: Instant,
    teller: &Teller,
) -> Result<Lease, String> {
    let mut held = open(key, resolved)?;
    accesses.iter().try_for_each(|a| held.change(*a)).map_err(|e| e.to_string())?;
    // Storage that hangs may have eaten the time: what comes late is not wanted any more.
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err("the storage answered only when its time was up; nothing is held".to_owned());
    }
    let teller = teller.clone();
    let on_end = move |ending| {
        teller.tell(News::Other(LockNews::Ended { id, by_deadline: ending == Ending::Deadline }));
    };
    held.lend(left, on_end).map_err(|e| e.to_string())
}
