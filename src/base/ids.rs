//! Stable names: of VMs, disks, epochs, points, files and boots.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::digest::Digest;
use super::error::{Error, ErrorKind, Result};

macro_rules! id128 {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u128);

        impl $name {
            /// A new random id (128 bits of the kernel's random source).
            pub fn random() -> Self {
                Self(rand::random())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let h = format!("{:032x}", self.0);
                write!(f, "{}-{}-{}-{}-{}", &h[..8], &h[8..12], &h[12..16], &h[16..20], &h[20..])
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }

        impl FromStr for $name {
            type Err = Error;

            fn from_str(s: &str) -> Result<Self> {
                let hex: String = s.chars().filter(|c| *c != '-').collect();
                let is_hex = hex.len() == 32 && hex.bytes().all(|b| b.is_ascii_hexdigit());
                match u128::from_str_radix(&hex, 16) {
                    Ok(n) if is_hex => Ok(Self(n)),
                    _ => Err(Error::new(ErrorKind::Usage, format!("{s:?} is no UUID"))),
                }
            }
        }

        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, s: S) -> std::result::Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
                String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

id128! {
    /// Stable id of a disk: kept over renames, new when another file takes its path.
    DiskId
}
id128! {
    /// UUID of a VM (libvirt's where there is one). The name is only a label.
    VmId
}
id128! {
    /// The kernel's boot id: tells a killed daemon from a lost power supply.
    BootId
}

/// Number of an epoch of one VM, counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct EpochNumber(pub u64);

impl EpochNumber {
    /// The epoch after this one.
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for EpochNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Name of a recovery point: `EPOCH-DIGEST8`, as `7-18349d3b`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PointId {
    /// The epoch whose cut the point shows.
    pub epoch: EpochNumber,
    /// First four bytes of the digest of the epoch's manifest.
    pub tag: u32,
}

impl PointId {
    /// The point that the manifest with this digest makes.
    pub fn new(epoch: EpochNumber, manifest: &Digest) -> Self {
        let b = manifest.as_bytes();
        Self { epoch, tag: u32::from_be_bytes([b[0], b[1], b[2], b[3]]) }
    }
}

impl fmt::Display for PointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{:08x}", self.epoch, self.tag)
    }
}

impl fmt::Debug for PointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PointId({self})")
    }
}

impl FromStr for PointId {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let parsed = s.split_once('-').and_then(|(epoch, tag)| {
            let tag = (tag.len() == 8).then(|| u32::from_str_radix(tag, 16).ok())??;
            Some(Self { epoch: EpochNumber(epoch.parse().ok()?), tag })
        });
        parsed.ok_or_else(|| Error::new(ErrorKind::Usage, format!("{s:?} is no point id")))
    }
}

impl Serialize for PointId {
    fn serialize<S: serde::Serializer>(&self, s: S) -> std::result::Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PointId {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Identity of a lower file while it is open: device and inode number.
///
/// The filter pins the inode by an open descriptor for as long as it uses the key, so that
/// a reused inode number cannot be taken for the old file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct FileKey {
    /// `st_dev`.
    pub device: u64,
    /// `st_ino`.
    pub inode: u64,
}

/// Name of a VM: 1 to 200 bytes, no separator, no control character, not `.` or `..`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct VmName(String);

impl VmName {
    /// Longest name in bytes.
    pub const BYTES_MAX: usize = 200;

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for VmName {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let bad = s.is_empty()
            || s.len() > Self::BYTES_MAX
            || s == "."
            || s == ".."
            || s.starts_with('-')
            || s.chars().any(|c| c == '/' || c.is_control());
        if bad {
            return Err(Error::new(ErrorKind::Usage, format!("{s:?} cannot be the name of a VM"))
                .why("a name has 1 to 200 bytes, no '/', no control character, does not begin with '-' and is not '.' or '..'")
                .hint("choose another name, as in: afterimage protect web1 --disk FILE"));
        }
        Ok(Self(s.to_owned()))
    }
}

impl<'de> Deserialize<'de> for VmName {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

impl fmt::Display for VmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for VmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_round_trip_as_text() {
        let id = DiskId::random();
        assert_eq!(id.to_string().parse::<DiskId>().unwrap(), id);
        let point: PointId = "7-18349d3b".parse().unwrap();
        assert_eq!(point.to_string(), "7-18349d3b");
        for bad in ["7", "7-", "x-18349d3b", "7-1834", "latest"] {
            assert!(bad.parse::<PointId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn names_that_could_leave_their_folder_are_refused() {
        for bad in ["", ".", "..", "a/b", "-x", "a\nb"] {
            assert!(bad.parse::<VmName>().is_err(), "{bad:?}");
        }
        assert!("web 1.test".parse::<VmName>().is_ok());
    }
}
