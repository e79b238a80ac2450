//! What does QEMU's image locking ask of the bytes of an image, and what does it answer?
//!
//! The rule of `block/file-posix.c`, as values: no I/O, no clock, no opinion about who is right. Everything else in this
//! crate asks here which byte means what, which byte is tested first, and how QEMU words a refusal.

mod access;
mod decode;
mod message;
mod operation;
mod permission;
mod role;

pub use access::{Access, AccessSyntaxError, HeldByOthers};
pub use decode::{Report, decode};
pub use message::{Message, Sentence};
pub use operation::{Below, Family, Judgement, Operation, Recipe, Refusal, Step, judge};
pub use permission::{LockByte, Permission, PermissionSet, Side};
pub use role::Role;
