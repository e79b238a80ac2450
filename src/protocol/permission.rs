//! Which permission does a byte of an image stand for?
//!
//! QEMU maps permission bit `i` to byte `100 + i` ("I use this") and byte `200 + i` ("others must not")
//! (`RAW_LOCK_PERM_BASE` and `RAW_LOCK_SHARED_BASE` in `block/file-posix.c`). Asks nobody.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A block layer permission, in the order of its bit (`BLK_PERM_*` in QEMU's `include/block/block-common.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Permission {
    /// Reads what was written: bytes 100 and 200.
    ConsistentRead,
    /// Changes the visible content: bytes 101 and 201.
    Write,
    /// Writes without changing what is visible, as a stream job does: bytes 102 and 202.
    WriteUnchanged,
    /// Changes the length: bytes 103 and 203.
    Resize,
    /// Changed the block graph. QEMU 6.2 and older only (`BLK_PERM_GRAPH_MOD`, bytes 104 and 204): shown when somebody
    /// holds it, never taken, tested or counted, because no QEMU since 7.0 looks at it.
    GraphMod,
}

impl Permission {
    /// All five, in the order of their bytes.
    pub const ALL: [Self; 5] = [Self::ConsistentRead, Self::Write, Self::WriteUnchanged, Self::Resize, Self::GraphMod];

    /// The four that QEMU 7.0 and newer lock and test (`BLK_PERM_ALL` is 0x0f).
    pub const CURRENT: [Self; 4] = [Self::ConsistentRead, Self::Write, Self::WriteUnchanged, Self::Resize];

    /// The bit number, which is also the distance of the byte from 100 or 200.
    #[must_use]
    pub const fn index(self) -> u8 {
        self as u8
    }

    /// The name that QAPI, scripts and this program's options use, such as `consistent-read`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::ConsistentRead => "consistent-read",
            Self::Write => "write",
            Self::WriteUnchanged => "write-unchanged",
            Self::Resize => "resize",
            Self::GraphMod => "graph-mod",
        }
    }

    /// The name in QEMU's own messages, with spaces (`bdrv_perm_names` in `block.c`).
    #[must_use]
    pub const fn qemu_name(self) -> &'static str {
        match self {
            Self::ConsistentRead => "consistent read",
            Self::Write => "write",
            Self::WriteUnchanged => "write unchanged",
            Self::Resize => "resize",
            Self::GraphMod => "graph-mod",
        }
    }

    /// The letter in short notation such as `cwr/wr` and in column headings.
    #[must_use]
    pub const fn letter(self) -> char {
        match self {
            Self::ConsistentRead => 'c',
            Self::Write => 'w',
            Self::WriteUnchanged => 'u',
            Self::Resize => 'r',
            Self::GraphMod => 'g',
        }
    }

    /// The permission of a [`name`](Self::name) or of a [`qemu_name`](Self::qemu_name).
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|p| p.name() == name || p.qemu_name() == name)
    }
}

impl fmt::Display for Permission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A set of permissions.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PermissionSet(u8);

impl PermissionSet {
    /// No permission.
    pub const NONE: Self = Self(0);
    /// The four that QEMU 7.0 and newer know.
    pub const CURRENT: Self = Self(0x0f);

    /// The set with `permission` added.
    #[must_use]
    pub const fn with(self, permission: Permission) -> Self {
        Self(self.0 | 1 << permission.index())
    }

    /// Whether `permission` is a member.
    #[must_use]
    pub const fn contains(self, permission: Permission) -> bool {
        self.0 & (1 << permission.index()) != 0
    }

    /// Whether there is no member.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The number of members.
    #[must_use]
    pub const fn len(self) -> u32 {
        self.0.count_ones()
    }

    /// Members of either.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Members of both.
    #[must_use]
    pub const fn intersection(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Members of `self` that are not in `other`.
    #[must_use]
    pub const fn difference(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Whether each member of `self` is one of `other`.
    #[must_use]
    pub const fn is_subset(self, other: Self) -> bool {
        self.0 & !other.0 == 0
    }

    /// The members in the order of their bytes.
    pub fn iter(self) -> impl Iterator<Item = Permission> {
        Permission::ALL.into_iter().filter(move |p| self.contains(*p))
    }
}

impl FromIterator<Permission> for PermissionSet {
    fn from_iter<I: IntoIterator<Item = Permission>>(iter: I) -> Self {
        iter.into_iter().fold(Self::NONE, Self::with)
    }
}

/// Short notation: the letters, or `-` for none.
impl fmt::Display for PermissionSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("-");
        }
        self.iter().try_for_each(|p| write!(f, "{}", p.letter()))
    }
}

impl fmt::Debug for PermissionSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for PermissionSet {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.iter())
    }
}

impl<'de> Deserialize<'de> for PermissionSet {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Vec::<Permission>::deserialize(deserializer)?.into_iter().collect())
    }
}

/// Which of its two bytes a permission is looked at through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// Bytes 100 to 104: "I use this permission".
    Permission,
    /// Bytes 200 to 204: "others must not use it".
    Unshare,
}

/// One of the ten bytes of an image that QEMU's locks stand on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LockByte {
    /// What holding the byte says.
    pub side: Side,
    /// About which permission.
    pub permission: Permission,
}

impl LockByte {
    /// All ten, in the order of their offsets.
    pub const ALL: [Self; 10] = {
        let mut all = [Self::permission(Permission::ConsistentRead); 10];
        let mut i = 0;
        while i < 5 {
            all[i] = Self::permission(Permission::ALL[i]);
            all[i + 5] = Self::unshare(Permission::ALL[i]);
            i += 1;
        }
        all
    };

    /// The byte that says "I use `permission`".
    #[must_use]
    pub const fn permission(permission: Permission) -> Self {
        Self { side: Side::Permission, permission }
    }

    /// The byte that says "others must not use `permission`".
    #[must_use]
    pub const fn unshare(permission: Permission) -> Self {
        Self { side: Side::Unshare, permission }
    }

    /// Offset in the image file, in bytes from its start.
    #[must_use]
    pub const fn offset(self) -> u64 {
        let base = match self.side {
            Side::Permission => 100,
            Side::Unshare => 200,
        };
        base + self.permission.index() as u64
    }

    /// The byte at `offset`, if it is one of the ten.
    #[must_use]
    pub fn at(offset: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|b| b.offset() == offset)
    }

    /// Place in [`LockByte::ALL`].
    #[must_use]
    pub const fn index(self) -> usize {
        let base = match self.side {
            Side::Permission => 0,
            Side::Unshare => 5,
        };
        base + self.permission.index() as usize
    }
}

/// "uses write" or "denies write": what its holder says by holding it.
impl fmt::Display for LockByte {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = match self.side {
            Side::Permission => "uses",
            Side::Unshare => "denies",
        };
        write!(f, "{verb} {}", self.permission.qemu_name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ten_bytes_lie_at_100_to_104_and_200_to_204() {
        let offsets: Vec<u64> = LockByte::ALL.iter().map(|b| b.offset()).collect();
        assert_eq!(offsets, [100, 101, 102, 103, 104, 200, 201, 202, 203, 204]);
        for (i, byte) in LockByte::ALL.into_iter().enumerate() {
            assert_eq!(LockByte::at(byte.offset()), Some(byte));
            assert_eq!(byte.index(), i);
        }
        for other in [0, 1, 99, 105, 150, 199, 205, u64::MAX] {
            assert_eq!(LockByte::at(other), None);
        }
    }

    #[test]
    fn names_are_read_back_in_both_spellings() {
        for p in Permission::ALL {
            assert_eq!(Permission::from_name(p.name()), Some(p));
            assert_eq!(Permission::from_name(p.qemu_name()), Some(p));
        }
        assert_eq!(Permission::from_name("read"), None);
    }

    #[test]
    fn a_set_serialises_as_the_list_of_its_names() {
        let set: PermissionSet = [Permission::Resize, Permission::ConsistentRead].into_iter().collect();
        let json = serde_json::to_string(&set).unwrap();
        assert_eq!(json, r#"["consistent-read","resize"]"#);
        assert_eq!(serde_json::from_str::<PermissionSet>(&json).unwrap(), set);
        assert_eq!(set.to_string(), "cr");
        assert_eq!(PermissionSet::NONE.to_string(), "-");
    }
}
