//! What does it all mean: who holds which byte of which image, and where can nobody tell?
//!
//! [`look`] collects one raw [`sample::Sample`], [`snapshot`] makes sense of it, [`finding`] names the dangers,
//! [`change`] compares two moments, and [`sampler`] does it over and over on a thread of its own. Everything but `look`,
//! `search` and `sampler` is pure.

pub mod advice;
mod agenda;
mod alias;
pub mod change;
#[cfg(test)]
pub(crate) mod examples;
pub mod finding;
pub mod look;
pub mod sample;
pub mod sampler;
mod search;
pub mod snapshot;
mod understand;
pub mod way_out;
pub mod what_if;
pub mod wording;
