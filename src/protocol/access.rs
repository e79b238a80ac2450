//! Which bytes does an access lock, which does it test, and which one stops it?
//!
//! The heart of `raw_check_lock_bytes` and `raw_apply_lock_bytes` in QEMU's `block/file-posix.c`. Asks only
//! [`super::permission`].

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::permission::{LockByte, Permission, PermissionSet, Side};

/// What one descriptor uses of an image and what it denies to others; equally the set of bytes that it holds.
///
/// The text form is `uses/denies` in letters: `cwr/wr`, `c/-`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Access {
    /// Held on bytes 100 to 104.
    pub permissions: PermissionSet,
    /// Held on bytes 200 to 204.
    pub unshared: PermissionSet,
}

impl Access {
    /// Nothing used, nothing denied.
    pub const NONE: Self = Self { permissions: PermissionSet::NONE, unshared: PermissionSet::NONE };

    /// An access of two sets.
    #[must_use]
    pub const fn new(permissions: PermissionSet, unshared: PermissionSet) -> Self {
        Self { permissions, unshared }
    }

    /// Whether nothing is used and nothing denied.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.permissions.is_empty() && self.unshared.is_empty()
    }

    /// Whether `byte` is one of the bytes of this access.
    #[must_use]
    pub const fn contains(self, byte: LockByte) -> bool {
        match byte.side {
            Side::Permission => self.permissions.contains(byte.permission),
            Side::Unshare => self.unshared.contains(byte.permission),
        }
    }

    /// The access with `byte` added.
    #[must_use]
    pub const fn with(self, byte: LockByte) -> Self {
        match byte.side {
            Side::Permission => Self::new(self.permissions.with(byte.permission), self.unshared),
            Side::Unshare => Self::new(self.permissions, self.unshared.with(byte.permission)),
        }
    }

    /// Bytes of either.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self::new(self.permissions.union(other.permissions), self.unshared.union(other.unshared))
    }

    /// Bytes of both.
    #[must_use]
    pub const fn intersection(self, other: Self) -> Self {
        Self::new(self.permissions.intersection(other.permissions), self.unshared.intersection(other.unshared))
    }

    /// Bytes of `self` that are not in `other`.
    #[must_use]
    pub const fn difference(self, other: Self) -> Self {
        Self::new(self.permissions.difference(other.permissions), self.unshared.difference(other.unshared))
    }

    /// Whether going from `self` to `new` only lets go: then QEMU locks nothing and tests nothing
    /// (`raw_handle_perm_lock`, `RAW_PL_PREPARE`).
    #[must_use]
    pub const fn is_relaxed_by(self, new: Self) -> bool {
        new.permissions.is_subset(self.permissions) && new.unshared.is_subset(self.unshared)
    }

    /// The access without graph-mod, which QEMU since 7.0 neither locks nor tests.
    #[must_use]
    pub const fn without_legacy(self) -> Self {
        Self::new(
            self.permissions.intersection(PermissionSet::CURRENT),
            self.unshared.intersection(PermissionSet::CURRENT),
        )
    }

    /// The bytes of this access in the order in which QEMU locks them: first 100 + i, then 200 + i
    /// (`raw_apply_lock_bytes`).
    pub fn bytes(self) -> impl Iterator<Item = LockByte> {
        LockByte::ALL.into_iter().filter(move |b| self.contains(*b))
    }

    /// The bytes that must be free of others, in the order in which QEMU tests them: first 200 + i for each permission
    /// used, then 100 + i for each one denied (`raw_check_lock_bytes`; the published RFC has it the other way round).
    pub fn tested_bytes(self) -> impl Iterator<Item = LockByte> {
        let uses = Permission::CURRENT.into_iter().filter(move |p| self.permissions.contains(*p));
        let denies = Permission::CURRENT.into_iter().filter(move |p| self.unshared.contains(*p));
        uses.map(LockByte::unshare).chain(denies.map(LockByte::permission))
    }

    /// The first byte, in QEMU's order, at which others that hold `held` stop this access.
    #[must_use]
    pub fn first_conflict(self, held: Self) -> Option<LockByte> {
        self.tested_bytes().find(|b| held.contains(*b))
    }
}

impl FromIterator<LockByte> for Access {
    fn from_iter<I: IntoIterator<Item = LockByte>>(iter: I) -> Self {
        iter.into_iter().fold(Self::NONE, Self::with)
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.permissions, self.unshared)
    }
}

/// A text that is not of the form `cwr/wr`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is not an access: write the letters used, a slash and the letters denied, such as cwr/wr or c/-")]
pub struct AccessSyntaxError(String);

impl FromStr for Access {
    type Err = AccessSyntaxError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || AccessSyntaxError(text.to_owned());
        let set = |part: &str| -> Option<PermissionSet> {
            if part == "-" {
                return Some(PermissionSet::NONE);
            }
            let letter = |c: char| Permission::ALL.into_iter().find(|p| p.letter() == c);
            (!part.is_empty()).then(|| part.chars().map(letter).collect())?
        };
        let (uses, denies) = text.split_once('/').ok_or_else(error)?;
        Ok(Self::new(set(uses).ok_or_else(error)?, set(denies).ok_or_else(error)?))
    }
}

/// What everybody else holds on an image, as far as a test lock could tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HeldByOthers {
    /// Bytes under a lock of any kind: they fail QEMU's test.
    pub locked: Access,
    /// Bytes under a write lock, which no QEMU takes: they fail even the read lock that comes before the test.
    pub write_locked: Access,
}

impl HeldByOthers {
    /// Read locks only, as every QEMU takes them.
    #[must_use]
    pub const fn read(locked: Access) -> Self {
        Self { locked, write_locked: Access::NONE }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn every_access() -> impl Iterator<Item = Access> {
        (0..1024u32).map(|bits| LockByte::ALL.into_iter().filter(|b| bits & (1 << b.index()) != 0).collect())
    }

    #[test]
    fn every_pair_of_accesses_conflicts_exactly_where_one_uses_what_the_other_denies() {
        let all: Vec<Access> =
            every_access().map(Access::without_legacy).filter(|a| *a == a.without_legacy()).collect();
        let mut unique = all;
        unique.sort();
        unique.dedup();
        assert_eq!(unique.len(), 256);
        for a in &unique {
            for b in &unique {
                let refused = !a.permissions.intersection(b.unshared).is_empty()
                    || !a.unshared.intersection(b.permissions).is_empty();
                let conflict = a.first_conflict(*b);
                assert_eq!(conflict.is_some(), refused, "{a} against {b}");
                assert_eq!(conflict.is_some(), b.first_conflict(*a).is_some(), "conflict is mutual: {a}, {b}");
                if let Some(byte) = conflict {
                    assert!(b.contains(byte));
                    // Nothing that QEMU tests before it is held.
                    assert!(a.tested_bytes().take_while(|t| *t != byte).all(|t| !b.contains(t)));
                }
            }
        }
    }

    #[test]
    fn unshare_bytes_are_tested_before_permission_bytes() {
        let access: Access = "cwr/wr".parse().unwrap();
        let order: Vec<u64> = access.tested_bytes().map(LockByte::offset).collect();
        assert_eq!(order, [200, 201, 203, 101, 103]);
        let order: Vec<u64> = access.bytes().map(LockByte::offset).collect();
        assert_eq!(order, [100, 101, 103, 201, 203]);
    }

    #[test]
    fn graph_mod_is_never_tested() {
        let legacy: Access = "g/g".parse().unwrap();
        assert_eq!(legacy.tested_bytes().count(), 0);
        assert_eq!(legacy.first_conflict(legacy), None);
        assert_eq!("cg/wg".parse::<Access>().unwrap().without_legacy(), "c/w".parse().unwrap());
    }

    #[test]
    fn every_access_is_read_back_from_its_notation() {
        for access in every_access() {
            assert_eq!(access.to_string().parse::<Access>().unwrap(), access);
        }
        for bad in ["", "c", "/", "c/", "/w", "x/-", "c/w/r", "C/-", "c /w"] {
            assert!(bad.parse::<Access>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn only_letting_go_is_a_relaxation() {
        let full: Access = "cwr/wr".parse().unwrap();
        assert!(full.is_relaxed_by("c/wr".parse().unwrap()));
        assert!(full.is_relaxed_by(full));
        assert!(!full.is_relaxed_by("c/cwr".parse().unwrap()));
        assert!(!Access::NONE.is_relaxed_by("c/-".parse().unwrap()));
    }
}
