//! Which command shows more about a holder, and which one ends it in the way that its manager expects?
//!
//! Only words: nothing here is ever run. Pure.

use super::snapshot::Image;
use crate::linux::identity::ProcessId;
use crate::linux::process::ProcessFacts;
use crate::text::escape;

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
        if let Some((_, pod)) = process.container.as_deref().and_then(|c| c.split_once(" pod ")) {
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
    let path = quote(&image.path.to_string_lossy());
    (!image.ownerless().is_empty()).then(|| Advice {
        inspect: format!("losetup -j {path}; findmnt -T {path}"),
        release: "# the holder is not on this host, or cannot be seen by this user".to_owned(),
    })
}

/// `text` as one word of a shell, without anything that acts on a terminal.
#[must_use]
pub fn quote(text: &str) -> String {
    let text = escape(text);
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:@%+=,".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.into_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::monitor::examples::process;

    fn release(vm: Option<&str>, unit: Option<&str>, container: Option<&str>) -> String {
        let facts = ProcessFacts {
            unit: unit.map(str::to_owned),
            container: container.map(str::to_owned),
            ..process(42, "qemu-system-x86", vm)
        };
        advice(&facts).release
    }

    #[test]
    fn each_manager_is_asked_in_its_own_words() {
        assert_eq!(release(Some("web01"), Some(r"machine-qemu\x2d1\x2dweb01.scope"), None), "virsh shutdown web01");
        assert_eq!(release(Some("db"), Some("101.scope"), None), "qm shutdown 101");
        assert_eq!(release(None, Some("qemu-nbd@vdb.service"), None), "systemctl stop qemu-nbd@vdb.service");
        assert!(release(None, Some("cron.service"), None).ends_with("&& kill 42"));
        assert!(release(Some("x"), None, Some("0123 pod 1-2")).contains("virtctl stop"));
        assert!(release(None, Some("session-4.scope"), None).ends_with("= 1042 ] && kill 42"));
    }

    #[test]
    fn names_are_one_word_for_the_shell() {
        assert_eq!(quote("web01"), "web01");
        assert_eq!(quote("a b"), "'a b'");
        assert_eq!(quote("it's; rm -rf /"), r"'it'\''s; rm -rf /'");
        assert_eq!(quote("a\nb"), r"'a\nb'");
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
