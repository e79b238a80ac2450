//! What do the programs of QEMU lock, test and let go? The measured table.
//!
//! Each step reads `step(locked, tested, let go)` in `uses/denies` notation: c consistent read, w write, u write
//! unchanged, r resize. Measured with QEMU 10.0.2 on Linux 6.18, one run an entry; 7.2 agrees on every steady state.
//! `tests/protocol.rs` compares it with the recorded measurement and with what real programs were told.

use super::{Below, Operation, Recipe, Step};
use crate::protocol::access::Access;
use crate::protocol::permission::{LockByte, Permission};

const fn step(lock: &str, test: &str, unlock: &str) -> Step {
    Step { lock: access(lock), test: access(test), unlock: access(unlock) }
}

/// The notation of [`Access`], read while compiling: a typing error in the table does not build.
#[allow(clippy::panic)]
const fn access(text: &str) -> Access {
    let text = text.as_bytes();
    let mut access = Access::NONE;
    let mut denies = false;
    let mut i = 0;
    while i < text.len() {
        let permission = match text[i] {
            b'/' => {
                denies = true;
                i += 1;
                continue;
            }
            b'-' => {
                i += 1;
                continue;
            }
            b'c' => Permission::ConsistentRead,
            b'w' => Permission::Write,
            b'u' => Permission::WriteUnchanged,
            b'r' => Permission::Resize,
            _ => panic!("not a letter of the notation"),
        };
        access = access.with(if denies { LockByte::unshare(permission) } else { LockByte::permission(permission) });
        i += 1;
    }
    access
}

/// What a program takes of each file below the image; measured on overlays of qcow2 and of raw, for every operation.
const NONE: Below = below("-/-", "-/-");
/// It lets others write the image, or says nothing about it: the tools, `share-rw`.
const READ: Below = below("c/-", "c/wr");
/// It denies writing, and so do raw files below: VMs, and `convert`.
const READ_ALONE: Below = below("c/wr", "c/wr");
/// `-U` and `force-share`.
const READ_SHARED: Below = below("c/-", "c/-");

const fn below(raw: &str, qcow2: &str) -> Below {
    Below { raw: access(raw), qcow2: access(qcow2) }
}

pub(super) const OPERATIONS: &[Operation] = &[
    Operation {
        name: "amend",
        backing: READ,
        raw: None,
        qcow2: Some(Recipe::new(
            "qemu-img amend -f qcow2 -o lazy_refcounts=on a.qcow2",
            &[step("cwr/wr", "cwr/wr", "-/-"), step("-/-", "-/-", "cwr/wr")],
        )),
    },
    Operation {
        name: "bench",
        backing: READ,
        raw: Some(Recipe::new(
            "qemu-img bench -c 1 -f raw a.raw",
            &[step("c/-", "c/-", "-/-"), step("-/-", "-/-", "c/-")],
        )),
        qcow2: Some(Recipe::new(
            "qemu-img bench -c 1 -f qcow2 a.qcow2",
            &[step("c/wr", "c/wr", "-/-"), step("-/-", "-/-", "c/wr")],
        )),
    },
    Operation {
        name: "bench-write",
        backing: READ,
        raw: Some(Recipe::new(
            "qemu-img bench -w -c 1 -f raw a.raw",
            &[step("cw/-", "cw/-", "-/-"), step("-/-", "-/-", "cw/-")],
        )),
        qcow2: Some(Recipe::new(
            "qemu-img bench -w -c 1 -f qcow2 a.qcow2",
            &[step("cwr/wr", "cwr/wr", "-/-"), step("-/-", "-/-", "cwr/wr")],
        )),
    },
    Operation {
        name: "bitmap-add",
        backing: NONE,
        raw: None,
        qcow2: Some(Recipe::new(
            "qemu-img bitmap --add -f qcow2 a.qcow2 bm",
            &[step("cwr/wr", "cwr/wr", "-/-"), step("-/-", "-/-", "wr/wr")],
        )),
    },
    Operation {
        name: "check",
        backing: READ,
        raw: None,
        qcow2: Some(Recipe::new(
            "qemu-img check -f qcow2 a.qcow2",
            &[step("c/wr", "c/wr", "-/-"), step("-/-", "-/-", "c/wr")],
        )),
    },
    Operation {
        name: "check-force-share",
        backing: READ_SHARED,
        raw: None,
        qcow2: Some(Recipe::new(
            "qemu-img check -U -f qcow2 a.qcow2",
            &[step("c/-", "c/-", "-/-"), step("-/-", "-/-", "c/-")],
        )),
    },
    Operation {
        name: "check-repair",
        backing: READ,
        raw: None,
        qcow2: Some(Recipe::new(
            "qemu-img check -r all -f qcow2 a.qcow2",
            &[step("cwr/wr", "cwr/wr", "-/-"), step("-/-", "-/-", "cwr/wr")],
        )),
    },
    Operation {
        name: "commit-into-backing",
        backing: READ,
        raw: Some(Recipe::new(
            "qemu-img commit -f qcow2 or.qcow2",
            &[
                step("c/-", "c/-", "-/-"),
                step("c/-", "-/-", "-/-"),
                step("-/-", "-/-", "c/-"),
                step("w/r", "w/r", "-/-"),
                step("-/-", "-/-", "w/r"),
                step("cw/-", "cw/-", "cw/-"),
            ],
        )),
        qcow2: Some(Recipe::new(
            "qemu-img commit -f qcow2 oq.qcow2",
            &[
                step("c/wr", "c/wr", "-/-"),
                step("wr/-", "cwr/wr", "-/-"),
                step("cwr/wr", "-/-", "-/-"),
                step("-/-", "-/-", "wr/wr"),
            ],
        )),
    },
    Operation {
        name: "compare",
        backing: READ,
        raw: Some(Recipe::new(
            "qemu-img compare -f raw -F raw a.raw src.raw",
            &[step("c/-", "c/-", "-/-"), step("-/-", "-/-", "c/-")],
        )),
        qcow2: Some(Recipe::new(
            "qemu-img compare -f qcow2 -F raw a.qcow2 src.raw",
            &[step("c/wr", "c/wr", "-/-"), step("-/-", "-/-", "c/wr")],
        )),
    },
    Operation {
        name: "convert-into-existing",
        backing: READ,
        raw: Some(Recipe::new(
            "qemu-img convert -n -f raw -O raw src.raw a.raw",
            &[step("cw/-", "cw/-", "-/-"), step("-/-", "-/-", "cw/-")],
        )),
        qcow2: Some(Recipe::new(
            "qemu-img convert -n -f raw -O qcow2 src.raw a.qcow2",
            &[step("cwr/wr", "cwr/wr", "-/-"), step("-/-", "-/-", "cwr/wr")],
        )),
    },
    Operation {
        name: "convert-source",
        backing: READ_ALONE,
        raw: Some(Recipe::new(
            "qemu-img convert -f raw -O raw a.raw out.raw",
            &[step("c/wr", "c/wr", "-/-"), step("-/-", "-/-", "c/wr")],
        )),
        qcow2: Some(Recipe::new(
            "qemu-img convert -f qcow2 -O raw a.qcow2 out.raw",
            &[step("c/wr", "c/wr", "-/-"), step("-/-", "-/-", "c/wr")],
        )),
    },
    Operation {
        name: "convert-source-force-share",
        backing: READ_SHARED,
        raw: Some(Recipe::new(
            "qemu-img convert -U -f raw -O raw a.raw out.raw",
            &[step("c/-", "c/-", "-/-"), step("-/-", "-/-", "c/-")],
        )),
        qcow2: Some(Recipe::new(
            "qemu-img convert -U -f qcow2 -O raw a.qcow2 out.raw",
            &[step("c/-", "c/-", "-/-"), step("-/-", "-/-", "c/-")],
        )),
    },
    Operation {
        name: "convert-target",
        backing: NONE,
        raw: Some(
            Recipe::new(
                "qemu-img convert -f raw -O raw src.raw a.raw",
                &[step("wr/r", "wr/r", "-/-"), step("-/-", "-/-", "cwur/cwur"), step("cw/-", "cw/-", "cw/-")],
            )
            .destroying_after(0),
        ),
        qcow2: Some(
            Recipe::new(
                "qemu-img convert -f raw -O qcow2 src.raw a.qcow2",
                &[
                    step("wr/r", "wr/r", "-/-"),
                    step("-/-", "-/-", "cwur/cwur"),
                    step("wr/-", "wr/-", "-/-"),
                    step("-/-", "-/-", "wr/-"),
                    step("cwr/wr", "cwr/wr", "-/-"),
                    step("-/-", "-/-", "cwr/wr"),
                    step("wr/wr", "wr/wr", "-/-"),
                    step("-/-", "-/-", "wr/wr"),
                    step("cwr/wr", "cwr/wr", "-/-"),
                    step("-/-", "-/-", "cwr/wr"),
                ],
            )
            .destroying_after(0),
        ),
    },
    Operation {
        name: "create",
        backing: NONE,
        raw: Some(
            Recipe::new(
                "qemu-img create -f raw a.raw 16M",
                &[step("wr/r", "wr/r", "-/-"), step("-/-", "-/-", "cwur/cwur")],
            )
            .destroying_after(0),
        ),
        qcow2: Some(
            Recipe::new(
                "qemu-img create -f qcow2 a.qcow2 16M",
                &[
                    step("wr/r", "wr/r", "-/-"),
                    step("-/-", "-/-", "cwur/cwur"),
                    step("wr/-", "wr/-", "-/-"),
                    step("-/-", "-/-", "wr/-"),
                    step("cwr/wr", "cwr/wr", "-/-"),
                    step("-/-", "-/-", "cwr/wr"),
                    step("wr/wr", "wr/wr", "-/-"),
                    step("-/-", "-/-", "wr/wr"),
                ],
            )
            .destroying_after(0),
        ),
    },
    Operation {
        name: "create-overlay",
        backing: NONE,
        raw: Some(Recipe::new("qemu-img create -f qcow2 -b a.raw -F raw new.qcow2", &[])),
        qcow2: Some(Recipe::new("qemu-img create -f qcow2 -b a.qcow2 -F qcow2 new.qcow2", &[])),
    },
    Operation {
        name: "dd-source",
        backing: READ_ALONE,
        raw: Some(Recipe::new(
            "qemu-img dd -f raw -O raw if=a.raw of=out.raw bs=1M",
            &[step("c/-", "c/-", "-/-"), step("-/-", "-/-", "c/-")],
        )),
        qcow2: None,
    },
    Operation {
        name: "info",
        backing: NONE,
        raw: Some(Recipe::new("qemu-img info -f raw a.raw", &[])),
        qcow2: Some(Recipe::new(
            "qemu-img info -f qcow2 a.qcow2",
            &[step("-/wr", "-/wr", "-/-"), step("-/-", "-/-", "-/wr")],
        )),
    },
    Operation {
        name: "info-as-raw",
        backing: NONE,
        raw: None,
        qcow2: Some(Recipe::new("qemu-img info -f raw a.qcow2", &[])),
    },
    Operation {
        name: "info-force-share",
        backing: NONE,
        raw: Some(Recipe::new("qemu-img info -U -f raw a.raw", &[])),
        qcow2: Some(Recipe::new("qemu-img info -U -f qcow2 a.qcow2", &[])),
    },
    Operation {
        name: "io",
        backing: READ,
        raw: Some(Recipe::new(
            "qemu-io -f raw -c \"read 0 512\" a.raw",
            &[step("cw/-", "cw/-", "-/-"), step("-/-", "-/-", "cw/-")],
        )),
        qcow2: Some(Recipe::new(
            "qemu-io -f qcow2 -c \"read 0 512\" a.qcow2",
            &[step("cwr/wr", "cwr/wr", "-/-"), step("-/-", "-/-", "cwr/wr")],
        )),
    },
    Operation {
        name: "io-as-raw",
        backing: NONE,
        raw: None,
        qcow2: Some(Recipe::new(
            "qemu-io -f raw -c \"read 0 512\" a.qcow2",
            &[step("cw/-", "cw/-", "-/-"), step("-/-", "-/-", "cw/-")],
        )),
    },
    Operation {
        name: "io-force-share",
        backing: READ_SHARED,
        raw: Some(Recipe::new(
            "qemu-io -r -U -f raw -c \"read 0 512\" a.raw",
            &[step("c/-", "c/-", "-/-"), step("-/-", "-/-", "c/-")],
        )),
        qcow2: Some(Recipe::new(
            "qemu-io -r -U -f qcow2 -c \"read 0 512\" a.qcow2",
            &[step("c/-", "c/-", "-/-"), step("-/-", "-/-", "c/-")],
        )),
    },
    Operation {
        name: "io-read-only",
        backing: READ,
        raw: Some(Recipe::new(
            "qemu-io -r -f raw -c \"read 0 512\" a.raw",
            &[step("c/-", "c/-", "-/-"), step("-/-", "-/-", "c/-")],
        )),
        qcow2: Some(Recipe::new(
            "qemu-io -r -f qcow2 -c \"read 0 512\" a.qcow2",
            &[step("c/wr", "c/wr", "-/-"), step("-/-", "-/-", "c/wr")],
        )),
    },
    Operation {
        name: "io-read-only-as-raw",
        backing: NONE,
        raw: None,
        qcow2: Some(Recipe::new(
            "qemu-io -r -f raw -c \"read 0 512\" a.qcow2",
            &[step("c/-", "c/-", "-/-"), step("-/-", "-/-", "c/-")],
        )),
    },
    Operation {
        name: "io-truncate",
        backing: READ,
        raw: Some(Recipe::new(
            "qemu-io -f raw -c \"truncate 16M\" a.raw",
            &[step("cw/-", "cw/-", "-/-"), step("r/-", "cwr/-", "-/-"), step("-/-", "-/-", "cwr/-")],
        )),
        qcow2: None,
    },
    Operation {
        name: "map",
        backing: READ,
        raw: Some(Recipe::new("qemu-img map -f raw a.raw", &[step("c/-", "c/-", "c/-")])),
        qcow2: Some(Recipe::new(
            "qemu-img map -f qcow2 a.qcow2",
            &[step("c/wr", "c/wr", "-/-"), step("-/-", "-/-", "c/wr")],
        )),
    },
    Operation {
        name: "measure",
        backing: READ,
        raw: Some(Recipe::new("qemu-img measure -O qcow2 -f raw a.raw", &[step("c/-", "c/-", "c/-")])),
        qcow2: Some(Recipe::new(
            "qemu-img measure -O qcow2 -f qcow2 a.qcow2",
            &[step("c/wr", "c/wr", "-/-"), step("-/-", "-/-", "c/wr")],
        )),
    },
    Operation {
        name: "nbd",
        backing: READ,
        raw: Some(Recipe::new(
            "qemu-nbd -t -k {s} -f raw a.raw",
            &[step("cw/-", "cw/-", "-/-"), step("-/r", "cw/r", "cw/r")],
        )),
        qcow2: Some(Recipe::new(
            "qemu-nbd -t -k {s} -f qcow2 a.qcow2",
            &[step("cwr/wr", "cwr/wr", "-/-"), step("-/-", "-/-", "cwr/wr")],
        )),
    },
    Operation {
        name: "nbd-read-only",
        backing: READ,
        raw: Some(Recipe::new(
            "qemu-nbd -t -k {s} -r -f raw a.raw",
            &[step("c/-", "c/-", "-/-"), step("-/r", "c/r", "c/r")],
        )),
        qcow2: Some(Recipe::new(
            "qemu-nbd -t -k {s} -r -f qcow2 a.qcow2",
            &[step("c/wr", "c/wr", "-/-"), step("-/-", "-/-", "c/wr")],
        )),
    },
    Operation {
        name: "rebase-backing",
        backing: READ,
        raw: Some(Recipe::new("qemu-img rebase -f qcow2 -b a.raw -F raw or.qcow2", &[step("c/-", "c/-", "c/-")])),
        qcow2: Some(Recipe::new(
            "qemu-img rebase -f qcow2 -b a.qcow2 -F qcow2 oq.qcow2",
            &[step("c/wr", "c/wr", "-/-"), step("-/-", "-/-", "c/wr")],
        )),
    },
    Operation {
        name: "rebase-unsafe",
        backing: NONE,
        raw: None,
        qcow2: Some(Recipe::new(
            "qemu-img rebase -u -f qcow2 -b src.raw -F raw a.qcow2",
            &[step("cwr/wr", "cwr/wr", "-/-"), step("-/-", "-/-", "cwr/wr")],
        )),
    },
    Operation {
        name: "resize",
        backing: READ,
        raw: Some(Recipe::new(
            "qemu-img resize -f raw a.raw 32M",
            &[step("cwr/-", "cwr/-", "-/-"), step("-/-", "-/-", "cwr/-")],
        )),
        qcow2: Some(Recipe::new(
            "qemu-img resize -f qcow2 a.qcow2 32M",
            &[step("cwr/wr", "cwr/wr", "-/-"), step("-/-", "-/-", "cwr/wr")],
        )),
    },
    Operation {
        name: "snapshot-create",
        backing: READ,
        raw: None,
        qcow2: Some(Recipe::new(
            "qemu-img snapshot -c s1 a.qcow2",
            &[step("cwr/wr", "cwr/wr", "-/-"), step("-/-", "-/-", "cwr/wr")],
        )),
    },
    Operation {
        name: "snapshot-list",
        backing: READ,
        raw: None,
        qcow2: Some(Recipe::new(
            "qemu-img snapshot -l a.qcow2",
            &[step("c/wr", "c/wr", "-/-"), step("-/-", "-/-", "c/wr")],
        )),
    },
    Operation {
        name: "snapshot-list-force-share",
        backing: READ_SHARED,
        raw: None,
        qcow2: Some(Recipe::new(
            "qemu-img snapshot -l -U a.qcow2",
            &[step("c/-", "c/-", "-/-"), step("-/-", "-/-", "c/-")],
        )),
    },
    Operation {
        name: "vm",
        backing: READ_ALONE,
        raw: Some(Recipe::new(
            "-drive if=virtio,file=a.raw,format=raw",
            &[
                step("c/-", "c/-", "-/-"),
                step("w/w", "cw/w", "-/-"),
                step("cw/w", "-/-", "-/-"),
                step("-/-", "-/-", "cw/w"),
            ],
        )),
        qcow2: Some(Recipe::new(
            "-drive if=virtio,file=a.qcow2,format=qcow2",
            &[step("cwr/wr", "cwr/wr", "-/-"), step("cwr/wr", "-/-", "-/-"), step("-/-", "-/-", "cwr/wr")],
        )),
    },
    Operation {
        name: "vm-as-backing",
        backing: READ_ALONE,
        raw: Some(Recipe::new(
            "-drive if=virtio,file=or2.qcow2,format=qcow2",
            &[step("c/-", "c/-", "-/-"), step("-/wr", "c/wr", "-/-"), step("-/-", "-/-", "c/wr")],
        )),
        qcow2: Some(Recipe::new(
            "-drive if=virtio,file=oq2.qcow2,format=qcow2",
            &[step("c/wr", "c/wr", "-/-"), step("-/-", "-/-", "c/wr")],
        )),
    },
    Operation {
        name: "vm-blockdev",
        backing: READ_ALONE,
        raw: Some(Recipe::new("-blockdev file,node-name=f,filename=a.raw", &[])),
        qcow2: None,
    },
    Operation {
        name: "vm-cdrom",
        backing: READ_ALONE,
        raw: Some(Recipe::new(
            "-drive if=ide,media=cdrom,file=a.raw,format=raw",
            &[step("c/-", "c/-", "-/-"), step("-/wr", "c/wr", "c/wr")],
        )),
        qcow2: None,
    },
    Operation {
        name: "vm-force-share",
        backing: READ_SHARED,
        raw: None,
        qcow2: Some(Recipe::new(
            "-drive if=virtio,file=a.qcow2,format=qcow2,readonly=on,force-share=on",
            &[step("c/-", "c/-", "-/-"), step("-/-", "-/-", "c/-")],
        )),
    },
    Operation {
        name: "vm-incoming",
        backing: NONE,
        raw: Some(Recipe::new("-incoming defer -drive if=virtio,file=a.raw,format=raw", &[])),
        qcow2: Some(Recipe::new("-incoming defer -drive if=virtio,file=a.qcow2,format=qcow2", &[])),
    },
    Operation {
        name: "vm-locking-off",
        backing: READ_ALONE,
        raw: Some(Recipe::new("-drive if=virtio,file=a.raw,format=raw,file.locking=off", &[])),
        qcow2: Some(Recipe::new("-drive if=virtio,file=a.qcow2,format=qcow2,file.locking=off", &[])),
    },
    Operation {
        name: "vm-nvme",
        backing: READ_ALONE,
        raw: Some(Recipe::new(
            "-drive if=none,id=d,file=a.raw,format=raw -device nvme,drive=d,serial=x",
            &[
                step("c/-", "c/-", "-/-"),
                step("w/wr", "cw/wr", "-/-"),
                step("cw/wr", "-/-", "-/-"),
                step("-/-", "-/-", "cw/wr"),
            ],
        )),
        qcow2: None,
    },
    Operation {
        name: "vm-read-only",
        backing: READ_ALONE,
        raw: Some(Recipe::new(
            "-drive if=virtio,file=a.raw,format=raw,readonly=on",
            &[step("c/-", "c/-", "-/-"), step("-/w", "c/w", "-/-"), step("-/-", "-/-", "c/w")],
        )),
        qcow2: Some(Recipe::new(
            "-drive if=virtio,file=a.qcow2,format=qcow2,readonly=on",
            &[step("c/wr", "c/wr", "-/-"), step("-/-", "-/-", "c/wr")],
        )),
    },
    Operation {
        name: "vm-share-rw",
        backing: READ,
        raw: Some(Recipe::new(
            "-drive if=none,id=d,file=a.raw,format=raw -device virtio-blk-pci,drive=d,share-rw=on",
            &[
                step("c/-", "c/-", "-/-"),
                step("w/-", "cw/-", "-/-"),
                step("cw/-", "-/-", "-/-"),
                step("-/-", "-/-", "cw/-"),
            ],
        )),
        qcow2: Some(Recipe::new(
            "-drive if=none,id=d,file=a.qcow2,format=qcow2 -device virtio-blk-pci,drive=d,share-rw=on",
            &[step("cwr/wr", "cwr/wr", "-/-"), step("cwr/wr", "-/-", "-/-"), step("-/-", "-/-", "cwr/wr")],
        )),
    },
    Operation {
        name: "vm-snapshot",
        backing: READ_ALONE,
        raw: Some(Recipe::new(
            "-snapshot -drive if=virtio,file=a.raw,format=raw",
            &[step("c/-", "c/-", "-/-"), step("-/wr", "c/wr", "-/-"), step("-/-", "-/-", "c/wr")],
        )),
        qcow2: Some(Recipe::new(
            "-snapshot -drive if=virtio,file=a.qcow2,format=qcow2",
            &[step("c/wr", "c/wr", "-/-"), step("-/-", "-/-", "c/wr")],
        )),
    },
    Operation {
        name: "vm-unattached",
        backing: READ,
        raw: Some(Recipe::new("-drive if=none,id=d,file=a.raw,format=raw", &[step("c/-", "c/-", "c/-")])),
        qcow2: Some(Recipe::new(
            "-drive if=none,id=d,file=a.qcow2,format=qcow2",
            &[step("cwr/wr", "cwr/wr", "-/-"), step("cwr/wr", "-/-", "-/-"), step("-/-", "-/-", "cwr/wr")],
        )),
    },
];
