//! The lower directory: what the filter stands on.
//!
//! It is a detached private clone of the mount that holds the directory, made before we mount
//! over it. So it never leads back into our own mount, and nothing that is mounted below the
//! directory, before or after, is in it: sub-mounts are not crossed.
//!
//! Killed here: the clone goes with its descriptor. Disk full: nothing is written.

use std::ffi::{CString, OsString};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat};

use super::sys;
use crate::base::error::Context;
use crate::base::{Error, ErrorKind, FileKey, Result};

/// A file of the lower directory, opened without going through the mount.
#[derive(Debug)]
pub struct LowerFile {
    /// The file, open for reading and writing.
    pub file: File,
    /// The folder that holds it, for the files that belong beside it.
    pub folder: File,
    /// Its identity. Valid until [`super::Filter::detach`] with it.
    pub key: FileKey,
    /// Its name in that folder.
    pub file_name: OsString,
}

/// The root of the lower directory.
#[derive(Debug)]
pub(super) struct Lower {
    root: File,
    /// The file system makes file handles, so that nodes need no descriptor each.
    pub(super) has_handles: bool,
    /// Keeps the detached mount alive; last, so that it goes last.
    _tree: OwnedFd,
}

pub(super) fn key_of(stat: &FileStat) -> FileKey {
    FileKey { device: stat.st_dev, inode: stat.st_ino }
}

pub(super) fn kind_of(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits())
}

impl Lower {
    /// Opens the directory.
    pub(super) fn open(directory: &Path) -> Result<Self> {
        let what = || format!("the directory {} cannot be opened", directory.display());
        let path = CString::new(directory.as_os_str().as_bytes())
            .map_err(|e| Error::new(ErrorKind::Usage, what()).source(e))?;
        let tree = sys::clone_mount(&path).context(what)?;
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let root = File::from(openat(&tree, ".", flags, Mode::empty()).context(what)?);
        let has_handles =
            sys::RawHandle::of(&root).and_then(|handle| handle.open(&root, libc::O_PATH)).is_ok();
        Ok(Self { root, has_handles, _tree: tree })
    }

    pub(super) fn root(&self) -> &File {
        &self.root
    }

    /// Opens a regular file by its path relative to the root, for reading and writing.
    pub(super) fn resolve(&self, relative: &Path) -> Result<LowerFile> {
        let what = || format!("the file {} cannot be opened", relative.display());
        let is_plain = relative.components().all(|c| matches!(c, Component::Normal(_)));
        let (Some(file_name), true) = (relative.file_name(), is_plain) else {
            return Err(Error::new(ErrorKind::Usage, what())
                .why("the path must be relative to the root of the mount, without '..'"));
        };
        let parent = match relative.parent() {
            Some(p) if !p.as_os_str().is_empty() => p,
            _ => Path::new("."),
        };
        let how = OpenHow::new()
            .flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_BENEATH);
        let folder = File::from(openat2(&self.root, parent, how).context(what)?);
        // Looked at before it is opened: opening a pipe or a device has effects.
        let probe = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let probe = openat(&folder, file_name, probe, Mode::empty()).context(what)?;
        let stat = fstat(&probe).context(what)?;
        if kind_of(&stat) != SFlag::S_IFREG {
            return Err(Error::new(ErrorKind::Refused, what())
                .why("it is not a regular file")
                .hint("name the image file itself, not a folder, link or device"));
        }
        let file = reopen(&probe, OFlag::O_RDWR).context(what)?;
        Ok(LowerFile { file, folder, key: key_of(&stat), file_name: file_name.to_owned() })
    }
}

/// Opens what is behind an O_PATH descriptor.
pub(super) fn reopen(file: impl AsFd, flags: OFlag) -> std::result::Result<File, Errno> {
    let path = sys::proc_path(&file);
    nix::fcntl::open(path.as_c_str(), flags | OFlag::O_CLOEXEC, Mode::empty()).map(File::from)
}

/// A descriptor, owned or not.
pub(super) enum PathFd<'a> {
    Own(OwnedFd),
    Shared(std::sync::Arc<OwnedFd>),
    Borrowed(BorrowedFd<'a>),
}

impl AsFd for PathFd<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Own(fd) => fd.as_fd(),
            Self::Shared(fd) => fd.as_fd(),
            Self::Borrowed(fd) => fd.as_fd(),
        }
    }
}
