//! Between fuser and the operations: decodes, calls, replies. No logic of its own, except which
//! thread runs what.

use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenFlags, PollEvents, PollFlags, PollNotifier,
    RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty,
    ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr, Request,
    TimeOrNow, WriteFlags,
};
use nix::errno::Errno;
use nix::sys::stat::FileStat;

use super::attr::{SetAttr, SetTime};
use super::encode::{attributes, decode_device, file_type, split, unknown};
use super::ops::{Caller, Filter, OpResult};
use super::pool::Pool;

/// How long the kernel may keep attributes and names. Everything but what is done beneath the
/// mount goes through us, so this only bounds how late that is seen.
const TTL: Duration = Duration::from_secs(1);
/// Largest write in one request.
const WRITE_BYTES_MAX: u32 = 1 << 20;
/// Requests of one connection that the kernel keeps in flight without a thread waiting for each.
const BACKGROUND_MAX: u16 = 256;
/// One cache (the lower one), writes of one file in parallel (design, section 3).
const OPENED: FopenFlags = FopenFlags::FOPEN_DIRECT_IO.union(FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES);
/// What we ask the kernel for. Not: locks (they stay the kernel's), the write-back cache, and
/// O_TRUNC inside of open (the kernel sends a truncation of its own).
const WANTED: &[InitFlags] = &[
    InitFlags::FUSE_DO_READDIRPLUS,
    InitFlags::FUSE_READDIRPLUS_AUTO,
    InitFlags::FUSE_PARALLEL_DIROPS,
    InitFlags::FUSE_ASYNC_DIO,
    InitFlags::FUSE_AUTO_INVAL_DATA,
    InitFlags::FUSE_HAS_IOCTL_DIR,
    InitFlags::FUSE_POSIX_ACL,
    InitFlags::FUSE_HANDLE_KILLPRIV_V2,
    InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
];

/// The fuser side of a filter.
pub(super) struct Adapter {
    filter: Arc<Filter>,
    pool: Arc<Pool>,
    loops: usize,
}

impl Adapter {
    pub(super) fn new(filter: Arc<Filter>, loops: usize) -> Self {
        Self { filter, pool: Arc::new(Pool::new(loops)), loops }
    }

    /// Runs a call that may take long, and replies from wherever it ran.
    fn slow<T: 'static>(
        &self,
        call: impl FnOnce(&Filter) -> OpResult<T> + Send + 'static,
        reply: impl FnOnce(OpResult<T>) + Send + 'static,
    ) {
        let filter = self.filter.clone();
        self.pool.run(move || reply(call(&filter)));
    }
}

fn answer(errno: Errno) -> fuser::Errno {
    fuser::Errno::from_i32(errno as i32)
}

fn empty(result: OpResult<()>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(answer(e)),
    }
}

fn entry(result: OpResult<(u64, FileStat)>, reply: ReplyEntry) {
    match result {
        Ok((id, stat)) => reply.entry(&TTL, &attributes(id, &stat), Generation(0)),
        Err(e) => reply.error(answer(e)),
    }
}

fn attr(id: u64, result: OpResult<FileStat>, reply: ReplyAttr) {
    match result {
        Ok(stat) => reply.attr(&TTL, &attributes(id, &stat)),
        Err(e) => reply.error(answer(e)),
    }
}

fn bytes(result: OpResult<Vec<u8>>, size: u32, reply: ReplyXattr) {
    match result {
        Ok(data) if size == 0 => reply.size(u32::try_from(data.len()).unwrap_or(u32::MAX)),
        Ok(data) if data.len() > size as usize => reply.error(fuser::Errno::ERANGE),
        Ok(data) => reply.data(&data),
        Err(e) => reply.error(answer(e)),
    }
}

fn caller(request: &Request) -> Caller {
    Caller { uid: request.uid(), gid: request.gid() }
}

impl Filesystem for Adapter {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        for flag in WANTED {
            if config.add_capabilities(*flag).is_err() {
                log::info!("this kernel does not offer {flag:?} to FUSE");
            }
        }
        // Limits that fit the kernel's; a refusal keeps its own.
        let _ = config.set_max_write(WRITE_BYTES_MAX);
        let _ = config.set_max_background(BACKGROUND_MAX);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        entry(self.filter.lookup(parent.0, name), reply);
    }

    fn forget(&self, _: &Request, id: INodeNo, count: u64) {
        self.filter.forget(id.0, count);
    }

    fn getattr(&self, _: &Request, id: INodeNo, handle: Option<FileHandle>, reply: ReplyAttr) {
        attr(id.0, self.filter.getattr(id.0, handle.map(|h| h.0)), reply);
    }

    fn setattr(
        &self,
        request: &Request,
        id: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let time = |time: TimeOrNow| match time {
            TimeOrNow::Now => SetTime::Now,
            TimeOrNow::SpecificTime(time) => split(time),
        };
        let (atime, mtime) = (atime.map(time), mtime.map(time));
        // A change of the size by anyone but root; the kernel leaves that to us.
        let drop_privileges = size.is_some() && request.uid() != 0;
        let set = SetAttr { mode, uid, gid, size, atime, mtime, drop_privileges };
        let handle = handle.map(|h| h.0);
        if size.is_some() {
            let call = move |filter: &Filter| filter.setattr(id.0, handle, &set);
            self.slow(call, move |result| attr(id.0, result, reply));
        } else {
            attr(id.0, self.filter.setattr(id.0, handle, &set), reply);
        }
    }

    fn readlink(&self, _: &Request, id: INodeNo, reply: ReplyData) {
        match self.filter.readlink(id.0) {
            Ok(target) => reply.data(target.as_encoded_bytes()),
            Err(e) => reply.error(answer(e)),
        }
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        device: u32,
        reply: ReplyEntry,
    ) {
        let device = decode_device(device);
        entry(self.filter.mknod(caller(request), parent.0, name, mode, device), reply);
    }

    fn mkdir(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        entry(self.filter.mkdir(caller(request), parent.0, name, mode), reply);
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = name.to_owned();
        self.slow(move |filter| filter.unlink(parent.0, &name), move |result| empty(result, reply));
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        empty(self.filter.rmdir(parent.0, name), reply);
    }

    fn symlink(&self, request: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        entry(self.filter.symlink(caller(request), parent.0, name, target.as_os_str()), reply);
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let (name, new_name) = (name.to_owned(), new_name.to_owned());
        self.slow(
            move |filter| filter.rename(parent.0, &name, new_parent.0, &new_name, flags.bits()),
            move |result| empty(result, reply),
        );
    }

    fn link(&self, _: &Request, id: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        entry(self.filter.link(id.0, parent.0, name), reply);
    }

    fn open(&self, _: &Request, id: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        match self.filter.open(id.0, flags.0) {
            Ok(handle) => reply.opened(FileHandle(handle), OPENED),
            Err(e) => reply.error(answer(e)),
        }
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        match self.filter.create(caller(request), parent.0, name, mode, flags) {
            Ok((id, stat, handle)) => {
                let attr = attributes(id, &stat);
                reply.created(&TTL, &attr, Generation(0), FileHandle(handle), OPENED);
            }
            Err(e) => reply.error(answer(e)),
        }
    }

    fn read(
        &self,
        _: &Request,
        _id: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut reply = Some(reply);
        let result = self.filter.read(handle.0, offset, size as usize, |data| {
            if let Some(reply) = reply.take() {
                reply.data(data);
            }
        });
        if let (Err(e), Some(reply)) = (result, reply) {
            reply.error(answer(e));
        }
    }

    fn write(
        &self,
        _: &Request,
        _id: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let is_page = write_flags.contains(WriteFlags::FUSE_WRITE_CACHE);
        if write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID) {
            self.filter.drop_privileges(handle.0);
        }
        let written = move |result: OpResult<u32>| match result {
            Ok(bytes) => reply.written(bytes),
            Err(e) => reply.error(answer(e)),
        };
        // Nearly all loops wait for activations: the rest stays free for whom they do not concern.
        if self.filter.pressure.waiting() + 2 >= self.loops {
            let (filter, data) = (self.filter.clone(), data.to_vec());
            self.pool.hand_over(move || written(filter.write(handle.0, offset, &data, is_page)));
        } else {
            written(self.filter.write(handle.0, offset, data, is_page));
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, handle: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        empty(self.filter.flush(handle.0), reply);
    }

    fn release(
        &self,
        _: &Request,
        _id: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        // The last close of an unlinked file frees its blocks, which may take long.
        self.slow(move |filter| filter.release(handle.0), move |result| empty(result, reply));
    }

    fn fsync(&self, _: &Request, _: INodeNo, handle: FileHandle, datasync: bool, reply: ReplyEmpty) {
        self.slow(move |filter| filter.fsync(handle.0, datasync), move |r| empty(r, reply));
    }

    fn opendir(&self, _: &Request, id: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match self.filter.opendir(id.0) {
            Ok(handle) => reply.opened(FileHandle(handle), FopenFlags::empty()),
            Err(e) => reply.error(answer(e)),
        }
    }

    fn readdir(&self, _: &Request, _: INodeNo, handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let result = self.filter.readdir(handle.0, offset, |e| {
            let kind = e.kind.map_or(FileType::RegularFile, file_type);
            Ok(!reply.add(INodeNo(e.inode), e.next, kind, &e.name))
        });
        match result {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(answer(e)),
        }
    }

    fn readdirplus(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let result = self.filter.readdir(handle.0, offset, |e| {
            if e.name == "." || e.name == ".." {
                // The kernel makes no node of these.
                let attr = unknown(INodeNo(e.inode), FileType::Directory);
                return Ok(!reply.add(attr.ino, e.next, &e.name, &TTL, &attr, Generation(0)));
            }
            let (id, stat) = match self.filter.lookup_entry(handle.0, &e.name) {
                Ok(found) => found,
                // Gone meanwhile.
                Err(Errno::ENOENT) => return Ok(true),
                Err(e) => return Err(e),
            };
            let attr = attributes(id, &stat);
            let is_full = reply.add(INodeNo(id), e.next, &e.name, &TTL, &attr, Generation(0));
            if is_full {
                self.filter.forget(id, 1);
            }
            Ok(!is_full)
        });
        match result {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(answer(e)),
        }
    }

    fn releasedir(&self, _: &Request, _: INodeNo, handle: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        empty(self.filter.releasedir(handle.0), reply);
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, handle: FileHandle, datasync: bool, reply: ReplyEmpty) {
        self.slow(move |filter| filter.fsyncdir(handle.0, datasync), move |r| empty(r, reply));
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        match self.filter.statfs() {
            Ok(s) => reply.statfs(
                s.blocks(),
                s.blocks_free(),
                s.blocks_available(),
                s.files(),
                s.files_free(),
                u32::try_from(s.block_size()).unwrap_or(4096),
                u32::try_from(s.name_max()).unwrap_or(255),
                u32::try_from(s.fragment_size()).unwrap_or(4096),
            ),
            Err(e) => reply.error(answer(e)),
        }
    }

    fn setxattr(
        &self,
        _: &Request,
        id: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        empty(self.filter.setxattr(id.0, name, value, flags), reply);
    }

    fn getxattr(&self, _: &Request, id: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        bytes(self.filter.getxattr(id.0, name), size, reply);
    }

    fn listxattr(&self, _: &Request, id: INodeNo, size: u32, reply: ReplyXattr) {
        bytes(self.filter.listxattr(id.0), size, reply);
    }

    fn removexattr(&self, _: &Request, id: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        empty(self.filter.removexattr(id.0, name), reply);
    }

    fn access(&self, _: &Request, _: INodeNo, _: AccessFlags, reply: ReplyEmpty) {
        // The kernel checks permissions itself (default_permissions).
        reply.ok();
    }

    fn ioctl(
        &self,
        _: &Request,
        _id: INodeNo,
        handle: FileHandle,
        flags: IoctlFlags,
        command: u32,
        input: &[u8],
        output_bytes: u32,
        reply: ReplyIoctl,
    ) {
        let is_folder = flags.contains(IoctlFlags::FUSE_IOCTL_DIR);
        match self.filter.ioctl(handle.0, is_folder, command, input, output_bytes as usize) {
            Ok((result, data)) => reply.ioctl(result, &data),
            Err(e) => reply.error(answer(e)),
        }
    }

    fn poll(
        &self,
        _: &Request,
        _id: INodeNo,
        _handle: FileHandle,
        _notifier: PollNotifier,
        _events: PollEvents,
        _flags: PollFlags,
        reply: ReplyPoll,
    ) {
        // The kernel then answers by itself: regular files are always ready.
        reply.error(fuser::Errno::ENOSYS);
    }

    fn fallocate(
        &self,
        _: &Request,
        _id: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        self.slow(
            move |filter| filter.fallocate(handle.0, offset, length, mode),
            move |result| empty(result, reply),
        );
    }

    fn lseek(
        &self,
        _: &Request,
        _id: INodeNo,
        handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        match self.filter.lseek(handle.0, offset, whence) {
            Ok(at) => reply.offset(at),
            Err(e) => reply.error(answer(e)),
        }
    }

    fn copy_file_range(
        &self,
        _: &Request,
        _from_id: INodeNo,
        from: FileHandle,
        from_offset: u64,
        _to_id: INodeNo,
        to: FileHandle,
        to_offset: u64,
        length: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        self.slow(
            move |filter| filter.copy_file_range((from.0, from_offset), (to.0, to_offset), length),
            move |result| match result {
                Ok(copied) => reply.written(u32::try_from(copied).unwrap_or(u32::MAX)),
                Err(e) => reply.error(answer(e)),
            },
        );
    }
}
