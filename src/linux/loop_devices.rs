//! Which loop devices stand on which files?
//!
//! A loop device keeps the description it was given, locks included, after the program that set it up has ended: then no
//! process holds them. Read from sysfs, so that no device node is opened. The path in sysfs is that of the mount namespace
//! in which the device was set up; it counts only if it leads to the same file here, which the caller asks.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Roots;

/// A loop device in use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoopDevice {
    /// Such as `loop3`.
    pub name: String,
    /// The file under it, as sysfs names it.
    pub backing_path: PathBuf,
}

impl LoopDevice {
    /// Device and path together: either may come to stand for something else.
    #[must_use]
    pub fn key(&self) -> (String, PathBuf) {
        (self.name.clone(), self.backing_path.clone())
    }
}

/// Every loop device that has a file under it.
#[must_use]
pub fn read(roots: &Roots) -> Vec<LoopDevice> {
    let Ok(entries) = std::fs::read_dir(roots.sys.join("block")) else { return Vec::new() };
    let device = |entry: std::fs::DirEntry| {
        let name = entry.file_name().into_string().ok().filter(|n| n.starts_with("loop"))?;
        let mut path = std::fs::read(entry.path().join("loop/backing_file")).ok()?;
        if path.last() == Some(&b'\n') {
            path.pop();
        }
        Some(LoopDevice { name, backing_path: PathBuf::from(OsString::from_vec(path)) })
    };
    let mut devices: Vec<LoopDevice> = entries.flatten().filter_map(device).collect();
    devices.sort_by(|a, b| a.name.cmp(&b.name));
    devices
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recorded_tree_is_read_and_idle_devices_are_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("disk.raw");
        std::fs::write(&image, "x").unwrap();
        for (name, backing) in [("loop0", Some(image.as_path())), ("loop1", None), ("vda", None)] {
            let block = dir.path().join("sys/block").join(name);
            std::fs::create_dir_all(block.join("loop")).unwrap();
            if let Some(backing) = backing {
                std::fs::write(block.join("loop/backing_file"), format!("{}\n", backing.display())).unwrap();
            }
        }
        let roots = Roots::recorded(&dir.path().join("proc"));
        let devices = read(&roots);
        assert_eq!(devices.len(), 1);
        assert_eq!(devices[0].name, "loop0");
        assert_eq!(devices[0].backing_path, image);
    }
}
