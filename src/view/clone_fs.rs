//! A clone, spoken in FUSE: decodes, calls the overlay of the disk, replies.
//!
//! The set of files is fixed: nothing can be made, renamed or removed (EPERM). Definition files
//! are read-only (EROFS). Inode number `n + 1` is node `n` of the tree of the point.

use std::ffi::OsStr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, KernelConfig,
    LockOwner, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow,
    WriteFlags,
};
use nix::errno::Errno;

use super::clone::Clone;
use super::mountpoint::Owner;
use super::overlay::OverlayDisk;
use super::points_fs::{code, configure};
use super::reading::{file_attr, folder_attr};
use super::tree::Item;
use crate::base::Timestamp;

/// Names never change; sizes only through the kernel that caches them.
const TTL: Duration = Duration::from_secs(10);

/// The adapter.
pub(super) struct CloneFs(Arc<Clone>);

impl CloneFs {
    pub(super) fn new(clone: Arc<Clone>) -> Self {
        Self(clone)
    }

    fn item(&self, ino: INodeNo) -> Result<&Item, Errno> {
        self.0.opened.tree.item(node_of(ino)?).ok_or(Errno::ESTALE)
    }

    fn disk(&self, ino: INodeNo) -> Result<&OverlayDisk, Errno> {
        match self.item(ino)? {
            Item::Disk(number) => self.0.disks.get(*number).ok_or(Errno::ESTALE),
            Item::Definition(_) => Err(Errno::EROFS),
            Item::Folder(_) => Err(Errno::EISDIR),
        }
    }

    fn attr(&self, ino: INodeNo) -> Result<FileAttr, Errno> {
        let time = self.0.opened.reader.info().time;
        match self.item(ino)? {
            Item::Folder(_) => Ok(folder_attr(ino.0, time, self.0.owner, self.0.owner.mode)),
            Item::Definition(_) => {
                let size = self.0.opened.size(node_of(ino)?);
                Ok(file_attr(ino.0, size, time, self.0.owner, 0o440))
            }
            Item::Disk(_) => {
                let header = self.disk(ino)?.header();
                let mode = u16::try_from(header.mode & 0o777).unwrap_or(0o600);
                let owner = Owner { uid: header.uid, gid: header.gid, mode };
                Ok(file_attr(ino.0, header.size, Timestamp(header.mtime_ms), owner, mode))
            }
        }
    }

    fn lookup_in(&self, parent: INodeNo, name: &OsStr) -> Result<FileAttr, Errno> {
        let child = self.0.opened.tree.child(node_of(parent)?, name).ok_or(Errno::ENOENT)?;
        self.attr(ino_of(child))
    }

    fn read_at(&self, ino: INodeNo, offset: u64, length: usize) -> Result<Vec<u8>, Errno> {
        match self.item(ino)? {
            Item::Disk(_) => self.0.told(self.disk(ino)?.read(offset, length)),
            _ => self.0.told(self.0.opened.read(node_of(ino)?, offset, length)),
        }
    }

    fn allocate(&self, ino: INodeNo, offset: u64, length: u64, mode: i32) -> Result<(), Errno> {
        let disk = self.disk(ino)?;
        let keep_size = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
        let done = match mode & !libc::FALLOC_FL_KEEP_SIZE {
            0 => disk.allocate(offset, length, keep_size),
            libc::FALLOC_FL_PUNCH_HOLE if keep_size => disk.zero(offset, length, true, self.0.now()),
            libc::FALLOC_FL_ZERO_RANGE => disk.zero(offset, length, keep_size, self.0.now()),
            _ => return Err(Errno::EOPNOTSUPP),
        };
        self.0.told(done)
    }

    fn seek(&self, ino: INodeNo, offset: i64, whence: i32) -> Result<u64, Errno> {
        let offset = u64::try_from(offset).map_err(|_| Errno::ENXIO)?;
        match self.item(ino)? {
            Item::Disk(_) => self.0.told(self.disk(ino)?.seek(offset, whence)),
            _ => self.0.told(self.0.opened.seek(node_of(ino)?, offset, whence)).flatten(),
        }
    }

    fn lines(&self, ino: INodeNo) -> Result<Vec<(INodeNo, FileType, &OsStr)>, Errno> {
        let tree = &self.0.opened.tree;
        let node = node_of(ino)?;
        let Some(Item::Folder(children)) = tree.item(node) else { return Err(Errno::ENOTDIR) };
        let mut lines = vec![
            (ino, FileType::Directory, OsStr::new(".")),
            (ino_of(tree.parent(node)), FileType::Directory, OsStr::new("..")),
        ];
        lines.extend(children.iter().map(|(name, child)| {
            let kind = match tree.item(*child) {
                Some(Item::Folder(_)) => FileType::Directory,
                _ => FileType::RegularFile,
            };
            (ino_of(*child), kind, name.as_os_str())
        }));
        Ok(lines)
    }
}

fn ino_of(node: usize) -> INodeNo {
    INodeNo(node as u64 + 1)
}

fn node_of(ino: INodeNo) -> Result<usize, Errno> {
    ino.0.checked_sub(1).and_then(|n| usize::try_from(n).ok()).ok_or(Errno::ESTALE)
}

impl Filesystem for CloneFs {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        configure(config);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.lookup_in(parent, name) {
            Ok(attr) => reply.entry(&TTL, &attr, Generation(0)),
            Err(e) => reply.error(code(e)),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attr(ino) {
            Ok(attr) => reply.attr(&TTL, &attr),
            Err(e) => reply.error(code(e)),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let change = || {
            let disk = self.disk(ino).map_err(|_| Errno::EPERM)?;
            if let Some(size) = size {
                self.0.told(disk.truncate(size, self.0.now()))?;
            }
            if mode.is_some() || uid.is_some() || gid.is_some() {
                disk.set_owner(mode, uid, gid);
            }
            if let Some(mtime) = mtime {
                disk.write_state().header.mtime_ms = milliseconds(mtime, self.0.now());
            }
            self.attr(ino)
        };
        match change() {
            Ok(attr) => reply.attr(&TTL, &attr),
            Err(e) => reply.error(code(e)),
        }
    }

    fn open(&self, _: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let opened = match self.item(ino) {
            Ok(Item::Disk(_)) => Ok(FopenFlags::FOPEN_DIRECT_IO),
            Ok(Item::Definition(_)) if flags.acc_mode() == OpenAccMode::O_RDONLY => {
                Ok(FopenFlags::FOPEN_KEEP_CACHE)
            }
            Ok(Item::Definition(_)) => Err(Errno::EROFS),
            Ok(Item::Folder(_)) => Err(Errno::EISDIR),
            Err(e) => Err(e),
        };
        match opened {
            Ok(flags) => reply.opened(FileHandle(0), flags),
            Err(e) => reply.error(code(e)),
        }
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.read_at(ino, offset, size as usize) {
            Ok(bytes) => reply.data(&bytes),
            Err(e) => reply.error(code(e)),
        }
    }

    fn write(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let written = self.disk(ino).and_then(|disk| self.0.told(disk.write(offset, data, self.0.now())));
        match written {
            Ok(()) => reply.written(u32::try_from(data.len()).unwrap_or(u32::MAX)),
            Err(e) => reply.error(code(e)),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        match self.disk(ino).and_then(|disk| self.0.told(disk.sync(false))) {
            Ok(()) | Err(Errno::EROFS) => reply.ok(),
            Err(e) => reply.error(code(e)),
        }
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fallocate(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        match self.allocate(ino, offset, length, mode) {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(code(e)),
        }
    }

    fn lseek(&self, _: &Request, ino: INodeNo, _: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        match self.seek(ino, offset, whence) {
            Ok(found) => reply.offset(i64::try_from(found).unwrap_or(i64::MAX)),
            Err(e) => reply.error(code(e)),
        }
    }

    fn readdir(&self, _: &Request, ino: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let lines = match self.lines(ino) {
            Ok(lines) => lines,
            Err(e) => return reply.error(code(e)),
        };
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (i, (ino, kind, name)) in lines.into_iter().enumerate().skip(start) {
            if reply.add(ino, i as u64 + 1, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        // The room is that of the file system of the overlay.
        match nix::sys::statvfs::statvfs(self.0.overlay()) {
            Ok(s) => reply.statfs(
                s.blocks(),
                s.blocks_free(),
                s.blocks_available(),
                s.files(),
                s.files_free(),
                u32::try_from(s.block_size()).unwrap_or(4096),
                255,
                u32::try_from(s.fragment_size()).unwrap_or(4096),
            ),
            Err(e) => reply.error(code(e)),
        }
    }

    fn getxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        reply.error(code(Errno::ENOSYS));
    }

    fn listxattr(&self, _: &Request, _: INodeNo, _: u32, reply: ReplyXattr) {
        reply.error(code(Errno::ENOSYS));
    }

    fn setxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: &[u8], _: i32, _: u32, reply: ReplyEmpty) {
        reply.error(code(Errno::ENOSYS));
    }

    fn mknod(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(code(Errno::EPERM));
    }

    fn create(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: i32, reply: ReplyCreate) {
        reply.error(code(Errno::EPERM));
    }

    fn mkdir(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(code(Errno::EPERM));
    }

    fn unlink(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(code(Errno::EPERM));
    }

    fn rmdir(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(code(Errno::EPERM));
    }

    fn symlink(&self, _: &Request, _: INodeNo, _: &OsStr, _: &std::path::Path, reply: ReplyEntry) {
        reply.error(code(Errno::EPERM));
    }

    fn link(&self, _: &Request, _: INodeNo, _: INodeNo, _: &OsStr, reply: ReplyEntry) {
        reply.error(code(Errno::EPERM));
    }

    fn rename(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _: INodeNo,
        _: &OsStr,
        _: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(code(Errno::EPERM));
    }
}

fn milliseconds(time: TimeOrNow, now: Timestamp) -> i64 {
    match time {
        TimeOrNow::Now => now.0,
        TimeOrNow::SpecificTime(time) => {
            let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
        }
    }
}
