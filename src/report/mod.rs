//! How do a snapshot and its changes look without a screen?
//!
//! [`table`] for people, [`json`] for scripts, [`stream`] for both as it happens; [`why`] explains a refusal. Asks `monitor` for what is so and how it
//! is worded.

pub mod json;
pub mod stream;
pub mod table;
pub mod why;
