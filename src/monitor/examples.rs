//! What do small samples look like? For the unit tests of this room, built as the kernel would tell it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use jiff::Timestamp;

use super::sample::{Answer, ImageSample, Sample};
use crate::image::header::{Format, Header};
use crate::linux::descriptors::{OpenDescriptor, OpenMode};
use crate::linux::identity::{Device, FileId, ProcessId};
use crate::linux::lock_table::{LockRecord, parse_line};
use crate::linux::mounts::{Mount, Reach};
use crate::linux::probe::BytesFound;
use crate::linux::process::ProcessFacts;
use crate::protocol::{Access, LockByte};

pub(crate) fn access(text: &str) -> Access {
    text.parse().unwrap()
}

pub(crate) fn process(pid: i32, command: &str, vm: Option<&str>) -> ProcessFacts {
    ProcessFacts {
        id: ProcessId { pid, start_time: 1000 + u64::try_from(pid).unwrap() },
        parent: 1,
        command: command.to_owned(),
        command_line: command.to_owned(),
        uid: 0,
        user: "root".to_owned(),
        vm: vm.map(str::to_owned),
        unit: None,
        container: None,
        started: Some(Timestamp::UNIX_EPOCH),
    }
}

/// The rows of a read lock on each byte of `held`, as behind a descriptor or in the table.
pub(crate) fn rows(held: &str, kind: &str, pid: i32) -> Vec<LockRecord> {
    let line = |b: LockByte| parse_line(&format!("1: {kind} ADVISORY READ {pid} 08:01:7 {0} {0}", b.offset())).unwrap();
    access(held).bytes().map(line).collect()
}

pub(crate) fn descriptor(pid: i32, fd: i32, mode: OpenMode, locks: Vec<LockRecord>) -> OpenDescriptor {
    OpenDescriptor { pid, fd, file: FileId { device: Device { major: 8, minor: 1 }, inode: 7 }, mode, locks }
}

/// An OFD holder's descriptor.
pub(crate) fn holds(pid: i32, held: &str) -> OpenDescriptor {
    descriptor(pid, 14, OpenMode::Write, rows(held, "OFDLCK", -1))
}

/// An image of which GETLK says `locked`.
pub(crate) fn image(name: &str, locked: &str) -> ImageSample {
    let found = BytesFound { locked: access(locked), ..BytesFound::default() };
    ImageSample {
        path: Path::new("/images").join(name).into(),
        resolved: Path::new("/images").join(name).into(),
        backing: None,
        file: FileId { device: Device { major: 8, minor: 1 }, inode: 7 },
        device: None,
        rows_certain: true,
        file_size: 1 << 20,
        header: Some(Arc::new(Header {
            format: Format::Qcow2,
            virtual_size: Some(1 << 30),
            backing_file: None,
            backing_format: None,
            data_elsewhere: false,
        })),
        mount: Some(mount("ext4", Reach::Local)),
        answer: Answer::Bytes(found),
        descriptors: Vec::new(),
        table_rows: rows(locked, "OFDLCK", -1).into(),
        loop_devices: Vec::new(),
        mapped_by: Vec::new(),
        mounted_on: None,
        layer: None,
        sought: false,
    }
}

pub(crate) fn mount(kind: &str, reach: Reach) -> Arc<Mount> {
    Arc::new(Mount {
        root: "/".into(),
        kind: kind.to_owned(),
        source: "filer:/vol".to_owned(),
        point: "/images".into(),
        options: Vec::new(),
        lock_device: Device { major: 8, minor: 1 },
        reach,
    })
}

pub(crate) fn sample(images: Vec<ImageSample>, processes: &[ProcessFacts]) -> Sample {
    Sample {
        taken_at: Timestamp::UNIX_EPOCH,
        host: "kvm1".to_owned(),
        taken_by: 0,
        images: images.into_iter().map(Arc::new).collect(),
        processes: processes.iter().map(|p| (p.id.pid, Arc::new(p.clone()))).collect::<BTreeMap<_, _>>(),
        hidden_processes: 0,
        sees_all_processes: true,
        troubles: Vec::new(),
        deleted: Vec::new(),
    }
}
