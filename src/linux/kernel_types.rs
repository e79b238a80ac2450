//! Where in the kernel's structures do the fields lie that a program in the kernel reads?
//!
//! The kernel describes its own types (BTF, Documentation/bpf/btf.rst). They are read a page at a time and every number in
//! them is checked: a description that is cut off or odd is an error.

use std::ffi::CStr;
use std::io;
use std::ops::Range;

/// Where the kernel gives them, since Linux 5.4.
pub(super) const TYPES: &str = "/sys/kernel/btf/vmlinux";
const ITERATOR: &str = "bpf_iter_task_file";
/// Structure and field, in the order that the program of `task_files` takes them.
const FIELDS: [&str; 10] = [
    "task_struct.tgid",
    "task_struct.pid",
    "file.f_flags",
    "file.f_mode",
    "file.f_inode",
    "inode.i_mode",
    "inode.i_sb",
    "inode.i_ino",
    "inode.i_nlink",
    "super_block.s_dev",
];

/// Why a layout is not known.
#[derive(Debug)]
pub(super) enum NotFound {
    /// The descriptions cannot be read, or have a form that is not known here.
    Unreadable(io::Error),
    /// There is no such function or field.
    Missing(&'static str),
}

impl From<io::Error> for NotFound {
    fn from(error: io::Error) -> Self {
        Self::Unreadable(error)
    }
}

/// What the program must know of this kernel.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Layout {
    /// The number of the type that stands for the iterator.
    pub(super) iterator: u32,
    /// Where [`FIELDS`] are, in bytes.
    pub(super) offsets: [i16; FIELDS.len()],
}

/// The iterator, and structure and field in turn.
fn wanted_names() -> Vec<&'static str> {
    [ITERATOR].into_iter().chain(FIELDS.iter().flat_map(|f| f.split('.'))).collect()
}

impl Layout {
    /// Reads the descriptions.
    ///
    /// # Errors
    /// As [`NotFound`] says.
    pub(super) fn find(read_at: ReadAt<'_>) -> Result<Self, NotFound> {
        let mut btf = Btf::open(read_at)?;
        // The names first, so that types are told apart by numbers: one pass over each.
        let names = btf.names(&wanted_names())?;
        let (fields, _) = names[1..].as_chunks::<2>();
        let mut found = Self::default();
        let mut homes = [0; FIELDS.len()];
        let (mut id, mut at) = (1, btf.types.start);
        while at < btf.types.end && (found.iterator == 0 || homes.contains(&0)) {
            let kind = btf.kind_at(at)?;
            if (id - 1) % Btf::STRIDE == 0 {
                btf.marks.push(at);
            }
            if kind.number == FUNCTION && names[0] == Some(kind.name) {
                found.iterator = id;
            } else if kind.number == STRUCT {
                let ours = homes.iter_mut().zip(fields).filter(|(home, f)| **home == 0 && f[0] == Some(kind.name));
                ours.for_each(|(home, _)| *home = id);
            }
            (id, at) = (id + 1, kind.next);
        }
        if found.iterator == 0 {
            return Err(NotFound::Missing(ITERATOR));
        }
        for (i, text) in FIELDS.iter().enumerate() {
            let offset = match fields[i][1] {
                Some(name) if homes[i] != 0 => btf.field(homes[i], name)?,
                _ => None,
            };
            found.offsets[i] = offset.ok_or(NotFound::Missing(text))?;
        }
        Ok(found)
    }
}

pub(super) type ReadAt<'a> = &'a dyn Fn(&mut [u8], u64) -> io::Result<usize>;

/// The kernel's type descriptions, read a page at a time: all of them are half of the memory that this program may use,
/// and the kernel gives no more than a page a read anyway.
struct Btf<'a> {
    read_at: ReadAt<'a>,
    /// What was read last, and where it begins.
    page: Vec<u8>,
    page_at: u64,
    types: Range<u64>,
    strings: Range<u64>,
    /// Where types 1, 65, 129.. are: types are of many lengths and have no table.
    marks: Vec<u64>,
}

/// What all types have in common.
struct Kind {
    name: u32,
    number: u32,
    members: u32,
    /// Where the next type is.
    next: u64,
}

const STRUCT: u32 = 4;
const UNION: u32 = 5;
const FUNCTION: u32 = 12;
/// The length of what all types have in common, and of a member.
const ENTRY: u64 = 12;

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the type descriptions have an unknown form")
}

impl<'a> Btf<'a> {
    const PAGE: usize = 4096;
    const STRIDE: u32 = 64;

    fn open(read_at: ReadAt<'a>) -> io::Result<Self> {
        let mut btf = Self { read_at, page: Vec::new(), page_at: 0, types: 0..0, strings: 0..0, marks: Vec::new() };
        let [magic, header, types, types_length, strings, strings_length] = btf.words(0)?;
        let [first, second, version, _] = magic.to_ne_bytes();
        if u16::from_ne_bytes([first, second]) != 0xeb9f || version != 1 {
            return Err(malformed());
        }
        let section = |at: u32, length: u32| {
            let start = u64::from(header) + u64::from(at);
            start..start + u64::from(length)
        };
        (btf.types, btf.strings) = (section(types, types_length), section(strings, strings_length));
        Ok(btf)
    }

    /// Makes the page begin at `at`, with at least `least` bytes.
    fn turn_to(&mut self, at: u64, least: usize) -> io::Result<()> {
        self.page.resize(Self::PAGE, 0);
        self.page_at = at;
        let mut filled = 0;
        while filled < least {
            match (self.read_at)(&mut self.page[filled..], at + filled as u64) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => filled += count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        self.page.truncate(filled);
        Ok(())
    }

    fn words<const N: usize>(&mut self, at: u64) -> io::Result<[u32; N]> {
        let inside = at.checked_sub(self.page_at).filter(|start| start + 4 * N as u64 <= self.page.len() as u64);
        if inside.is_none() {
            self.turn_to(at, 4 * N)?;
        }
        let (words, _) = self.page[inside.unwrap_or(0) as usize..].as_chunks();
        Ok(std::array::from_fn(|i| u32::from_ne_bytes(words[i])))
    }

    /// Where each of `wanted` lies in the string section, which is how types refer to it.
    fn names(&mut self, wanted: &[&str]) -> io::Result<Vec<Option<u32>>> {
        let mut found = vec![None; wanted.len()];
        let mut at = self.strings.start;
        while at < self.strings.end && found.contains(&None) {
            self.turn_to(at, 1)?;
            let mut done = 0;
            while let Ok(name) = CStr::from_bytes_until_nul(&self.page[done..]) {
                for (found, _) in found.iter_mut().zip(wanted).filter(|(_, w)| w.as_bytes() == name.to_bytes()) {
                    *found = u32::try_from(at - self.strings.start + done as u64).ok();
                }
                done += name.count_bytes() + 1;
            }
            // What is longer than a page is none that is wanted.
            at += if done == 0 { self.page.len() } else { done } as u64;
        }
        Ok(found)
    }

    fn kind_at(&mut self, at: u64) -> io::Result<Kind> {
        let [name, info, _] = self.words(at)?;
        // 16 bits and 5 until now; those above them are 0, and set aside for more of the same.
        let (members, number) = (info & 0xff_ffff, info >> 24 & 0x7f);
        let n = u64::from(members);
        let length = match number {
            2 | 7..=11 | FUNCTION | 16 | 18 => 0, // pointer, forward to restrict, .., float, tag of a type
            1 | 14 | 17 => 4,                     // integer, variable, tag of a declaration
            3 => 12,                              // array
            6 | 13 => 8 * n,                      // enumeration, prototype
            STRUCT | UNION | 15 | 19 => ENTRY * n, // .., section, enumeration of 64 bits
            _ => return Err(malformed()),
        };
        let next = at + ENTRY + length;
        let kind = Kind { name, number, members, next };
        if next > self.types.end { Err(malformed()) } else { Ok(kind) }
    }

    /// Where type `id` is.
    fn find(&mut self, id: u32) -> io::Result<u64> {
        let before = id.checked_sub(1).ok_or_else(malformed)? as usize;
        // The marks end where nothing was left to look for.
        let mark = (before / Self::STRIDE as usize).min(self.marks.len().saturating_sub(1));
        let mut at = *self.marks.get(mark).ok_or_else(malformed)?;
        for _ in mark * Self::STRIDE as usize..before {
            at = self.kind_at(at)?.next;
        }
        Ok(at)
    }

    /// Where in the struct `home` the field `name` is, also in a struct or union in it that has no name.
    fn field(&mut self, home: u32, name: u32) -> io::Result<Option<i16>> {
        let mut left = vec![(home, 0_u32)];
        // More than a kernel has; what refers to itself ends here.
        for _ in 0..100 {
            let Some((id, base)) = left.pop() else { break };
            let at = self.find(id)?;
            let kind = self.kind_at(at)?;
            let members = if matches!(kind.number, STRUCT | UNION) { kind.members } else { 0 };
            for i in 1..=u64::from(members) {
                let [member, of_type, offset] = self.words(at + ENTRY * i)?;
                // The highest byte can be the length of a bit field.
                let bits = base.saturating_add(offset & 0xff_ffff);
                if member == name {
                    return Ok(i16::try_from(bits / 8).ok());
                }
                if member == 0 {
                    left.push((of_type, bits));
                }
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn find(bytes: &[u8]) -> Result<Layout, NotFound> {
        Layout::find(&|into, at| {
            let rest = bytes.get(usize::try_from(at).unwrap()..).unwrap_or_default();
            let count = rest.len().min(into.len());
            into[..count].copy_from_slice(&rest[..count]);
            Ok(count)
        })
    }

    #[test]
    fn the_kernels_types_are_read_or_refused_when_they_are_cut_off() {
        let Ok(mut bytes) = std::fs::read(TYPES) else { return eprintln!("not tested: no {TYPES}") };
        let whole = find(&bytes).unwrap();
        assert!(whole.iterator != 0 && whole.offsets.iter().all(|o| *o >= 0));
        while !bytes.is_empty() {
            bytes.truncate(bytes.len() * 9 / 10);
            assert!(find(&bytes).map_or(true, |l| l == whole), "cut to {}", bytes.len());
        }
        assert!(matches!(find(&[]), Err(NotFound::Unreadable(_))));
    }

    proptest! {
        #[test]
        fn no_types_make_it_panic(
            types in prop::collection::vec(prop_oneof![0..300_u32, any::<u32>(), (1..20_u32).prop_map(|k| k << 24 | 1)], 0..200),
            strings in prop::collection::vec(any::<u8>(), 0..200),
            cut in 0..1200_usize,
        ) {
            let names = wanted_names().join("\0") + "\0";
            for strings in [&strings, names.as_bytes()] {
                let [a, b] = 0xeb9f_u16.to_ne_bytes();
                let length = 4 * u32::try_from(types.len()).unwrap();
                let header = [u32::from_ne_bytes([a, b, 1, 0]), 24, 0, length, length, strings.len().try_into().unwrap()];
                let words = header.iter().chain(&types).flat_map(|w| w.to_ne_bytes());
                let bytes: Vec<u8> = words.chain(strings.iter().copied()).collect();
                let _ = find(&bytes);
                let _ = find(&bytes[..cut.min(bytes.len())]);
            }
        }
    }
}
