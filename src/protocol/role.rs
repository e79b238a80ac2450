//! What is somebody who holds this set of bytes doing with the image?
//!
//! The held set names the role: a raw guest disk holds `cw/w`, a backing file `c/wr`. Measured in QEMU 10.0.2 for every
//! kind of holder. Several programs share a set, so a role names the family and says "or". Asks only its neighbours.

use serde::{Deserialize, Serialize};

use super::access::Access;
use super::operation::Family;

/// What a held set means, in the words of an admin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// `-/-`: holds nothing.
    None,
    /// `cwr/wr`: read-write user of an image with metadata, such as a VM's qcow2.
    Writer,
    /// `cw/w`: raw disk of a VM.
    GuestDisk,
    /// `c/w`: raw disk of a VM, read-only.
    GuestDiskReadOnly,
    /// `cw/wr`: nvme or floppy, raw with an offset, or the source of a mirror or backup job.
    WriterExclusive,
    /// `cw/-`: share-rw disk, qemu-io on raw, vhost-user export, or a raw VM that arrived by migration under QEMU <= 6.1.
    SharedWriter,
    /// `c/wr` on an image with metadata: opened read-only, or a backing file.
    Reader,
    /// `c/wr` on raw: backing file, cdrom, base of `-snapshot`, or the source of `qemu-img convert`.
    BackingFile,
    /// `c/-`: `-U` reader, raw drive without a device, a VM that has migrated away (qcow2).
    ForceShareReader,
    /// `cw/r`: writable NBD export.
    NbdExport,
    /// `c/r`: read-only NBD export.
    NbdExportReadOnly,
    /// `cwr/-`: FUSE export, or raw being resized.
    FuseExport,
    /// `w/cwr` (raw) or `cwr/cwr`: target of a mirror job.
    MirrorTarget,
    /// `c/cwr`: image in the middle of a commit job.
    CommitIntermediate,
    /// `cwur/wr`: top image of a stream job.
    StreamTop,
    /// `w/r`: raw target of a backup or commit job.
    BackupTarget,
    /// `wr/r`: image being created.
    Creating,
    /// `-/wr`: `qemu-img info` on an image with metadata.
    Info,
    /// `cw/cw`: LUKS key change.
    LuksAmend,
    /// A set that no measured program holds for long.
    Other,
}

impl Role {
    /// The role of somebody who holds `held` on an image of `family`; graph-mod bytes change nothing.
    #[must_use]
    pub fn of(held: Access, family: Family) -> Self {
        let text = held.without_legacy().to_string();
        match (text.as_str(), family) {
            ("-/-", _) => Self::None,
            ("cwr/wr", _) => Self::Writer,
            ("cw/w", _) => Self::GuestDisk,
            ("c/w", _) => Self::GuestDiskReadOnly,
            ("cw/wr", _) => Self::WriterExclusive,
            ("cw/-", _) => Self::SharedWriter,
            ("c/wr", Family::Qcow2) => Self::Reader,
            ("c/wr", Family::Raw) => Self::BackingFile,
            ("c/-", _) => Self::ForceShareReader,
            ("cw/r", _) => Self::NbdExport,
            ("c/r", _) => Self::NbdExportReadOnly,
            ("cwr/-", _) => Self::FuseExport,
            ("w/cwr" | "cwr/cwr", _) => Self::MirrorTarget,
            ("c/cwr", _) => Self::CommitIntermediate,
            ("cwur/wr", _) => Self::StreamTop,
            ("w/r", _) => Self::BackupTarget,
            ("wr/r", _) => Self::Creating,
            ("-/wr", _) => Self::Info,
            ("cw/cw", _) => Self::LuksAmend,
            _ => Self::Other,
        }
    }

    /// At most 16 columns, for a table.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::None => "-",
            Self::Writer => "writer",
            Self::GuestDisk => "VM disk",
            Self::GuestDiskReadOnly => "VM disk, ro",
            Self::WriterExclusive => "writer, alone",
            Self::SharedWriter => "writer, shared",
            Self::Reader => "reader, backing",
            Self::BackingFile => "backing, cdrom",
            Self::ForceShareReader => "reader, shared",
            Self::NbdExport => "NBD export",
            Self::NbdExportReadOnly => "NBD export, ro",
            Self::FuseExport => "FUSE export",
            Self::MirrorTarget => "mirror target",
            Self::CommitIntermediate => "commit, middle",
            Self::StreamTop => "stream job",
            Self::BackupTarget => "backup target",
            Self::Creating => "being created",
            Self::Info => "qemu-img info",
            Self::LuksAmend => "LUKS key change",
            Self::Other => "other",
        }
    }

    /// One sentence: who holds such a set.
    #[must_use]
    pub const fn explanation(self) -> &'static str {
        match self {
            Self::None => "holds no byte",
            Self::Writer => "a VM or tool that has the image open read-write",
            Self::GuestDisk => "raw disk of a VM",
            Self::GuestDiskReadOnly => "raw disk of a VM, read-only",
            Self::WriterExclusive => "nvme or floppy disk, raw with an offset, or the source of a mirror or backup job",
            Self::SharedWriter => {
                "share-rw disk, qemu-io on raw, vhost-user export, or a VM migrated under QEMU 6.1 or older"
            }
            Self::Reader => "opened read-only, or a backing file",
            Self::BackingFile => "backing file, cdrom, base of -snapshot, or the source of qemu-img convert",
            Self::ForceShareReader => "reader with -U, drive without a device, or a VM that has migrated away",
            Self::NbdExport => "writable NBD export",
            Self::NbdExportReadOnly => "read-only NBD export",
            Self::FuseExport => "FUSE export, or a raw image being resized",
            Self::MirrorTarget => "target of a mirror job",
            Self::CommitIntermediate => "image in the middle of a commit job",
            Self::StreamTop => "top image of a stream job",
            Self::BackupTarget => "raw target of a backup or commit job",
            Self::Creating => "an image being created",
            Self::Info => "qemu-img info",
            Self::LuksAmend => "a LUKS key change",
            Self::Other => "a set that no known QEMU program holds for long",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measured_holders_are_named() {
        let role = |set: &str, family| Role::of(set.parse().unwrap(), family);
        assert_eq!(role("cwr/wr", Family::Qcow2), Role::Writer);
        assert_eq!(role("cw/w", Family::Raw), Role::GuestDisk);
        assert_eq!(role("c/wr", Family::Raw), Role::BackingFile);
        assert_eq!(role("c/wr", Family::Qcow2), Role::Reader);
        assert_eq!(role("w/cwr", Family::Raw), Role::MirrorTarget);
        assert_eq!(role("cwr/cwr", Family::Qcow2), Role::MirrorTarget);
        assert_eq!(role("-/-", Family::Raw), Role::None);
        assert_eq!(role("u/u", Family::Raw), Role::Other);
        // A byte of QEMU 6.2 does not hide what the holder does.
        assert_eq!(role("cwg/w", Family::Raw), Role::GuestDisk);
    }
}
