//! Which process has which file open, on which descriptor, and what does that descriptor hold?
//!
//! `/proc/PID/fdinfo/FD` is the kernel's only statement of who owns an open file description lock. A descriptor belongs
//! to a file if device and inode agree, never because of the text of its link, which may lie across mount namespaces.

use std::ffi::OsStr;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use nix::libc;
use rustix::fs::{CWD, Dir, Mode, OFlags};
use serde::{Deserialize, Serialize};

use super::identity::{FileId, FileStatus, status_at};
use super::lock_table::{LockLines, LockRecord};
use super::{ReadError, Roots};

/// How a descriptor was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OpenMode {
    /// `O_RDONLY`.
    Read,
    /// `O_WRONLY` or `O_RDWR`.
    Write,
}

/// A descriptor of a process that leads to a file somebody asked for.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct OpenDescriptor {
    /// Of which process.
    pub pid: i32,
    /// Its number there.
    pub fd: i32,
    /// The file that it leads to.
    pub file: FileId,
    /// How it was opened.
    pub mode: OpenMode,
    /// Each lock that the kernel prints behind it. POSIX locks are printed behind every descriptor of the file in the
    /// process that owns them.
    pub locks: Vec<LockRecord>,
}

/// Why the descriptors of a process could not be listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotListed {
    /// The process may not be read (ptrace(2), "Ptrace access mode checking").
    Hidden,
    /// It ended.
    Gone,
    /// There was no descriptor or memory left to read it with.
    Exhausted,
}

impl From<rustix::io::Errno> for NotListed {
    fn from(errno: rustix::io::Errno) -> Self {
        match errno {
            rustix::io::Errno::NOENT | rustix::io::Errno::SRCH => Self::Gone,
            rustix::io::Errno::MFILE | rustix::io::Errno::NFILE | rustix::io::Errno::NOMEM => Self::Exhausted,
            _ => Self::Hidden,
        }
    }
}

/// A process directory, and a number that changes when another process takes the pid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ProcessEntry {
    /// The pid.
    pub pid: i32,
    /// The inode number of `/proc/PID`. The kernel makes a new one for a new process (`proc_pid_make_inode`), and may
    /// make a new one for the same process: a change is a reason to look, sameness costs nothing to learn.
    pub entry_inode: u64,
}

/// Every process that can be seen.
///
/// # Errors
/// When `/proc` cannot be listed.
pub fn processes(roots: &Roots) -> Result<Vec<ProcessEntry>, ReadError> {
    let error = |e: rustix::io::Errno| ReadError::new(&roots.proc, e);
    let fd = rustix::fs::openat(CWD, &roots.proc, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).map_err(error)?;
    let mut found = Vec::new();
    for entry in Dir::new(fd).map_err(error)? {
        let entry = entry.map_err(error)?;
        if let Some(pid) = entry.file_name().to_str().ok().and_then(|n| n.parse().ok()) {
            found.push(ProcessEntry { pid, entry_inode: entry.ino() });
        }
    }
    Ok(found)
}

/// A text that is another one once a process or thread has started or ended: the number of all threads and the pid that
/// was given last (`/proc/loadavg`, proc_loadavg(5)). `None` where it cannot be had, and in a recorded tree.
#[must_use]
pub fn population(roots: &Roots) -> Option<String> {
    let text = std::fs::read_to_string(roots.proc.join("loadavg")).ok().filter(|_| roots.is_host())?;
    let mut words = text.split_ascii_whitespace().skip(3);
    let (_, threads) = words.next()?.split_once('/')?;
    Some(format!("{threads} {}", words.next()?))
}

/// The number of descriptors that a process has open (Linux 6.2: the size of `/proc/PID/fd`; 0 on older kernels).
#[must_use]
pub fn count(roots: &Roots, pid: i32) -> Option<u64> {
    super::identity::status(&fd_directory(roots, pid)).ok().map(|s| s.size)
}

fn fd_directory(roots: &Roots, pid: i32) -> PathBuf {
    roots.proc.join(format!("{pid}/fd"))
}

/// Each descriptor of `pid` that leads to a regular file or block device for which `wanted` is true.
///
/// # Errors
/// When the process ended or may not be read.
pub fn of_process(
    roots: &Roots,
    pid: i32,
    wanted: &dyn Fn(&FileStatus) -> bool,
) -> Result<Vec<OpenDescriptor>, NotListed> {
    let path = fd_directory(roots, pid);
    let fd = rustix::fs::openat(CWD, &path, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let mut found = Vec::new();
    let mut directory = Dir::new(fd)?;
    let mut denied = false;
    while let Some(entry) = directory.next() {
        super::lanes::still_going();
        let entry = entry?;
        let Some(number) = entry.file_name().to_str().ok().and_then(|n| n.parse().ok()) else { continue };
        match directory.fd().and_then(|d| status_at(d, entry.file_name())) {
            Ok(status) if status.kind.can_be_image() && wanted(&status) => {
                found.extend(describe(roots, pid, number, status.id)?);
            }
            Ok(_) => {}
            // The directory of another user's process may be listed while its links may not be followed.
            Err(rustix::io::Errno::ACCESS | rustix::io::Errno::PERM) => denied = true,
            Err(_) => {}
        }
    }
    if denied && found.is_empty() { Err(NotListed::Hidden) } else { Ok(found) }
}

/// The path that a deleted file had when it was opened, as the kernel tells it: for show only. `None` for a file that
/// still has a name.
#[must_use]
pub fn deleted_path(roots: &Roots, pid: i32, fd: i32) -> Option<PathBuf> {
    let link = std::fs::read_link(roots.proc.join(format!("{pid}/fd/{fd}"))).ok()?;
    let path = link.as_os_str().as_bytes().strip_suffix(b" (deleted)")?;
    Some(PathBuf::from(OsStr::from_bytes(path)))
}

/// Looks at one descriptor for the first time: `None` when it is closed, or leads to no file for which `wanted` is true.
///
/// # Errors
/// As for [`of_process`].
pub fn of_one(
    roots: &Roots,
    pid: i32,
    fd: i32,
    wanted: &dyn Fn(&FileStatus) -> bool,
) -> Result<Option<OpenDescriptor>, NotListed> {
    match super::identity::status(&roots.proc.join(format!("{pid}/fd/{fd}"))) {
        Ok(status) if status.kind.can_be_image() && wanted(&status) => describe(roots, pid, fd, status.id),
        Ok(_) => Ok(None),
        Err(errno) => match NotListed::from(errno) {
            NotListed::Gone => Ok(None),
            why => Err(why),
        },
    }
}

/// Whether the descriptors of a process may be looked at, by one that nearly every process has. `None` where it has not.
#[must_use]
pub fn may_be_read(roots: &Roots, pid: i32) -> Option<bool> {
    match super::identity::status(&roots.proc.join(format!("{pid}/fd/0"))) {
        Ok(_) => Some(true),
        Err(errno) => match NotListed::from(errno) {
            NotListed::Hidden => Some(false),
            NotListed::Gone | NotListed::Exhausted => None,
        },
    }
}

/// Looks again at one descriptor: `None` when it is closed or leads to another file now.
///
/// # Errors
/// [`NotListed::Exhausted`] when there is no descriptor or memory left to look with.
pub fn again(roots: &Roots, pid: i32, fd: i32, file: FileId) -> Result<Option<OpenDescriptor>, NotListed> {
    // The file is checked after the locks are read: a check before would add nothing.
    describe(roots, pid, fd, file)
}

/// Reads what stands behind a descriptor that leads to `file`; `None` if it leads elsewhere by the time that is read, so
/// that the locks of one file are never taken for those of another.
fn describe(roots: &Roots, pid: i32, fd: i32, file: FileId) -> Result<Option<OpenDescriptor>, NotListed> {
    let mut text = Vec::with_capacity(512);
    let path = roots.proc.join(format!("{pid}/fdinfo/{fd}"));
    if let Err(error) = std::fs::File::open(path).and_then(|mut f| f.read_to_end(&mut text)) {
        // Anything else means that it is closed by now.
        let why = rustix::io::Errno::from_io_error(&error).map(NotListed::from);
        return if why == Some(NotListed::Exhausted) { Err(NotListed::Exhausted) } else { Ok(None) };
    }
    let info = Fdinfo::parse(&String::from_utf8_lossy(&text));
    let Some(mode) = info.mode() else { return Ok(None) };
    let after = super::identity::status(&roots.proc.join(format!("{pid}/fd/{fd}")));
    let same = after.is_ok_and(|after| after.id == file);
    Ok(same.then_some(OpenDescriptor { pid, fd, file, mode, locks: info.locks.records }))
}

/// The lines of a `/proc/PID/fdinfo/FD` that this program uses (proc_pid_fdinfo(5)).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fdinfo {
    /// Status flags and access mode of open(2).
    pub flags: Option<i32>,
    /// The lines behind `lock:`.
    pub locks: LockLines,
}

impl Fdinfo {
    /// Reads the text of such a file.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let mut info = Self::default();
        for line in text.lines() {
            match line.split_once(':') {
                Some(("flags", value)) => info.flags = i32::from_str_radix(value.trim(), 8).ok(),
                Some(("lock", value)) => info.locks.push(value),
                _ => {}
            }
        }
        info
    }

    /// How the descriptor was opened; `None` for `O_PATH`, which can neither read nor lock, and when the flags are
    /// missing and nothing is held, because the descriptor was closed while the file was read.
    fn mode(&self) -> Option<OpenMode> {
        match self.flags {
            Some(flags) if flags & libc::O_PATH != 0 => None,
            Some(flags) if flags & libc::O_ACCMODE == libc::O_RDONLY => Some(OpenMode::Read),
            Some(_) => Some(OpenMode::Write),
            None => (!self.locks.records.is_empty()).then_some(OpenMode::Read),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fs::File;

    #[test]
    fn fdinfo_with_locks_is_read() {
        let info = Fdinfo::parse(
            "pos:\t0\nflags:\t02100002\nmnt_id:\t24\nino:\t10420357\n\
             lock:\t1: OFDLCK ADVISORY  READ -1 fe:00:10420357 100 101\n\
             lock:\t2: OFDLCK ADVISORY  READ -1 fe:00:10420357 103 103\nlock:\tgarbage\n",
        );
        assert_eq!(info.mode(), Some(OpenMode::Write));
        assert_eq!((info.locks.records.len(), info.locks.bad_lines), (2, 1));
        assert_eq!(Fdinfo::parse("flags:\t0100000\n").mode(), Some(OpenMode::Read));
        assert_eq!(Fdinfo::parse("flags:\t012000000\n").mode(), None);
        assert_eq!(Fdinfo::parse("").mode(), None);
    }

    #[test]
    fn our_own_descriptor_is_found_by_identity() {
        let roots = Roots::host();
        let file = tempfile::NamedTempFile::new().unwrap();
        let id = super::super::identity::status(file.path()).unwrap().id;
        let second = File::open(file.path()).unwrap();
        let pid = i32::try_from(std::process::id()).unwrap();
        let found = of_process(&roots, pid, &|f| f.id == id).unwrap();
        let mut modes: Vec<OpenMode> = found.iter().map(|d| d.mode).collect();
        modes.sort_by_key(|m| *m == OpenMode::Write);
        assert_eq!(modes, [OpenMode::Read, OpenMode::Write]);
        let known = found.iter().find(|d| d.mode == OpenMode::Read).unwrap();
        assert_eq!(again(&roots, pid, known.fd, id).unwrap().as_ref(), Some(known));
        drop(second);
        assert_eq!(again(&roots, pid, known.fd, FileId::default()), Ok(None));
        assert!(processes(&roots).unwrap().iter().any(|p| p.pid == pid));
    }

    #[test]
    fn a_process_that_ended_is_gone_and_not_hidden() {
        assert_eq!(of_process(&Roots::host(), i32::MAX, &|_| true), Err(NotListed::Gone));
    }

    proptest! {
        #[test]
        fn no_fdinfo_makes_it_panic(text in "\\PC{0,200}|(flags:\t[0-9]{0,30}\n|lock:\t[ -~]{0,60}\n){0,5}") {
            let _ = Fdinfo::parse(&text).mode();
        }
    }
}
