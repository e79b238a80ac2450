//! Which process has a file mapped into its memory?
//!
//! A mapping keeps the open file description that it was made from, and with it the locks, when every descriptor has been
//! closed. `/proc/PID/maps` names device and inode of each (proc_pid_maps(5)); the device is that of the superblock.

use std::collections::HashSet;

use super::Roots;
use super::identity::{Device, FileId};

/// The files of `wanted` that `pid` has mapped. Of a process that may not be read, none.
#[must_use]
pub fn of_process(roots: &Roots, pid: i32, wanted: &HashSet<FileId>) -> Vec<FileId> {
    let text = std::fs::read(roots.proc.join(format!("{pid}/maps"))).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let mut found: Vec<FileId> = text.lines().filter_map(parse_line).filter(|f| wanted.contains(f)).collect();
    found.sort_unstable();
    found.dedup();
    found
}

/// `address perms offset device inode path`, the device in hexadecimal.
fn parse_line(line: &str) -> Option<FileId> {
    let mut fields = line.split_ascii_whitespace().skip(3);
    let (major, minor) = fields.next()?.split_once(':')?;
    let device = Device { major: u32::from_str_radix(major, 16).ok()?, minor: u32::from_str_radix(minor, 16).ok()? };
    Some(FileId { device, inode: fields.next()?.parse().ok().filter(|inode| *inode > 0)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_files_are_read_and_others_are_none() {
        let file = parse_line("7f1c2a000000-7f1c2a021000 r--p 00000000 fe:1a 10420357   /images/a b.raw");
        assert_eq!(file, Some(FileId { device: Device { major: 0xfe, minor: 0x1a }, inode: 10_420_357 }));
        for line in ["7ffd1000-7ffd2000 rw-p 00000000 00:00 0 [stack]", "", "a b c d e", "7f-8f r--p 0 fe:1a"] {
            assert_eq!(parse_line(line), None, "{line}");
        }
    }

    #[test]
    fn our_own_program_is_mapped() {
        let program = super::super::identity::status(&std::env::current_exe().unwrap()).unwrap().id;
        let pid = i32::try_from(std::process::id()).unwrap();
        // On overlay file systems the table has another device.
        let text = std::fs::read_to_string("/proc/self/maps").unwrap();
        if text.lines().filter_map(parse_line).any(|f| f == program) {
            assert_eq!(of_process(&Roots::host(), pid, &HashSet::from([program])), [program]);
        }
        assert!(of_process(&Roots::host(), i32::MAX, &HashSet::from([program])).is_empty());
    }
}
