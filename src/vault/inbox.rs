//! Receiving: parts, and the commit of an epoch.
//!
//! A part is written under another name, synced, renamed, and its folder synced: when `put_part`
//! returns it is durable, and a kill leaves nothing that looks like a part. The commit is the rename
//! of the manifest into the inbox; it needs no write of `state.json`, so a commit costs two syncs.
//!
//! What if the other side is older or newer? The version in the part and in the manifest is looked
//! at first. What if the disk is full? The part or commit is refused with NoSpace, which the shipper
//! tries again; what was received stays.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path};

use super::firstcopy::FirstCopy;
use super::layout::{make_dir, names, remove_dir, remove_file};
use super::plan::read_index_bytes;
use super::store::{VmStore, Waiting, head_of, lock};
use crate::base::durable::sync_dir;
use crate::base::error::Context;
use crate::base::limits::{DISK_BYTES_MAX, DISKS_PER_VM_MAX, PART_BYTES_MAX};
use crate::base::{Digest, EpochNumber, Error, ErrorKind, Result};
use crate::core::ports::vault::Head;
use crate::format::manifest::{MANIFEST_FORMAT, Manifest};
use crate::format::part::{PartName, PartReader, StoredPart};
use crate::format::vaultstate::StoredManifest;

/// Committed epochs that may wait in the inbox; with more, the vault says that it is busy.
const WAITING_EPOCHS_MAX: usize = 1024;

/// Stores a part; see [`crate::core::ports::vault::Vault::put_part`].
pub(super) fn put_part(store: &VmStore, epoch: EpochNumber, name: &PartName, bytes: &[u8]) -> Result<()> {
    store.check_latch()?;
    if let Some(head) = store.head()
        && epoch <= head.epoch
    {
        return Err(Error::new(ErrorKind::ChainBroken, format!("a part of epoch {epoch} is refused"))
            .why(format!("the vault has epoch {} already", head.epoch)));
    }
    let damaged = |why: &str| Error::new(ErrorKind::Damaged, format!("part {name} is refused")).why(why);
    let part = PartReader::new(bytes)?;
    if Digest::of(bytes) != name.digest {
        return Err(damaged("its bytes do not match its name: they were changed on the way"));
    }
    let mut intake = lock(&store.intake);
    store.check_open()?;
    if let Some(first) = intake.as_mut() {
        return first.put_part(store, name, bytes.len() as u64, &part);
    }
    drop(intake);
    write_part(store, epoch, name, bytes)?;
    lock(&store.shared).verified.insert(*name);
    Ok(())
}

fn write_part(store: &VmStore, epoch: EpochNumber, name: &PartName, bytes: &[u8]) -> Result<()> {
    let path = store.dir.part(epoch, name);
    if is_stored(&path, bytes.len() as u64) && lock(&store.shared).verified.contains(name) {
        return Ok(());
    }
    store.steps.step("make the folder of an epoch")?;
    make_dir(&store.dir.epoch(epoch))?;
    let temporary = path.with_extension("new");
    let what = || format!("cannot write part {}", path.display());
    store.steps.step("write a part")?;
    let mut options = OpenOptions::new();
    let file = options.write(true).create(true).truncate(true).mode(0o600).open(&temporary);
    let mut file = file.context(what)?;
    if let Err(e) = file.write_all(bytes) {
        remove_file(&temporary)?;
        return Err(e).context(what);
    }
    store.steps.step("sync a part")?;
    let synced = file.sync_data().context(what);
    if synced.is_err() {
        remove_file(&temporary)?;
    }
    store.latch(synced)?;
    store.steps.step("rename a part")?;
    fs::rename(&temporary, &path).context(what)?;
    store.latch(sync_dir(&store.dir.epoch(epoch)))?;
    store.steps.step("part durable")
}

fn is_stored(path: &Path, length: u64) -> bool {
    fs::metadata(path).is_ok_and(|m| m.is_file() && m.len() == length)
}

/// Durable parts of an uncommitted epoch, in sequence.
pub(super) fn parts(store: &VmStore, epoch: EpochNumber) -> Result<Vec<StoredPart>> {
    if let Some(first) = lock(&store.intake).as_ref() {
        return Ok(first.parts());
    }
    if store.head().is_some_and(|head| epoch <= head.epoch) {
        return Ok(Vec::new());
    }
    let mut out = Vec::new();
    for name in names(&store.dir.epoch(epoch))? {
        // Temporary files are no names of parts.
        let Ok(part) = name.parse::<PartName>() else { continue };
        let what = || format!("cannot look at part {name}");
        let length = fs::metadata(store.dir.part(epoch, &part)).context(what)?.len();
        out.push(StoredPart { name: part, length });
    }
    out.sort_by_key(|p| p.name);
    Ok(out)
}

/// The index of a stored part.
pub(super) fn part_index(store: &VmStore, epoch: EpochNumber, part: &StoredPart) -> Result<Vec<u8>> {
    if let Some(first) = lock(&store.intake).as_ref() {
        return first.part_index(store, &part.name);
    }
    read_index_bytes(&store.dir.part(epoch, &part.name), part.length)
}

/// Commits an epoch; see [`crate::core::ports::vault::Vault::commit`].
pub(super) fn commit(store: &VmStore, manifest: &Manifest) -> Result<Head> {
    store.check_latch()?;
    let digest = manifest.digest()?;
    let mut intake = lock(&store.intake);
    store.check_open()?;
    let head = store.head();
    if let Some(head) = head.filter(|h| h.digest == digest) {
        return Ok(head);
    }
    check_manifest(store, manifest)?;
    check_parent(manifest, head)?;
    let stored = StoredManifest { arrived: store.clock.now(), digest, manifest: manifest.clone() };
    if let Some(first) = intake.as_mut() {
        first.commit(store, &stored)?;
        *intake = None;
        return Ok(head_of(manifest.epoch, digest, manifest.cut_time));
    }
    if lock(&store.shared).queue.len() >= WAITING_EPOCHS_MAX {
        return Err(Error::new(ErrorKind::Busy, "the vault is behind in applying").why(format!(
            "{WAITING_EPOCHS_MAX} epochs wait; {}",
            lock(&store.shared).last_error.clone().unwrap_or_else(|| "it works on them".into())
        )));
    }
    verify_present(store, manifest)?;
    store.write(&store.dir.inbox_manifest(manifest.epoch), &stored.encode()?, "manifest in the inbox")?;
    let head = head_of(manifest.epoch, digest, manifest.cut_time);
    let bytes = manifest.parts.iter().map(|p| p.length).sum();
    {
        let mut shared = lock(&store.shared);
        shared.head = Some(head);
        shared.current_as_of = Some(manifest.cut_time);
        shared.queue.push_back(Waiting { epoch: manifest.epoch, bytes });
    }
    store.poke();
    // The epoch is committed: what cannot be tidied up now is when the vault is opened.
    if let Err(e) = remove_uncommitted(store, manifest.epoch) {
        log::warn!("VM {}: {e}", store.id);
    }
    Ok(head)
}

fn check_parent(manifest: &Manifest, head: Option<Head>) -> Result<()> {
    let what = || Error::new(ErrorKind::ChainBroken, format!("epoch {} is refused", manifest.epoch));
    let hint = "the VM is compared or shipped whole by itself; to begin now: afterimage resume NAME";
    let expected = head.map(|h| h.digest);
    if manifest.parent != expected {
        let named = manifest.parent.map_or_else(|| "none".into(), |d| d.short());
        let has = head.map_or_else(
            || "has no epoch of this VM".into(),
            |h| format!("has epoch {} ({})", h.epoch, h.digest.short()),
        );
        return Err(what().why(format!("it names {named} as its parent, the vault {has}")).hint(hint));
    }
    match head {
        Some(h) if manifest.epoch <= h.epoch => {
            Err(what().why(format!("the vault has epoch {} already", h.epoch)).hint(hint))
        }
        _ => Ok(()),
    }
}

/// Nothing in a manifest may lead outside of a folder or beyond a limit.
fn check_manifest(store: &VmStore, manifest: &Manifest) -> Result<()> {
    let refuse = |why: String| {
        Err(Error::new(ErrorKind::Damaged, format!("the manifest of epoch {} is refused", manifest.epoch))
            .why(why))
    };
    if manifest.format != MANIFEST_FORMAT {
        return Err(Error::new(ErrorKind::Version, "the manifest is refused")
            .why(format!("it has format {}, this program knows {MANIFEST_FORMAT}", manifest.format))
            .hint("use the same version of afterimage on both sides"));
    }
    if manifest.vm != store.id {
        return refuse(format!("it belongs to VM {}", manifest.vm));
    }
    if manifest.key_id != 0 {
        return refuse(format!(
            "its parts are encrypted with key {}, which is not known here",
            manifest.key_id
        ));
    }
    if manifest.disks.len() > DISKS_PER_VM_MAX {
        return refuse(format!("it has {} disks, more than {DISKS_PER_VM_MAX}", manifest.disks.len()));
    }
    let (mut ids, mut paths) = (BTreeSet::new(), BTreeSet::new());
    for disk in &manifest.disks {
        let mut components = disk.path.components().peekable();
        let inside = components.peek().is_some() && components.all(|c| matches!(c, Component::Normal(_)));
        if !inside || disk.size > DISK_BYTES_MAX {
            return refuse(format!("{} cannot be a disk of {} bytes", disk.path.display(), disk.size));
        }
        if !ids.insert(disk.id) || !paths.insert(&disk.path) {
            return refuse(format!("disk {} is named twice", disk.path.display()));
        }
    }
    for file in &manifest.definition {
        let mut components = Path::new(&file.name).components();
        let plain = matches!((components.next(), components.next()), (Some(Component::Normal(_)), None));
        if !plain || file.name.contains('/') {
            return refuse(format!("{:?} cannot be the name of a definition file", file.name));
        }
    }
    if !manifest.parts.is_sorted_by(|a, b| a.name.sequence < b.name.sequence) {
        return refuse("its parts are not in sequence".into());
    }
    Ok(())
}

/// Every part is there, durable, of the right length and digest. A part that was put under another
/// uncommitted epoch (the shipper gave up a cut between two passes) is moved here.
fn verify_present(store: &VmStore, manifest: &Manifest) -> Result<()> {
    make_dir(&store.dir.epoch(manifest.epoch))?;
    let mut is_moved = false;
    for part in &manifest.parts {
        let path = store.dir.part(manifest.epoch, &part.name);
        if !is_stored(&path, part.length) {
            is_moved |= fetch_from_other_epoch(store, manifest.epoch, part)?;
        }
        let what = || Error::new(ErrorKind::Io, format!("epoch {} cannot be committed", manifest.epoch));
        match fs::metadata(&path) {
            Err(_) => return Err(what().why(format!("part {} is missing", part.name))),
            Ok(m) if m.len() != part.length => {
                remove_file(&path)?;
                let why = format!("part {} has {} bytes instead of {}", part.name, m.len(), part.length);
                return Err(what().why(why));
            }
            Ok(_) => {}
        }
        if lock(&store.shared).verified.contains(&part.name) {
            continue;
        }
        let bytes = crate::base::durable::read_limited(&path, PART_BYTES_MAX)?.unwrap_or_default();
        if Digest::of(&bytes) != part.name.digest {
            // It has to be sent again, so it must not be listed.
            remove_file(&path)?;
            return Err(
                what().why(format!("part {} was damaged in the vault; it has to be sent again", part.name))
            );
        }
        lock(&store.shared).verified.insert(part.name);
    }
    if is_moved { store.latch(sync_dir(&store.dir.epoch(manifest.epoch))) } else { Ok(()) }
}

fn fetch_from_other_epoch(store: &VmStore, epoch: EpochNumber, part: &StoredPart) -> Result<bool> {
    for other in uncommitted(store, EpochNumber(u64::MAX))?.into_iter().filter(|e| *e != epoch) {
        let path = store.dir.part(other, &part.name);
        if is_stored(&path, part.length) {
            let to = store.dir.part(epoch, &part.name);
            store.steps.step("move a part")?;
            fs::rename(&path, &to).context(|| format!("cannot move part {}", path.display()))?;
            return Ok(true);
        }
    }
    Ok(false)
}

/// Epochs below `below` that have a folder in the inbox and no manifest.
fn uncommitted(store: &VmStore, below: EpochNumber) -> Result<Vec<EpochNumber>> {
    let epochs = names(&store.dir.inbox())?.into_iter().filter_map(|n| n.parse().ok().map(EpochNumber));
    Ok(epochs.filter(|e| *e < below && !store.dir.inbox_manifest(*e).exists()).collect())
}

/// What lies below the head and is not committed never will be.
fn remove_uncommitted(store: &VmStore, head: EpochNumber) -> Result<()> {
    let waiting: BTreeSet<EpochNumber> = lock(&store.shared).queue.iter().map(|w| w.epoch).collect();
    for epoch in uncommitted(store, head)?.into_iter().filter(|e| !waiting.contains(e)) {
        store.steps.step("remove an uncommitted epoch")?;
        remove_dir(&store.dir.epoch(epoch))?;
    }
    Ok(())
}

/// Throws away an uncommitted epoch.
pub(super) fn abandon(store: &VmStore, epoch: EpochNumber) -> Result<()> {
    let mut intake = lock(&store.intake);
    store.check_open()?;
    if let Some(first) = intake.as_mut() {
        first.abandon(store)?;
        *first = FirstCopy::default();
        return Ok(());
    }
    if store.head().is_some_and(|head| epoch <= head.epoch) {
        return Ok(());
    }
    for part in names(&store.dir.epoch(epoch))?.iter().filter_map(|n| n.parse().ok()) {
        lock(&store.shared).verified.remove(&part);
    }
    store.steps.step("remove an abandoned epoch")?;
    remove_dir(&store.dir.epoch(epoch))
}
