//! What an epoch does to the disk files: which part owns which bytes, and what becomes a hole.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::diskfile::{DiskFile, block_end, block_start};
use super::store::{VmStore, lock};
use super::undolog::read_tail;
use crate::base::error::Context;
use crate::base::{DiskId, Error, ErrorKind, ExtentMap, ExtentSet, Result};
use crate::format::part::PartIndex;
use crate::format::vaultstate::StoredManifest;

/// Who says what some bytes of a disk become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    /// A frame of a part, by their numbers.
    Frame {
        /// Number of the part in the manifest.
        part: u32,
        /// Number of the frame in the index of the part.
        frame: u32,
    },
    /// Nobody: a hole, because the disk is whole or new.
    Hole,
}

/// A part on disk.
pub(super) struct PlannedPart {
    pub path: PathBuf,
    pub index: PartIndex,
}

/// What happens to one disk.
pub(super) struct DiskPlan {
    pub disk: DiskFile,
    pub size: u64,
    /// Size of the disk file now; none: it is new.
    pub old_size: Option<u64>,
    pub owners: ExtentMap<Owner>,
}

impl DiskPlan {
    /// Every byte that the epoch changes, cut to what the disk file had: what must be undone.
    pub fn replaced(&self) -> ExtentSet {
        let Some(old) = self.old_size else { return ExtentSet::new() };
        let old_end = block_end(old);
        let mut set: ExtentSet = self.owners.iter().map(|(r, _)| r.start..r.end.min(old_end)).collect();
        if self.size < old {
            set.insert(block_start(self.size)..old_end);
        }
        set
    }
}

/// An epoch, planned.
pub(super) struct EpochPlan {
    pub parts: Vec<PlannedPart>,
    pub disks: Vec<DiskPlan>,
}

/// Gives every frame of the parts, in sequence, its bytes: later ones win.
pub(super) fn owners_of(disk: DiskId, end: u64, indexes: &[&PartIndex]) -> ExtentMap<Owner> {
    let mut owners = ExtentMap::new();
    for (part, index) in indexes.iter().enumerate() {
        let first = index.frames().partition_point(|f| f.disk < disk);
        for (n, frame) in index.frames().iter().enumerate().skip(first).take_while(|(_, f)| f.disk == disk) {
            let owner = Owner::Frame { part: part as u32, frame: n as u32 };
            owners.insert(frame.offset..frame.end().min(end), owner);
        }
    }
    owners
}

impl EpochPlan {
    /// Plans a committed epoch from the indexes of its parts. Makes the files of new disks.
    pub fn make(store: &VmStore, stored: &StoredManifest) -> Result<Self> {
        let manifest = &stored.manifest;
        let mut parts = Vec::with_capacity(manifest.parts.len());
        for part in &manifest.parts {
            let path = store.dir.part(manifest.epoch, &part.name);
            parts.push(PlannedPart { index: read_index(&path, part.length)?, path });
        }
        let before = disks_before(store)?;
        let shown = store.needed_disks();
        let indexes: Vec<&PartIndex> = parts.iter().map(|p| &p.index).collect();
        let mut disks = Vec::with_capacity(manifest.disks.len());
        for m in &manifest.disks {
            let (image, sums) = (store.dir.disk(m.id), store.dir.sums(m.id));
            let is_there =
                |path: &Path| path.try_exists().context(|| format!("cannot look for {}", path.display()));
            // One without the other was being made when we were killed: no point has it.
            let is_new = !is_there(&image)? || !is_there(&sums)?;
            if is_new && (before.contains(&m.id) || shown.contains(&m.id)) {
                return Err(Error::new(ErrorKind::Damaged, format!("disk {} of the vault is gone", m.id))
                    .why(format!("{} or {} is missing", image.display(), sums.display()))
                    .hint("check the disks of the vault: what shows them now shows less than they had"));
            }
            let disk = DiskFile::open(&store.dir, m.id, is_new)?;
            let old_size = if is_new { None } else { Some(disk.size()?) };
            let mut owners = owners_of(m.id, block_end(m.size), &indexes);
            // A disk that the parent did not have starts from nothing, whatever a file of an
            // older point holds.
            if m.whole || !before.contains(&m.id) {
                owners.insert_gaps(0..block_end(m.size), Owner::Hole);
            }
            disks.push(DiskPlan { disk, size: m.size, old_size, owners });
        }
        drop(indexes);
        crate::base::durable::sync_dir(&store.dir.disks())?;
        Ok(Self { parts, disks })
    }

    /// The content of a frame is data (and not zeros or a hole).
    pub fn is_data(&self, owner: Owner) -> bool {
        match owner {
            Owner::Hole => false,
            Owner::Frame { part, frame } => self
                .parts
                .get(part as usize)
                .and_then(|p| p.index.frames().get(frame as usize))
                .is_some_and(|f| !f.encoding.is_empty()),
        }
    }
}

/// The disks of the point that the disk files hold now.
fn disks_before(store: &VmStore) -> Result<Arc<[DiskId]>> {
    let Some(applied) = lock(&store.doc).applied else { return Ok([].into()) };
    let listed = lock(&store.shared).points.last().filter(|p| p.epoch() == applied.epoch).cloned();
    match listed {
        Some(point) => Ok(point.disks),
        // A point that cannot be shown has disks all the same.
        None => Ok(store.read_point(applied.epoch)?.manifest.disks.iter().map(|d| d.id).collect()),
    }
}

/// Reads the index of a part with two small reads.
pub(super) fn read_index(path: &Path, length: u64) -> Result<PartIndex> {
    PartIndex::decode(&read_index_bytes(path, length)?, length)
}

/// The bytes from the index of a part to its end.
pub(super) fn read_index_bytes(path: &Path, length: u64) -> Result<Vec<u8>> {
    let what = || format!("cannot read part {}", path.display());
    let file = File::open(path).context(what)?;
    let found = file.metadata().context(what)?.len();
    if found != length {
        return Err(
            Error::new(ErrorKind::Damaged, what()).why(format!("it has {found} bytes instead of {length}"))
        );
    }
    Ok(read_tail(&file, length, |footer| PartIndex::place(footer, length))?.0)
}
