//! What does an image say of itself: format, size as the guest sees it, backing file?
//!
//! Read from the first bytes, as `bdrv_probe` of each QEMU driver does. Guests write raw images, so nothing here is to be
//! trusted: at most 64 KiB are read, with pread, and no length or offset is believed without a bound.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::linux::identity::{FileKind, FileStatus};
use crate::protocol::Family;

/// The format, by content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// No header of its own.
    Raw,
    /// QEMU's own, version 2 or 3.
    Qcow2,
    /// Version 1.
    Qcow,
    /// `QEMU enhanced disk`.
    Qed,
    /// `VMware`.
    Vmdk,
    /// `VirtualBox`.
    Vdi,
    /// Virtual PC, dynamic VHD; a fixed VHD has no header in front and counts as raw, as for QEMU.
    Vpc,
    /// Hyper-V.
    Vhdx,
    /// Parallels.
    Parallels,
    /// Encrypted; QEMU locks it as it locks raw.
    Luks,
}

impl Format {
    /// QEMU's name, as `-f` takes it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Qcow => "qcow",
            Self::Qed => "qed",
            Self::Vmdk => "vmdk",
            Self::Vdi => "vdi",
            Self::Vpc => "vpc",
            Self::Vhdx => "vhdx",
            Self::Parallels => "parallels",
            Self::Luks => "luks",
        }
    }

    /// Whether QEMU locks it as raw or as qcow2 (measured for every format named here but qcow).
    #[must_use]
    pub const fn family(self) -> Family {
        match self {
            Self::Raw | Self::Luks => Family::Raw,
            _ => Family::Qcow2,
        }
    }
}

/// What the header of an image says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// By its magic number.
    pub format: Format,
    /// Length of the disk that a guest sees, in bytes; `None` where the header does not say or is cut short.
    pub virtual_size: Option<u64>,
    /// The backing file as it stands in the header: a path relative to the image, or one of QEMU's URLs. Written by
    /// whoever wrote the image; bytes that are no UTF-8 are replaced.
    pub backing_file: Option<String>,
    /// The format of the backing file, as `-F` recorded it; then QEMU does not look at the file itself for it.
    pub backing_format: Option<String>,
    /// Part of the image lies in other files, which QEMU opens and locks too: a qcow2 with a `data_file`, a vmdk made of
    /// extents. They are not followed here.
    pub data_elsewhere: bool,
}

/// How QEMU treats a backing file: as the format that the header above it names, or else by the content.
#[must_use]
pub fn family_of_backing(declared: Option<&str>, content: Option<Format>) -> Family {
    match declared {
        Some("raw" | "luks" | "file" | "host_device") => Family::Raw,
        Some(_) => Family::Qcow2,
        None => content.map_or(Family::Qcow2, Format::family),
    }
}

/// The path that a backing file name leads to: beside the image unless it is absolute. `None` for what is no path but one
/// of QEMU's URLs or `json:` descriptions (`path_has_protocol` in block.c).
#[must_use]
pub fn backing_path(image: &Path, name: &str) -> Option<PathBuf> {
    let before_slash = name.split('/').next().unwrap_or_default();
    let name = match before_slash.split_once(':') {
        Some(("file", _)) => name.strip_prefix("file:")?,
        Some(_) => return None,
        None => name,
    };
    if name.is_empty() { None } else { Some(image.parent()?.join(name)) }
}

/// As much as any header is read: enough for every magic number and every field used here.
const HEAD: usize = 4096;
/// QEMU refuses longer names (`qcow2_do_open`).
const LONGEST_BACKING_NAME: usize = 1023;

/// Reads the header of an open image that is `length` bytes long.
///
/// # Errors
/// When the file cannot be read.
pub fn read(file: &File, length: u64) -> io::Result<Header> {
    let mut head = vec![0; HEAD];
    let filled = read_up_to(file, &mut head, 0)?;
    head.truncate(filled);
    let (mut header, backing) = parse(&head, length);
    if let Some((offset, len)) = backing {
        let mut name = vec![0; len];
        let filled = read_up_to(file, &mut name, offset)?;
        if filled == len {
            header.backing_file = Some(String::from_utf8_lossy(&name).into_owned());
        }
    }
    Ok(header)
}

/// The length of an open image in bytes, also of a block device, which has no size of its own in statx.
#[must_use]
pub fn length(file: &File, status: &FileStatus) -> u64 {
    match status.kind {
        FileKind::Block => rustix::fs::seek(file, rustix::fs::SeekFrom::End(0)).unwrap_or_default(),
        _ => status.size,
    }
}

fn read_up_to(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(filled)
}

/// Where in the file the backing file's name stands: offset and length in bytes.
type NamePlace = (u64, usize);

/// Reads the first bytes of an image of `length` bytes.
#[must_use]
pub fn parse(head: &[u8], length: u64) -> (Header, Option<NamePlace>) {
    let starts = |magic: &[u8]| head.starts_with(magic);
    let mut data_elsewhere = false;
    let (mut backing_file, mut backing_format) = (None, None);
    let (format, virtual_size, backing) = if starts(b"QFI\xfb") {
        let format = match be32(head, 4) {
            Some(2 | 3) => Format::Qcow2,
            Some(1) => Format::Qcow,
            // A version that nobody has made yet: QEMU opens it as raw only if told to.
            _ => Format::Qcow2,
        };
        let place = name_place(be64(head, 8), be32(head, 16), length);
        // QCOW2_INCOMPAT_DATA_FILE; version 2 has no features.
        data_elsewhere = be32(head, 4) != Some(2) && be64(head, 72).is_some_and(|features| features & 4 != 0);
        backing_format = qcow2_backing_format(head);
        (format, be64(head, 24), place)
    } else if starts(b"QED\0") {
        let has = |feature| le64(head, 16).is_some_and(|features| features & feature != 0);
        let has_backing = has(1);
        // QED_F_BACKING_FORMAT_NO_PROBE
        backing_format = has(4).then(|| "raw".to_owned());
        let offset = le32(head, 56).map(u64::from);
        let place = has_backing.then(|| name_place(offset, le32(head, 60), length)).flatten();
        (Format::Qed, le64(head, 48), place)
    } else if starts(b"KDMV") {
        // The description is text inside the file; it names a parent as `vmdk_parent_open` in block/vmdk.c reads it.
        backing_file = vmdk_parent(head);
        (Format::Vmdk, le64(head, 12).and_then(|sectors| sectors.checked_mul(512)), None)
    } else if starts(b"COWD") || starts(b"# Disk DescriptorFile") {
        data_elsewhere = true;
        (Format::Vmdk, None, None)
    } else if le32(head, 0x40) == Some(0xbeda_107f) {
        (Format::Vdi, le64(head, 0x170), None)
    } else if starts(b"conectix") {
        (Format::Vpc, be64(head, 48), None)
    } else if starts(b"vhdxfile") {
        (Format::Vhdx, None, None)
    } else if starts(b"WithoutFreeSpace") || starts(b"WithouFreSpacExt") {
        (Format::Parallels, le64(head, 36).and_then(|sectors| sectors.checked_mul(512)), None)
    } else if starts(b"LUKS\xba\xbe") {
        (Format::Luks, None, None)
    } else {
        (Format::Raw, Some(length), None)
    };
    (Header { format, virtual_size, backing_file, backing_format, data_elsewhere }, backing)
}

/// The header extension that names the format of the backing file (`qcow2_read_extensions` in block/qcow2.c).
fn qcow2_backing_format(head: &[u8]) -> Option<String> {
    const BACKING_FORMAT: u32 = 0xe279_2aca;
    // Version 2 has no length of its own.
    let mut at = if be32(head, 4) == Some(2) { 72 } else { usize::try_from(be32(head, 100)?).ok()? };
    loop {
        let length = usize::try_from(be32(head, at.checked_add(4)?)?).ok()?;
        match be32(head, at)? {
            0 => return None,
            BACKING_FORMAT => {
                let name = head.get(at + 8..(at + 8).checked_add(length.min(15))?)?;
                return Some(String::from_utf8_lossy(name).into_owned());
            }
            _ => at = (at + 8).checked_add(length.checked_next_multiple_of(8)?)?,
        }
    }
}

fn vmdk_parent(head: &[u8]) -> Option<String> {
    const OPENING: &[u8] = b"parentFileNameHint=\"";
    let at = head.windows(OPENING.len()).position(|w| w == OPENING)? + OPENING.len();
    let length = head[at..].iter().position(|b| *b == b'"').filter(|n| (1..=LONGEST_BACKING_NAME).contains(n))?;
    Some(String::from_utf8_lossy(&head[at..at + length]).into_owned())
}

fn name_place(offset: Option<u64>, len: Option<u32>, length: u64) -> Option<NamePlace> {
    let (offset, len) = (offset?, usize::try_from(len?).ok()?);
    let inside = offset.checked_add(len as u64).is_some_and(|end| end <= length);
    (offset > 0 && (1..=LONGEST_BACKING_NAME).contains(&len) && inside).then_some((offset, len))
}

fn bytes<const N: usize>(head: &[u8], at: usize) -> Option<[u8; N]> {
    head.get(at..at + N)?.try_into().ok()
}

fn be32(head: &[u8], at: usize) -> Option<u32> {
    bytes(head, at).map(u32::from_be_bytes)
}

fn be64(head: &[u8], at: usize) -> Option<u64> {
    bytes(head, at).map(u64::from_be_bytes)
}

fn le32(head: &[u8], at: usize) -> Option<u32> {
    bytes(head, at).map(u32::from_le_bytes)
}

fn le64(head: &[u8], at: usize) -> Option<u64> {
    bytes(head, at).map(u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn qcow2(version: u32, size: u64, backing: &str, place: u64) -> Vec<u8> {
        let mut image = vec![0; 8192];
        image[..4].copy_from_slice(b"QFI\xfb");
        image[4..8].copy_from_slice(&version.to_be_bytes());
        image[8..16].copy_from_slice(&place.to_be_bytes());
        image[16..20].copy_from_slice(&u32::try_from(backing.len()).unwrap().to_be_bytes());
        image[24..32].copy_from_slice(&size.to_be_bytes());
        if let Some(room) = usize::try_from(place).ok().and_then(|p| image.get_mut(p..p.checked_add(backing.len())?)) {
            room.copy_from_slice(backing.as_bytes());
        }
        image
    }

    fn read_bytes(content: &[u8]) -> Header {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        read(file.as_file(), content.len() as u64).unwrap()
    }

    #[test]
    fn qcow2_with_a_backing_file() {
        let header = read_bytes(&qcow2(3, 10 << 30, "base.qcow2", 512));
        assert_eq!(header.format, Format::Qcow2);
        assert_eq!(header.virtual_size, Some(10 << 30));
        assert_eq!(header.backing_file.as_deref(), Some("base.qcow2"));
        assert_eq!(read_bytes(&qcow2(2, 1, "", 0)).backing_file, None);
    }

    #[test]
    fn the_format_of_a_backing_file_is_what_the_header_above_it_says() {
        let mut image = qcow2(3, 1, "base", 512);
        image[100..104].copy_from_slice(&104u32.to_be_bytes());
        assert_eq!(read_bytes(&image).backing_format, None);
        image[104..112].copy_from_slice(&[0x68, 3, 0xf8, 0x57, 0, 0, 0, 3]);
        image[120..131].copy_from_slice(b"\xe2\x79\x2a\xca\0\0\0\x03raw");
        assert_eq!(read_bytes(&image).backing_format.as_deref(), Some("raw"));
        assert_eq!(family_of_backing(Some("raw"), Some(Format::Qcow2)), Family::Raw);
        assert_eq!(family_of_backing(Some("qcow2"), Some(Format::Raw)), Family::Qcow2);
        assert_eq!(family_of_backing(None, Some(Format::Luks)), Family::Raw);
        // Extensions that lead out of the header, or round and round, have an end.
        for length in [u32::MAX, u32::MAX - 7, 0xffff_fff8, 1 << 20] {
            image[108..112].copy_from_slice(&length.to_be_bytes());
            assert_eq!(read_bytes(&image).backing_format, None);
        }
    }

    #[test]
    fn a_backing_name_is_a_path_only_if_qemu_takes_it_for_one() {
        let path = |name| backing_path(Path::new("/images/web01.qcow2"), name).map(|p| p.display().to_string());
        assert_eq!(path("base.qcow2").as_deref(), Some("/images/base.qcow2"));
        assert_eq!(path("/srv/base:1.qcow2").as_deref(), Some("/srv/base:1.qcow2"));
        assert_eq!(path("sub/base:1").as_deref(), Some("/images/sub/base:1"));
        assert_eq!(path("file:base.raw").as_deref(), Some("/images/base.raw"));
        for url in ["json:{\"driver\":\"raw\"}", "nbd://host/x", "rbd:pool/x", ""] {
            assert_eq!(path(url), None, "{url}");
        }
    }

    #[test]
    fn a_lying_backing_name_is_not_followed() {
        for place in [8190, u64::MAX, u64::MAX - 3] {
            assert_eq!(read_bytes(&qcow2(3, 1, "base.qcow2", place)).backing_file, None, "{place}");
        }
        let mut long = qcow2(3, 1, "base", 512);
        long[16..20].copy_from_slice(&1024u32.to_be_bytes());
        assert_eq!(read_bytes(&long).backing_file, None);
    }

    #[test]
    fn other_formats_are_known_by_their_magic_and_the_rest_is_raw() {
        let format = |magic: &[u8]| read_bytes(magic).format;
        assert_eq!(format(b"KDMV\x01\0\0\0"), Format::Vmdk);
        assert_eq!(format(b"# Disk DescriptorFile\nversion=1"), Format::Vmdk);
        assert_eq!(format(b"conectix"), Format::Vpc);
        assert_eq!(format(b"vhdxfile"), Format::Vhdx);
        assert_eq!(format(b"QED\0"), Format::Qed);
        assert_eq!(format(b"WithoutFreeSpace"), Format::Parallels);
        assert_eq!(format(b"LUKS\xba\xbe\0\x01"), Format::Luks);
        assert_eq!(format(b"QFI\xfb\0\0\0\x01"), Format::Qcow);
        assert_eq!(format(b"QFI"), Format::Raw);
        let mut vdi = vec![0; 0x200];
        vdi[0x40..0x44].copy_from_slice(&0xbeda_107f_u32.to_le_bytes());
        vdi[0x170..0x178].copy_from_slice(&4096u64.to_le_bytes());
        let header = read_bytes(&vdi);
        assert_eq!((header.format, header.virtual_size), (Format::Vdi, Some(4096)));
        let header = read_bytes(b"");
        assert_eq!((header.format, header.virtual_size), (Format::Raw, Some(0)));
    }

    proptest! {
        #[test]
        fn no_header_makes_it_panic(
            magic in prop::sample::select(vec![&b"QFI\xfb"[..], b"QED\0", b"KDMV", b"conectix", b"WithoutFreeSpace", b""]),
            rest in proptest::collection::vec(any::<u8>(), 0..600),
            length: u64,
        ) {
            let head = [magic, &rest].concat();
            if let (_, Some((offset, len))) = parse(&head, length) {
                prop_assert!(len <= LONGEST_BACKING_NAME && offset + len as u64 <= length);
            }
        }
    }
}
