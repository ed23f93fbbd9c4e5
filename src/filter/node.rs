//! Nodes: the files and folders that the kernel, or a protected disk, refers to.
//!
//! A node is identified by device, inode and generation: by the file handle of the lower file
//! system, from which it is opened when needed. So 100,000 files in a folder cost no descriptor,
//! and an inode number that the file system gave to another file is ESTALE, never that file.
//! Where the lower file system has no handles, each node keeps an O_PATH descriptor instead.
//!
//! While a file is open or attached, its inode is pinned by a descriptor, so that an unlinked
//! file stays reachable and its [`FileKey`] stays its own.
//!
//! The number that the kernel knows a node by is the lower inode number, so that `stat` shows
//! it; a new file with a number that an older node still has gets a number of its own. (The root
//! is 1, as FUSE demands.)

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{FileStat, Mode, SFlag};

use super::change::Gate;
use super::lower::{Lower, PathFd, key_of, kind_of, reopen};
use super::sys::RawHandle;
use crate::base::FileKey;

/// The kernel's number of the root.
pub(super) const ROOT: u64 = 1;
/// Numbers from here on are ours, not those of inodes.
const EXTRA: u64 = 1 << 63;
const SHARDS: usize = 64;
/// Deeper paths are not told (they are longer than PATH_MAX).
const DEPTH_MAX: usize = 2048;

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

enum Anchor {
    Root,
    Handle(RawHandle),
    Descriptor(OwnedFd),
}

/// A folder and a name in it.
type Place = Option<(Arc<Node>, OsString)>;

#[derive(Default)]
struct Pin {
    users: usize,
    file: Option<Arc<OwnedFd>>,
}

/// A file or folder.
pub(super) struct Node {
    /// The kernel's number of it.
    pub(super) id: u64,
    /// Device and inode of the lower file.
    pub(super) key: FileKey,
    /// What kind of file it is.
    pub(super) kind: SFlag,
    anchor: Anchor,
    place: Mutex<Place>,
    pin: Mutex<Pin>,
    /// Where changes of its data go through.
    pub(super) gate: Gate,
}

impl Node {
    fn new(id: u64, stat: &FileStat, anchor: Anchor, place: Place) -> Self {
        Self {
            id,
            key: key_of(stat),
            kind: kind_of(stat),
            anchor,
            place: Mutex::new(place),
            pin: Mutex::default(),
            gate: Gate::default(),
        }
    }

    /// An O_PATH descriptor of it. ESTALE: the lower file is gone.
    pub(super) fn path<'a>(&'a self, lower: &'a Lower) -> Result<PathFd<'a>, Errno> {
        match &self.anchor {
            Anchor::Root => Ok(PathFd::Borrowed(lower.root().as_fd())),
            Anchor::Descriptor(fd) => Ok(PathFd::Borrowed(fd.as_fd())),
            Anchor::Handle(handle) => {
                if let Some(fd) = &lock(&self.pin).file {
                    return Ok(PathFd::Shared(fd.clone()));
                }
                handle.open(lower.root(), libc::O_PATH).map(PathFd::Own)
            }
        }
    }

    /// Opens it with these flags.
    pub(super) fn open(&self, lower: &Lower, flags: OFlag) -> Result<std::fs::File, Errno> {
        match &self.anchor {
            Anchor::Root => {
                openat(lower.root(), ".", flags | OFlag::O_CLOEXEC, Mode::empty()).map(std::fs::File::from)
            }
            _ => reopen(self.path(lower)?, flags),
        }
    }

    /// Keeps the inode from being reused until [`Node::unpin`].
    pub(super) fn pin(&self, lower: &Lower) -> Result<(), Errno> {
        let mut pin = lock(&self.pin);
        if let (Anchor::Handle(handle), None) = (&self.anchor, &pin.file) {
            pin.file = Some(Arc::new(handle.open(lower.root(), libc::O_PATH)?));
        }
        pin.users += 1;
        Ok(())
    }

    /// Undoes one [`Node::pin`].
    pub(super) fn unpin(&self) {
        let mut pin = lock(&self.pin);
        pin.users = pin.users.saturating_sub(1);
        if pin.users == 0 {
            pin.file = None;
        }
    }

    /// Its path relative to the root, as far as it is known; of several names the last one seen.
    pub(super) fn relative_path(&self) -> Option<PathBuf> {
        let mut names = Vec::new();
        let mut place = lock(&self.place).clone();
        if place.is_none() && !matches!(self.anchor, Anchor::Root) {
            return None;
        }
        while let Some((folder, name)) = place {
            names.push(name);
            if names.len() > DEPTH_MAX {
                return None;
            }
            place = lock(&folder.place).clone();
            if place.is_none() && !matches!(folder.anchor, Anchor::Root) {
                return None;
            }
        }
        Some(names.iter().rev().collect())
    }

    /// The path of `name` in this folder.
    pub(super) fn path_of(&self, name: &OsStr) -> PathBuf {
        self.relative_path().unwrap_or_default().join(name)
    }

    /// It is in this folder by this name now.
    pub(super) fn set_place(&self, folder: &Arc<Node>, name: &OsStr) {
        let mut place = lock(&self.place);
        let is_same = place.as_ref().is_some_and(|(f, n)| Arc::ptr_eq(f, folder) && n == name);
        if !is_same && !matches!(self.anchor, Anchor::Root) {
            *place = Some((folder.clone(), name.to_owned()));
        }
    }

    /// It is no longer in this folder by this name.
    pub(super) fn clear_place(&self, folder: &Arc<Node>, name: &OsStr) {
        let mut place = lock(&self.place);
        if place.as_ref().is_some_and(|(f, n)| f.id == folder.id && n == name) {
            *place = None;
        }
    }

    fn is(&self, key: FileKey, handle: Option<&RawHandle>) -> bool {
        self.key == key
            && match (&self.anchor, handle) {
                (Anchor::Handle(own), Some(other)) => own == other,
                (Anchor::Handle(_), None) => false,
                _ => true,
            }
    }
}

struct Entry {
    node: Arc<Node>,
    /// What the kernel has looked up and not forgotten.
    lookups: u64,
    /// It was resolved for the host, which has not detached it.
    is_kept: bool,
}

/// All nodes.
pub(super) struct Nodes {
    root: Arc<Node>,
    shards: [Mutex<HashMap<u64, Entry>>; SHARDS],
    /// Nodes with numbers of their own, and how many there are.
    extra: Mutex<HashMap<u64, Arc<Node>>>,
    extra_count: AtomicUsize,
    extra_next: AtomicU64,
}

impl Nodes {
    pub(super) fn new(root: &FileStat) -> Self {
        Self {
            root: Arc::new(Node::new(ROOT, root, Anchor::Root, None)),
            shards: std::array::from_fn(|_| Mutex::default()),
            extra: Mutex::default(),
            extra_count: AtomicUsize::new(0),
            extra_next: AtomicU64::new(EXTRA),
        }
    }

    fn shard(&self, id: u64) -> MutexGuard<'_, HashMap<u64, Entry>> {
        // `SHARDS` is a power of two, and the index is below it.
        lock(&self.shards[(id as usize) & (SHARDS - 1)])
    }

    /// The node with this number. ESTALE: we know none.
    pub(super) fn get(&self, id: u64) -> Result<Arc<Node>, Errno> {
        if id == ROOT {
            return Ok(self.root.clone());
        }
        self.shard(id).get(&id).map(|e| e.node.clone()).ok_or(Errno::ESTALE)
    }

    /// The node of an open lower file with these attributes; counts one lookup.
    pub(super) fn enter(
        &self,
        lower: &Lower,
        file: OwnedFd,
        stat: &FileStat,
        place: Option<(&Arc<Node>, &OsStr)>,
    ) -> Result<Arc<Node>, Errno> {
        let key = key_of(stat);
        if key == self.root.key {
            return Ok(self.root.clone());
        }
        let handle = if lower.has_handles { Some(RawHandle::of(&file)?) } else { None };
        let node = self.enter_with(key, handle, file, stat);
        if let Some((folder, name)) = place {
            node.set_place(folder, name);
        }
        Ok(node)
    }

    fn enter_with(
        &self,
        key: FileKey,
        handle: Option<RawHandle>,
        file: OwnedFd,
        stat: &FileStat,
    ) -> Arc<Node> {
        if self.extra_count.load(Ordering::SeqCst) > 0
            && let Some(node) = self.enter_extra(&lock(&self.extra), key, handle.as_ref())
        {
            return node;
        }
        {
            let id = key.inode;
            let mut shard = self.shard(id);
            match shard.get_mut(&id) {
                Some(entry) if entry.node.is(key, handle.as_ref()) => {
                    entry.lookups += 1;
                    return entry.node.clone();
                }
                None if id > ROOT && id < EXTRA => {
                    let node = Arc::new(Node::new(id, stat, anchor(handle, file), None));
                    shard.insert(id, Entry { node: node.clone(), lookups: 1, is_kept: false });
                    return node;
                }
                _ => (),
            }
        }
        // Asked again under the lock, so that two lookups of one new file make one node.
        let mut extra = lock(&self.extra);
        if let Some(node) = self.enter_extra(&extra, key, handle.as_ref()) {
            return node;
        }
        let id = self.extra_next.fetch_add(1, Ordering::Relaxed);
        let node = Arc::new(Node::new(id, stat, anchor(handle, file), None));
        extra.insert(id, node.clone());
        self.extra_count.store(extra.len(), Ordering::SeqCst);
        self.shard(id).insert(id, Entry { node: node.clone(), lookups: 1, is_kept: false });
        node
    }

    fn enter_extra(
        &self,
        extra: &HashMap<u64, Arc<Node>>,
        key: FileKey,
        handle: Option<&RawHandle>,
    ) -> Option<Arc<Node>> {
        let node = extra.values().find(|n| n.is(key, handle))?;
        if let Some(entry) = self.shard(node.id).get_mut(&node.id) {
            entry.lookups += 1;
        }
        Some(node.clone())
    }

    /// Counts one more lookup: an open file is a reference like that of the kernel, so that there
    /// is never a second node for it.
    pub(super) fn hold(&self, node: &Arc<Node>) {
        if let Some(entry) = self.shard(node.id).get_mut(&node.id) {
            entry.lookups += 1;
        }
    }

    /// The kernel forgets `count` lookups.
    pub(super) fn forget(&self, id: u64, count: u64) {
        // Always this lock before that of a shard.
        let mut extra = (id >= EXTRA).then(|| lock(&self.extra));
        let removed = {
            let mut shard = self.shard(id);
            let Some(entry) = shard.get_mut(&id) else { return };
            entry.lookups = entry.lookups.saturating_sub(count);
            if entry.lookups > 0 || entry.is_kept {
                return;
            }
            shard.remove(&id)
        };
        if let Some(extra) = &mut extra {
            extra.remove(&id);
            self.extra_count.store(extra.len(), Ordering::SeqCst);
        }
        // Outside the lock of the shard: its parents may go with it.
        drop(removed);
    }

    /// Keeps a node for the host; it stays pinned.
    pub(super) fn keep(&self, node: &Arc<Node>, lower: &Lower) -> Result<(), Errno> {
        let mut shard = self.shard(node.id);
        let entry = shard.get_mut(&node.id).ok_or(Errno::ESTALE)?;
        if !entry.is_kept {
            node.pin(lower)?;
            entry.is_kept = true;
        }
        Ok(())
    }

    /// Undoes [`Nodes::keep`].
    pub(super) fn unkeep(&self, node: &Arc<Node>) {
        {
            let mut shard = self.shard(node.id);
            let Some(entry) = shard.get_mut(&node.id) else { return };
            if !entry.is_kept {
                return;
            }
            entry.is_kept = false;
        }
        node.unpin();
        self.forget(node.id, 0);
    }

    /// The node that the host knows by this key, or else one that the kernel knows.
    pub(super) fn find(&self, key: FileKey) -> Option<Arc<Node>> {
        let (mut kept, mut known) = (None, None);
        let mut look = |entry: &Entry| {
            if entry.node.key == key {
                known = Some(entry.node.clone());
                if entry.is_kept {
                    kept = known.clone();
                }
            }
        };
        if let Some(entry) = self.shard(key.inode).get(&key.inode) {
            look(entry);
        }
        let extra: Vec<u64> = lock(&self.extra).keys().copied().collect();
        for id in extra {
            if let Some(entry) = self.shard(id).get(&id) {
                look(entry);
            }
        }
        kept.or(known)
    }

    /// Every node that the host keeps.
    pub(super) fn kept(&self) -> Vec<Arc<Node>> {
        let of = |shard: &Mutex<HashMap<u64, Entry>>| {
            lock(shard).values().filter(|e| e.is_kept).map(|e| e.node.clone()).collect::<Vec<_>>()
        };
        self.shards.iter().flat_map(of).collect()
    }
}

fn anchor(handle: Option<RawHandle>, file: OwnedFd) -> Anchor {
    match handle {
        Some(handle) => Anchor::Handle(handle),
        None => Anchor::Descriptor(file),
    }
}
