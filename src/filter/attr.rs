//! Attributes of files, symbolic links' targets, and figures of the file system.

use std::ffi::OsString;
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, readlinkat};
use nix::sys::stat::{FchmodatFlags, FileStat, Mode, SFlag, fchmodat, fstat};
use nix::sys::statvfs::{Statvfs, fstatvfs};
use nix::unistd::{Gid, Uid, fchownat, ftruncate};

use super::change::{Way, resize};
use super::handle::OpenFile;
use super::node::Node;
use super::ops::{Filter, OpResult};
use super::sys;
use crate::base::limits::DISK_BYTES_MAX;

/// A time to set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetTime {
    /// The present.
    Now,
    /// Seconds and nanoseconds since 1970, the latter 0 to 999,999,999.
    At(i64, i64),
}

/// Attributes to set; the rest stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SetAttr {
    /// Permission bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Size in bytes.
    pub size: Option<u64>,
    /// Access time.
    pub atime: Option<SetTime>,
    /// Modification time.
    pub mtime: Option<SetTime>,
    /// Clears set-user-id and set-group-id, as a write by anyone but root does.
    pub drop_privileges: bool,
}

impl Filter {
    /// Attributes of a node; of the open file, if there is one.
    pub fn getattr(&self, id: u64, handle: Option<u64>) -> OpResult<FileStat> {
        if let Some(open) = handle.and_then(|h| self.files.get(h).ok())
            && open.node.id == id
        {
            return fstat(&open.file);
        }
        let node = self.node(id)?;
        fstat(self.path_fd(&node)?)
    }

    /// Sets attributes; owner before mode (a change of the owner clears set-user-id), size before
    /// times (a change of the size sets them).
    pub fn setattr(&self, id: u64, handle: Option<u64>, set: &SetAttr) -> OpResult<FileStat> {
        let open = handle.and_then(|h| self.files.get(h).ok()).filter(|open| open.node.id == id);
        let node = match &open {
            Some(open) => open.node.clone(),
            None => self.node(id)?,
        };
        if let Some(size) = set.size {
            self.truncate(&node, open.as_deref(), size)?;
        }
        let fd = self.path_fd(&node)?;
        if set.uid.is_some() || set.gid.is_some() {
            let (uid, gid) = (set.uid.map(Uid::from_raw), set.gid.map(Gid::from_raw));
            fchownat(&fd, "", uid, gid, AtFlags::AT_EMPTY_PATH)?;
        }
        if let Some(mode) = set.mode {
            change_mode(&fd, mode)?;
        } else if set.drop_privileges {
            clear_privileges(&fd)?;
        }
        if set.atime.is_some() || set.mtime.is_some() {
            sys::set_times(&fd, [timespec(set.atime), timespec(set.mtime)])?;
        }
        fstat(&fd)
    }

    /// Clears set-user-id and set-group-id of an open file that is about to be written by anyone
    /// but root. (Below it is root who writes, so the lower file system does not.)
    pub fn drop_privileges(&self, handle: u64) {
        let cleared = self.files.get(handle).and_then(|open| clear_privileges(&open.file));
        if let Err(e) = cleared {
            log::warn!("set-user-id of a file that is written could not be cleared: {e}");
        }
    }

    /// Changes the size of a file, tracked (T10).
    pub(super) fn truncate(&self, node: &Node, open: Option<&OpenFile>, to: u64) -> OpResult<()> {
        match node.kind {
            SFlag::S_IFREG => (),
            SFlag::S_IFDIR => return Err(Errno::EISDIR),
            _ => return Err(Errno::EINVAL),
        }
        let length = i64::try_from(to).map_err(|_| Errno::EFBIG)?;
        let reopened;
        let file = match open {
            Some(open) if ftruncate_works(open) => &open.file,
            _ => {
                reopened = node.open(&self.lower, OFlag::O_WRONLY)?;
                &reopened
            }
        };
        match self.enter(node) {
            Way::Untracked(_counted) => ftruncate(file, length),
            Way::Tracked(disk, _counted) => {
                if to > DISK_BYTES_MAX {
                    return Err(Errno::EFBIG);
                }
                let size = || fstat(file).map(|s| u64::try_from(s.st_size).unwrap_or(0));
                let lower = || ftruncate(file, length);
                resize(&node.gate, &*disk, &self.pressure, to, size, lower)
            }
        }
    }

    /// The target of a symbolic link.
    pub fn readlink(&self, id: u64) -> OpResult<OsString> {
        let node = self.node(id)?;
        readlinkat(self.path_fd(&node)?, "")
    }

    /// Figures of the lower file system.
    pub fn statfs(&self) -> OpResult<Statvfs> {
        fstatvfs(self.lower.root())
    }
}

/// Whether the descriptor is open for writing.
fn ftruncate_works(open: &OpenFile) -> bool {
    nix::fcntl::fcntl(&open.file, nix::fcntl::FcntlArg::F_GETFL)
        .is_ok_and(|flags| flags & libc::O_ACCMODE != libc::O_RDONLY)
}

/// Set-group-id without the right to execute has another meaning (mandatory locks) and stays.
fn clear_privileges(file: impl AsFd) -> OpResult<()> {
    let stat = fstat(&file)?;
    let mut mode = stat.st_mode & 0o7777 & !libc::S_ISUID;
    if mode & libc::S_IXGRP != 0 {
        mode &= !libc::S_ISGID;
    }
    if mode == stat.st_mode & 0o7777 || super::lower::kind_of(&stat) != SFlag::S_IFREG {
        return Ok(());
    }
    change_mode(&file, mode)
}

/// chmod of what is behind an O_PATH descriptor.
pub(super) fn change_mode(file: impl AsFd, mode: u32) -> OpResult<()> {
    let mode = Mode::from_bits_truncate(mode);
    fchmodat(AT_FDCWD, sys::proc_path(&file).as_c_str(), mode, FchmodatFlags::FollowSymlink)
}

fn timespec(time: Option<SetTime>) -> libc::timespec {
    match time {
        None => libc::timespec { tv_sec: 0, tv_nsec: libc::UTIME_OMIT },
        Some(SetTime::Now) => libc::timespec { tv_sec: 0, tv_nsec: libc::UTIME_NOW },
        Some(SetTime::At(seconds, nanoseconds)) => libc::timespec { tv_sec: seconds, tv_nsec: nanoseconds },
    }
}
