//! Operations on ranges of a file: preallocation, holes, zeros, copies, and the few ioctls that
//! are let through.

use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::stat::fstat;
use nix::unistd::{Whence, lseek};

use super::change::{Way, resize};
use super::handle::OpenFile;
use super::ops::{Filter, OpResult};
use super::sys;
use crate::base::BLOCK_BYTES;
use crate::core::ports::tracking::Change;

/// A copy into a tracked disk goes in steps of this size, so that one step never preserves so
/// much that the epoch gives up its cut (T5).
const COPY_TRACKED_BYTES: u64 = 8 << 20;
/// A copy is answered after this much, so that it does not occupy a thread for minutes.
const COPY_BYTES: u64 = 1 << 30;

/// The ioctls that are let through, and the bytes that the lower file system reads and writes.
/// All are about the lower file itself; whatever else there may be is ENOTTY.
const IOCTL_CASES: &[(u32, usize)] = &[
    (0x8008_6601, 4),  // FS_IOC_GETFLAGS: the kernel moves an int, whatever the number says
    (0x4008_6602, 4),  // FS_IOC_SETFLAGS
    (0x801c_581f, 28), // FS_IOC_FSGETXATTR
    (0x401c_5820, 28), // FS_IOC_FSSETXATTR
    (0x800c_581e, 12), // XFS_IOC_DIOINFO: QEMU asks for the alignment of direct I/O
];

fn size_of(file: impl AsFd) -> OpResult<u64> {
    fstat(file).map(|stat| u64::try_from(stat.st_size).unwrap_or(0))
}

fn signed(value: u64) -> OpResult<i64> {
    i64::try_from(value).map_err(|_| Errno::EFBIG)
}

impl Filter {
    /// Preallocates, punches or zeroes a range. Modes: 0, KEEP_SIZE, PUNCH_HOLE with KEEP_SIZE,
    /// ZERO_RANGE with or without KEEP_SIZE; FUSE forwards no others (EOPNOTSUPP).
    pub fn fallocate(&self, handle: u64, offset: u64, length: u64, mode: i32) -> OpResult<()> {
        let open = self.files.get(handle)?;
        let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let (punch, zero) = (FallocateFlags::FALLOC_FL_PUNCH_HOLE, FallocateFlags::FALLOC_FL_ZERO_RANGE);
        let mode = FallocateFlags::from_bits(mode).ok_or(Errno::EOPNOTSUPP)?;
        let end = offset.checked_add(length).ok_or(Errno::EFBIG)?;
        let lower = |offset: u64, length: u64| fallocate(&open.file, mode, signed(offset)?, signed(length)?);
        if length == 0 {
            return lower(offset, length);
        }
        if mode == (punch | keep) || mode == (zero | keep) {
            self.zero_inside(&open, offset, end, lower)
        } else if mode == zero {
            let change = Change::Zero { offset, length };
            self.change(&open.node, change, || lower(offset, length).map(|()| 0)).map(drop)
        } else if mode == keep {
            self.preallocate(&open, None, || lower(offset, length))
        } else if mode.is_empty() {
            self.preallocate(&open, Some(end), || lower(offset, length))
        } else {
            Err(Errno::EOPNOTSUPP)
        }
    }

    /// A range becomes zeros and the size stays. Of a tracked disk only what lies before its end
    /// (as it is now) is touched, so that what is marked and what is changed are the same
    /// whatever grows meanwhile.
    fn zero_inside(
        &self,
        open: &OpenFile,
        offset: u64,
        end: u64,
        lower: impl Fn(u64, u64) -> OpResult<()>,
    ) -> OpResult<()> {
        let (disk, _counted) = match self.enter(&open.node) {
            Way::Untracked(_counted) => return lower(offset, end - offset),
            Way::Tracked(disk, counted) => (disk, counted),
        };
        let limit = size_of(&open.file)?.checked_next_multiple_of(BLOCK_BYTES).ok_or(Errno::EFBIG)?;
        // Behind the end: one block, so that the answer is still the lower file system's.
        let end = end.min(limit.max(offset.saturating_add(BLOCK_BYTES)));
        let length = end - offset;
        let (gate, change) = (&open.node.gate, Change::Zero { offset, length });
        super::change::make(gate, &*disk, &self.pressure, change, || lower(offset, length).map(|()| 0))
            .map(drop)
    }

    /// Blocks are reserved; content changes only in that the file may grow to `grown`.
    fn preallocate(
        &self,
        open: &OpenFile,
        grown: Option<u64>,
        lower: impl Fn() -> OpResult<()>,
    ) -> OpResult<()> {
        let (disk, _counted) = match self.enter(&open.node) {
            Way::Untracked(_counted) => return lower(),
            Way::Tracked(disk, counted) => (disk, counted),
        };
        match grown {
            Some(to) if to > size_of(&open.file)? => {
                resize(&open.node.gate, &*disk, &self.pressure, to, || size_of(&open.file), lower)
            }
            _ => match lower() {
                Err(Errno::ENOSPC) if disk.make_room() => lower(),
                result => result,
            },
        }
    }

    /// Position of the next data or hole (SEEK_DATA, SEEK_HOLE), or of the end.
    pub fn lseek(&self, handle: u64, offset: i64, whence: i32) -> OpResult<i64> {
        let open = self.files.get(handle)?;
        let whence = match whence {
            libc::SEEK_DATA => Whence::SeekData,
            libc::SEEK_HOLE => Whence::SeekHole,
            libc::SEEK_END => Whence::SeekEnd,
            libc::SEEK_SET => Whence::SeekSet,
            _ => return Err(Errno::EINVAL),
        };
        lseek(&open.file, offset, whence)
    }

    /// Copies between two files; the number of bytes, which may be fewer than asked for.
    pub fn copy_file_range(
        &self,
        (from, from_offset): (u64, u64),
        (to, to_offset): (u64, u64),
        length: u64,
    ) -> OpResult<u64> {
        let (from, to) = (self.files.get(from)?, self.files.get(to)?);
        let most = match to.node.gate.disk() {
            Some(_) => COPY_TRACKED_BYTES,
            None => COPY_BYTES,
        };
        // No more is marked than can be copied.
        let length = length.min(size_of(&from.file)?.saturating_sub(from_offset)).min(most);
        let copy = || {
            let (source, target) = (signed(from_offset)?, signed(to_offset)?);
            let length = usize::try_from(length).map_err(|_| Errno::EINVAL)?;
            sys::copy_range((&from.file, source), (&to.file, target), length)
        };
        if length == 0 {
            return copy();
        }
        let change = Change::Write { offset: to_offset, length };
        let (copied, is_tracked) = self.change(&to.node, change, copy)?;
        if !is_tracked && to_offset < BLOCK_BYTES {
            self.header_written(&to);
        }
        Ok(copied)
    }

    /// An ioctl of the allow-list on an open file or folder; result and data to hand back.
    /// ENOTTY: any other.
    pub fn ioctl(
        &self,
        handle: u64,
        is_folder: bool,
        command: u32,
        input: &[u8],
        output_bytes: usize,
    ) -> OpResult<(i32, Vec<u8>)> {
        let (_, bytes) = IOCTL_CASES.iter().find(|case| case.0 == command).ok_or(Errno::ENOTTY)?;
        let mut data = [0u8; 256];
        let given = input.len().min(*bytes);
        if let (Some(to), Some(from)) = (data.get_mut(..given), input.get(..given)) {
            to.copy_from_slice(from);
        }
        let result = if is_folder {
            sys::ioctl(&self.folders.get(handle)?.file, command, &mut data)?
        } else {
            sys::ioctl(&self.files.get(handle)?.file, command, &mut data)?
        };
        Ok((result, data.get(..output_bytes.min(data.len())).unwrap_or_default().to_vec()))
    }
}
