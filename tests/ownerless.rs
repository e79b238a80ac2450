//! Is a lock whose owner no process shows told as what it is, and never as somebody's who does not hold it?
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/everyone.rs"]
mod everyone;
#[path = "support/fuse.rs"]
mod fuse;
#[path = "support/places.rs"]
mod places;
#[path = "support/stream.rs"]
mod stream;
mod support;
#[path = "support/told.rs"]
mod told;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use everyone::{list, list_of, qlock_top};
use fuse::{Content, Foreign, Fuse, Mode, Setup};
use places::{LoopDevice, next_line, ready};
use qlock::hold::HeldAccess;
use qlock::linux::Roots;
use qlock::monitor::look::{Looker, Scope};
use qlock::monitor::sample::Sample;
use qlock::monitor::snapshot::{Image, Snapshot, Verdict};
use serde_json::Value;
use stream::Watch;
use support::{
    Images, access_of, am_root, bytes_of, have, holding, image, locked, output, python, qemu_io, tell, wait_for,
};

/// A pid that no process here has: the kernel gives out none above 4,194,304.
const NOBODY: u32 = 5_000_000;

/// Opens the image as `fd` and locks it as a raw VM does: `cw/w`.
const LOCK: &str = "
import array, ctypes, errno, fcntl, os, socket, struct, sys
fd = os.open(sys.argv[1], os.O_RDWR)
for start, length in ((100, 2), (201, 1)):
    fcntl.fcntl(fd, 37, struct.pack('hhqqi', fcntl.F_RDLCK, 0, start, length, 0))  # F_OFD_SETLK
";

fn locker(then: &str, path: &Path) -> Command {
    python(&format!("{LOCK}{then}"), &[path])
}

/// The finding of this code; fails if there is none.
fn finding<'a>(image: &'a Value, code: &str) -> &'a str {
    let findings = image["findings"].as_array().unwrap();
    let found = findings.iter().find(|f| f["code"] == code).unwrap_or_else(|| panic!("no {code}: {image:#}"));
    found["text"].as_str().unwrap()
}

fn has_finding(image: &Value, code: &str) -> bool {
    image["findings"].as_array().unwrap().iter().any(|f| f["code"] == code)
}

/// What is seen of a lock that no process has: the bytes, nobody who holds them, and this verdict and status.
fn assert_ownerless(path: &Path, bytes: &str, verdict: &str, status: i32) -> Value {
    let (snapshot, code) = list(path);
    let seen = image(&snapshot, path).clone();
    assert_eq!((seen["verdict"].as_str(), code), (Some(verdict), status), "{seen:#}");
    assert_eq!(bytes_of(&seen), bytes);
    assert_eq!(seen["holders"], serde_json::json!([]));
    seen
}

const INTO_LOOP: &str = "
control = os.open('/dev/loop-control', os.O_RDWR)
while True:
    device = f'/dev/loop{fcntl.ioctl(control, 0x4c82)}'  # LOOP_CTL_GET_FREE
    try:
        fcntl.ioctl(os.open(device, os.O_RDWR), 0x4c00, fd)  # LOOP_SET_FD
        break
    except OSError as e:
        if e.errno not in (errno.EBUSY, errno.ENXIO): raise
print(device)
";

/// A loop device that was given a description with locks by a program that has ended since.
fn locked_by_loop_device(path: &Path) -> LoopDevice {
    let out = output(&mut locker(INTO_LOOP, path));
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    LoopDevice(PathBuf::from(String::from_utf8(out.stdout).unwrap().trim()))
}

#[test]
fn a_loop_device_that_holds_the_locks_is_named() {
    if !am_root() || !have(&["python3", "losetup", "qemu-io", "qemu-system-x86_64"]) {
        return;
    }
    let images = Images::new();
    let path = images.raw("a.raw");
    let device = locked_by_loop_device(&path);
    let seen = assert_ownerless(&path, "cw/w", "held-by-kernel", 1);
    let text = finding(&seen, "held-by-kernel");
    assert!(text.contains(&format!("loop device {}", device.name())), "{text}");
    assert_eq!(seen["openers"], serde_json::json!([]));
    let answers = told::assert_told_as_predicted(&path, "raw", &["io", "io-read-only", "vm"]);
    assert_eq!(answers[0].0.as_deref(), Some("Failed to get \"write\" lock"));
    assert_eq!(answers[0].1["holders"], serde_json::json!([]));
    assert!(answers[0].1["advice"].as_str().unwrap().contains("loop device"), "{}", answers[0].1);

    drop(device);
    wait_for("the device to let go", || (locked(&path).to_string() == "-/-").then_some(()));
    assert_eq!(list(&path).1, 0);
}

#[test]
fn of_two_images_the_loop_device_holds_the_one_it_stands_on() {
    if !am_root() || !have(&["python3", "losetup"]) {
        return;
    }
    let images = Images::new();
    let (path, other, plain) = (images.raw("a.raw"), images.raw("b.raw"), images.raw("c.raw"));
    let device = locked_by_loop_device(&path);
    let unlocked = LoopDevice::on(&plain);
    let (_in_flight, _) = ready(&mut locker(IN_FLIGHT, &other));
    let (snapshot, _) = list(images.dir());
    let seen = |path: &Path| image(&snapshot, path).clone();
    assert!(finding(&seen(&path), "held-by-kernel").contains(device.name()));
    let text = finding(&seen(&other), "held-by-kernel").to_owned();
    assert!(!text.contains("loop") && text.contains("socket"), "{text}");
    assert_eq!(seen(&plain)["verdict"], "free");
    assert!(finding(&seen(&plain), "loop-device").contains(unlocked.name()));
}

const IN_FLIGHT: &str = "
ours, theirs = socket.socketpair()
ours.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [fd]))])
os.close(fd)
print(flush=True)
sys.stdin.readline()
_, [(_, _, taken)], _, _ = theirs.recvmsg(1, socket.CMSG_SPACE(4))
print(struct.unpack('i', taken)[0], flush=True)
sys.stdin.read()
";

#[test]
fn a_descriptor_in_flight_is_nobodys_and_its_receivers_when_it_arrives() {
    if !am_root() || !have(&["python3", "qemu-io"]) {
        return;
    }
    let images = Images::new();
    let path = images.raw("a.raw");
    let (mut sender, _) = ready(&mut locker(IN_FLIGHT, &path));
    let seen = assert_ownerless(&path, "cw/w", "held-by-kernel", 1);
    assert!(finding(&seen, "held-by-kernel").contains("in flight in a unix socket"), "{seen:#}");
    told::assert_told_as_predicted(&path, "raw", &["io"]);

    let watch = Watch::start(&[images.dir()], "200ms");
    assert_eq!(image(&watch.first["snapshot"], &path)["verdict"], "held-by-kernel");
    tell(&mut sender, "\n");
    let fd: i64 = next_line(&mut sender).trim().parse().unwrap();
    let taken = watch.event("the receiver", |e| e["kind"] == "acquired" && e["pid"] == sender.pid());
    assert_eq!((taken["fd"].as_i64(), access_of(&taken).as_str()), (Some(fd), "cw/w"));
    let (snapshot, _) = list(&path);
    let seen = image(&snapshot, &path);
    assert_eq!((seen["verdict"].as_str(), seen["holders"].as_array().unwrap().len()), (Some("held"), 1));
}

/// As Python's own `mmap` keeps a descriptor, the C library's is called.
const MAPPED: &str = "
mmap = ctypes.CDLL(None, use_errno=True).mmap
mmap.restype = ctypes.c_void_p
mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
assert mmap(None, 4096, 1, 1, fd, 0) not in (None, ctypes.c_void_p(-1).value)  # PROT_READ, MAP_SHARED
os.close(fd)
print(flush=True)
sys.stdin.read()
";

#[test]
fn a_file_that_is_closed_but_mapped_is_held_by_the_kernel() {
    if !am_root() || !have(&["python3", "qemu-io"]) {
        return;
    }
    let images = Images::new();
    let path = images.raw("a.raw");
    let (mapper, _) = ready(&mut locker(MAPPED, &path));
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", mapper.pid())).unwrap();
    assert!(maps.contains("a.raw"), "{maps}");
    let seen = assert_ownerless(&path, "cw/w", "held-by-kernel", 1);
    assert!(finding(&seen, "held-by-kernel").contains("mapped still"), "{seen:#}");
    told::assert_told_as_predicted(&path, "raw", &["io"]);
    mapper.end();
    assert_eq!(list(&path).1, 0);
}

#[test]
fn a_mapping_and_a_descriptor_in_flight_are_told_apart() {
    if !am_root() || !have(&["python3"]) {
        return;
    }
    let images = Images::new();
    let (mapped, in_flight) = (images.raw("mapped.raw"), images.raw("in-flight.raw"));
    let (mapper, _) = ready(&mut locker(MAPPED, &mapped));
    let (_sender, _) = ready(&mut locker(IN_FLIGHT, &in_flight));
    let (snapshot, _) = list(images.dir());
    let told = |path| finding(image(&snapshot, path), "held-by-kernel").to_owned();
    // `/proc/PID/map_files` tells who has it mapped.
    assert!(told(&mapped).contains(&format!("python3 {}", mapper.pid())), "{}", told(&mapped));
    assert!(told(&in_flight).contains("socket") && !told(&in_flight).contains("mapping"), "{}", told(&in_flight));
}

#[test]
fn who_only_has_it_mapped_or_a_loop_device_on_it_is_never_said_to_hold_the_lock() {
    if !am_root() || !have(&["python3", "losetup"]) {
        return;
    }
    let images = Images::new();
    let (mapped, under_loop) = (images.raw("mapped.raw"), images.raw("under-loop.raw"));
    let opened = "import ctypes, os, sys\nfd = os.open(sys.argv[1], os.O_RDONLY)";
    let (innocent, _) = ready(&mut python(&format!("{opened}{MAPPED}"), &[&mapped]));
    let device = LoopDevice::on(&under_loop);
    let _lockers = [&mapped, &under_loop].map(|path| ready(&mut locker(IN_FLIGHT, path)));
    let (snapshot, _) = list(images.dir());
    let text = |path| finding(image(&snapshot, path), "held-by-kernel").to_owned();
    let told = text(&mapped);
    assert!(told.contains(&format!("python3 {}", innocent.pid())) && told.contains("may be the one"), "{told}");
    assert!(told.contains("or a descriptor is in flight"), "{told}");
    let told = text(&under_loop);
    assert!(told.contains(&format!("most likely loop device {}", device.name())), "{told}");
    for path in [&mapped, &under_loop] {
        assert_eq!(image(&snapshot, path)["holders"], serde_json::json!([]));
    }
}

/// What is made of a sample's only image on a host where every process can be read.
fn understood(sample: Sample) -> Image {
    let sample = Sample { hidden_processes: 0, sees_all_processes: true, ..sample };
    Snapshot::of(&sample).images.remove(0)
}

#[test]
fn a_search_that_takes_long_goes_on_aside_and_nobody_is_ruled_out_before_it_is_over() {
    if !have(&["python3"]) {
        return;
    }
    let images = Images::new();
    let (mapped, in_flight) = (images.raw("mapped.raw"), images.raw("in-flight.raw"));
    let (mapper, _) = ready(&mut locker(MAPPED, &mapped));
    let (mut sender, _) = ready(&mut locker(IN_FLIGHT, &in_flight));
    let text = |image: &Image| image.findings.first().map(|f| f.text.clone()).unwrap_or_default();
    let searched = |path: &Path| {
        let mut looker = Looker::new(Roots::host(), &[path.to_owned()], false, None).unwrap();
        let (wake, woken) = mpsc::channel();
        looker.search_aside(Duration::ZERO, move || wake.send(()).unwrap_or_default());
        let first = understood(looker.look(Scope::Everything));
        assert_eq!((first.verdict, first.holders.len()), (Verdict::Unknown, 0));
        assert!(text(&first).contains("still being searched"), "{}", text(&first));
        // Whoever joins meanwhile is found as ever.
        let ours = HeldAccess::acquire(path, "c/-".parse().unwrap()).unwrap();
        let joined = understood(looker.look(Scope::Everything));
        let joined: Vec<u32> = joined.holders.iter().map(|h| h.process.id.pid.unsigned_abs()).collect();
        assert_eq!(joined, [std::process::id()]);
        drop(ours);
        let seen = wait_for("the end of the search", || {
            // Looks that come meanwhile neither wait for it nor know better.
            let meanwhile = understood(looker.look(Scope::Everything));
            assert_eq!((meanwhile.verdict, meanwhile.held()), (Verdict::Unknown, first.held()));
            looker.hint();
            woken.recv_timeout(Duration::from_millis(50)).ok()?;
            looker.take_search().map(understood).filter(|i| i.verdict != Verdict::Unknown)
        });
        (looker, seen)
    };
    let (_, seen) = searched(&mapped);
    assert_eq!(seen.verdict, Verdict::HeldByKernel);
    assert!(text(&seen).contains(&format!("python3 {}", mapper.pid())), "{}", text(&seen));
    let (mut looker, seen) = searched(&in_flight);
    assert_eq!(seen.verdict, Verdict::HeldByKernel);
    assert!(text(&seen).contains("in flight"), "{}", text(&seen));
    tell(&mut sender, "\n");
    next_line(&mut sender);
    let held = |i: Image| (i.verdict == Verdict::Held).then_some(());
    wait_for("the receiver", || held(understood(looker.look(Scope::Everything))));
}

/// `list` as the first process of a new pid namespace, as in a container: it sees nobody but itself.
fn list_alone(path: &Path) -> (Value, i32) {
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--mount-proc"]).arg(env!("CARGO_BIN_EXE_qlock-top"));
    let out = output(command.args(["list", "--format", "json"]).arg(path));
    let errors = String::from_utf8_lossy(&out.stderr);
    (serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{e}: {errors}")), out.status.code().unwrap())
}

#[test]
fn who_holds_it_outside_the_pid_namespace_is_unknown_and_the_bytes_are_right() {
    if !am_root() || !have(&["unshare", "qemu-io", "qemu-img"]) {
        return;
    }
    let images = Images::new();
    let (held, free) = (images.qcow2("a.qcow2"), images.raw("free.raw"));
    let holder = holding(&mut qemu_io(&["-f", "qcow2"], &held), &held, "cwr/wr");
    let (snapshot, code) = list_alone(images.dir());
    assert_eq!((code, snapshot["complete"].as_bool()), (3, Some(false)));
    let seen = image(&snapshot, &held);
    assert_eq!((seen["verdict"].as_str(), bytes_of(seen).as_str()), (Some("unknown"), "cwr/wr"));
    assert_eq!((&seen["holders"], &seen["openers"]), (&serde_json::json!([]), &serde_json::json!([])));
    let text = finding(seen, "holder-unknown");
    assert!(text.contains("pid namespace") && !text.contains(&holder.pid().to_string()), "{text}");
    assert_eq!(image(&snapshot, &free)["verdict"], "free");

    let mut why = Command::new("unshare");
    why.args(["--pid", "--fork", "--mount-proc"]).arg(env!("CARGO_BIN_EXE_qlock-top"));
    let out = output(why.args(["why", "--as", "io"]).arg(&held));
    let text = String::from_utf8(out.stdout).unwrap();
    assert_eq!(out.status.code(), Some(1), "{text}");
    assert!(text.contains("Failed to get \"write\" lock") && text.contains("cannot be named"), "{text}");
}

#[test]
fn a_posix_lock_from_outside_the_pid_namespace_is_never_given_to_somebody_inside() {
    if !am_root() || !have(&["unshare", "python3"]) {
        return;
    }
    let images = Images::new();
    let path = images.raw("a.raw");
    let script = "import fcntl, sys; f = open(sys.argv[1], 'r+b'); fcntl.lockf(f, fcntl.LOCK_SH, 1, 100); \
                  print(flush=True); sys.stdin.read()";
    let (holder, _) = ready(&mut python(script, &[&path]));
    let (snapshot, code) = list_alone(&path);
    let seen = image(&snapshot, &path);
    assert_eq!((seen["verdict"].as_str(), bytes_of(seen).as_str(), code), (Some("unknown"), "c/-", 3));
    assert_eq!((&seen["holders"], &seen["openers"]), (&serde_json::json!([]), &serde_json::json!([])));
    let text = finding(seen, "holder-unknown");
    assert!(text.contains("pid namespace"), "{text}");
    // From outside it is somebody.
    let (snapshot, code) = list(&path);
    let seen = image(&snapshot, &path);
    assert_eq!((seen["holders"][0]["pid"].as_i64(), code), (Some(holder.pid().into()), 1));
}

#[test]
fn who_holds_it_inside_another_pid_namespace_is_named_by_the_pid_it_has_here() {
    if !am_root() || !have(&["unshare", "python3"]) {
        return;
    }
    let images = Images::new();
    let path = images.raw("a.raw");
    // One lock of each kind; from within, its pid is 1.
    let script = "import fcntl, os, struct, sys\n\
                  f = open(sys.argv[1], 'r+b'); fcntl.lockf(f, fcntl.LOCK_SH, 1, 100)\n\
                  fd = os.open(sys.argv[1], os.O_RDWR)\n\
                  fcntl.fcntl(fd, 37, struct.pack('hhqqi', fcntl.F_RDLCK, 0, 101, 1, 0))\n\
                  print(os.getpid(), flush=True); sys.stdin.read()";
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--kill-child", "python3", "-c", script]).arg(&path);
    let (unshare, within) = ready(&mut command);
    assert_eq!(within, "1");
    let children = format!("/proc/{0}/task/{0}/children", unshare.pid());
    let pid: i64 = std::fs::read_to_string(children).unwrap().trim().parse().unwrap();
    let (snapshot, code) = list(&path);
    let seen = image(&snapshot, &path);
    assert_eq!((seen["verdict"].as_str(), bytes_of(seen).as_str(), code), (Some("held"), "cw/-", 1));
    let of = |h: &Value| (h["pid"].as_i64().unwrap(), h["lock"].as_str().unwrap().to_owned(), access_of(h));
    let mut holders: Vec<_> = seen["holders"].as_array().unwrap().iter().map(of).collect();
    holders.sort();
    let expected = [("ofd", "w/-"), ("posix", "c/-")].map(|(kind, a)| (pid, kind.to_owned(), access(a)));
    assert_eq!(holders, expected, "{seen:#}");
}

/// Short notation as it is written out.
fn access(text: &str) -> String {
    let access: qlock::protocol::Access = text.parse().unwrap();
    access.to_string()
}

const RAW: &[(&str, Content<'_>)] = &[("a.raw", Content::Size(1 << 20))];

/// What a VM on another host holds of a raw image: `cw/w`.
fn vm_elsewhere(pid: u32) -> [Foreign<'static>; 2] {
    let lock = |start, end| Foreign { name: "a.raw", mode: Mode::Read, start, end, pid };
    [lock(100, 101), lock(201, 201)]
}

/// Checks what is told of an image that a VM on another host holds; gives the words.
fn assert_elsewhere(path: &Path, pid: u32) -> String {
    let seen = assert_ownerless(path, "cw/w", "held-elsewhere", 1);
    let text = finding(&seen, "held-elsewhere").to_owned();
    assert!(text.contains("not on this host") && text.contains("fuse.testnfs filer:/vol"), "{text}");
    assert!(text.contains(&format!("its server names pid {pid} there")), "{text}");
    assert_eq!(seen["findings"].as_array().unwrap().len(), 1, "{seen:#}");
    text
}

#[test]
fn a_holder_on_another_host_is_told_with_the_server_and_its_word() {
    if !fuse::possible() || !have(&["qemu-io", "qemu-system-x86_64"]) {
        return;
    }
    let fuse = Fuse::mount("filer:/vol", RAW, &vm_elsewhere(77));
    let path = fuse.path("a.raw");
    assert_elsewhere(&path, 77);
    let answers = told::assert_told_as_predicted(&path, "raw", &["io", "vm"]);
    for (sentence, answer) in answers {
        assert_eq!(sentence.as_deref(), Some("Failed to get \"write\" lock"));
        assert_eq!(answer["holders"], serde_json::json!([]));
        let advice = answer["advice"].as_str().unwrap();
        assert!(advice.contains("another host") && advice.contains("filer:/vol"), "{advice}");
    }
    let table = String::from_utf8(output(qlock_top().arg("list").arg(&path)).stdout).unwrap();
    assert!(table.contains("held elsewhere") && table.contains("filer:/vol"), "{table}");
}

#[test]
fn a_pid_that_the_server_names_is_no_process_here_even_if_there_is_one() {
    if !fuse::possible() || !have(&["qemu-io"]) {
        return;
    }
    let images = Images::new();
    let near = images.raw("near.raw");
    // One that has nothing to do with images, and one that holds another.
    let innocent = holding(&mut qemu_io(&["-f", "raw"], &near), &near, "cw/-");
    let mut fuse = Fuse::mount("filer:/vol", RAW, &[]);
    let path = fuse.path("a.raw");
    for pid in [std::process::id(), innocent.pid().cast_unsigned(), 1] {
        vm_elsewhere(pid).into_iter().for_each(|lock| fuse.lock(lock));
        let (snapshot, _) = list_of(&[images.dir(), fuse.dir()]);
        let seen = image(&snapshot, &path);
        assert_eq!(seen["verdict"], "held-elsewhere", "{seen:#}");
        assert_eq!((&seen["holders"], &seen["openers"]), (&serde_json::json!([]), &serde_json::json!([])));
        assert!(!finding(seen, "held-elsewhere").contains("qemu-io"), "{seen:#}");
        if pid > 1 {
            assert_elsewhere(&path, pid);
        }
        let near = image(&snapshot, &near);
        assert_eq!((near["verdict"].as_str(), near["holders"].as_array().unwrap().len()), (Some("held"), 1));
        let text = String::from_utf8(output(qlock_top().args(["why", "--as", "io"]).arg(&path)).stdout).unwrap();
        assert!(text.contains("cannot be named") && !text.contains("kill"), "{text}");
        fuse.unlock("a.raw");
    }
}

#[test]
fn the_end_of_a_lock_on_another_host_is_told_and_by_nobodys_name() {
    if !fuse::possible() {
        return;
    }
    let mut fuse = Fuse::mount("filer:/vol", RAW, &[]);
    let path = fuse.path("a.raw");
    let watch = Watch::start(&[fuse.dir()], "100ms");
    vm_elsewhere(std::process::id()).into_iter().for_each(|lock| fuse.lock(lock));
    // Two locks may be seen one after the other.
    let all = access("cw/w");
    for kind in ["acquired", "released"] {
        let mut seen = qlock::protocol::Access::NONE;
        while seen.to_string() != all {
            let event = watch.event(kind, |e| e["kind"] == kind && e["image"] == path.to_str().unwrap());
            assert!(event["pid"].is_null() && event["command"].is_null(), "{event}");
            seen = seen.union(access_of(&event).parse().unwrap());
        }
        fuse.unlock("a.raw");
    }
}

#[test]
fn where_a_server_keeps_the_locks_of_this_host_too_nobody_is_accused_of_having_none() {
    if !fuse::possible() || !have(&["qemu-io", "qemu-img", "qemu-system-x86_64"]) {
        return;
    }
    let images = Images::new();
    let bytes = std::fs::read(images.qcow2("a.qcow2")).unwrap();
    let fuse = Fuse::mount("filer:/vol", &[("a.qcow2", Content::Bytes(&bytes))], &[]);
    let path = fuse.path("a.qcow2");
    let holder = holding(&mut qemu_io(&["-f", "qcow2"], &path), &path, "cwr/wr");
    let (snapshot, code) = list(&path);
    let seen = image(&snapshot, &path);
    assert_eq!((seen["verdict"].as_str(), bytes_of(seen).as_str(), code), (Some("unknown"), "cwr/wr", 3));
    // GETLK gave its pid, and it is right; but it is the word of a server, and the process shows no lock.
    assert_eq!(seen["holders"], serde_json::json!([]));
    let opener = &seen["openers"][0];
    assert_eq!((opener["pid"].as_i64(), opener["mode"].as_str()), (Some(holder.pid().into()), Some("write")));
    let text = finding(seen, "holder-unknown");
    assert!(text.contains("fuse.testnfs filer:/vol keeps the locks"), "{text}");
    assert!(text.contains(&format!("qemu-io {} has it open", holder.pid())), "{text}");
    assert!(!has_finding(seen, "unlocked-writer"), "{seen:#}");
    let answers = told::assert_told_as_predicted(&path, "qcow2", &["io", "io-read-only", "vm"]);
    assert_eq!(answers[0].0.as_deref(), Some("Failed to get \"write\" lock"));
    assert_eq!(answers[1].0.as_deref(), Some("Failed to get shared \"write\" lock"));
    holder.end();
    wait_for("the server to hear of the end", || (list(&path).1 == 0).then_some(()));
}

#[test]
fn where_somebody_here_and_somebody_elsewhere_may_hold_it_neither_is_ruled_out() {
    if !fuse::possible() || !have(&["python3"]) {
        return;
    }
    let fuse = Fuse::mount("filer:/vol", RAW, &vm_elsewhere(NOBODY));
    let path = fuse.path("a.raw");
    let script = "import sys; f = open(sys.argv[1], 'rb'); print(flush=True); sys.stdin.read()";
    let (reader, _) = ready(&mut python(script, &[&path]));
    let (snapshot, code) = list(&path);
    let seen = image(&snapshot, &path);
    assert_eq!((seen["verdict"].as_str(), code), (Some("unknown"), 3));
    let text = finding(seen, "holder-unknown");
    assert!(text.contains(&format!("python3 {}", reader.pid())) && text.contains("other hosts"), "{text}");
    reader.end();
    wait_for("the reader's end", || {
        let (snapshot, _) = list(&path);
        (image(&snapshot, &path)["verdict"] == "held-elsewhere").then_some(())
    });
}

#[test]
fn a_fuse_server_that_leaves_the_locks_to_the_kernel_hides_nobody() {
    if !fuse::possible() || !have(&["qemu-io"]) {
        return;
    }
    let setup = Setup { locking: fuse::Locking::Kernel, kind: "sshfs", ..Setup::default() };
    let fuse = Fuse::mount_as(&setup, RAW, &[]);
    let path = fuse.path("a.raw");
    let holder = holding(&mut qemu_io(&["-f", "raw"], &path), &path, "cw/-");
    let (snapshot, code) = list(&path);
    let seen = image(&snapshot, &path);
    assert_eq!((seen["verdict"].as_str(), bytes_of(seen).as_str(), code), (Some("held"), "cw/-", 1));
    assert_eq!(seen["holders"][0]["pid"].as_i64(), Some(holder.pid().into()));
}
