//! The first epoch of a VM: applied as it arrives, because it has no point to protect (A3).
//!
//! The content of a part goes straight into the disk files; of the part itself only its end (index
//! and footer) is kept, as the proof that it is applied and durable: `PART.index`. So the copy is
//! written once, and the vault needs the room once.
//!
//! Later parts win, in whatever order they come: a part writes only what no later one has. Parts
//! that the manifest does not name in the end (an attempt that was given up) leave no trace: what
//! none of the named parts owns becomes a hole at the commit, and a named part that lost blocks to
//! one that is not named has to be sent again.
//!
//! What if we are killed here? A part that overwrites blocks of others announces that first with a
//! durable `PART.begun`; after a kill the parts that it may have hurt lose their proof and are sent
//! again. Its own blocks are nobody's, until its proof is there. All parts of the VM share one
//! folder, whatever their epoch: the passes of a first copy may span several.

use std::collections::btree_map::Entry::Vacant;
use std::collections::{BTreeMap, BTreeSet};

use super::apply::add_point;
use super::diskfile::{DiskFile, block_end};
use super::layout::{make_dir, names, remove_dir, remove_disks_except, remove_file};
use super::plan::{Owner, owners_of};
use super::store::VmStore;
use crate::base::durable::{read_limited, sync_dir};
use crate::base::limits::{DISK_BYTES_MAX, FRAME_BYTES_MAX, PART_BYTES_MAX};
use crate::base::{DiskId, Error, ErrorKind, ExtentSet, Result};
use crate::format::part::{PartIndex, PartName, PartReader, StoredPart};
use crate::format::vaultstate::StoredManifest;

/// Parts that are applied already.
#[derive(Default)]
pub(super) struct FirstCopy {
    parts: BTreeMap<PartName, Applied>,
}

struct Applied {
    length: u64,
    index: PartIndex,
    covered: BTreeMap<DiskId, ExtentSet>,
}

impl Applied {
    fn new(length: u64, index: PartIndex) -> Self {
        let covered = index.covered();
        Self { length, index, covered }
    }

    fn touches(&self, covered: &BTreeMap<DiskId, ExtentSet>) -> bool {
        covered.iter().any(|(disk, set)| {
            self.covered.get(disk).is_some_and(|mine| set.iter().any(|r| mine.intersects(r)))
        })
    }
}

impl FirstCopy {
    /// Finds what is applied after a restart.
    pub fn load(store: &super::layout::VmDir) -> Result<Self> {
        let dir = store.first();
        let mut out = Self::default();
        let mut begun = Vec::new();
        for name in names(&dir)? {
            let Some((stem, extension)) = name.rsplit_once('.') else { continue };
            let Ok(part) = stem.parse::<PartName>() else { continue };
            let tail = read_limited(&dir.join(&name), PART_BYTES_MAX)?.unwrap_or_default();
            let (index, length) = PartIndex::decode_kept(&tail)?;
            match extension {
                "index" => drop(out.parts.insert(part, Applied::new(length, index))),
                _ => begun.push((part, index.covered())),
            }
        }
        for (part, covered) in begun {
            // Finished, but for the removal of the announcement?
            if !out.parts.contains_key(&part) {
                let hurt: Vec<PartName> =
                    out.parts.iter().filter(|(_, a)| a.touches(&covered)).map(|(n, _)| *n).collect();
                for name in hurt {
                    remove_file(&dir.join(format!("{name}.index")))?;
                    out.parts.remove(&name);
                }
                sync_dir(&dir)?;
            }
            remove_file(&dir.join(format!("{part}.begun")))?;
        }
        Ok(out)
    }

    /// Whether nothing is applied.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Parts that are durable, in sequence.
    pub fn parts(&self) -> Vec<StoredPart> {
        self.parts.iter().map(|(name, a)| StoredPart { name: *name, length: a.length }).collect()
    }

    /// The end of a part.
    pub fn part_index(&self, store: &VmStore, name: &PartName) -> Result<Vec<u8>> {
        let path = store.dir.first().join(format!("{name}.index"));
        read_limited(&path, PART_BYTES_MAX)?
            .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("no part {name} in the vault")))
    }

    /// Applies a part and keeps its proof.
    pub fn put_part(
        &mut self,
        store: &VmStore,
        name: &PartName,
        length: u64,
        part: &PartReader<'_>,
    ) -> Result<()> {
        if self.parts.contains_key(name) {
            return Ok(());
        }
        store.steps.step("begin a part of the first copy")?;
        make_dir(&store.dir.first())?;
        let dir = store.dir.first();
        let rivals: Vec<PartName> =
            self.parts.keys().copied().filter(|n| n.sequence == name.sequence).collect();
        for rival in &rivals {
            self.forget(store, rival)?;
        }
        if !rivals.is_empty() {
            store.latch(sync_dir(&dir))?;
        }
        let me = Applied::new(length, part.index().clone());
        let mut later: BTreeMap<DiskId, ExtentSet> = BTreeMap::new();
        for (_, other) in self.parts.iter().filter(|(n, _)| n.sequence > name.sequence) {
            other.covered.iter().for_each(|(d, set)| later.entry(*d).or_default().union_with(set));
        }
        let begun = dir.join(format!("{name}.begun"));
        if self.parts.values().any(|a| a.touches(&me.covered)) {
            store.write(&begun, part.tail(), "announce a part of the first copy")?;
        }
        write_frames(store, part, &later)?;
        store.write(&dir.join(format!("{name}.index")), part.tail(), "proof of a part")?;
        remove_file(&begun)?;
        self.parts.insert(*name, me);
        Ok(())
    }

    fn forget(&mut self, store: &VmStore, name: &PartName) -> Result<()> {
        self.parts.remove(name);
        store.steps.step("forget a part of the first copy")?;
        remove_file(&store.dir.first().join(format!("{name}.index")))
    }

    /// The disks hold exactly what the manifest names; it becomes the first point.
    pub fn commit(&mut self, store: &VmStore, stored: &StoredManifest) -> Result<()> {
        self.check_parts(store, stored)?;
        let m = &stored.manifest;
        let named: Vec<&PartIndex> =
            m.parts.iter().filter_map(|p| self.parts.get(&p.name)).map(|a| &a.index).collect();
        make_dir(&store.dir.disks())?;
        for disk in &m.disks {
            store.steps.step("finish a disk of the first copy")?;
            let file = DiskFile::open(&store.dir, disk.id, true)?;
            let end = block_end(disk.size);
            file.set_size(disk.size)?;
            for gap in owners_of(disk.id, end, &named).gaps(0..end) {
                file.punch(gap)?;
            }
            store.latch(file.sync())?;
        }
        store.latch(sync_dir(&store.dir.disks()))?;
        add_point(store, stored)?;
        self.parts.clear();
        // The point is published: what cannot be tidied up now is when the vault is opened.
        let keep: BTreeSet<DiskId> = m.disks.iter().map(|d| d.id).collect();
        let tidied = store.steps.step("tidy up after the first copy");
        let tidied = tidied.and_then(|()| remove_disks_except(&store.dir, &keep));
        if let Err(e) = tidied.and_then(|()| remove_dir(&store.dir.first())) {
            log::warn!("VM {}: {e}", store.id);
        }
        Ok(())
    }

    /// Every named part is applied and owns what it should.
    fn check_parts(&mut self, store: &VmStore, stored: &StoredManifest) -> Result<()> {
        let m = &stored.manifest;
        let what = || Error::new(ErrorKind::Io, format!("epoch {} cannot be committed", m.epoch));
        for part in &m.parts {
            match self.parts.get(&part.name) {
                Some(a) if a.length == part.length => {}
                _ => return Err(what().why(format!("part {} is missing", part.name))),
            }
        }
        let named: BTreeSet<PartName> = m.parts.iter().map(|p| p.name).collect();
        let foreign: Vec<PartName> = self.parts.keys().copied().filter(|n| !named.contains(n)).collect();
        let order: Vec<PartName> = self.parts.keys().copied().collect();
        let indexes: Vec<&PartIndex> = self.parts.values().map(|a| &a.index).collect();
        let mut hurt = BTreeSet::new();
        if !foreign.is_empty() {
            for disk in &m.disks {
                let end = block_end(disk.size);
                let wins = owners_of(disk.id, end, &indexes);
                // A named part is hurt where one that is not named wins over it.
                for name in &named {
                    let Some(mine) = self.parts.get(name).and_then(|a| a.covered.get(&disk.id)) else {
                        continue;
                    };
                    let is_hurt = mine.iter().flat_map(|r| wins.overlaps(r)).any(|(_, o)| match o {
                        Owner::Frame { part, .. } => {
                            order.get(part as usize).is_some_and(|winner| !named.contains(winner))
                        }
                        Owner::Hole => false,
                    });
                    if is_hurt {
                        hurt.insert(*name);
                    }
                }
            }
        }
        if hurt.is_empty() {
            return Ok(());
        }
        let count = hurt.len();
        for name in foreign.iter().chain(&hurt) {
            self.forget(store, name)?;
        }
        store.latch(sync_dir(&store.dir.first()))?;
        Err(what()
            .why(format!("{count} parts were overwritten by parts that it does not name; send them again")))
    }

    /// Forgets everything, content too.
    pub fn abandon(&mut self, store: &VmStore) -> Result<()> {
        store.steps.step("abandon the first copy")?;
        remove_dir(&store.dir.first())?;
        store.latch(sync_dir(&store.dir.inbox()))?;
        self.parts.clear();
        remove_disks_except(&store.dir, &BTreeSet::new())
    }
}

/// Writes what no later part has, and syncs.
fn write_frames(store: &VmStore, part: &PartReader<'_>, later: &BTreeMap<DiskId, ExtentSet>) -> Result<()> {
    let mut files: BTreeMap<DiskId, DiskFile> = BTreeMap::new();
    let mut content = vec![0; FRAME_BYTES_MAX as usize];
    let none = ExtentSet::new();
    let mut is_new = false;
    make_dir(&store.dir.disks())?;
    store.steps.step("write a part of the first copy")?;
    for frame in part.index().frames() {
        if let Vacant(place) = files.entry(frame.disk) {
            is_new |= !store.dir.disk(frame.disk).exists();
            place.insert(DiskFile::open(&store.dir, frame.disk, true)?);
        }
        let Some(file) = files.get(&frame.disk) else { continue };
        let mine = later.get(&frame.disk).unwrap_or(&none).gaps(frame.range());
        if frame.encoding.is_empty() {
            mine.into_iter().try_for_each(|range| file.punch(range))?;
            continue;
        }
        if mine.is_empty() {
            continue;
        }
        let content = content.get_mut(..frame.length as usize).unwrap_or_default();
        part.read(frame, content)?;
        for range in mine {
            let from = (range.start - frame.offset) as usize;
            let to = (range.end - frame.offset) as usize;
            file.write(range.start, content.get(from..to).unwrap_or_default(), DISK_BYTES_MAX)?;
        }
    }
    store.steps.step("sync a part of the first copy")?;
    for file in files.values() {
        store.latch(file.sync())?;
    }
    if is_new { store.latch(sync_dir(&store.dir.disks())) } else { Ok(()) }
}
