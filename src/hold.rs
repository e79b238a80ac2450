//! How does a program that is not QEMU take part in the locking of an image?
//!
//! The only code of this crate that sets a lock. It follows `raw_handle_perm_lock` in QEMU's `block/file-posix.c`: lock
//! the old and the new bytes together, test the new ones, and go back to exactly the old ones when the test fails. Only
//! read locks, only on an open file description (never a POSIX lock, which any close of the file would drop), and no lock
//! call ever waits in the kernel. [`Lease`] adds a deadline. Asks `linux::probe` and `protocol`.
//!
//! ```
//! use std::time::Duration;
//! use qlock::hold::{AcquireError, HeldAccess};
//!
//! # let image = tempfile::NamedTempFile::new()?;
//! # let path = image.path();
//! // Would a backup be let in now? Nothing is locked by asking.
//! HeldAccess::check(path, "c/wr".parse()?)?;
//!
//! // Take it, waiting for at most a second, and let it go in a minute at the latest.
//! let backup = HeldAccess::acquire_within(path, "c/wr".parse()?, Duration::from_secs(1))?;
//! let lease = backup.lend(Duration::from_secs(60), |_| ())?;
//!
//! // A writer is told who is in its way, as QEMU would tell it.
//! let refused = HeldAccess::acquire(path, "cwr/wr".parse()?).unwrap_err();
//! let AcquireError::Conflict { byte, sentence, .. } = &refused else { panic!("{refused}") };
//! assert_eq!(sentence.to_string(), "Failed to get \"write\" lock");
//! assert_eq!(byte.offset(), 201);
//!
//! drop(lease);
//! HeldAccess::check(path, "cwr/wr".parse()?)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod lease;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

pub use lease::{Ending, Lease};

use crate::linux::identity::{FileId, status_of};
use crate::linux::lock_table::LockMode;
use crate::linux::probe::{self, Asker, LockFound, OpenError};
use crate::protocol::{Access, LockByte, Sentence};
use crate::text::escape_path;

/// A release is noticed at most this much later. Waiting in the kernel (`F_OFD_SETLKW`) would take a write lock, which
/// QEMU never takes and which would refuse others while it lasts; a question costs a microsecond and disturbs nobody.
pub const PATIENCE_STEP: Duration = Duration::from_millis(50);

/// Why an access was not taken. Nothing has changed: what was held before is held still, and nothing else.
#[derive(Debug, thiserror::Error)]
pub enum AcquireError {
    /// The path could not be opened.
    #[error("cannot open {}: {source}", escape_path(.path))]
    Open {
        /// Of the image.
        path: PathBuf,
        /// Why.
        source: OpenError,
    },
    /// The file that was given is open for writing only: a read lock needs a descriptor that may read (fcntl(2), EBADF).
    #[error("{}: open for writing only: a lock needs a descriptor that is open for reading", escape_path(.path))]
    WriteOnly {
        /// Of the image.
        path: PathBuf,
    },
    /// Somebody else holds a byte that must be free.
    #[error("{}: {sentence}: byte {} ({byte}) is held by somebody else, or by another open file of this process", escape_path(.path), .byte.offset())]
    Conflict {
        /// Of the image.
        path: PathBuf,
        /// The first such byte in QEMU's order.
        byte: LockByte,
        /// What QEMU would say.
        sentence: Sentence,
    },
    /// The file system refused the lock call itself.
    #[error("{}: {sentence}: {}", escape_path(.path), .errno.desc())]
    CannotLock {
        /// Of the image.
        path: PathBuf,
        /// At which byte.
        byte: LockByte,
        /// What QEMU would say.
        sentence: Sentence,
        /// The errno of fcntl(2): `ENOLCK` when a lock server does not answer.
        errno: Errno,
    },
}

/// An access that is held, until it is dropped or the process ends in whatever way.
///
/// A child that was forked shares the open file description, and with it the locks: they stay until the child has closed
/// its copy too (exec(2) does), and a child that drops its copy of this value lets go of them for both.
///
/// ```
/// use qlock::hold::HeldAccess;
///
/// # let image = tempfile::NamedTempFile::new()?;
/// let mut vm = HeldAccess::acquire(image.path(), "c/wr".parse()?)?;
/// // Now a writer is refused, as QEMU would be.
/// assert!(HeldAccess::acquire(image.path(), "cw/-".parse()?).is_err());
/// // Wider, and narrower again, without a moment at which nothing is held. A refused change would change nothing.
/// vm.change("cwr/wr".parse()?)?;
/// vm.change("c/-".parse()?)?;
/// assert_eq!(vm.access(), "c/-".parse()?);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct HeldAccess {
    file: File,
    path: PathBuf,
    access: Access,
}

impl HeldAccess {
    /// Opens the image at `path` for reading only and takes `access` on it. Graph-mod is left out: no QEMU since 7.0
    /// takes it.
    ///
    /// # Errors
    /// [`AcquireError`]; then no lock is left behind.
    pub fn acquire(path: &Path, access: Access) -> Result<Self, AcquireError> {
        let mut held = Self::nothing(path)?;
        held.change(access)?;
        Ok(held)
    }

    /// Like [`acquire`](Self::acquire), but while somebody is in the way it asks again for as long as `patience`, every
    /// [`PATIENCE_STEP`]. Asking locks nothing, so that others are not refused because of one who waits.
    ///
    /// # Errors
    /// [`AcquireError`]: the last conflict when patience has run out; other errors at once.
    pub fn acquire_within(path: &Path, access: Access, patience: Duration) -> Result<Self, AcquireError> {
        let mut held = Self::nothing(path)?;
        held.change_within(access, patience)?;
        Ok(held)
    }

    /// Takes `access` through a file that is open already, for reading at least. The locks belong to its open file
    /// description: copies of the descriptor share them, and what the description already holds of the ten bytes is not
    /// known here and may be let go.
    ///
    /// # Errors
    /// [`AcquireError`], also when the file is no regular file or block device, or is open for writing only. `path` is
    /// for messages alone.
    pub fn acquire_on(file: File, path: &Path, access: Access) -> Result<Self, AcquireError> {
        let path = path.to_owned();
        let status = match status_of(&file) {
            Ok(status) => status,
            Err(e) => return Err(AcquireError::Open { path, source: e.into() }),
        };
        if !status.kind.can_be_image() {
            return Err(AcquireError::Open { path, source: OpenError::NotAnImage });
        }
        let mut held = Self { file, path, access: Access::NONE };
        match held.change(access) {
            // The kernel looks at the mode of the descriptor first.
            Err(AcquireError::CannotLock { path, errno: Errno::EBADF, .. }) => Err(AcquireError::WriteOnly { path }),
            other => other.map(|()| held),
        }
    }

    /// Whether `access` would be granted now. Takes no lock: the answer may be out of date when it comes.
    ///
    /// # Errors
    /// The [`AcquireError`] that [`acquire`](Self::acquire) would give.
    pub fn check(path: &Path, access: Access) -> Result<(), AcquireError> {
        Self::nothing(path)?.check_change(access)
    }

    /// Opens the image at `path` for reading only and locks nothing yet; [`change`](Self::change) takes an access.
    ///
    /// # Errors
    /// [`AcquireError::Open`].
    pub fn nothing(path: &Path) -> Result<Self, AcquireError> {
        let open_error = |source| AcquireError::Open { path: path.to_owned(), source };
        let resolved = path
            .canonicalize()
            .map_err(|e| open_error(OpenError::Errno(Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))))?;
        let (file, _) = probe::open_if_image(&resolved).map_err(open_error)?;
        Ok(Self { file: file.into(), path: path.to_owned(), access: Access::NONE })
    }

    /// What is held now.
    #[must_use]
    pub fn access(&self) -> Access {
        self.access
    }

    /// The file that was opened: whoever chose it by its name may want to see that it is still the same.
    ///
    /// # Errors
    /// The errno of statx(2).
    pub fn file(&self) -> std::io::Result<FileId> {
        Ok(status_of(&self.file).map(|s| s.id)?)
    }

    /// The path it was acquired by.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Goes over to `new` without ever letting go of what both have.
    ///
    /// Only letting go asks nobody and cannot be refused; anything wider tests all of `new`, as QEMU does.
    ///
    /// # Errors
    /// [`AcquireError`]; then exactly what was held before is held still.
    pub fn change(&mut self, new: Access) -> Result<(), AcquireError> {
        let (old, new) = (self.access, new.without_legacy());
        if !old.is_relaxed_by(new) {
            let added = new.difference(old);
            let outcome = self.lock_all(added).and_then(|()| self.test(new));
            if let Err(error) = outcome {
                // Bytes of the old access are not touched, so that they are never free for a moment.
                self.unlock_all(added);
                return Err(error);
            }
        }
        self.unlock_all(old.difference(new));
        self.access = new;
        Ok(())
    }

    /// Whether [`change`](Self::change) would be granted now. Locks nothing and lets go of nothing.
    ///
    /// # Errors
    /// The [`AcquireError`] that the change would give.
    pub fn check_change(&self, new: Access) -> Result<(), AcquireError> {
        let (old, new) = (self.access, new.without_legacy());
        if old.is_relaxed_by(new) {
            return Ok(());
        }
        for byte in new.difference(old).bytes() {
            // A read lock is refused by a write lock alone.
            if self.lock_on(byte, Sentence::lock_failed(byte))?.is_some_and(|l| l.mode == LockMode::Write) {
                return Err(AcquireError::Conflict {
                    path: self.path.clone(),
                    byte,
                    sentence: Sentence::lock_failed(byte),
                });
            }
        }
        self.test(new)
    }

    /// Like [`change`](Self::change), but asks again for as long as `patience` while somebody is in the way. What is held
    /// already stays held meanwhile.
    ///
    /// # Errors
    /// [`AcquireError`]: the last conflict when patience has run out; other errors at once.
    pub fn change_within(&mut self, new: Access, patience: Duration) -> Result<(), AcquireError> {
        let start = Instant::now();
        loop {
            // Asked before it is tried: an attempt holds its bytes for a moment and could refuse somebody else.
            match self.check_change(new).and_then(|()| self.change(new)) {
                Err(AcquireError::Conflict { .. }) if start.elapsed() < patience => {
                    std::thread::sleep(PATIENCE_STEP.min(patience.saturating_sub(start.elapsed())));
                }
                other => return other,
            }
        }
    }

    /// Hands it to a thread of its own that lets go after `limit`, or when the [`Lease`] is dropped, whatever the rest of
    /// the program is busy with; `on_end` is then called on that thread.
    ///
    /// # Errors
    /// When no thread can be had; then the locks are let go.
    pub fn lend(self, limit: Duration, on_end: impl FnOnce(Ending) + Send + 'static) -> std::io::Result<Lease> {
        Lease::start(self, limit, on_end)
    }

    /// Lets go now, instead of when it is dropped.
    pub fn release(self) {}

    /// A copy of the open file, for a child process that is to share the locks. They are let go for both when this is
    /// dropped, and stay with the copy after [`into_file`](Self::into_file).
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn share(&self) -> std::io::Result<OwnedFd> {
        self.file.as_fd().try_clone_to_owned()
    }

    /// Gives the open file away with its locks, which stay for as long as any copy of it is open anywhere: for a child
    /// process that is to inherit them.
    ///
    /// # Errors
    /// When no descriptor is left; then the locks are let go.
    pub fn into_file(mut self) -> std::io::Result<OwnedFd> {
        let copy = self.file.as_fd().try_clone_to_owned();
        // What drop unlocks would be unlocked for the copy too.
        self.access = Access::NONE;
        copy
    }

    fn lock_on(&self, byte: LockByte, sentence: Sentence) -> Result<Option<LockFound>, AcquireError> {
        let offset = byte.offset();
        let found = probe::first_lock(&self.file, Asker::Description, offset, offset);
        found.map_err(|errno| AcquireError::CannotLock { path: self.path.clone(), byte, sentence, errno })
    }

    fn lock_all(&self, access: Access) -> Result<(), AcquireError> {
        for byte in access.bytes() {
            set_lock(&self.file, libc::F_RDLCK, byte).map_err(|errno| {
                let (path, sentence) = (self.path.clone(), Sentence::lock_failed(byte));
                match errno {
                    // Somebody has a write lock there: no QEMU, but a holder.
                    Errno::EAGAIN | Errno::EACCES => AcquireError::Conflict { path, byte, sentence },
                    errno => AcquireError::CannotLock { path, byte, sentence, errno },
                }
            })?;
        }
        Ok(())
    }

    fn test(&self, access: Access) -> Result<(), AcquireError> {
        for byte in access.tested_bytes() {
            let sentence = Sentence::conflict(byte);
            if self.lock_on(byte, sentence)?.is_some() {
                return Err(AcquireError::Conflict { path: self.path.clone(), byte, sentence });
            }
        }
        Ok(())
    }

    /// An unlock can fail only where the lock is lost already; closing the file lets go of whatever is left.
    fn unlock_all(&self, access: Access) {
        for byte in access.bytes() {
            let _ = set_lock(&self.file, libc::F_UNLCK, byte);
        }
    }
}

impl Drop for HeldAccess {
    /// Unlocks before closing: a copy of the descriptor in a child would keep the locks, and FUSE servers that keep locks
    /// to themselves are told of an unlock but not of a close.
    fn drop(&mut self) {
        self.unlock_all(self.access);
    }
}

fn set_lock(file: impl AsFd, kind: libc::c_int, byte: LockByte) -> Result<(), Errno> {
    let lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        // The ten offsets are small.
        l_start: byte.offset() as libc::off_t,
        l_len: 1,
        l_pid: 0,
    };
    loop {
        match fcntl(&file, FcntlArg::F_OFD_SETLK(&lock)) {
            Err(Errno::EINTR) => {}
            other => return other.map(drop),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn access(text: &str) -> Access {
        text.parse().unwrap()
    }

    /// What a stranger sees of the image.
    fn seen(path: &Path) -> Access {
        let (asker, _) = probe::open(&path.canonicalize().unwrap()).unwrap();
        probe::held_bytes(asker, Asker::Process).unwrap().locked
    }

    #[test]
    fn a_refused_attempt_leaves_no_lock_behind() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let vm = HeldAccess::acquire(image.path(), access("cw/w")).unwrap();
        let error = HeldAccess::acquire(image.path(), access("cwr/wr")).unwrap_err();
        assert!(matches!(error, AcquireError::Conflict { byte, .. } if byte.offset() == 201), "{error}");
        assert!(error.to_string().contains("Failed to get \"write\" lock"), "{error}");
        assert_eq!(seen(image.path()), access("cw/w"));
        drop(vm);
        assert_eq!(seen(image.path()), Access::NONE);
    }

    #[test]
    fn a_change_that_is_refused_keeps_the_old_access_whole() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let mut first = HeldAccess::acquire(image.path(), access("c/-")).unwrap();
        let second = HeldAccess::acquire(image.path(), access("cw/w")).unwrap();
        first.change(access("cw/r")).unwrap_err();
        assert_eq!(first.access(), access("c/-"));
        assert_eq!(seen(image.path()), access("cw/w"));
        drop(second);
        assert_eq!(seen(image.path()), access("c/-"));
        first.change(access("cw/r")).unwrap();
        first.change(access("-/-")).unwrap();
        assert_eq!(seen(image.path()), Access::NONE);
    }

    #[test]
    fn a_directory_or_a_missing_file_is_named_in_the_error() {
        let dir = tempfile::tempdir().unwrap();
        let error = HeldAccess::acquire(dir.path(), access("c/-")).unwrap_err().to_string();
        assert!(error.contains("neither a regular file nor a block device"), "{error}");
        let error = HeldAccess::acquire(&dir.path().join("no\nne"), access("c/-")).unwrap_err().to_string();
        assert!(error.contains("no\\nne: No such file or directory"), "{error}");
    }

    #[test]
    fn asking_locks_nothing_and_gives_the_same_answer_as_trying() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let held = HeldAccess::acquire(image.path(), access("cw/w")).unwrap();
        for wanted in ["c/-", "cw/-", "cwr/wr", "-/w", "u/u", "-/-"] {
            let asked = HeldAccess::check(image.path(), access(wanted)).map_err(|e| e.to_string());
            assert_eq!(seen(image.path()), access("cw/w"));
            let tried = HeldAccess::acquire(image.path(), access(wanted)).map(drop).map_err(|e| e.to_string());
            assert_eq!(asked, tried, "{wanted}");
        }
        held.check_change(access("cwr/wr")).unwrap();
        assert_eq!(seen(image.path()), access("cw/w"));
    }

    #[test]
    fn an_open_file_takes_part_if_it_is_an_image_that_may_be_read() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let held = HeldAccess::acquire_on(File::open(image.path()).unwrap(), image.path(), access("c/w")).unwrap();
        assert_eq!(seen(image.path()), access("c/w"));
        held.release();
        assert_eq!(seen(image.path()), Access::NONE);
        let only_write = File::options().write(true).open(image.path()).unwrap();
        let error = HeldAccess::acquire_on(only_write, image.path(), access("c/-")).unwrap_err();
        assert!(matches!(error, AcquireError::WriteOnly { .. }), "{error}");
        for no_image in ["/dev/null", "/proc"] {
            let error =
                HeldAccess::acquire_on(File::open(no_image).unwrap(), Path::new(no_image), access("c/-")).unwrap_err();
            assert!(error.to_string().contains("neither a regular file nor a block device"), "{error}");
        }
    }

    #[test]
    fn one_who_waits_gets_it_when_the_other_lets_go_and_not_before() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let first = HeldAccess::acquire(image.path(), access("cw/w")).unwrap();
        let error = HeldAccess::acquire_within(image.path(), access("cw/w"), Duration::from_millis(1)).unwrap_err();
        assert!(matches!(error, AcquireError::Conflict { .. }), "{error}");
        let path = image.path().to_owned();
        let waiting = std::thread::spawn(move || {
            HeldAccess::acquire_within(&path, access("cw/w"), Duration::from_secs(60)).map(|h| h.access())
        });
        drop(first);
        assert_eq!(waiting.join().unwrap().unwrap(), access("cw/w"));
    }

    #[test]
    fn a_file_that_was_given_away_keeps_its_locks_until_it_is_closed() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let file = HeldAccess::acquire(image.path(), access("c/w")).unwrap().into_file().unwrap();
        assert_eq!(seen(image.path()), access("c/w"));
        drop(file);
        assert_eq!(seen(image.path()), Access::NONE);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        /// Three descriptions, each going through random accesses: the kernel's bytes are always those of the model.
        #[test]
        fn the_kernel_and_the_model_agree(changes in proptest::collection::vec((0usize..3, 0u8..16, 0u8..16), 1..40)) {
            let set = |bits: u8| crate::protocol::Permission::CURRENT.into_iter().filter(|p| bits & (1 << p.index()) != 0).collect();
            let image = tempfile::NamedTempFile::new().unwrap();
            let mut held: Vec<HeldAccess> = (0..3).map(|_| HeldAccess::acquire(image.path(), Access::NONE).unwrap()).collect();
            for (who, uses, denies) in changes {
                let new = Access::new(set(uses), set(denies));
                let others = (0..3).filter(|i| *i != who).fold(Access::NONE, |sum, i| sum.union(held[i].access()));
                let old = held[who].access();
                let granted = old.is_relaxed_by(new) || new.first_conflict(others).is_none();
                prop_assert_eq!(held[who].change(new).is_ok(), granted);
                prop_assert_eq!(held[who].access(), if granted { new } else { old });
                let all = held.iter().fold(Access::NONE, |sum, h| sum.union(h.access()));
                prop_assert_eq!(seen(image.path()), all);
            }
        }
    }
}
