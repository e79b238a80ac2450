//! `qlock-top`: who holds the locks on your disk images. Everything is in the library; this only starts and ends it.

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;
use qlock::cli::{Cli, run};
use qlock::text::escape;

/// An error of clap's repeats what was typed, or what a shell made of `*`: it is written out visibly, too.
fn complain(error: clap::Error) -> ExitCode {
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        error.exit();
    }
    let escaped = std::env::args_os().map(|a| escape(&a.to_string_lossy()).into_owned());
    let text = Cli::try_parse_from(escaped).err().unwrap_or(error).render().to_string();
    let _ = write!(std::io::stderr(), "{text}");
    ExitCode::from(2)
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return complain(error),
    };
    match run(cli) {
        Ok(exit) => exit.into(),
        Err(failure) => {
            // A closed standard error is no reason to panic.
            let _ = writeln!(std::io::stderr(), "qlock-top: {failure}");
            failure.exit().into()
        }
    }
}
