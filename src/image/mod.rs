//! Which files are images, and what does each say of itself?
//!
//! [`catalog`] keeps the list of what is watched, [`header`] reads format, size and backing file, [`chain`] follows the
//! backing files, [`watch`] says which image somebody touched. Asks `linux` for identity and opening; never opens anything
//! but regular files and block devices.

pub mod catalog;
pub mod chain;
mod directory;
mod events;
pub mod header;
pub mod watch;
