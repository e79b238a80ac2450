//! Until when is an access held, if nobody comes to let it go?
//!
//! A thread of its own keeps the deadline, so that a stalled terminal, a slow scan or a program that hangs elsewhere cannot
//! extend it. The time that the host sleeps does not count (`CLOCK_MONOTONIC`, clock_gettime(2)).

use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::HeldAccess;
use crate::protocol::Access;

const FOR_EVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// Why a lease is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Its time was up.
    Deadline,
    /// It was let go before.
    Released,
}

/// An access that is let go at its deadline, or when this is dropped.
#[derive(Debug)]
pub struct Lease {
    access: Access,
    until: Instant,
    /// Dropped to wake the thread.
    release: Option<SyncSender<()>>,
    /// Its other end is dropped when all has been done.
    done: Receiver<()>,
    thread: Option<JoinHandle<()>>,
}

impl Lease {
    pub(super) fn start(
        held: HeldAccess,
        limit: Duration,
        on_end: impl FnOnce(Ending) + Send + 'static,
    ) -> io::Result<Self> {
        let access = held.access();
        let now = Instant::now();
        // A limit that no clock can count is none that anybody will see.
        let until = now.checked_add(limit).unwrap_or(now + FOR_EVER);
        let (release, released) = sync_channel::<()>(0);
        let (doing, done) = sync_channel::<()>(0);
        let keep = move || {
            let left = until.saturating_duration_since(Instant::now());
            let ending = match released.recv_timeout(left) {
                Err(RecvTimeoutError::Timeout) => Ending::Deadline,
                Ok(()) | Err(RecvTimeoutError::Disconnected) => Ending::Released,
            };
            drop(held);
            on_end(ending);
            drop(doing);
        };
        let thread = std::thread::Builder::new().name("lease".to_owned()).spawn(keep)?;
        Ok(Self { access, until, release: Some(release), done, thread: Some(thread) })
    }

    /// What is held, while it is not over.
    #[must_use]
    pub fn access(&self) -> Access {
        self.access
    }

    /// When it ends by itself.
    #[must_use]
    pub fn until(&self) -> Instant {
        self.until
    }

    /// Whether the locks have been let go and `on_end` has returned.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Has the locks let go and does not wait for it: where a file server hangs, an unlock may take long.
    pub fn let_go(&mut self) {
        self.release = None;
    }

    /// Waits until the locks have been let go and `on_end` has returned, at most until `deadline`.
    pub fn wait_until(&self, deadline: Instant) {
        // Nothing is ever sent: it ends when the other end is dropped.
        let _ = self.done.recv_timeout(deadline.saturating_duration_since(Instant::now()));
    }

    /// Has the locks let go and forgets about them.
    pub fn release_soon(mut self) {
        self.let_go();
        self.thread = None;
    }
}

impl Drop for Lease {
    /// Lets go, and returns when that has been done.
    fn drop(&mut self) {
        self.release = None;
        if let Some(thread) = self.thread.take() {
            // Dropped by `on_end` itself, it would wait for ever; a panic of `on_end` is that thread's.
            if thread.thread().id() != std::thread::current().id() {
                let _ = thread.join();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    const LONG: Duration = Duration::from_secs(60);

    fn lent(limit: Duration) -> (tempfile::NamedTempFile, Lease, std::sync::mpsc::Receiver<Ending>) {
        let image = tempfile::NamedTempFile::new().unwrap();
        let held = HeldAccess::acquire(image.path(), "cw/w".parse().unwrap()).unwrap();
        let (tell, told) = channel();
        let lease = held.lend(limit, move |ending| tell.send(ending).unwrap()).unwrap();
        (image, lease, told)
    }

    fn is_free(image: &tempfile::NamedTempFile) -> bool {
        HeldAccess::check(image.path(), "cw/w".parse().unwrap()).is_ok()
    }

    #[test]
    fn the_deadline_lets_go_though_nobody_does_anything() {
        let (image, lease, told) = lent(Duration::from_millis(5));
        assert_eq!(told.recv_timeout(LONG), Ok(Ending::Deadline));
        assert!(is_free(&image));
        drop(lease);
    }

    #[test]
    fn a_limit_that_no_clock_can_count_is_long() {
        let (image, lease, _told) = lent(Duration::MAX);
        assert!(!is_free(&image) && lease.until() > Instant::now() + LONG);
    }

    #[test]
    fn dropping_the_lease_lets_go_at_once() {
        let (image, lease, told) = lent(LONG);
        assert!(!is_free(&image) && !lease.is_over());
        assert_eq!(lease.access().to_string(), "cw/w");
        drop(lease);
        assert!(is_free(&image));
        assert_eq!(told.recv(), Ok(Ending::Released));
    }

    #[test]
    fn a_release_that_is_not_waited_for_comes_all_the_same() {
        let (image, lease, told) = lent(LONG);
        lease.release_soon();
        assert_eq!(told.recv_timeout(LONG), Ok(Ending::Released));
        assert!(is_free(&image));
    }
}
