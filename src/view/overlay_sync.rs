//! How the overlay of a disk becomes durable, and how it is found again.
//!
//! A sync: data, then bitmap, then (only if it changed) the header with the size, each durable
//! before the next. So a kill or a power cut at any step leaves the state of the last sync, plus
//! perhaps later writes, block by block: no bit shows a block that is not there, no size shows
//! bits that are not there.
//!
//! A truncation is made durable by itself, header first: after a cut in the middle, opening
//! finishes it (bits and bytes beyond the size are dropped), so that growing again shows zeros.
//!
//! Full: a write to the map that finds no room fails that sync, and the next one tries again. A
//! sync that fails otherwise latches: later ones would tell less than the truth.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use nix::errno::Errno;
use nix::unistd::{Whence, lseek64};

use super::mountpoint::Owner;
use super::overlay::{Bits, OverlayDisk, State};
use crate::base::error::Context;
use crate::base::limits::DISK_BYTES_MAX;
use crate::base::{BLOCK_BYTES, Error, ErrorKind, Result, Timestamp};
use crate::core::ports::points::{PointDisk, PointReader};
use crate::format::overlay::{OVERLAY_BITMAP_OFFSET, OVERLAY_HEADER_BYTES, OVERLAY_SLOTS, OverlayHeader};

/// Bytes of one page of the bitmap.
const PAGE_BYTES: u64 = 4096;
/// Pages that a bitmap of the largest disk has.
const PAGES_MAX: u64 = DISK_BYTES_MAX / BLOCK_BYTES / 8 / PAGE_BYTES;

/// Names of the two files of a disk in the folder of its overlay.
pub(super) fn file_names(disk: &PointDisk) -> [String; 2] {
    [format!("{}.data", disk.id), format!("{}.map", disk.id)]
}

fn open_file(folder: &Path, name: &str, create: bool) -> Result<File> {
    let path = folder.join(name);
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(create)
        .truncate(create)
        .mode(0o600)
        .open(&path)
        .context(|| format!("cannot open {}", path.display()))
}

/// Makes the empty overlay of a disk, durable but for the names of its files.
pub(super) fn create_disk(folder: &Path, disk: &PointDisk, owner: Owner, time: Timestamp) -> Result<()> {
    let [data, map] = file_names(disk);
    let header = OverlayHeader {
        sequence: 1,
        disk: disk.id,
        size: disk.size,
        base_limit: disk.size,
        mode: 0o600,
        uid: owner.uid,
        gid: owner.gid,
        mtime_ms: time.0,
    };
    open_file(folder, &data, true)?.sync_all().context(|| "cannot make the overlay")?;
    let map = open_file(folder, &map, true)?;
    map.write_all_at(&header.encode(), header.slot())
        .and_then(|()| map.sync_all())
        .context(|| "cannot make the overlay")
}

impl OverlayDisk {
    /// Opens the overlay of disk `number` as its last sync left it.
    pub(super) fn open(folder: &Path, reader: Arc<dyn PointReader>, number: usize) -> Result<Self> {
        let Some(disk) = reader.disks().get(number).cloned() else {
            return Err(Error::new(ErrorKind::Internal, "the point has no such disk"));
        };
        let [data, map] = file_names(&disk);
        let (data, map) = (open_file(folder, &data, false)?, open_file(folder, &map, false)?);
        let header = read_header(&map)?;
        if header.disk != disk.id || header.base_limit > disk.size {
            return Err(Error::new(ErrorKind::Damaged, "the map of a clone cannot be read")
                .why(format!("it belongs to another disk than {}", disk.path.display())));
        }
        let state = State { header, bits: read_bits(&map)?, dirty: BTreeSet::new(), is_header_dirty: false };
        let disk = Self {
            reader,
            number,
            data,
            map,
            state: RwLock::new(state),
            changing: Mutex::new(()),
            syncing: Mutex::new(()),
            has_failed: AtomicBool::new(false),
        };
        disk.drop_beyond(header.size)?;
        Ok(disk)
    }

    /// [`ErrorKind::Io`] after a sync that has failed.
    pub(super) fn verify_good(&self) -> Result<()> {
        match self.has_failed.load(Ordering::Acquire) {
            false => Ok(()),
            true => Err(Error::io("the overlay failed to sync earlier", Errno::EIO.into())),
        }
    }

    /// Makes everything that was written before this call durable. `whole`: the time of the last
    /// change as well.
    pub(super) fn sync(&self, whole: bool) -> Result<()> {
        let _syncing = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        self.verify_good()?;
        let (dirty, pages, header) = {
            let mut state = self.write_state();
            let dirty = std::mem::take(&mut state.dirty);
            let pages: Vec<_> = dirty.iter().map(|page| (*page, state.bits.page(*page))).collect();
            let header = (state.is_header_dirty || whole).then(|| next_header(&mut state));
            (dirty, pages, header)
        };
        self.latch(self.data.sync_data())?;
        let written = pages.iter().try_for_each(|(page, bytes)| self.write_page(*page, bytes));
        if let Err(e) = written {
            let mut state = self.write_state();
            state.dirty.extend(dirty);
            state.is_header_dirty |= header.is_some();
            return Err(e);
        }
        if !pages.is_empty() {
            self.latch(self.map.sync_data())?;
        }
        match header {
            Some(header) => self.write_header(&header),
            None => Ok(()),
        }
    }

    fn write_page(&self, page: u64, bytes: &[u8]) -> Result<()> {
        self.map
            .write_all_at(bytes, OVERLAY_BITMAP_OFFSET + page * PAGE_BYTES)
            .context(|| "the map of the clone cannot be written")
    }

    fn write_header(&self, header: &OverlayHeader) -> Result<()> {
        self.latch(self.map.write_all_at(&header.encode(), header.slot()))?;
        self.latch(self.map.sync_data())
    }

    fn latch(&self, result: std::io::Result<()>) -> Result<()> {
        result.map_err(|e| {
            self.has_failed.store(true, Ordering::Release);
            Error::io("the overlay cannot be synced", e)
        })
    }

    /// Sets the size.
    pub(super) fn truncate(&self, size: u64, now: Timestamp) -> Result<()> {
        if size > DISK_BYTES_MAX {
            return Err(Error::io("the disk would be too large", Errno::EFBIG.into()));
        }
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        self.verify_good()?;
        if size >= self.header().size {
            self.grow(size);
            return Ok(());
        }
        let _syncing = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        let header = {
            let mut state = self.write_state();
            state.header.size = size;
            state.header.base_limit = state.header.base_limit.min(size);
            state.header.mtime_ms = now.0;
            next_header(&mut state)
        };
        self.write_header(&header)?;
        let dropped = self.drop_beyond(size);
        if dropped.is_err() {
            // Half dropped: growing could show what was cut off.
            self.has_failed.store(true, Ordering::Release);
        }
        dropped
    }

    /// Bits and bytes beyond `size` go, durably.
    fn drop_beyond(&self, size: u64) -> Result<()> {
        let what = || "the overlay cannot be cut short";
        let blocks = size.div_ceil(BLOCK_BYTES);
        let end = blocks * BLOCK_BYTES;
        let (pages, last_is_ours) = {
            let mut state = self.write_state();
            let changed = state.bits.clear_from(blocks);
            let pages: Vec<_> = changed.iter().map(|page| (*page, state.bits.page(*page))).collect();
            (pages, size < end && state.bits.get(blocks.saturating_sub(1)))
        };
        if !pages.is_empty() {
            // The pages show other blocks too that were written since the last sync.
            self.data.sync_data().context(what)?;
        }
        for (page, bytes) in &pages {
            self.write_page(*page, bytes)?;
        }
        if !pages.is_empty() {
            self.map.sync_data().context(what)?;
        }
        let length = self.data.metadata().context(what)?.len();
        if length > end {
            self.data.set_len(end).context(what)?;
        }
        if last_is_ours && length > size {
            let zeros = vec![0; usize::try_from(end - size).unwrap_or(0)];
            self.data.write_all_at(&zeros, size).context(what)?;
        }
        Ok(())
    }

    /// Changes owner and mode; durable with the next sync.
    pub(super) fn set_owner(&self, mode: Option<u32>, uid: Option<u32>, gid: Option<u32>) {
        let mut state = self.write_state();
        let header = &mut state.header;
        header.mode = mode.map_or(header.mode, |mode| mode & 0o777);
        header.uid = uid.unwrap_or(header.uid);
        header.gid = gid.unwrap_or(header.gid);
        state.is_header_dirty = true;
    }
}

/// The header to be written now, with the next number.
fn next_header(state: &mut State) -> OverlayHeader {
    state.header.sequence += 1;
    state.is_header_dirty = false;
    state.header
}

fn read_header(map: &File) -> Result<OverlayHeader> {
    let mut slots = [[0; OVERLAY_HEADER_BYTES]; 2];
    for (slot, offset) in slots.iter_mut().zip(OVERLAY_SLOTS) {
        // A map that ends early has an unreadable slot, which is told below.
        match map.read_exact_at(slot, offset) {
            Err(e) if e.kind() != std::io::ErrorKind::UnexpectedEof => {
                return Err(Error::io("the map of a clone cannot be read", e));
            }
            _ => {}
        }
    }
    let [a, b] = &slots;
    OverlayHeader::newest([a, b])
}

/// All bits that the map file has; its holes are skipped.
fn read_bits(map: &File) -> Result<Bits> {
    let what = || "the map of a clone cannot be read";
    let mut bits = Bits::default();
    let length = map.metadata().context(what)?.len();
    let mut at = OVERLAY_BITMAP_OFFSET;
    while at < length {
        let start = match lseek64(map.as_fd(), i64::try_from(at).unwrap_or(i64::MAX), Whence::SeekData) {
            Ok(start) => u64::try_from(start).unwrap_or(length),
            Err(Errno::ENXIO) => break,
            Err(e) => return Err(e).context(what),
        };
        let number = (start.max(at) - OVERLAY_BITMAP_OFFSET) / PAGE_BYTES;
        if number >= PAGES_MAX {
            break;
        }
        at = OVERLAY_BITMAP_OFFSET + number * PAGE_BYTES;
        let mut page = vec![0; PAGE_BYTES as usize];
        let mut filled = 0;
        while let Some(rest) = page.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match map.read_at(rest, at + filled as u64).context(what)? {
                0 => break,
                n => filled += n,
            }
        }
        bits.set_page(number, &page);
        at += PAGE_BYTES;
    }
    Ok(bits)
}
