//! Backing names of restored overlays: they must find their backing files where they are now.
//!
//! A relative name is kept: the folders of a point keep their shape. An absolute name that ended
//! in the path of a disk of this VM becomes the relative path from the overlay to that disk, so
//! that the restored folder can be moved; the header is changed in the restored file only, never
//! in the vault. What cannot be settled is reported with the reason, and the restore goes on: the
//! bytes are right, and a person can rebase.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};

use serde::Serialize;

use super::reading::read_disk;
use super::tree::inside;
use crate::base::error::Context;
use crate::base::{Error, Result};
use crate::core::ports::points::PointReader;
use crate::format::qcow2::{HEADER_BYTES_MAX, HEADER_BYTES_MIN, Qcow2Header};

/// What became of the name of a backing file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "is")]
pub enum Backing {
    /// It is as it was, and the file is where it says.
    Kept {
        /// The name in the header.
        name: String,
    },
    /// It was an absolute path; now it names the restored disk.
    Rewritten {
        /// The name before.
        from: String,
        /// The name now.
        to: String,
    },
    /// The overlay does not find its backing file.
    Missing {
        /// The name in the header.
        name: String,
        /// Why, and what to do.
        why: String,
    },
}

/// A backing name as it counts here.
enum Place {
    Absolute(PathBuf),
    Relative(PathBuf),
    Other,
}

/// Settles the backing name of disk number `disk`, restored into the (still unnamed) `file` of a
/// folder `to`. `None`: it has none.
pub(super) fn settle_backing(
    reader: &dyn PointReader,
    disk: usize,
    to: &Path,
    file: &File,
) -> Result<Option<Backing>> {
    let Some(this) = reader.disks().get(disk) else { return Ok(None) };
    let missing = |name: &str, why: String| Ok(Some(Backing::Missing { name: name.to_owned(), why }));
    let first = read_disk(reader, disk, 0, HEADER_BYTES_MIN)?;
    if !Qcow2Header::is_qcow(&first) {
        return match &this.backing {
            Some(name) => missing(name, "the image is no qcow2, its header is not changed".to_owned()),
            None => Ok(None),
        };
    }
    let (bytes, header) = match decode(reader, disk, &first) {
        Ok(decoded) => decoded,
        Err(e) => return missing(this.backing.as_deref().unwrap_or("?"), e.to_string()),
    };
    let Some(name) = header.backing.clone() else { return Ok(None) };
    let target = match place_of(&name) {
        Place::Relative(path) => return Ok(Some(settle_relative(reader, &this.path, to, name, &path))),
        Place::Absolute(path) => path,
        Place::Other => {
            return missing(&name, "it is no path of a file; set it with: qemu-img rebase -u".to_owned());
        }
    };
    let Some(base) = longest_tail(reader, &target).filter(|base| *base != this.path) else {
        return match target.exists() {
            true => Ok(Some(Backing::Kept { name })),
            false => missing(&name, "it is not part of this point, and no such file is here".to_owned()),
        };
    };
    if to.join(&base) == target {
        return Ok(Some(Backing::Kept { name }));
    }
    if this.backing.is_none() {
        // Perhaps a raw disk into which its guest wrote a header: its bytes are not ours to change.
        return missing(&name, "the VM was not known to use it, so the header was not changed".to_owned());
    }
    let new = relative_name(&this.path, &base);
    let patches = new.as_deref().and_then(|new| header.rewrite_backing(&bytes, new));
    let (Some(new), Some(patches)) = (new, patches) else {
        let why = format!("the path to {} does not fit into the header", base.display());
        return missing(
            &name,
            format!("{why}; set a shorter one with: qemu-img rebase -u -F FORMAT -b FILE"),
        );
    };
    for patch in patches {
        file.write_all_at(&patch.bytes, patch.offset).context(|| "cannot write the restored disk")?;
    }
    Ok(Some(Backing::Rewritten { from: name, to: new }))
}

fn decode(reader: &dyn PointReader, disk: usize, first: &[u8]) -> Result<(Vec<u8>, Qcow2Header), Error> {
    let length = Qcow2Header::bytes_needed(first)?.min(HEADER_BYTES_MAX);
    let bytes = read_disk(reader, disk, 0, length)?;
    let header = Qcow2Header::decode(&bytes)?;
    Ok((bytes, header))
}

/// As QEMU reads it: `file:` is no more than a path, another colon before the first slash is a
/// protocol.
fn place_of(name: &str) -> Place {
    let path = name.strip_prefix("file:").unwrap_or(name);
    let head = path.split('/').next().unwrap_or_default();
    match (path.is_empty() || head.contains(':'), Path::new(path).is_absolute()) {
        (true, _) => Place::Other,
        (_, true) => Place::Absolute(PathBuf::from(path)),
        (_, false) => Place::Relative(PathBuf::from(path)),
    }
}

fn settle_relative(
    reader: &dyn PointReader,
    overlay: &Path,
    to: &Path,
    name: String,
    path: &Path,
) -> Backing {
    let from_folder = overlay.parent().unwrap_or_else(|| Path::new("")).join(path);
    let is_disk = flatten(&from_folder).is_some_and(|flat| reader.disks().iter().any(|d| d.path == flat));
    if is_disk || to.join(&from_folder).exists() {
        return Backing::Kept { name };
    }
    let why = format!("there is no {}", to.join(&from_folder).display());
    Backing::Missing { name, why }
}

/// The disk whose path is the longest tail of an absolute path: the root of the mount that the
/// VM lived below is not known here.
fn longest_tail(reader: &dyn PointReader, target: &Path) -> Option<PathBuf> {
    let tails = reader.disks().iter().filter(|d| target.ends_with(&d.path));
    tails.max_by_key(|d| d.path.components().count()).map(|d| d.path.clone())
}

/// A path below a folder without `.` and `..`; `None` if it leaves the folder.
fn flatten(path: &Path) -> Option<PathBuf> {
    let mut flat = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => flat.push(name),
            Component::CurDir => {}
            Component::ParentDir if flat.pop() => {}
            _ => return None,
        }
    }
    Some(flat)
}

/// The name by which `overlay` finds `base`, both relative to one folder; `None`: no UTF-8.
fn relative_name(overlay: &Path, base: &Path) -> Option<String> {
    let from = overlay.parent().and_then(inside).unwrap_or_default();
    let to = inside(base).unwrap_or_default();
    let common = from.iter().zip(&to).take_while(|(a, b)| a == b).count();
    let up = std::iter::repeat_n(std::ffi::OsStr::new(".."), from.len().saturating_sub(common));
    let path: PathBuf = up.chain(to.iter().skip(common).copied()).collect();
    let text = path.to_str()?;
    // A colon before the first slash would make it a protocol.
    match text.split('/').next().is_some_and(|head| head.contains(':')) {
        true => Some(format!("./{text}")),
        false => Some(text.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_from_one_folder_to_another() {
        let name = |overlay: &str, base: &str| relative_name(Path::new(overlay), Path::new(base)).unwrap();
        assert_eq!(name("top", "base"), "base");
        assert_eq!(name("a/b/top", "a/base"), "../base");
        assert_eq!(name("a/top", "b/base"), "../b/base");
        assert_eq!(name("top", "a:b"), "./a:b");
        assert_eq!(name("top", "a/b"), "a/b");
    }

    #[test]
    fn paths_that_leave_their_folder_are_none() {
        assert_eq!(flatten(Path::new("a/../b")), Some("b".into()));
        assert_eq!(flatten(Path::new("a/../../b")), None);
        assert_eq!(flatten(Path::new("/b")), None);
    }
}
