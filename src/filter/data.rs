//! Data of files: open, read, write, sync, close. The hot path: a handle leads to its file and
//! its disk without a lock that others share, nothing is allocated, and data is copied only into
//! the aligned buffer that O_DIRECT needs.
//!
//! A write is acknowledged when the lower file has it, a sync when the lower sync returned; an
//! error is the lower error. Files are open below as they are open above (O_DIRECT, O_DSYNC,
//! O_SYNC), except that O_APPEND never is: pwrite would ignore its offset.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::SFlag;
use nix::unistd::{dup, fdatasync, fsync};

use super::buffer::with_aligned;
use super::handle::OpenFile;
use super::ops::{Filter, OpResult};
use crate::core::ports::names::NameEvent;
use crate::core::ports::tracking::Change;

/// A write that touches these first bytes may make a file an image.
const HEADER_BYTES: u64 = 4096;

/// The flags with which a file is opened below.
pub(super) fn lower_flags(flags: i32) -> OFlag {
    let kept = libc::O_ACCMODE | libc::O_DIRECT | libc::O_SYNC | libc::O_DSYNC | libc::O_NOATIME;
    OFlag::from_bits_retain(flags & kept) | OFlag::O_CLOEXEC
}

pub(super) fn errno(error: std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

fn read_some(file: &File, buffer: &mut [u8], offset: u64) -> OpResult<usize> {
    loop {
        match file.read_at(buffer, offset).map_err(errno) {
            Err(Errno::EINTR) => continue,
            result => return result,
        }
    }
}

fn write_some(file: &File, data: &[u8], offset: u64) -> OpResult<u64> {
    loop {
        match file.write_at(data, offset).map_err(errno) {
            Err(Errno::EINTR) => continue,
            result => return result.map(|n| n as u64),
        }
    }
}

impl Filter {
    /// Opens a file; its handle. O_TRUNC is a truncation of its own.
    pub fn open(&self, id: u64, flags: i32) -> OpResult<u64> {
        let node = self.node(id)?;
        match node.kind {
            SFlag::S_IFREG => (),
            SFlag::S_IFDIR => return Err(Errno::EISDIR),
            // The kernel opens pipes, sockets and devices itself.
            _ => return Err(Errno::ENXIO),
        }
        let file = node.open(&self.lower, lower_flags(flags))?;
        let is_direct = flags & libc::O_DIRECT != 0;
        let open = OpenFile::new(node.clone(), file, is_direct, &self.lower)?;
        if flags & libc::O_TRUNC != 0 {
            self.truncate(&node, Some(&open), 0)?;
        }
        self.keep_open(open)
    }

    /// The handle of an open file.
    pub(super) fn keep_open(&self, open: OpenFile) -> OpResult<u64> {
        let node = open.node.clone();
        let handle = self.files.insert(Arc::new(open))?;
        self.nodes.hold(&node);
        Ok(handle)
    }

    /// Reads up to `length` bytes at `offset` and hands them to `f`.
    pub fn read<R>(
        &self,
        handle: u64,
        offset: u64,
        length: usize,
        f: impl FnOnce(&[u8]) -> R,
    ) -> OpResult<R> {
        let open = self.files.get(handle)?;
        with_aligned(length, |buffer| {
            let read = read_some(&open.file, buffer, offset)?;
            Ok(f(buffer.get(..read).unwrap_or_default()))
        })?
    }

    /// Writes at `offset`; the number of bytes written. `is_page`: the kernel writes back a page
    /// of a mapping, which need not fit O_DIRECT.
    pub fn write(&self, handle: u64, offset: u64, data: &[u8], is_page: bool) -> OpResult<u32> {
        let open = self.files.get(handle)?;
        let length = data.len() as u64;
        if length == 0 {
            return write_some(&open.file, data, offset).map(|_| 0);
        }
        let change = Change::Write { offset, length };
        let write =
            |file: &File, data: &[u8]| self.change(&open.node, change, || write_some(file, data, offset));
        let (written, is_tracked) = if !open.is_direct {
            write(&open.file, data)?
        } else if is_page {
            write(open.buffered(&self.lower)?, data)?
        } else {
            with_aligned(data.len(), |buffer| {
                buffer.copy_from_slice(data);
                write(&open.file, buffer)
            })??
        };
        if !is_tracked && offset < HEADER_BYTES {
            self.header_written(&open);
        }
        Ok(u32::try_from(written).unwrap_or(u32::MAX))
    }

    pub(super) fn header_written(&self, open: &OpenFile) {
        let (file, node) = (open.node.key, &open.node);
        self.tell(|| NameEvent::HeaderWritten { file, path: node.relative_path() });
    }

    /// A descriptor of the file is closed: errors that the lower file system kept for it.
    pub fn flush(&self, handle: u64) -> OpResult<()> {
        let open = self.files.get(handle)?;
        nix::unistd::close(dup(&open.file)?)
    }

    /// Makes what was written durable.
    pub fn fsync(&self, handle: u64, is_data_only: bool) -> OpResult<()> {
        let open = self.files.get(handle)?;
        let sync = || if is_data_only { fdatasync(&open.file) } else { fsync(&open.file) };
        match open.node.gate.disk() {
            None => sync(),
            Some(disk) => {
                let mark = disk.sync_begins();
                let result = sync();
                disk.sync_ended(mark, result);
                result
            }
        }
    }

    /// Closes a file.
    pub fn release(&self, handle: u64) -> OpResult<()> {
        let id = self.files.remove(handle)?.node.id;
        self.nodes.forget(id, 1);
        Ok(())
    }
}
