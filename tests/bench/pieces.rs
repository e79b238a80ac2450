//! How long do the pieces take that a tick is made of? `cargo bench`.
//!
//! On this host as it is: what the kernel is asked depends on how many locks and processes there are, so it is best run
//! beside a population (`population.rs`).
#![allow(clippy::expect_used)]

use std::fs::File;
use std::hint::black_box;
use std::path::PathBuf;

use divan::Bencher;
use divan::counter::ItemsCount;
use qlock::hold::HeldAccess;
use qlock::linux::Roots;
use qlock::linux::descriptors::{self, Fdinfo};
use qlock::linux::lock_table::{LockTable, parse_table};
use qlock::linux::probe::{self, Asker};
use qlock::linux::task_files::TaskFiles;
use qlock::monitor::look::{Looker, Scope};
use qlock::monitor::snapshot::Snapshot;

fn main() {
    divan::main();
}

/// Raw images in a directory of their own, every second one held as a VM holds it.
struct Images {
    directory: tempfile::TempDir,
    _held: Vec<HeldAccess>,
}

impl Images {
    fn new(count: usize) -> Self {
        let directory = tempfile::tempdir().expect("a directory for images");
        let access = "cw/w".parse().expect("an access");
        let mut held = Vec::new();
        for i in 0..count {
            let path = directory.path().join(format!("vm-{i:05}.raw"));
            File::create(&path).and_then(|f| f.set_len(64 * 1024)).expect("an image");
            if i % 2 == 0 {
                held.push(HeldAccess::acquire(&path, access).expect("its lock"));
            }
        }
        Self { directory, _held: held }
    }

    fn looker(&self) -> Looker {
        let paths: [PathBuf; 1] = [self.directory.path().to_owned()];
        Looker::new(Roots::host(), &paths, false, None).expect("images to look at")
    }
}

#[divan::bench(args = [100, 1_000, 10_000])]
fn parse_lock_table(bencher: Bencher<'_, '_>, rows: usize) {
    let row = |i: usize| format!("{i}: OFDLCK ADVISORY  READ -1 fe:00:{} 100 101\n", 10_000_000 + i);
    let text: String = (0..rows).map(row).collect();
    bencher.counter(ItemsCount::new(rows)).bench(|| parse_table(black_box(&text)));
}

#[divan::bench]
fn parse_fdinfo() -> Fdinfo {
    Fdinfo::parse(black_box(
        "pos:\t0\nflags:\t02100002\nmnt_id:\t24\nino:\t10420357\n\
         lock:\t1: OFDLCK ADVISORY  READ -1 fe:00:10420357 100 101\n\
         lock:\t2: OFDLCK ADVISORY  READ -1 fe:00:10420357 201 201\n",
    ))
}

#[divan::bench]
fn read_lock_table(bencher: Bencher<'_, '_>) {
    let (roots, mut table) = (Roots::host(), LockTable::default());
    bencher.bench_local(|| table.refresh(&roots));
}

#[divan::bench]
fn list_processes() -> usize {
    descriptors::processes(&Roots::host()).map_or(0, |all| all.len())
}

/// Open, ask, close: of a free image and of a held one.
#[divan::bench(args = [1, 0])]
fn ask_an_image(bencher: Bencher<'_, '_>, which: usize) {
    let images = Images::new(2);
    let path = images.directory.path().join(format!("vm-{which:05}.raw")).canonicalize().expect("an image");
    bencher.bench(|| {
        let (file, _) = probe::open(&path).expect("an image");
        probe::held_bytes(&file, Asker::Process)
    });
}

/// All descriptors of all processes, as the kernel tells it and as `/proc` does.
#[divan::bench]
fn every_descriptor_by_bpf(bencher: Bencher<'_, '_>) {
    let Ok(mut files) = TaskFiles::load_if_allowed() else {
        eprintln!("left out: the program in the kernel needs CAP_BPF and CAP_PERFMON");
        return;
    };
    bencher.bench_local(|| {
        let mut count = 0_usize;
        files.each(|_| count += 1).map(|()| count)
    });
}

#[divan::bench]
fn every_descriptor_by_proc() -> usize {
    let roots = Roots::host();
    let all = descriptors::processes(&roots).unwrap_or_default();
    all.iter().filter_map(|p| descriptors::of_process(&roots, p.pid, &|_| false).ok()).count()
}

/// A look at everything, all images asked, when nothing has changed.
#[divan::bench(args = [100, 1_000, 10_000], sample_count = 20)]
fn quiet_look(bencher: Bencher<'_, '_>, count: usize) {
    let images = Images::new(count);
    let mut looker = images.looker();
    let _ = looker.look(Scope::Everything);
    bencher.counter(ItemsCount::new(count)).bench_local(|| looker.look(Scope::Everything));
}

#[divan::bench(args = [100, 1_000, 10_000], sample_count = 20)]
fn understand(bencher: Bencher<'_, '_>, count: usize) {
    let images = Images::new(count);
    let sample = images.looker().look(Scope::Everything);
    bencher.counter(ItemsCount::new(count)).bench_local(|| Snapshot::of(black_box(&sample)));
}
