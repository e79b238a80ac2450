//! What does it look like when VMs, backups and readers share images, without a single VM?
//!
//! Makes small real images in a temporary directory and starts children of this program that take and drop locks on them
//! by the protocol. Everything is gone when the scene is dropped.

mod actor;
mod qcow2;

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

pub use actor::{ActorArgs, ActorError, act};

/// Why there is no scene.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// The directory or an image could not be made.
    #[error("cannot make the demo's images in {}: {source}", crate::text::escape_path(.directory))]
    Images {
        /// Where.
        directory: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A make-believe program did not start.
    #[error("cannot start the demo's {name}: {source}")]
    Actor {
        /// Which one.
        name: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// Images with their users, for as long as it lives.
pub struct Scene {
    actors: Vec<Child>,
    directory: TempDir,
}

struct Actor {
    /// What `ps` and the holder list call it.
    command: &'static str,
    /// What it does, as [`act`] takes it.
    script: &'static [&'static str],
}

const CAST: [Actor; 9] = [
    Actor { command: "qemu-demo", script: &["hold", "web01.qcow2=cwr/wr", "base.qcow2=c/wr", "-name", "guest=web01"] },
    Actor { command: "qemu-demo", script: &["hold", "web02.qcow2=cwr/wr", "base.qcow2=c/wr", "-name", "guest=web02"] },
    Actor { command: "qemu-demo", script: &["hold", "db01.raw=cw/w", "-name", "guest=db01"] },
    Actor { command: "qemu-demo", script: &["hold", "cluster.raw=cw/-", "-name", "guest=node-a"] },
    Actor { command: "qemu-demo", script: &["hold", "cluster.raw=cw/-", "-name", "guest=node-b"] },
    Actor { command: "qemu-nbd-demo", script: &["hold", "export.raw=cw/r"] },
    Actor { command: "dd-demo", script: &["write-unlocked", "scratch.raw"] },
    // A backup that comes and goes, and a reader that bothers nobody.
    Actor { command: "backup-demo", script: &["cycle", "2500", "archive.qcow2=c/wr"] },
    Actor { command: "reader-demo", script: &["cycle", "1700", "db01.raw=c/-"] },
];

const GIB: u64 = 1 << 30;

impl Scene {
    /// Makes the images, starts the programs, and returns when each of them holds what it is to hold.
    ///
    /// # Errors
    /// [`DemoError`]; what had been made is removed again.
    pub fn make() -> Result<Self, DemoError> {
        let images_error = |directory: &Path, source| DemoError::Images { directory: directory.to_owned(), source };
        let directory = tempfile::Builder::new()
            .prefix("qlock-top-demo-")
            .tempdir()
            .map_err(|e| images_error(&std::env::temp_dir(), e))?;
        make_images(directory.path()).map_err(|e| images_error(directory.path(), e))?;
        let mut scene = Self { actors: Vec::new(), directory };
        for actor in CAST {
            let child = scene.start(&actor).map_err(|source| DemoError::Actor { name: actor.command, source })?;
            scene.actors.push(child);
        }
        for (actor, child) in CAST.iter().zip(&mut scene.actors) {
            wait_until_ready(child).map_err(|source| DemoError::Actor { name: actor.command, source })?;
        }
        Ok(scene)
    }

    /// Where the images are.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    fn start(&self, actor: &Actor) -> io::Result<Child> {
        // Standard input is a pipe that nobody writes to: its end tells the child that we are gone, however we went.
        Command::new(std::env::current_exe()?)
            .arg0(actor.command)
            .arg("demo-actor")
            .args(actor.script)
            .current_dir(self.directory.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
    }
}

fn wait_until_ready(child: &mut Child) -> io::Result<()> {
    let mut line = String::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout).read_line(&mut line)?;
    }
    if line == "ready\n" { Ok(()) } else { Err(io::Error::other("it ended before it was ready")) }
}

impl Drop for Scene {
    fn drop(&mut self) {
        for child in &mut self.actors {
            // One that has ended already cannot be killed, and that is fine.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn make_images(directory: &Path) -> io::Result<()> {
    let path = |name: &str| directory.join(name);
    qcow2::create(&path("base.qcow2"), 10 * GIB, None)?;
    for overlay in ["web01.qcow2", "web02.qcow2"] {
        qcow2::create(&path(overlay), 40 * GIB, Some(("base.qcow2", "qcow2")))?;
    }
    qcow2::create(&path("archive.qcow2"), 100 * GIB, None)?;
    for (name, size) in
        [("db01.raw", 100), ("cluster.raw", 20), ("export.raw", 8), ("scratch.raw", 4), ("spare.raw", 16)]
    {
        File::create(path(name))?.set_len(size * GIB)?;
    }
    Ok(())
}
