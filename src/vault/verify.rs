//! Every stored byte of a VM against its checksums.

use super::diskfile::{DiskFile, Stored};
use super::store::{VmStore, lock};
use crate::base::limits::PART_BYTES_MAX;
use crate::base::{BLOCK_BYTES, Digest, DiskId, EpochNumber, Result};

/// Bytes that are read and verified at once.
const PIECE_BYTES: u64 = 1 << 20;

/// Verifies disks, undo logs, manifests and what waits in the inbox. Returns what is damaged, in
/// words; epochs go on being applied meanwhile.
pub(super) fn verify(store: &VmStore) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for id in store.needed_disks() {
        verify_disk(store, id, &mut found)?;
    }
    let points: Vec<EpochNumber> = lock(&store.doc).points().collect();
    for epoch in points {
        let is_point = || lock(&store.doc).points().any(|p| p == epoch);
        if let Err(e) = store.read_point(epoch)
            && is_point()
        {
            found.push(format!("point {epoch}: {e}"));
        }
    }
    for log in store.chain().iter() {
        match log.index() {
            Err(e) => found.push(format!("undo log {}: {e}", log.path().display())),
            Ok(index) => {
                let bad = index.frames().iter().filter_map(|f| log.read_frame(f).err());
                found.extend(bad.map(|e| format!("undo log {}: {e}", log.path().display())));
            }
        }
    }
    let waiting: Vec<EpochNumber> = lock(&store.shared).queue.iter().map(|w| w.epoch).collect();
    for epoch in waiting {
        verify_waiting(store, epoch, &mut found)?;
    }
    Ok(found)
}

fn verify_waiting(store: &VmStore, epoch: EpochNumber, found: &mut Vec<String>) -> Result<()> {
    // Applied and removed meanwhile is fine, so nothing is said about what is not there.
    let Ok(stored) = super::store::read_manifest(&store.dir.inbox_manifest(epoch)) else { return Ok(()) };
    for part in &stored.manifest.parts {
        let path = store.dir.part(epoch, &part.name);
        let Ok(Some(bytes)) = crate::base::durable::read_limited(&path, PART_BYTES_MAX) else { continue };
        if Digest::of(&bytes) != part.name.digest {
            found.push(format!("part {} does not match its digest", path.display()));
        }
    }
    Ok(())
}

fn verify_disk(store: &VmStore, id: DiskId, found: &mut Vec<String>) -> Result<()> {
    let disk = match DiskFile::open_existing(&store.dir, id) {
        Ok(disk) => disk,
        // Dropped with its last point meanwhile, or missing.
        Err(_) if !store.needed_disks().contains(&id) => return Ok(()),
        Err(e) => {
            found.push(format!("disk {id}: {e}"));
            return Ok(());
        }
    };
    let mut at = 0;
    let mut buffer = Vec::new();
    while let Some(run) = disk.next_stored(&mut Stored::default(), at, u64::MAX)? {
        let mut offset = run.offset;
        while offset < run.end() {
            let length = (run.end() - offset).min(PIECE_BYTES);
            buffer.resize(length as usize, 0);
            verify_piece(store, &disk, offset, &mut buffer, found)?;
            offset += length;
        }
        at = run.end();
    }
    Ok(())
}

fn verify_piece(
    store: &VmStore,
    disk: &DiskFile,
    offset: u64,
    buffer: &mut [u8],
    found: &mut Vec<String>,
) -> Result<()> {
    let count = buffer.len() / BLOCK_BYTES as usize;
    disk.read(offset, buffer)?;
    if DiskFile::first_damaged(offset, buffer, &disk.read_sums(offset, count)?).is_none() {
        return Ok(());
    }
    // Perhaps an epoch was just being written there: look again while none is.
    let _work = lock(&store.work);
    disk.read(offset, buffer)?;
    let sums = disk.read_sums(offset, count)?;
    let between = lock(&store.doc).applying;
    let log = store.chain().last().filter(|log| Some(log.epoch) == between).cloned();
    let index = log.map(|log| log.index()).transpose()?;
    for (n, (block, sum)) in buffer.chunks(BLOCK_BYTES as usize).zip(&sums).enumerate() {
        let at = offset + n as u64 * BLOCK_BYTES;
        let Some(bad) = DiskFile::first_damaged(at, block, &[*sum]) else { continue };
        // An apply that waits for room has left it half written; it will be written again.
        let is_between = index
            .as_ref()
            .is_some_and(|index| index.frames().iter().any(|f| f.disk == disk.id && f.range().contains(&at)));
        if !is_between {
            found.push(disk.damaged(bad).to_string());
        }
    }
    Ok(())
}
