//! Reading an open point, and attributes of what a view shows.

use std::ffi::OsString;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{FileAttr, FileType, INodeNo};
use nix::errno::Errno;

use super::mountpoint::Owner;
use super::tree::{Item, Tree};
use crate::base::{Error, ErrorKind, Timestamp};
use crate::core::ports::points::PointReader;

/// An open point and its tree.
pub(super) struct Opened {
    /// The point; it stays pinned while this lives.
    pub reader: Arc<dyn PointReader>,
    /// Its files.
    pub tree: Tree,
}

/// One line of a folder.
pub(super) type FolderEntry = (u64, FileType, OsString);

/// How the kernel and its user see an error of the vault. Decided here and nowhere else.
pub(super) fn errno_of(e: &Error) -> Errno {
    match e.kind() {
        ErrorKind::NotFound => Errno::ENOENT,
        ErrorKind::NoSpace => Errno::ENOSPC,
        ErrorKind::Busy => Errno::EAGAIN,
        _ => e.errno().map_or(Errno::EIO, Errno::from_raw),
    }
}

impl Opened {
    /// Opens the tree of a point.
    pub(super) fn new(reader: Arc<dyn PointReader>) -> Self {
        let tree = Tree::of(reader.as_ref());
        Self { reader, tree }
    }

    /// Size of file `number` of the tree, in bytes; 0 for folders.
    pub(super) fn size(&self, number: usize) -> u64 {
        match self.tree.item(number) {
            Some(Item::Disk(disk)) => self.reader.disks().get(*disk).map_or(0, |d| d.size),
            Some(Item::Definition(file)) => {
                self.reader.definition().get(*file).map_or(0, |f| f.content.len() as u64)
            }
            _ => 0,
        }
    }

    /// Up to `length` bytes of file `number` at `offset`; fewer only at the end.
    pub(super) fn read(&self, number: usize, offset: u64, length: usize) -> Result<Vec<u8>, Error> {
        match self.tree.item(number) {
            Some(Item::Disk(disk)) => read_disk(self.reader.as_ref(), *disk, offset, length),
            Some(Item::Definition(file)) => {
                let content = self.reader.definition().get(*file).map_or("", |f| f.content.as_str());
                let start = usize::try_from(offset).unwrap_or(usize::MAX).min(content.len());
                let end = start.saturating_add(length).min(content.len());
                Ok(content.as_bytes().get(start..end).unwrap_or_default().to_vec())
            }
            _ => Err(Error::io("a folder cannot be read", std::io::Error::from_raw_os_error(libc::EISDIR))),
        }
    }

    /// SEEK_DATA and SEEK_HOLE in file `number`.
    pub(super) fn seek(&self, number: usize, offset: u64, whence: i32) -> Result<Result<u64, Errno>, Error> {
        let size = self.size(number);
        match (self.tree.item(number), whence) {
            (_, libc::SEEK_DATA | libc::SEEK_HOLE) if offset >= size => Ok(Err(Errno::ENXIO)),
            (Some(Item::Disk(disk)), libc::SEEK_DATA) => {
                let run = self.reader.next_data(*disk, offset)?;
                Ok(run.filter(|r| r.offset < size).map(|r| r.offset.max(offset)).ok_or(Errno::ENXIO))
            }
            (Some(Item::Disk(disk)), libc::SEEK_HOLE) => {
                Ok(Ok(next_hole(self.reader.as_ref(), *disk, offset, size)?))
            }
            (Some(Item::Definition(_)), libc::SEEK_DATA) => Ok(Ok(offset)),
            (Some(Item::Definition(_)), libc::SEEK_HOLE) => Ok(Ok(size)),
            _ => Ok(Err(Errno::EINVAL)),
        }
    }
}

/// The first hole at or after `offset`; the end of the disk counts as one.
pub(super) fn next_hole(reader: &dyn PointReader, disk: usize, offset: u64, size: u64) -> Result<u64, Error> {
    let mut at = offset;
    while at < size {
        match reader.next_data(disk, at)? {
            Some(run) if run.offset <= at && run.end() > at => at = run.end(),
            _ => return Ok(at),
        }
    }
    Ok(size)
}

/// Reads until `length` bytes are there or the disk ends.
pub(super) fn read_disk(
    reader: &dyn PointReader,
    disk: usize,
    offset: u64,
    length: usize,
) -> Result<Vec<u8>, Error> {
    let size = reader.disks().get(disk).map_or(0, |d| d.size);
    let left = usize::try_from(size.saturating_sub(offset)).unwrap_or(usize::MAX);
    let mut buffer = vec![0; length.min(left)];
    let filled = fill(reader, disk, offset, &mut buffer)?;
    buffer.truncate(filled);
    Ok(buffer)
}

/// Fills `buffer` from a disk, as far as the disk goes.
pub(super) fn fill(
    reader: &dyn PointReader,
    disk: usize,
    offset: u64,
    buffer: &mut [u8],
) -> Result<usize, Error> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match reader.read_at(disk, offset.saturating_add(filled as u64), rest)? {
            0 => break,
            n => filled += n,
        }
    }
    Ok(filled.min(buffer.len()))
}

/// Attributes of a folder.
pub(super) fn folder_attr(ino: u64, time: Timestamp, owner: Owner, mode: u16) -> FileAttr {
    FileAttr { kind: FileType::Directory, nlink: 2, ..file_attr(ino, 0, time, owner, mode) }
}

/// Attributes of a regular file. `blocks` is one page less than the size, and the truth is in
/// SEEK_DATA and SEEK_HOLE: what copies sparsely asks there only if the file looks sparse.
pub(super) fn file_attr(ino: u64, size: u64, time: Timestamp, owner: Owner, mode: u16) -> FileAttr {
    let time = system_time(time);
    FileAttr {
        ino: INodeNo(ino),
        size,
        blocks: match size {
            0 => 0,
            size => size.div_ceil(512).saturating_sub(8).max(1),
        },
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind: FileType::RegularFile,
        perm: mode,
        nlink: 1,
        uid: owner.uid,
        gid: owner.gid,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

/// A timestamp as the system has it; 1970 for anything before.
pub(super) fn system_time(time: Timestamp) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(u64::try_from(time.0).unwrap_or(0))
}
