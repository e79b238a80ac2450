//! Which test lock does the operator want, whom would it hit, and is it safe to take?
//!
//! The dialog as a value: what is chosen, and how far it has come. Checking comes before taking, a lock on an image that is
//! in use is confirmed with No first, and each lock has a deadline. Pure.

use std::time::Duration;

use crossterm::event::{KeyCode, KeyEvent, KeyEventKind};
use jiff::{SignedDuration, Timestamp};

use super::model::{Key, Model, Overlay};
use super::update::Effect;
use crate::monitor::snapshot::{ByteState, Image, Verdict};
use crate::monitor::what_if::{conflict, refused_beside};
use crate::monitor::wording::{access_text, process_name};
use crate::protocol::{Access, Family, LockByte, Operation, Permission};
use crate::text::escape_path;

/// A test lock that is held by this program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnLock {
    /// What it is released by.
    pub id: u64,
    /// On which image.
    pub key: Key,
    /// What it holds.
    pub access: Access,
    /// When it ends by itself.
    pub until: Timestamp,
}

/// News of test locks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LockNews {
    /// An image was asked, and nothing was locked.
    Checked {
        /// Which image.
        key: Key,
        /// Granted, or why not.
        result: Result<(), String>,
    },
    /// A lock is held.
    Taken(OwnLock),
    /// A lock was not taken, and why.
    Refused {
        /// Which image.
        key: Key,
        /// Why, escaped.
        why: String,
    },
    /// A lock has been let go.
    Ended {
        /// Which.
        id: u64,
        /// Its time was up.
        by_deadline: bool,
    },
}

/// How far the dialog has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// What is to be locked.
    Choose,
    /// Check only, which comes first, or take it.
    Decide {
        /// The second row is under the cursor.
        take: bool,
    },
    /// The image is in use: No comes first.
    Confirm {
        /// The second row is under the cursor.
        yes: bool,
    },
}

/// The dialog.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TestLock {
    /// On which image.
    pub key: Key,
    /// Its family when the dialog was opened.
    pub family: Family,
    /// How far it has come.
    pub stage: Stage,
    /// The bytes are toggled one by one, instead of choosing a program.
    pub by_bytes: bool,
    /// The program under the cursor: a place in [`TestLock::operations`].
    pub operation: usize,
    /// The byte under the cursor: a place in [`LockByte::ALL`].
    pub byte: usize,
    /// The bytes that are toggled on.
    pub bytes: Access,
    /// A place in [`LIMITS`].
    pub limit: usize,
    /// What the last check or attempt said.
    pub answer: Option<String>,
}

/// For how long a test lock may be taken, in seconds.
pub const LIMITS: [u32; 8] = [10, 30, 60, 120, 300, 600, 1800, 3600];
const USUAL_LIMIT: usize = 1;

impl TestLock {
    /// A dialog about `image`.
    #[must_use]
    pub fn new(image: &Image) -> Self {
        let mut dialog = Self {
            key: (image.path.clone(), image.file),
            family: image.family(),
            stage: Stage::Choose,
            by_bytes: false,
            operation: 0,
            byte: 0,
            bytes: Access::NONE,
            limit: USUAL_LIMIT,
            answer: None,
        };
        // Most want to know whether a VM could start.
        dialog.operation = dialog.operations().iter().position(|o| o.name == "vm").unwrap_or_default();
        dialog
    }

    /// The programs that lock something on such an image.
    #[must_use]
    pub fn operations(&self) -> Vec<&'static Operation> {
        let locks = |o: &&Operation| o.recipe(self.family).is_some_and(|r| !r.accesses().is_empty());
        Operation::ALL.iter().filter(locks).collect()
    }

    /// What is to be taken, step by step.
    #[must_use]
    pub fn accesses(&self) -> Vec<Access> {
        if self.by_bytes {
            return if self.bytes.is_empty() { Vec::new() } else { vec![self.bytes] };
        }
        let operation = self.operations().get(self.operation).copied();
        operation.and_then(|o| o.recipe(self.family)).map(|r| r.accesses()).unwrap_or_default()
    }

    /// What is held in the end.
    #[must_use]
    pub fn access(&self) -> Access {
        self.accesses().last().copied().unwrap_or_default()
    }

    /// The time after which it ends by itself.
    #[must_use]
    pub fn limit(&self) -> Duration {
        Duration::from_secs(LIMITS[self.limit.min(LIMITS.len() - 1)].into())
    }

    /// What an operator must know before taking it, a sentence each; escaped.
    #[must_use]
    pub fn consequences(&self, model: &Model) -> Vec<String> {
        let Some(image) = model.image_of(&self.key) else {
            return vec!["the image is gone".to_owned()];
        };
        let accesses = self.accesses();
        if accesses.is_empty() {
            return vec!["no byte is chosen yet: space toggles one".to_owned()];
        }
        let access = self.access();
        let mut lines = vec![format!("{access}: {}; on this image alone, not on files below it", access_text(access))];
        let hit = accesses.iter().find_map(|a| conflict(image, *a));
        lines.push(match hit {
            Some((byte, sentence, holders)) => {
                let mut who: Vec<String> = holders.iter().map(|h| process_name(&h.process)).collect();
                who.dedup();
                let who = if who.is_empty() { "somebody who cannot be named".to_owned() } else { who.join(", ") };
                format!("conflicts with {who} on byte {}: {sentence}", byte.offset())
            }
            None if image.bytes.iter().any(|b| b.state == ByteState::Unknown) => {
                "whether it conflicts with somebody cannot be told".to_owned()
            }
            None => "conflicts with nobody now".to_owned(),
        });
        let refused = refused_beside(access, self.family);
        let names: Vec<&str> = refused.iter().map(|o| o.name).collect();
        lines.push(match names.len() {
            0 => "while it is held, no QEMU program is refused".to_owned(),
            n => format!("while it is held, it refuses {n} QEMU programs: {}", names.join(", ")),
        });
        lines
    }
}

/// Whether somebody else uses the image, or nobody knows.
fn is_in_use(image: &Image) -> bool {
    image.holders.iter().any(|h| !h.ours)
        || !image.openers.is_empty()
        || !image.ownerless().is_empty()
        || image.verdict != Verdict::Free && !image.holders.iter().any(|h| h.ours)
}

/// Opens the dialog for the selected image, or says why not.
pub(super) fn open(model: &mut Model) {
    if model.read_only {
        model.note =
            Some("read-only: no test locks (--read-only, or read-only = true in the configuration)".to_owned());
        return;
    }
    // What is decided here must be decided by what is so now.
    super::update::thaw(model);
    model.overlay = match (&model.overlay, model.selected_image()) {
        (Some(Overlay::TestLock(_)), _) => None,
        (_, Some(image)) => Some(Overlay::TestLock(TestLock::new(image))),
        (other, None) => other.clone(),
    };
}

/// A key while the dialog is open; keys with the control key are the caller's.
pub(super) fn key(model: &mut Model, key: KeyEvent) -> Vec<Effect> {
    if key.kind == KeyEventKind::Release {
        return Vec::new();
    }
    let Some(Overlay::TestLock(mut dialog)) = model.overlay.take() else { return Vec::new() };
    let (mut effects, mut open) = (Vec::new(), true);
    let last = match dialog.stage {
        Stage::Choose if dialog.by_bytes => LockByte::ALL.len() - 1,
        Stage::Choose => dialog.operations().len().saturating_sub(1),
        Stage::Decide { .. } | Stage::Confirm { .. } => 1,
    };
    match key.code {
        KeyCode::Up | KeyCode::Char('k') => dialog.step(|row| row.saturating_sub(1)),
        KeyCode::Down | KeyCode::Char('j') => dialog.step(|row| (row + 1).min(last)),
        KeyCode::PageUp => dialog.step(|row| row.saturating_sub(10)),
        KeyCode::PageDown => dialog.step(|row| (row + 10).min(last)),
        KeyCode::Home => dialog.step(|_| 0),
        KeyCode::End => dialog.step(|_| last),
        KeyCode::Tab | KeyCode::BackTab if dialog.stage == Stage::Choose => dialog.by_bytes = !dialog.by_bytes,
        KeyCode::Char(' ') if dialog.stage == Stage::Choose && dialog.by_bytes => dialog.toggle(),
        KeyCode::Char('+' | '=') => dialog.limit = (dialog.limit + 1).min(LIMITS.len() - 1),
        KeyCode::Char('-') => dialog.limit = dialog.limit.saturating_sub(1),
        KeyCode::Enter => effects = dialog.enter(model),
        KeyCode::Esc => match dialog.stage {
            Stage::Choose => open = false,
            Stage::Decide { .. } => (dialog.stage, dialog.answer) = (Stage::Choose, None),
            Stage::Confirm { .. } => dialog.stage = Stage::Decide { take: false },
        },
        KeyCode::Char('t') => open = false,
        KeyCode::Char('q') => return vec![Effect::Quit],
        _ => {}
    }
    if open {
        model.overlay = Some(Overlay::TestLock(dialog));
    }
    effects
}

impl TestLock {
    fn step(&mut self, to: impl Fn(usize) -> usize) {
        match &mut self.stage {
            Stage::Choose if self.by_bytes => self.byte = to(self.byte),
            Stage::Choose => self.operation = to(self.operation),
            Stage::Decide { take: second } | Stage::Confirm { yes: second } => *second = to(usize::from(*second)) > 0,
        }
    }

    fn toggle(&mut self) {
        let Some(byte) = LockByte::ALL.get(self.byte) else { return };
        if byte.permission == Permission::GraphMod {
            self.answer = Some("bytes 104 and 204 are never taken: no QEMU since 7.0 looks at them".to_owned());
            return;
        }
        self.answer = None;
        let only = Access::NONE.with(*byte);
        self.bytes = if self.bytes.contains(*byte) { self.bytes.difference(only) } else { self.bytes.union(only) };
    }

    fn enter(&mut self, model: &Model) -> Vec<Effect> {
        let Some(image) = model.image_of(&self.key) else {
            self.answer = Some("the image is gone".to_owned());
            return Vec::new();
        };
        let accesses = self.accesses();
        if accesses.is_empty() {
            return Vec::new();
        }
        let (key, resolved) = (self.key.clone(), image.resolved.clone());
        match self.stage {
            Stage::Choose => self.stage = Stage::Decide { take: false },
            Stage::Decide { take: false } => {
                self.answer = Some("asking ..".to_owned());
                return vec![Effect::CheckLock { key, resolved, accesses }];
            }
            Stage::Decide { take: true } if is_in_use(image) => self.stage = Stage::Confirm { yes: false },
            Stage::Confirm { yes: false } => self.stage = Stage::Decide { take: false },
            Stage::Decide { take: true } | Stage::Confirm { yes: true } => {
                self.answer = Some("taking it ..".to_owned());
                self.stage = Stage::Decide { take: false };
                return vec![Effect::TakeLock { key, resolved, accesses, limit: self.limit() }];
            }
        }
        Vec::new()
    }
}

/// Takes in what became of a lock.
pub(super) fn take_news(model: &mut Model, news: LockNews) {
    match news {
        LockNews::Checked { key, result } => {
            let answer = match result {
                Ok(()) => "it would be granted now; nothing was locked".to_owned(),
                Err(why) => format!("it would be refused: {why}"),
            };
            tell(model, &key, answer);
        }
        LockNews::Refused { key, why } => tell(model, &key, format!("not taken: {why}")),
        LockNews::Taken(lock) => {
            model.note = Some(format!("holding {} on {}", lock.access, escape_path(&lock.key.0)));
            let about = |o: &Overlay| matches!(o, Overlay::TestLock(d) if d.key == lock.key);
            if model.overlay.as_ref().is_some_and(about) {
                model.overlay = None;
            }
            model.own_locks.push(lock);
        }
        LockNews::Ended { id, by_deadline } => {
            let Some(at) = model.own_locks.iter().position(|l| l.id == id) else { return };
            let lock = model.own_locks.remove(at);
            let why = if by_deadline { "its time is up" } else { "released" };
            model.note = Some(format!("test lock on {} let go: {why}", escape_path(&lock.key.0)));
        }
    }
}

/// In the dialog, if it is still about that image; in the bottom line otherwise.
fn tell(model: &mut Model, key: &Key, text: String) {
    match &mut model.overlay {
        Some(Overlay::TestLock(dialog)) if dialog.key == *key => dialog.answer = Some(text),
        _ => model.note = Some(format!("{}: {text}", escape_path(&key.0))),
    }
}

/// Lets go of the lock on the selected image, or of the only one.
pub(super) fn release_one(model: &mut Model) -> Vec<Effect> {
    let on_selected = model.own_locks.iter().filter(|l| Some(&l.key) == model.selected.as_ref());
    let mut ids: Vec<u64> = on_selected.map(|l| l.id).collect();
    if let ([], [only]) = (ids.as_slice(), model.own_locks.as_slice()) {
        ids.push(only.id);
    }
    if ids.is_empty() {
        let text = if model.own_locks.is_empty() {
            "no test lock is held"
        } else {
            "no test lock on this image; U lets all go"
        };
        model.note = Some(text.to_owned());
    }
    ids.into_iter().map(Effect::ReleaseLock).collect()
}

/// Lets go of all of them.
pub(super) fn release_all(model: &mut Model) -> Vec<Effect> {
    if model.own_locks.is_empty() {
        model.note = Some("no test lock is held".to_owned());
    }
    model.own_locks.iter().map(|l| Effect::ReleaseLock(l.id)).collect()
}

/// Whole seconds until a lock ends, at least 0.
#[must_use]
pub fn seconds_left(lock: &OwnLock, now: Timestamp) -> u64 {
    // A part of a second is shown as a whole one, so that 0 means over.
    let left = lock.until.duration_since(now) + SignedDuration::from_millis(999);
    u64::try_from(left.as_secs()).unwrap_or_default()
}
