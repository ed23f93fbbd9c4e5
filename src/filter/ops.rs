//! The filter: the operations of a faithful passthrough, callable without a mount.
//!
//! Nothing here knows a FUSE reply. Operations are grouped by noun: names (`names.rs`),
//! attributes (`attr.rs`, `xattr.rs`), folders (`dir.rs`), data (`data.rs`, `ranges.rs`). Every
//! error is the errno of the lower file system, or the one that it would have given.
//!
//! Killed here: each operation is one lower call and what it announces; the lower file system
//! decides whether it happened. Disk full: the lower ENOSPC, see `change.rs`.

use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};

use nix::errno::Errno;
use nix::sys::stat::fstat;

use super::change::{Drain, Pressure, Way, make};
use super::dir::OpenFolder;
use super::handle::{OpenFile, Slab};
use super::lower::{Lower, LowerFile, PathFd};
use super::node::{Node, Nodes};
use crate::base::error::Context;
use crate::base::{Error, ErrorKind, FileKey, Result};
use crate::core::ports::names::{NameEvent, NameWatcher};
use crate::core::ports::tracking::{Change, TrackedDisk};

/// Result of an operation: an errno is the caller's answer.
pub type OpResult<T> = std::result::Result<T, Errno>;

/// Who asks for an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// User that new files belong to.
    pub uid: u32,
    /// Group that new files belong to, unless their folder says otherwise.
    pub gid: u32,
}

impl Caller {
    /// The superuser.
    pub const ROOT: Self = Self { uid: 0, gid: 0 };
}

/// The filter over one directory.
pub struct Filter {
    pub(super) lower: Lower,
    pub(super) nodes: Nodes,
    pub(super) files: Slab<OpenFile>,
    pub(super) folders: Slab<OpenFolder>,
    pub(super) pressure: Pressure,
    drain: Drain,
    watcher: RwLock<Option<Arc<dyn NameWatcher>>>,
}

impl Filter {
    /// A filter over `directory`, without a mount.
    pub fn over(directory: &Path) -> Result<Self> {
        let lower = Lower::open(directory)?;
        let stat = fstat(lower.root()).context(|| format!("{} cannot be read", directory.display()))?;
        Ok(Self {
            nodes: Nodes::new(&stat),
            lower,
            files: Slab::default(),
            folders: Slab::default(),
            pressure: Pressure::default(),
            drain: Drain::default(),
            watcher: RwLock::new(None),
        })
    }

    /// Who is told about names from now on.
    pub fn set_watcher(&self, watcher: Option<Arc<dyn NameWatcher>>) {
        *self.watcher.write().unwrap_or_else(PoisonError::into_inner) = watcher;
    }

    /// Opens a regular file by its path relative to the root, beneath the mount, and keeps its
    /// node until [`Filter::detach`]: until then its [`FileKey`] belongs to no other file.
    pub fn resolve(&self, relative: &Path) -> Result<LowerFile> {
        let what = || format!("the file {} cannot be followed", relative.display());
        let found = self.lower.resolve(relative)?;
        let fd = super::lower::reopen(&found.file, nix::fcntl::OFlag::O_PATH).context(what)?;
        let stat = fstat(&fd).context(what)?;
        let node = self.nodes.enter(&self.lower, fd.into(), &stat, None).context(what)?;
        let kept = self.nodes.keep(&node, &self.lower).context(what);
        self.nodes.forget(node.id, 1);
        kept.map(|()| found)
    }

    /// From now on every change of the file goes through `disk`. Returns when every change that
    /// began before has ended. The file must have been resolved.
    pub fn attach(&self, file: FileKey, disk: Arc<dyn TrackedDisk>) -> Result<()> {
        let what = || format!("inode {} cannot be followed", file.inode);
        let Some(node) = self.nodes.find(file) else {
            return Err(Error::new(ErrorKind::NotFound, what()).why("it was not resolved"));
        };
        self.nodes.keep(&node, &self.lower).context(what)?;
        if node.gate.publish(disk, &self.drain) {
            Ok(())
        } else {
            Err(Error::new(ErrorKind::Exists, what()).why("it is followed already"))
        }
    }

    /// The file is followed no more, and its key may become another's. Returns its disk when every
    /// change that began there has ended there.
    pub fn detach(&self, file: FileKey) -> Option<Arc<dyn TrackedDisk>> {
        let node = self.nodes.find(file)?;
        let disk = node.gate.retract(&self.drain);
        self.nodes.unkeep(&node);
        disk
    }

    /// Every file that is followed.
    pub fn attached(&self) -> Vec<FileKey> {
        self.nodes.kept().iter().filter(|n| n.gate.disk().is_some()).map(|n| n.key).collect()
    }

    /// A path of the file relative to the root, if one is known.
    pub fn path_of(&self, file: FileKey) -> Option<std::path::PathBuf> {
        self.nodes.find(file)?.relative_path()
    }

    /// The node behind an open file.
    pub fn node_of(&self, handle: u64) -> OpResult<u64> {
        self.files.get(handle).map(|open| open.node.id)
    }

    pub(super) fn node(&self, id: u64) -> OpResult<Arc<Node>> {
        self.nodes.get(id)
    }

    pub(super) fn path_fd<'a>(&'a self, node: &'a Node) -> OpResult<PathFd<'a>> {
        node.path(&self.lower)
    }

    pub(super) fn watcher(&self) -> Option<Arc<dyn NameWatcher>> {
        self.watcher.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn tell(&self, event: impl FnOnce() -> NameEvent) {
        if let Some(watcher) = self.watcher() {
            watcher.on_name_event(&event());
        }
    }

    pub(super) fn enter<'a>(&'a self, node: &'a Node) -> Way<'a> {
        node.gate.enter(&self.drain)
    }

    /// Makes a change of a file's data, through its disk if it has one; whether it had one.
    pub(super) fn change(
        &self,
        node: &Node,
        change: Change,
        mut lower: impl FnMut() -> OpResult<u64>,
    ) -> OpResult<(u64, bool)> {
        match self.enter(node) {
            Way::Untracked(_counted) => lower().map(|n| (n, false)),
            Way::Tracked(disk, _counted) => {
                make(&node.gate, &*disk, &self.pressure, change, lower).map(|n| (n, true))
            }
        }
    }
}
