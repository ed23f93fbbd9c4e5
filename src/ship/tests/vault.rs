//! The vault of the simulation: it decodes the real parts and applies them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::world::{Image, Shared, lock, put};
use crate::base::{BLOCK_BYTES, Digest, EpochNumber, Error, ErrorKind, Result, Timestamp, VmId, VmName};
use crate::core::ports::vault::{Head, Vault, VaultSpace};
use crate::format::manifest::Manifest;
use crate::format::part::{PartName, PartReader, StoredPart};

/// Parts of an epoch, by sequence.
type Parts = BTreeMap<u32, (PartName, Arc<Vec<u8>>)>;

/// What is durable in the vault.
#[derive(Clone, Default)]
pub(in crate::ship) struct Stored {
    head: Option<Head>,
    image: Image,
    inbox: BTreeMap<EpochNumber, Parts>,
    committed: Vec<Stored>,
}

/// The vault port.
pub(in crate::ship) struct SimVault {
    pub(in crate::ship) world: Shared,
    stored: Mutex<Stored>,
    /// A commit whose sender died, still on its way.
    late: Mutex<Option<Manifest>>,
}

impl SimVault {
    pub(in crate::ship) fn new(world: Shared) -> Self {
        Self { world, stored: Mutex::default(), late: Mutex::default() }
    }

    fn stored(&self) -> MutexGuard<'_, Stored> {
        self.stored.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Content of the newest point.
    pub(in crate::ship) fn image(&self) -> Image {
        self.stored().image.clone()
    }

    /// A turn of the world, then perhaps a late commit.
    fn turn(&self) {
        let is_due = {
            let mut w = lock(&self.world);
            w.turn();
            w.rng.one_in(5)
        };
        let mut late = self.late.lock().unwrap_or_else(PoisonError::into_inner);
        if is_due && let Some(manifest) = late.take() {
            let _ = self.apply(&manifest);
        }
    }

    fn fault(&self, what: &str) -> Result<()> {
        lock(&self.world).fault(what)
    }

    /// An older state comes back (or none), with or without the parts of the unfinished epoch.
    pub(in crate::ship) fn restore(&self) {
        let (older, forgets) = {
            let mut w = lock(&self.world);
            (w.rng.below(3), w.rng.one_in(2))
        };
        if older > 0 {
            self.roll_back(older as usize - 1);
        }
        if forgets {
            self.stored().inbox.clear();
        }
    }

    /// The state of so many epochs ago comes back.
    pub(in crate::ship) fn roll_back(&self, epochs: usize) {
        lock(&self.world).is_rolled_back = true;
        let mut stored = self.stored();
        let back = stored.committed.len().saturating_sub(epochs);
        let committed: Vec<_> = stored.committed.drain(..).take(back).collect();
        *stored = committed.last().cloned().unwrap_or_default();
        stored.committed = committed;
    }

    fn apply(&self, manifest: &Manifest) -> Result<Head> {
        let mut stored = self.stored();
        let digest = manifest.digest()?;
        if let Some(head) = stored.head.filter(|h| h.digest == digest) {
            return Ok(head);
        }
        if stored.head.map(|h| h.digest) != manifest.parent {
            return Err(Error::new(ErrorKind::ChainBroken, "the parent is not the head"));
        }
        let damaged = |why: &str| Error::new(ErrorKind::Damaged, why);
        if stored.head.is_some_and(|h| h.epoch >= manifest.epoch) {
            return Err(damaged("epochs must increase"));
        }
        let mut image = stored.image.clone();
        image.retain(|id, _| manifest.disks.iter().any(|d| d.id == *id));
        for disk in &manifest.disks {
            let blocks = image.entry(disk.id).or_default();
            if disk.whole {
                blocks.clear();
            }
        }
        let inbox = stored.inbox.get(&manifest.epoch).cloned().unwrap_or_default();
        let mut sequence = None;
        for part in &manifest.parts {
            if sequence.is_some_and(|s| s >= part.name.sequence) {
                return Err(damaged("parts are out of sequence"));
            }
            sequence = Some(part.name.sequence);
            let bytes = inbox.get(&part.name.sequence).filter(|(name, _)| *name == part.name);
            let bytes = bytes.ok_or_else(|| damaged("a part is missing"))?;
            apply_part(&bytes.1, &mut image)?;
        }
        if inbox.len() != manifest.parts.len() {
            return Err(damaged("a part is not named"));
        }
        for disk in &manifest.disks {
            image.entry(disk.id).or_default().resize((disk.size / BLOCK_BYTES) as usize, 0);
        }
        lock(&self.world).is_rolled_back = false;
        check_point(&self.world, manifest.cut_time, &image);
        let head = Head { epoch: manifest.epoch, digest, cut_time: manifest.cut_time };
        stored.head = Some(head);
        stored.image = image;
        stored.inbox.retain(|epoch, _| *epoch > manifest.epoch);
        let snapshot = Stored { committed: Vec::new(), inbox: BTreeMap::new(), ..stored.clone() };
        stored.committed.push(snapshot);
        Ok(head)
    }
}

/// Every committed point equals the source at its cut.
fn check_point(world: &Shared, cut_time: Timestamp, image: &Image) {
    let mut w = lock(world);
    let Some(oracle) = w.oracles.get(&cut_time.0).cloned() else {
        return w.violate("a point of a cut that was never made");
    };
    if &oracle == image {
        return;
    }
    let differs = |id: &crate::base::DiskId| {
        let (a, b) = (oracle.get(id)?, image.get(id)?);
        let block = a.iter().zip(b).position(|(x, y)| x != y);
        (a != b).then(|| format!("disk {id}: sizes {} and {}, block {block:?}", a.len(), b.len()))
    };
    let where_ = oracle.keys().find_map(differs);
    w.violate(format!("the point of cut {cut_time} is not the source at that cut: {where_:?}"));
}

fn apply_part(bytes: &[u8], image: &mut Image) -> Result<()> {
    let part = PartReader::new(bytes)?;
    for frame in part.index().frames() {
        let mut content = vec![0; frame.length as usize];
        if !frame.encoding.is_empty() {
            part.read(frame, &mut content)?;
        }
        let disk = image.entry(frame.disk).or_default();
        for (i, block) in content.chunks(BLOCK_BYTES as usize).enumerate() {
            let head = block.get(..8).and_then(|b| b.try_into().ok()).unwrap_or([0; 8]);
            put(disk, frame.offset / BLOCK_BYTES + i as u64, u64::from_le_bytes(head));
        }
    }
    Ok(())
}

impl Vault for SimVault {
    fn register(&self, _: VmId, _: &VmName) -> Result<()> {
        self.turn();
        self.fault("registering")
    }

    fn head(&self, _: VmId) -> Result<Option<Head>> {
        self.turn();
        self.fault("asking for the head")?;
        Ok(self.stored().head)
    }

    fn parts(&self, _: VmId, epoch: EpochNumber) -> Result<Vec<StoredPart>> {
        self.turn();
        self.fault("listing parts")?;
        let stored = self.stored();
        let parts = stored.inbox.get(&epoch).into_iter().flatten();
        Ok(parts.map(|(_, (name, bytes))| StoredPart { name: *name, length: bytes.len() as u64 }).collect())
    }

    fn part_index(&self, _: VmId, epoch: EpochNumber, part: &StoredPart) -> Result<Vec<u8>> {
        self.turn();
        self.fault("reading an index")?;
        let stored = self.stored();
        let found = stored.inbox.get(&epoch).and_then(|parts| parts.get(&part.name.sequence));
        let (_, bytes) = found.ok_or_else(|| Error::new(ErrorKind::NotFound, "no such part"))?;
        Ok(PartReader::new(bytes)?.tail().to_vec())
    }

    fn put_part(&self, _: VmId, epoch: EpochNumber, name: &PartName, bytes: &[u8]) -> Result<()> {
        self.turn();
        self.fault("putting a part")?;
        if Digest::of(bytes) != name.digest {
            lock(&self.world).violate("a part has another digest than its name");
        }
        {
            let mut stored = self.stored();
            let inbox = stored.inbox.entry(epoch).or_default();
            let next = inbox.last_key_value().map_or(0, |(s, _)| s + 1);
            let is_again = inbox.get(&name.sequence).is_some_and(|(n, _)| n == name);
            if name.sequence < next && !is_again {
                lock(&self.world).violate(format!("part {name} where {next} is expected"));
            }
            inbox.insert(name.sequence, (*name, Arc::new(bytes.to_vec())));
        }
        self.turn();
        self.fault("the reply to a part")
    }

    fn commit(&self, _: VmId, manifest: &Manifest) -> Result<Head> {
        self.turn();
        self.fault("committing")?;
        let dies = {
            let mut w = lock(&self.world);
            let kill = w.faults.kill;
            w.rng.one_in(kill)
        };
        if dies {
            *self.late.lock().unwrap_or_else(PoisonError::into_inner) = Some(manifest.clone());
            lock(&self.world).kill();
        }
        let head = self.apply(manifest)?;
        self.turn();
        self.fault("the reply to a commit")?;
        Ok(head)
    }

    fn renew(&self, _: VmId, current_as_of: Timestamp) -> Result<()> {
        let image = self.image();
        let mut w = lock(&self.world);
        if current_as_of.0 > w.now_ms as i64 {
            w.violate("current as of a time to come");
        }
        w.check_marks(&image, "at a renewal");
        w.turn();
        w.fault("renewing")
    }

    fn abandon(&self, _: VmId, epoch: EpochNumber) -> Result<()> {
        self.turn();
        self.fault("abandoning")?;
        self.stored().inbox.remove(&epoch);
        Ok(())
    }

    fn backlog(&self, _: VmId) -> Result<(u64, u64)> {
        self.turn();
        let mut w = lock(&self.world);
        Ok(if w.guests && w.rng.one_in(20) { (9, 2 << 30) } else { (0, 0) })
    }

    fn space(&self) -> Result<VaultSpace> {
        self.turn();
        Ok(VaultSpace { free_bytes: 1 << 40, total_bytes: 1 << 40 })
    }
}
