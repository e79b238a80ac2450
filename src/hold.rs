//! How does a program that is not QEMU take part in the locking of an image?
//!
//! The only code of this crate that sets a lock. It follows `raw_handle_perm_lock` in QEMU's `block/file-posix.c`: lock
//! the old and the new bytes together, test the new ones, and go back to exactly the old ones when the test fails. Only
//! read locks, only on an open file description, and it never waits. Asks `linux::probe` and `protocol`.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use crate::linux::probe::{self, Asker, OpenError};
use crate::protocol::{Access, LockByte, Sentence};
use crate::text::escape_path;

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
    /// Somebody else holds a byte that must be free.
    #[error("{}: {sentence}: byte {} ({byte}) is held by another process", escape_path(.path), .byte.offset())]
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
/// ```
/// use qlock::hold::HeldAccess;
///
/// # let image = tempfile::NamedTempFile::new()?;
/// let reader = HeldAccess::acquire(image.path(), "c/wr".parse()?)?;
/// // Now a writer is refused, as QEMU would be.
/// assert!(HeldAccess::acquire(image.path(), "cw/-".parse()?).is_err());
/// drop(reader);
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
        let open_error = |source| AcquireError::Open { path: path.to_owned(), source };
        let resolved = path
            .canonicalize()
            .map_err(|e| open_error(OpenError::Errno(Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))))?;
        let (file, _) = probe::open(&resolved).map_err(open_error)?;
        let mut held = Self { file: file.into(), path: path.to_owned(), access: Access::NONE };
        held.change(access)?;
        Ok(held)
    }

    /// What is held now.
    #[must_use]
    pub fn access(&self) -> Access {
        self.access
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
            let (path, sentence) = (self.path.clone(), Sentence::conflict(byte));
            let offset = byte.offset();
            match probe::first_lock(&self.file, Asker::Description, offset, offset) {
                Ok(None) => {}
                Ok(Some(_)) => return Err(AcquireError::Conflict { path, byte, sentence }),
                Err(errno) => return Err(AcquireError::CannotLock { path, byte, sentence, errno }),
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
