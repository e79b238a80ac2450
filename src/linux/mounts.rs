//! On which file system does an image lie, and could somebody on another host lock it?
//!
//! Read from `/proc/self/mountinfo`, a line at a time with procfs, so that one odd line costs only itself.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use procfs::process::MountInfo;
use serde::{Deserialize, Serialize};

use super::identity::{Device, FileStatus};
use super::{ReadError, Roots};

/// Where the locks of a file system are decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reach {
    /// In this kernel: every holder is a process here.
    Local,
    /// On a file server or among cluster nodes: holders may be on other hosts.
    Remote,
    /// In a FUSE server: it may keep locks to itself, so that no holder shows here.
    Fuse,
}

/// A mounted file system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Such as `ext4` or `nfs4`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Such as `/dev/vda1` or `filer:/vol`.
    pub source: String,
    /// Where it is mounted.
    pub point: PathBuf,
    /// Which directory of the file system that shows.
    pub root: PathBuf,
    /// Mount options and those of the superblock, as in mountinfo.
    pub options: Vec<String>,
    /// The device that `/proc/locks` prints for its files; on btrfs and overlayfs not what `statx` says.
    pub lock_device: Device,
    /// Who may hold locks on it.
    pub reach: Reach,
}

/// The file systems that this process can see, kept current.
#[derive(Debug)]
pub struct Mounts {
    by_id: HashMap<u64, Arc<Mount>>,
    /// Open, because the kernel tells through it when a mount changes.
    table: File,
}

const REMOTE: [&str; 17] = [
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "ceph",
    "9p",
    "afs",
    "coda",
    "gfs2",
    "ocfs2",
    "lustre",
    "gpfs",
    "beegfs",
    "orangefs",
    "pvfs2",
    "glusterfs",
];

fn reach(kind: &str) -> Reach {
    match kind {
        _ if REMOTE.contains(&kind) => Reach::Remote,
        // virtiofs speaks FUSE to the host of this guest.
        "virtiofs" | "fuse" | "fuseblk" => Reach::Fuse,
        _ if kind.starts_with("fuse.") => Reach::Fuse,
        _ => Reach::Local,
    }
}

impl Mounts {
    /// Reads the mounts of this process.
    ///
    /// # Errors
    /// When mountinfo cannot be read.
    pub fn read(roots: &Roots) -> Result<Self, ReadError> {
        let path = roots.proc.join("self/mountinfo");
        let mut table = File::open(&path).map_err(|e| ReadError::new(&path, e))?;
        let by_id = read_all(&mut table).map_err(|e| ReadError::new(&path, e))?;
        Ok(Self { by_id, table })
    }

    /// Reads again if something was mounted or unmounted since: a mount id may be used again, so that a stale table would
    /// name the wrong file system (proc_pid_mountinfo(5): a change shows as `POLLPRI`).
    ///
    /// # Errors
    /// When mountinfo cannot be read any more.
    pub fn refresh(&mut self) -> io::Result<()> {
        let mut fds = [PollFd::new(self.table.as_fd(), PollFlags::POLLPRI)];
        poll(&mut fds, PollTimeout::ZERO)?;
        let changed = fds[0].revents().is_some_and(|r| r.intersects(PollFlags::POLLPRI | PollFlags::POLLERR));
        if changed {
            self.table.rewind()?;
            self.by_id = read_all(&mut self.table)?;
        }
        Ok(())
    }

    /// The mount that a file was reached through: by its mount id, or on kernels older than 5.8 by the longest mount
    /// point that `path` starts with.
    #[must_use]
    pub fn of(&self, path: &Path, status: &FileStatus) -> Option<&Arc<Mount>> {
        match status.mount {
            Some(id) => self.by_id.get(&id),
            None => self.above(path).and_then(|(id, _)| self.by_id.get(&id)),
        }
    }

    /// The mount that a path without links lies on, by its text: nothing is asked of the file system. Of several mounts
    /// on one directory the youngest is seen, which most often has the greatest id.
    #[must_use]
    pub fn above(&self, path: &Path) -> Option<(u64, &Mount)> {
        let above = self.by_id.iter().filter(|(_, m)| path.starts_with(&m.point));
        above.max_by_key(|(id, m)| (m.point.as_os_str().len(), **id)).map(|(id, m)| (*id, &**m))
    }

    /// Whether there is a mount of this id.
    #[must_use]
    pub fn has(&self, id: u64) -> bool {
        self.by_id.contains_key(&id)
    }

    /// A file system on this device, such as `/dev/loop3`, or on one of its partitions.
    #[must_use]
    pub fn from_source(&self, source: &str) -> Option<&Arc<Mount>> {
        let is_partition = |rest: &str| {
            let number = rest.strip_prefix('p').unwrap_or(rest);
            !number.is_empty()
                && number.bytes().all(|b| b.is_ascii_digit())
                && (rest != number || !source.ends_with(|c: char| c.is_ascii_digit()))
        };
        self.by_id
            .values()
            .find(|m| m.source.strip_prefix(source).is_some_and(|rest| rest.is_empty() || is_partition(rest)))
    }

    /// A file system on the block device of this number, or of this name where it has a number of its own (btrfs).
    #[must_use]
    pub fn on_device(&self, device: Device, path: &Path) -> Option<&Arc<Mount>> {
        let by_number = self.by_id.values().find(|m| m.lock_device == device);
        by_number.or_else(|| self.from_source(path.to_str()?))
    }

    /// The mount at exactly this directory.
    #[must_use]
    pub fn at(&self, point: &Path) -> Option<&Arc<Mount>> {
        self.by_id.values().find(|m| m.point == point)
    }
}

fn read_all(table: &mut File) -> io::Result<HashMap<u64, Arc<Mount>>> {
    let mut text = Vec::new();
    table.read_to_end(&mut text)?;
    Ok(String::from_utf8_lossy(&text).lines().filter_map(parse_line).collect())
}

fn parse_line(line: &str) -> Option<(u64, Arc<Mount>)> {
    let info = MountInfo::from_line(line).ok()?;
    let option = |(name, value): (&String, &Option<String>)| match value {
        Some(value) => format!("{name}={value}"),
        None => name.clone(),
    };
    let mut options: Vec<String> = info.mount_options.iter().chain(&info.super_options).map(option).collect();
    options.sort();
    options.dedup();
    let mount = Mount {
        reach: reach(&info.fs_type),
        kind: info.fs_type,
        source: unescape(&info.mount_source.unwrap_or_default()),
        point: PathBuf::from(unescape(&info.mount_point.to_string_lossy())),
        options,
        root: PathBuf::from(unescape(&info.root)),
        lock_device: Device::parse(&info.majmin)?,
    };
    Some((u64::try_from(info.mnt_id).ok()?, Arc::new(mount)))
}

/// Undoes the octal escapes of mountinfo (`\040` for a space).
pub(super) fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let code = rest.get(at + 1..at + 4).and_then(|d| u8::from_str_radix(d, 8).ok()).filter(u8::is_ascii);
        match code {
            Some(byte) => out.push(char::from(byte)),
            None => out.push('\\'),
        }
        rest = &rest[at + if code.is_some() { 4 } else { 1 }..];
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linux::identity;

    #[test]
    fn local_remote_and_fuse_are_told_apart() {
        let table = "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue\n\
             not a mount\n\
             40 35 0:52 / /srv/with\\040space rw,relatime shared:9 - nfs4 filer:/vol rw,vers=4.2,local_lock=none\n\
             41 35 0:53 / /gl rw - fuse.glusterfs host:/v rw,user_id=0\n";
        let by_id: HashMap<u64, Arc<Mount>> = table.lines().filter_map(parse_line).collect();
        assert_eq!(by_id.len(), 3);
        assert_eq!(by_id[&36].reach, Reach::Local);
        assert_eq!(by_id[&36].lock_device, Device { major: 98, minor: 0 });
        let nfs = &by_id[&40];
        assert_eq!((nfs.reach, nfs.point.as_path()), (Reach::Remote, Path::new("/srv/with space")));
        assert!(nfs.options.contains(&"local_lock=none".to_owned()));
        assert_eq!(by_id[&41].reach, Reach::Fuse);
    }

    #[test]
    fn a_file_of_ours_is_found_on_its_mount() {
        let mut mounts = Mounts::read(&Roots::host()).unwrap();
        mounts.refresh().unwrap();
        let path = std::env::current_exe().unwrap();
        let status = identity::status(&path).unwrap();
        let by_id = mounts.of(&path, &status).unwrap();
        let by_path = mounts.of(&path, &FileStatus { mount: None, ..status }).unwrap();
        assert_eq!(by_id.point, by_path.point);
    }

    #[test]
    fn escapes_are_undone_and_odd_ones_kept() {
        assert_eq!(unescape(r"a\040b\011c\134d"), "a b\tc\\d");
        assert_eq!(unescape(r"a\04"), r"a\04");
        assert_eq!(unescape("a\\é"), "a\\é");
    }
}
