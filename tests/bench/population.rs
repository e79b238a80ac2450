//! What does a large host look like? A population for measuring: images, programs that hold them, and many others.
//!
//! `cargo run --release --example population -- DIR --images 1000 --holders 500 --processes 2000 --descriptors 50`
//! makes the images in DIR (which must not be there yet), starts the processes, and prints one line, `standing: ..`, once
//! every lock is taken. Each holder takes, with open file description locks and by QEMU's rule, what a real VM or tool
//! takes. `--churn N` replaces N holders a second and has N other images opened and closed. It ends, with all that it
//! started, when its standard input does or at SIGTERM or SIGINT, however it is ended.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use clap::Parser;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::SignalFd;
use qlock::hold::HeldAccess;
use qlock::protocol::Access;

#[derive(Debug, Parser)]
struct Options {
    /// Where the images are made.
    directory: PathBuf,
    #[arg(long, default_value_t = 1000)]
    images: usize,
    /// How many of the images have a holder.
    #[arg(long, default_value_t = 500)]
    holders: usize,
    /// Processes in all, the holders among them.
    #[arg(long, default_value_t = 2000)]
    processes: usize,
    /// Open descriptors of each.
    #[arg(long, default_value_t = 50)]
    descriptors: usize,
    /// Holders replaced a second, and images opened and closed a second.
    #[arg(long, default_value_t = 0)]
    churn: u32,
}

/// What programs hold, in the proportions of a host that runs VMs: most are writers of a format or raw disks.
const ROLES: [(&str, &str); 6] = [
    ("qemu-system-x86_64", "cwr/wr"),
    ("qemu-system-x86_64", "cw/w"),
    ("qemu-system-x86_64", "cwr/wr"),
    ("qemu-nbd", "cw/r"),
    ("qemu-system-x86_64", "cwr/wr"),
    ("qemu-img", "c/wr"),
];

const READY_WITHIN: Duration = Duration::from_secs(120);

fn main() -> ExitCode {
    let result = match std::env::var_os("POPULATION_MEMBER") {
        Some(_) => live(&std::env::args().skip(1).collect::<Vec<_>>()),
        None => stand(&Options::parse()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("population: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A member's life: `DESCRIPTORS [IMAGE ACCESS ..]`; what follows is for show.
fn live(arguments: &[String]) -> io::Result<()> {
    let wrong = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, format!("{what}: {arguments:?}"));
    let count: usize = arguments.first().and_then(|n| n.parse().ok()).ok_or_else(|| wrong("no number"))?;
    let held = match arguments {
        [_, image, access, ..] => {
            let access: Access = access.parse().map_err(|_| wrong("no access"))?;
            Some(HeldAccess::acquire(Path::new(image), access).map_err(io::Error::other)?)
        }
        _ => None,
    };
    // The three of its own, and the image's.
    let rest = count.saturating_sub(3 + usize::from(held.is_some()));
    let _open: Vec<OwnedFd> = (0..rest).map(open_something).collect::<io::Result<_>>()?;
    io::stdout().write_all(b"+")?;
    io::stdout().flush()?;
    // Its end is ours: nobody writes to it.
    io::stdin().read_to_end(&mut Vec::new())?;
    drop(held);
    Ok(())
}

/// What services have open: programs and libraries, devices, pipes, sockets.
fn open_something(i: usize) -> io::Result<OwnedFd> {
    Ok(match i % 5 {
        0 | 1 => File::open("/proc/self/exe")?.into(),
        2 => File::open("/dev/null")?.into(),
        3 => io::pipe()?.0.into(),
        _ => std::os::unix::net::UnixDatagram::unbound()?.into(),
    })
}

struct Population {
    program: PathBuf,
    options: Options,
    /// The end that the members read; they end when the other one is closed.
    leash: OwnedFd,
    /// Where each says that it is ready.
    said: io::PipeReader,
    saying: OwnedFd,
    members: Vec<Child>,
}

fn image_path(directory: &Path, i: usize) -> PathBuf {
    let (_, access) = ROLES[i % ROLES.len()];
    directory.join(format!("vm-{i:05}.{}", if access == "cw/w" { "raw" } else { "qcow2" }))
}

/// Enough of an image for whoever reads its header (QEMU's docs/interop/qcow2.rst).
fn make_image(path: &Path) -> io::Result<()> {
    let mut file = File::create_new(path)?;
    if path.extension().is_some_and(|e| e == "qcow2") {
        let mut header = Vec::new();
        header.extend(b"QFI\xfb");
        for (offset, value) in [(4usize, 3u64), (20, 16), (96, 4), (100, 104)] {
            header.resize(offset.max(header.len()), 0);
            header.extend((value as u32).to_be_bytes());
            if offset == 20 {
                header.extend((20u64 << 30).to_be_bytes());
            }
        }
        file.write_all(&header)?;
    }
    file.set_len(256 * 1024)
}

impl Population {
    fn spawn(&mut self, i: usize) -> io::Result<Child> {
        let (name, access) = ROLES[i % ROLES.len()];
        let mut command = Command::new(&self.program);
        command.env("POPULATION_MEMBER", "1").arg(self.options.descriptors.to_string());
        if i < self.options.holders {
            let image = image_path(&self.options.directory, i);
            command.arg0(name).arg(image).arg(access).args(["-name", &format!("guest=vm{i},debug-threads=on")]);
        } else {
            command.arg0("service");
        }
        command.stdin(Stdio::from(self.leash.try_clone()?)).stdout(Stdio::from(self.saying.try_clone()?));
        command.spawn()
    }

    /// Waits until `count` members have said that they are ready.
    fn wait_for(&mut self, mut count: usize) -> io::Result<()> {
        let deadline = Instant::now() + READY_WITHIN;
        while count > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut fds = [PollFd::new(self.said.as_fd(), PollFlags::POLLIN)];
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            if poll(&mut fds, timeout)? == 0 {
                return Err(io::Error::other(format!("{count} members are not ready in time")));
            }
            let mut said = [0; 4096];
            let limit = count.min(said.len());
            count -= self.said.read(&mut said[..limit])?;
        }
        Ok(())
    }
}

fn stand(options: &Options) -> io::Result<()> {
    if options.holders > options.images || options.holders > options.processes {
        return Err(io::Error::other("more holders than images or processes"));
    }
    fs::create_dir(&options.directory)?;
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block()?;
    let signals = SignalFd::new(&signals)?;

    (0..options.images).try_for_each(|i| make_image(&image_path(&options.directory, i)))?;
    let (leash, held_end) = io::pipe()?;
    let (said, saying) = io::pipe()?;
    let mut population = Population {
        program: std::env::current_exe()?,
        options: Options { directory: options.directory.canonicalize()?, ..*options },
        leash: leash.into(),
        said,
        saying: saying.into(),
        members: Vec::new(),
    };
    for i in 0..options.processes {
        let member = population.spawn(i)?;
        population.members.push(member);
    }
    population.wait_for(options.processes)?;
    println!(
        "standing: {} images, {} held, {} processes of {} descriptors",
        options.images, options.holders, options.processes, options.descriptors
    );

    let period = (options.churn > 0).then(|| Duration::from_secs(1) / options.churn);
    let mut round = 0;
    let mut next = Instant::now();
    let stdin = io::stdin();
    loop {
        let mut fds = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN), PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        let timeout = match period {
            Some(_) => {
                PollTimeout::try_from(next.saturating_duration_since(Instant::now())).unwrap_or(PollTimeout::MAX)
            }
            None => PollTimeout::NONE,
        };
        poll(&mut fds, timeout)?;
        let said_something = |fd: &PollFd| fd.revents().is_some_and(|r| !r.is_empty());
        if said_something(&fds[1]) || (said_something(&fds[0]) && stdin.lock().read(&mut [0; 64])? == 0) {
            break;
        }
        if let Some(period) = period.filter(|_| Instant::now() >= next) {
            churn(&mut population, round)?;
            round += 1;
            next += period;
        }
    }
    // Every member ends now, the parent last, so that nothing is left when it has ended.
    drop(held_end);
    for mut member in population.members {
        member.wait()?;
    }
    fs::remove_dir_all(&population.options.directory)
}

/// One VM ends and another takes its image, and somebody else's image is opened and closed.
fn churn(population: &mut Population, round: usize) -> io::Result<()> {
    let options = &population.options;
    if options.images > options.holders {
        let i = options.holders + round % (options.images - options.holders);
        drop(File::open(image_path(&options.directory, i))?);
    }
    if options.holders > 0 {
        let i = round * 7 % options.holders;
        population.members[i].kill()?;
        population.members[i].wait()?;
        population.members[i] = population.spawn(i)?;
        population.wait_for(1)?;
    }
    Ok(())
}
