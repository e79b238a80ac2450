//! Which process has which file open, of all processes at once?
//!
//! A program in the kernel (`iter/task_file`, Linux 5.8) walks the descriptor tables: no `/proc` is read and no file
//! system asked, so no dead mount can hold it up and no process hide. It is loaded once a process. Where audit is on,
//! that leaves one record (`type=BPF op=LOAD`) and its end another (`op=UNLOAD`); a pass leaves none. Only who has
//! CAP_BPF and CAP_PERFMON may load it. Where in the kernel's structures a field lies, the kernel's own type descriptions
//! say (Documentation/bpf/btf.rst).

// bpf(2) has no safe wrapper but in crates that bring a loader along: one function, `bpf` below, and what it is given.
#![allow(unsafe_code)]

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};

use nix::libc;
use rustix::io::Errno;

use super::identity::Device;
use super::kernel_types::{Layout, NotFound, TYPES};

/// A descriptor that leads to a regular file or block device, as the kernel keeps it. One with `O_PATH`, which can
/// neither read nor lock, is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OpenFile {
    /// The process (thread group), in the first pid namespace.
    pub pid: i32,
    /// The number of the descriptor there.
    pub fd: i32,
    /// `s_dev` of the file system, as mountinfo shows it: on btrfs, and on overlayfs over several file systems, not what
    /// statx(2) says.
    pub device: Device,
    /// `i_ino`, its number there. Subvolumes of one btrfs share the device and have the same numbers.
    pub inode: u64,
    /// Names that lead to it: 0 once it is deleted.
    pub links: u32,
    /// Whether it was opened for writing (`FMODE_WRITE`).
    pub writable: bool,
}

/// Why the kernel cannot be asked this way.
#[derive(Debug, thiserror::Error)]
pub enum Unavailable {
    /// Processes have other numbers here than the program would tell, and not all are seen.
    #[error("not in the first pid namespace")]
    PidNamespace,
    /// CAP_BPF or CAP_PERFMON is missing, a security module or seccomp forbids it, or the kernel has no bpf(2).
    #[error("bpf(2) is refused: {0}")]
    Refused(#[source] io::Error),
    /// `CONFIG_DEBUG_INFO_BTF` is off, or the descriptions have a form that is not known here.
    #[error("cannot read {TYPES}: {0}")]
    Types(#[from] io::Error),
    /// The iterator (before Linux 5.8), or a field that went elsewhere.
    #[error("this kernel has no {0}")]
    Missing(&'static str),
    /// With the last sentence of the kernel's verifier.
    #[error("the kernel does not accept the program: {0}: {1}")]
    Program(#[source] io::Error, String),
    /// The program is loaded and could not be made an iterator.
    #[error("cannot attach the program: {0}")]
    Attach(#[source] io::Error),
}

impl From<NotFound> for Unavailable {
    fn from(why: NotFound) -> Self {
        match why {
            NotFound::Unreadable(e) => Self::Types(e),
            NotFound::Missing(what) => Self::Missing(what),
        }
    }
}

/// The program, loaded and ready to run. The kernel drops it with this value.
#[derive(Debug)]
pub struct TaskFiles {
    /// Keeps the program, whose own descriptor is closed.
    link: OwnedFd,
    buffer: Vec<u8>,
}

/// The kernel collects 8 pages before it gives them away.
const BUFFER: usize = 32 * 1024;
/// As the program writes it: tgid, tid, fd, `f_mode`, `i_ino` in 64 bits, `s_dev`, `i_nlink`.
const RECORD: usize = 32;
/// `PROC_PID_INIT_INO` of the kernel.
const FIRST_PID_NAMESPACE: u64 = 0xEFFF_FFFC;

impl TaskFiles {
    /// The same, but asks for nothing that is likely to be refused: a security module may make a record of that.
    ///
    /// # Errors
    /// As for [`load`](Self::load).
    pub fn load_if_allowed() -> Result<Self, Unavailable> {
        /// CAP_SYS_ADMIN, or else CAP_PERFMON and CAP_BPF (linux/capability.h).
        const EITHER: [u64; 2] = [1 << 21, 1 << 38 | 1 << 39];
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let held = status.lines().find_map(|l| u64::from_str_radix(l.strip_prefix("CapEff:")?.trim(), 16).ok());
        let allowed = held.is_some_and(|held| EITHER.iter().any(|needed| held & needed == *needed));
        if allowed { Self::load() } else { Err(Unavailable::Refused(Errno::PERM.into())) }
    }

    /// Loads the program, which costs a read of the kernel's type descriptions: a few milliseconds; nothing without the
    /// right to load it.
    ///
    /// # Errors
    /// Which step failed, and why. Nothing stays behind.
    pub fn load() -> Result<Self, Unavailable> {
        // Without CONFIG_PID_NS there is no such file, and only one namespace.
        if std::fs::metadata("/proc/self/ns/pid").is_ok_and(|n| n.ino() != FIRST_PID_NAMESPACE) {
            return Err(Unavailable::PidNamespace);
        }
        // Its numbers are of use only with a /proc of the same namespace.
        let own = std::fs::read_link("/proc/self").ok();
        if own.is_none_or(|own| own.as_os_str() != std::process::id().to_string().as_str()) {
            return Err(Unavailable::PidNamespace);
        }
        // The right is looked at before the program: this one, made for no iterator, is never accepted.
        if let Err(e) = load_program(&[Insn::EXIT], 0, &mut [])
            && e.raw_os_error() != Some(libc::EINVAL)
        {
            return Err(Unavailable::Refused(e));
        }
        let types = File::open(TYPES)?;
        let layout = Layout::find(&|into, at| types.read_at(into, at))?;
        let code = program(&layout);
        let program = load_program(&code, layout.iterator, &mut []).map_err(|refusal| {
            // A log costs time, and is asked for only now.
            let mut log = vec![0; 64 * 1024];
            let _ = load_program(&code, layout.iterator, &mut log);
            let log = String::from_utf8_lossy(log.split(|b| *b == 0).next().unwrap_or_default());
            let last = log.lines().rfind(|l| !l.starts_with("processed ")).unwrap_or_default();
            Unavailable::Program(refusal, last.to_owned())
        })?;
        let link = attach(program.as_fd()).map_err(Unavailable::Attach)?;
        Ok(Self { link, buffer: vec![0; BUFFER] })
    }

    /// Calls `found` for each such descriptor of every process. Threads that share a table are one; what a thread with a
    /// table of its own has open is told as its process's, and may be told twice if it copied that table.
    ///
    /// It is no moment: a process that starts meanwhile, or a descriptor that moves, may be missed.
    ///
    /// # Errors
    /// The errno of bpf(2) or read(2). What was found until then was told.
    pub fn each(&mut self, mut found: impl FnMut(OpenFile)) -> io::Result<()> {
        let pass = iterate(self.link.as_fd())?;
        // If the first thread of a process ended, the kernel tells the table that the others share for each of them.
        let mut of_threads = HashSet::new();
        let mut kept = 0;
        loop {
            let filled = match rustix::io::read(&pass, &mut self.buffer[kept..]) {
                Ok(0) => return Ok(()),
                Ok(count) => kept + count,
                // AGAIN: the kernel pauses after a million descriptors without a record.
                Err(Errno::INTR | Errno::AGAIN) => continue,
                Err(errno) => return Err(errno.into()),
            };
            let (records, rest) = self.buffer[..filled].as_chunks();
            for record in records {
                let (file, tid) = decode(record);
                if tid == file.pid || of_threads.insert(file) {
                    found(file);
                }
            }
            // A record that the read cut in two.
            kept = rest.len();
            self.buffer.copy_within(filled - kept..filled, 0);
        }
    }
}

fn decode(record: &[u8; RECORD]) -> (OpenFile, i32) {
    let word = |i: usize| u32::from_ne_bytes(std::array::from_fn(|byte| record[4 * i + byte]));
    let file = OpenFile {
        pid: word(0).cast_signed(),
        fd: word(2).cast_signed(),
        // The kernel's own form of a device number (linux/kdev_t.h), not that of stat(2).
        device: Device { major: word(6) >> 20, minor: word(6) & 0xf_ffff },
        inode: u64::from_ne_bytes(std::array::from_fn(|byte| record[16 + byte])),
        links: word(7),
        writable: word(3) & 2 != 0, // FMODE_WRITE
    };
    (file, word(1).cast_signed())
}

/// One instruction, in the kernel's form.
#[derive(Clone, Copy)]
#[repr(C)]
struct Insn {
    code: u8,
    registers: u8,
    offset: i16,
    number: i32,
}

/// How much a load or store moves.
const U16: u8 = 0x08;
const U32: u8 = 0x00;
const U64: u8 = 0x18;
/// Of a jump, until the distance is known.
const END: i16 = i16::MAX;

impl Insn {
    const EXIT: Self = Self::new(0x95, 0, 0, 0, 0);

    const fn new(code: u8, to: u8, from: u8, offset: i16, number: i32) -> Self {
        let registers = if cfg!(target_endian = "little") { from << 4 | to } else { to << 4 | from };
        Self { code, registers, offset, number }
    }
    /// `to = *(from + offset)`. The kernel catches the fault of a bad pointer, and what is read is 0.
    const fn load(width: u8, to: u8, from: u8, offset: i16) -> Self {
        Self::new(0x61 | width, to, from, offset, 0)
    }
}

/// Writes a record for the descriptor that the iterator stands on, if it leads to a regular file or block device.
fn program(layout: &Layout) -> Vec<Insn> {
    let [tgid, pid, f_flags, f_mode, f_inode, i_mode, i_sb, i_ino, i_nlink, s_dev] = layout.offsets;
    let (format, regular, block) = (libc::S_IFMT, libc::S_IFREG, libc::S_IFBLK);
    // r1 is the context, {meta, task, fd, file} with 8 bytes each. It has no task and no file when a pass ends.
    let start = [
        Insn::load(U64, 2, 1, 24),     // r2 = file
        Insn::new(0x15, 2, 0, END, 0), // 0: to the end
        Insn::load(U64, 3, 1, 8),      // r3 = task
        Insn::new(0x15, 3, 0, END, 0), // 0: to the end
        Insn::load(U32, 4, 2, f_flags),
        Insn::new(0x45, 4, 0, END, libc::O_PATH), // any of these bits: to the end
        Insn::load(U64, 5, 2, f_inode),           // r5 = inode
        Insn::load(U16, 4, 5, i_mode),
        Insn::new(0x57, 4, 0, 0, format.cast_signed()),  // only these bits
        Insn::new(0x15, 4, 0, 1, regular.cast_signed()), // equal: over the next
        Insn::new(0x55, 4, 0, END, block.cast_signed()), // not equal: to the end
        Insn::load(U64, 6, 5, i_sb),                     // r6 = super block
    ];
    // Into the record, which lies where the stack begins; r10 points to its end.
    let copy = |width, to: i16, from, offset| {
        [Insn::load(width, 4, from, offset), Insn::new(0x63 | width, 10, 4, to - RECORD as i16, 0)]
    };
    let record = [
        copy(U32, 0, 3, tgid),
        copy(U32, 4, 3, pid),
        copy(U32, 8, 1, 16),
        copy(U32, 12, 2, f_mode),
        copy(U64, 16, 5, i_ino),
        copy(U32, 24, 6, s_dev),
        copy(U32, 28, 5, i_nlink),
    ];
    let write = [
        Insn::load(U64, 1, 1, 0),                   // r1 = meta
        Insn::load(U64, 1, 1, 0),                   // r1 = meta->seq
        Insn::new(0xbf, 2, 10, 0, 0),               // r2 = r10
        Insn::new(0x07, 2, 0, 0, -(RECORD as i32)), // r2 += ..
        Insn::new(0xb7, 3, 0, 0, RECORD as i32),    // r3 = ..
        Insn::new(0x85, 0, 0, 0, 127), // bpf_seq_write(r1, r2, r3): what does not fit comes with the next read
        Insn::new(0xb7, 0, 0, 0, 0),   // the end: r0 = 0
        Insn::EXIT,
    ];
    let mut code = [&start[..], record.as_flattened(), &write].concat();
    let end = code.len() as i16 - 2;
    for (next, insn) in (1..).zip(&mut code).filter(|(_, i)| i.offset == END) {
        insn.offset = end - next;
    }
    code
}

/// BPF_TRACE_ITER, a way to attach.
const ITERATE: u32 = 28;

/// BPF_PROG_LOAD.
fn load_program(code: &[Insn], iterator: u32, log: &mut [u8]) -> io::Result<OwnedFd> {
    const TRACING: u32 = 26;
    let pair = |first: u32, second: u32| {
        let (low, high) = if cfg!(target_endian = "little") { (first, second) } else { (second, first) };
        u64::from(high) << 32 | u64::from(low)
    };
    let mut attributes = [0_u64; 14];
    attributes[0] = pair(TRACING, code.len() as u32);
    attributes[1] = code.as_ptr() as u64;
    // Only programs that may be had under the GPL too may call bpf_seq_write.
    attributes[2] = c"Dual MIT/GPL".as_ptr() as u64;
    if !log.is_empty() {
        attributes[3] = pair(1, log.len() as u32);
        attributes[4] = log.as_mut_ptr() as u64;
    }
    attributes[6] = u64::from_ne_bytes(*b"qlock_fi"); // the name that bpftool(8) shows
    attributes[7] = u64::from_ne_bytes(*b"les\0\0\0\0\0");
    attributes[8] = pair(0, ITERATE);
    attributes[13] = pair(0, iterator);
    // SAFETY: code, license and log outlive the call, and the lengths are theirs.
    unsafe { bpf(5, &attributes) }
}

/// BPF_LINK_CREATE.
fn attach(program: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: no address in it.
    unsafe { bpf(28, &[program.as_raw_fd().cast_unsigned(), 0, ITERATE, 0]) }
}

/// BPF_ITER_CREATE.
fn iterate(link: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: no address in it.
    unsafe { bpf(33, &[link.as_raw_fd().cast_unsigned(), 0]) }
}

/// Asks the kernel. Each of the commands above is answered with a new descriptor, which an exec closes.
///
/// # Safety
/// The command must be one of those, and each address in `attributes` good for it, with the length beside it.
unsafe fn bpf<A>(command: libc::c_int, attributes: &A) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads as many bytes as there are, and writes none of them.
    let answer = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<A>()) };
    match i32::try_from(answer) {
        // SAFETY: nobody else knows it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;
    use std::os::unix::fs::OpenOptionsExt;
    use tempfile::NamedTempFile;

    /// `None`, and why on stderr, where BPF cannot be had; a failure where the environment says that each test counts.
    fn loaded() -> Option<TaskFiles> {
        let files = TaskFiles::load();
        assert!(files.is_ok() || std::env::var_os("QLOCK_RUN_ALL").is_none(), "{files:?}");
        files.inspect_err(|why| eprintln!("not tested: {why}")).ok()
    }

    /// On tmpfs, where statx(2) and the kernel agree about the device.
    fn file() -> NamedTempFile {
        NamedTempFile::new_in("/dev/shm").unwrap()
    }

    fn of_inode(files: &mut TaskFiles, inode: u64) -> Vec<OpenFile> {
        let mut found = Vec::new();
        files.each(|f| found.extend((f.inode == inode).then_some(f))).unwrap();
        found.sort_by_key(|f| !f.writable);
        found
    }

    fn expected(file: &File, writable: bool, links: u32) -> OpenFile {
        let id = super::super::identity::status_of(file).unwrap().id;
        let pid = i32::try_from(std::process::id()).unwrap();
        OpenFile { pid, fd: file.as_raw_fd(), device: id.device, inode: id.inode, links, writable }
    }

    #[test]
    fn our_own_files_are_found_until_they_are_closed() {
        let Some(mut files) = loaded() else { return };
        let written = file();
        let read = File::open(written.path()).unwrap();
        let path = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(written.path()).unwrap();
        let inode = read.metadata().unwrap().ino();
        let both = [expected(written.as_file(), true, 1), expected(&read, false, 1)];
        assert_eq!(of_inode(&mut files, inode), both, "{path:?} is none");
        files.buffer.truncate(RECORD + 1);
        assert_eq!(of_inode(&mut files, inode), both, "when reads cut records in two");
        drop(written);
        assert_eq!(of_inode(&mut files, inode), [expected(&read, false, 0)], "a deleted file has no links");
        drop(read);
        assert_eq!(of_inode(&mut files, inode), []);
    }

    #[test]
    fn a_thread_with_its_own_table_is_its_process() {
        let Some(mut files) = loaded() else { return };
        let thread = std::thread::spawn(move || {
            // SAFETY: no address in it. Only this thread sees what it opens from here on.
            assert_eq!(unsafe { libc::unshare(libc::CLONE_FILES) }, 0);
            let own = file();
            let inode = own.as_file().metadata().unwrap().ino();
            assert_eq!(of_inode(&mut files, inode), [expected(own.as_file(), true, 1)]);
        });
        thread.join().unwrap();
    }
}
