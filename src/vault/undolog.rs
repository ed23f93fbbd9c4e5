//! An undo log on disk, and the merged index through which a point is shown.
//!
//! A log that was merged into another or dropped is *superseded*: whoever reads through it goes on,
//! and the file is removed when the last of them lets go. After a kill it is a leftover that
//! `state.json` does not name.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::layout::remove_file;
use crate::base::error::Context;
use crate::base::{DiskId, EpochNumber, Error, ErrorKind, ExtentMap, Result};
use crate::format::frames::{FOOTER_BYTES, Frame};
use crate::format::undo::UndoIndex;

/// A published undo log.
pub(super) struct UndoLog {
    path: PathBuf,
    /// The epoch that replaced the content.
    pub epoch: EpochNumber,
    /// The point that is shown with it.
    pub base: EpochNumber,
    index: Mutex<Weak<UndoIndex>>,
    is_superseded: AtomicBool,
}

impl UndoLog {
    pub fn new(path: PathBuf, epoch: EpochNumber, base: EpochNumber) -> Arc<Self> {
        Arc::new(Self { path, epoch, base, index: Mutex::default(), is_superseded: AtomicBool::new(false) })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its file goes when nobody reads it any more.
    pub fn supersede(&self) {
        self.is_superseded.store(true, Ordering::SeqCst);
    }

    fn what(&self) -> String {
        format!("cannot read the undo log {}", self.path.display())
    }

    /// Reads and checks the index: two small reads, never the payload.
    pub fn index(&self) -> Result<Arc<UndoIndex>> {
        let mut cached = self.index.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(index) = cached.upgrade() {
            return Ok(index);
        }
        let file = File::open(&self.path).context(|| self.what())?;
        let length = file.metadata().context(|| self.what())?.len();
        let (tail, _) = read_tail(&file, length, |footer| UndoIndex::place(footer, length))
            .map_err(|e| e.why(format!("undo log {}", self.path.display())))?;
        let index = Arc::new(UndoIndex::decode(&tail, length)?);
        let meta = index.meta();
        if (meta.epoch, meta.base) != (self.epoch, self.base) {
            return Err(Error::new(ErrorKind::Damaged, self.what()).why("it belongs to other points"));
        }
        *cached = Arc::downgrade(&index);
        Ok(index)
    }

    /// The stored bytes of a frame, not verified yet.
    pub fn read_stored(&self, frame: &Frame) -> Result<Vec<u8>> {
        let mut stored = vec![0; frame.stored as usize];
        if !stored.is_empty() {
            let file = File::open(&self.path).context(|| self.what())?;
            // What the disk below cannot read is as lost as what it reads wrong.
            let read = file.read_exact_at(&mut stored, frame.place).context(|| self.what());
            read.map_err(|e| e.with_kind(ErrorKind::Damaged))?;
        }
        Ok(stored)
    }

    /// The verified content of a frame.
    pub fn read_frame(&self, frame: &Frame) -> Result<Vec<u8>> {
        let mut content = vec![0; usize::try_from(frame.length).unwrap_or(0)];
        frame.decode_content(&self.read_stored(frame)?, &mut content).map_err(|e| {
            e.hint(format!(
                "check the disks of the vault ({}); newer points may be whole",
                self.path.display()
            ))
        })?;
        Ok(content)
    }
}

impl Drop for UndoLog {
    fn drop(&mut self) {
        if self.is_superseded.load(Ordering::SeqCst) {
            // A leftover is removed when the vault is opened the next time.
            let _ = remove_file(&self.path);
        }
    }
}

/// Reads the end of a file of frames, from the place that its footer names; returns the place too.
pub(super) fn read_tail(
    file: &File,
    length: u64,
    place: impl Fn(&[u8]) -> Result<u64>,
) -> Result<(Vec<u8>, u64)> {
    let what = || "cannot read the end of a file of frames";
    let Some(footer_at) = length.checked_sub(FOOTER_BYTES as u64) else {
        return Err(Error::new(ErrorKind::Damaged, what()).why("it is too short"));
    };
    let mut footer = [0; FOOTER_BYTES];
    file.read_exact_at(&mut footer, footer_at).context(what)?;
    // The place was checked against the length, so the allocation is bounded by the file.
    let place = place(&footer)?;
    let mut tail = vec![0; usize::try_from(length - place).unwrap_or(0)];
    file.read_exact_at(&mut tail, place).context(what)?;
    Ok((tail, place))
}

/// Which frame of which log shows some bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    log: u32,
    frame: u32,
}

/// The undo logs after a point, merged: the older one wins.
#[derive(Clone)]
pub(super) struct Merged {
    logs: Vec<(Arc<UndoLog>, Arc<UndoIndex>)>,
    disks: BTreeMap<DiskId, ExtentMap<Place>>,
    /// The newest epoch whose log is in.
    pub upto: EpochNumber,
}

impl Merged {
    /// The index of a point without newer epochs.
    pub fn new(point: EpochNumber) -> Self {
        Self { logs: Vec::new(), disks: BTreeMap::new(), upto: point }
    }

    /// Takes in the logs of newer epochs; `chain` is ascending. Logs that were merged meanwhile are
    /// fine: what they repeat is in already and wins.
    pub fn extend(&mut self, chain: &[Arc<UndoLog>]) -> Result<()> {
        let first = chain.partition_point(|log| log.epoch <= self.upto);
        for log in chain.iter().skip(first) {
            let index = log.index()?;
            let number = self.logs.len() as u32;
            for (n, frame) in index.frames().iter().enumerate() {
                let place = Place { log: number, frame: n as u32 };
                self.disks.entry(frame.disk).or_default().insert_gaps(frame.range(), place);
            }
            self.logs.push((Arc::clone(log), index));
            self.upto = log.epoch;
        }
        Ok(())
    }

    /// The index of an older point: `older` are the logs between the two, ascending.
    pub fn extend_back(&self, older: &[Arc<UndoLog>]) -> Result<Self> {
        let mut out = self.clone();
        for log in older.iter().rev() {
            let index = log.index()?;
            let number = out.logs.len() as u32;
            for (n, frame) in index.frames().iter().enumerate() {
                let place = Place { log: number, frame: n as u32 };
                out.disks.entry(frame.disk).or_default().insert(frame.range(), place);
            }
            out.logs.push((Arc::clone(log), index));
        }
        Ok(out)
    }

    /// Number of ranges, as a measure of its memory.
    pub fn weight(&self) -> usize {
        self.disks.values().map(ExtentMap::len).sum()
    }

    /// The ranges of a disk; `None`: no log has any of it.
    pub fn disk(&self, disk: DiskId) -> Option<&ExtentMap<Place>> {
        self.disks.get(&disk)
    }

    /// The log and frame of a place.
    pub fn frame(&self, place: Place) -> Result<(&Arc<UndoLog>, &Frame)> {
        let found = self.logs.get(place.log as usize);
        let found = found.and_then(|(log, index)| Some((log, index.frames().get(place.frame as usize)?)));
        found.ok_or_else(|| {
            Error::new(ErrorKind::Internal, "the merged index names a frame that is not there")
        })
    }
}
