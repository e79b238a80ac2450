//! A path was named inside a container: which file is that, and where is it on this host?
//!
//! Each other mount namespace is looked into through `/proc/PID/root`, without following a link out of it
//! (`RESOLVE_IN_ROOT`, openat2(2)), and without opening the file (`O_PATH`). The same file is then found here by the mount
//! that it lies on, and believed only if device and inode agree.

use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use procfs::process::MountInfo;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};

use super::descriptors::processes;
use super::identity::{FileId, FileStatus, status, status_of};
use super::mounts::unescape;
use super::{ReadError, Roots};

/// A file that another mount namespace has under the path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundInside {
    /// A process of that namespace.
    pub pid: i32,
    /// Which file.
    pub file: FileId,
    /// A path that leads to the same file here, if there is one.
    pub here: Option<PathBuf>,
}

/// What was found, and how far the search came.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Search {
    /// Each different file, once.
    pub found: Vec<FoundInside>,
    /// How many other mount namespaces were looked into.
    pub looked_into: usize,
    /// How many processes would not say in which one they are.
    pub hidden: usize,
}

struct Place {
    id: u64,
    device: String,
    root: PathBuf,
    point: PathBuf,
}

/// Looks for the image at the absolute `path` in every mount namespace but our own.
///
/// # Errors
/// When `/proc` cannot be listed.
pub fn find(roots: &Roots, path: &Path) -> Result<Search, ReadError> {
    let mut search = Search::default();
    let mut seen: HashSet<PathBuf> = std::fs::read_link(roots.proc.join("self/ns/mnt")).into_iter().collect();
    let ours = places(&roots.proc.join("self/mountinfo"));
    for entry in processes(roots)? {
        let process = roots.proc.join(entry.pid.to_string());
        match std::fs::read_link(process.join("ns/mnt")) {
            Ok(namespace) if !seen.contains(&namespace) => drop(seen.insert(namespace)),
            Ok(_) => continue,
            Err(e) => {
                search.hidden += usize::from(e.kind() == std::io::ErrorKind::PermissionDenied);
                continue;
            }
        }
        search.looked_into += 1;
        let Some((fd, status)) = look_inside(&process.join("root"), path) else { continue };
        if !search.found.iter().any(|f| f.file == status.id) {
            let here = here(roots, &process, &fd, &status, &ours);
            search.found.push(FoundInside { pid: entry.pid, file: status.id, here });
        }
    }
    Ok(search)
}

fn look_inside(root: &Path, path: &Path) -> Option<(OwnedFd, FileStatus)> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let root = rustix::fs::openat(CWD, root, flags | OFlags::DIRECTORY, Mode::empty()).ok()?;
    let inside = path.strip_prefix("/").ok()?;
    let fd = rustix::fs::openat2(&root, inside, flags, Mode::empty(), ResolveFlags::IN_ROOT).ok()?;
    let status = status_of(&fd).ok()?;
    status.kind.can_be_image().then_some((fd, status))
}

/// The path here of a file of another namespace: by the mount that it lies on there, and a mount here of the same file
/// system that shows that part of it.
fn here(roots: &Roots, process: &Path, fd: &OwnedFd, status: &FileStatus, ours: &[Place]) -> Option<PathBuf> {
    let inside = std::fs::read_link(roots.proc.join(format!("self/fd/{}", fd.as_raw_fd()))).ok()?;
    let theirs = places(&process.join("mountinfo"));
    let mount = theirs.iter().find(|p| Some(p.id) == status.mount)?;
    let on_it = inside.strip_prefix(&mount.point).ok()?;
    let in_filesystem = if on_it.as_os_str().is_empty() { mount.root.clone() } else { mount.root.join(on_it) };
    let candidate = |ours: &Place| {
        let below = in_filesystem.strip_prefix(&ours.root).ok()?;
        let path = if below.as_os_str().is_empty() { ours.point.clone() } else { ours.point.join(below) };
        self::status(&path).is_ok_and(|s| s.id == status.id).then_some(path)
    };
    ours.iter().filter(|p| p.device == mount.device).find_map(candidate)
}

fn places(mountinfo: &Path) -> Vec<Place> {
    let mut text = Vec::new();
    if File::open(mountinfo).and_then(|mut f| f.read_to_end(&mut text)).is_err() {
        return Vec::new();
    }
    let place = |line: &str| {
        let info = MountInfo::from_line(line).ok()?;
        Some(Place {
            id: u64::try_from(info.mnt_id).ok()?,
            device: info.majmin,
            root: unescape(&info.root).into(),
            point: unescape(&info.mount_point.to_string_lossy()).into(),
        })
    };
    String::from_utf8_lossy(&text).lines().filter_map(place).collect()
}
