//! What did the operator ask for?
//!
//! The command line; [`exit`] has its statuses, `commands` what has no screen; `why`, `wait` and `hold` a file each.

mod commands;
pub mod exit;
mod hold;
mod inquiry;
mod pasted;
mod patience;
mod wait;
mod why;

use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::config::{Color, Config};
use crate::demo;
use crate::linux::Roots;
use crate::monitor::sampler::Options;
use crate::protocol::Operation;
use crate::report::table::Layout;
use crate::signals::Signals;
use crate::tui;
use commands::{keep_scene, list, watch};
use exit::{Exit, Failure};
use inquiry::parse_operation;
use patience::patiently;

/// Shows who holds the locks that QEMU takes on disk images.
#[derive(Debug, Parser)]
#[command(name = "qlock-top", version, about)]
#[command(
    after_help = "Exit status: 0 free or granted, 1 held or refused, 2 usage or error, 3 cannot tell, 4 no such image, \
                  124 time is up; hold with a command: that of the command."
)]
pub struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    watched: Watched,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Look once and print who holds what.
    List {
        #[command(flatten)]
        paths: Paths,
        /// Table for people or JSON for scripts.
        #[arg(long, value_enum, default_value = "table")]
        format: ListFormat,
    },
    /// Print changes as they happen, the present state first.
    Watch {
        #[command(flatten)]
        watched: Watched,
        /// Text for people or one JSON object a line for scripts.
        #[arg(long, value_enum, default_value = "text")]
        format: WatchFormat,
    },
    /// Say why a program is refused, by whom, and what to do; without --as, what each program would be told.
    Why {
        /// An image file or block device; `-`, or a pipe and no IMAGE: read a pasted error message.
        #[arg(value_name = "IMAGE")]
        image: Option<PathBuf>,
        /// The program, such as vm, convert-source or resize.
        #[arg(long = "as", value_name = "OPERATION", value_parser = parse_operation)]
        operation: Option<&'static Operation>,
        /// Sentences for people, or JSON for scripts, one object a line for each program.
        #[arg(long, value_enum, default_value = "table")]
        format: ListFormat,
    },
    /// Wait until a program would be let in; takes no lock.
    Wait {
        /// Image files or block devices; all must be ready.
        #[arg(value_name = "IMAGE", required = true)]
        images: Vec<PathBuf>,
        /// The program, such as vm, convert-source or resize.
        #[arg(long = "as", value_name = "OPERATION", value_parser = parse_operation)]
        operation: &'static Operation,
        /// Give up after this long, such as 30s, with status 124 and who is in the way.
        #[arg(long, value_name = "TIME", value_parser = parse_time)]
        timeout: Option<Duration>,
    },
    /// Take the locks that a program takes, as flock(1) does: while COMMAND runs, or until a signal or the timeout.
    Hold(hold::HoldArgs),
    /// The command of hold, on its way.
    #[command(hide = true, name = "hold-command")]
    Become(hold::CommandArgs),
    /// Try it on images of its own with make-believe VMs, in a temporary directory; needs no QEMU and no root.
    Demo {
        /// Make the scene, print its directory, and keep it until standard input ends or a signal comes.
        #[arg(long)]
        scene_only: bool,
    },
    /// One of the demo's make-believe programs.
    #[command(hide = true)]
    DemoActor(demo::ActorArgs),
}

#[derive(Debug, Args)]
struct Paths {
    /// Directories, image files or block devices [default: /var/lib/libvirt/images, if it is there].
    #[arg(value_name = "PATH")]
    paths: Vec<PathBuf>,
    /// Watch directories with everything below them.
    #[arg(long, short)]
    recursive: bool,
}

#[derive(Debug, Args)]
struct Watched {
    #[command(flatten)]
    paths: Paths,
    /// Time between two looks, such as 1s, 500ms or 2m; opened and closed images are looked at in between.
    ///
    /// One second unless the configuration says otherwise.
    #[arg(long, short, value_name = "TIME", value_parser = parse_interval)]
    interval: Option<Duration>,
}

#[derive(Debug, Args)]
struct Common {
    /// Read a recorded tree instead of /proc.
    #[arg(long, value_name = "DIR", global = true, hide_short_help = true)]
    proc_root: Option<PathBuf>,
    /// Never take a lock: no test locks in the dashboard, no hold.
    #[arg(long, global = true)]
    read_only: bool,
    /// Settings to be read after those of /etc/qlock-top.toml.
    #[arg(long, value_name = "FILE", global = true)]
    config: Option<PathBuf>,
    /// When to use colour [default: auto].
    #[arg(long, value_enum, value_name = "WHEN", global = true)]
    color: Option<Color>,
    /// Print nothing but ASCII characters.
    #[arg(long, global = true)]
    ascii: bool,
    /// Listen to the mouse in the dashboard from the start; m switches it.
    #[arg(long, global = true)]
    mouse: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ListFormat {
    Table,
    Json,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum WatchFormat {
    Text,
    Ndjson,
}

const SHORTEST_INTERVAL: Duration = Duration::from_millis(100);
/// No clock counts further for certain.
const LONGEST_TIME: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
const LONGEST_INTERVAL: Duration = Duration::from_secs(3600);

/// A span of time: a number and ms, s, m or h.
fn parse_time(text: &str) -> Result<Duration, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let seconds = match unit {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err("write a number and ms, s, m or h, such as 500ms".to_owned()),
    };
    let number: f64 = number.parse().map_err(|_| "write a number and a unit, such as 1s".to_owned())?;
    let time = Duration::try_from_secs_f64(number * seconds).map_err(|e| e.to_string())?;
    if time > LONGEST_TIME { Err("must be at most 100 years".to_owned()) } else { Ok(time) }
}

/// The time between two looks.
///
/// # Errors
/// What is wrong with it, in words.
fn parse_interval(text: &str) -> Result<Duration, String> {
    let interval = parse_time(text)?;
    if !(SHORTEST_INTERVAL..=LONGEST_INTERVAL).contains(&interval) {
        return Err("must be between 100ms and 1h".to_owned());
    }
    Ok(interval)
}

/// Does what the command line asks for.
///
/// # Errors
/// [`Failure`], to be printed; nothing was changed then.
pub fn run(cli: Cli) -> Result<Exit, Failure> {
    let mut common = cli.common;
    let config = Config::read(common.config.as_deref()).map_err(Failure::error)?;
    common.read_only |= config.read_only;
    common.ascii |= config.ascii;
    common.mouse |= config.mouse;
    common.color = common.color.or(config.color);
    match cli.command {
        Some(Command::List { paths, format }) => list(config.paths(paths), format, &common),
        Some(Command::Watch { watched, format }) => watch(config.watched(watched)?, format, &common),
        Some(Command::Why { image, operation, format }) => match image.filter(|i| i.as_os_str() != "-") {
            Some(image) => why::why(&image, operation, format, &common),
            None => pasted::explain(operation, format, &common),
        },
        Some(Command::Wait { images, operation, timeout }) => wait::wait(&images, operation, timeout, &common),
        Some(Command::Hold(args)) => hold::hold(&args, &common),
        Some(Command::Become(args)) => hold::become_command(&args),
        Some(Command::Demo { scene_only: true }) => keep_scene(),
        Some(Command::Demo { scene_only: false }) => {
            let signals = Signals::take_over(&tui::SIGNALS)?;
            let scene = demo::Scene::make().map_err(Failure::error)?;
            let options = options(Watched::of(scene.directory().to_owned()), &common)?;
            dashboard(&options, &common, signals)
        }
        Some(Command::DemoActor(args)) => demo::act(&args).map(|()| Exit::Fine).map_err(Failure::error),
        None => {
            let options = options(config.watched(cli.watched)?, &common)?;
            if !io::stdout().is_terminal() || std::env::var_os("TERM").is_none_or(|t| t == "dumb" || t.is_empty()) {
                // No screen to draw on: one look, as a table.
                let paths = Paths { paths: options.paths, recursive: options.recursive };
                return list(paths, ListFormat::Table, &common);
            }
            dashboard(&options, &common, Signals::take_over(&tui::SIGNALS)?)
        }
    }
}

impl Watched {
    fn of(path: PathBuf) -> Self {
        Self { paths: Paths { paths: vec![path], recursive: false }, interval: None }
    }
}

impl Config {
    /// What the operator named, or else what the configuration does.
    fn paths(&self, mut paths: Paths) -> Paths {
        if paths.paths.is_empty() {
            paths.paths.clone_from(&self.paths);
            paths.recursive |= self.recursive;
        }
        paths
    }

    fn watched(&self, watched: Watched) -> Result<Watched, Failure> {
        let interval = match (watched.interval, &self.interval) {
            (None, Some(text)) => Some(
                parse_interval(text)
                    .map_err(|e| Failure::error(format!("the configuration: interval = \"{text}\": {e}")))?,
            ),
            (given, _) => given,
        };
        Ok(Watched { paths: self.paths(watched.paths), interval })
    }
}

fn roots(common: &Common) -> Roots {
    common.proc_root.as_deref().map_or_else(Roots::host, Roots::recorded)
}

fn or_default(paths: Vec<PathBuf>) -> Result<Vec<PathBuf>, Failure> {
    if !paths.is_empty() {
        return Ok(paths);
    }
    let usual = Path::new("/var/lib/libvirt/images");
    // One that does not answer is there, and is told as not answering.
    match patiently(|| usual.is_dir()) {
        Some(true) | None => Ok(vec![usual.to_owned()]),
        Some(false) => Err(Failure::error(
            "which images? There is no /var/lib/libvirt/images, which is looked at where no PATH is given. Name a \
             directory, an image file or a block device; or try qlock-top demo",
        )),
    }
}

fn options(watched: Watched, common: &Common) -> Result<Options, Failure> {
    Ok(Options {
        paths: or_default(watched.paths.paths)?,
        recursive: watched.paths.recursive,
        interval: watched.interval.unwrap_or(Duration::from_secs(1)),
        roots: roots(common),
    })
}

fn is_utf8_locale() -> bool {
    // As setlocale(3) decides: the first of these that is set and not empty.
    let set =
        ["LC_ALL", "LC_CTYPE", "LANG"].into_iter().find_map(|name| std::env::var(name).ok().filter(|v| !v.is_empty()));
    set.is_some_and(|v| {
        let v = v.to_ascii_lowercase();
        v.contains("utf-8") || v.contains("utf8")
    })
}

fn layout(common: &Common) -> Layout {
    let terminal = io::stdout().is_terminal();
    Layout {
        // A serial line that does not know its width has 0 columns: nothing is cut then.
        columns: rustix::termios::tcgetwinsize(io::stdout())
            .ok()
            .map(|s| s.ws_col.into())
            .filter(|c| terminal && *c > 0),
        ascii: common.ascii || (terminal && !is_utf8_locale()),
    }
}

fn dashboard(options: &Options, common: &Common, signals: Signals) -> Result<Exit, Failure> {
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
    let look = tui::Look {
        color: match common.color {
            Some(Color::Always) => true,
            Some(Color::Never) => false,
            Some(Color::Auto) | None => !no_color,
        },
        ascii: common.ascii || !is_utf8_locale(),
        mouse: common.mouse,
    };
    match tui::run(options, look, common.read_only, signals) {
        Ok(tui::End::Quit) => Ok(Exit::Fine),
        Ok(tui::End::Hangup) => Ok(Exit::Signal(nix::sys::signal::Signal::SIGHUP as i32)),
        Ok(tui::End::Signal(signal)) => Ok(Exit::Signal(signal as i32)),
        Err(tui::RunError::Start(error)) => Err(error.into()),
        Err(error) => Err(Failure::error(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn intervals_have_units_and_bounds() {
        for (text, millis) in
            [("1s", 1000), ("1", 1000), ("500ms", 500), ("0.5s", 500), ("2m", 120_000), ("1h", 3_600_000)]
        {
            assert_eq!(parse_interval(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for bad in ["", "s", "1x", "-1s", "0s", "99ms", "2h", "1e9", "..", "99999999999999999999h"] {
            assert!(parse_interval(bad).is_err(), "{bad}");
        }
    }
}
