//! What do the commands do that have no screen?

use std::io::{self, Write};
use std::os::fd::AsFd;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::exit::{Exit, Failure};
use super::{Common, ListFormat, Paths, WatchFormat, Watched, layout, options, or_default, roots};
use crate::demo;
use crate::monitor::look::{Looker, Scope};
use crate::monitor::sampler::Sampler;
use crate::monitor::snapshot::Snapshot;
use crate::report::stream::{self, Stream};
use crate::report::{json, table};
use crate::signals::{ENDING, Signals};

/// A closed pipe is the reader's decision and no error.
pub(super) fn unless_closed(result: io::Result<()>) -> Result<(), Failure> {
    match result {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(Failure::error(format!("cannot write: {e}"))),
        _ => Ok(()),
    }
}

pub(super) fn list(paths: Paths, format: ListFormat, common: &Common) -> Result<Exit, Failure> {
    let mut looker = Looker::new(roots(common), &or_default(paths.paths)?, paths.recursive, None)?;
    let sample = looker.look(Scope::Everything);
    let snapshot = Snapshot::of(&sample);
    let mut out = io::BufWriter::new(io::stdout().lock());
    let written = match format {
        ListFormat::Table => table::write(&mut out, &snapshot, layout(common)),
        ListFormat::Json => json::write_snapshot(&mut out, common.ascii, &snapshot),
    };
    unless_closed(written.and_then(|()| out.flush()))?;
    if let ListFormat::Json = format {
        // The table says it below the images; JSON has no place for it.
        for trouble in &snapshot.troubles {
            let _ = writeln!(io::stderr(), "qlock-top: {}", crate::text::escape(trouble));
        }
    }
    Ok(Exit::of(&snapshot))
}

pub(super) fn watch(watched: Watched, format: WatchFormat, common: &Common) -> Result<Exit, Failure> {
    // Signals keep their ordinary effect here: there is nothing to put back, and a reader that stalls must not make the
    // program deaf.
    let mut sampler = Sampler::start(&options(watched, common)?)?;
    let stdout = io::stdout();
    let format = match format {
        WatchFormat::Text => stream::Format::Text(layout(common)),
        WatchFormat::Ndjson => stream::Format::Ndjson { ascii: common.ascii },
    };
    let mut stream = Stream::new(io::BufWriter::new(stdout.lock()), format);
    loop {
        let closed = {
            // Asked for nothing, a pipe still says when its reader has gone.
            let mut fds =
                [PollFd::new(sampler.bell(), PollFlags::POLLIN), PollFd::new(stdout.as_fd(), PollFlags::empty())];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(e) => return Err(Failure::error(e)),
            }
            let gone = PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL;
            fds[1].revents().is_some_and(|r| r.intersects(gone))
        };
        if closed {
            return Ok(Exit::Fine);
        }
        let update = sampler.take();
        match stream.write(&update) {
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Ok(Exit::Fine),
            other => unless_closed(other)?,
        }
        if update.ended {
            return Err(Failure::error("watching ended because of a fault in this program"));
        }
    }
}

pub(super) fn keep_scene() -> Result<Exit, Failure> {
    let mut signals = Signals::take_over(&ENDING)?;
    let scene = demo::Scene::make().map_err(Failure::error)?;
    let shown = writeln!(io::stdout(), "{}", crate::text::escape_path(scene.directory()));
    unless_closed(shown)?;
    let stdin = io::stdin();
    let mut fds = [PollFd::new(signals.as_fd(), PollFlags::POLLIN), PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
    loop {
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) => break,
            Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(Failure::error(e)),
        }
    }
    drop(scene);
    Ok(signals.next().map_or(Exit::Fine, |s| Exit::Signal(s as i32)))
}
