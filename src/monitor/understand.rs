//! Which bytes are held, by whom, and what is the verdict on an image?
//!
//! Pure: the same [`Sample`] always gives the same answer. A byte is free only if GETLK said so and nobody's descriptor
//! says otherwise; what could not be asked is `unknown` and a state of its own.

use super::finding::findings;
use super::sample::{Answer, ImageSample, Sample};
use super::snapshot::{ByteState, ByteView, Filesystem, ForeignRange, Holder, Image, Opener, Verdict};
use crate::linux::descriptors::{OpenDescriptor, OpenMode};
use crate::linux::lock_table::{LockKind, LockMode, LockRecord};
use crate::linux::mounts::Reach;
use crate::protocol::{Access, LockByte, Permission};

/// Makes sense of what was seen of one image.
pub(super) fn understand(image: &ImageSample, sample: &Sample) -> Image {
    let holders = holders(image, sample);
    let openers = openers(image, sample);
    let bytes = bytes(image, &holders);
    let verdict = verdict(image, sample, &bytes);
    let mount = image.mount.as_deref();
    let header = image.header.as_ref();
    let mut understood = Image {
        path: image.path.clone(),
        resolved: image.resolved.clone(),
        file: image.file,
        format: header.map(|h| h.format),
        virtual_size: header.and_then(|h| h.virtual_size),
        file_size: image.file_size,
        backing_file: header.and_then(|h| h.backing_file.clone()),
        backing: image.backing.clone(),
        backing_format: header.and_then(|h| h.backing_format.clone()),
        data_elsewhere: header.is_some_and(|h| h.data_elsewhere),
        filesystem: Filesystem {
            kind: mount.map(|m| m.kind.clone()).unwrap_or_default(),
            source: mount.map(|m| m.source.clone()).unwrap_or_default(),
            remote: mount.is_some_and(|m| m.reach == Reach::Remote),
        },
        verdict,
        sought: image.sought,
        stalled_since: match image.answer {
            Answer::Stalled(since) => Some(since),
            _ => None,
        },
        write_locked: write_locked(image, &holders),
        bytes,
        holders,
        openers,
        findings: Vec::new(),
        loop_devices: image.loop_devices.clone(),
        mounted_on: image.mounted_on.clone(),
        overlays: 0,
    };
    understood.findings = findings(&understood, image, sample);
    understood
}

/// Whether a range can be QEMU's: a read lock on bytes of one of the two rows only. Neighbouring bytes come as one range.
fn is_protocol(record: &LockRecord) -> bool {
    let within = |first, last| first <= record.start && record.end.is_some_and(|end| end <= last);
    record.mode == LockMode::Read && (within(100, 104) || within(200, 204))
}

fn holders(image: &ImageSample, sample: &Sample) -> Vec<Holder> {
    let mut holders: Vec<Holder> = Vec::new();
    let mut descriptors: Vec<&OpenDescriptor> = image.descriptors.iter().collect();
    descriptors.sort_by_key(|d| (d.pid, d.fd));
    for descriptor in descriptors {
        let Some(process) = sample.processes.get(&descriptor.pid) else { continue };
        for kind in [LockKind::Ofd, LockKind::Posix] {
            let locks: Vec<&LockRecord> = descriptor.locks.iter().filter(|r| r.counts() && r.kind == kind).collect();
            // POSIX locks belong to the process and are printed behind each of its descriptors: one is enough.
            let told = |h: &Holder| h.lock == LockKind::Posix && h.process.id == process.id;
            if locks.is_empty() || (kind == LockKind::Posix && holders.iter().any(told)) {
                continue;
            }
            let holder = |access, foreign| Holder {
                process: process.clone(),
                fd: Some(descriptor.fd),
                lock: kind,
                access,
                foreign,
                ours: process.id.pid == sample.taken_by,
            };
            let access = access_of(locks.iter().copied().filter(|r| is_protocol(r)));
            if !access.is_empty() {
                holders.push(holder(access, None));
            }
            for record in locks.into_iter().filter(|r| !is_protocol(r)) {
                holders.push(holder(Access::NONE, Some(foreign(record))));
            }
        }
    }
    // A POSIX lock names its process in the table, also where the process may not be read.
    let named = |r: &&LockRecord| image.rows_certain && r.counts() && r.kind == LockKind::Posix && r.pid > 0;
    for record in image.table_rows.iter().filter(named) {
        let Some(process) = i32::try_from(record.pid).ok().and_then(|pid| sample.processes.get(&pid)) else { continue };
        if image.descriptors.iter().any(|d| d.pid == process.id.pid && !d.locks.is_empty()) {
            continue;
        }
        let known = is_protocol(record);
        holders.push(Holder {
            process: process.clone(),
            fd: None,
            lock: LockKind::Posix,
            access: if known { access_of(std::iter::once(record)) } else { Access::NONE },
            foreign: (!known).then(|| foreign(record)),
            ours: false,
        });
    }
    holders
}

fn access_of<'a>(records: impl Iterator<Item = &'a LockRecord>) -> Access {
    let covered = |r: &'a LockRecord| LockByte::ALL.into_iter().filter(move |b| r.covers(b.offset()));
    records.flat_map(covered).collect()
}

fn foreign(record: &LockRecord) -> ForeignRange {
    ForeignRange { start: record.start, end: record.end, mode: record.mode }
}

/// Whether a holder's lock lies on `byte`, foreign ranges included.
fn lies_on(holder: &Holder, byte: LockByte) -> bool {
    match holder.foreign {
        Some(range) => range.start <= byte.offset() && range.end.is_none_or(|end| byte.offset() <= end),
        None => holder.access.contains(byte),
    }
}

fn openers(image: &ImageSample, sample: &Sample) -> Vec<Opener> {
    let holds_any = |pid: i32, bytes: &[LockByte]| {
        let on_one = |r: &LockRecord| r.counts() && bytes.iter().any(|b| r.covers(b.offset()));
        image.descriptors.iter().any(|d| d.pid == pid && d.locks.iter().any(on_one))
    };
    // Whoever says that it writes may write through any of its descriptors; whoever only reads, by its locks, may not.
    let writes = [LockByte::permission(Permission::Write)];
    let unlocked_writer = |d: &OpenDescriptor| {
        d.mode == OpenMode::Write && !d.locks.iter().any(LockRecord::counts) && !holds_any(d.pid, &writes)
    };
    let mut openers: Vec<Opener> = image
        .descriptors
        .iter()
        .filter(|d| !holds_any(d.pid, &LockByte::ALL) || unlocked_writer(d))
        .filter_map(|d| Some(Opener { process: sample.processes.get(&d.pid)?.clone(), fd: d.fd, mode: d.mode }))
        .collect();
    openers.sort_by_key(|o| (o.process.id.pid, o.fd));
    openers
}

fn bytes(image: &ImageSample, holders: &[Holder]) -> Vec<ByteView> {
    let view = |byte: LockByte| {
        let holders: Vec<usize> = (0..holders.len()).filter(|i| lies_on(&holders[*i], byte)).collect();
        let state = match &image.answer {
            Answer::Bytes(found) if found.locked.contains(byte) => ByteState::Held,
            // A descriptor that holds the byte was read after the question: the later word counts.
            _ if !holders.is_empty() => ByteState::Held,
            Answer::Bytes(_) => ByteState::Free,
            Answer::CannotOpen(_) | Answer::CannotLock(_) | Answer::Stalled(_) => ByteState::Unknown,
        };
        ByteView { byte, state, holders }
    };
    LockByte::ALL.into_iter().map(view).collect()
}

/// A write lock may hide behind a read lock that GETLK named first: the holders' own lines count too.
fn write_locked(image: &ImageSample, holders: &[Holder]) -> Access {
    let asked = match &image.answer {
        Answer::Bytes(found) => found.write_locked,
        Answer::CannotOpen(_) | Answer::CannotLock(_) | Answer::Stalled(_) => Access::NONE,
    };
    let writers = holders.iter().filter(|h| h.foreign.is_some_and(|f| f.mode == LockMode::Write));
    let covered = writers.flat_map(|h| LockByte::ALL.into_iter().filter(|b| lies_on(h, *b)));
    asked.union(covered.collect())
}

fn verdict(image: &ImageSample, sample: &Sample, bytes: &[ByteView]) -> Verdict {
    match image.answer {
        Answer::CannotOpen(_) => return Verdict::Unknown,
        Answer::CannotLock(_) => return Verdict::CannotLock,
        Answer::Stalled(_) => return Verdict::Stalled,
        Answer::Bytes(_) => {}
    }
    let held = |b: &&ByteView| b.state == ByteState::Held;
    if !bytes.iter().any(|b| held(&b)) {
        return Verdict::Free;
    }
    let everyone_read = sample.hidden_processes == 0 && sample.sees_all_processes;
    let reach = image.mount.as_ref().map_or(Reach::Local, |m| m.reach);
    let without_holder = bytes.iter().filter(held).filter(|b| b.holders.is_empty()).map(|b| {
        let in_table = image.table_rows.iter().any(|r| r.counts() && r.covers(b.byte.offset()));
        match (in_table, everyone_read, reach) {
            _ if image.sought => Verdict::Unknown,
            (true, true, _) => Verdict::HeldByKernel,
            (false, _, Reach::Remote) => Verdict::HeldElsewhere,
            // A FUSE server may keep the locks of this host too, and then neither table nor descriptor shows them: only
            // where nobody here has the file open is it certain that it is somebody else.
            (false, true, Reach::Fuse) if image.descriptors.is_empty() => Verdict::HeldElsewhere,
            // On a local file system GETLK and the table must agree; where they do not, a row was missed, or belongs to
            // another pid namespace.
            _ => Verdict::Unknown,
        }
    });
    // The least certain of them speaks for the image.
    without_holder.max().unwrap_or(Verdict::Held)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    use crate::linux::lock_table::parse_line;
    use crate::linux::probe::LockFound;
    use crate::monitor::examples::{access, descriptor, holds, image, mount, process, rows, sample};
    use crate::monitor::snapshot::Snapshot;

    fn verdict_of(image: ImageSample, change: impl Fn(&mut Sample)) -> (Verdict, Image) {
        let mut sample = sample(vec![image], &[process(42, "qemu-system-x86", Some("web01")), process(43, "dd", None)]);
        change(&mut sample);
        let image = Snapshot::of(&sample).images.remove(0);
        (image.verdict, image)
    }

    fn same(_: &mut Sample) {}

    #[test]
    fn while_its_holder_is_sought_nobody_is_ruled_out() {
        for reach in [Reach::Local, Reach::Remote, Reach::Fuse] {
            let sought = ImageSample { mount: Some(mount("any", reach)), sought: true, ..image("a", "cw/w") };
            for unlisted in [ImageSample { table_rows: Arc::default(), ..sought.clone() }, sought.clone()] {
                let (verdict, seen) = verdict_of(unlisted, same);
                assert_eq!((verdict, seen.ownerless()), (Verdict::Unknown, access("cw/w")));
                assert!(seen.findings.iter().any(|f| f.text.contains("still being searched")), "{:?}", seen.findings);
            }
            // Somebody may be sought besides those who are known.
            let (verdict, _) = verdict_of(ImageSample { descriptors: vec![holds(42, "cw/w")], ..sought }, same);
            assert_eq!(verdict, Verdict::Held);
        }
    }

    #[test]
    fn a_held_byte_with_a_holder_is_held_and_without_a_lock_it_is_free() {
        let (verdict, seen) =
            verdict_of(ImageSample { descriptors: vec![holds(42, "cwr/wr")], ..image("a", "cwr/wr") }, same);
        assert_eq!((verdict, seen.held(), seen.ownerless()), (Verdict::Held, access("cwr/wr"), Access::NONE));
        assert_eq!((seen.holders.len(), seen.holders[0].fd), (1, Some(14)));
        let (verdict, seen) = verdict_of(image("a", "-/-"), same);
        assert_eq!((verdict, seen.held()), (Verdict::Free, Access::NONE));
    }

    #[test]
    fn a_holder_that_came_after_the_question_counts() {
        let (verdict, seen) =
            verdict_of(ImageSample { descriptors: vec![holds(42, "c/w")], ..image("a", "-/-") }, same);
        assert_eq!((verdict, seen.held()), (Verdict::Held, access("c/w")));
    }

    #[test]
    fn a_missing_holder_is_told_by_what_could_be_seen() {
        let nobody = || image("a", "cw/w");
        assert_eq!(verdict_of(nobody(), same).0, Verdict::HeldByKernel);
        assert_eq!(verdict_of(nobody(), |s| s.hidden_processes = 1).0, Verdict::Unknown);
        assert_eq!(verdict_of(nobody(), |s| s.sees_all_processes = false).0, Verdict::Unknown);
        let unlisted = || ImageSample { table_rows: Arc::default(), ..nobody() };
        assert_eq!(verdict_of(unlisted(), same).0, Verdict::Unknown, "on a local file system both must agree");
        for (kind, reach) in [("nfs4", Reach::Remote), ("fuse.glusterfs", Reach::Fuse)] {
            let remote = ImageSample { mount: Some(mount(kind, reach)), ..unlisted() };
            let (verdict, seen) = verdict_of(remote.clone(), same);
            assert_eq!(verdict, Verdict::HeldElsewhere);
            assert!(seen.findings[0].text.contains("filer:/vol"), "{}", seen.findings[0].text);
            let with_hidden = if reach == Reach::Fuse { Verdict::Unknown } else { Verdict::HeldElsewhere };
            assert_eq!(verdict_of(remote, |s| s.hidden_processes = 3).0, with_hidden);
        }
    }

    #[test]
    fn where_a_fuse_server_keeps_the_locks_whoever_has_it_open_may_hold_them() {
        let opener = descriptor(43, 3, OpenMode::Write, Vec::new());
        let fuse = ImageSample {
            mount: Some(mount("fuse.glusterfs", Reach::Fuse)),
            table_rows: Arc::default(),
            descriptors: vec![opener],
            ..image("a", "cw/w")
        };
        let (verdict, seen) = verdict_of(fuse.clone(), same);
        assert_eq!((verdict, seen.openers.len()), (Verdict::Unknown, 1));
        let codes: Vec<&str> = seen.findings.iter().map(|f| f.code.as_str()).collect();
        assert_eq!(codes, ["holder-unknown"], "nobody can say that it writes without a lock");
        assert!(seen.findings[0].text.contains("dd 43"), "{}", seen.findings[0].text);
        // Where no byte is held, nobody holds a lock.
        let free = ImageSample { answer: image("a", "-/-").answer, ..fuse };
        assert_eq!(verdict_of(free, same).1.findings[0].code, "unlocked-writer");
    }

    #[test]
    fn a_pid_that_a_server_reports_is_its_word_and_no_process_here() {
        let mut foreign =
            ImageSample { mount: Some(mount("nfs4", Reach::Remote)), table_rows: Arc::default(), ..image("a", "cw/w") };
        let Answer::Bytes(found) = &mut foreign.answer else { panic!("no answer") };
        found.locks.push(LockFound { mode: LockMode::Read, start: 100, end: Some(101), pid: -42 });
        let (verdict, seen) = verdict_of(foreign, same);
        assert_eq!((verdict, seen.holders.len()), (Verdict::HeldElsewhere, 0));
        let text = &seen.findings[0].text;
        assert!(text.contains("names pid 42") && !text.contains("qemu-system-x86"), "{text}");
    }

    #[test]
    fn one_byte_without_a_holder_is_enough() {
        let partly = ImageSample { descriptors: vec![holds(42, "c/-")], ..image("a", "cw/-") };
        let (verdict, seen) = verdict_of(partly, same);
        assert_eq!((verdict, seen.ownerless()), (Verdict::HeldByKernel, access("w/-")));
    }

    #[test]
    fn what_was_not_answered_is_never_free() {
        for (answer, verdict) in [
            (Answer::CannotOpen(libc_eacces()), Verdict::Unknown),
            (Answer::CannotLock(libc_eacces()), Verdict::CannotLock),
            (Answer::Stalled(jiff::Timestamp::UNIX_EPOCH), Verdict::Stalled),
        ] {
            let mut sample = sample(vec![ImageSample { answer, ..image("a", "-/-") }], &[]);
            let snapshot = Snapshot::of(&sample);
            assert_eq!(snapshot.images[0].verdict, verdict);
            assert!(snapshot.images[0].bytes.iter().all(|b| b.state == ByteState::Unknown));
            assert!(!snapshot.complete && !verdict.is_certain());
            sample.images.clear();
            assert!(Snapshot::of(&sample).complete);
        }
    }

    fn libc_eacces() -> i32 {
        nix::errno::Errno::EACCES as i32
    }

    #[test]
    fn flock_leases_and_waiters_hold_no_byte() {
        let lines = ["FLOCK ADVISORY WRITE 42", "LEASE ACTIVE READ 42", "-> OFDLCK ADVISORY READ -1"];
        let locks = lines.map(|l| parse_line(&format!("1: {l} 08:01:7 0 EOF")).unwrap()).to_vec();
        let other = ImageSample { descriptors: vec![descriptor(42, 3, OpenMode::Read, locks)], ..image("a", "-/-") };
        let (verdict, seen) = verdict_of(other, same);
        assert_eq!((verdict, seen.holders.len(), seen.openers.len()), (Verdict::Free, 0, 1));
    }

    #[test]
    fn a_foreign_range_covers_bytes_and_is_told_apart() {
        let range = parse_line("1: OFDLCK ADVISORY WRITE -1 08:01:7 0 4095").unwrap();
        let locks = [vec![range], rows("c/-", "OFDLCK", -1)].concat();
        let mixed =
            ImageSample { descriptors: vec![descriptor(42, 3, OpenMode::Write, locks)], ..image("a", "cwurg/cwurg") };
        let (verdict, seen) = verdict_of(mixed, same);
        assert_eq!((verdict, seen.holders.len()), (Verdict::Held, 2));
        assert_eq!(seen.holders[0].access, access("c/-"));
        assert_eq!(seen.holders[1].foreign, Some(ForeignRange { start: 0, end: Some(4095), mode: LockMode::Write }));
        assert_eq!(seen.bytes[0].holders, [0, 1]);
        // Libvirt's bytes 0 and 1 lie beside the ten.
        let byte_0 = parse_line("1: POSIX ADVISORY WRITE 42 08:01:7 0 0").unwrap();
        let beside =
            ImageSample { descriptors: vec![descriptor(42, 3, OpenMode::Write, vec![byte_0])], ..image("a", "-/-") };
        let (verdict, seen) = verdict_of(beside, same);
        assert_eq!((verdict, seen.holders.len()), (Verdict::Free, 1));
    }

    #[test]
    fn a_posix_owner_is_named_by_the_table_where_it_cannot_be_read() {
        let rows = rows("c/-", "POSIX", 42);
        let (verdict, seen) =
            verdict_of(ImageSample { table_rows: rows.into(), ..image("a", "c/-") }, |s| s.hidden_processes = 1);
        assert_eq!(verdict, Verdict::Held);
        assert_eq!(
            (seen.holders[0].process.id.pid, seen.holders[0].fd, seen.holders[0].lock),
            (42, None, LockKind::Posix)
        );
    }

    #[test]
    fn a_reader_by_its_locks_that_may_write_is_told_and_a_writer_only_once() {
        let second = |access| {
            let descriptors = vec![holds(42, access), descriptor(42, 15, OpenMode::Write, Vec::new())];
            verdict_of(ImageSample { descriptors, ..image("a", access) }, same).1.openers.len()
        };
        assert_eq!((second("c/-"), second("cw/w")), (1, 0));
    }

    #[test]
    fn rows_that_may_be_about_another_file_accuse_nobody() {
        let doubtful =
            ImageSample { table_rows: rows("c/-", "POSIX", 42).into(), rows_certain: false, ..image("a", "-/-") };
        let (verdict, seen) = verdict_of(doubtful, same);
        assert_eq!((verdict, seen.holders.len(), seen.held()), (Verdict::Free, 0, Access::NONE));
    }

    #[test]
    fn a_writer_without_a_lock_is_a_danger_beside_others_and_a_warning_alone() {
        let writer = descriptor(43, 3, OpenMode::Write, Vec::new());
        let alone = ImageSample { descriptors: vec![writer.clone()], ..image("a", "-/-") };
        let (_, seen) = verdict_of(alone, same);
        assert_eq!(seen.findings[0].severity, crate::monitor::finding::Severity::Warning);
        let beside = ImageSample { descriptors: vec![writer, holds(42, "cw/w")], ..image("a", "cw/w") };
        let (_, seen) = verdict_of(beside, same);
        assert_eq!(
            (seen.findings[0].code.as_str(), seen.findings[0].severity),
            ("unlocked-writer", crate::monitor::finding::Severity::Danger)
        );
    }

    #[test]
    fn a_sample_that_is_written_down_gives_the_same_snapshot() {
        let taken = sample(
            vec![ImageSample { descriptors: vec![holds(42, "cwr/wr")], ..image("a", "cwr/wr") }],
            &[process(42, "qemu-system-x86", Some("web01"))],
        );
        let read_back: Sample = serde_json::from_str(&serde_json::to_string(&taken).unwrap()).unwrap();
        assert_eq!(Snapshot::of(&read_back), Snapshot::of(&taken));
    }
}
