//! The program under test where root may read every process, so that a lock without an owner has certainly none.
//!
//! Some sandboxes run a first process that even root may not read. Nobody then can say that it holds nothing, and the
//! program says so. Here such processes are covered, for the program alone, by an empty directory in a mount namespace of
//! its own. With it stands what is asserted of an image that is held or free.
#![allow(dead_code, unreachable_pub)]

use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::LazyLock;

use serde_json::Value;

use crate::support::{self, Running, access_of, bytes_of, image, output, qemu_io, run};

/// The processes whose descriptors may not be followed.
static UNREADABLE: LazyLock<Vec<u32>> = LazyLock::new(|| {
    let pids = fs::read_dir("/proc").unwrap().flatten().filter_map(|e| e.file_name().to_str()?.parse().ok());
    let denied = |pid: &u32| match fs::read_dir(format!("/proc/{pid}/fd")) {
        Ok(fds) => {
            let denied =
                |e: fs::DirEntry| fs::metadata(e.path()).is_err_and(|e| e.kind() == ErrorKind::PermissionDenied);
            fds.flatten().any(denied)
        }
        Err(e) => e.kind() == ErrorKind::PermissionDenied,
    };
    pids.filter(denied).collect()
});

/// As [`support::qlock_top`], seeing everybody.
pub fn qlock_top() -> Command {
    if UNREADABLE.is_empty() {
        return support::qlock_top();
    }
    let covers: Vec<String> = UNREADABLE.iter().map(|pid| format!("mount -t tmpfs none /proc/{pid} && ")).collect();
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c"]);
    command.arg(format!("{}exec \"$0\" \"$@\"", covers.concat())).arg(env!("CARGO_BIN_EXE_qlock-top"));
    command.env_remove("NO_COLOR").stdin(Stdio::null());
    command
}

/// As [`support::list`], seeing everybody, of several paths.
pub fn list_of(paths: &[&Path]) -> (Value, i32) {
    let output = output(qlock_top().args(["list", "--format", "json"]).args(paths));
    let code = output.status.code().unwrap();
    let value: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&output.stderr)));
    (value, code)
}

/// As [`support::list`], seeing everybody.
pub fn list(path: &Path) -> (Value, i32) {
    list_of(&[path])
}

/// Asserts that `path` is held by `holder` alone, with these bytes.
pub fn assert_held(snapshot: &Value, path: &Path, holder: &Running, bytes: &str) {
    let seen = image(snapshot, path);
    assert_eq!((seen["verdict"].as_str(), bytes_of(seen).as_str()), (Some("held"), bytes), "{seen:#}");
    let holders: Vec<_> = seen["holders"].as_array().unwrap().iter().map(|h| h["pid"].as_i64().unwrap()).collect();
    assert_eq!(holders, [i64::from(holder.pid())], "{seen:#}");
    assert_eq!(access_of(&seen["holders"][0]), bytes);
    assert_eq!(seen["openers"], serde_json::json!([]));
}

/// Asserts that nobody has `path` open.
pub fn assert_free(snapshot: &Value, path: &Path) {
    let seen = image(snapshot, path);
    assert_eq!((seen["verdict"].as_str(), bytes_of(seen).as_str()), (Some("free"), "-/-"), "{seen:#}");
    assert_eq!((&seen["holders"], &seen["openers"]), (&serde_json::json!([]), &serde_json::json!([])), "{seen:#}");
}

/// The findings of this code: severity and text.
pub fn findings<'a>(snapshot: &'a Value, path: &Path, code: &str) -> Vec<(&'a str, &'a str)> {
    let all = image(snapshot, path)["findings"].as_array().unwrap().iter().filter(|f| f["code"] == code);
    all.map(|f| (f["severity"].as_str().unwrap(), f["text"].as_str().unwrap())).collect()
}

/// Runs qemu-io, which is let in: what another image's locks cannot stop.
pub fn assert_let_in(path: &Path, format: &str) {
    run(&mut qemu_io(&["-f", format, "-c", "read 0 512"], path));
}
