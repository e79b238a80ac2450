//! How does an admin watch all of it on a terminal, over a slow line, and leave the terminal as it was?
//!
//! The program is a value: [`model`], [`update`] and [`keymap`] are pure and decide, [`view`] turns the value into cells,
//! `terminal` and `run` are the only code that touches the terminal. Asks `monitor` for what is so.

pub mod clip;
pub mod filter;
#[cfg(test)]
mod golden;
pub mod keymap;
mod locks;
pub mod model;
mod run;
pub mod sort;
mod terminal;
pub mod test_lock;
pub mod theme;
pub mod update;
pub mod view;

pub use run::{End, RunError, SIGNALS, run};
pub use theme::Look;
