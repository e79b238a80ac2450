//! Which command shows more about a holder, and which one ends it in the way that its manager expects?
//!
//! Only words: nothing here is ever run. Pure.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::snapshot::Image;
use crate::linux::identity::ProcessId;
use crate::linux::process::{ProcessFacts, is_pod_uid};
use crate::text::is_treacherous;

/// Commands for one process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Advice {
    /// Shows more about it and changes nothing.
    pub inspect: String,
    /// Ends it, by way of whoever manages it.
    pub release: String,
}

/// Who started a process and is to be asked about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manager<'a> {
    /// libvirt, and the name of its domain.
    Libvirt(&'a str),
    /// Proxmox VE, and the number of its VM.
    Proxmox(&'a str),
    /// Kubernetes, and the uid of the pod.
    Pod(&'a str),
    /// systemd, and the program's own unit.
    Unit(&'a str),
    /// Nobody who is known here.
    Nobody,
}

impl<'a> Manager<'a> {
    /// Whoever manages `process`, by its cgroup.
    #[must_use]
    pub fn of(process: &'a ProcessFacts) -> Self {
        let unit = process.unit.as_deref().unwrap_or_default();
        if let (Some(vm), true) = (&process.vm, unit.starts_with("machine-qemu")) {
            return Self::Libvirt(vm);
        }
        // Proxmox VE runs each VM in a scope named by its number.
        let is_number = |n: &&str| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit());
        if let Some(number) = unit.strip_suffix(".scope").filter(is_number) {
            return Self::Proxmox(number);
        }
        let pod = process.container.as_deref().and_then(|c| c.split_once(" pod ")).map(|(_, pod)| pod);
        if let Some(pod) = pod.filter(|pod| is_pod_uid(pod)) {
            return Self::Pod(pod);
        }
        // A service that is named after the program is the program's; one that merely started it, such as cron, is not.
        let program = process.command.split(['-', '@', ' ']).next().unwrap_or_default();
        if unit.ends_with(".service") && !program.is_empty() && unit.contains(program) {
            return Self::Unit(unit);
        }
        Self::Nobody
    }
}

/// What to type about `process`.
#[must_use]
pub fn advice(process: &ProcessFacts) -> Advice {
    let (inspect, release) = match Manager::of(process) {
        Manager::Libvirt(vm) => {
            let vm = quote(vm);
            (format!("virsh dominfo {vm}"), format!("virsh shutdown {vm}"))
        }
        Manager::Proxmox(number) => (format!("qm status {number}"), format!("qm shutdown {number}")),
        Manager::Pod(pod) => (
            format!("kubectl get pod -A -o wide --field-selector status.phase=Running -o json | grep -B20 {pod}"),
            format!("# stop the VM of pod {pod} by its manager: virtctl stop NAME"),
        ),
        Manager::Unit(unit) => {
            let unit = quote(unit);
            (format!("systemctl status {unit}"), format!("systemctl stop {unit}"))
        }
        Manager::Nobody if process.command.starts_with("qemu-system") || process.command == "qemu-kvm" => {
            let pid = process.id.pid;
            let release =
                format!("# QMP system_powerdown, or shut the guest down from inside; kill {pid} is a power cut for it");
            (format!("ps -fp {pid}"), release)
        }
        Manager::Nobody => {
            // A pid may be used again before the command is typed: the start time says whether it is the same process.
            let ProcessId { pid, start_time } = process.id;
            (
                format!("ps -fp {pid}"),
                format!("[ \"$(sed 's/.*) //' /proc/{pid}/stat | cut -d' ' -f20)\" = {start_time} ] && kill {pid}"),
            )
        }
    };
    Advice { inspect, release }
}

/// What to type about an image that is held, but not by anybody who can be named.
#[must_use]
pub fn advice_for_ownerless(image: &Image) -> Option<Advice> {
    let path = quote_path(&image.path);
    (!image.ownerless().is_empty()).then(|| Advice {
        inspect: format!("losetup -j {path}; findmnt -T {path}"),
        release: "# the holder is not on this host, or cannot be seen by this user".to_owned(),
    })
}

/// `text` as one word of a shell, without anything that acts on a terminal: what would is written as `$'..'` (bash, zsh,
/// ksh and POSIX.1-2024) takes it.
#[must_use]
pub fn quote(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:@%+=,".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text.to_owned();
    }
    if !text.chars().any(is_treacherous) {
        return format!("'{}'", text.replace('\'', r"'\''"));
    }
    quote_bytes(text.as_bytes())
}

/// A path as one word of a shell: also one that is no UTF-8, or that looks like an option.
#[must_use]
pub fn quote_path(path: &Path) -> String {
    let bytes = path.as_os_str().as_bytes();
    let bytes = if bytes.starts_with(b"-") { [b"./", bytes].concat() } else { bytes.to_vec() };
    String::from_utf8(bytes).map_or_else(|e| quote_bytes(e.as_bytes()), |text| quote(&text))
}

fn quote_bytes(bytes: &[u8]) -> String {
    let mut out = "$'".to_owned();
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                // In octal, which has a length of its own: what follows may be a digit. Quotes and backslashes too: a
                // shell that does not know this form must not find an end in it.
                c if is_treacherous(c) || c == '\'' || c == '\\' => {
                    let mut buffer = [0; 4];
                    out.extend(c.encode_utf8(&mut buffer).bytes().map(|b| format!("\\{b:03o}")));
                }
                c => out.push(c),
            }
        }
        out.extend(chunk.invalid().iter().map(|b| format!("\\{b:03o}")));
    }
    out + "'"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::monitor::examples::process;

    fn release_of(command: &str, vm: Option<&str>, unit: Option<&str>, container: Option<&str>) -> String {
        let facts = ProcessFacts {
            unit: unit.map(str::to_owned),
            container: container.map(str::to_owned),
            ..process(42, command, vm)
        };
        advice(&facts).release
    }

    fn release(vm: Option<&str>, unit: Option<&str>, container: Option<&str>) -> String {
        release_of("qemu-system-x86", vm, unit, container)
    }

    #[test]
    fn each_manager_is_asked_in_its_own_words() {
        assert_eq!(release(Some("web01"), Some(r"machine-qemu\x2d1\x2dweb01.scope"), None), "virsh shutdown web01");
        assert_eq!(release(Some("db"), Some("101.scope"), None), "qm shutdown 101");
        assert_eq!(release(None, Some("qemu-nbd@vdb.service"), None), "systemctl stop qemu-nbd@vdb.service");
        assert!(release_of("dd", None, Some("cron.service"), None).ends_with("&& kill 42"));
        assert!(release(Some("x"), Some("cron.service"), None).contains("system_powerdown"));
        assert!(
            release(Some("x"), None, Some("0123 pod 11111111-2222-3333-4444-555555555555")).contains("virtctl stop")
        );
        assert!(release_of("dd", None, Some("session-4.scope"), None).ends_with("= 1042 ] && kill 42"));
    }

    #[test]
    fn names_are_one_word_for_the_shell() {
        assert_eq!(quote("web01"), "web01");
        assert_eq!(quote("a b"), "'a b'");
        assert_eq!(quote("it's; rm -rf /"), r"'it'\''s; rm -rf /'");
        assert_eq!(quote("a\nb\u{202e}'\\9"), r"$'a\012b\342\200\256\047\1349'");
        assert_eq!(quote_path(Path::new("-rf")), "./-rf");
        assert_eq!(quote_path(Path::new(std::ffi::OsStr::from_bytes(b"a\xff7"))), r"$'a\3777'");
        assert_eq!(quote(""), "''");
    }

    #[test]
    fn the_check_before_the_kill_reads_our_own_start_time() {
        let pid = std::process::id();
        let script = format!("sed 's/.*) //' /proc/{pid}/stat | cut -d' ' -f20");
        let output = std::process::Command::new("sh").arg("-c").arg(script).output().unwrap();
        let brief = crate::linux::process::brief(&crate::linux::Roots::host(), i32::try_from(pid).unwrap()).unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), brief.id.start_time.to_string());
    }
}
