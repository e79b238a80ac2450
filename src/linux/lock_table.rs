//! Which locks does the kernel list, in `/proc/locks` and behind each descriptor?
//!
//! One parser for both: `/proc/PID/fdinfo/FD` prints the same line behind `lock:` (`lock_get_status` in fs/locks.c).
//! `/proc/locks` is no snapshot: a read gives at most one page and the list may shift between reads, so that a row may be
//! missing. It is a hint that something changed and never a proof that a byte is free. Asks only the file it is given.

use std::io::{self, Read};

use serde::{Deserialize, Serialize};

use super::identity::{Device, FileId};
use super::{ReadError, Roots};

/// What kind of lock a line is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LockKind {
    /// Open file description lock (`F_OFD_SETLK`), the kind that QEMU takes.
    Ofd,
    /// Process lock (`F_SETLK`); conflicts with OFD locks of others.
    Posix,
    /// `flock(2)`: independent of the other two.
    Flock,
    /// Lease or delegation.
    Lease,
    /// Something that a newer kernel prints.
    Other,
}

/// Read or write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LockMode {
    /// Shared with other readers.
    Read,
    /// Exclusive.
    Write,
    /// A lease being broken, or a word of a newer kernel.
    Other,
}

/// One line: a lock that is held, or one that waits.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LockRecord {
    /// Of what kind.
    pub kind: LockKind,
    /// Read or write.
    pub mode: LockMode,
    /// The pid that the kernel prints: -1 for every OFD lock, 0 for an owner outside this pid namespace.
    pub pid: i64,
    /// Device of the superblock and inode. On btrfs and overlayfs this is not what `statx` says. `None` for `<none>`.
    pub file: Option<FileId>,
    /// First byte.
    pub start: u64,
    /// Last byte, inclusive; `None` for `EOF`, without end.
    pub end: Option<u64>,
    /// A request that waits (`->`): its owner holds nothing.
    pub waiting: bool,
}

impl LockRecord {
    /// Whether GETLK counts it: held and not waited for, and neither flock nor lease.
    #[must_use]
    pub fn counts(&self) -> bool {
        !self.waiting && matches!(self.kind, LockKind::Ofd | LockKind::Posix)
    }

    /// Whether `offset` lies in the range.
    #[must_use]
    pub fn covers(&self, offset: u64) -> bool {
        self.start <= offset && self.end.is_none_or(|end| offset <= end)
    }
}

/// All lines of one file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LockLines {
    /// What could be read, in the order of the lines.
    pub records: Vec<LockRecord>,
    /// Lines that could not: counted, never fatal.
    pub bad_lines: u32,
}

/// Reads one line, with or without its number in front.
#[must_use]
pub fn parse_line(line: &str) -> Option<LockRecord> {
    let mut words = line.split_ascii_whitespace().peekable();
    words.next_if(|w| w.strip_suffix(':').is_some_and(|n| n.parse::<i64>().is_ok()));
    let waiting = words.next_if_eq(&"->").is_some();
    let kind = match words.next()? {
        "OFDLCK" => LockKind::Ofd,
        "POSIX" => LockKind::Posix,
        "FLOCK" => LockKind::Flock,
        "LEASE" | "DELEG" => LockKind::Lease,
        _ => LockKind::Other,
    };
    // ADVISORY, MANDATORY, *NOINODE*, ACTIVE, BREAKING, BREAKER ..: no difference here.
    words.next()?;
    let mode = match words.next()? {
        "READ" => LockMode::Read,
        "WRITE" => LockMode::Write,
        _ => LockMode::Other,
    };
    let pid = words.next()?.parse().ok()?;
    let file = parse_file(words.next()?)?;
    let start = words.next()?.parse().ok()?;
    let end = match words.next()? {
        "EOF" => None,
        last => Some(last.parse().ok().filter(|end| *end >= start)?),
    };
    words.next().is_none().then_some(LockRecord { kind, mode, pid, file, start, end, waiting })
}

/// `fe:00:10420357` (device in hexadecimal, inode in decimal) or `<none>:0`.
fn parse_file(word: &str) -> Option<Option<FileId>> {
    if word.starts_with("<none>") {
        return Some(None);
    }
    let mut parts = word.split(':');
    let major = u32::from_str_radix(parts.next()?, 16).ok()?;
    let minor = u32::from_str_radix(parts.next()?, 16).ok()?;
    let inode = parts.next()?.parse().ok()?;
    parts.next().is_none().then_some(Some(FileId { device: Device { major, minor }, inode }))
}

/// Reads the text of `/proc/locks`.
#[must_use]
pub fn parse_table(text: &str) -> LockLines {
    let mut lines = LockLines::default();
    text.lines().filter(|l| !l.trim().is_empty()).for_each(|line| lines.push(line));
    lines
}

impl LockLines {
    pub(super) fn push(&mut self, line: &str) {
        match parse_line(line) {
            Some(record) => self.records.push(record),
            None => self.bad_lines += 1,
        }
    }
}

/// Replaces `text` by what `source` says, and tells whether that is anything else. Compared while it is read: it may be
/// long, and one copy of it is enough.
fn read_into(mut source: impl Read, text: &mut Vec<u8>) -> io::Result<bool> {
    // The kernel gives a page at once.
    let mut page = [0; 4096];
    let (mut so_far, mut changed) = (0, false);
    loop {
        match source.read(&mut page) {
            Ok(0) => break,
            Ok(length) => {
                let new = &page[..length];
                if changed || text.get(so_far..so_far + length) != Some(new) {
                    text.truncate(so_far);
                    text.extend_from_slice(new);
                    changed = true;
                }
                so_far += length;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    changed |= text.len() > so_far;
    text.truncate(so_far);
    Ok(changed)
}

/// `/proc/locks` as it was read last. Most often it is as before, and then nothing is parsed.
#[derive(Debug, Default)]
pub struct LockTable {
    text: Vec<u8>,
    /// By file, range, kind and owner: the table repeats, in any order.
    records: Vec<LockRecord>,
    bad_lines: u32,
    version: u64,
}

impl LockTable {
    /// Reads the table again. Where that fails it is empty.
    ///
    /// # Errors
    /// When the file cannot be opened or read.
    pub fn refresh(&mut self, roots: &Roots) -> Result<(), ReadError> {
        let path = roots.proc.join("locks");
        let read = std::fs::File::open(&path).and_then(|file| read_into(file, &mut self.text));
        let changed = read.as_ref().map_or_else(|_| !std::mem::take(&mut self.text).is_empty(), |changed| *changed);
        if changed || self.version == 0 {
            let lines = parse_table(&String::from_utf8_lossy(&self.text));
            (self.records, self.bad_lines) = (lines.records, lines.bad_lines);
            self.records.sort_by_key(|r| (r.file, r.start, r.end, r.kind as u8, r.pid));
            self.version += 1;
        }
        read.map(drop).map_err(|e| ReadError::new(&path, e))
    }

    /// Another number for each other content.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Lines that could not be understood.
    #[must_use]
    pub fn bad_lines(&self) -> u32 {
        self.bad_lines
    }

    /// The rows about a file, by range.
    #[must_use]
    pub fn rows(&self, file: FileId) -> &[LockRecord] {
        let file = Some(file);
        let start = self.records.partition_point(|r| r.file < file);
        let length = self.records[start..].partition_point(|r| r.file == file);
        &self.records[start..start + length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file(major: u32, minor: u32, inode: u64) -> Option<FileId> {
        Some(FileId { device: Device { major, minor }, inode })
    }

    #[test]
    fn an_ofd_lock_of_two_neighbouring_bytes() {
        assert_eq!(
            parse_line("4: OFDLCK ADVISORY  READ -1 fe:00:10420357 100 101"),
            Some(LockRecord {
                kind: LockKind::Ofd,
                mode: LockMode::Read,
                pid: -1,
                file: file(0xfe, 0, 10_420_357),
                start: 100,
                end: Some(101),
                waiting: false,
            })
        );
    }

    #[test]
    fn every_form_that_the_kernel_prints() {
        let table = "1: POSIX  ADVISORY  WRITE 812 00:1a:1284 0 EOF\n\
                     1: -> POSIX  ADVISORY  WRITE 900 00:1a:1284 0 EOF\n\
                     1:   -> OFDLCK ADVISORY  READ -1 00:1a:1284 7 9\n\
                     2: FLOCK  ADVISORY  WRITE 700 103:1a2:18446744073709551615 0 EOF\n\
                     3: LEASE  ACTIVE    READ  655 08:02:77 0 EOF\n\
                     4: DELEG  BREAKING  UNLCK 655 08:02:77 0 EOF\n\
                     5: OFDLCK *NOINODE* READ -1 <none>:0 100 103\n\
                     6: POSIX  MANDATORY READ 0 fe:00:9 1 1\n\
                     7: UNKNOWN UNKNOWN  READ 5 fe:00:9 0 EOF\n";
        let lines = parse_table(table);
        assert_eq!(lines.bad_lines, 0);
        let r = &lines.records;
        assert_eq!(r.len(), 9);
        assert_eq!((r[0].waiting, r[1].waiting, r[2].waiting), (false, true, true));
        assert_eq!(r[3].file, file(0x103, 0x1a2, u64::MAX));
        assert_eq!((r[3].kind, r[4].kind, r[5].kind), (LockKind::Flock, LockKind::Lease, LockKind::Lease));
        assert_eq!(r[5].mode, LockMode::Other);
        assert_eq!(r[6].file, None);
        assert_eq!((r[7].pid, r[7].start, r[7].end), (0, 1, Some(1)));
        assert_eq!(r[8].kind, LockKind::Other);
        assert!(r[0].covers(0) && r[0].covers(u64::MAX) && !r[6].covers(104) && r[6].covers(103));
    }

    #[test]
    fn a_bad_line_is_counted_and_the_rest_is_read() {
        let lines = parse_table(
            "nonsense\n1: OFDLCK ADVISORY  READ -1 fe:00:1 100 100\n2: OFDLCK ADVISORY  READ -1 fe:00:1 101 100\n\
             3: OFDLCK ADVISORY  READ -1 fe:00:1 100\n4: OFDLCK ADVISORY  READ x fe:00:1 1 1\n",
        );
        assert_eq!((lines.records.len(), lines.bad_lines), (1, 4));
    }

    #[test]
    fn a_table_that_reads_the_same_is_the_same_and_another_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let roots = Roots::recorded(dir.path());
        let mut table = LockTable::default();
        assert!(table.refresh(&roots).is_err());
        let write = |text: &str| std::fs::write(dir.path().join("locks"), text).unwrap();
        write("1: OFDLCK ADVISORY  READ -1 fe:00:9 201 201\n2: OFDLCK ADVISORY  READ -1 fe:00:9 100 101\nwhat\n");
        let of = FileId { device: Device { major: 0xfe, minor: 0 }, inode: 9 };
        table.refresh(&roots).unwrap();
        let first = table.version();
        assert_eq!((table.rows(of)[0].start, table.rows(of).len(), table.bad_lines()), (100, 2, 1));
        table.refresh(&roots).unwrap();
        assert_eq!(table.version(), first);
        write("1: OFDLCK ADVISORY  READ -1 fe:00:9 201 201\n");
        table.refresh(&roots).unwrap();
        assert_ne!(table.version(), first);
        assert_eq!(table.rows(of).len(), 1);
        assert!(table.rows(FileId { inode: 8, ..of }).is_empty());
        std::fs::remove_file(dir.path().join("locks")).unwrap();
        assert!(table.refresh(&roots).is_err());
        assert!(table.rows(of).is_empty(), "what cannot be read is not remembered");
    }

    #[test]
    fn a_text_that_fails_while_it_is_read_is_an_error() {
        struct Fails;
        impl Read for Fails {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::Error::from_raw_os_error(nix::libc::EIO))
            }
        }
        let mut text = b"before".to_vec();
        assert!(read_into(b"bef".chain(Fails), &mut text).is_err());
    }

    proptest! {
        #[test]
        fn a_text_is_replaced_and_a_change_is_told(before in "[ab]{0,9}", now in "[ab]{0,9}", cut in 0usize..9) {
            let mut text = before.clone().into_bytes();
            // In two pieces, as from the kernel.
            let (head, tail) = now.as_bytes().split_at(cut.min(now.len()));
            prop_assert_eq!(read_into(head.chain(tail), &mut text).unwrap(), before != now);
            prop_assert_eq!(text, now.into_bytes());
        }

        #[test]
        fn no_line_makes_it_panic(line in "[ -~]{0,80}|\\PC{0,80}") {
            let _ = parse_line(&line);
        }

        #[test]
        fn what_is_printed_is_read_back(start in 0u64..1 << 40, len in 0u64..1 << 40, inode: u64, major in 0u32..4096) {
            let line = format!("12: OFDLCK ADVISORY  WRITE -1 {major:02x}:00:{inode} {start} {}", start + len);
            let record = parse_line(&line).unwrap();
            prop_assert_eq!((record.start, record.end), (start, Some(start + len)));
            prop_assert_eq!(record.file, file(major, 0, inode));
        }
    }
}
