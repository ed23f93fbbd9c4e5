//! Reading folders.
//!
//! Positions are those of the lower file system, so that a listing goes on where it was however
//! the folder changes meanwhile. Files of ours are left out.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::sync::{Arc, Mutex};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::{FileStat, SFlag};
use nix::unistd::{Whence, fdatasync, fsync, lseek};

use super::hidden;
use super::node::{Node, lock};
use super::ops::{Filter, OpResult};
use super::sys;

const BUFFER_BYTES: usize = 32 << 10;

/// An open folder.
pub(super) struct OpenFolder {
    node: Arc<Node>,
    pub(super) file: File,
    stream: Mutex<Stream>,
}

#[derive(Default)]
struct Stream {
    buffer: Vec<u8>,
    /// What of the buffer is not read yet.
    unread: std::ops::Range<usize>,
    /// Position of the first unread record.
    offset: u64,
}

/// An entry of a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    /// Name without a folder.
    pub name: OsString,
    /// Inode number.
    pub inode: u64,
    /// Kind of file; none: the lower file system does not say.
    pub kind: Option<SFlag>,
    /// Position of the next entry.
    pub next: u64,
}

/// Decodes the first `linux_dirent64`: u64 inode, i64 offset, u16 length, u8 type, name, 0.
fn decode(bytes: &[u8]) -> Option<(DirEntry, usize)> {
    let word = |at: usize| bytes.get(at..at + 8)?.try_into().ok().map(u64::from_ne_bytes);
    let length = usize::from(u16::from_ne_bytes(bytes.get(16..18)?.try_into().ok()?));
    let kind = match *bytes.get(18)? {
        libc::DT_REG => Some(SFlag::S_IFREG),
        libc::DT_DIR => Some(SFlag::S_IFDIR),
        libc::DT_LNK => Some(SFlag::S_IFLNK),
        libc::DT_CHR => Some(SFlag::S_IFCHR),
        libc::DT_BLK => Some(SFlag::S_IFBLK),
        libc::DT_FIFO => Some(SFlag::S_IFIFO),
        libc::DT_SOCK => Some(SFlag::S_IFSOCK),
        _ => None,
    };
    let name = bytes.get(19..length)?.split(|b| *b == 0).next()?;
    let name = OsStr::from_bytes(name).to_owned();
    Some((DirEntry { name, inode: word(0)?, kind, next: word(8)? }, length))
}

impl DirEntry {
    /// Every entry of an open folder, from its start.
    pub(super) fn all(folder: &File) -> OpResult<Vec<Self>> {
        let mut entries = Vec::new();
        let mut buffer = vec![0; BUFFER_BYTES];
        lseek(folder, 0, Whence::SeekSet)?;
        loop {
            let read = sys::read_directory(folder, &mut buffer)?;
            if read == 0 {
                return Ok(entries);
            }
            let mut at = 0;
            while at < read {
                let bytes = buffer.get(at..read).ok_or(Errno::EIO)?;
                let (entry, length) = decode(bytes).ok_or(Errno::EIO)?;
                entries.push(entry);
                at += length;
            }
        }
    }
}

impl Filter {
    /// Opens a folder; its handle.
    pub fn opendir(&self, id: u64) -> OpResult<u64> {
        let node = self.node(id)?;
        let file = node.open(&self.lower, OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
        self.folders.insert(Arc::new(OpenFolder { node, file, stream: Mutex::default() }))
    }

    /// Hands out entries from position `offset` on, `.` and `..` too, until `take` says `false`
    /// (that entry comes again) or none is left.
    pub fn readdir(
        &self,
        handle: u64,
        offset: u64,
        mut take: impl FnMut(&DirEntry) -> OpResult<bool>,
    ) -> OpResult<()> {
        let folder = self.folders.get(handle)?;
        let is_root = folder.node.id == super::node::ROOT;
        let mut stream = lock(&folder.stream);
        let stream = &mut *stream;
        if stream.offset != offset || stream.unread.is_empty() {
            lseek(&folder.file, offset.cast_signed(), Whence::SeekSet)?;
            stream.unread = 0..0;
            stream.offset = offset;
        }
        loop {
            if stream.unread.is_empty() {
                stream.buffer.resize(BUFFER_BYTES, 0);
                let read = sys::read_directory(&folder.file, &mut stream.buffer)?;
                if read == 0 {
                    return Ok(());
                }
                stream.unread = 0..read;
            }
            let bytes = stream.buffer.get(stream.unread.clone()).ok_or(Errno::EIO)?;
            let (mut entry, length) = decode(bytes).ok_or(Errno::EIO)?;
            if is_root && entry.name == ".." {
                // What is above the root is none of the mount's business.
                entry.inode = folder.node.key.inode;
            }
            let is_file = entry.kind.is_none_or(|k| k == SFlag::S_IFREG);
            let is_ours = is_file && hidden::is_hidden(&folder.file, &entry.name);
            if !is_ours && !take(&entry)? {
                return Ok(());
            }
            stream.unread.start += length;
            stream.offset = entry.next;
        }
    }

    /// Looks up an entry while its folder is read. ENOENT: it is gone meanwhile.
    pub fn lookup_entry(&self, handle: u64, name: &OsStr) -> OpResult<(u64, FileStat)> {
        let folder = self.folders.get(handle)?;
        let (node, stat) = self.lookup_in(&folder.node, &folder.file, name)?;
        Ok((node.id, stat))
    }

    /// Closes a folder.
    pub fn releasedir(&self, handle: u64) -> OpResult<()> {
        self.folders.remove(handle).map(drop)
    }

    /// Makes the entries of a folder durable.
    pub fn fsyncdir(&self, handle: u64, is_data_only: bool) -> OpResult<()> {
        let folder = self.folders.get(handle)?;
        if is_data_only { fdatasync(&folder.file) } else { fsync(&folder.file) }
    }
}
