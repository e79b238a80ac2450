//! `qlock-top`: who holds the locks on your disk images. Everything is in the library; this only starts and ends it.

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use qlock::cli::{Cli, run};

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(exit) => exit.into(),
        Err(failure) => {
            // A closed standard error is no reason to panic.
            let _ = writeln!(std::io::stderr(), "qlock-top: {failure}");
            failure.exit().into()
        }
    }
}
