//! Locks of disk images, as QEMU takes them on Linux: who holds which byte, what would be refused, and how to take part.
//!
//! QEMU read-locks single bytes of an image file: byte `100 + i` says "I use permission i", byte `200 + i` says "others
//! must not". [`protocol`] is that rule as values, [`linux`] reads what the kernel says about locks, [`hold`] takes locks
//! by the rule, [`image`] finds and describes images, and [`monitor`] puts it all together: which process holds what, and
//! where nobody can tell.

#![warn(missing_docs)]

pub mod hold;
pub mod image;
pub mod linux;
pub mod monitor;
pub mod protocol;
pub mod text;

#[cfg(feature = "app")]
pub mod cli;
#[cfg(feature = "app")]
pub mod config;
#[cfg(feature = "app")]
pub mod demo;
#[cfg(feature = "app")]
pub mod report;
#[cfg(feature = "app")]
pub mod signals;
#[cfg(feature = "app")]
pub mod tui;
