//! In which order do the images stand?
//!
//! Always by the path in the end, so that rows do not change places without a reason. Pure.

use std::cmp::Ordering;

use crate::linux::descriptors::OpenMode;
use crate::monitor::finding::Severity;
use crate::monitor::snapshot::{Image, Verdict};
use crate::monitor::wording::{format_text, holders_text, role_text};

/// By what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Column {
    /// What needs a look first: dangers, what cannot be told, what is held, what is open, what is free.
    #[default]
    Problems,
    /// The path.
    Image,
    /// The format.
    Format,
    /// The size that the guest sees.
    Size,
    /// The number of held bytes.
    Bytes,
    /// The role.
    Role,
    /// The holders.
    Holders,
}

impl Column {
    /// In the order in which the key goes through them.
    pub const ALL: [Self; 7] =
        [Self::Problems, Self::Image, Self::Format, Self::Size, Self::Bytes, Self::Role, Self::Holders];

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Problems => "problems",
            Self::Image => "image",
            Self::Format => "format",
            Self::Size => "size",
            Self::Bytes => "bytes",
            Self::Role => "role",
            Self::Holders => "holders",
        }
    }
}

/// In which direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// The usual one of the column: worst, largest, or first of the alphabet on top.
    #[default]
    Usual,
    /// The other way round.
    Reversed,
}

/// A column and a direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sort {
    /// By what.
    pub column: Column,
    /// In which direction.
    pub order: Order,
}

impl Sort {
    /// By the next column.
    pub fn next(&mut self) {
        let at = Column::ALL.iter().position(|c| *c == self.column).unwrap_or_default();
        *self = Self { column: Column::ALL[(at + 1) % Column::ALL.len()], order: Order::Usual };
    }

    /// The other way round.
    pub fn reverse(&mut self) {
        self.order = match self.order {
            Order::Usual => Order::Reversed,
            Order::Reversed => Order::Usual,
        };
    }

    /// Sorts places in `images`.
    pub fn arrange(self, rows: &mut [usize], images: &[Image]) {
        let by_path = |a: &Image, b: &Image| a.path.cmp(&b.path).then(a.file.cmp(&b.file));
        rows.sort_by(|a, b| {
            let (a, b) = (&images[*a], &images[*b]);
            let first = self.compare(a, b);
            let first = if self.order == Order::Reversed { first.reverse() } else { first };
            first.then_with(|| by_path(a, b))
        });
    }

    fn compare(self, a: &Image, b: &Image) -> Ordering {
        match self.column {
            Column::Problems => rank(a).cmp(&rank(b)),
            Column::Image => a.path.cmp(&b.path),
            Column::Format => format_text(a).cmp(format_text(b)),
            Column::Size => size(b).cmp(&size(a)),
            Column::Bytes => b.held().bytes().count().cmp(&a.held().bytes().count()),
            Column::Role => role_text(a).cmp(&role_text(b)),
            Column::Holders => {
                let (a, b) = (holders_text(a), holders_text(b));
                a.is_empty().cmp(&b.is_empty()).then_with(|| a.cmp(&b))
            }
        }
    }
}

fn size(image: &Image) -> u64 {
    image.virtual_size.unwrap_or(image.file_size)
}

/// 0 for the worst.
#[must_use]
pub fn rank(image: &Image) -> u8 {
    let worst = image.findings.iter().map(|f| f.severity).max();
    let writer = image.openers.iter().any(|o| o.mode == OpenMode::Write);
    match (worst, image.verdict) {
        (Some(Severity::Danger), _) => 0,
        (_, v) if !v.is_certain() => 1,
        _ if writer => 2,
        (Some(Severity::Warning), _) => 3,
        (_, Verdict::HeldByKernel | Verdict::HeldElsewhere) => 3,
        (_, Verdict::Held) => 4,
        _ if !image.openers.is_empty() => 5,
        _ => 6,
    }
}
