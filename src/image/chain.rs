//! Which files does an image stand on, on this host?
//!
//! Follows the names in the headers, as QEMU would open them, to regular files and block devices only; each is opened for
//! reading, read and closed. A header is written by whoever wrote the image, so the chain has an end here even where its
//! names go round in a circle. What cannot be followed is left out: whoever judges the image then says that it cannot
//! tell.

use std::collections::HashSet;
use std::fs::File;
use std::path::{Path, PathBuf};

use super::header::{self, Header};
use crate::linux::identity::FileStatus;
use crate::linux::probe;
use crate::protocol::Family;

/// QEMU opens each file of a chain, and nobody's chain is this deep.
const DEEPEST: usize = 200;

/// A file below an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileBelow {
    /// Where it is, links resolved.
    pub path: PathBuf,
    /// How QEMU treats it there.
    pub family: Family,
}

/// The files below `image`, nearest first.
#[must_use]
pub fn files_below(image: &Path) -> Vec<FileBelow> {
    let mut files = Vec::new();
    let mut seen = HashSet::new();
    let Some(mut top) = image.canonicalize().ok() else { return files };
    let Some((status, mut header)) = read(&top) else { return files };
    seen.insert(status.id);
    while files.len() < DEEPEST {
        let below = header.backing_file.as_ref().and_then(|name| header::backing_path(&top, name));
        let Some(path) = below.and_then(|p| p.canonicalize().ok()) else { break };
        let Some((status, its_header)) = read(&path) else { break };
        if !seen.insert(status.id) {
            break;
        }
        let family = header::family_of_backing(header.backing_format.as_deref(), Some(its_header.format));
        files.push(FileBelow { path: path.clone(), family });
        if family == Family::Raw {
            // Whatever it looks like: what is opened as raw has nothing below it.
            break;
        }
        (top, header) = (path, its_header);
    }
    files
}

/// The header of a file, and which file that is.
#[must_use]
pub fn read(resolved: &Path) -> Option<(FileStatus, Header)> {
    let (file, status) = probe::open(resolved).ok()?;
    let file = File::from(file);
    let length = header::length(&file, &status);
    Some((status, header::read(&file, length).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As much of a qcow2 as names its backing file.
    fn qcow2(path: &Path, backing: &str) {
        let mut image = vec![0; 4096];
        image[..4].copy_from_slice(b"QFI\xfb");
        image[7] = 3;
        image[14..16].copy_from_slice(&1024u16.to_be_bytes());
        image[16..20].copy_from_slice(&u32::try_from(backing.len()).unwrap().to_be_bytes());
        image[1024..1024 + backing.len()].copy_from_slice(backing.as_bytes());
        std::fs::write(path, image).unwrap();
    }

    fn paths_below(image: &Path) -> Vec<PathBuf> {
        files_below(image).into_iter().map(|f| f.path).collect()
    }

    #[test]
    fn a_chain_is_followed_to_its_end_and_a_circle_only_once_round() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().canonicalize().unwrap().join(name);
        qcow2(&path("top"), "middle");
        qcow2(&path("middle"), path("base").to_str().unwrap());
        std::fs::write(path("base"), "raw").unwrap();
        assert_eq!(paths_below(&path("top")), [path("middle"), path("base")]);
        assert_eq!(files_below(&path("top"))[1].family, Family::Raw);
        qcow2(&path("base"), "top");
        assert_eq!(paths_below(&path("top")), [path("middle"), path("base")]);
        std::fs::remove_file(path("base")).unwrap();
        assert_eq!(paths_below(&path("top")), [path("middle")]);
    }

    #[test]
    fn nothing_but_files_and_block_devices_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("top");
        for name in ["/dev/zero", "/proc", "nbd://host/x", "json:{}", "missing"] {
            qcow2(&top, name);
            assert_eq!(files_below(&top), [], "{name}");
        }
        assert_eq!(files_below(Path::new("/nowhere")), []);
    }
}
