//! How is an empty qcow2 image written without QEMU?
//!
//! The smallest one that `qemu-img check` finds clean: version 3, clusters of 64 KiB, no data (QEMU's
//! docs/interop/qcow2.rst).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
const HEADER_LENGTH: u32 = 104;
/// Each L1 entry stands for an L2 table of one cluster, each entry of which stands for a cluster.
const BYTES_PER_L1_ENTRY: u64 = CLUSTER / 8 * CLUSTER;

/// Makes an image of `size` bytes, on a backing file of the given name and format if there is one.
pub(super) fn create(path: &Path, size: u64, backing: Option<(&str, &str)>) -> io::Result<()> {
    let l1_entries = size.div_ceil(BYTES_PER_L1_ENTRY);
    // Header, refcount table, refcount block, L1 table: a cluster each.
    let [refcount_table, refcount_block, l1_table] = [CLUSTER, 2 * CLUSTER, 3 * CLUSTER];
    let clusters = 4u64;
    if l1_entries * 8 > CLUSTER {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too large for one cluster of L1 table"));
    }

    let mut extensions = Vec::new();
    if let Some((_, format)) = backing {
        // The backing format extension, padded to a multiple of 8 bytes.
        extensions.extend(0xe279_2aca_u32.to_be_bytes());
        extensions.extend((format.len() as u32).to_be_bytes());
        extensions.extend(format.as_bytes());
        extensions.resize(extensions.len().next_multiple_of(8), 0);
    }
    extensions.extend([0; 8]);
    let name = backing.map_or("", |(name, _)| name);
    let name_offset = if name.is_empty() { 0 } else { u64::from(HEADER_LENGTH) + extensions.len() as u64 };

    let mut header = Vec::new();
    header.extend(b"QFI\xfb");
    header.extend(3u32.to_be_bytes());
    header.extend(name_offset.to_be_bytes());
    header.extend((name.len() as u32).to_be_bytes());
    header.extend(CLUSTER_BITS.to_be_bytes());
    header.extend(size.to_be_bytes());
    header.extend(0u32.to_be_bytes()); // not encrypted
    header.extend((l1_entries as u32).to_be_bytes());
    header.extend(l1_table.to_be_bytes());
    header.extend(refcount_table.to_be_bytes());
    header.extend(1u32.to_be_bytes()); // clusters of refcount table
    header.extend(0u32.to_be_bytes()); // no snapshots
    header.extend(0u64.to_be_bytes());
    header.extend([0; 24]); // no feature bits
    header.extend(4u32.to_be_bytes()); // refcounts of 16 bits
    header.extend(HEADER_LENGTH.to_be_bytes());
    header.extend(extensions);
    header.extend(name.as_bytes());

    let file = File::create(path)?;
    file.set_len(clusters * CLUSTER)?;
    file.write_all_at(&header, 0)?;
    file.write_all_at(&refcount_block.to_be_bytes(), refcount_table)?;
    (0..clusters).try_for_each(|i| file.write_all_at(&1u16.to_be_bytes(), refcount_block + 2 * i))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::header::{self, Format};

    #[test]
    fn what_is_written_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("over.qcow2");
        create(&path, 40 << 30, Some(("base.qcow2", "qcow2"))).unwrap();
        let file = File::open(&path).unwrap();
        let header = header::read(&file, file.metadata().unwrap().len()).unwrap();
        assert_eq!(header.format, Format::Qcow2);
        assert_eq!(header.virtual_size, Some(40 << 30));
        assert_eq!(header.backing_file.as_deref(), Some("base.qcow2"));
        assert!(create(&path, u64::MAX, None).is_err());
    }
}
