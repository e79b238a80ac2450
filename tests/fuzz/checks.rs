//! What must hold of every parser, whatever it is given?
//!
//! One function a parser, used by the fuzz targets beside this file and by tests/parsers.rs, so that both check the same.
//! Each panics where something does not hold.
// Both who use this file are programs of their own.
#![allow(unreachable_pub)]

use std::path::Path;

use qlock::image::header::{Format, backing_path, parse};
use qlock::linux::descriptors::Fdinfo;
use qlock::linux::lock_table::{LockKind, LockMode, LockRecord, parse_line, parse_table};
use qlock::linux::process::{container, unit, vm_name};
use qlock::protocol::decode;
use qlock::text::is_treacherous;
use qlock::tui::filter::Filter;

/// QEMU refuses longer names of backing files.
const LONGEST_NAME: usize = 1023;

/// The first bytes of an image.
pub fn check_header(data: &[u8]) {
    for length in [data.len() as u64, 0, 4096, u64::MAX] {
        let (header, place) = parse(data, length);
        assert_eq!((&header, &place), (&parse(data, length).0, &parse(data, length).1), "the same twice");
        if let Some((offset, size)) = place {
            assert!((1..=LONGEST_NAME).contains(&size) && offset > 0, "{offset} {size}");
            assert!(offset.checked_add(size as u64).is_some_and(|end| end <= length), "inside of the file");
        }
        if let Some(name) = &header.backing_file {
            assert!((1..=LONGEST_NAME).contains(&name.chars().count()) && !name.contains('"'), "{name:?}");
        }
        assert!(header.backing_format.as_ref().is_none_or(|f| f.chars().count() <= 15));
        if header.format == Format::Raw {
            assert_eq!((header.virtual_size, &header.backing_file, place), (Some(length), &None, None));
        }
    }
    let name = String::from_utf8_lossy(data);
    let before_slash = name.split('/').next().unwrap_or_default();
    if let Some(path) = backing_path(Path::new("/images/top.qcow2"), &name) {
        assert!(path.is_absolute() && !name.is_empty());
        assert!(
            before_slash.split_once(':').is_none_or(|(protocol, _)| protocol == "file"),
            "no URL is a path: {name:?}"
        );
    }
    // A name that is really there is found where it stands.
    let name = &data[..data.len().min(LONGEST_NAME)];
    if !name.is_empty() {
        let mut image = vec![0; 1024];
        image[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        image[14..16].copy_from_slice(&1024u16.to_be_bytes());
        image[18..20].copy_from_slice(&(name.len() as u16).to_be_bytes());
        let (header, place) = parse(&image, 1024 + name.len() as u64);
        assert_eq!((header.format, place), (Format::Qcow2, Some((1024, name.len()))));
        assert_eq!(parse(&image, 1023 + name.len() as u64).1, None, "one byte short");
    }
}

/// As the kernel would print it (`lock_get_status` in fs/locks.c).
fn printed(record: &LockRecord) -> Option<String> {
    let kind = match record.kind {
        LockKind::Ofd => "OFDLCK",
        LockKind::Posix => "POSIX",
        LockKind::Flock => "FLOCK",
        LockKind::Lease => "LEASE",
        LockKind::Other => return None,
    };
    let mode = match record.mode {
        LockMode::Read => "READ",
        LockMode::Write => "WRITE",
        LockMode::Other => return None,
    };
    let file = match record.file {
        Some(file) => format!("{:02x}:{:02x}:{}", file.device.major, file.device.minor, file.inode),
        None => "<none>:0".to_owned(),
    };
    let end = record.end.map_or_else(|| "EOF".to_owned(), |e| e.to_string());
    let waiting = if record.waiting { "-> " } else { "" };
    Some(format!("1: {waiting}{kind} ADVISORY {mode} {} {file} {} {end}", record.pid, record.start))
}

/// The text of `/proc/locks`.
pub fn check_lock_lines(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let lines = parse_table(&text);
    let written = text.lines().filter(|l| !l.trim().is_empty()).count();
    assert_eq!(lines.records.len() + lines.bad_lines as usize, written, "every line is read or counted");
    for record in &lines.records {
        assert!(record.end.is_none_or(|end| end >= record.start), "{record:?}");
        assert!(record.covers(record.start) && record.end.is_none_or(|end| record.covers(end)));
        assert!(record.start == 0 || !record.covers(record.start - 1));
        assert!(record.end.is_none_or(|end| end == u64::MAX || !record.covers(end + 1)));
        assert!(!record.counts() || !record.waiting, "one who waits holds nothing");
        if let Some(line) = printed(record) {
            assert_eq!(parse_line(&line).as_ref(), Some(record), "{line}");
        }
    }
}

/// The text of `/proc/PID/fdinfo/FD`.
pub fn check_fdinfo(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let info = Fdinfo::parse(&text);
    let lock_lines: Vec<&str> = text.lines().filter_map(|l| l.strip_prefix("lock:")).collect();
    assert_eq!(
        info.locks.records.len() + info.locks.bad_lines as usize,
        lock_lines.len(),
        "every lock is read or counted"
    );
    let alone: Vec<LockRecord> = lock_lines.iter().filter_map(|l| parse_line(l)).collect();
    assert_eq!(info.locks.records, alone, "one parser for both files");
    // What a newer kernel adds changes nothing.
    assert_eq!(Fdinfo::parse(&format!("news:\t1\n{text}\nmore news\n")), info);
}

/// A command line, its arguments apart by zeros, and a cgroup path.
pub fn check_cmdline(data: &[u8]) {
    let arguments: Vec<String> = data.split(|b| *b == 0).map(|a| String::from_utf8_lossy(a).into_owned()).collect();
    if let Some(vm) = vm_name("comm", &arguments) {
        let program = arguments[0].rsplit('/').next().unwrap_or_default();
        assert!(!vm.is_empty() && (program.starts_with("qemu") || program == "kvm"), "{arguments:?}: {vm:?}");
    }
    assert_eq!(vm_name("cat", &[&["cat".to_owned()], arguments.as_slice()].concat()), None, "cat runs no VM");
    let text = String::from_utf8_lossy(data).into_owned();
    if !text.is_empty() {
        // A name is given with its commas doubled, and comes back as it is.
        let given = format!("guest={},debug-threads=on", text.replace(',', ",,"));
        let command = ["/usr/bin/qemu-system-x86_64", "-name", &given].map(str::to_owned);
        assert_eq!(vm_name("qemu-system-x86", &command).as_ref(), Some(&text));
    }
    if let Some(unit) = unit(&text) {
        assert!((unit.ends_with(".service") || unit.ends_with(".scope")) && !unit.contains('/'), "{unit:?}");
    }
    if let Some(container) = container(&text) {
        assert!(!container.is_empty() && !container.contains('/'), "{container:?}");
        if let Some((_, pod)) = container.split_once(" pod ").filter(|_| !container.starts_with("lxc ")) {
            assert!(pod.len() == 36 && pod.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-'), "{container:?}");
        }
    }
}

/// A pasted text.
pub fn check_decode(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let reports = decode(&text);
    assert!(reports.len() <= text.len() / 10, "no more messages than there is room for");
    for report in &reports {
        assert!(report.images.iter().all(|i| !i.is_empty() && i.len() <= 4096), "{report:?}");
        assert!(report.message.image.is_none() || report.message.image.as_ref() == report.images.first());
        assert!(report.domain.as_ref().is_none_or(|d| (1..=255).contains(&d.len())));
        assert!(report.message.errno.as_ref().is_none_or(|e| (1..=80).contains(&e.len())));
        assert!(report.program.as_ref().is_none_or(|p| p.starts_with("qemu-")));
    }
    // A whole message is found whatever stands before it, unless that hides it from a terminal as well.
    let before: String = text.chars().filter(|c| *c != '\x1b').take(10_000).collect();
    let message = "qemu-img: Could not open 'a.qcow2': Failed to get shared \"write\" lock\n\
                   Is another process using the image [/images/a.qcow2]?\n";
    let found = decode(&format!("{before}\n{message}"));
    assert!(found.iter().any(|r| r.images.iter().any(|i| i == "/images/a.qcow2")), "{before:?}: {found:?}");
}

/// What is typed or pasted as a filter.
pub fn check_filter(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let mut filter = Filter::default();
    filter.push(&text);
    assert!(filter.text().chars().count() <= 200 && !filter.text().chars().any(is_treacherous));
    assert!(filter.error().is_none_or(|e| !e.is_empty() && !e.chars().any(is_treacherous)), "{:?}", filter.error());
    assert_eq!(filter.is_active(), !filter.text().trim().is_empty());
    let mut typed = Filter::default();
    text.chars().for_each(|c| typed.push(c.encode_utf8(&mut [0; 4])));
    assert_eq!(typed, filter, "typed one by one it is the same");
    let mut again = Filter::default();
    again.push(filter.text());
    assert_eq!(again, filter, "what is shown is what is meant");
    let before = filter.text().chars().count();
    filter.pop();
    assert_eq!(filter.text().chars().count(), before.saturating_sub(1));
    while !filter.text().is_empty() {
        let before = filter.text().len();
        filter.pop_word();
        assert!(filter.text().len() < before, "{:?}", filter.text());
    }
    assert_eq!(filter, Filter::default());
}
