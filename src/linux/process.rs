//! Who is this process: which program, whose, which VM, which unit or container?
//!
//! Command lines and cgroup paths are written by others and may hold anything; they are kept as they are and escaped
//! where they are shown. User names come from `/etc/passwd` alone: a name service that hangs must not hang a monitor.

use std::collections::HashMap;
use std::io::Read;
use std::path::Path;

use jiff::Timestamp;
use procfs::process::Process;
use serde::{Deserialize, Serialize};

use super::Roots;
use super::identity::ProcessId;

/// What is known of a process; it does not change while the process runs one program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessFacts {
    /// Which process.
    pub id: ProcessId,
    /// The parent's pid.
    pub parent: i32,
    /// The name that the kernel knows it by, at most 15 bytes (`comm`).
    pub command: String,
    /// Its arguments, joined by spaces, at most 4 KiB; empty for kernel threads.
    pub command_line: String,
    /// Numeric user id of its owner.
    pub uid: u32,
    /// The owner's name, or the number where `/etc/passwd` has none.
    pub user: String,
    /// The VM it runs, by QEMU's `-name` or Proxmox VE's `-id`.
    pub vm: Option<String>,
    /// The systemd unit or scope, as `systemctl status` takes it.
    pub unit: Option<String>,
    /// The container, by its id or name.
    pub container: Option<String>,
    /// When it started, to the second; `None` where the kernel's boot time is not known.
    pub started: Option<Timestamp>,
}

/// At most this much of a command line is read: QEMU's are long, and no limit would let a process fill our memory.
const COMMAND_LINE_LIMIT: u64 = 128 * 1024;
const COMMAND_LINE_KEPT: usize = 4096;

/// As much as is told of a process that is stuck in exec(2): neither its command line nor its start time.
#[must_use]
pub fn facts_of_stuck(roots: &Roots, users: &Users, pid: i32) -> Option<ProcessFacts> {
    let text = std::fs::read(roots.proc.join(format!("{pid}/status"))).ok()?;
    let text = String::from_utf8_lossy(&text);
    let line = |name: &str| text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':')).map(str::trim);
    let number = |name| line(name)?.split_ascii_whitespace().next()?.parse::<u32>().ok();
    let uid = number("Uid").unwrap_or_default();
    Some(ProcessFacts {
        id: ProcessId { pid, start_time: 0 },
        parent: number("PPid").and_then(|n| i32::try_from(n).ok()).unwrap_or_default(),
        command: line("Name")?.to_owned(),
        command_line: String::new(),
        uid,
        user: users.name(uid),
        vm: None,
        unit: None,
        container: None,
        started: None,
    })
}

/// Reads what `/proc/PID` says; `None` when the process has gone.
#[must_use]
pub fn facts(roots: &Roots, users: &Users, pid: i32) -> Option<ProcessFacts> {
    let process = Process::new_with_root(roots.proc.join(pid.to_string())).ok()?;
    let stat = process.stat().ok()?;
    let arguments = arguments(roots, pid);
    let uid = process.uid().unwrap_or_default();
    let cgroups = process.cgroups().map(|c| c.0).unwrap_or_default();
    // Version 2 has one line; of version 1 the named hierarchy of systemd is the one that knows units.
    let cgroup = cgroups
        .iter()
        .find(|c| c.hierarchy == 0 && c.pathname != "/")
        .or_else(|| cgroups.iter().find(|c| c.controllers.iter().any(|n| n == "name=systemd")))
        .or_else(|| cgroups.first())
        .map_or("", |c| c.pathname.as_str());
    let mut command_line = arguments.join(" ");
    if let Some(end) = (0..=COMMAND_LINE_KEPT.min(command_line.len())).rev().find(|i| command_line.is_char_boundary(*i))
    {
        command_line.truncate(end);
    }
    Some(ProcessFacts {
        id: ProcessId { pid, start_time: stat.starttime },
        parent: stat.ppid,
        vm: vm_name(&stat.comm, &arguments),
        unit: unit(cgroup),
        container: container(cgroup),
        started: started(roots, stat.starttime),
        command: stat.comm,
        command_line,
        uid,
        user: users.name(uid),
    })
}

/// Boot time (`btime` of proc_stat(5)) and clock ticks since then.
fn started(roots: &Roots, start_time: u64) -> Option<Timestamp> {
    let text = std::fs::read_to_string(roots.proc.join("stat")).ok()?;
    let boot: i64 = text.lines().find_map(|l| l.strip_prefix("btime "))?.trim().parse().ok()?;
    let seconds = i64::try_from(start_time / procfs::ticks_per_second().max(1)).ok()?;
    Timestamp::from_second(boot.checked_add(seconds)?).ok()
}

/// As much of `/proc/PID/stat` as is needed to know a process again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Brief {
    /// Which process has the pid now.
    pub id: ProcessId,
    /// The program that it runs now; another one after exec(2).
    pub command: String,
    /// A thread of the kernel: it has no descriptors (`PF_KTHREAD`).
    pub is_kernel_thread: bool,
}

/// Looks who has `pid` now.
#[must_use]
pub fn brief(roots: &Roots, pid: i32) -> Option<Brief> {
    let path = roots.proc.join(format!("{pid}/stat"));
    let mut text = Vec::with_capacity(512);
    std::fs::File::open(path).and_then(|mut f| f.read_to_end(&mut text)).ok()?;
    parse_brief(pid, &text)
}

/// Field 2 is the name, which may hold spaces and parentheses; 9 the flags; 22 the start time (proc_pid_stat(5)).
fn parse_brief(pid: i32, stat: &[u8]) -> Option<Brief> {
    const PF_KTHREAD: u64 = 0x0020_0000;
    let name_start = stat.iter().position(|b| *b == b'(')?;
    let name_end = stat.iter().rposition(|b| *b == b')')?;
    let command = String::from_utf8_lossy(stat.get(name_start + 1..name_end)?).into_owned();
    let fields: Vec<&str> =
        std::str::from_utf8(&stat[name_end + 1..]).ok()?.split_ascii_whitespace().take(20).collect();
    let number = |i: usize| fields.get(i)?.parse::<u64>().ok();
    Some(Brief {
        id: ProcessId { pid, start_time: number(19)? },
        command,
        is_kernel_thread: number(6)? & PF_KTHREAD != 0,
    })
}

fn arguments(roots: &Roots, pid: i32) -> Vec<String> {
    let mut bytes = Vec::new();
    let file = std::fs::File::open(roots.proc.join(format!("{pid}/cmdline")));
    if file.and_then(|f| f.take(COMMAND_LINE_LIMIT).read_to_end(&mut bytes)).is_err() {
        return Vec::new();
    }
    let bytes = bytes.strip_suffix(b"\0").unwrap_or(&bytes);
    if bytes.is_empty() {
        return Vec::new();
    }
    bytes.split(|b| *b == 0).map(|a| String::from_utf8_lossy(a).into_owned()).collect()
}

/// Whether a program is a QEMU that can run or export a disk, by its name.
fn is_qemu(command: &str, arguments: &[String]) -> bool {
    let program = arguments.first().map_or(command, |a| a.rsplit('/').next().unwrap_or(a));
    let known = |name: &str| name.starts_with("qemu") || name == "kvm";
    known(program) || known(command)
}

/// The VM that QEMU runs: `-name web01`, `-name guest=web01,debug-threads=on`, or Proxmox VE's `-id 101`.
///
/// A comma in a name is doubled (`qemu_opts_parse`).
#[must_use]
pub fn vm_name(command: &str, arguments: &[String]) -> Option<String> {
    if !is_qemu(command, arguments) {
        return None;
    }
    let value = |option: &str| {
        let found = |a: &String| a.strip_prefix("--").or(a.strip_prefix('-')) == Some(option);
        arguments.iter().position(found).and_then(|i| arguments.get(i + 1))
    };
    let name = value("name").and_then(|v| {
        let parts = option_parts(v);
        let named = parts.iter().find_map(|p| p.strip_prefix("guest="));
        let bare = parts.first().filter(|p| !p.contains('=')).map(String::as_str);
        named.or(bare).map(str::to_owned)
    });
    let id = value("id").map(|id| format!("vm {id}"));
    name.filter(|n| !n.is_empty()).or(id)
}

/// Splits at single commas and halves the doubled ones.
fn option_parts(value: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut characters = value.chars().peekable();
    while let Some(c) = characters.next() {
        if c == ',' && characters.next_if_eq(&',').is_none() {
            parts.push(String::new());
        } else if let Some(last) = parts.last_mut() {
            last.push(c);
        }
    }
    parts
}

/// The innermost systemd unit of a cgroup path.
#[must_use]
pub fn unit(cgroup: &str) -> Option<String> {
    let is_unit = |part: &&str| part.ends_with(".service") || part.ends_with(".scope");
    cgroup.rsplit('/').find(is_unit).map(str::to_owned)
}

/// The container or pod of a cgroup path: Docker, Podman, containerd, CRI-O, LXC.
#[must_use]
pub fn container(cgroup: &str) -> Option<String> {
    let parts: Vec<&str> = cgroup.split('/').filter(|p| !p.is_empty()).collect();
    let is_id = |s: &str| s.len() == 64 && s.bytes().all(|b| b.is_ascii_hexdigit());
    for part in parts.iter().rev() {
        let name = part.strip_suffix(".scope").unwrap_or(part);
        if let Some(lxc) = name.strip_prefix("lxc.payload.") {
            return Some(format!("lxc {lxc}"));
        }
        // docker-ID, libpod-ID, crio-ID, cri-containerd-ID, or the bare ID under /docker/ and /kubepods/.
        let (runtime, id) = name.rsplit_once('-').unwrap_or(("", name));
        if is_id(id) && runtime != "libpod-conmon" && runtime != "crio-conmon" {
            let pod = parts.iter().find_map(|p| pod_uid(p)).map(|uid| format!(" pod {uid}"));
            return Some(format!("{}{}", &id[..12], pod.unwrap_or_default()));
        }
    }
    parts.windows(2).find(|w| w[0] == "lxc").map(|w| format!("lxc {}", w[1]))
}

/// `kubepods-burstable-pod1b2c_..slice` or `pod1b2c-..`: the uid that `kubectl get pod` prints.
fn pod_uid(part: &str) -> Option<String> {
    let name = part.strip_suffix(".slice").unwrap_or(part);
    let uid = name.rsplit_once("pod").map(|(_, uid)| uid.replace('_', "-"))?;
    is_pod_uid(&uid).then_some(uid)
}

/// Whether it looks like the uid of a pod: whoever may name a cgroup may write anything there.
#[must_use]
pub fn is_pod_uid(uid: &str) -> bool {
    uid.len() == 36 && uid.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-')
}

/// Whether every process of the host can be seen: not from inside a pid namespace of its own, and not through a `/proc`
/// that hides other users' (`hidepid`, proc(5)).
#[must_use]
pub fn sees_all(roots: &Roots, proc_options: &[String]) -> bool {
    /// The inode of the first pid namespace (`PROC_PID_INIT_INO` in include/linux/proc_ns.h).
    const FIRST: &str = "pid:[4026531836]";
    let namespace = std::fs::read_link(roots.proc.join("self/ns/pid"));
    let outermost = match namespace {
        Ok(link) => link == Path::new(FIRST),
        // A recorded tree may leave it out.
        Err(_) => !roots.is_host(),
    };
    let hides = proc_options.iter().any(|o| o.strip_prefix("hidepid=").is_some_and(|v| v != "0" && v != "off"));
    outermost && (!hides || nix::unistd::geteuid().is_root())
}

/// The names of `/etc/passwd`.
#[derive(Clone, Debug, Default)]
pub struct Users(HashMap<u32, String>);

impl Users {
    /// Reads a passwd file; a missing one leaves numbers.
    #[must_use]
    pub fn read(path: &Path) -> Self {
        let text = std::fs::read(path).unwrap_or_default();
        let entry = |line: &str| {
            let mut fields = line.split(':');
            let name = fields.next()?.to_owned();
            Some((fields.nth(1)?.parse().ok()?, name))
        };
        Self(String::from_utf8_lossy(&text).lines().filter_map(entry).collect())
    }

    /// The name of `uid`, or its number.
    #[must_use]
    pub fn name(&self, uid: u32) -> String {
        self.0.get(&uid).cloned().unwrap_or_else(|| uid.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn vm(line: &str) -> Option<String> {
        let arguments: Vec<String> = line.split(' ').map(str::to_owned).collect();
        let command: String = arguments[0].rsplit('/').next().unwrap().chars().take(15).collect();
        vm_name(&command, &arguments)
    }

    #[test]
    fn vm_names_of_libvirt_proxmox_and_plain_qemu() {
        assert_eq!(vm("/usr/bin/qemu-system-x86_64 -name guest=web01,debug-threads=on -S").as_deref(), Some("web01"));
        assert_eq!(vm("qemu-system-x86_64 -m 1 -name web01").as_deref(), Some("web01"));
        assert_eq!(vm("qemu-system-x86_64 --name web01,process=x").as_deref(), Some("web01"));
        assert_eq!(vm("/usr/libexec/qemu-kvm -name guest=a,,b").as_deref(), Some("a,b"));
        assert_eq!(vm("/usr/bin/kvm -id 101 -name db,debug-threads=on").as_deref(), Some("db"));
        assert_eq!(vm("/usr/bin/kvm -id 101").as_deref(), Some("vm 101"));
        assert_eq!(vm("qemu-system-x86_64 -name debug-threads=on"), None);
        assert_eq!(vm("qemu-system-x86_64 -name"), None);
        assert_eq!(vm("find / -name web01"), None);
    }

    #[test]
    fn units_are_kept_as_systemctl_takes_them() {
        let scope = r"/machine.slice/machine-qemu\x2d1\x2dweb01.scope/libvirt/emulator";
        assert_eq!(unit(scope).as_deref(), Some(r"machine-qemu\x2d1\x2dweb01.scope"));
        assert_eq!(unit("/system.slice/qemu-nbd@vdb.service").as_deref(), Some("qemu-nbd@vdb.service"));
        assert_eq!(unit("/qemu.slice/101.scope").as_deref(), Some("101.scope"));
        assert_eq!(unit("/"), None);
    }

    #[test]
    fn containers_of_each_runtime_are_named() {
        let id = "0123456789abcdef".repeat(4);
        assert_eq!(container(&format!("/system.slice/docker-{id}.scope")).as_deref(), Some("0123456789ab"));
        assert_eq!(container(&format!("/docker/{id}")).as_deref(), Some("0123456789ab"));
        assert_eq!(container(&format!("/machine.slice/libpod-{id}.scope/container")).as_deref(), Some("0123456789ab"));
        assert_eq!(
            container(&format!(
                "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod11111111_2222_3333_4444_555555555555.slice\
                 /cri-containerd-{id}.scope"
            ))
            .as_deref(),
            Some("0123456789ab pod 11111111-2222-3333-4444-555555555555")
        );
        assert_eq!(container("/lxc.payload.web/init.scope").as_deref(), Some("lxc web"));
        assert_eq!(container("/lxc/101/ns").as_deref(), Some("lxc 101"));
        assert_eq!(container("/system.slice/sshd.service"), None);
    }

    #[test]
    fn a_name_with_parentheses_does_not_hide_the_start_time() {
        let stat = b"42 (a) R 1 (b) S 1 2 3 4 5 2097152 7 8 9 10 11 12 13 14 15 16 17 18 4242 0 0";
        let brief = parse_brief(42, stat).unwrap();
        assert_eq!((brief.id.start_time, brief.command.as_str(), brief.is_kernel_thread), (4242, "a) R 1 (b", true));
        assert_eq!(parse_brief(42, b"42 (x"), None);
        assert_eq!(parse_brief(42, b"42 )x( S 1"), None);
    }

    #[test]
    fn our_own_process_is_described() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let roots = Roots::host();
        let facts = facts(&roots, &Users::read(Path::new("/etc/passwd")), pid).unwrap();
        let brief = brief(&roots, pid).unwrap();
        assert_eq!(
            (facts.id, facts.command.as_str(), false),
            (brief.id, brief.command.as_str(), brief.is_kernel_thread)
        );
        assert!(!facts.command_line.is_empty());
    }

    proptest! {
        #[test]
        fn no_command_line_or_cgroup_makes_it_panic(line in "\\PC{0,100}", cgroup in "[/a-z0-9._-]{0,200}|\\PC{0,80}") {
            let _ = vm(&format!("qemu -name {line}"));
            let _ = (unit(&cgroup), container(&cgroup));
        }
    }
}
