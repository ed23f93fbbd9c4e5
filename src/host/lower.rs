//! Lower files: the real files beneath a mount, reached from its root without the mount.
//!
//! Every path is resolved by the kernel beneath the root, without symbolic links and without
//! leaving the file system, so that neither a guest's image header nor a link in the folder can
//! lead anywhere else. Looking leaves nothing behind; what becomes a disk is opened again by the
//! filter, which pins it.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};

use crate::base::error::Context;
use crate::base::{Error, ErrorKind, FileKey, Result};

/// A lower file that was looked at.
#[derive(Debug)]
pub struct Looked {
    /// The file, open for reading.
    pub file: File,
    /// Its folder.
    pub folder: File,
    /// Which file it is.
    pub key: FileKey,
    /// Its size in bytes.
    pub size: u64,
    /// Bytes that it takes on the file system.
    pub allocated: u64,
}

fn open_beneath(root: BorrowedFd<'_>, path: &Path, flags: OFlag) -> Result<File, Errno> {
    let flags = flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    let resolve =
        ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_XDEV;
    openat2(root, path, OpenHow::new().flags(flags).resolve(resolve)).map(File::from)
}

/// Looks at the regular file at `path` beneath `root`. `shown`: its path for messages.
pub fn look(root: &impl AsFd, path: &Path, shown: &Path) -> Result<Looked> {
    let what = || format!("cannot use disk {}", shown.display());
    let is_plain = path.components().all(|c| matches!(c, Component::Normal(_)));
    let (Some(name), true) = (path.file_name(), is_plain) else {
        return Err(Error::new(ErrorKind::Refused, what()).why("it is no file below the mount"));
    };
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let folder = open_beneath(root.as_fd(), parent, OFlag::O_RDONLY | OFlag::O_DIRECTORY)
        .map_err(|e| Error::io(what(), e.into()))?;
    // Looked at before it is opened: opening a pipe or a device may have effects.
    let open = |flags| {
        open_beneath(folder.as_fd(), Path::new(OsStr::new(name)), flags)
            .map_err(|e| Error::io(what(), e.into()))
    };
    if !open(OFlag::O_PATH)?.metadata().context(what)?.is_file() {
        return Err(Error::new(ErrorKind::Refused, what())
            .why("it is no regular file")
            .hint("name the image file itself, not a folder or device"));
    }
    let file = open(OFlag::O_RDONLY | OFlag::O_NONBLOCK)?;
    let meta = file.metadata().context(what)?;
    Ok(Looked {
        key: FileKey { device: meta.dev(), inode: meta.ino() },
        size: meta.len(),
        allocated: meta.blocks() * 512,
        file,
        folder,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn nothing_outside_the_root_can_be_reached() {
        let dir = tempfile::tempdir().unwrap();
        let inside = dir.path().join("in");
        std::fs::create_dir_all(inside.join("sub")).unwrap();
        std::fs::write(dir.path().join("secret"), b"x").unwrap();
        std::fs::write(inside.join("sub/a.raw"), b"abc").unwrap();
        symlink("../secret", inside.join("link")).unwrap();
        symlink("..", inside.join("up")).unwrap();
        let root = File::open(&inside).unwrap();
        let open = |p: &str| look(&root, Path::new(p), Path::new(p));
        assert_eq!(open("sub/a.raw").unwrap().size, 3);
        for bad in ["../secret", "link", "up/secret", "/etc/passwd", "sub", "", "sub/../../secret"] {
            assert!(open(bad).is_err(), "{bad}");
        }
        assert_eq!(open("none").unwrap_err().kind(), ErrorKind::NotFound);
    }
}
