//! A primary to test vaults with: disks in memory, random epochs, and the image of every cut.

#![allow(dead_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use afterimage::base::{
    Clock, Digest, DiskId, EpochNumber, ErrorKind, ExtentSet, PointId, Result, Timestamp, VmId,
};
use afterimage::core::ports::points::{PointReader, PointStore};
use afterimage::core::ports::vault::{Head, Vault};
use afterimage::format::manifest::{
    Consistency, DefinitionFile, EpochKind, MANIFEST_FORMAT, Manifest, ManifestDisk,
};
use afterimage::format::part::{PartBuilder, PartName, StoredPart};
use afterimage::vault::DirectoryVault;

pub mod story;

pub const BLOCK: usize = 4096;
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A small generator: the same numbers for the same seed, everywhere.
#[derive(Clone)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    pub fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let n = self.next().to_le_bytes();
            chunk.copy_from_slice(&n[..chunk.len()]);
        }
    }
}

/// A clock that tests set.
pub struct TestClock(std::sync::Mutex<(i64, Duration)>);

impl TestClock {
    pub fn new() -> Arc<Self> {
        Arc::new(Self(std::sync::Mutex::new((1_700_000_000_000, Duration::ZERO))))
    }

    /// Time passes.
    pub fn advance(&self, by: Duration) {
        let mut now = self.0.lock().unwrap();
        now.0 += by.as_millis() as i64;
        now.1 += by;
    }

    /// Somebody sets the wall clock.
    pub fn jump(&self, seconds: i64) {
        self.0.lock().unwrap().0 += seconds * 1000;
    }
}

impl Clock for TestClock {
    fn now(&self) -> Timestamp {
        Timestamp(self.0.lock().unwrap().0)
    }

    fn monotonic(&self) -> Duration {
        self.0.lock().unwrap().1
    }
}

/// A disk of the primary.
#[derive(Clone)]
pub struct Disk {
    pub id: DiskId,
    pub path: PathBuf,
    pub bytes: Vec<u8>,
    pub dirty: BTreeSet<u64>,
    pub whole: bool,
}

impl Disk {
    pub fn new(id: u128, path: &str, bytes: Vec<u8>) -> Self {
        Self { id: DiskId(id), path: path.into(), bytes, dirty: BTreeSet::new(), whole: true }
    }

    fn mark(&mut self, start: usize, end: usize) {
        self.dirty.extend((start / BLOCK) as u64..end.div_ceil(BLOCK) as u64);
    }

    pub fn write(&mut self, offset: usize, data: &[u8]) {
        let end = offset + data.len();
        if end > self.bytes.len() {
            self.bytes.resize(end, 0);
        }
        self.bytes[offset..end].copy_from_slice(data);
        self.mark(offset, end);
    }

    /// T10: marks from the smaller to the larger size, both boundary blocks included.
    pub fn truncate(&mut self, size: usize) {
        let (low, high) = (size.min(self.bytes.len()), size.max(self.bytes.len()));
        self.bytes.resize(size, 0);
        self.mark(low.saturating_sub(1), high + 1);
    }

    fn block(&self, n: u64) -> Option<Vec<u8>> {
        let start = n as usize * BLOCK;
        let piece = self.bytes.get(start..self.bytes.len().min(start + BLOCK))?;
        let mut block = piece.to_vec();
        block.resize(BLOCK, 0);
        (!piece.is_empty()).then_some(block)
    }
}

/// What a point must show: path to size and content.
pub type Image = BTreeMap<PathBuf, Vec<u8>>;

/// An epoch that is ready to be delivered.
#[derive(Clone)]
pub struct Epoch {
    pub manifest: Manifest,
    pub parts: Vec<(PartName, Vec<u8>)>,
    pub image: Image,
}

impl Epoch {
    pub fn point(&self) -> PointId {
        PointId::new(self.manifest.epoch, &self.manifest.digest().unwrap())
    }

    pub fn digest(&self) -> Digest {
        self.manifest.digest().unwrap()
    }

    /// Asks for the head, delivers what the vault does not list yet, and commits.
    pub fn deliver(&self, vault: &dyn Vault) -> Result<Head> {
        let vm = self.manifest.vm;
        if let Some(head) = vault.head(vm)?.filter(|h| h.digest == self.digest()) {
            return Ok(head);
        }
        let there = vault.parts(vm, self.manifest.epoch)?;
        for (name, bytes) in &self.parts {
            if !there.iter().any(|p| p.name == *name && p.length == bytes.len() as u64) {
                vault.put_part(vm, self.manifest.epoch, name, bytes)?;
            }
        }
        vault.commit(vm, &self.manifest)
    }
}

/// The primary.
#[derive(Clone)]
pub struct Primary {
    pub vm: VmId,
    pub random: Random,
    pub disks: Vec<Disk>,
    pub parent: Option<Digest>,
    pub epoch: u64,
    next_disk: u128,
}

impl Primary {
    pub fn new(seed: u64, disks: Vec<Disk>) -> Self {
        let vm = VmId(u128::from(seed) + 77);
        Self { vm, random: Random(seed), disks, parent: None, epoch: 0, next_disk: 1000 }
    }

    /// One disk with random content of `blocks` blocks.
    pub fn small(seed: u64, blocks: usize) -> Self {
        let mut random = Random(seed);
        let mut bytes = vec![0; blocks * BLOCK];
        random.fill(&mut bytes);
        Self::new(seed, vec![Disk::new(1, "web1/disk0.raw", bytes)])
    }

    pub fn image(&self) -> Image {
        self.disks.iter().map(|d| (d.path.clone(), d.bytes.clone())).collect()
    }

    /// Something that guests do.
    pub fn mutate(&mut self) {
        let r = &mut self.random;
        let count = self.disks.len();
        let Some(disk) = self.disks.get_mut(r.below(count)) else { return };
        let size = disk.bytes.len();
        match r.below(20) {
            0 => disk.truncate(r.below(size + 1)),
            1 => disk.truncate((size + r.below(6 * BLOCK)).min(80 * BLOCK)),
            2..=5 if size > 0 => {
                let at = r.below(size);
                let length = r.below(12 * BLOCK).min(size - at);
                disk.write(at, &vec![0; length]);
            }
            6 => disk.whole = true,
            7 => disk.path = format!("d{}/renamed{}.img", r.below(3), self.next_disk).into(),
            8 if count > 1 => {
                let gone = r.below(count);
                self.disks.remove(gone);
            }
            9 if count < 4 => {
                let mut bytes = vec![0; r.below(30 * BLOCK)];
                let half = bytes.len() / 2;
                r.fill(&mut bytes[half..]);
                let path = format!("new{}.qcow2", self.next_disk);
                self.disks.push(Disk::new(self.next_disk, &path, bytes));
            }
            _ => {
                let at = r.below(size.max(BLOCK));
                let mut data = vec![r.next() as u8; 1 + r.below(10 * BLOCK)];
                if r.chance(50) {
                    r.fill(&mut data);
                }
                data.truncate((80 * BLOCK).saturating_sub(at));
                disk.write(at, &data);
            }
        }
        self.next_disk += 1;
    }

    /// Ends an epoch: parts (several passes, the earlier ones with stale content) and manifest.
    pub fn cut(&mut self) -> Epoch {
        self.epoch += 1 + u64::from(self.random.chance(5));
        let mut parts = Vec::new();
        let passes = 1 + self.random.below(3);
        for pass in 0..passes {
            let is_last = pass + 1 == passes;
            let mut builder = PartBuilder::new();
            for d in 0..self.disks.len() {
                self.add_blocks(&mut builder, d, is_last);
            }
            if !builder.is_empty() || is_last {
                parts.push(builder.finish(pass as u32, self.random.next() as u32));
            }
        }
        let manifest = self.manifest(&parts);
        self.parent = Some(manifest.digest().unwrap());
        for disk in &mut self.disks {
            disk.dirty.clear();
            disk.whole = false;
        }
        Epoch { manifest, parts, image: self.image() }
    }

    fn add_blocks(&mut self, builder: &mut PartBuilder, disk: usize, is_last: bool) {
        let r = &mut self.random;
        let disk = &self.disks[disk];
        let all = 0..disk.bytes.len().div_ceil(BLOCK) as u64;
        let chosen: Vec<u64> = if disk.whole { all.collect() } else { disk.dirty.iter().copied().collect() };
        for n in chosen {
            let Some(mut block) = disk.block(n) else { continue };
            let offset = n * BLOCK as u64;
            let is_zero = block == [0; BLOCK];
            if !is_last {
                if r.chance(40) {
                    r.fill(&mut block);
                    builder.add_data(disk.id, offset, &block).unwrap();
                }
                continue;
            }
            match r.below(4) {
                0 if is_zero => builder.add_hole(disk.id, offset, BLOCK as u64).unwrap(),
                1 if is_zero => builder.add_zeros(disk.id, offset, BLOCK as u64).unwrap(),
                _ => builder.add_data(disk.id, offset, &block).unwrap(),
            }
        }
    }

    fn manifest(&self, parts: &[(PartName, Vec<u8>)]) -> Manifest {
        let is_full = self.disks.iter().all(|d| d.whole);
        Manifest {
            format: MANIFEST_FORMAT,
            vm: self.vm,
            name: "web1".parse().unwrap(),
            generation: 1,
            epoch: EpochNumber(self.epoch),
            kind: if is_full { EpochKind::Full } else { EpochKind::Delta },
            parent: self.parent,
            cut_time: Timestamp(1_700_000_000_000 + self.epoch as i64 * 1000),
            consistency: Consistency::Crash,
            disks: self
                .disks
                .iter()
                .map(|d| ManifestDisk {
                    id: d.id,
                    path: d.path.clone(),
                    size: d.bytes.len() as u64,
                    whole: d.whole,
                    backing: None,
                })
                .collect(),
            parts: parts.iter().map(|(name, b)| StoredPart { name: *name, length: b.len() as u64 }).collect(),
            changed_bytes: parts.iter().map(|(_, b)| b.len() as u64).sum(),
            definition: vec![DefinitionFile {
                name: "machine.toml".into(),
                content: format!("# {}", self.epoch),
            }],
            key_id: 0,
        }
    }
}

/// A point shows exactly `image`: names, sizes, every byte, and where there is no data.
pub fn assert_shows(reader: &dyn PointReader, image: &Image, what: &str) {
    let paths: Vec<&PathBuf> = reader.disks().iter().map(|d| &d.path).collect();
    assert_eq!(paths, image.keys().collect::<Vec<_>>(), "{what}: disks");
    for (n, (path, expected)) in image.iter().enumerate() {
        assert_eq!(reader.disks()[n].size, expected.len() as u64, "{what}: size of {}", path.display());
        let mut content = vec![0xee; expected.len() + 100];
        let read = reader.read_at(n, 0, &mut content).unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_eq!(read, expected.len(), "{what}: {}", path.display());
        if content[..read] != expected[..] {
            let at = (0..read).find(|i| content[*i] != expected[*i]).unwrap();
            panic!("{what}: {} differs at byte {at} (block {})", path.display(), at / BLOCK);
        }
        assert_data_runs(reader, n, expected, what);
    }
}

fn assert_data_runs(reader: &dyn PointReader, disk: usize, expected: &[u8], what: &str) {
    let mut at = 0;
    let mut data = ExtentSet::new();
    while let Some(run) = reader.next_data(disk, at).unwrap() {
        assert!(run.offset >= at && run.length > 0 && run.end() <= expected.len() as u64, "{what}: {run:?}");
        assert!(at == 0 || run.offset > at, "{what}: a run of data ends where data follows");
        data.insert(run.offset..run.end());
        at = run.end();
    }
    for hole in data.gaps(0..expected.len() as u64) {
        let hole = hole.start as usize..hole.end as usize;
        assert!(expected[hole.clone()] == vec![0; hole.len()], "{what}: data in hole {hole:?}");
    }
}

/// Every point that the vault lists shows what the primary was at its cut.
pub fn assert_points(store: &dyn PointStore, vm: VmId, images: &BTreeMap<PointId, Image>, what: &str) {
    for info in store.points(vm).unwrap() {
        let image = images.get(&info.id).unwrap_or_else(|| panic!("{what}: unknown point {}", info.id));
        let reader = store.open(vm, info.id).unwrap();
        assert_shows(&*reader, image, &format!("{what}: point {}", info.id));
    }
}

/// The kind of an error that must be one.
pub fn kind<T>(result: Result<T>) -> ErrorKind {
    match result {
        Ok(_) => panic!("should have been refused"),
        Err(e) => {
            assert!(!e.what().is_empty());
            e.kind()
        }
    }
}

/// A folder in memory: syncs cost nothing, holes and fallocate work.
pub fn memory_dir() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("afterimage-vault-").tempdir_in("/dev/shm").unwrap()
}

/// A cut of the primary, delivered and applied.
pub fn delivered(vault: &DirectoryVault, primary: &mut Primary) -> Epoch {
    let epoch = primary.cut();
    epoch.deliver(vault).unwrap();
    assert!(vault.wait_applied(primary.vm, PATIENCE).unwrap(), "{:?}", vault.last_error(primary.vm));
    epoch
}

/// Registers the VM and delivers its first epoch.
pub fn begin(vault: &DirectoryVault, primary: &mut Primary) -> Epoch {
    vault.register(primary.vm, &"web1".parse().unwrap()).unwrap();
    delivered(vault, primary)
}
