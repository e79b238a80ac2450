//! Can a header lead the program astray? Guests and strangers write them.
//!
//! Cut, lying and circular headers are read, listed and explained; names in them lead to regular files and block devices
//! or nowhere: strace says what was opened, and how much of it was read.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/strace.rs"]
mod strace;
mod support;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use strace::Call;
use support::{Images, have, image, list, output, qlock_top};

const PROGRAM: &str = env!("CARGO_BIN_EXE_qlock-top");

/// Puts `bytes` into `head` at `offset`.
fn put(head: &mut [u8], offset: usize, bytes: &[u8]) {
    head[offset..offset + bytes.len()].copy_from_slice(bytes);
}

fn with(magic: &[u8], fields: &[(usize, &[u8])]) -> Vec<u8> {
    let mut head = vec![0; 4096];
    put(&mut head, 0, magic);
    for (offset, bytes) in fields {
        put(&mut head, *offset, bytes);
    }
    head
}

/// As much of a qcow2 as names its backing file.
fn qcow2(backing: &[u8]) -> Vec<u8> {
    let length = u32::try_from(backing.len()).unwrap().to_be_bytes();
    with(b"QFI\xfb\0\0\0\x03", &[(14, &1024u16.to_be_bytes()), (16, &length), (1024, backing)])
}

fn qed(backing: &[u8]) -> Vec<u8> {
    let length = u32::try_from(backing.len()).unwrap().to_le_bytes();
    with(b"QED\0", &[(16, &1u64.to_le_bytes()), (56, &1024u32.to_le_bytes()), (60, &length), (1024, backing)])
}

fn vmdk(parent: &[u8]) -> Vec<u8> {
    let text = [b"# Disk DescriptorFile\nparentFileNameHint=\"", parent, b"\"\n"].concat();
    with(b"KDMV\x01\0\0\0", &[(12, &2048u64.to_le_bytes()), (512, &text)])
}

/// One header of every format that is known, whole.
fn each_format() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("qcow2", qcow2(b"base")),
        ("qcow", with(b"QFI\xfb\0\0\0\x01", &[(24, &4096u64.to_be_bytes())])),
        ("qed", qed(b"base")),
        ("vmdk", vmdk(b"base")),
        ("vdi", with(b"<<< VDI >>>", &[(0x40, &0xbeda_107f_u32.to_le_bytes()), (0x170, &4096u64.to_le_bytes())])),
        ("vhdx", with(b"vhdxfile", &[])),
        ("vpc", with(b"conectix", &[(48, &4096u64.to_be_bytes())])),
        ("parallels", with(b"WithoutFreeSpace", &[(36, &8u64.to_le_bytes())])),
        ("luks", with(b"LUKS\xba\xbe\0\x01", &[])),
    ]
}

fn every(seen: &Value) -> &[Value] {
    seen["images"].as_array().unwrap()
}

#[test]
fn each_format_is_known_by_a_whole_header() {
    let images = Images::new();
    for (format, head) in each_format() {
        fs::write(images.path(format), head).unwrap();
    }
    let (seen, _) = list(images.dir());
    for (format, _) in each_format() {
        assert_eq!(image(&seen, &images.path(format))["format"], format);
    }
}

#[test]
fn a_header_that_is_cut_anywhere_is_listed_all_the_same() {
    let images = Images::new();
    for (format, head) in each_format() {
        for length in 0..=200 {
            fs::write(images.path(&format!("{format}-{length}")), &head[..length]).unwrap();
        }
    }
    let (seen, code) = list(images.dir());
    assert_eq!((every(&seen).len(), code), (each_format().len() * 201, 0));
    for image in every(&seen) {
        let name = image["path"].as_str().unwrap().rsplit('/').next().unwrap();
        let (format, length) = name.rsplit_once('-').unwrap();
        // The version stands behind the magic number that both versions share.
        let known = ["raw", format, if format == "qcow" { "qcow2" } else { format }];
        assert!(known.iter().any(|k| image["format"] == *k), "{image}");
        assert_eq!(image["verdict"], "free");
        assert_eq!(image["file_size"].to_string(), length);
        assert_eq!(image["backing_file"], Value::Null, "it lies behind the end: {image}");
    }
}

/// Headers whose numbers are as large, or as wrong, as they can be.
fn liars() -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for number in [u64::MAX, u64::MAX - 7, i64::MAX as u64, 1 << 63, 4096, 4095, 4090, 1] {
        let (big, little) = (number.to_be_bytes(), number.to_le_bytes());
        for size in [u32::MAX, i32::MAX as u32, 1 << 31, 1024, 1023, 8, 0] {
            let mut head = qcow2(b"base");
            put(&mut head, 8, &big);
            put(&mut head, 16, &size.to_be_bytes());
            put(&mut head, 24, &big);
            put(&mut head, 72, &big);
            put(&mut head, 100, &size.to_be_bytes());
            all.push(head.clone());
            put(&mut head, 100, &104u32.to_be_bytes());
            put(&mut head, 104, &[0xe2, 0x79, 0x2a, 0xca]);
            put(&mut head, 108, &size.to_be_bytes());
            all.push(head);
            let mut head = qed(b"base");
            put(&mut head, 48, &little);
            put(&mut head, 56, &little[..4]);
            put(&mut head, 60, &size.to_le_bytes());
            all.push(head);
        }
        all.push(with(b"KDMV\x01\0\0\0", &[(12, &little), (28, &little), (36, &little)]));
        all.push(with(b"", &[(0x40, &0xbeda_107f_u32.to_le_bytes()), (0x170, &little)]));
        all.push(with(b"conectix", &[(48, &big)]));
        all.push(with(b"WithoutFreeSpace", &[(36, &little)]));
    }
    // A name without an end, and extensions of no length up to the end.
    all.push(vmdk(&[b'x'; 3000])[..3000].to_vec());
    let mut extensions = qcow2(b"");
    put(&mut extensions, 100, &104u32.to_be_bytes());
    extensions[104..].fill(0x11);
    all.push(extensions);
    all
}

#[test]
fn no_length_and_no_offset_is_believed() {
    let images = Images::new();
    for (i, head) in liars().into_iter().enumerate() {
        fs::write(images.path(&format!("{i:03}")), head).unwrap();
    }
    let (seen, code) = list(images.dir());
    assert_eq!((every(&seen).len(), code), (liars().len(), 0));
    for image in every(&seen) {
        if let Some(name) = image["backing_file"].as_str() {
            // Bytes that are no UTF-8 are told as one character each at most.
            assert!((1..=1023).contains(&name.chars().count()), "{image}");
        }
        assert_eq!(image["verdict"], "free");
    }
    let table = output(qlock_top().arg("list").arg(images.dir()));
    assert_eq!(table.status.code(), Some(0));
    for (i, _) in liars().iter().enumerate().step_by(7) {
        let answer = output(qlock_top().arg("why").arg(images.path(&format!("{i:03}"))));
        assert!(matches!(answer.status.code(), Some(0 | 3)), "{i}: {}", String::from_utf8_lossy(&answer.stderr));
    }
}

/// What a header may name and QEMU may open, but a monitor must not: opening alone may block, or do something.
fn traps(images: &Images) -> Vec<String> {
    let fifo = images.path("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    std::os::unix::fs::symlink(&fifo, images.path("link-to-fifo")).unwrap();
    std::os::unix::fs::symlink("/dev/zero", images.path("link-to-device")).unwrap();
    std::os::unix::fs::symlink("itself", images.path("itself")).unwrap();
    fs::create_dir(images.path("directory")).unwrap();
    std::os::unix::net::UnixListener::bind(images.path("socket")).unwrap();
    let named = ["fifo", "link-to-fifo", "link-to-device", "itself", "directory", "socket"];
    let mut all: Vec<String> = named.iter().map(|n| (*n).to_owned()).collect();
    all.extend(named.iter().map(|n| images.path(n).to_str().unwrap().to_owned()));
    let elsewhere = [
        "json:{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"/etc/shadow\"}}",
        "nbd://127.0.0.1:1/x",
        "nbd:unix:/run/x.sock",
        "ssh://root@127.0.0.1/x",
        "https://127.0.0.1/x",
        "fat:rw:/tmp",
        "/dev/zero",
        "/dev/null",
        "/dev/tty",
        "/dev/ptmx",
        "/dev/random",
        "/proc/kmsg",
        "/proc/self/fd/0",
        "/",
        "..",
        ".",
        "",
        "file:",
        "file:/dev/zero",
        "\0",
        "a\0b",
        "\n",
    ];
    all.extend(elsewhere.map(str::to_owned));
    all
}

fn traced(log: &Path, arguments: &[&str], path: &Path) -> Vec<Call> {
    let mut command = Command::new("strace");
    command.args(strace::arguments(log)).arg(PROGRAM).args(arguments).arg(path);
    let output = output(command.stdin(Stdio::null()).env_remove("LD_LIBRARY_PATH"));
    assert!(output.status.code().is_some(), "{arguments:?} {path:?}: {:?}", output.status);
    strace::calls(log)
}

/// Whether a path is none of the program's own business: neither of the kernel's tables nor what it is made of.
fn is_about_an_image(path: &Path) -> bool {
    let own = ["/proc", "/sys", "/etc", "/lib", "/lib64", "/usr/lib", "/usr/share/zoneinfo"];
    !own.iter().any(|o| path.starts_with(o))
}

/// The first open of something that may be an image, or what a header named, that is not as it must be: of regular files
/// and block devices, for reading, never waiting; and of the directory that is listed.
fn wrong_open<'a>(calls: &'a [Call], listed: &Path) -> Option<&'a Call> {
    calls.iter().filter(|c| c.is_open()).find(|call| {
        let Some(path) = call.path().filter(|p| is_about_an_image(p)) else { return false };
        let flags = call.flags();
        let has = |flag| flags.contains(&flag);
        if has("O_DIRECTORY") {
            return path != listed;
        }
        // What is there, and not what it leads to: the program has resolved links before. O_PATH opens nothing: it only
        // takes hold of the name.
        let kind = fs::symlink_metadata(&path).map(|m| m.file_type());
        let is_image = kind.is_ok_and(|k| k.is_file() || std::os::unix::fs::FileTypeExt::is_block_device(&k));
        let careful = ["O_RDONLY", "O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_NOFOLLOW"];
        let well = has("O_PATH") || (is_image && careful.into_iter().all(has));
        !well
    })
}

#[test]
fn a_backing_file_that_is_no_image_is_never_opened() {
    if !have(&["strace"]) {
        return;
    }
    let (images, log) = (Images::new(), tempfile::NamedTempFile::new().unwrap());
    let top = images.path("top");
    let mut faults = Vec::new();
    for (at, trap) in traps(&images).iter().enumerate() {
        let head = if at % 2 == 0 { qcow2(trap.as_bytes()) } else { qed(trap.as_bytes()) };
        fs::write(&top, head).unwrap();
        let mut all = vec![&["hold", "--as", "vm", "--timeout", "1ms"][..]];
        if ["fifo", "/dev/ptmx"].contains(&trap.as_str()) {
            all.extend([&["list"][..], &["wait", "--as", "vm", "--timeout", "1ms"]]);
            all.push(&["why", "--as", "vm"]);
        }
        for arguments in all {
            if let Some(call) = wrong_open(&traced(log.path(), arguments, &top), images.dir()) {
                faults.push(format!("{arguments:?} {trap:?}: {}({}) = {}", call.name, call.arguments, call.result));
            }
        }
    }
    assert!(faults.is_empty(), "opened what is no image:\n{}", faults.join("\n"));
}

#[test]
fn a_directory_of_hostile_headers_costs_at_most_64_kib_a_file_and_opens_nothing_else() {
    if !have(&["strace"]) {
        return;
    }
    let (images, log) = (Images::new(), tempfile::NamedTempFile::new().unwrap());
    let write = |name: String, head: &[u8]| {
        let path = images.path(&name);
        fs::write(&path, head).unwrap();
        // Where there is more to read, more could be read.
        fs::File::options().write(true).open(path).unwrap().set_len(64 << 20).unwrap();
    };
    each_format().iter().for_each(|(format, head)| write(format!("format-{format}"), head));
    liars().iter().enumerate().for_each(|(i, head)| write(format!("liar-{i}"), head));
    traps(&images).iter().enumerate().for_each(|(i, trap)| write(format!("trap-{i}"), &qcow2(trap.as_bytes())));
    for arguments in [&["list"][..], &["list", "--format", "json"], &["list", "--recursive"]] {
        let calls = traced(log.path(), arguments, images.dir());
        let mut read: HashMap<PathBuf, u64> = HashMap::new();
        for call in &calls {
            let Some(path) = call.descriptor().map(PathBuf::from).filter(|p| p.starts_with(images.dir())) else {
                continue;
            };
            match call.name.as_str() {
                "read" | "pread64" => *read.entry(path).or_default() += call.result.parse::<u64>().unwrap(),
                "fcntl" | "statx" | "fstat" | "newfstatat" | "close" | "lseek" | "getdents64" => {}
                _ => panic!("{call:?}"),
            }
        }
        assert!(read.len() > 100, "{arguments:?}: {} files were read", read.len());
        let most = read.iter().max_by_key(|(_, n)| **n).unwrap();
        assert!(*most.1 <= 64 << 10, "{most:?}");
        assert!(!calls.iter().any(|c| c.name == "mmap" && c.arguments.contains(images.dir().to_str().unwrap())));
        let directory = images.path("directory");
        let recursive = arguments.contains(&"--recursive");
        let opens: Vec<Call> =
            calls.into_iter().filter(|c| !(recursive && c.path().as_ref() == Some(&directory))).collect();
        assert_eq!(wrong_open(&opens, images.dir()), None);
    }
}

/// Answers in words, and how each ended.
fn answers(path: &Path) -> Vec<(String, i32)> {
    let asked = [
        &["list"][..],
        &["why"],
        &["why", "--as", "vm"],
        &["why", "--as", "commit-into-backing", "--format", "json"],
        &["wait", "--as", "vm", "--timeout", "1ms"],
        &["hold", "--as", "vm", "--timeout", "1ms"],
    ];
    let say = |arguments: &[&str]| {
        let started = Instant::now();
        let output = output(qlock_top().args(arguments).arg(path));
        assert!(started.elapsed() < Duration::from_secs(10), "{arguments:?} took {:?}", started.elapsed());
        let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        assert!(!said.contains("panicked") && !said.is_empty() || arguments[0] == "wait", "{arguments:?}: {said}");
        (said, output.status.code().unwrap())
    };
    asked.map(say).into()
}

#[test]
fn a_circle_of_backing_files_has_an_end() {
    for length in 1..=3 {
        let images = Images::new();
        for i in 0..length {
            let next = format!("image-{}", (i + 1) % length);
            fs::write(images.path(&format!("image-{i}")), qcow2(next.as_bytes())).unwrap();
        }
        let (seen, code) = list(images.dir());
        assert_eq!((every(&seen).len(), code), (length, 0));
        for i in 0..length {
            for (said, status) in answers(&images.path(&format!("image-{i}"))) {
                assert!([0, 1, 2, 3, 124].contains(&status), "{status}: {said}");
            }
        }
        // QEMU opens no circle: nothing of the sort is ever granted.
        let why = output(qlock_top().args(["why", "--as", "vm"]).arg(images.path("image-0")));
        let said = String::from_utf8_lossy(&why.stdout).into_owned();
        assert!(!said.starts_with("granted"), "{length}: {said}");
    }
}

#[test]
fn a_name_that_leads_to_the_image_itself_by_another_way_is_a_circle_too() {
    let images = Images::new();
    let path = images.path("image");
    fs::hard_link(
        {
            fs::write(&path, qcow2(b"second-name")).unwrap();
            &path
        },
        images.path("second-name"),
    )
    .unwrap();
    std::os::unix::fs::symlink("image", images.path("link")).unwrap();
    for name in ["image", "second-name", "link"] {
        for (said, status) in answers(&images.path(name)) {
            assert!([0, 1, 2, 3, 124].contains(&status), "{status}: {said}");
        }
    }
}

#[test]
fn a_chain_a_thousand_deep_is_answered_in_good_time_and_nothing_unseen_is_granted() {
    let images = Images::new();
    for i in 0..1000 {
        fs::write(images.path(&format!("{i:04}")), qcow2(format!("{:04}", i + 1).as_bytes())).unwrap();
    }
    images.raw("1000");
    let started = Instant::now();
    let (seen, code) = list(images.dir());
    assert_eq!((every(&seen).len(), code), (1001, 0));
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    // Somebody writes to the very last one: no program that opens them all would be let in.
    let _held = qlock::hold::HeldAccess::acquire(&images.path("1000"), "cw/wr".parse().unwrap()).unwrap();
    let all = answers(&images.path("0000"));
    let (why, status) = &all[2];
    assert!(!why.starts_with("granted") && [1, 3].contains(status), "why --as vm: {status}: {why}");
    let (wait, status) = &all[4];
    assert!([3, 124].contains(status), "wait --as vm: {status}: {wait}");
    let (hold, status) = &all[5];
    assert!(*status != 0, "hold --as vm holds a part only and says so: {hold}");
}

#[test]
fn a_backing_file_outside_of_the_watched_directory_is_named_and_its_holder_counts_for_why() {
    let (images, elsewhere) = (Images::new(), Images::new());
    let base = elsewhere.raw("base.raw");
    let top = images.path("top.qcow2");
    fs::write(&top, qcow2(base.to_str().unwrap().as_bytes())).unwrap();
    let (seen, code) = list(images.dir());
    assert_eq!((every(&seen).len(), code), (1, 0));
    assert_eq!(image(&seen, &top)["backing_file"], base.to_str().unwrap());
    let _held = qlock::hold::HeldAccess::acquire(&base, "cw/wr".parse().unwrap()).unwrap();
    let why = output(qlock_top().args(["why", "--as", "vm"]).arg(&top));
    let said = String::from_utf8(why.stdout).unwrap();
    assert!(why.status.code() == Some(1) && said.contains(base.to_str().unwrap()), "{said}");
}
