//! Which images are on the list, and which of them does inotify watch?
//!
//! Paths are added to inotify by a thread of `linux::storage`: to add one asks its file system.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Looker;
use crate::linux::storage::Lane;

#[derive(Debug)]
enum Change {
    Add { path: PathBuf, is_directory: bool },
    Remove(PathBuf),
}

impl Looker {
    /// Takes over the catalog's list, and has inotify watch what is on it.
    pub(super) fn take_listing(&mut self) {
        self.entries = self.catalog.images();
        let listed: HashSet<&Arc<Path>> = self.entries.iter().map(|e| &e.resolved).collect();
        self.images.retain(|path, _| listed.contains(path));
        self.headers.retain(|path, _| listed.contains(path));
        let Some(watch) = self.watch.clone().filter(|_| self.resting_until.is_none()) else { return };
        let points = self.catalog.watch_points();
        let ids = self.catalog.watch_ids();
        let stale = |path: &PathBuf| !points.contains_key(path) || self.watched_ids.get(path) != ids.get(path);
        let watched = watch.watched();
        let gone: HashSet<&PathBuf> = watched.iter().filter(|p| stale(p)).collect();
        let kept: HashSet<&PathBuf> = watched.iter().filter(|p| !stale(p)).collect();
        let remove = gone.into_iter().cloned().map(Change::Remove);
        // To add a path whose storage does not answer would hold up all the others.
        let mut answers = |path: &PathBuf| {
            let lane = self.storage.lane_of(path);
            !self.storage.is_stuck(&lane)
        };
        let add = points
            .iter()
            .filter(|(path, _)| !kept.contains(path) && answers(path))
            .map(|(path, is_directory)| Change::Add { path: path.clone(), is_directory: *is_directory });
        let changes: Vec<(Lane, Change)> = remove.chain(add).map(|change| (Lane::Watch, change)).collect();
        self.unheard |= changes.iter().any(|(_, change)| matches!(change, Change::Add { .. }));
        let asked: Vec<PathBuf> = changes
            .iter()
            .map(|(_, change)| match change {
                Change::Add { path, .. } | Change::Remove(path) => path.clone(),
            })
            .collect();
        let results = self.storage.answers(changes, move |change| match change {
            Change::Add { path, is_directory } => watch.add(&path, is_directory),
            Change::Remove(path) => {
                watch.remove(&path);
                Ok(())
            }
        });
        let before = std::mem::take(&mut self.failed);
        let failed: Vec<(PathBuf, Option<notify::Error>)> = asked
            .into_iter()
            .zip(results)
            .filter_map(|(path, result)| match result {
                Ok(Ok(())) => None,
                Ok(Err(error)) => Some((path, Some(error))),
                Err(_) => Some((path, None)),
            })
            .collect();
        let is_directory = |path: &PathBuf| points.get(path).copied().unwrap_or_default();
        self.failed = failed.iter().map(|(path, _)| (path.clone(), is_directory(path))).collect();
        let gone = |e: &Option<notify::Error>| {
            e.as_ref().is_some_and(|e| match &e.kind {
                notify::ErrorKind::PathNotFound => true,
                notify::ErrorKind::Io(e) => e.kind() == std::io::ErrorKind::NotFound,
                _ => false,
            })
        };
        let failed: Vec<_> = failed.into_iter().filter(|(_, e)| !gone(e)).collect();
        if let Some((path, error)) = failed.first().filter(|_| self.failed != before) {
            let path = crate::text::escape_path(path);
            let number = crate::text::counted(failed.len(), "path", "paths");
            let limit = error.as_ref().is_some_and(|e| matches!(e.kind, notify::ErrorKind::MaxFilesWatch));
            let advice = if limit { "; raise fs.inotify.max_user_watches" } else { "" };
            let why = error.as_ref().map_or_else(|| "its storage does not answer".to_owned(), ToString::to_string);
            self.unwatched.push(format!(
                "{number} cannot be watched (first: {path}: {}){advice}: changes there show at the next tick only",
                crate::text::escape(&why)
            ));
        }
        self.watched_ids = ids;
    }

    /// Watches what the kernel has let go of, and tries again what could not be watched: one path first, since thousands
    /// may have failed at one limit.
    pub(super) fn watch_again(&mut self) {
        let Some(watch) = self.watch.clone().filter(|_| self.resting_until.is_none()) else { return };
        let gone = watch.take_gone();
        let first = self.failed.first().cloned().map(|question| (Lane::Watch, question));
        let answer = self
            .storage
            .answers(first, move |(path, is_directory): (PathBuf, bool)| watch.add(&path, is_directory).is_ok());
        if gone || matches!(answer.first(), Some(Ok(true))) {
            self.take_listing();
        }
    }

    /// Leaves inotify aside for a while: what changes then shows by [`hint`](Self::hint) and by the timer.
    pub fn rest_from_events(&mut self, pause: Duration) {
        if let Some(watch) = self.watch.clone() {
            let all: Vec<(Lane, PathBuf)> = watch.watched().into_iter().map(|path| (Lane::Watch, path)).collect();
            // Nothing of what is asked here waits for a file system; but what was asked before may.
            self.storage.answers(all, move |path: PathBuf| watch.remove(&path));
            self.resting_until = Some(Instant::now() + pause);
        }
    }

    /// Takes over the list where it is another, or where what could not be watched before can be now. Returns whether
    /// there is something to look at because of it.
    pub(super) fn follow_listing(&mut self, recovered: bool) -> bool {
        let changed = self.catalog.refresh(&mut self.storage) | self.has_rested_from_events();
        if changed || recovered {
            self.take_listing();
        }
        changed
    }

    /// Whether a rest from events is over since this was last asked: then they are listened to again.
    fn has_rested_from_events(&mut self) -> bool {
        let rested = self.resting_until.take_if(|until| Instant::now() >= *until).is_some();
        if let Some(watch) = self.watch.as_ref().filter(|_| rested) {
            watch.listen();
        }
        rested
    }

    /// Paths that could not be watched since the last call, in words: changes there show at the next tick only.
    pub fn take_unwatched(&mut self) -> Vec<String> {
        std::mem::take(&mut self.unwatched)
    }
}
