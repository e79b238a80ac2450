//! Does the protocol module agree with what real QEMU programs did?
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeSet;

use qlock::protocol::{Access, Family, HeldByOthers, Judgement, LockByte, Message, Operation, judge};
use serde_json::Value;

const MEASURED: &str = include_str!("fixtures/qemu-operations.json");
const ORACLE: &str = include_str!("fixtures/qemu-oracle.jsonl");

fn offsets(value: &Value) -> Vec<u64> {
    value.as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).collect()
}

fn family(name: &str) -> Family {
    match name {
        "raw" => Family::Raw,
        "qcow2" => Family::Qcow2,
        other => panic!("unknown format {other}"),
    }
}

#[test]
fn the_table_of_operations_is_the_measured_one() {
    let measured: Value = serde_json::from_str(MEASURED).unwrap();
    let measured = measured["operations"].as_object().unwrap();
    let names: BTreeSet<&str> = Operation::ALL.iter().map(|o| o.name).collect();
    assert_eq!(names, measured.keys().map(String::as_str).collect());
    assert_eq!(names.len(), 47);

    let bytes = |access: Access| access.bytes().map(LockByte::offset).collect::<Vec<_>>();
    let tested = |access: Access| access.tested_bytes().map(LockByte::offset).collect::<Vec<_>>();
    let sorted = |mut list: Vec<u64>| {
        list.sort_unstable();
        list
    };
    for (name, formats) in measured {
        let operation = Operation::named(name).unwrap();
        for format in ["raw", "qcow2"] {
            let (recipe, measured) = (operation.recipe(family(format)), formats.get(format));
            assert_eq!(recipe.is_some(), measured.is_some(), "{name} {format}");
            let (Some(recipe), Some(measured)) = (recipe, measured) else { continue };
            assert_eq!(recipe.command, measured["command"].as_str().unwrap());
            let destroys = measured.get("destroys_after_step").map(|n| usize::try_from(n.as_u64().unwrap()).unwrap());
            assert_eq!(recipe.destroys_after_step, destroys, "{name} {format}");
            let steps = measured["steps"].as_array().unwrap();
            assert_eq!(recipe.steps.len(), steps.len(), "{name} {format}");
            for (step, measured) in recipe.steps.iter().zip(steps) {
                assert_eq!(bytes(step.lock), sorted(offsets(&measured["lock"])), "{name} {format} lock");
                assert_eq!(tested(step.test), offsets(&measured["test"]), "{name} {format} test, in order");
                assert_eq!(bytes(step.unlock), sorted(offsets(&measured["unlock"])), "{name} {format} unlock");
            }
        }
    }
}

#[test]
fn every_measured_pair_of_holder_and_attempt_is_predicted() {
    let mut pairs = 0;
    for line in ORACLE.lines() {
        let measured: Value = serde_json::from_str(line).unwrap();
        let held: Access = offsets(&measured["holder_bytes"]).into_iter().map(|o| LockByte::at(o).unwrap()).collect();
        let operation = Operation::named(measured["operation"].as_str().unwrap()).unwrap();
        let recipe = operation.recipe(family(measured["format"].as_str().unwrap())).unwrap();
        let (verdict, byte, message, destroyed) = match judge(recipe, HeldByOthers::read(held)) {
            Judgement::Granted => ("granted", None, None, false),
            Judgement::Refused(r) => ("refused", Some(r.byte.offset()), Some(r.sentence.to_string()), r.destroys_image),
        };
        assert_eq!(verdict, measured["verdict"], "{line}");
        assert_eq!(byte, measured["byte"].as_u64(), "{line}");
        assert_eq!(message.as_deref(), measured["message"].as_str(), "{line}");
        assert_eq!(destroyed, measured["image_destroyed"].as_bool().unwrap(), "{line}");
        if let (Some(message), Some(byte)) = (message, byte) {
            let read_back = Message::find(&message).unwrap();
            assert_eq!(read_back.sentence.byte().map(LockByte::offset), Some(byte));
        }
        pairs += 1;
    }
    assert_eq!(pairs, 682);
}
