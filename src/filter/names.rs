//! Names: lookup, creation, removal, renaming, links.
//!
//! The watcher is told after the lower operation and before the reply. The kernel serializes
//! changes of one folder, so events of one folder come in the order of the changes.
//!
//! Names of files of ours do not exist for the caller (ENOENT); making a file by such a name
//! fails with EBUSY, since the name is taken by something that cannot be seen.

use std::cell::Cell;
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, RenameFlags, openat, renameat2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat, mkdirat, mknodat, umask};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchownat, linkat, symlinkat, unlinkat};

use super::attr::change_mode;
use super::data::lower_flags;
use super::dir::DirEntry;
use super::handle::OpenFile;
use super::hidden::{is_candidate, is_hidden};
use super::lower::{PathFd, key_of, kind_of, reopen};
use super::node::Node;
use super::ops::{Caller, Filter, OpResult};
use crate::core::ports::names::NameEvent;

const PATH: OFlag = OFlag::O_PATH.union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

fn check(name: &OsStr) -> OpResult<()> {
    let bytes = name.as_bytes();
    match bytes {
        b"" | b"." | b".." => Err(Errno::EINVAL),
        _ if bytes.contains(&b'/') => Err(Errno::EINVAL),
        _ => Ok(()),
    }
}

/// The kernel has applied the caller's umask already, so ours must not apply once more. The mask
/// belongs to the process unless the thread takes its own, which it does once.
fn without_umask() -> OpResult<()> {
    thread_local! {
        static IS_DONE: Cell<bool> = const { Cell::new(false) };
    }
    if !IS_DONE.get() {
        unshare(CloneFlags::CLONE_FS)?;
        umask(Mode::empty());
        IS_DONE.set(true);
    }
    Ok(())
}

fn stat_of(folder: impl AsFd, name: &OsStr) -> OpResult<FileStat> {
    fstatat(folder, name, AtFlags::AT_SYMLINK_NOFOLLOW)
}

impl Filter {
    /// Finds a name; counts one lookup of the node.
    pub fn lookup(&self, parent: u64, name: &OsStr) -> OpResult<(u64, FileStat)> {
        let folder = self.node(parent)?;
        let fd = self.path_fd(&folder)?;
        let (node, stat) = self.lookup_in(&folder, &fd, name)?;
        Ok((node.id, stat))
    }

    /// The kernel forgets `count` lookups of a node.
    pub fn forget(&self, id: u64, count: u64) {
        self.nodes.forget(id, count);
    }

    pub(super) fn lookup_in(
        &self,
        folder: &Arc<Node>,
        fd: impl AsFd,
        name: &OsStr,
    ) -> OpResult<(Arc<Node>, FileStat)> {
        check(name)?;
        let found = openat(&fd, name, PATH, Mode::empty())?;
        let stat = fstat(&found)?;
        if is_candidate(name) && is_hidden(&fd, name) {
            return Err(Errno::ENOENT);
        }
        let node = self.nodes.enter(&self.lower, found, &stat, Some((folder, name)))?;
        Ok((node, stat))
    }

    /// The folder for a new name, which nothing of ours has.
    fn for_new<'a>(&'a self, folder: &'a Node, name: &OsStr) -> OpResult<PathFd<'a>> {
        check(name)?;
        let fd = self.path_fd(folder)?;
        if is_hidden(&fd, name) {
            return Err(Errno::EBUSY);
        }
        without_umask()?;
        Ok(fd)
    }

    /// Gives a new file to its owner. The group of a set-group-id folder stays; a change of the
    /// owner clears set-user-id, so the mode is set again.
    fn give(&self, folder: &impl AsFd, file: impl AsFd, caller: Caller, mode: u32) -> OpResult<FileStat> {
        let stat = fstat(&file)?;
        let is_inherited = fstat(folder)?.st_mode & libc::S_ISGID != 0;
        let uid = (stat.st_uid != caller.uid).then(|| Uid::from_raw(caller.uid));
        let gid = (!is_inherited && stat.st_gid != caller.gid).then(|| Gid::from_raw(caller.gid));
        if uid.is_none() && gid.is_none() {
            return Ok(stat);
        }
        fchownat(&file, "", uid, gid, AtFlags::AT_EMPTY_PATH)?;
        if kind_of(&stat) == SFlag::S_IFREG && mode & (libc::S_ISUID | libc::S_ISGID) != 0 {
            change_mode(&file, stat.st_mode & 0o7777)?;
        }
        fstat(&file)
    }

    fn enter_new(
        &self,
        folder: &Arc<Node>,
        name: &OsStr,
        file: OwnedFd,
        stat: &FileStat,
    ) -> OpResult<Arc<Node>> {
        let node = self.nodes.enter(&self.lower, file, stat, Some((folder, name)))?;
        if node.kind == SFlag::S_IFREG {
            self.tell(|| NameEvent::Created { path: folder.path_of(name), file: node.key });
        }
        Ok(node)
    }

    fn finish_new(
        &self,
        folder: &Arc<Node>,
        fd: &PathFd<'_>,
        name: &OsStr,
        caller: Caller,
        mode: u32,
    ) -> OpResult<(u64, FileStat)> {
        let file = openat(fd, name, PATH, Mode::empty())?;
        let stat = self.give(fd, &file, caller, mode)?;
        let node = self.enter_new(folder, name, file, &stat)?;
        Ok((node.id, stat))
    }

    /// Makes a file, pipe, socket or device. `mode` with the kind, the umask applied.
    pub fn mknod(
        &self,
        caller: Caller,
        parent: u64,
        name: &OsStr,
        mode: u32,
        device: u64,
    ) -> OpResult<(u64, FileStat)> {
        let folder = self.node(parent)?;
        let fd = self.for_new(&folder, name)?;
        let kind = SFlag::from_bits_truncate(mode & libc::S_IFMT);
        mknodat(&fd, name, kind, Mode::from_bits_truncate(mode & 0o7777), device)?;
        self.finish_new(&folder, &fd, name, caller, mode)
    }

    /// Makes a folder.
    pub fn mkdir(&self, caller: Caller, parent: u64, name: &OsStr, mode: u32) -> OpResult<(u64, FileStat)> {
        let folder = self.node(parent)?;
        let fd = self.for_new(&folder, name)?;
        mkdirat(&fd, name, Mode::from_bits_truncate(mode & 0o7777))?;
        self.finish_new(&folder, &fd, name, caller, mode)
    }

    /// Makes a symbolic link.
    pub fn symlink(
        &self,
        caller: Caller,
        parent: u64,
        name: &OsStr,
        target: &OsStr,
    ) -> OpResult<(u64, FileStat)> {
        let folder = self.node(parent)?;
        let fd = self.for_new(&folder, name)?;
        symlinkat(target, &fd, name)?;
        self.finish_new(&folder, &fd, name, caller, 0)
    }

    /// Makes another name of a file.
    pub fn link(&self, id: u64, parent: u64, name: &OsStr) -> OpResult<(u64, FileStat)> {
        let (node, folder) = (self.node(id)?, self.node(parent)?);
        let fd = self.for_new(&folder, name)?;
        linkat(self.path_fd(&node)?, "", &fd, name, AtFlags::AT_EMPTY_PATH)?;
        let file = openat(&fd, name, PATH, Mode::empty())?;
        let stat = fstat(&file)?;
        let node = self.enter_new(&folder, name, file, &stat)?;
        Ok((node.id, stat))
    }

    /// Makes a file, or finds it unless `flags` have O_EXCL, and opens it: node, attributes, handle
    /// (see [`Filter::open`] about `flags`).
    pub fn create(
        &self,
        caller: Caller,
        parent: u64,
        name: &OsStr,
        mode: u32,
        flags: i32,
    ) -> OpResult<(u64, FileStat, u64)> {
        let folder = self.node(parent)?;
        let fd = self.for_new(&folder, name)?;
        let new = lower_flags(flags) | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW;
        let file = match openat(&fd, name, new, Mode::from_bits_truncate(mode & 0o7777)) {
            Ok(file) => File::from(file),
            Err(Errno::EEXIST) if flags & libc::O_EXCL == 0 => {
                let (node, stat) = self.lookup_in(&folder, &fd, name)?;
                return match self.open(node.id, flags) {
                    Ok(handle) => Ok((node.id, stat, handle)),
                    Err(e) => {
                        self.forget(node.id, 1);
                        Err(e)
                    }
                };
            }
            Err(e) => return Err(e),
        };
        let stat = self.give(&fd, &file, caller, mode)?;
        let path = reopen(&file, OFlag::O_PATH)?;
        let node = self.enter_new(&folder, name, path.into(), &stat)?;
        let is_direct = flags & libc::O_DIRECT != 0;
        let open = OpenFile::new(node.clone(), file, is_direct, &self.lower);
        match open.and_then(|open| self.keep_open(open)) {
            Ok(handle) => Ok((node.id, stat, handle)),
            Err(e) => {
                self.forget(node.id, 1);
                Err(e)
            }
        }
    }

    /// Removes a name of a file.
    pub fn unlink(&self, parent: u64, name: &OsStr) -> OpResult<()> {
        check(name)?;
        let folder = self.node(parent)?;
        let fd = self.path_fd(&folder)?;
        let stat = stat_of(&fd, name)?;
        if is_hidden(&fd, name) {
            return Err(Errno::ENOENT);
        }
        unlinkat(&fd, name, UnlinkatFlags::NoRemoveDir)?;
        self.removed(&folder, name, &stat);
        Ok(())
    }

    /// Removes a folder that holds nothing, or nothing but files of ours: their disks are gone.
    pub fn rmdir(&self, parent: u64, name: &OsStr) -> OpResult<()> {
        check(name)?;
        let folder = self.node(parent)?;
        let fd = self.path_fd(&folder)?;
        let stat = stat_of(&fd, name)?;
        match unlinkat(&fd, name, UnlinkatFlags::RemoveDir) {
            Err(Errno::ENOTEMPTY | Errno::EEXIST) => {
                self.empty_of_ours(&folder, &fd, name)?;
                unlinkat(&fd, name, UnlinkatFlags::RemoveDir)?;
            }
            result => result?,
        }
        self.removed(&folder, name, &stat);
        Ok(())
    }

    fn removed(&self, folder: &Arc<Node>, name: &OsStr, stat: &FileStat) {
        let key = key_of(stat);
        if let Some(node) = self.nodes.find(key) {
            node.clear_place(folder, name);
        }
        self.tell(|| NameEvent::Removed { path: folder.path_of(name), file: key });
    }

    /// Removes files of ours from a folder that holds nothing else.
    fn empty_of_ours(&self, folder: &Arc<Node>, fd: &PathFd<'_>, name: &OsStr) -> OpResult<()> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let inner = File::from(openat(fd, name, flags, Mode::empty())?);
        let mut ours = Vec::new();
        for entry in DirEntry::all(&inner)? {
            if entry.name == "." || entry.name == ".." {
                continue;
            }
            if !is_hidden(&inner, &entry.name) {
                return Err(Errno::ENOTEMPTY);
            }
            ours.push(entry.name);
        }
        if let Some(watcher) = self.watcher()
            && !watcher.may_remove_ours(&folder.path_of(name))
        {
            return Err(Errno::ENOTEMPTY);
        }
        for name in ours {
            unlinkat(&inner, name.as_os_str(), UnlinkatFlags::NoRemoveDir)?;
        }
        Ok(())
    }

    /// Renames: flags RENAME_NOREPLACE or RENAME_EXCHANGE, no others (EINVAL).
    pub fn rename(
        &self,
        parent: u64,
        name: &OsStr,
        new_parent: u64,
        new_name: &OsStr,
        flags: u32,
    ) -> OpResult<()> {
        check(name)?;
        check(new_name)?;
        let how = RenameFlags::from_bits(flags).ok_or(Errno::EINVAL)?;
        if how.contains(RenameFlags::RENAME_WHITEOUT) {
            return Err(Errno::EINVAL);
        }
        let (from, to) = (self.node(parent)?, self.node(new_parent)?);
        let (from_fd, to_fd) = (self.path_fd(&from)?, self.path_fd(&to)?);
        let moved = stat_of(&from_fd, name)?;
        if is_hidden(&from_fd, name) {
            return Err(Errno::ENOENT);
        }
        if is_hidden(&to_fd, new_name) {
            return Err(Errno::EBUSY);
        }
        let target = stat_of(&to_fd, new_name).ok();
        match renameat2(&from_fd, name, &to_fd, new_name, how) {
            // A folder with nothing but files of ours counts as empty here too.
            Err(Errno::ENOTEMPTY | Errno::EEXIST) if how.is_empty() && target.is_some() => {
                self.empty_of_ours(&to, &to_fd, new_name)?;
                renameat2(&from_fd, name, &to_fd, new_name, how)?;
            }
            result => result?,
        }
        let is_exchange = how.contains(RenameFlags::RENAME_EXCHANGE);
        let target = target.map(|stat| key_of(&stat));
        if target == Some(key_of(&moved)) && !is_exchange {
            // Two names of one file: POSIX leaves both.
            return Ok(());
        }
        self.renamed((&from, name), (&to, new_name), key_of(&moved), target, is_exchange);
        Ok(())
    }

    fn renamed(
        &self,
        (from, name): (&Arc<Node>, &OsStr),
        (to, new_name): (&Arc<Node>, &OsStr),
        moved: crate::base::FileKey,
        target: Option<crate::base::FileKey>,
        is_exchange: bool,
    ) {
        let (a, b) = (from.path_of(name), to.path_of(new_name));
        if let Some(node) = target.and_then(|key| self.nodes.find(key)) {
            node.clear_place(to, new_name);
            if is_exchange {
                node.set_place(from, name);
            }
        }
        if let Some(node) = self.nodes.find(moved) {
            node.set_place(to, new_name);
        }
        self.tell(|| match (is_exchange, target) {
            (true, Some(b_file)) => NameEvent::Exchanged { a, b, a_file: moved, b_file },
            (_, replaced) => NameEvent::Renamed { from: a, to: b, file: moved, replaced },
        });
    }
}
