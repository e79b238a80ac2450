//! Does real output keep to the published schemas?
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use jsonschema::{Registry, Validator};
use serde_json::Value;
use support::{DEADLINE, Images, Running, Scene, have, holding, list, qemu_io, qlock_top};

fn schema(name: &str) -> Value {
    let path = format!("{}/assets/schema/{name}", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn assert_valid(validator: &Validator, value: &Value) {
    let errors: Vec<String> = validator.iter_errors(value).map(|e| format!("{}: {e}", e.instance_path())).collect();
    assert!(errors.is_empty(), "{errors:#?}\n{value:#}");
}

#[test]
fn snapshots_and_events_of_the_demo_scene_are_valid() {
    let snapshot_schema = schema("snapshot-1.schema.json");
    let snapshots = jsonschema::validator_for(&snapshot_schema).unwrap();
    let registry = Registry::new().add("urn:qlock-top:snapshot:1", &snapshot_schema).unwrap().prepare().unwrap();
    let events = jsonschema::options().with_registry(&registry).build(&schema("event-1.schema.json")).unwrap();

    let scene = Scene::make();
    let directory = scene.directory.clone();
    let (snapshot, _) = list(&directory);
    assert_valid(&snapshots, &snapshot);
    assert!(snapshot["images"].as_array().unwrap().len() > 5);

    // The demo's backup comes and goes: its lines are real events.
    let mut watch =
        Running::spawn(qlock_top().args(["watch", "--format", "ndjson"]).arg(&directory).stdout(Stdio::piped()));
    let out = BufReader::new(watch.0.stdout.take().unwrap());
    let (sender, lines) = std::sync::mpsc::channel();
    std::thread::spawn(move || out.lines().map_while(Result::ok).try_for_each(|l| sender.send(l)));
    let mut kinds = Vec::new();
    while !(kinds.contains(&"acquired".to_owned()) && kinds.contains(&"released".to_owned())) {
        let line: Value = serde_json::from_str(&lines.recv_timeout(DEADLINE).unwrap()).unwrap();
        assert_valid(&events, &line);
        kinds.push(line["kind"].as_str().unwrap().to_owned());
    }
    assert_eq!(kinds[0], "snapshot");
    // The schema is no mere formality: a changed line is found.
    let mut wrong = snapshot.clone();
    wrong["images"][0]["verdict"] = "probably free".into();
    assert!(!snapshots.is_valid(&wrong));
}

#[test]
fn a_foreign_lock_and_an_odd_name_are_valid_too() {
    if !have(&["qemu-io", "python3"]) {
        return;
    }
    let images = Images::new();
    let path = images.raw("b.raw");
    let _reader = holding(&mut qemu_io(&["-r", "-f", "raw"], &path), &path, "c/-");
    let odd = images.dir().join(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(b"odd-\xff"));
    std::fs::write(&odd, "").unwrap();
    let script = "import fcntl,sys; f=open(sys.argv[1],'rb'); fcntl.lockf(f,fcntl.LOCK_SH); sys.stdin.read()";
    let mut foreign: Command = support::python(script, &[&path]);
    let _foreign = holding(&mut foreign, &path, "cwurg/cwurg");
    let (snapshot, _) = list(images.dir());
    assert_valid(&jsonschema::validator_for(&schema("snapshot-1.schema.json")).unwrap(), &snapshot);
}

#[test]
fn answers_of_why_are_valid_for_programs_and_for_pasted_messages() {
    if !have(&["qemu-io"]) {
        return;
    }
    let snapshot_schema = schema("snapshot-1.schema.json");
    let registry = Registry::new().add("urn:qlock-top:snapshot:1", &snapshot_schema).unwrap().prepare().unwrap();
    let why = jsonschema::options().with_registry(&registry).build(&schema("why-1.schema.json")).unwrap();
    let images = Images::new();
    let path = images.raw("a.raw");
    let holder = holding(&mut qemu_io(&["-f", "raw"], &path), &path, "cw/-");
    let lines = |mut command: Command, input: &str| -> Vec<Value> {
        let mut child = Running::spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()));
        support::tell(&mut child, input);
        drop(child.0.stdin.take());
        let out = BufReader::new(child.0.stdout.take().unwrap());
        out.lines().map(|l| serde_json::from_str(&l.unwrap()).unwrap()).collect()
    };
    let ask = |arguments: &[&str]| {
        let mut command = qlock_top();
        command.args(["why", "--format", "json"]).args(arguments);
        command
    };
    let all = lines(ask(&[path.to_str().unwrap()]), "");
    assert!(all.len() > 20, "a line for each program");
    assert!(all.iter().any(|l| l["verdict"] == "refused" && l["holders"][0]["pid"] == holder.pid()));
    let hint = format!("Failed to get shared \"write\" lock\nIs another process using the image [{}]?", path.display());
    let pasted = lines(ask(&["-"]), &hint);
    assert_eq!((pasted[0]["verdict"].as_str(), pasted[0]["byte"].as_u64()), (Some("refused"), Some(101)));
    let lost = lines(ask(&["-"]), "Failed to lock byte 100: No locks available");
    assert_eq!((lost.len(), lost[0]["verdict"].as_str()), (1, Some("unknown")));
    all.iter().chain(&pasted).chain(&lost).for_each(|line| assert_valid(&why, line));
}
