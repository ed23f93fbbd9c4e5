//! The change-tracking log (HRL) of one disk and epoch, as a file beside its disk.
//!
//! Marks reach it lazily: those of the current epoch when regions cool, at a clean stop and on
//! request; those of a frozen one when it is frozen. The format is `format::hrl`. Every name is
//! made and removed relative to the lower folder, because the mount may lie over it.
//!
//! Killed while appending: shared memory has the marks, and a torn tail is not appended to again.
//! Disk full: the append is undone in memory, the marks stay in shared memory, and it is tried
//! again; regions do not cool until it succeeds.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{BufReader, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, renameat};
use nix::sys::stat::{Mode, SFlag, fstatat};
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::map::DiskMaps;
use crate::base::error::Context;
use crate::base::{BootId, DiskId, EpochNumber, Error, ErrorKind, Result, Timestamp, VmId};
use crate::format::hrl::{
    self, HRL_HEADER_BYTES, HrlEncoder, HrlHeader, HrlRecord, HrlReport, is_hrl_header,
};

/// Longest file name.
const NAME_BYTES_MAX: usize = 255;

/// One file.
pub(crate) struct HrlFile {
    file: Arc<File>,
    folder: Arc<File>,
    name: OsString,
    pub(crate) epoch: u64,
    encoder: HrlEncoder,
    /// Number of marks of each chunk that the file has; marks only grow, so it tells a change.
    written: HashMap<u64, u64>,
    synced: bool,
}

/// What a new file is made for.
pub(crate) struct HrlPlace<'a> {
    pub(crate) folder: &'a Arc<File>,
    pub(crate) disk_name: &'a OsStr,
    pub(crate) path: &'a str,
    pub(crate) vm: VmId,
    pub(crate) disk: DiskId,
    pub(crate) boot: BootId,
}

/// Name of the file: that of the disk, cut where it would be too long, then with the disk's id.
fn name_of(disk_name: &OsStr, disk: DiskId, epoch: u64, attempt: u32) -> OsString {
    let mut tail = match attempt {
        0 => format!(".{epoch}.hrl"),
        n => format!(".{epoch}.{n}.hrl"),
    };
    let mut name = disk_name.as_bytes().to_vec();
    if name.len() + tail.len() > NAME_BYTES_MAX {
        tail = format!(".{:032x}{tail}", disk.0);
        name.truncate(NAME_BYTES_MAX - tail.len());
    }
    name.extend_from_slice(tail.as_bytes());
    OsString::from_vec(name)
}

impl HrlFile {
    /// Makes a file with its header. A name that is taken, whoever's file it is, is left alone.
    pub(crate) fn create(place: &HrlPlace<'_>, epoch: u64, now: Timestamp) -> Result<Self> {
        let header = HrlHeader {
            vm: place.vm,
            disk: place.disk,
            epoch: EpochNumber(epoch),
            created: now,
            boot: place.boot,
            path: place.path.to_owned(),
            nonce: rand::random(),
        };
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        for attempt in 0..1000 {
            let name = name_of(place.disk_name, place.disk, epoch, attempt);
            let what = || format!("the change-tracking log {} cannot be made", name.display());
            let fd = match openat(place.folder, name.as_os_str(), flags, Mode::S_IRUSR | Mode::S_IWUSR) {
                Err(Errno::EEXIST) => continue,
                other => other.context(what)?,
            };
            let file = File::from(fd);
            if let Err(e) = file.write_all_at(&header.encode(), 0) {
                let _ = unlinkat(place.folder, name.as_os_str(), UnlinkatFlags::NoRemoveDir);
                return Err(Error::io(what(), e));
            }
            return Ok(Self {
                file: Arc::new(file),
                folder: place.folder.clone(),
                encoder: HrlEncoder::new(&header),
                name,
                epoch,
                written: HashMap::new(),
                synced: false,
            });
        }
        Err(Error::new(ErrorKind::Exists, "the change-tracking log cannot be made")
            .why("its names are taken"))
    }

    /// The open file, for preserved blocks.
    pub(crate) fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Bytes on disk.
    pub(crate) fn bytes_on_disk(&self) -> u64 {
        self.file.metadata().map_or(0, |m| m.blocks() * 512)
    }

    /// Appends what the map has and the file has not. Nothing is synced.
    pub(crate) fn append_map(&mut self, maps: &DiskMaps, map: usize) -> Result<()> {
        let mut bytes = Vec::new();
        let mut counts = Vec::new();
        let (mut encoder, offset) = (self.encoder.clone(), self.encoder.offset());
        for chunk in maps.marked_chunks(map) {
            let bits = maps.chunk_bits(map, chunk);
            let count: u64 = bits.iter().map(|w| u64::from(w.count_ones())).sum();
            if self.written.get(&chunk) != Some(&count) {
                encoder.chunk(u32::try_from(chunk).unwrap_or(u32::MAX), &bits, &mut bytes);
                counts.push((chunk, count));
            }
        }
        self.write(&bytes, offset)?;
        self.encoder = encoder;
        self.written.extend(counts);
        Ok(())
    }

    /// Appends a record. Nothing is synced.
    pub(crate) fn append(&mut self, record: &HrlRecord) -> Result<()> {
        self.append_all(std::slice::from_ref(record))
    }

    /// Appends records. Nothing is synced.
    pub(crate) fn append_all(&mut self, records: &[HrlRecord]) -> Result<()> {
        let mut bytes = Vec::new();
        let (mut encoder, offset) = (self.encoder.clone(), self.encoder.offset());
        records.iter().for_each(|r| encoder.record(r, &mut bytes));
        self.write(&bytes, offset)?;
        self.encoder = encoder;
        Ok(())
    }

    fn write(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.synced = false;
        self.file.write_all_at(bytes, offset).context(|| self.what("written"))
    }

    fn what(&self, done: &str) -> String {
        format!("the change-tracking log {} cannot be {done}", self.name.display())
    }

    /// Makes the file and its name durable. The sync record goes first: what comes before it and
    /// cannot be read later is damage, not a torn tail.
    pub(crate) fn sync(&mut self) -> Result<()> {
        if self.synced {
            return Ok(());
        }
        self.append(&HrlRecord::Sync)?;
        self.file.sync_all().and_then(|()| self.folder.sync_all()).context(|| self.what("synced"))?;
        self.synced = true;
        Ok(())
    }

    /// Makes it durable as it is: one with a torn tail is never appended to.
    pub(crate) fn sync_as_is(&mut self) -> Result<()> {
        if !self.synced {
            self.file.sync_all().and_then(|()| self.folder.sync_all()).context(|| self.what("synced"))?;
            self.synced = true;
        }
        Ok(())
    }

    /// Removes the file. Preserved data that a late writer still adds goes with its last user.
    pub(crate) fn remove(&self) {
        if let Err(e) = unlinkat(&self.folder, self.name.as_os_str(), UnlinkatFlags::NoRemoveDir)
            && e != Errno::ENOENT
        {
            log::warn!("{}: {e}", self.what("removed"));
        }
    }

    /// That it was removed survives a power cut; if not, it is found again and believed.
    pub(crate) fn sync_removal(&self) {
        if let Err(e) = self.folder.sync_all() {
            log::warn!("{} durably: {e}", self.what("removed"));
        }
    }

    /// Whether it is in this (opened) folder.
    pub(crate) fn is_in(&self, folder: &Arc<File>) -> bool {
        Arc::ptr_eq(&self.folder, folder)
    }

    /// The disk has moved: so does its log. A failure leaves it where it is, where it is found by
    /// nobody after a restart, so the caller makes the disk whole.
    pub(crate) fn move_to(&mut self, folder: &Arc<File>, disk_name: &OsStr, disk: DiskId) -> Result<()> {
        let taken = |name: &OsStr| fstatat(folder, name, AtFlags::AT_SYMLINK_NOFOLLOW).is_ok_and(|_| true);
        let name = (0..1000).map(|n| name_of(disk_name, disk, self.epoch, n)).find(|n| !taken(n));
        let name = name.ok_or_else(|| Error::new(ErrorKind::Exists, self.what("moved")))?;
        renameat(&self.folder, self.name.as_os_str(), folder, name.as_os_str())
            .context(|| self.what("moved"))?;
        self.folder = folder.clone();
        self.name = name;
        self.synced = false;
        Ok(())
    }
}

/// What was found beside a disk.
pub(crate) struct HrlFound {
    pub(crate) name: OsString,
    pub(crate) file: File,
    /// `None`: its header or its synced content cannot be read.
    pub(crate) report: Option<HrlReport>,
    /// From the first 64 bytes.
    pub(crate) disk: DiskId,
}

impl HrlFound {
    /// Takes the file over, to append to it or to remove it.
    pub(crate) fn adopt(self, folder: &Arc<File>) -> Option<(HrlFile, HrlReport)> {
        let report = self.report?;
        let file = HrlFile {
            file: Arc::new(self.file),
            folder: folder.clone(),
            name: self.name,
            epoch: report.header.epoch.0,
            encoder: HrlEncoder::resume(&report),
            written: HashMap::new(),
            synced: false,
        };
        Some((file, report))
    }
}

/// Every HRL of `disk` in a folder, recognised by its header. An error means that the folder
/// itself cannot be read.
pub(crate) fn find(folder: &File, disk: DiskId) -> Result<Vec<HrlFound>> {
    let what = || "the folder of a disk cannot be read";
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let mut dir = Dir::openat(folder, ".", flags, Mode::empty()).context(what)?;
    let mut found = Vec::new();
    for entry in dir.iter() {
        let entry = entry.context(what)?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes()).to_owned();
        if name.as_bytes().ends_with(b".hrl")
            && let Some(hrl) = open_one(folder, name)?
            && hrl.disk == disk
        {
            found.push(hrl);
        }
    }
    Ok(found)
}

fn open_one(folder: &File, name: OsString) -> Result<Option<HrlFound>> {
    let is_file =
        |s: nix::sys::stat::FileStat| SFlag::from_bits_truncate(s.st_mode) & SFlag::S_IFMT == SFlag::S_IFREG;
    if !fstatat(folder, name.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW).is_ok_and(is_file) {
        return Ok(None);
    }
    let flags = OFlag::O_RDWR | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    let Ok(fd) = openat(folder, name.as_os_str(), flags, Mode::empty()) else { return Ok(None) };
    let file = File::from(fd);
    let mut prefix = vec![0u8; HRL_HEADER_BYTES];
    let length = file.read_at(&mut prefix, 0).context(|| format!("{} cannot be read", name.display()))?;
    prefix.truncate(length);
    if !is_hrl_header(&prefix) {
        return Ok(None);
    }
    let disk: [u8; 16] = prefix.get(32..48).and_then(|b| b.try_into().ok()).unwrap_or_default();
    let mut source = BufReader::new((&file).take(hrl::PRESERVED_OFFSET));
    let report = match hrl::read(&mut source) {
        Ok(report) if report.is_complete() => Some(report),
        Ok(_) => None,
        Err(e) => {
            log::warn!("{}: {e}", name.display());
            None
        }
    };
    Ok(Some(HrlFound { name, file, report, disk: DiskId(u128::from_le_bytes(disk)) }))
}

/// Removes a file that was found and cannot be used.
pub(crate) fn discard(folder: &File, found: &HrlFound) {
    let _ = unlinkat(folder, found.name.as_os_str(), UnlinkatFlags::NoRemoveDir);
}
