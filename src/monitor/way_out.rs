//! A program is refused, or granted and harmful: what is the least dangerous way out?
//!
//! The mildest first: nothing to do, read along without denying anything, ask the running VM to do it, wait for a tool to
//! end, and only then stop somebody. Only words: nothing here is ever run. Pure.

use super::advice::{Manager, advice, advice_for_ownerless, quote, quote_path};
use super::snapshot::{ByteState, Holder, Image, Snapshot, Verdict};
use super::what_if::{Harm, Outcome, Refused, WhatIf, chain, shared_reader_passes};
use super::wording::{filesystem_text, openers_text, process_name};
use crate::linux::descriptors::OpenMode;
use crate::linux::process::ProcessFacts;
use crate::protocol::Operation;
use crate::text::{escape, escape_path};

/// Programs that only read and take `-U`, and how each of them takes it.
const READERS: [(&str, &str); 12] = [
    ("bench", "-U"),
    ("check", "-U"),
    ("compare", "-U"),
    ("convert-source", "-U"),
    ("dd-source", "-U"),
    ("info", "-U"),
    ("io-read-only", "-U"),
    ("io-read-only-as-raw", "-U"),
    ("map", "-U"),
    ("measure", "-U"),
    ("snapshot-list", "-U"),
    ("vm-read-only", "force-share=on"),
];

/// Sentences for an operator, the least dangerous way first; escaped.
#[must_use]
pub fn ways_out(snapshot: &Snapshot, image: &Image, answer: &WhatIf) -> Vec<String> {
    match (&answer.outcome, answer.harm) {
        (Outcome::Granted, Harm::None) => Vec::new(),
        (Outcome::Granted, Harm::Overwrites) => {
            let mut ways = vec!["do not run it: give it another file name".to_owned()];
            ways.extend(users(image).map(|p| stop(p, "first stop ")));
            ways
        }
        (Outcome::Granted, Harm::WritesBesideWriter) => users(image).map(|p| stop(p, "first stop ")).collect(),
        (Outcome::Granted, Harm::BaseIsWritten) => {
            let below: Vec<&Image> = chain(snapshot, image).into_iter().flatten().map(|l| l.image).collect();
            let writers = below.iter().flat_map(|i| &i.openers).filter(|o| o.mode == OpenMode::Write);
            let mut ways: Vec<String> = writers.map(|o| stop(&o.process, "first stop ")).collect();
            let loops = below.iter().flat_map(|i| &i.loop_devices);
            ways.extend(loops.map(|d| format!("first detach loop device {d}")));
            ways
        }
        (Outcome::Unknown(_), _) if image.verdict == Verdict::Stalled => {
            vec![format!("see that {} answers again; nothing can be told before", filesystem_text(image))]
        }
        // Only where it is a matter of permission would root see more.
        (Outcome::Unknown(_), _)
            if image.format.is_none() || image.bytes.iter().any(|b| b.state == ByteState::Unknown) =>
        {
            vec![
                "run qlock-top as root, or with CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH, on the host that has the image"
                    .to_owned(),
            ]
        }
        (Outcome::Unknown(_), _) => {
            vec!["look at the files that it stands on one by one: qlock-top why FILE".to_owned()]
        }
        (Outcome::Refused(refused), _) => after_refusal(snapshot, image, answer.operation, refused),
    }
}

fn after_refusal(snapshot: &Snapshot, image: &Image, operation: &Operation, refused: &Refused) -> Vec<String> {
    let mut ways = Vec::new();
    if refused.destroys_image {
        ways.push("do not run it: give it another file name".to_owned());
    }
    if let Some((_, option)) = READERS.iter().find(|(name, _)| *name == operation.name)
        && shared_reader_passes(snapshot, image)
    {
        let caution = if matches!(operation.name, "info" | "snapshot-list") {
            ""
        } else {
            "; what it reads may change meanwhile, so a copy made like this is not to be relied on"
        };
        ways.push(format!("read along with {option}{caution}"));
    }
    let mut processes: Vec<&ProcessFacts> = refused.holders.iter().map(|h| &*h.process).collect();
    processes.dedup_by_key(|p| p.id);
    ways.extend(processes.iter().filter_map(|p| live(operation, image, p)));
    let on = escape_path(&refused.on_image);
    if !processes.is_empty() && processes.iter().all(|p| is_tool(p)) {
        let path = quote_path(&image.path);
        ways.push(format!("wait until it ends: qlock-top wait {path} --as {}", operation.name));
    }
    ways.extend(processes.iter().map(|p| stop(p, "stop ")));
    if processes.is_empty() {
        let holder = snapshot.images.iter().find(|i| *i.path == refused.on_image).unwrap_or(image);
        ways.push(match holder.verdict {
            Verdict::HeldElsewhere => format!(
                "{on} is held from another host: run qlock-top on each host that mounts {}",
                escape(&holder.filesystem.source)
            ),
            Verdict::HeldByKernel if !holder.loop_devices.is_empty() => format!(
                "no process holds it through a descriptor: if it is loop device {}, detach that when nothing uses it",
                holder.loop_devices.join("; ")
            ),
            Verdict::HeldByKernel => {
                "no process holds it through a descriptor: look what stands on it before anything is ended".to_owned()
            }
            Verdict::Unknown if !holder.openers.is_empty() => {
                format!("the holder cannot be told; here {} has it open, and may be the one", openers_text(holder))
            }
            Verdict::Unknown if holder.sought => {
                "all processes are still being searched for the holder: ask again in a few seconds".to_owned()
            }
            _ => "the holder cannot be seen: run qlock-top as root on the host itself".to_owned(),
        });
        ways.extend(advice_for_ownerless(holder).map(|a| format!("look with: {}", a.inspect)));
    }
    ways
}

/// Everybody who uses the image, each process once.
fn users(image: &Image) -> impl Iterator<Item = &ProcessFacts> {
    let mut users: Vec<&ProcessFacts> =
        image.holders.iter().map(|h: &Holder| &*h.process).chain(image.openers.iter().map(|o| &*o.process)).collect();
    users.sort_by_key(|p| p.id);
    users.dedup_by_key(|p| p.id);
    users.into_iter()
}

fn stop(process: &ProcessFacts, verb: &str) -> String {
    format!("{verb}{}: {}", process_name(process), advice(process).release)
}

/// A program that does its work and ends.
fn is_tool(process: &ProcessFacts) -> bool {
    ["qemu-img", "qemu-io", "virt-"].iter().any(|t| process.command.starts_with(t))
}

/// How the VM that holds the image can be asked to do the same while it runs.
fn live(operation: &Operation, image: &Image, process: &ProcessFacts) -> Option<String> {
    let path = quote_path(&image.path);
    let is_vm = process.vm.is_some() || process.command.starts_with("qemu-system") || process.command == "qemu-kvm";
    if !is_vm {
        return None;
    }
    let name = process_name(process);
    let command = match Manager::of(process) {
        Manager::Libvirt(vm) => {
            let vm = quote(vm);
            match operation.name {
                "resize" | "io-truncate" => format!("virsh blockresize {vm} {path} SIZE"),
                "snapshot-create" => {
                    format!("virsh snapshot-create-as {vm} NAME --disk-only, after which it writes to a new file")
                }
                "convert-source" | "dd-source" => format!("virsh backup-begin {vm}"),
                "rebase-unsafe" => format!("virsh blockpull {vm} {path}"),
                "bitmap-add" => format!("virsh checkpoint-create-as {vm} NAME"),
                _ => return None,
            }
        }
        Manager::Proxmox(number) => match operation.name {
            "resize" | "io-truncate" => format!("qm resize {number} DISK SIZE"),
            "snapshot-create" => format!("qm snapshot {number} NAME"),
            "convert-source" | "dd-source" => format!("vzdump {number} --mode snapshot"),
            _ => return None,
        },
        Manager::Pod(_) => match operation.name {
            "resize" | "io-truncate" => "make its PersistentVolumeClaim larger".to_owned(),
            "snapshot-create" | "convert-source" | "dd-source" => "a VirtualMachineSnapshot".to_owned(),
            _ => return None,
        },
        Manager::Unit(_) | Manager::Nobody => match operation.name {
            "resize" | "io-truncate" => "QMP block_resize".to_owned(),
            "snapshot-create" => "QMP blockdev-snapshot, or blockdev-snapshot-internal-sync".to_owned(),
            "convert-source" | "dd-source" => "QMP blockdev-backup".to_owned(),
            "rebase-unsafe" => "QMP block-stream".to_owned(),
            "bitmap-add" => "QMP block-dirty-bitmap-add".to_owned(),
            _ => return None,
        },
    };
    Some(format!("have {name} do it while it runs: {command}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::monitor::examples::{descriptor, holds, image, process, sample};
    use crate::monitor::sample::ImageSample;
    use crate::monitor::what_if::what_if;

    fn ways(operation: &str, one: ImageSample, change: impl Fn(&mut ProcessFacts)) -> Vec<String> {
        let mut holder = process(42, "qemu-system-x86", Some("web01"));
        change(&mut holder);
        let snapshot = Snapshot::of(&sample(vec![one], &[holder]));
        let answer = what_if(&snapshot, &snapshot.images[0], Operation::named(operation).unwrap()).unwrap();
        ways_out(&snapshot, &snapshot.images[0], &answer)
    }

    fn held() -> ImageSample {
        ImageSample { descriptors: vec![holds(42, "cwr/wr")], ..image("a.qcow2", "cwr/wr") }
    }

    fn libvirt(process: &mut ProcessFacts) {
        process.unit = Some(r"machine-qemu\x2d1\x2dweb01.scope".to_owned());
    }

    #[test]
    fn a_reader_is_let_in_with_u_before_anybody_is_stopped() {
        let ways = ways("check", held(), libvirt);
        assert!(ways[0].starts_with("read along with -U; what it reads may change"), "{ways:?}");
        assert_eq!(ways[1], "stop web01 (qemu-system-x86 42): virsh shutdown web01");
    }

    #[test]
    fn the_running_vm_is_asked_before_it_is_stopped() {
        let ways_of = |operation| ways(operation, held(), libvirt);
        assert!(ways_of("resize")[0].ends_with("virsh blockresize web01 /images/a.qcow2 SIZE"));
        assert!(ways("resize", held(), |_| ())[0].ends_with("QMP block_resize"));
        assert_eq!(ways_of("vm"), ["stop web01 (qemu-system-x86 42): virsh shutdown web01"]);
    }

    #[test]
    fn a_tool_is_waited_for() {
        let tool = |p: &mut ProcessFacts| (p.command, p.vm) = ("qemu-img".to_owned(), None);
        assert_eq!(ways("vm", held(), tool)[0], "wait until it ends: qlock-top wait /images/a.qcow2 --as vm");
    }

    #[test]
    fn what_destroys_is_not_to_be_run() {
        let reader = ImageSample { descriptors: vec![holds(42, "c/-")], ..image("a.qcow2", "c/-") };
        assert!(ways("create", reader, |_| ())[0].starts_with("do not run it"));
        let unlocked = descriptor(42, 3, OpenMode::Write, Vec::new());
        let unlocked = ImageSample { descriptors: vec![unlocked], ..image("a.qcow2", "-/-") };
        let ways = ways("create", unlocked, |_| ());
        assert!(ways[0].starts_with("do not run it") && ways[1].contains("first stop web01"), "{ways:?}");
    }

    #[test]
    fn a_holder_that_is_still_sought_is_asked_for_again() {
        let sought = ImageSample { sought: true, ..image("a.qcow2", "cw/w") };
        let ways = ways("vm", sought, |_| ());
        assert!(ways[0].ends_with("ask again in a few seconds"), "{ways:?}");
    }

    #[test]
    fn a_holder_that_cannot_be_named_is_looked_for_where_it_may_be() {
        let nobody = image("a.qcow2", "cwr/wr");
        let ways = ways("vm", nobody, |_| ());
        assert!(ways[0].contains("look what stands on it") && ways[1].contains("losetup -j"), "{ways:?}");
    }
}
