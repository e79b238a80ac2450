//! Which files does an image stand on, on this host?
//!
//! Follows the names in the headers, as QEMU would open them, to regular files and block devices only; each is opened for
//! reading, read and closed. A relative name stands beside the image as it was named, not beside what a link leads to
//! (`bdrv_get_full_backing_filename` in block.c). A header is written by whoever wrote the image, so the chain has an end
//! here even where its names go round in a circle. What cannot be followed is told.

use std::collections::HashSet;
use std::fs::File;
use std::path::{Path, PathBuf};

use super::header::{self, Header};
use crate::linux::identity::FileStatus;
use crate::linux::lanes::still_going;
use crate::linux::probe;
use crate::protocol::Family;
use crate::text::{escape, escape_path};

/// QEMU opens each file of a chain, and nobody's chain is this deep.
const DEEPEST: usize = 200;

/// A file below an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileBelow {
    /// Where it is, as QEMU would name it.
    pub path: PathBuf,
    /// How QEMU treats it there.
    pub family: Family,
}

/// The files below an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Below {
    /// Nearest first.
    pub files: Vec<FileBelow>,
    /// Why there may be more than these, in words.
    pub cut_off: Option<String>,
}

/// Follows the chain below `image`.
#[must_use]
pub fn below(image: &Path) -> Below {
    let mut files = Vec::new();
    let cut_off = follow(image, &mut files).err();
    Below { files, cut_off }
}

fn follow(image: &Path, files: &mut Vec<FileBelow>) -> Result<(), String> {
    let unreadable = |path: &Path| format!("{} cannot be read", escape_path(path));
    let mut seen = HashSet::new();
    let mut top = image.to_owned();
    let (status, mut header) = read(&top).ok_or_else(|| unreadable(&top))?;
    seen.insert(status.id);
    loop {
        still_going();
        if header.data_elsewhere {
            return Err(format!("{} keeps its data in another file, which is not followed", escape_path(&top)));
        }
        let Some(name) = &header.backing_file else { return Ok(()) };
        if files.len() == DEEPEST {
            return Err(format!("the chain goes on below {DEEPEST} files"));
        }
        let path = header::backing_path(&top, name)
            .ok_or_else(|| format!("the backing file {} is no path: it is not followed", escape(name)))?;
        let (status, its_header) = read(&path).ok_or_else(|| unreadable(&path))?;
        if !seen.insert(status.id) {
            return Err(format!("{} is in the chain already: it goes round in a circle", escape_path(&path)));
        }
        let family = header::family_of_backing(header.backing_format.as_deref(), Some(its_header.format));
        files.push(FileBelow { path: path.clone(), family });
        if family == Family::Raw {
            // Whatever it looks like: what is opened as raw has nothing below it.
            return Ok(());
        }
        (top, header) = (path, its_header);
    }
}

/// The header of a file, and which file that is.
#[must_use]
pub fn read(path: &Path) -> Option<(FileStatus, Header)> {
    let (file, status) = probe::open_if_image(&path.canonicalize().ok()?).ok()?;
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
        below(image).files.into_iter().map(|f| f.path).collect()
    }

    #[test]
    fn a_chain_is_followed_to_its_end_and_a_circle_only_once_round() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().canonicalize().unwrap().join(name);
        qcow2(&path("top"), "middle");
        qcow2(&path("middle"), path("base").to_str().unwrap());
        std::fs::write(path("base"), "raw").unwrap();
        assert_eq!(paths_below(&path("top")), [path("middle"), path("base")]);
        let whole = below(&path("top"));
        assert_eq!((whole.files[1].family, whole.cut_off), (Family::Raw, None));
        qcow2(&path("base"), "top");
        assert_eq!(paths_below(&path("top")), [path("middle"), path("base")]);
        assert!(below(&path("top")).cut_off.unwrap().contains("circle"));
        std::fs::remove_file(path("base")).unwrap();
        assert_eq!(paths_below(&path("top")), [path("middle")]);
    }

    #[test]
    fn a_relative_name_stands_beside_the_name_that_was_used() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().canonicalize().unwrap().join(name);
        for directory in ["A", "B"] {
            std::fs::create_dir(path(directory)).unwrap();
            std::fs::write(path(directory).join("base"), "raw").unwrap();
        }
        qcow2(&path("B/top"), "base");
        std::os::unix::fs::symlink("../B/top", path("A/link")).unwrap();
        assert_eq!(paths_below(&path("A/link")), [path("A/base")]);
        assert_eq!(paths_below(&path("B/top")), [path("B/base")]);
    }

    #[test]
    fn nothing_but_files_and_block_devices_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("top");
        for name in ["/dev/zero", "/proc", "nbd://host/x", "json:{}", "missing"] {
            qcow2(&top, name);
            let found = below(&top);
            assert!(found.files.is_empty() && found.cut_off.is_some(), "{name}");
        }
        assert!(below(Path::new("/nowhere")).cut_off.unwrap().contains("/nowhere cannot be read"));
    }
}
