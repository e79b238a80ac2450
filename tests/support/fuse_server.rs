//! How does the file server of the tests answer the kernel, and the orders that it gets from the tests?

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::SystemTime;

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig,
    LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry,
    ReplyLock, ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow, WriteFlags,
};
use nix::libc;

use super::*;

/// The server, where the environment says so; no test otherwise.
#[test]
fn server() {
    let Ok(orders) = std::env::var(ORDERS) else { return };
    // Should the tests die while it is stopped, it goes on, sees the end of its input and unmounts.
    nix::sys::prctl::set_pdeathsig(Signal::SIGCONT).unwrap();
    let orders: Orders = serde_json::from_str(&orders).unwrap();
    let state = Arc::new(Mutex::new(State::default()));
    let served = Served { state: state.clone(), locking: orders.locking, remembered: orders.remembered };
    let mut config = fuser::Config::default();
    let subtype = format!("subtype={}", orders.kind);
    config.mount_options = vec![MountOption::FSName(orders.source), MountOption::CUSTOM(subtype)];
    let session = fuser::spawn_mount(served, &orders.point, &config).unwrap();
    // The test runner does not end its line before a test.
    println!("\nready");
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let words: Vec<&str> = line.split(' ').collect();
        match state.lock().unwrap().obey(&words) {
            Some(answer) => println!("ok {answer}"),
            None => println!("what is {line}?"),
        }
    }
    unmount(&orders.point);
    let _ = std::fs::remove_dir(&orders.point);
    drop(session);
    std::process::exit(0);
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Owner {
    /// A process or open file description of this kernel; which of the two, it does not say.
    Here(LockOwner),
    Elsewhere,
}

#[derive(Clone, Copy)]
struct Held {
    inode: u64,
    owner: Owner,
    /// The open file that it was set through; 0 for those elsewhere.
    handle: u64,
    mode: Mode,
    start: u64,
    end: u64,
    pid: u32,
}

#[derive(Default)]
struct State {
    names: BTreeMap<OsString, u64>,
    /// By inode; 1 is the directory. Kept when unlinked: it may still be open.
    files: BTreeMap<u64, Stored>,
    handles: u64,
    locks: Vec<Held>,
    /// Who waits (`F_SETLKW`).
    waiting: Vec<(Held, ReplyEmpty)>,
    getlk_fails: Option<Errno>,
    setlk_fails: Option<Errno>,
    requests: Vec<String>,
}

struct Stored {
    data: File,
    mode: u32,
    changed: SystemTime,
}

impl State {
    /// Carries out a line of the test's; `None`: not understood, or no such file.
    fn obey(&mut self, words: &[&str]) -> Option<String> {
        match *words {
            ["lock", name, mode, start, end, pid] => {
                let mode = if mode == "write" { Mode::Write } else { Mode::Read };
                let (start, end, pid) = (start.parse().ok()?, end.parse().ok()?, pid.parse().ok()?);
                let inode = *self.names.get(OsStr::new(name))?;
                self.locks.push(Held { inode, owner: Owner::Elsewhere, handle: 0, mode, start, end, pid });
            }
            ["unlock", name] => {
                let inode = *self.names.get(OsStr::new(name))?;
                self.drop_locks(|l| l.inode == inode && l.owner == Owner::Elsewhere);
            }
            ["fail", getlk, setlk] => {
                let errno = |number: &str| Some(number.parse().ok()?).map(|n| (n != 0).then(|| Errno::from_i32(n)));
                (self.getlk_fails, self.setlk_fails) = (errno(getlk)?, errno(setlk)?);
            }
            ["requests"] => return Some(std::mem::take(&mut self.requests).join(";")),
            _ => return None,
        }
        Some(String::new())
    }

    fn note(&mut self, what: &str, inode: u64, rest: &str) {
        let name = self.names.iter().find(|(_, i)| **i == inode).map(|(n, _)| n.to_string_lossy());
        let line = format!("{what} {} {rest}", name.unwrap_or("-".into()));
        self.requests.push(line);
    }

    fn attributes(&self, inode: u64) -> Result<FileAttr, Errno> {
        let mut found = FileAttr {
            ino: INodeNo(inode),
            size: 0,
            blocks: 0,
            atime: SystemTime::UNIX_EPOCH,
            mtime: SystemTime::UNIX_EPOCH,
            ctime: SystemTime::UNIX_EPOCH,
            crtime: SystemTime::UNIX_EPOCH,
            kind: FileType::Directory,
            perm: 0o755,
            nlink: 2,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        };
        if inode != INodeNo::ROOT.0 {
            let stored = self.files.get(&inode).ok_or(Errno::ENOENT)?;
            let data = stored.data.metadata()?;
            (found.size, found.blocks, found.kind) = (data.len(), data.blocks(), FileType::RegularFile);
            (found.atime, found.mtime, found.ctime) = (stored.changed, stored.changed, stored.changed);
            found.perm = (stored.mode & 0o7777) as u16;
            found.nlink = u32::from(self.names.values().any(|i| *i == inode));
        }
        Ok(found)
    }

    fn find(&self, parent: INodeNo, name: &OsStr) -> Result<u64, Errno> {
        if parent != INodeNo::ROOT {
            return Err(Errno::ENOTDIR);
        }
        self.names.get(name).copied().ok_or(Errno::ENOENT)
    }

    fn create(&mut self, name: &OsStr, mode: u32) -> Result<u64, Errno> {
        let data = rustix::fs::memfd_create("stored", rustix::fs::MemfdFlags::CLOEXEC).map_err(std::io::Error::from)?;
        let inode = self.files.last_key_value().map_or(INodeNo::ROOT.0, |(last, _)| *last) + 1;
        self.files.insert(inode, Stored { data: data.into(), mode, changed: SystemTime::now() });
        self.names.insert(name.to_owned(), inode);
        Ok(inode)
    }

    /// The file, about to be changed.
    fn change(&mut self, inode: u64) -> Result<&mut Stored, Errno> {
        let stored = self.files.get_mut(&inode).ok_or(Errno::ENOENT)?;
        stored.changed = SystemTime::now();
        Ok(stored)
    }

    fn new_handle(&mut self) -> FileHandle {
        self.handles += 1;
        FileHandle(self.handles)
    }

    /// The first lock of somebody else that stands in the way.
    fn in_the_way(&self, wanted: &Held) -> Option<Held> {
        let conflicts = |l: &&Held| {
            l.inode == wanted.inode
                && l.owner != wanted.owner
                && (l.start <= wanted.end && wanted.start <= l.end)
                && (l.mode == Mode::Write || wanted.mode == Mode::Write)
        };
        self.locks.iter().find(conflicts).copied()
    }

    /// Gives up what the owner holds of this range.
    fn cut(&mut self, range: &Held) {
        let mut left = Vec::new();
        for lock in std::mem::take(&mut self.locks) {
            let same = lock.inode == range.inode && lock.owner == range.owner;
            if !same || lock.end < range.start || range.end < lock.start {
                left.push(lock);
                continue;
            }
            if lock.start < range.start {
                left.push(Held { end: range.start - 1, ..lock });
            }
            if lock.end > range.end {
                left.push(Held { start: range.end + 1, ..lock });
            }
        }
        self.locks = left;
    }

    fn drop_locks(&mut self, which: impl Fn(&Held) -> bool) {
        self.locks.retain(|l| !which(l));
        self.grant_waiting();
    }

    /// After something was given up.
    fn grant_waiting(&mut self) {
        for (wanted, reply) in std::mem::take(&mut self.waiting) {
            if self.in_the_way(&wanted).is_some() {
                self.waiting.push((wanted, reply));
            } else {
                self.cut(&wanted);
                self.locks.push(wanted);
                reply.ok();
            }
        }
    }
}

/// The file system as the kernel asks for it.
struct Served {
    state: Arc<Mutex<State>>,
    locking: Locking,
    remembered: Duration,
}

impl Served {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

/// Hands over a value, or the error.
macro_rules! answer {
    ($reply:ident, $result:expr, $value:pat => $ok:expr) => {
        match $result {
            Ok($value) => $ok,
            Err(errno) => $reply.error(errno),
        }
    };
}

impl Filesystem for Served {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        if self.locking == Locking::Server {
            let missing = |flags| std::io::Error::other(format!("the kernel cannot: {flags:?}"));
            config.add_capabilities(InitFlags::FUSE_POSIX_LOCKS).map_err(missing)?;
        }
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let state = self.state();
        let found = state.find(parent, name).and_then(|inode| state.attributes(inode));
        answer!(reply, found, attributes => reply.entry(&self.remembered, &attributes, Generation(0)));
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        answer!(reply, self.state().attributes(inode.0), attributes => reply.attr(&self.remembered, &attributes));
    }

    fn setattr(
        &self,
        _: &Request,
        inode: INodeNo,
        mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let mut state = self.state();
        let set = |stored: &mut Stored| {
            stored.mode = mode.unwrap_or(stored.mode);
            size.map_or(Ok(()), |size| stored.data.set_len(size)).map_err(Errno::from)
        };
        let changed = if inode == INodeNo::ROOT { Ok(()) } else { state.change(inode.0).and_then(set) };
        let attributes = changed.and_then(|()| state.attributes(inode.0));
        answer!(reply, attributes, attributes => reply.attr(&self.remembered, &attributes));
    }

    fn create(&self, _: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, _: i32, reply: ReplyCreate) {
        let mut state = self.state();
        let created = match state.find(parent, name) {
            Ok(_) => Err(Errno::EEXIST),
            Err(Errno::ENOENT) => state.create(name, mode & !umask),
            Err(errno) => Err(errno),
        };
        let attributes = created.and_then(|inode| state.attributes(inode));
        let handle = state.new_handle();
        answer!(reply, attributes, attributes => {
            reply.created(&self.remembered, &attributes, Generation(0), handle, FopenFlags::empty());
        });
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let mut state = self.state();
        let found = state.find(parent, name);
        state.names.remove(name);
        answer!(reply, found, _ => reply.ok());
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(self.state().new_handle(), FopenFlags::empty());
    }

    fn read(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let state = self.state();
        let mut bytes = vec![0; size as usize];
        let stored = state.files.get(&inode.0).ok_or(Errno::ENOENT);
        let length = stored.and_then(|stored| Ok(stored.data.read_at(&mut bytes, offset)?));
        answer!(reply, length, length => reply.data(&bytes[..length]));
    }

    fn write(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        bytes: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let mut state = self.state();
        let written = state.change(inode.0).and_then(|stored| Ok(stored.data.write_at(bytes, offset)?));
        answer!(reply, written, length => reply.written(length as u32));
    }

    fn fallocate(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let flags = rustix::fs::FallocateFlags::from_bits_retain(mode.cast_unsigned());
        let mut state = self.state();
        let done = state.change(inode.0).and_then(|stored| {
            rustix::fs::fallocate(&stored.data, flags, offset, length).map_err(|e| std::io::Error::from(e).into())
        });
        answer!(reply, done, () => reply.ok());
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    /// At each close of a descriptor: what this owner, a process, holds on the file is given up. An open file description
    /// is another owner, of which nothing is said here.
    fn flush(&self, _: &Request, inode: INodeNo, handle: FileHandle, owner: LockOwner, reply: ReplyEmpty) {
        let mut state = self.state();
        state.note("flush", inode.0, &format!("owner {owner} handle {handle}"));
        state.drop_locks(|l| l.inode == inode.0 && l.owner == Owner::Here(owner));
        reply.ok();
    }

    /// When the description is gone: the kernel names no owner, so what was set through this handle is given up.
    fn release(
        &self,
        _: &Request,
        inode: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        owner: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        let mut state = self.state();
        let owner = owner.map_or("none".to_owned(), |o| o.to_string());
        state.note("release", inode.0, &format!("owner {owner} handle {handle}"));
        state.drop_locks(|l| l.handle == handle.0);
        reply.ok();
    }

    fn readdir(&self, _: &Request, _: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let state = self.state();
        let own = [".", ".."].map(|name| (OsStr::new(name), INodeNo::ROOT.0, FileType::Directory));
        let files = state.names.iter().map(|(name, inode)| (name.as_os_str(), *inode, FileType::RegularFile));
        for (next, (name, inode, kind)) in (1..).zip(own.into_iter().chain(files)).skip(offset as usize) {
            if reply.add(INodeNo(inode), next, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        reply.statfs(1 << 20, 1 << 19, 1 << 19, 1 << 16, 1 << 15, 4096, 255, 4096);
    }

    fn getlk(
        &self,
        _: &Request,
        inode: INodeNo,
        handle: FileHandle,
        owner: LockOwner,
        start: u64,
        end: u64,
        kind: i32,
        pid: u32,
        reply: ReplyLock,
    ) {
        let mut state = self.state();
        let mode = if kind == libc::F_WRLCK { Mode::Write } else { Mode::Read };
        state.note("getlk", inode.0, &format!("{mode:?} {start} {end} owner {owner} pid {pid}").to_lowercase());
        if let Some(errno) = state.getlk_fails {
            return reply.error(errno);
        }
        let wanted = Held { inode: inode.0, owner: Owner::Here(owner), handle: handle.0, mode, start, end, pid };
        match state.in_the_way(&wanted) {
            Some(Held { mode: Mode::Read, start, end, pid, .. }) => reply.locked(start, end, libc::F_RDLCK, pid),
            Some(Held { start, end, pid, .. }) => reply.locked(start, end, libc::F_WRLCK, pid),
            None => reply.locked(0, 0, libc::F_UNLCK, 0),
        }
    }

    fn setlk(
        &self,
        _: &Request,
        inode: INodeNo,
        handle: FileHandle,
        owner: LockOwner,
        start: u64,
        end: u64,
        kind: i32,
        pid: u32,
        sleep: bool,
        reply: ReplyEmpty,
    ) {
        let mut state = self.state();
        let mode = if kind == libc::F_WRLCK { Mode::Write } else { Mode::Read };
        let unlock = kind == libc::F_UNLCK;
        let word = if unlock { "unlock".to_owned() } else { format!("{mode:?}").to_lowercase() };
        let what = if sleep { "setlkw" } else { "setlk" };
        state.note(what, inode.0, &format!("{word} {start} {end} owner {owner} pid {pid}"));
        if let Some(errno) = state.setlk_fails {
            return reply.error(errno);
        }
        let wanted = Held { inode: inode.0, owner: Owner::Here(owner), handle: handle.0, mode, start, end, pid };
        if !unlock && state.in_the_way(&wanted).is_some() {
            if sleep {
                state.waiting.push((wanted, reply));
            } else {
                reply.error(Errno::EAGAIN);
            }
            return;
        }
        state.cut(&wanted);
        if !unlock {
            state.locks.push(wanted);
        }
        reply.ok();
        state.grant_waiting();
    }
}
