//! Is a byte of this file locked by anybody at all?
//!
//! A test lock that is never taken (`F_GETLK`) is the truth about held or free: the kernel, or the file server behind it,
//! answers for every holder on every host. Who holds it is another question. The file is opened for reading only, asked
//! and closed: an image held open would block umount and keep a deleted image's space.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use serde::{Deserialize, Serialize};

use super::identity::{FileStatus, status_of, status_of_name};
use super::lock_table::LockMode;
use crate::protocol::{Access, HeldByOthers, LockByte};

/// A lock that stands in the way of a test lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockFound {
    /// Read or write.
    pub mode: LockMode,
    /// First byte.
    pub start: u64,
    /// Last byte, inclusive; `None`: without end.
    pub end: Option<u64>,
    /// `l_pid` as the kernel gives it: -1 for a local OFD lock, the pid for a local POSIX lock, 0 for an owner in another
    /// pid namespace or behind NFSv4, negative for one on another host (NFSv3); FUSE servers put any number here.
    pub pid: i32,
}

/// Whose locks count as "others".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asker {
    /// This process (`F_GETLK`): sees every OFD lock, those of this process too, and says most about the owner.
    Process,
    /// This open file description (`F_OFD_GETLK`), as QEMU asks: does not see what the description itself holds.
    Description,
}

/// What is locked of the ten bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BytesFound {
    /// Bytes under a lock of any kind.
    pub locked: Access,
    /// Bytes under a lock that was reported as a write lock.
    pub write_locked: Access,
    /// The locks that were reported; one byte may have more holders than the kernel names.
    pub locks: Vec<LockFound>,
}

impl BytesFound {
    /// As the protocol counts it.
    #[must_use]
    pub fn held_by_others(&self) -> HeldByOthers {
        HeldByOthers { locked: self.locked, write_locked: self.write_locked }
    }
}

/// Why an image could not be opened for asking.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// open(2) or statx(2) failed.
    #[error("{}", .0.desc())]
    Errno(Errno),
    /// The path leads to a directory, FIFO, socket or character device.
    #[error("neither a regular file nor a block device")]
    NotAnImage,
}

impl From<rustix::io::Errno> for OpenError {
    fn from(errno: rustix::io::Errno) -> Self {
        Self::Errno(Errno::from_raw(errno.raw_os_error()))
    }
}

/// Opens an image to ask about its locks: read-only, never waiting, never following a link that took the path's place.
///
/// `path` must be resolved (canonical): a link anywhere in it is refused with `ELOOP` where the kernel can (openat2(2),
/// Linux 5.6), so that whoever may write to the directory cannot lead us to a device whose opening alone does something.
///
/// # Errors
/// As [`OpenError`] says.
pub fn open(path: &Path) -> Result<(OwnedFd, FileStatus), OpenError> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::NOFOLLOW;
    let resolved = rustix::fs::openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS);
    let fd = match resolved {
        // No such call, or one that a container's filter forbids.
        Err(rustix::io::Errno::NOSYS | rustix::io::Errno::PERM) => rustix::fs::openat(CWD, path, flags, Mode::empty())?,
        other => other?,
    };
    let status = status_of(&fd)?;
    if status.kind.can_be_image() { Ok((fd, status)) } else { Err(OpenError::NotAnImage) }
}

/// The same for a name that somebody else chose, such as that of a backing file: what is no image is not even opened,
/// since to open a device may be all that it takes.
///
/// # Errors
/// As [`OpenError`] says.
pub fn open_if_image(path: &Path) -> Result<(OwnedFd, FileStatus), OpenError> {
    if status_of_name(path)?.kind.can_be_image() { open(path) } else { Err(OpenError::NotAnImage) }
}

/// The first lock, in the kernel's order and not in that of the file, that would stop a write lock on `start..=end`.
///
/// # Errors
/// The errno of fcntl(2): the file system cannot lock, or its server does not answer.
pub fn first_lock(file: impl AsFd, asker: Asker, start: u64, end: u64) -> Result<Option<LockFound>, Errno> {
    let offset = |n: u64| libc::off_t::try_from(n).map_err(|_| Errno::EOVERFLOW);
    // l_pid must be 0, or F_OFD_GETLK answers EINVAL (fcntl(2)).
    let mut question = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: offset(start)?,
        l_len: offset(end - start + 1)?,
        l_pid: 0,
    };
    let call = match asker {
        Asker::Process => FcntlArg::F_GETLK(&mut question),
        Asker::Description => FcntlArg::F_OFD_GETLK(&mut question),
    };
    fcntl(file, call)?;
    let mode = match libc::c_int::from(question.l_type) {
        libc::F_UNLCK => return Ok(None),
        libc::F_WRLCK => LockMode::Write,
        _ => LockMode::Read,
    };
    let first = u64::try_from(question.l_start).unwrap_or_default();
    let length = u64::try_from(question.l_len).unwrap_or_default();
    let last = (length > 0).then(|| first + length - 1);
    Ok(Some(LockFound { mode, start: first, end: last, pid: question.l_pid }))
}

/// Which of the ten bytes are locked.
///
/// One question about all of them, and only where something is found more questions left and right of it.
///
/// # Errors
/// As for [`first_lock`].
pub fn held_bytes(file: impl AsFd, asker: Asker) -> Result<BytesFound, Errno> {
    let mut found = BytesFound::default();
    let mut ranges = vec![(100, 204)];
    while let Some((start, end)) = ranges.pop() {
        let Some(lock) = first_lock(&file, asker, start, end)? else { continue };
        let (mut from, mut to) = (lock.start.max(start), lock.end.unwrap_or(end).min(end));
        if from > to {
            // A file server that names a lock outside of what was asked: something is held there, and no more can be
            // learnt by asking on.
            (from, to) = (start, end);
        }
        for byte in LockByte::ALL.into_iter().filter(|b| (from..=to).contains(&b.offset())) {
            found.locked = found.locked.with(byte);
            if lock.mode == LockMode::Write {
                found.write_locked = found.write_locked.with(byte);
            }
        }
        if !found.locks.contains(&lock) {
            found.locks.push(lock);
        }
        // Bytes 105 to 199 mean nothing: a range that holds none of the ten is not asked about.
        let matters = |(from, to): &(u64, u64)| LockByte::ALL.iter().any(|b| (*from..=*to).contains(&b.offset()));
        let left = (from > start).then(|| (start, from - 1)).filter(matters);
        let right = (to < end).then(|| (to + 1, end)).filter(matters);
        ranges.extend(left.into_iter().chain(right));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::Permission;
    use std::fs::File;
    use std::os::unix::fs::FileTypeExt;

    fn lock(file: &File, kind: i32, start: i64, len: i64) {
        let lock = libc::flock {
            l_type: kind as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: start,
            l_len: len,
            l_pid: 0,
        };
        fcntl(file, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
    }

    #[test]
    fn both_sides_of_a_hit_are_looked_at() {
        let image = tempfile::NamedTempFile::new().unwrap();
        // In this order, so that the first in the kernel's list is not the lowest.
        let holders: Vec<File> = [203, 101, 100, 201]
            .map(|byte| (File::open(image.path()).unwrap(), byte))
            .into_iter()
            .map(|(f, byte)| {
                lock(&f, libc::F_RDLCK, byte, 1);
                f
            })
            .collect();
        let (asker, _) = open(&image.path().canonicalize().unwrap()).unwrap();
        let found = held_bytes(&asker, Asker::Process).unwrap();
        assert_eq!(found.locked.to_string(), "cw/wr");
        assert_eq!(found.write_locked, Access::NONE);
        assert!(found.locks.iter().all(|l| l.pid == -1));
        drop(holders);
        assert_eq!(held_bytes(&asker, Asker::Process).unwrap(), BytesFound::default());
    }

    #[test]
    fn a_lock_without_end_covers_all_ten() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let holder = File::options().read(true).write(true).open(image.path()).unwrap();
        lock(&holder, libc::F_WRLCK, 0, 0);
        let (asker, _) = open(&image.path().canonicalize().unwrap()).unwrap();
        let found = held_bytes(&asker, Asker::Description).unwrap();
        assert_eq!(found.locked, LockByte::ALL.into_iter().collect());
        assert_eq!(found.write_locked, found.locked);
        assert_eq!(found.locks, [LockFound { mode: LockMode::Write, start: 0, end: None, pid: -1 }]);
        // The description that holds it is not in its own way.
        assert_eq!(held_bytes(&holder, Asker::Description).unwrap(), BytesFound::default());
        assert_eq!(held_bytes(&holder, Asker::Process).unwrap().locked, found.locked);
    }

    #[test]
    fn a_lock_between_the_two_rows_of_bytes_is_passed_over() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let holder = File::open(image.path()).unwrap();
        lock(&holder, libc::F_RDLCK, 110, 20);
        lock(&holder, libc::F_RDLCK, 202, 1);
        let (asker, _) = open(&image.path().canonicalize().unwrap()).unwrap();
        let found = held_bytes(&asker, Asker::Process).unwrap();
        assert_eq!(found.locked, Access::NONE.with(LockByte::unshare(Permission::WriteUnchanged)));
    }

    #[test]
    fn only_regular_files_and_block_devices_are_opened() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let fifo = root.join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(std::fs::metadata(&fifo).unwrap().file_type().is_fifo());
        assert_eq!(open(&fifo).unwrap_err(), OpenError::NotAnImage);
        assert_eq!(open(Path::new("/dev/null")).unwrap_err(), OpenError::NotAnImage);
        assert_eq!(open(&root).unwrap_err(), OpenError::NotAnImage);
        assert_eq!(open(&root.join("none")).unwrap_err(), OpenError::Errno(Errno::ENOENT));
        std::os::unix::fs::symlink("/dev/null", root.join("link")).unwrap();
        assert_eq!(open(&root.join("link")).unwrap_err(), OpenError::Errno(Errno::ELOOP));
    }
}
