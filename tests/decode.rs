//! Is QEMU's sentence found in what people paste, whatever carried it?
//!
//! A table of the forms in which tools print it: escape styles, line wraps, colours, prefixes in other languages. Each
//! was written for this test in the way that the named program prints.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use proptest::prelude::*;
use qlock::protocol::{Report, decode};

/// What each report of a text must say: the sentence, the first name of the image, the errno.
type Said<'a> = (&'a str, Option<&'a str>, Option<&'a str>);

const WRITE: &str = "Failed to get \"write\" lock";
const SHARED_WRITE: &str = "Failed to get shared \"write\" lock";
const READ: &str = "Failed to get \"consistent read\" lock";
const BYTE_100: &str = "Failed to lock byte 100";

const FORMS: &[(&str, &str, &[Said])] = &[
    (
        "qemu-img opens",
        "qemu-img: Could not open 'a.qcow2': Failed to get shared \"write\" lock\nIs another process using the image [a.qcow2]?\n",
        &[(SHARED_WRITE, Some("a.qcow2"), None)],
    ),
    (
        "qemu-img without its second line",
        "qemu-img: Could not open '/srv/a b.qcow2': Failed to get \"write\" lock",
        &[(WRITE, Some("/srv/a b.qcow2"), None)],
    ),
    (
        "qemu-img create says what it formats first",
        "Formatting '/srv/x.qcow2', fmt=qcow2 cluster_size=65536 extended_l2=off size=16777216\nqemu-img: /srv/x.qcow2: Failed to get \"write\" lock\nIs another process using the image [/srv/x.qcow2]?",
        &[(WRITE, Some("/srv/x.qcow2"), None)],
    ),
    (
        "qemu-img create without its second line",
        "qemu-img: /srv/x.qcow2: Failed to get \"resize\" lock",
        &[("Failed to get \"resize\" lock", Some("/srv/x.qcow2"), None)],
    ),
    (
        "qemu-img convert onto an image",
        "qemu-img: /srv/out.qcow2: error while converting qcow2: Failed to get \"write\" lock\nIs another process using the image [/srv/out.qcow2]?",
        &[(WRITE, Some("/srv/out.qcow2"), None)],
    ),
    (
        "the backing file is refused",
        "qemu-img: Could not open 'top.qcow2': Could not open backing file: Failed to get shared \"write\" lock\nIs another process using the image [/srv/base.qcow2]?",
        &[(SHARED_WRITE, Some("/srv/base.qcow2"), None)],
    ),
    (
        "qemu-io",
        "qemu-io: can't open device /srv/a.raw: Failed to get \"write\" lock\nIs another process using the image [/srv/a.raw]?\n",
        &[(WRITE, Some("/srv/a.raw"), None)],
    ),
    (
        "qemu-io without its second line",
        "qemu-io: can't open device /srv/a.raw: Failed to get \"write\" lock\n",
        &[(WRITE, Some("/srv/a.raw"), None)],
    ),
    (
        "qemu-nbd",
        "qemu-nbd: Failed to blk_new_open '/dev/vg0/lv1': Failed to get \"write\" lock\nIs another process using the image [/dev/vg0/lv1]?",
        &[(WRITE, Some("/dev/vg0/lv1"), None)],
    ),
    (
        "qemu-storage-daemon",
        "qemu-storage-daemon: --export nbd,id=e,node-name=n,writable=on: Failed to get \"write\" lock",
        &[(WRITE, None, None)],
    ),
    (
        "a drive of a VM",
        "qemu-system-x86_64: -drive file=/srv/a.raw,format=raw,if=virtio: Failed to get \"consistent read\" lock\n",
        &[(READ, Some("/srv/a.raw"), None)],
    ),
    (
        "the last option of a drive is its file",
        "qemu-system-x86_64: -drive if=virtio,file=/srv/a.raw: Failed to get \"write\" lock",
        &[(WRITE, Some("/srv/a.raw"), None)],
    ),
    (
        "a device of a VM",
        "qemu-system-x86_64: -device virtio-blk-pci,drive=d0: Failed to get \"write\" lock\nIs another process using the image [/srv/a.raw]?",
        &[(WRITE, Some("/srv/a.raw"), None)],
    ),
    (
        "a blockdev of libvirt",
        "qemu-kvm: -blockdev {\"node-name\":\"libvirt-1-format\",\"read-only\":false,\"driver\":\"qcow2\",\"file\":\"libvirt-1-storage\"}: Failed to get \"write\" lock\nIs another process using the image [/var/lib/libvirt/images/web01.qcow2]?",
        &[(WRITE, Some("/var/lib/libvirt/images/web01.qcow2"), None)],
    ),
    (
        "a blockdev that names its file",
        "qemu-system-x86_64: -blockdev {\"driver\":\"file\",\"filename\":\"/srv/a.raw\",\"node-name\":\"f\"}: Failed to get \"write\" lock",
        &[(WRITE, Some("/srv/a.raw"), None)],
    ),
    (
        "a blockdev in the short form",
        "qemu-system-x86_64: -blockdev driver=raw,file.driver=file,file.filename=/srv/a.raw,node-name=n: Failed to get \"write\" lock",
        &[(WRITE, Some("/srv/a.raw"), None)],
    ),
    (
        "a cdrom without the name of its option",
        "qemu-system-x86_64: Failed to get shared \"write\" lock\nIs another process using the image [/srv/install.iso]?",
        &[(SHARED_WRITE, Some("/srv/install.iso"), None)],
    ),
    (
        "the hint of old versions names no image",
        "qemu-system-x86_64: -drive file=/srv/a.qcow2,if=none: Failed to get \"write\" lock\nIs another process using the image?",
        &[(WRITE, Some("/srv/a.qcow2"), None)],
    ),
    (
        "an error of QMP",
        "{\"error\": {\"class\": \"GenericError\", \"desc\": \"Failed to get \\\"write\\\" lock\"}}",
        &[(WRITE, None, None)],
    ),
    (
        "a write lock of somebody else",
        "qemu-system-x86_64: -drive file=/srv/a.raw,format=raw: Failed to lock byte 100\n",
        &[(BYTE_100, Some("/srv/a.raw"), None)],
    ),
    (
        "a lock server that does not answer",
        "qemu-img: Could not open '/mnt/nfs/a.raw': Failed to lock byte 100: No locks available\n",
        &[(BYTE_100, Some("/mnt/nfs/a.raw"), Some("No locks available"))],
    ),
    (
        "the question itself fails, and the hint misleads",
        "qemu-io: can't open device a.raw: Failed to get \"consistent read\" lock: No locks available\nIs another process using the image [a.raw]?",
        &[(READ, Some("a.raw"), Some("No locks available"))],
    ),
    (
        "an errno in JSON",
        "{\"desc\": \"Failed to lock byte 100: Input/output error\"}",
        &[(BYTE_100, None, Some("Input/output error"))],
    ),
    (
        "virsh start",
        "error: Failed to start domain 'web01'\nerror: internal error: process exited while connecting to monitor: 2026-03-01T10:11:12.345678Z qemu-system-x86_64: -blockdev {\"driver\":\"qcow2\"}: Failed to get \"write\" lock\nIs another process using the image [/var/lib/libvirt/images/web01.qcow2]?\n",
        &[(WRITE, Some("/var/lib/libvirt/images/web01.qcow2"), None)],
    ),
    (
        "virsh start of another version",
        "error: Failed to start domain web01\nerror: internal error: qemu unexpectedly closed the monitor: 2019-01-01T00:00:00.0Z qemu-kvm: -drive file=/srv/a.qcow2,format=qcow2,if=none,id=d: Failed to get \"write\" lock",
        &[(WRITE, Some("/srv/a.qcow2"), None)],
    ),
    (
        "the log of a domain",
        "2026-03-01 10:11:12.345+0000: starting up libvirt version: 11.3.0\n2026-03-01T10:11:12.4Z qemu-system-x86_64: Failed to get shared \"write\" lock\nIs another process using the image [/srv/a.raw]?\n2026-03-01 10:11:12.5+0000: shutting down, reason=failed",
        &[(SHARED_WRITE, Some("/srv/a.raw"), None)],
    ),
    (
        "a journal, a line each",
        "Mar 01 10:11:12 kvm1 libvirtd[812]: internal error: process exited: qemu-kvm: Failed to get \"write\" lock\nMar 01 10:11:12 kvm1 libvirtd[812]: Is another process using the image [/srv/a.raw]?",
        &[(WRITE, Some("/srv/a.raw"), None)],
    ),
    (
        "a journal as JSON",
        "{\"MESSAGE\":\"qemu-kvm: Failed to get \\\"write\\\" lock\\nIs another process using the image [/srv/a.raw]?\",\"PRIORITY\":\"3\"}",
        &[(WRITE, Some("/srv/a.raw"), None)],
    ),
    (
        "a journal that writes a line break in hexadecimal",
        "libvirtd[812]: qemu-kvm: Failed to get \"write\" lock\\x0aIs another process using the image [/srv/a.raw]?\\x0a",
        &[(WRITE, Some("/srv/a.raw"), None)],
    ),
    (
        "rsyslog writes a line break in octal",
        "kvm1 libvirtd: Failed to get \"write\" lock#012Is another process using the image [/srv/a.raw]?#012",
        &[(WRITE, Some("/srv/a.raw"), None)],
    ),
    (
        "an event of Kubernetes",
        "Warning  SyncFailed  3s (x5)  virt-handler  server error. command SyncVMI failed: \"LibvirtError(Code=1, Domain=10, Message='internal error: process exited while connecting to monitor: qemu-kvm: -blockdev {\\\"node-name\\\":\\\"n\\\"}: Failed to get \\\"write\\\" lock\\nIs another process using the image [/var/run/kubevirt-private/vmi-disks/rootdisk/disk.img]?')\"",
        &[(WRITE, Some("/var/run/kubevirt-private/vmi-disks/rootdisk/disk.img"), None)],
    ),
    (
        "an event of Kubernetes as JSON, escaped twice",
        r#"{"message":"server error: \"Message='Failed to get \\\"write\\\" lock\\nIs another process using the image [/var/run/kubevirt-private/vmi-disks/a/disk.img]?'\""}"#,
        &[(WRITE, Some("/var/run/kubevirt-private/vmi-disks/a/disk.img"), None)],
    ),
    (
        "JSON with unicode escapes",
        r#"{"m":"Failed to get \u0022write\u0022 lock\u000aIs another process using the image [\/srv\/a.raw]?"}"#,
        &[(WRITE, Some("/srv/a.raw"), None)],
    ),
    (
        "a traceback of nova",
        "ERROR nova.virt.libvirt.guest libvirt.libvirtError: internal error: qemu unexpectedly closed the monitor: 2026-01-01T00:00:00.0Z qemu-system-x86_64: -drive file=/var/lib/nova/instances/7f/disk,format=qcow2: Failed to get \"write\" lock\\nIs another process using the image [/var/lib/nova/instances/7f/disk]?",
        &[(WRITE, Some("/var/lib/nova/instances/7f/disk"), None)],
    ),
    (
        "a bytes literal of Python",
        "CalledProcessError: stderr=b'qemu-img: Could not open \\'/srv/a.raw\\': Failed to get shared \"write\" lock\\nIs another process using the image [/srv/a.raw]?\\n'",
        &[(SHARED_WRITE, Some("/srv/a.raw"), None)],
    ),
    (
        "a task of Proxmox VE",
        "kvm: -drive file=/dev/pve/vm-101-disk-0,if=none,id=drive-scsi0: Failed to get \"write\" lock\nIs another process using the image [/dev/pve/vm-101-disk-0]?\nTASK ERROR: start failed: QEMU exited with code 1",
        &[(WRITE, Some("/dev/pve/vm-101-disk-0"), None)],
    ),
    (
        "vdsm of oVirt",
        "VM web01 is down with error. Exit message: internal error: process exited while connecting to monitor: qemu-kvm: Failed to get \"write\" lock Is another process using the image [/rhev/data-center/1/images/2/3]?.",
        &[(WRITE, Some("/rhev/data-center/1/images/2/3"), None)],
    ),
    (
        "Ansible",
        "fatal: [kvm1]: FAILED! => {\"changed\": true, \"rc\": 1, \"stderr\": \"qemu-img: Could not open '/srv/a.qcow2': Failed to get \\\"write\\\" lock\\nIs another process using the image [/srv/a.qcow2]?\", \"stderr_lines\": [\"qemu-img: Could not open '/srv/a.qcow2': Failed to get \\\"write\\\" lock\", \"Is another process using the image [/srv/a.qcow2]?\"]}",
        &[(WRITE, Some("/srv/a.qcow2"), None)],
    ),
    (
        "a web page's source",
        "Failed to get &quot;write&quot; lock Is another process using the image [/srv/a&amp;b.raw]?",
        &[(WRITE, Some("/srv/a&b.raw"), None)],
    ),
    (
        "a terminal in colour",
        "\u{1b}[31;1mqemu-img: Could not open '/srv/a.raw': Failed to get \u{1b}[4m\"write\"\u{1b}[0m lock\u{1b}[0m\nIs another process using the image [\u{1b}]8;;file:///srv/a.raw\u{7}/srv/a.raw\u{1b}]8;;\u{1b}\\]?\u{1b}[K",
        &[(WRITE, Some("/srv/a.raw"), None)],
    ),
    (
        "a serial console ends its lines twice",
        "qemu-io: can't open device /srv/a.raw: Failed to get \"write\" lock\r\nIs another process using the image [/srv/a.raw]?\r\n",
        &[(WRITE, Some("/srv/a.raw"), None)],
    ),
    (
        "a window of 40 columns breaks words",
        "qemu-system-x86_64: -drive file=/srv/ima\nges/web01.qcow2,if=virtio: Failed to get\n shared \"write\" lock\nIs another process using the image [/srv\n/images/web01.qcow2]?",
        &[(SHARED_WRITE, Some("/srv/images/web01.qcow2"), None)],
    ),
    (
        "a quoted mail",
        "On Monday somebody wrote:\n> qemu-kvm: -drive file=x: Failed to get\n> \"write\" lock\n> Is another process using the image\n> [/srv/a.raw]?\n",
        &[(WRITE, Some("/srv/a.raw"), None)],
    ),
    (
        "quotation marks that a word processor turned",
        "qemu-img: Could not open ‘/srv/a.raw’: Failed to get “write” lock\nIs another process using the image [/srv/a.raw]?",
        &[(WRITE, Some("/srv/a.raw"), None)],
    ),
    (
        "libvirt in German",
        "Fehler: Domain 'web01' konnte nicht gestartet werden\nFehler: Interner Fehler: Prozess während der Verbindung zum Monitor beendet: qemu-system-x86_64: Failed to get \"write\" lock\nIs another process using the image [/srv/Büro.raw]?",
        &[(WRITE, Some("/srv/Büro.raw"), None)],
    ),
    (
        "libvirt in French",
        "erreur : Impossible de démarrer le domaine « web01 »\nerreur : erreur interne : Failed to get \"write\" lock\nIs another process using the image [/srv/a.raw]?",
        &[(WRITE, Some("/srv/a.raw"), None)],
    ),
    (
        "libvirt in Japanese",
        "エラー: ドメイン web01 の起動に失敗しました\nエラー: 内部エラー: Failed to get \"write\" lock\nIs another process using the image [/srv/画像.raw]?",
        &[(WRITE, Some("/srv/画像.raw"), None)],
    ),
    (
        "libvirt in Russian",
        "ошибка: Не удалось запустить домен web01\nошибка: внутренняя ошибка: Failed to get shared \"consistent read\" lock\nIs another process using the image [/srv/a.raw]?",
        &[("Failed to get shared \"consistent read\" lock", Some("/srv/a.raw"), None)],
    ),
    (
        "a name with brackets and spaces",
        "Failed to get \"write\" lock\nIs another process using the image [/srv/disk [1] of 2.raw]?",
        &[(WRITE, Some("/srv/disk [1] of 2.raw"), None)],
    ),
    (
        "a stream job",
        "qemu-system-x86_64: Failed to get \"write unchanged\" lock\nIs another process using the image [/srv/a.raw]?",
        &[("Failed to get \"write unchanged\" lock", Some("/srv/a.raw"), None)],
    ),
    (
        "a byte of QEMU 6.2",
        "qemu-system-x86_64: Failed to get shared \"graph-mod\" lock\nIs another process using the image [/srv/a.raw]?",
        &[("Failed to get shared \"graph-mod\" lock", Some("/srv/a.raw"), None)],
    ),
    (
        "two images in one log",
        "qemu-img: Could not open '/srv/a.raw': Failed to get \"write\" lock\nIs another process using the image [/srv/a.raw]?\nqemu-img: Could not open '/srv/b.raw': Failed to get shared \"resize\" lock\nIs another process using the image [/srv/b.raw]?",
        &[(WRITE, Some("/srv/a.raw"), None), ("Failed to get shared \"resize\" lock", Some("/srv/b.raw"), None)],
    ),
    (
        "one message in every layer of a log",
        "DEBUG stderr: Failed to get \"write\" lock\nIs another process using the image [/srv/a.raw]?\nERROR command failed: Failed to get \"write\" lock\nIs another process using the image [/srv/a.raw]?",
        &[(WRITE, Some("/srv/a.raw"), None)],
    ),
    ("another failure", "qemu-img: Could not open '/srv/a.raw': Permission denied", &[]),
    ("a lock of another kind", "dpkg: error: Failed to get write lock on /var/lib/dpkg/lock", &[]),
];

fn said(report: &Report) -> (String, Option<String>, Option<String>) {
    (report.message.sentence.to_string(), report.images.first().cloned(), report.message.errno.clone())
}

#[test]
fn every_form_is_read() {
    assert!(FORMS.len() >= 45);
    let mut wrong = Vec::new();
    for (name, text, expected) in FORMS {
        let found: Vec<_> = decode(text).iter().map(said).collect();
        let owned = |s: &Option<&str>| s.map(str::to_owned);
        let expected: Vec<_> = expected.iter().map(|(s, i, e)| ((*s).to_owned(), owned(i), owned(e))).collect();
        if found != expected {
            wrong.push(format!("{name}:\n  expected {expected:?}\n  found    {found:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_form_is_read_inside_json_too() {
    for (name, text, expected) in FORMS.iter().filter(|(_, _, e)| !e.is_empty()) {
        let mut carried = (*text).to_owned();
        for layer in 1..=2 {
            carried = serde_json::json!({ "message": carried }).to_string();
            let found = decode(&carried);
            assert_eq!(found.len(), expected.len(), "{name}, layer {layer}: {found:?}");
            assert_eq!(found[0].message.sentence.to_string(), expected[0].0, "{name}, layer {layer}");
            assert_eq!(found[0].images.first().map(String::as_str), expected[0].1, "{name}, layer {layer}");
        }
    }
}

#[test]
fn what_stands_around_the_sentence_is_told_too() {
    let [report] = decode(FORMS.iter().find(|(n, ..)| *n == "virsh start").unwrap().1).try_into().unwrap();
    assert_eq!((report.domain.as_deref(), report.program.as_deref()), (Some("web01"), Some("qemu-system-x86_64")));
    let [report] =
        decode(FORMS.iter().find(|(n, ..)| *n == "the backing file is refused").unwrap().1).try_into().unwrap();
    assert!(report.on_backing_file);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_text_makes_it_panic(text in any::<String>(), form in 0..FORMS.len(), cut in 0usize..400) {
        let _ = decode(&text);
        let whole = FORMS[form].1;
        let cut = (0..=cut.min(whole.len())).rev().find(|i| whole.is_char_boundary(*i)).unwrap();
        let _ = decode(&whole[..cut]);
        let _ = decode(&format!("{text}{}{text}", &whole[cut..]));
    }
}
