//! Places that only root can make: loop devices, mounts, device nodes; each is gone when the test is over, however it ends.
#![allow(dead_code, unreachable_pub)]

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;

use nix::mount::{MntFlags, umount2};
use nix::sys::stat::{Mode, SFlag, mknod};

use crate::support::{DEADLINE, Images, Running, run};

/// A loop device; detached at the end, or as soon as nothing uses it any more.
pub struct LoopDevice(pub PathBuf);

impl LoopDevice {
    /// Set up as an admin does it.
    pub fn on(file: &Path) -> Self {
        let device = run(Command::new("losetup").args(["--find", "--show"]).arg(file));
        Self(PathBuf::from(device.trim()))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Such as `loop3`.
    pub fn name(&self) -> &str {
        self.0.file_name().unwrap().to_str().unwrap()
    }

    pub fn device(&self) -> u64 {
        nix::sys::stat::stat(&self.0).unwrap().st_rdev
    }

    /// Another node of the same device, which goes with its directory.
    pub fn node(&self, path: &Path) {
        mknod(path, SFlag::S_IFBLK, Mode::from_bits_truncate(0o600), self.device()).unwrap();
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
    }
}

/// A mounted directory; it leaves the tree at once, whoever uses it.
pub struct Mounted(pub PathBuf);

impl Mounted {
    /// `mount OPTIONS.. POINT`, on a directory or file that is made if need be.
    pub fn new(options: &[&str], point: PathBuf) -> Self {
        if !point.exists() {
            fs::create_dir(&point).unwrap();
        }
        run(Command::new("mount").args(options).arg(&point));
        Self(point)
    }

    pub fn tmpfs(point: PathBuf) -> Self {
        Self::new(&["-t", "tmpfs", "qlock-test"], point)
    }

    pub fn dir(&self) -> &Path {
        &self.0
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub fn raw(&self, name: &str) -> PathBuf {
        raw_at(self.path(name))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
    }
}

/// A raw image of 1 MiB.
pub fn raw_at(path: PathBuf) -> PathBuf {
    fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
    path
}

/// A file system of its own in a file, on a loop device. Mounted until the test is over.
pub struct Disk {
    // In this order: a device that is mounted stays.
    pub mounted: Mounted,
    pub device: LoopDevice,
}

impl Disk {
    pub fn new(images: &Images, name: &str, kind: &str, size: u64) -> Self {
        let file = images.path(&format!("{name}.disk"));
        fs::File::create(&file).unwrap().set_len(size).unwrap();
        run(Command::new(format!("mkfs.{kind}")).arg("-q").arg(&file));
        let device = LoopDevice::on(&file);
        let mounted = Mounted::new(&["-t", kind, device.path().to_str().unwrap()], images.path(name));
        Self { mounted, device }
    }
}

/// Starts a helper that prints a line when it is ready, and then waits for the end of its input; gives that line too.
pub fn ready(command: &mut Command) -> (Running, String) {
    let mut running = Running::spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
    let line = next_line(&mut running);
    assert!(line.ends_with('\n'), "{command:?} ended before it was ready");
    (running, line.trim_end().to_owned())
}

/// The next line that it prints; empty at its end.
pub fn next_line(running: &mut Running) -> String {
    let (sender, lines) = channel();
    let mut output = BufReader::with_capacity(1, running.0.stdout.take().unwrap());
    std::thread::spawn(move || {
        let mut line = String::new();
        let read = output.read_line(&mut line);
        let _ = sender.send((read.map(|_| line), output.into_inner()));
    });
    let (line, output) = lines.recv_timeout(DEADLINE).expect("waited in vain for a line");
    running.0.stdout = Some(output);
    line.unwrap()
}
