//! Is a held byte ever shown as free, and does asking get in anybody's way?
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use qlock::hold::HeldAccess;
use qlock::linux::Roots;
use qlock::monitor::look::{Looker, Scope};
use qlock::monitor::sampler::{Options, Sampler};
use qlock::monitor::snapshot::{Snapshot, Verdict};
use qlock::protocol::Access;
use support::{Images, am_root, have, wait_for};

const HELD: usize = 200;
const CYCLES: usize = 1000;
const LOOKS: usize = 20;

#[test]
fn no_snapshot_shows_a_held_byte_as_free_while_others_lock_at_full_speed() {
    let (images, others) = (Images::new(), Images::new());
    let access: Access = "cwr/wr".parse().unwrap();
    let held: Vec<HeldAccess> =
        (0..HELD).map(|i| HeldAccess::acquire(&images.raw(&format!("{i:03}.raw")), access).unwrap()).collect();
    let churned: Vec<PathBuf> = (0..4).map(|i| others.raw(&format!("{i}.raw"))).collect();
    let (cycles, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for path in &churned {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    drop(HeldAccess::acquire(path, access).unwrap());
                    cycles.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let result = std::panic::catch_unwind(|| {
            let mut looker = Looker::new(Roots::host(), &[images.dir().to_owned()], false, None).unwrap();
            let mut looks = 0;
            while cycles.load(Ordering::Relaxed) < CYCLES || looks < LOOKS {
                let snapshot = Snapshot::of(&looker.look(Scope::Everything));
                assert_eq!(snapshot.images.len(), HELD);
                for image in &snapshot.images {
                    assert_eq!(image.held(), access, "look {looks}: {}", image.path.display());
                    assert_eq!(image.verdict, Verdict::Held, "look {looks}: {}", image.path.display());
                }
                looks += 1;
            }
        });
        stop.store(true, Ordering::Relaxed);
        result.unwrap();
    });
    drop(held);
}

#[test]
fn watching_never_holds_up_unmounting_or_deleting() {
    if !am_root() || !have(&["mount", "umount"]) {
        return;
    }
    struct Mounted(PathBuf);
    impl Drop for Mounted {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg("-l").arg(&self.0).status();
        }
    }
    let parent = Images::new();
    let point = parent.path("mnt");
    std::fs::create_dir(&point).unwrap();
    support::run(Command::new("mount").args(["-t", "tmpfs", "-o", "size=8m", "qlock-test"]).arg(&point));
    let mounted = Mounted(point.clone());
    for i in 0..50 {
        std::fs::File::create(point.join(format!("{i}.raw"))).unwrap().set_len(1 << 16).unwrap();
    }
    let options = Options {
        paths: vec![point.clone()],
        recursive: false,
        interval: Duration::from_millis(100),
        roots: Roots::host(),
    };
    let mut sampler = Sampler::start(&options).unwrap();
    let mut latest = None;
    let mut news = |what: &str, test: &dyn Fn(&Snapshot) -> bool| {
        wait_for(what, || {
            latest = sampler.take().snapshot.or(latest.take());
            latest.as_ref().filter(|s| test(s)).map(drop)
        });
    };
    news("the images", &|s| s.images.len() == 50);
    std::fs::remove_file(point.join("0.raw")).unwrap();
    news("one image less", &|s| s.images.len() == 49);
    // The look may be in the middle of a question for a moment, never for longer.
    wait_for("the unmount", || Command::new("umount").arg(&point).output().unwrap().status.success().then_some(()));
    std::mem::forget(mounted);
    news("no image", &|s| s.images.is_empty());
}
