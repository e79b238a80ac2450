//! What the tests share: real programs that hold locks, the program under test, and waiting with a deadline.
#![allow(dead_code, unreachable_pub)]

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use qlock::linux::probe::{self, Asker};
use qlock::protocol::Access;
use serde_json::Value;

/// How long anything may take on a busy machine before it counts as not happening.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// Waits until `condition` gives something, or fails saying what was waited for.
pub fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Says why a test cannot run here. Where everything is to run (`QLOCK_RUN_ALL`, set by CI), that is a failure.
pub fn left_out(why: &str) {
    assert!(std::env::var_os("QLOCK_RUN_ALL").is_none(), "a test was left out where all must run: {why}");
    eprintln!("LEFT OUT: {why}");
}

/// True if each of `programs` is installed; otherwise says so.
pub fn have(programs: &[&str]) -> bool {
    let found = |program: &&str| {
        let paths = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&paths).any(|dir| dir.join(program).is_file())
    };
    let missing: Vec<&str> = programs.iter().copied().filter(|p| !found(p)).collect();
    if !missing.is_empty() {
        left_out(&format!("not installed: {}", missing.join(", ")));
    }
    missing.is_empty()
}

/// True for root; otherwise says so.
pub fn am_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        left_out("needs root");
    }
    root
}

/// A program that is ended, by its pid, when the test is over, however it ends.
pub struct Running(pub Child);

impl Running {
    pub fn spawn(command: &mut Command) -> Self {
        Self(command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}")))
    }

    pub fn pid(&self) -> i32 {
        i32::try_from(self.0.id()).unwrap()
    }

    pub fn end(mut self) {
        self.kill();
    }

    fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A directory of images, gone when the test is over.
pub struct Images(pub tempfile::TempDir);

impl Images {
    pub fn new() -> Self {
        Self(tempfile::Builder::new().prefix("qlock-test-").tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn dir(&self) -> &Path {
        self.0.path()
    }

    pub fn raw(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        path
    }

    pub fn qcow2(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&path).arg("16M"));
        path
    }

    pub fn overlay(&self, name: &str, base: &str) -> PathBuf {
        let path = self.path(name);
        run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base]).arg(&path));
        path
    }
}

/// Runs a program that must succeed.
pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The bytes that are locked now, as any stranger sees them.
pub fn locked(image: &Path) -> Access {
    let (file, _) = probe::open(&image.canonicalize().unwrap()).unwrap();
    probe::held_bytes(file, Asker::Process).unwrap().locked
}

/// Starts a program and waits until `image` shows the bytes `access`.
pub fn holding(command: &mut Command, image: &Path, access: &str) -> Running {
    let mut running = Running::spawn(command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()));
    let expected: Access = access.parse().unwrap();
    wait_for(&format!("{access} on {} by {command:?}", image.display()), || {
        if let Some(status) = running.0.try_wait().unwrap() {
            let mut errors = String::new();
            let _ = std::io::Read::read_to_string(&mut running.0.stderr.take().unwrap(), &mut errors);
            panic!("{command:?} ended with {status}: {errors}");
        }
        (locked(image) == expected).then_some(())
    });
    running
}

pub fn qemu_io(options: &[&str], image: &Path) -> Command {
    let mut command = Command::new("qemu-io");
    command.args(options).arg(image);
    command
}

/// The program under test.
pub fn qlock_top() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qlock-top"));
    command.env_remove("NO_COLOR").stdin(Stdio::null());
    command
}

pub fn output(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"))
}

/// What `list --format json PATH` says, and the status it ends with.
pub fn list(path: &Path) -> (Value, i32) {
    let output = output(qlock_top().args(["list", "--format", "json"]).arg(path));
    let code = output.status.code().unwrap();
    let value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&output.stderr)));
    (value, code)
}

/// The image of that name in a snapshot.
pub fn image<'a>(snapshot: &'a Value, path: &Path) -> &'a Value {
    let images = snapshot["images"].as_array().unwrap();
    images
        .iter()
        .find(|i| i["path"] == path.to_str().unwrap())
        .unwrap_or_else(|| panic!("{} is not listed", path.display()))
}

/// The access that a holder or event names, in short notation.
pub fn access_of(value: &Value) -> String {
    let names = |field: &str| serde_json::from_value::<qlock::protocol::PermissionSet>(value[field].clone()).unwrap();
    Access::new(names("permissions"), names("unshared")).to_string()
}

/// The held bytes of an image in a snapshot, in short notation; fails if one of the ten is missing or unknown.
pub fn bytes_of(image: &Value) -> String {
    let bytes = image["bytes"].as_array().unwrap();
    let offsets: Vec<u64> = bytes.iter().map(|b| b["byte"].as_u64().unwrap()).collect();
    assert_eq!(offsets, [100, 101, 102, 103, 104, 200, 201, 202, 203, 204]);
    let held = bytes.iter().filter(|b| {
        assert_ne!(b["state"], "unknown", "{b}");
        b["state"] == "held"
    });
    held.map(|b| qlock::protocol::LockByte::at(b["byte"].as_u64().unwrap()).unwrap()).collect::<Access>().to_string()
}

/// A helper program in Python, for locks that no QEMU takes.
pub fn python(script: &str, arguments: &[&Path]) -> Command {
    let mut command = Command::new("python3");
    command.arg("-c").arg(script).args(arguments);
    command
}

/// Tells a child that reads its standard input to go on.
pub fn tell(running: &mut Running, text: &str) {
    let stdin = running.0.stdin.as_mut().unwrap();
    stdin.write_all(text.as_bytes()).unwrap();
    stdin.flush().unwrap();
}

/// The demo's scene, ended as its standard input ends, and gone even if the program did not clean up.
pub struct Scene {
    pub running: Running,
    pub directory: PathBuf,
}

impl Scene {
    pub fn make() -> Self {
        let mut command = qlock_top();
        command.args(["demo", "--scene-only"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut running = Running::spawn(&mut command);
        let mut line = String::new();
        BufReader::new(running.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
        Self { running, directory: PathBuf::from(line.trim_end()) }
    }

    /// Ends it in the ordinary way.
    pub fn end(&mut self) -> ExitStatus {
        drop(self.running.0.stdin.take());
        wait_for("the end of the scene", || self.running.0.try_wait().unwrap())
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        drop(self.running.0.stdin.take());
        // While a test fails there is no time for waiting nicely.
        if std::thread::panicking() {
            self.running.kill();
        } else {
            let _ = self.running.0.wait();
        }
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}
