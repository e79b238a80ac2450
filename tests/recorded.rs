//! Does a recorded `/proc` tree give what was so when it was recorded?
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use support::{access_of, image, output, qlock_top};

#[test]
fn the_recorded_holders_are_named_with_their_bytes() {
    let recorded = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/recorded");
    let output = output(
        qlock_top()
            .arg("--proc-root")
            .arg(recorded.join("proc"))
            .args(["list", "--format", "json"])
            .arg(recorded.join("images")),
    );
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
    let snapshot: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((snapshot["complete"].as_bool(), snapshot["hidden_processes"].as_u64()), (Some(true), Some(0)));
    let who = |name: &str| {
        let image = image(&snapshot, &recorded.join("images").join(name));
        let holders = image["holders"].as_array().unwrap();
        let mut who: Vec<(String, String)> =
            holders.iter().map(|h| (h["command"].as_str().unwrap().to_owned(), access_of(h))).collect();
        who.sort();
        who
    };
    let owned =
        |list: &[(&str, &str)]| list.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect::<Vec<_>>();
    assert_eq!(who("web01.qcow2"), owned(&[("qemu-system-x86", "cwr/wr")]));
    assert_eq!(who("base.qcow2"), owned(&[("qemu-io", "c/-"), ("qemu-system-x86", "c/wr")]));
    assert_eq!(who("data.raw"), owned(&[("qemu-nbd", "cw/r")]));
    assert_eq!(who("spare.raw"), owned(&[]));
    assert_eq!(image(&snapshot, &recorded.join("images/web01.qcow2"))["holders"][0]["vm"], "web01");
}
