//! The points view: every recovery point of every VM as a folder of ordinary read-only files.
//!
//! ```text
//!   DIR/NAME/latest -> POINT-ID             the newest point that can be opened
//!   DIR/NAME/POINT-ID/<disk path>           a disk as of the cut, readable at once, not copied
//!   DIR/NAME/POINT-ID/.afterimage/<file>    the definition of the VM as of the cut
//! ```
//!
//! Points come and go while it is mounted. A point is opened, and so pinned, when somebody looks
//! into its folder; it is let go a few seconds after the last look, or when its last file is
//! closed. Content never changes, so the kernel may cache it; inode numbers follow from the ids
//! and are the same after every mount. Bytes that fail their checksum are EIO, with a line in the
//! log that says which (A2 is the reader's). Files belong to the owner and group of the folder
//! that the view is mounted on and are closed to others: they are the guests' whole disks.
//!
//! Killed: nothing is lost, the view holds no state. Removed with plain `umount`: it ends.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use fuser::{FileAttr, FileType};
use nix::errno::Errno;

use super::mountpoint::{Kind, Mountpoint, Owner};
use super::points_fs::PointsFs;
use super::reading::{FolderEntry, Opened, errno_of, file_attr, folder_attr};
use super::tree::Item;
use crate::base::{Clock, Error, ErrorKind, PointId, Result, SystemClock, Timestamp, VmId};
use crate::core::ports::points::{PointInfo, PointStore, StoredVm};

/// Name of the symlink to the newest point.
pub const LATEST: &str = "latest";

/// A list of VMs or points is asked for again after so long; a name that is not in it at once.
const LISTING_AGE_MAX: Duration = Duration::from_millis(500);
/// A point that nobody looks at is let go after so long.
const IDLE_MAX: Duration = Duration::from_secs(5);
/// Open points without open files, at most.
const IDLE_POINTS_MAX: usize = 64;
/// Errors of one open file that are logged; the rest only go to its reader.
const LOGGED_ERRORS_MAX: u32 = 16;

/// The mounted points view.
pub struct PointsMount {
    mount: Mountpoint,
    points: Arc<Points>,
}

impl PointsMount {
    /// Mounts the view of everything in `store` on `dir`, an empty folder. Errors:
    /// [`ErrorKind::NotFound`] no such folder, [`ErrorKind::Exists`] a mount is there,
    /// [`ErrorKind::Refused`] not empty or no folder.
    pub fn start(dir: &Path, store: Arc<dyn PointStore>) -> Result<Self> {
        let (dir, owner) = Mountpoint::verify(dir)?;
        let points = Points::start(store, owner)?;
        let kind = Kind { subtype: "afterimage-points", read_only: true };
        let mount = Mountpoint::mount(dir, &kind, PointsFs::new(points.clone()))?;
        log::info!("points are shown in {}", mount.dir().display());
        Ok(Self { mount, points })
    }

    /// Where it is mounted.
    pub fn dir(&self) -> &Path {
        self.mount.dir()
    }

    /// Whether it still is: not after `umount`, by us or from outside.
    pub fn is_mounted(&self) -> bool {
        self.mount.is_mounted()
    }

    /// Lets go of every point that has no open file, so that it can be deleted.
    pub fn release_idle(&self) {
        self.points.lock().idle.clear();
    }

    /// Removes the view. [`ErrorKind::Busy`] while files in it are open; nothing to do if it has
    /// been removed from outside.
    pub fn unmount(&self) -> Result<()> {
        self.mount.unmount()
    }
}

/// What an inode stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Key {
    /// The folder of the view itself.
    Root,
    /// Folder of a VM.
    Vm(VmId),
    /// Symlink to the newest point of a VM.
    Latest(VmId),
    /// Node of the tree of a point; 0 is the folder of the point.
    Node(VmId, PointId, usize),
}

impl Key {
    /// The inode number: a digest of the ids, so that it is the same after every mount.
    fn ino(self) -> u64 {
        let text = match self {
            Self::Root => return fuser::INodeNo::ROOT.0,
            Self::Vm(vm) => format!("vm {vm}"),
            Self::Latest(vm) => format!("latest {vm}"),
            Self::Node(vm, point, node) => format!("node {vm} {point} {node}"),
        };
        crate::base::digest::block_sum(text.as_bytes()).max(2)
    }
}

/// Something open: a listed folder or a file.
pub(super) enum Handle {
    /// The lines of a folder as of its opening.
    Folder(Vec<FolderEntry>),
    /// A file; its point stays open.
    File {
        /// Its point.
        opened: Arc<Opened>,
        /// Node in the tree of the point.
        node: usize,
        /// Errors logged so far.
        errors: AtomicU32,
    },
}

struct Listed<T> {
    at: Duration,
    list: Arc<Vec<T>>,
}

struct Idle {
    used: Duration,
    opened: Arc<Opened>,
}

#[derive(Default)]
struct State {
    /// Inodes that the kernel knows, with the number of its references.
    nodes: HashMap<u64, (Key, u64)>,
    handles: HashMap<u64, Arc<Handle>>,
    vms: Option<Listed<StoredVm>>,
    points: HashMap<VmId, Listed<PointInfo>>,
    idle: HashMap<(VmId, PointId), Idle>,
}

/// The view without FUSE: names, inodes, open points.
pub(super) struct Points {
    store: Arc<dyn PointStore>,
    owner: Owner,
    clock: SystemClock,
    state: Mutex<State>,
    next_handle: AtomicU64,
    /// Tells the sweeper that a point was opened.
    opened: Sender<()>,
}

impl Points {
    fn start(store: Arc<dyn PointStore>, owner: Owner) -> Result<Arc<Self>> {
        let (opened, receiver) = bounded(1);
        let points = Arc::new(Self {
            store,
            owner,
            clock: SystemClock::default(),
            state: Mutex::new(State::default()),
            next_handle: AtomicU64::new(1),
            opened,
        });
        let weak = Arc::downgrade(&points);
        std::thread::Builder::new()
            .name("view-sweeper".to_owned())
            .spawn(move || sweep(&receiver, || weak.upgrade().map(|p| p.sweep())))
            .map_err(|e| Error::io("the points view cannot start", e))?;
        Ok(points)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets go of points that nobody has looked at lately. Returns whether any are left.
    fn sweep(&self) -> bool {
        let now = self.clock.monotonic();
        let mut state = self.lock();
        state.idle.retain(|_, idle| now.saturating_sub(idle.used) < IDLE_MAX);
        !state.idle.is_empty()
    }

    /// All VMs; `fresh`: as of now.
    fn vms(&self, fresh: bool) -> Result<Arc<Vec<StoredVm>>> {
        let now = self.clock.monotonic();
        if let Some(listed) = &self.lock().vms
            && !fresh
            && now.saturating_sub(listed.at) < LISTING_AGE_MAX
        {
            return Ok(listed.list.clone());
        }
        let list = Arc::new(self.store.vms()?);
        self.lock().vms = Some(Listed { at: now, list: list.clone() });
        Ok(list)
    }

    /// All points of a VM, oldest first; `fresh`: as of now.
    fn points(&self, vm: VmId, fresh: bool) -> Result<Arc<Vec<PointInfo>>> {
        let now = self.clock.monotonic();
        if let Some(listed) = self.lock().points.get(&vm)
            && !fresh
            && now.saturating_sub(listed.at) < LISTING_AGE_MAX
        {
            return Ok(listed.list.clone());
        }
        let list = Arc::new(self.store.points(vm)?);
        self.lock().points.insert(vm, Listed { at: now, list: list.clone() });
        Ok(list)
    }

    fn find_vm(&self, name: &OsStr) -> Result<Option<VmId>> {
        let find = |list: &[StoredVm]| shown(list).into_iter().find(|(shown, _)| name == shown.as_str());
        let found = match find(&self.vms(false)?) {
            Some(found) => Some(found),
            None => find(&self.vms(true)?),
        };
        Ok(found.map(|(_, vm)| vm))
    }

    fn find_point(&self, vm: VmId, id: PointId) -> Result<Option<PointInfo>> {
        let find = |list: &[PointInfo]| list.iter().find(|point| point.id == id).cloned();
        match find(&self.points(vm, false)?) {
            Some(point) => Ok(Some(point)),
            None => Ok(find(&self.points(vm, true)?)),
        }
    }

    /// An open point, from those at hand or from the store.
    fn open_point(&self, vm: VmId, point: PointId) -> Result<Arc<Opened>> {
        let used = self.clock.monotonic();
        if let Some(idle) = self.lock().idle.get_mut(&(vm, point)) {
            idle.used = used;
            return Ok(idle.opened.clone());
        }
        let opened = Arc::new(Opened::new(self.store.open(vm, point)?));
        let mut state = self.lock();
        if state.idle.len() >= IDLE_POINTS_MAX
            && let Some(oldest) = state.idle.iter().min_by_key(|(_, idle)| idle.used).map(|(k, _)| *k)
        {
            state.idle.remove(&oldest);
        }
        state.idle.insert((vm, point), Idle { used, opened: opened.clone() });
        drop(state);
        // Full: the sweeper knows already.
        let _ = self.opened.try_send(());
        Ok(opened)
    }

    /// What inode `ino` is.
    pub(super) fn key(&self, ino: u64) -> Result<Key, Errno> {
        if ino == fuser::INodeNo::ROOT.0 {
            return Ok(Key::Root);
        }
        self.lock().nodes.get(&ino).map(|(key, _)| *key).ok_or(Errno::ESTALE)
    }

    /// The kernel gets one more reference to `key`. Returns its inode number.
    fn remember(&self, key: Key) -> u64 {
        let mut ino = key.ino();
        let mut state = self.lock();
        // Two ids with one digest: the later one takes the next free number.
        while state.nodes.get(&ino).is_some_and(|(other, _)| *other != key) {
            ino = ino.wrapping_add(1).max(2);
        }
        state.nodes.entry(ino).or_insert((key, 0)).1 += 1;
        ino
    }

    /// The kernel drops `count` references.
    pub(super) fn forget(&self, ino: u64, count: u64) {
        let mut state = self.lock();
        if let Some((_, references)) = state.nodes.get_mut(&ino) {
            *references = references.saturating_sub(count);
            if *references == 0 {
                state.nodes.remove(&ino);
            }
        }
    }

    /// The entry `name` of a folder; its attributes with the inode number.
    pub(super) fn lookup(&self, parent: u64, name: &OsStr) -> Result<FileAttr, Errno> {
        let key = match self.key(parent)? {
            Key::Root => Key::Vm(self.told(self.find_vm(name))?.ok_or(Errno::ENOENT)?),
            Key::Vm(vm) if name == LATEST => {
                self.newest(vm)?;
                Key::Latest(vm)
            }
            Key::Vm(vm) => {
                let id = point_id(name).ok_or(Errno::ENOENT)?;
                self.told(self.find_point(vm, id))?.ok_or(Errno::ENOENT)?;
                Key::Node(vm, id, 0)
            }
            Key::Node(vm, point, node) => {
                let opened = self.told(self.open_point(vm, point))?;
                Key::Node(vm, point, opened.tree.child(node, name).ok_or(Errno::ENOENT)?)
            }
            Key::Latest(_) => return Err(Errno::ENOTDIR),
        };
        let attr = self.attributes(key)?;
        Ok(FileAttr { ino: fuser::INodeNo(self.remember(key)), ..attr })
    }

    /// Attributes of `key`; ESTALE if its point is gone.
    pub(super) fn attributes(&self, key: Key) -> Result<FileAttr, Errno> {
        let folder = |time| folder_attr(key.ino(), time, self.owner, self.owner.mode & 0o555);
        match key {
            Key::Root => Ok(folder(self.clock.now())),
            Key::Vm(vm) => {
                let points = self.told(self.points(vm, false))?;
                Ok(folder(points.last().map_or(Timestamp(0), |point| point.time)))
            }
            Key::Latest(vm) => {
                let newest = self.newest(vm)?;
                let size = newest.id.to_string().len() as u64;
                let attr = file_attr(key.ino(), size, newest.time, self.owner, 0o777);
                Ok(FileAttr { kind: FileType::Symlink, blocks: 0, ..attr })
            }
            Key::Node(vm, point, 0) => {
                let info = self.told(self.find_point(vm, point))?.ok_or(Errno::ESTALE)?;
                Ok(folder(info.time))
            }
            Key::Node(vm, point, node) => {
                let opened = self.told(self.open_point(vm, point)).map_err(stale)?;
                let time = opened.reader.info().time;
                match opened.tree.item(node).ok_or(Errno::ESTALE)? {
                    Item::Folder(_) => Ok(folder(time)),
                    _ => Ok(file_attr(key.ino(), opened.size(node), time, self.owner, 0o440)),
                }
            }
        }
    }

    fn newest(&self, vm: VmId) -> Result<PointInfo, Errno> {
        self.told(self.points(vm, true))?.last().cloned().ok_or(Errno::ENOENT)
    }

    /// Where `latest` points to.
    pub(super) fn read_link(&self, ino: u64) -> Result<String, Errno> {
        match self.key(ino)? {
            Key::Latest(vm) => Ok(self.newest(vm)?.id.to_string()),
            _ => Err(Errno::EINVAL),
        }
    }

    /// Opens a folder: its lines as of now.
    pub(super) fn open_folder(&self, ino: u64) -> Result<u64, Errno> {
        let key = self.key(ino)?;
        let (parent, lines) = match key {
            Key::Root => {
                let vms = shown(&self.told(self.vms(true))?);
                let line = |(name, vm): (String, VmId)| (Key::Vm(vm), FileType::Directory, name.into());
                (key, vms.into_iter().map(line).collect())
            }
            Key::Vm(vm) => (Key::Root, self.lines_of_vm(vm)?),
            Key::Node(vm, point, node) => {
                let opened = self.told(self.open_point(vm, point)).map_err(stale)?;
                let parent = match node {
                    0 => Key::Vm(vm),
                    node => Key::Node(vm, point, opened.tree.parent(node)),
                };
                (parent, lines_of_folder(&opened, vm, point, node)?)
            }
            Key::Latest(_) => return Err(Errno::ENOTDIR),
        };
        let mut entries: Vec<FolderEntry> = vec![
            (key.ino(), FileType::Directory, ".".into()),
            (parent.ino(), FileType::Directory, "..".into()),
        ];
        entries.extend(lines.into_iter().map(|(key, kind, name)| (key.ino(), kind, name)));
        Ok(self.add_handle(Handle::Folder(entries)))
    }

    fn lines_of_vm(&self, vm: VmId) -> Result<Vec<(Key, FileType, OsString)>, Errno> {
        let points = self.told(self.points(vm, true))?;
        let line = |p: &PointInfo| (Key::Node(vm, p.id, 0), FileType::Directory, p.id.to_string().into());
        let mut lines: Vec<_> = points.iter().map(line).collect();
        if !lines.is_empty() {
            lines.push((Key::Latest(vm), FileType::Symlink, LATEST.into()));
        }
        Ok(lines)
    }

    /// Opens a file for reading; its point stays open until it is closed.
    pub(super) fn open_file(&self, ino: u64) -> Result<u64, Errno> {
        let Key::Node(vm, point, node) = self.key(ino)? else { return Err(Errno::EISDIR) };
        let opened = self.told(self.open_point(vm, point)).map_err(stale)?;
        match opened.tree.item(node) {
            Some(Item::Folder(_)) => Err(Errno::EISDIR),
            Some(_) => Ok(self.add_handle(Handle::File { opened, node, errors: AtomicU32::new(0) })),
            None => Err(Errno::ESTALE),
        }
    }

    fn add_handle(&self, handle: Handle) -> u64 {
        let number = self.next_handle.fetch_add(1, Ordering::Relaxed);
        self.lock().handles.insert(number, Arc::new(handle));
        number
    }

    /// What is open under `number`.
    pub(super) fn handle(&self, number: u64) -> Result<Arc<Handle>, Errno> {
        self.lock().handles.get(&number).cloned().ok_or(Errno::EBADF)
    }

    /// Closes a folder or a file.
    pub(super) fn close(&self, number: u64) {
        self.lock().handles.remove(&number);
    }

    /// Reads an open file.
    pub(super) fn read(&self, handle: u64, offset: u64, length: usize) -> Result<Vec<u8>, Errno> {
        match self.handle(handle)?.as_ref() {
            Handle::File { opened, node, errors } => {
                opened.read(*node, offset, length).map_err(|e| report(opened, *node, offset, errors, &e))
            }
            Handle::Folder(_) => Err(Errno::EISDIR),
        }
    }

    /// SEEK_DATA and SEEK_HOLE in an open file.
    pub(super) fn seek(&self, handle: u64, offset: u64, whence: i32) -> Result<u64, Errno> {
        match self.handle(handle)?.as_ref() {
            Handle::File { opened, node, errors } => opened
                .seek(*node, offset, whence)
                .map_err(|e| report(opened, *node, offset, errors, &e))
                .flatten(),
            Handle::Folder(_) => Err(Errno::EISDIR),
        }
    }

    /// The errno of an error of the store; the chain goes to the log, once, here.
    fn told<T>(&self, result: Result<T>) -> Result<T, Errno> {
        result.map_err(|e| {
            if e.kind() != ErrorKind::NotFound {
                log::warn!("points view: {e}");
            }
            errno_of(&e)
        })
    }
}

/// The folders of VMs. The name of a VM is its label: of two VMs with one name (in two vaults,
/// say) the later one is shown with the beginning of its UUID.
fn shown(vms: &[StoredVm]) -> Vec<(String, VmId)> {
    let mut names = HashMap::new();
    let mut lines: Vec<(String, VmId)> = Vec::new();
    for vm in vms {
        match names.insert(vm.name.as_str(), vm.id) {
            None => lines.push((vm.name.to_string(), vm.id)),
            Some(_) if lines.iter().any(|(_, id)| *id == vm.id) => {}
            Some(_) => lines.push((format!("{} ({:.8})", vm.name, vm.id.to_string()), vm.id)),
        }
    }
    lines
}

/// A point that was dropped while the kernel still knew it.
fn stale(errno: Errno) -> Errno {
    match errno {
        Errno::ENOENT => Errno::ESTALE,
        other => other,
    }
}

fn report(opened: &Opened, node: usize, offset: u64, errors: &AtomicU32, e: &Error) -> Errno {
    let before = errors.fetch_add(1, Ordering::Relaxed);
    if before < LOGGED_ERRORS_MAX {
        let path = match opened.tree.item(node) {
            Some(Item::Disk(disk)) => opened.reader.disks().get(*disk).map(|d| d.path.display().to_string()),
            _ => None,
        };
        let path = path.unwrap_or_else(|| "a file".to_owned());
        log::error!("point {}: {path} cannot be read at byte {offset}: {e}", opened.reader.info().id);
    }
    errno_of(e)
}

/// The id that is written exactly so: `07-...` is no second name of `7-...`.
fn point_id(name: &OsStr) -> Option<PointId> {
    let text = name.to_str()?;
    text.parse::<PointId>().ok().filter(|id| id.to_string() == text)
}

fn lines_of_folder(
    opened: &Opened,
    vm: VmId,
    point: PointId,
    node: usize,
) -> Result<Vec<(Key, FileType, OsString)>, Errno> {
    let Some(Item::Folder(children)) = opened.tree.item(node) else { return Err(Errno::ENOTDIR) };
    let line = |(name, child): (&OsString, &usize)| {
        let kind = match opened.tree.item(*child) {
            Some(Item::Folder(_)) => FileType::Directory,
            _ => FileType::RegularFile,
        };
        (Key::Node(vm, point, *child), kind, name.clone())
    };
    Ok(children.iter().map(line).collect())
}

/// The sweeper: sleeps until a point is opened, then looks every so often until none is left.
/// Ends with the view.
fn sweep(opened: &Receiver<()>, step: impl Fn() -> Option<bool>) {
    while opened.recv().is_ok() {
        loop {
            match opened.recv_timeout(IDLE_MAX / 2) {
                Err(RecvTimeoutError::Disconnected) => return,
                Ok(()) | Err(RecvTimeoutError::Timeout) => {}
            }
            match step() {
                Some(true) => {}
                Some(false) => break,
                None => return,
            }
        }
    }
}
