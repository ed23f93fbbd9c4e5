//! A disk of the vault: the sparse image and the checksums of its blocks.
//!
//! `.sums` has 8 bytes for each 4 KiB block; beyond its end, and in its holes, they are 0: zeros.
//! The last block of a disk counts as if it were padded with zeros. Image and sums are written one
//! after the other; while they differ, the undo log covers the block (A2), and a repeated apply
//! writes both again.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};

use super::layout::VmDir;
use crate::base::digest::block_sum;
use crate::base::error::Context;
use crate::base::{BLOCK_BYTES, DiskId, Error, ErrorKind, Extent, Result};

const BLOCK: usize = BLOCK_BYTES as usize;
const SUM_BYTES: u64 = 8;
/// Checksums that are looked through at once (2 MiB of disk).
const SUMS_AT_ONCE: u64 = 512;
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Rounds up to whole blocks.
pub(super) const fn block_end(offset: u64) -> u64 {
    offset.div_ceil(BLOCK_BYTES) * BLOCK_BYTES
}

/// Rounds down to whole blocks.
pub(super) const fn block_start(offset: u64) -> u64 {
    offset / BLOCK_BYTES * BLOCK_BYTES
}

/// What is known of where a file has data. SEEK_DATA and SEEK_HOLE walk over every extent on their
/// way, reserved ones too: asked anew for each run of a scattered delta, they would walk over all
/// of them each time. Good as long as nobody changes the file.
#[derive(Default)]
struct Seeker {
    hole: Range<u64>,
    /// The data after the hole; empty: there is none.
    data: Range<u64>,
}

impl Seeker {
    /// The first run of data at or after `offset`, in bytes.
    fn next(&mut self, file: &File, offset: u64) -> nix::Result<Option<Range<u64>>> {
        if !self.hole.contains(&offset) && !self.data.contains(&offset) {
            let seek = |at: u64, whence| match lseek(file.as_fd(), at.cast_signed(), whence) {
                Ok(found) => Ok(Some(found.cast_unsigned())),
                Err(Errno::ENXIO) => Ok(None),
                Err(e) => Err(e),
            };
            let start = seek(offset, Whence::SeekData)?;
            let end = start.map_or(Ok(None), |start| seek(start, Whence::SeekHole))?;
            self.hole = offset..start.unwrap_or(u64::MAX);
            self.data = start.map_or(0..0, |start| start..end.unwrap_or(start));
        }
        let start = self.data.start.max(offset);
        Ok((self.hole.end != u64::MAX).then_some(start..self.data.end))
    }
}

/// See [`Seeker`]; of the image and of the sums of a disk.
#[derive(Default)]
pub(super) struct Stored {
    image: Seeker,
    sums: Seeker,
}

/// An open disk.
pub(super) struct DiskFile {
    pub id: DiskId,
    image: File,
    sums: File,
}

impl DiskFile {
    /// Opens a disk; `create` makes it if there is none (the names are not synced).
    pub fn open(dir: &VmDir, id: DiskId, create: bool) -> Result<Self> {
        let open = |path: std::path::PathBuf| {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(create).mode(0o600);
            options.open(&path).context(|| format!("cannot open {}", path.display()))
        };
        // The image last: where it is the sums are too.
        let sums = open(dir.sums(id))?;
        Ok(Self { id, image: open(dir.disk(id))?, sums })
    }

    /// Opens a disk to read it.
    pub fn open_existing(dir: &VmDir, id: DiskId) -> Result<Self> {
        let open = |path: std::path::PathBuf| {
            File::open(&path).context(|| format!("cannot open {}", path.display()))
        };
        Ok(Self { id, image: open(dir.disk(id))?, sums: open(dir.sums(id))? })
    }

    fn what(&self, verb: &str) -> String {
        format!("cannot {verb} disk {} of the vault", self.id)
    }

    /// Bytes of the image.
    pub fn size(&self) -> Result<u64> {
        Ok(self.image.metadata().context(|| self.what("stat"))?.len())
    }

    /// Bytes that the image takes.
    pub fn allocated(&self) -> Result<u64> {
        use std::os::unix::fs::MetadataExt;
        Ok(self.image.metadata().context(|| self.what("stat"))?.blocks() * 512)
    }

    /// Writes whole blocks at `offset`, but nothing beyond `size`, and their sums.
    pub fn write(&self, offset: u64, blocks: &[u8], size: u64) -> Result<()> {
        let room = usize::try_from(size.saturating_sub(offset)).unwrap_or(usize::MAX);
        let length = blocks.len().min(room);
        let data = blocks.get(..length).unwrap_or_default();
        self.image.write_all_at(data, offset).context(|| self.what("write"))?;
        // What the end of the disk cuts off does not count.
        let mut sums = Vec::with_capacity(blocks.len().div_ceil(BLOCK) * 8);
        for block in data.chunks(BLOCK) {
            sums.extend_from_slice(&padded_sum(block).to_le_bytes());
        }
        self.write_sums(offset, &sums)
    }

    fn write_sums(&self, offset: u64, sums: &[u8]) -> Result<()> {
        let place = offset / BLOCK_BYTES * SUM_BYTES;
        self.sums.write_all_at(sums, place).context(|| self.what("write the checksums of"))
    }

    /// Makes whole blocks a hole.
    pub fn punch(&self, range: Range<u64>) -> Result<()> {
        let size = self.size()?;
        if range.start < block_end(size) {
            punch(&self.image, range.start, range.end.min(block_end(size)), size)
                .context(|| self.what("punch a hole in"))?;
        }
        let length = self.sums.metadata().context(|| self.what("stat"))?.len();
        let from = range.start / BLOCK_BYTES * SUM_BYTES;
        let to = (range.end / BLOCK_BYTES * SUM_BYTES).min(length);
        if from < to {
            punch(&self.sums, from, to, length).context(|| self.what("clear the checksums of"))?;
        }
        Ok(())
    }

    /// Sets the size. The block that the new end cuts gets its sum anew.
    pub fn set_size(&self, size: u64) -> Result<()> {
        let old = self.size()?;
        self.image.set_len(size).context(|| self.what("set the size of"))?;
        self.sums
            .set_len(size.div_ceil(BLOCK_BYTES) * SUM_BYTES)
            .context(|| self.what("set the size of the checksums of"))?;
        if size < old && !size.is_multiple_of(BLOCK_BYTES) {
            let mut block = vec![0; BLOCK];
            self.read(block_start(size), &mut block)?;
            self.write_sums(block_start(size), &block_sum(&block).to_le_bytes())?;
        }
        Ok(())
    }

    /// Reserves room for blocks that will be written, and for their sums.
    pub fn reserve(&self, range: Range<u64>) -> Result<()> {
        let place = range.start / BLOCK_BYTES * SUM_BYTES;
        let sums = (range.end - range.start) / BLOCK_BYTES * SUM_BYTES;
        for (file, at, length) in
            [(&self.image, range.start, range.end - range.start), (&self.sums, place, sums)]
        {
            let (at, length) = (at.cast_signed(), length.cast_signed());
            match fallocate(file.as_fd(), FallocateFlags::FALLOC_FL_KEEP_SIZE, at, length) {
                Ok(()) | Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => {}
                Err(e) => return Err(e).context(|| self.what("reserve room in")),
            }
        }
        Ok(())
    }

    /// Fills `buffer` from `offset`; zeros beyond the end.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        read_padded(&self.image, offset, buffer).context(|| self.what("read"))
    }

    /// The sums of `count` blocks from the one at `offset`.
    pub fn read_sums(&self, offset: u64, count: usize) -> Result<Vec<u64>> {
        let mut bytes = vec![0; count * 8];
        read_padded(&self.sums, offset / BLOCK_BYTES * SUM_BYTES, &mut bytes)
            .context(|| self.what("read the checksums of"))?;
        Ok(bytes.as_chunks::<8>().0.iter().map(|b| u64::from_le_bytes(*b)).collect())
    }

    /// Offset of the first block in `blocks` (whole blocks from `offset`) that does not match.
    pub fn first_damaged(offset: u64, blocks: &[u8], sums: &[u64]) -> Option<u64> {
        let bad = blocks.chunks(BLOCK).zip(sums).position(|(block, sum)| padded_sum(block) != *sum);
        bad.map(|n| offset + n as u64 * BLOCK_BYTES)
    }

    /// The error for a block that does not match.
    pub fn damaged(&self, offset: u64) -> Error {
        Error::new(ErrorKind::Damaged, format!("disk {} is damaged in the vault at byte {offset}", self.id))
            .why("the block does not match its checksum")
            .hint("check the disks of the vault; afterimage points NAME shows older points to restore")
    }

    /// The first run of blocks at or after `offset` of which the image or, before `end`, the sums
    /// have something: content that the image lost is found like content that it has. `seen`: what
    /// earlier calls have found out, if nobody has written to the disk since.
    pub fn next_stored(&self, seen: &mut Stored, offset: u64, end: u64) -> Result<Option<Extent>> {
        let data = seen.image.next(&self.image, offset).context(|| self.what("look for data in"))?;
        let data = data.map(|data| {
            let start = block_start(data.start).max(block_start(offset));
            Extent { offset: start, length: block_end(data.end).max(start + BLOCK_BYTES) - start }
        });
        let stop = data.map_or(end, |d| d.offset.min(end));
        Ok(self.next_summed(&mut seen.sums, offset..stop)?.or(data))
    }

    /// The first run of blocks in `range` that have a checksum, or the beginning of it.
    fn next_summed(&self, seen: &mut Seeker, range: Range<u64>) -> Result<Option<Extent>> {
        let mut at = range.start;
        while at < range.end {
            let place = at / BLOCK_BYTES * SUM_BYTES;
            let found = seen.next(&self.sums, place).context(|| self.what("look for checksums of"))?;
            let Some(found) = found else { return Ok(None) };
            at = at.max(found.start / SUM_BYTES * BLOCK_BYTES);
            let count = range.end.saturating_sub(at).div_ceil(BLOCK_BYTES).min(SUMS_AT_ONCE);
            let sums = self.read_sums(at, usize::try_from(count).unwrap_or(0))?;
            if let Some(first) = sums.iter().position(|sum| *sum != 0) {
                let blocks = sums.iter().skip(first).take_while(|sum| **sum != 0).count();
                let offset = at + first as u64 * BLOCK_BYTES;
                return Ok(Some(Extent { offset, length: blocks as u64 * BLOCK_BYTES }));
            }
            at += count * BLOCK_BYTES;
        }
        Ok(None)
    }

    /// Free and total bytes of the file system below.
    pub fn room(&self) -> Result<(u64, u64)> {
        room(&self.image)
    }

    /// Makes image and sums durable.
    pub fn sync(&self) -> Result<()> {
        self.image.sync_all().and_then(|()| self.sums.sync_all()).context(|| self.what("sync"))
    }
}

/// Sum of a block as if padded with zeros to 4 KiB.
fn padded_sum(block: &[u8]) -> u64 {
    if block.len() == BLOCK {
        return block_sum(block);
    }
    let mut whole = [0; BLOCK];
    for (to, from) in whole.iter_mut().zip(block) {
        *to = *from;
    }
    block_sum(&whole)
}

fn read_padded(file: &File, mut offset: u64, mut buffer: &mut [u8]) -> io::Result<()> {
    while !buffer.is_empty() {
        match file.read_at(buffer, offset) {
            Ok(0) => {
                buffer.fill(0);
                break;
            }
            Ok(n) => {
                offset += n as u64;
                buffer = buffer.get_mut(n..).unwrap_or_default();
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Punches a hole, or writes zeros where the file system cannot.
fn punch(file: &File, from: u64, to: u64, size: u64) -> io::Result<()> {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    match fallocate(file.as_fd(), flags, from.cast_signed(), (to - from).cast_signed()) {
        Ok(()) => return Ok(()),
        Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => {}
        Err(e) => return Err(e.into()),
    }
    let mut at = from;
    while at < to.min(size) {
        let length = (to.min(size) - at).min(ZEROS.len() as u64);
        file.write_all_at(ZEROS.get(..length as usize).unwrap_or_default(), at)?;
        at += length;
    }
    Ok(())
}

/// Free and total bytes of the file system that holds `file`.
pub(super) fn room(file: &File) -> Result<(u64, u64)> {
    let what = || format!("cannot ask for the room of file system of descriptor {}", file.as_raw_fd());
    let stat = nix::sys::statvfs::fstatvfs(file.as_fd()).context(what)?;
    let fragment = stat.fragment_size();
    Ok((stat.blocks_available() * fragment, stat.blocks() * fragment))
}
