//! What do the images stand on, and what stands on them?
//!
//! Backing files, which may lie on other storage than the image that names them, and loop devices. Both are looked at by
//! path, which may wait for a file system, and neither is opened.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::sample::Backing;
use super::Looker;
use crate::image::catalog::Entry;
use crate::image::header::{self, Header};
use crate::linux::identity::{FileId, FileKind, status, status_of_name};
use crate::linux::loop_devices;
use crate::linux::mounts::Mount;
use crate::text::escape_path;

pub(super) struct KnownBacking {
    asked_at: Instant,
    backing: Backing,
}

/// Where a backing file's name leads is asked this often.
const BACKING_AGE: Duration = Duration::from_secs(5);

/// The files under loop devices, by the device and the path that sysfs names.
#[derive(Default)]
pub(super) struct LoopFiles(HashMap<(String, PathBuf), Option<FileId>>);

impl LoopFiles {
    /// Has the next look ask again.
    pub(super) fn forget(&mut self) {
        self.0.clear();
    }
}

fn find(path: PathBuf) -> Backing {
    let file = status_of_name(&path).ok().filter(|s| s.kind.can_be_image()).map(|s| s.id);
    let path = if file.is_some() { path.canonicalize().unwrap_or(path) } else { path };
    Backing { path, file, answered: true }
}

/// The directories that an overlay is made of, the topmost first, as its mount options name them (a comma or colon in a
/// name is escaped there, and such a layer is not found).
fn layers(mount: &Mount) -> impl Iterator<Item = PathBuf> {
    let of = |wanted: &'static str| {
        let value = move |option: &String| Some(option.strip_prefix(wanted)?.strip_prefix('=')?.to_owned());
        mount.options.iter().filter_map(value).collect::<Vec<_>>()
    };
    let lower: Vec<PathBuf> = of("lowerdir").iter().flat_map(|v| v.split(':')).map(PathBuf::from).collect();
    of("upperdir").into_iter().map(PathBuf::from).chain(lower).chain(of("lowerdir+").into_iter().map(PathBuf::from))
}

impl Looker {
    /// Finds the files that the headers of `targets` name as their backing files.
    pub(super) fn find_backings(&mut self, targets: &[Arc<Entry>]) {
        let named = targets.iter().filter_map(|entry| {
            let header = self.images.get(&entry.resolved)?.header.as_ref()?;
            // QEMU looks beside the name that it was given, wherever a link leads.
            header::backing_path(&entry.path, header.backing_file.as_ref()?)
        });
        let fresh = |path: &Path| {
            let known = self.backings.get(path);
            known.is_some_and(|k| k.backing.file.is_some() && k.asked_at.elapsed() < BACKING_AGE)
        };
        let mut due: Vec<PathBuf> = named.filter(|p| !fresh(p)).collect();
        due.sort_unstable();
        due.dedup();
        // A header may name anything: it is no reason to hold up the storage that it lies on.
        let questions = due.iter().map(|path| (path.clone(), ())).collect();
        let answers = self.storage.ask_names(questions, |path, ()| find(path));
        for (path, answer) in due.into_iter().zip(answers) {
            let backing = answer.unwrap_or_else(|| match self.backings.remove(&path) {
                Some(known) => Backing { answered: false, ..known.backing },
                None => Backing { path: path.clone(), file: None, answered: false },
            });
            self.backings.insert(path, KnownBacking { asked_at: Instant::now(), backing });
        }
    }

    /// The backing file of an image under the name by which it is shown.
    pub(super) fn backing_of(&self, shown: &Path, header: Option<&Header>) -> Option<Backing> {
        let path = header::backing_path(shown, header?.backing_file.as_ref()?)?;
        self.backings.get(&path).map(|k| k.backing.clone())
    }

    /// Forgets backing files that no image names any more.
    pub(super) fn forget_backings(&mut self) {
        self.backings.retain(|_, known| known.asked_at.elapsed() < BACKING_AGE * 12);
    }

    /// Finds the file of a layer that each image on an overlay file system is: the topmost one that has its name.
    pub(super) fn find_layers(&mut self) {
        let of_overlay = self.images.values().filter_map(|image| {
            let mount = image.mount.as_deref().filter(|m| m.kind == "overlay")?;
            let inside = image.resolved.strip_prefix(&mount.point).ok()?;
            let name = mount.root.strip_prefix("/").unwrap_or(&mount.root).join(inside);
            let candidates: Vec<PathBuf> = layers(mount).map(|layer| layer.join(&name)).collect();
            Some((image.resolved.to_path_buf(), candidates))
        });
        let all: Vec<(PathBuf, Vec<PathBuf>)> = of_overlay.collect();
        let questions: Vec<(PathBuf, Vec<PathBuf>)> =
            all.iter().filter_map(|(_, c)| Some((c.first()?.clone(), c.clone()))).collect();
        let answers = self.storage.ask_names(questions, |_, candidates| {
            let found = candidates.iter().find_map(|c| status(c).ok())?;
            // A whiteout is a character device.
            (found.kind == FileKind::Regular).then_some(found.id)
        });
        self.layers.clear();
        let asked = all.into_iter().filter(|(_, c)| !c.is_empty());
        self.layers.extend(asked.zip(answers).map(|((resolved, _), answer)| (resolved, answer.flatten())));
    }

    /// The files under loop devices, and each device in words, with where its file system is mounted.
    pub(super) fn loop_devices(&mut self) -> Vec<(FileId, String)> {
        let devices = loop_devices::read(&self.roots);
        let unknown = |d: &&loop_devices::LoopDevice| !self.loop_files.0.contains_key(&d.key());
        let due: Vec<_> = devices.iter().filter(unknown).map(loop_devices::LoopDevice::key).collect();
        let questions = due.iter().map(|(_, path)| (path.clone(), ())).collect();
        let answers = self.storage.ask_names(questions, |path: PathBuf, ()| status(&path).ok().map(|s| s.id));
        for (key, answer) in due.into_iter().zip(answers) {
            // What did not answer is asked again at the next look.
            if let Some(file) = answer {
                self.loop_files.0.insert(key, file);
            }
        }
        let words = |device: &loop_devices::LoopDevice| {
            let file = (*self.loop_files.0.get(&device.key())?)?;
            let mounts = self.storage.mounts();
            let words = match mounts.and_then(|m| m.from_source(&format!("/dev/{}", device.name))) {
                Some(mount) => format!("{}, mounted on {}", device.name, escape_path(&mount.point)),
                None => device.name.clone(),
            };
            Some((file, words))
        };
        devices.iter().filter_map(words).collect()
    }
}
