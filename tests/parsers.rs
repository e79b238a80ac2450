//! Do the parsers keep what they promise for anything at all? The checks of the fuzz targets, under proptest.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "fuzz/checks.rs"]
mod checks;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use proptest::prelude::*;

/// A check, its name, and inputs as they are in the world.
type Target = (&'static str, fn(&[u8]), &'static [&'static [u8]]);

const TARGETS: [Target; 6] = [
    (
        "header",
        checks::check_header,
        &[
            b"QFI\xfb\0\0\0\x03\0\0\0\0\0\0\0\x68\0\0\0\x0abase.qcow2\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\
              \0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x68\xe2\x79\x2a\xca\0\0\0\x05qcow2\0\0\0",
            b"QED\0\0\0\x01\0\x04\0\0\0\x01\0\0\0\x05\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x10\0\0\0\0\0\
              \x40\0\0\0\x04\0\0\0base",
            b"KDMV\x01\0\0\0# Disk DescriptorFile\nparentFileNameHint=\"base.vmdk\"\n",
            b"conectix\0\0\0\x02",
            b"WithoutFreeSpace",
            b"LUKS\xba\xbe\0\x01",
            b"json:{\"driver\":\"raw\"}",
            b"file:sub/base:1",
            b"nbd://host/x",
        ],
    ),
    (
        "lock_lines",
        checks::check_lock_lines,
        &[
            b"1: POSIX  ADVISORY  WRITE 812 00:1a:1284 0 EOF\n1: -> POSIX  ADVISORY  WRITE 900 00:1a:1284 0 EOF\n",
            b"2: OFDLCK ADVISORY  READ -1 fe:00:10420357 100 101\n3: LEASE  ACTIVE    READ  655 08:02:77 0 EOF\n",
            b"4: OFDLCK *NOINODE* READ -1 <none>:0 100 103\n5: FLOCK  ADVISORY  WRITE 700 103:1a2:18446744073709551615 0 0\n",
        ],
    ),
    (
        "fdinfo",
        checks::check_fdinfo,
        &[
            b"pos:\t0\nflags:\t02100002\nmnt_id:\t24\nino:\t10420357\nlock:\t1: OFDLCK ADVISORY  READ -1 fe:00:10420357 100 101\n",
            b"pos:\t0\nflags:\t012000000\nlock:\tgarbage\nlock:\t1: POSIX  ADVISORY  WRITE 1 00:1a:1284 0 EOF\n",
        ],
    ),
    (
        "cmdline",
        checks::check_cmdline,
        &[
            b"/usr/bin/qemu-system-x86_64\0-name\0guest=web01,debug-threads=on\0-S\0",
            b"/usr/bin/kvm\0-id\x00101\0-name\0db,,x",
            b"/machine.slice/machine-qemu\\x2d1\\x2dweb01.scope/libvirt/emulator",
            b"/kubepods/pod11111111-2222-3333-4444-555555555555/0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
            b"/lxc.payload.web/init.scope",
        ],
    ),
    (
        "decode",
        checks::check_decode,
        &[
            b"qemu-img: Could not open 'a.qcow2': Failed to get shared \"write\" lock\nIs another process using the image [a.qcow2]?\n",
            b"{\"error\":{\"desc\":\"Failed to get \\\"write\\\" lock\\nIs another process using the image [/a b.raw]?\"}}",
            b"error: Failed to start domain 'web01'\nerror: internal error: qemu unexpectedly closed the monitor: \
              2024-01-01T00:00:00Z qemu-system-x86_64: -blockdev {\"filename\":\"/x.raw\"}: Failed to lock byte 100",
            b"\x1b[31m> Failed to\n> get \"consis\n> tent read\" lock#012Is another process using the image [/x]?\x1b[0m",
        ],
    ),
    (
        "filter",
        checks::check_filter,
        &[b"vm:web !state:free perm:write", b"pid:42 user:root format:qcow2 path:/srv colour:red !", b"\x1b[A \xe2\x80\xae x"],
    ),
];

/// A small change somewhere: a byte more, less or other, a part twice or gone.
fn change(data: &mut Vec<u8>, (kind, at, length, byte): (u8, prop::sample::Index, usize, u8)) {
    if data.is_empty() {
        data.push(byte);
        return;
    }
    let at = at.index(data.len());
    let end = (at + length).min(data.len());
    match kind % 6 {
        0 => data[at] = byte,
        1 => data.insert(at, byte),
        2 => drop(data.drain(at..end)),
        3 => data.truncate(at),
        4 => data.extend_from_within(at..end),
        _ => data[at..end].fill(byte),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1024, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn anything_at_all_is_taken_as_it_must_be(data in proptest::collection::vec(any::<u8>(), 0..600)) {
        for (_, check, _) in TARGETS {
            check(&data);
        }
    }

    #[test]
    fn what_is_almost_right_is_taken_as_it_must_be(
        which: prop::sample::Index,
        other: prop::sample::Index,
        changes in proptest::collection::vec((any::<u8>(), any::<prop::sample::Index>(), 1usize..16, any::<u8>()), 0..12),
    ) {
        for (_, check, samples) in TARGETS {
            let mut data = samples[which.index(samples.len())].to_vec();
            // Two of them in one another.
            data.extend_from_slice(samples[other.index(samples.len())]);
            for one in &changes {
                change(&mut data, *one);
            }
            check(&data);
        }
    }

    #[test]
    fn any_text_is_taken_as_it_must_be(text in "\\PC{0,200}|[ -~\\t\\n]{0,300}") {
        for (_, check, _) in TARGETS {
            check(text.as_bytes());
        }
    }
}

#[test]
fn samples_hold_unchanged() {
    for (_, check, samples) in TARGETS {
        for sample in samples {
            // Cut anywhere.
            (0..=sample.len()).for_each(|end| check(&sample[..end]));
        }
    }
}

#[test]
fn each_check_has_its_fuzz_target_and_is_run_here() {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz");
    let here: BTreeSet<&str> = TARGETS.iter().map(|(name, ..)| *name).collect();
    let code = fs::read_to_string(fuzz.join("checks.rs")).unwrap();
    let checks =
        code.lines().filter_map(|l| l.strip_prefix("pub fn check_")?.split('(').next()).collect::<BTreeSet<_>>();
    assert_eq!(checks, here);
    let manifest = fs::read_to_string(fuzz.join("Cargo.toml")).unwrap();
    let files = fs::read_dir(fuzz.join("fuzz_targets")).unwrap();
    let files: BTreeSet<String> =
        files.map(|f| f.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned()).collect();
    assert_eq!(files, here.iter().map(|n| (*n).to_owned()).collect());
    for name in here {
        let target = fs::read_to_string(fuzz.join(format!("fuzz_targets/{name}.rs"))).unwrap();
        assert!(target.contains(&format!("checks::check_{name}(data)")), "{name}");
        assert!(manifest.contains(&format!("path = \"fuzz_targets/{name}.rs\"")), "{name}");
    }
}
