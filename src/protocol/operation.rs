//! What does each QEMU program ask of an image, step by step, and would it be granted now?
//!
//! One program is several steps: it locks, tests, lets go, and often begins again with a wider access. A step is refused
//! at the first byte that somebody else holds. Asks only its neighbours in `protocol`; the table itself stands in
//! `table.rs` and was measured on QEMU 10.0.2.

#[path = "table.rs"]
mod table;

use super::access::{Access, HeldByOthers};
use super::message::Sentence;
use super::permission::LockByte;

/// One change of a descriptor's locks, as QEMU makes it in `raw_handle_perm_lock`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Bytes that are read-locked first.
    pub lock: Access,
    /// The access whose [`tested_bytes`](Access::tested_bytes) must then be free of others; empty: nothing is tested.
    pub test: Access,
    /// Bytes let go when the test has passed.
    pub unlock: Access,
}

/// All the steps that one program takes on an image of one format family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recipe {
    /// The command that was measured; the image is `a.raw` or `a.qcow2`, or the backing file of the overlay named.
    pub command: &'static str,
    /// Its steps, in order.
    pub steps: &'static [Step],
    /// Once this step (counted from 0) is granted the old content is truncated, whatever comes later.
    pub destroys_after_step: Option<usize>,
}

impl Recipe {
    const fn new(command: &'static str, steps: &'static [Step]) -> Self {
        Self { command, steps, destroys_after_step: None }
    }

    const fn destroying_after(self, step: usize) -> Self {
        Self { destroys_after_step: Some(step), ..self }
    }

    /// The most that the program holds at one time while it works: every step's locks, less what has been let go.
    #[must_use]
    pub fn widest_access(&self) -> Access {
        self.accesses().last().copied().unwrap_or_default()
    }

    /// What it holds once each of its steps is granted, up to the one at which it holds most: whoever goes through them
    /// in this order is refused where the program would be, and then holds what it would hold. Empty where it locks
    /// nothing.
    #[must_use]
    pub fn accesses(&self) -> Vec<Access> {
        let mut held = Access::NONE;
        let mut all = Vec::new();
        let (mut widest, mut length) = (0, 0);
        for step in self.steps {
            held = held.union(step.lock);
            all.push(held);
            if held.bytes().count() > widest {
                (widest, length) = (held.bytes().count(), all.len());
            }
            held = held.difference(step.unlock);
        }
        all.truncate(length);
        all.dedup();
        all
    }
}

/// How a program treats the locks of a format: as it treats raw, or as it treats qcow2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// raw and LUKS: what the guest device asks for is passed through to the file.
    Raw,
    /// qcow2, vmdk, vdi, vpc, vhdx, qed, parallels: metadata of their own, so the format layer always denies write and
    /// resize.
    Qcow2,
}

/// What a program takes of each file in the backing chain below its image: nothing where it does not open them.
///
/// A file that is formatted is locked by its format, which never lets others write; a raw one only as far as whoever uses
/// the image denies writing (`bdrv_default_perms_for_cow` in block.c).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Below {
    /// Of a raw file.
    pub raw: Access,
    /// Of one that is formatted.
    pub qcow2: Access,
}

impl Below {
    /// What it takes of a file of `family`.
    #[must_use]
    pub const fn of(self, family: Family) -> Access {
        match family {
            Family::Raw => self.raw,
            Family::Qcow2 => self.qcow2,
        }
    }

    /// Whether the files below are not opened at all.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.raw.is_empty() && self.qcow2.is_empty()
    }
}

/// A thing that a QEMU program does with an image; `why --as` and `hold --as` take its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operation {
    /// The name, such as `convert-source` or `vm-read-only`.
    pub name: &'static str,
    /// What it takes of each file in the backing chain below the image.
    pub backing: Below,
    /// What it asks of a raw image; `None` where the program does not exist for raw or was not measured.
    pub raw: Option<Recipe>,
    /// What it asks of a qcow2 image.
    pub qcow2: Option<Recipe>,
}

impl Operation {
    /// Every known operation, by name.
    pub const ALL: &'static [Self] = table::OPERATIONS;

    /// The operation of that name.
    #[must_use]
    pub fn named(name: &str) -> Option<&'static Self> {
        Self::ALL.binary_search_by(|o| o.name.cmp(name)).ok().map(|i| &Self::ALL[i])
    }

    /// What the operation asks of an image of `family`.
    #[must_use]
    pub const fn recipe(&self, family: Family) -> Option<&Recipe> {
        match family {
            Family::Raw => self.raw.as_ref(),
            Family::Qcow2 => self.qcow2.as_ref(),
        }
    }
}

/// Why and where a program is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The step that is refused, counted from 0.
    pub step: usize,
    /// The first byte, in QEMU's order, that somebody else holds.
    pub byte: LockByte,
    /// What QEMU says.
    pub sentence: Sentence,
    /// Whether an earlier step was granted and has already truncated the image; `qemu-img` then deletes it
    /// (`qcow2_co_create_opts` in `block/qcow2.c`).
    pub destroys_image: bool,
}

/// Whether a program would get through all of its steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// Every step passes.
    Granted,
    /// One does not.
    Refused(Refusal),
}

/// Judges `recipe` step by step against what others hold.
///
/// The answer is for this moment and this file only: what others hold may change between two steps, and the files of the
/// backing chain are to be asked separately.
#[must_use]
pub fn judge(recipe: &Recipe, others: HeldByOthers) -> Judgement {
    for (number, step) in recipe.steps.iter().enumerate() {
        let blocked =
            step.lock.bytes().find(|b| others.write_locked.contains(*b)).map(|b| (b, Sentence::lock_failed(b)));
        let tested = || step.test.first_conflict(others.locked).map(|b| (b, Sentence::conflict(b)));
        if let Some((byte, sentence)) = blocked.or_else(tested) {
            let destroys_image = recipe.destroys_after_step.is_some_and(|after| number > after);
            return Judgement::Refused(Refusal { step: number, byte, sentence, destroys_image });
        }
    }
    Judgement::Granted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_are_found_by_name_and_stand_in_order() {
        assert_eq!(Operation::ALL.len(), 47);
        assert!(Operation::ALL.is_sorted_by(|a, b| a.name < b.name));
        for operation in Operation::ALL {
            assert_eq!(Operation::named(operation.name), Some(operation));
            assert!(operation.raw.is_some() || operation.qcow2.is_some(), "{}", operation.name);
        }
        assert_eq!(Operation::named("format-disk"), None);
    }

    #[test]
    fn a_write_lock_of_a_stranger_fails_before_any_test() {
        let write_locked: Access = "c/-".parse().unwrap();
        let others = HeldByOthers { locked: "cw/wr".parse().unwrap(), write_locked };
        let recipe = Operation::named("io").and_then(|o| o.recipe(Family::Raw)).unwrap();
        let Judgement::Refused(refusal) = judge(recipe, others) else { panic!("granted") };
        assert_eq!(refusal.byte.offset(), 100);
        assert_eq!(refusal.sentence.to_string(), "Failed to lock byte 100");
    }

    #[test]
    fn the_widest_access_is_what_a_watcher_sees_while_the_program_works() {
        let widest =
            |name: &str, family| Operation::named(name).and_then(|o| o.recipe(family)).unwrap().widest_access();
        assert_eq!(widest("vm", Family::Raw).to_string(), "cw/w");
        assert_eq!(widest("vm", Family::Qcow2).to_string(), "cwr/wr");
        assert_eq!(widest("convert-source", Family::Raw).to_string(), "c/wr");
        assert_eq!(widest("nbd", Family::Raw).to_string(), "cw/r");
        assert_eq!(widest("vm-incoming", Family::Raw), Access::NONE);
        let vm = Operation::named("vm").and_then(|o| o.recipe(Family::Raw)).unwrap();
        assert_eq!(vm.accesses(), ["c/-".parse().unwrap(), "cw/w".parse().unwrap()]);
    }
}
