//! What does `why` predict for a program, and what is the real one then told?
#![allow(dead_code, unreachable_pub)]

use std::path::Path;
use std::process::{Command, Stdio};

use qlock::protocol::Message;
use serde_json::Value;

use crate::everyone::qlock_top;
use crate::support::output;

/// What `why --as OPERATION` says: QEMU's first sentence if it is refused, and the whole answer.
pub fn predicted(image: &Path, operation: &str) -> (Option<String>, Value) {
    let asked = output(qlock_top().args(["why", "--format", "json", "--as", operation]).arg(image));
    let answer: Value = serde_json::from_slice(&asked.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&asked.stderr)));
    let status = match answer["verdict"].as_str().unwrap() {
        "granted" => 0,
        "refused" => 1,
        other => panic!("{operation}: {other}: {answer}"),
    };
    assert_eq!(asked.status.code(), Some(status), "{answer}");
    (answer["message"].as_str().map(|m| m.lines().next().unwrap().to_owned()), answer)
}

/// What the real program is told: nothing, or QEMU's first sentence.
fn told(command: &mut Command) -> Option<String> {
    let output = output(command);
    let errors = String::from_utf8_lossy(&output.stderr);
    let message = Message::find(&errors).map(|m| m.sentence.to_string());
    assert_eq!(output.status.success(), message.is_none(), "{command:?}: {errors}");
    message
}

/// What the program behind these operations of `why` is told when it is run.
pub fn attempt(image: &Path, format: &str, operation: &str) -> Option<String> {
    let drive = |more: &str| format!("if=virtio,format={format}{more},file={}", image.display());
    match operation {
        "io" => told(Command::new("qemu-io").args(["-f", format, "-c", "read 0 512"]).arg(image)),
        "io-read-only" => told(Command::new("qemu-io").args(["-r", "-f", format, "-c", "read 0 512"]).arg(image)),
        "vm" => told(&mut vm_that_quits(&drive(""))),
        "vm-read-only" => told(&mut vm_that_quits(&drive(",readonly=on"))),
        other => panic!("how is {other} run?"),
    }
}

/// A VM that opens its disk, and ends because its monitor has no more input.
fn vm_that_quits(drive: &str) -> Command {
    // Its monitor reads `quit` from a file that goes as soon as it is open.
    let script = "echo quit | qemu-system-x86_64 -accel tcg -S -display none -nodefaults -m 64 -serial none \
                  -monitor stdio -drive \"$0\"";
    let mut command = Command::new("bash");
    command.args(["-o", "pipefail", "-c", script, drive]).stdin(Stdio::null());
    command
}

/// Checks for each operation that `why` says what the real program is then told, and gives the last answer of `why`.
pub fn assert_told_as_predicted(image: &Path, format: &str, operations: &[&str]) -> Vec<(Option<String>, Value)> {
    let mut answers = Vec::new();
    for operation in operations {
        let (sentence, answer) = predicted(image, operation);
        assert_eq!(sentence, attempt(image, format, operation), "{operation}: {answer}");
        answers.push((sentence, answer));
    }
    answers
}
