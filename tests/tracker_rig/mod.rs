//! A VM of two disks on real files, a shipper of the simplest kind, and a journal.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use afterimage::base::{BootId, DiskId, ErrorKind, ExtentSet, Result, SystemClock, VmId};
use afterimage::core::ports::source::{BlocksByDisk, Cut, CutKind, Source};
use afterimage::core::ports::tracking::{Change, TrackedDisk};
use afterimage::format::hrl::{self, HrlReport};
use afterimage::tracker::{Disk, DiskSpec, Tracker, VmTracker};
use nix::fcntl::{FallocateFlags, fallocate};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

pub const BLOCK: u64 = 4096;
const PATIENCE: Duration = Duration::from_secs(20);
const DISKS: u128 = 2;

pub struct Rig {
    dir: tempfile::TempDir,
    random: SmallRng,
    size_max: u64,
    /// Preserved blocks in memory; more is in the HRLs.
    pub preserved_bytes: u64,
    tracker: Option<Tracker>,
    vm: Option<Arc<VmTracker>>,
    /// Where the first disk is.
    first: PathBuf,
    /// What the vault would have.
    replica: BTreeMap<DiskId, Vec<u8>>,
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.vm = None;
        if let Some(tracker) = self.tracker.take() {
            tracker.remove_shared_memory();
        }
    }
}

/// One change to a disk file, done as the filter does it.
fn apply(disk: &Disk, file: &File, change: Change, fill: u8) {
    let ticket = disk.begin(change).unwrap();
    let result = match change {
        Change::Write { offset, length } => {
            file.write_all_at(&vec![fill; length as usize], offset).unwrap();
            Ok(length)
        }
        Change::Zero { offset, length } => {
            let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            fallocate(file, flags, offset as i64, length as i64).map(|()| 0)
        }
        Change::Truncate { to, .. } => {
            file.set_len(to).unwrap();
            Ok(0)
        }
    };
    disk.end(ticket, result);
}

impl Rig {
    pub fn new(seed: u64, size_max: u64) -> Self {
        // Every other one in memory, where a sync costs nothing.
        let dir = if seed.is_multiple_of(2) { tempfile::tempdir_in("/dev/shm") } else { tempfile::tempdir() };
        let dir = dir.unwrap();
        let random = SmallRng::seed_from_u64(seed);
        std::fs::create_dir(dir.path().join("state")).unwrap();
        let mut rig = Self {
            dir,
            random,
            size_max,
            preserved_bytes: [0, 4 * BLOCK, 32 << 20][seed as usize / 2 % 3],
            tracker: None,
            vm: None,
            first: "disk1.img".into(),
            replica: BTreeMap::new(),
        };
        for id in 1..=DISKS {
            let content: Vec<u8> = (0..size_max / 2).map(|i| (i / BLOCK % 251) as u8 + 1).collect();
            std::fs::write(rig.path(id), content).unwrap();
            rig.random.fill(&mut [0u8; 4][..]);
        }
        rig
    }

    fn path(&self, id: u128) -> PathBuf {
        match id {
            1 => self.dir.path().join(&self.first),
            _ => self.dir.path().join(format!("disk{id}.img")),
        }
    }

    pub fn file(&self, id: u128) -> File {
        OpenOptions::new().read(true).write(true).open(self.path(id)).unwrap()
    }

    pub fn vm(&self) -> Arc<VmTracker> {
        self.vm.clone().unwrap()
    }

    pub fn spec(&self, id: u128) -> DiskSpec {
        DiskSpec {
            id: DiskId(id),
            path: self.path(id).strip_prefix(self.dir.path()).unwrap().to_owned(),
            lower: self.file(id),
            folder: File::open(self.path(id).parent().unwrap()).unwrap(),
            file_name: self.path(id).file_name().unwrap().to_owned(),
            backing: None,
            changed_beneath: false,
        }
    }

    pub fn open(&mut self, boot: BootId, fresh: bool) {
        let specs = (1..=DISKS).map(|id| self.spec(id)).collect();
        self.open_with(boot, specs, fresh).unwrap();
    }

    fn open_with(&mut self, boot: BootId, specs: Vec<DiskSpec>, fresh: bool) -> Result<()> {
        let state = self.dir.path().join("state");
        let tracker = Tracker::open(&state, boot, Arc::new(SystemClock::default()), self.preserved_bytes)?;
        let vm = tracker.open_vm(VmId(77), specs, fresh);
        self.tracker = Some(tracker);
        self.vm = Some(vm?);
        Ok(())
    }

    /// Killed; the next start comes to nothing, because the record of the VM cannot be written.
    pub fn fail_to_reopen(&mut self, boot: BootId) {
        let folder = self.dir.path().join("state/tracker");
        let records = std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name());
        let in_the_way = folder.join(format!(".{}.new", records.last().unwrap().to_str().unwrap()));
        std::fs::create_dir(&in_the_way).unwrap();
        self.vm = None;
        self.tracker = None;
        let specs = (1..=DISKS).map(|id| self.spec(id)).collect();
        assert!(self.open_with(boot, specs, false).is_err());
        std::fs::remove_dir(in_the_way).unwrap();
    }

    /// Killed; the next start is told that the second disk was written to meanwhile.
    pub fn reopen_changed_beneath(&mut self, boot: BootId) {
        self.vm = None;
        self.tracker = None;
        let mut specs: Vec<_> = (1..=DISKS).map(|id| self.spec(id)).collect();
        specs[1].changed_beneath = true;
        self.open_with(boot, specs, false).unwrap();
    }

    /// Another file takes the place of the first disk; it is as old as that was.
    pub fn replace_first_disk(&mut self) {
        let path = self.path(1);
        let other = path.with_extension("backup");
        let modified = std::fs::metadata(&path).unwrap().modified().unwrap();
        std::fs::write(&other, vec![0x77; 3 * BLOCK as usize]).unwrap();
        File::options().write(true).open(&other).unwrap().set_modified(modified).unwrap();
        std::fs::rename(other, path).unwrap();
    }

    /// A third file, of one block.
    pub fn third_disk(&self) -> DiskSpec {
        std::fs::write(self.path(3), [3; BLOCK as usize]).unwrap();
        self.spec(3)
    }

    /// The process ends without a word; another one begins.
    pub fn reopen(&mut self, boot: BootId) {
        self.vm = None;
        self.tracker = None;
        self.open(boot, false);
    }

    /// The process ends without a word. Every file of ours that it leaves, with something in it.
    pub fn end(&mut self) -> Vec<PathBuf> {
        self.vm = None;
        self.tracker = None;
        let mut found = Vec::new();
        let mut folders = vec![self.dir.path().to_owned()];
        while let Some(folder) = folders.pop() {
            for path in std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()) {
                if path.is_dir() {
                    folders.push(path);
                } else if path.extension().is_none_or(|e| e != "img") && path.metadata().unwrap().blocks() > 0
                {
                    found.push(path);
                }
            }
        }
        found.sort();
        found
    }

    /// Another process begins; an error if the tracker or the VM cannot be opened.
    pub fn try_open(&mut self, boot: BootId) -> Result<()> {
        let specs = (1..=DISKS).map(|id| self.spec(id)).collect();
        self.open_with(boot, specs, false)
    }

    pub fn write_at(&mut self, disk: usize, offset: u64, length: usize) {
        let id = disk as u128 + 1;
        let fill = self.random.random();
        let change = Change::Write { offset, length: length as u64 };
        apply(&self.vm().disk(DiskId(id)).unwrap(), &self.file(id), change, fill);
    }

    /// A random change that fits the disk.
    fn random_change(&mut self, id: u128) -> Change {
        let size = self.file(id).metadata().unwrap().len();
        let max = self.size_max;
        let r = &mut self.random;
        let length = [1, 512, 4096, 5000, 70_000][r.random_range(0..5)];
        match r.random_range(0..12) {
            0 => Change::Truncate { from: size, to: r.random_range(0..max) },
            1 => Change::Truncate { from: size, to: size / 2 },
            2 | 3 => {
                let offset = r.random_range(0..size.max(1));
                Change::Zero { offset, length: length.min((size - offset).max(1)) }
            }
            4 => Change::Write { offset: size.min(max - length), length },
            _ => Change::Write { offset: r.random_range(0..max - length), length },
        }
    }

    pub fn change(&mut self, count: usize) {
        for _ in 0..count {
            let id = self.random.random_range(1..=DISKS);
            let change = self.random_change(id);
            let fill = self.random.random();
            apply(&self.vm().disk(DiskId(id)).unwrap(), &self.file(id), change, fill);
        }
    }

    pub fn change_one(&mut self, disk: usize, change: Change) {
        let id = disk as u128 + 1;
        apply(&self.vm().disk(DiskId(id)).unwrap(), &self.file(id), change, 1);
    }

    pub fn raw_write(&self, disk: usize, offset: u64, bytes: &[u8]) {
        self.file(disk as u128 + 1).write_all_at(bytes, offset).unwrap();
    }

    pub fn stop_threads(&self) {
        self.tracker.as_ref().unwrap().stop();
    }

    pub fn rename_first_disk(&mut self, name: &str) {
        let folder = self.dir.path().join("sub");
        std::fs::create_dir_all(&folder).unwrap();
        let old = self.path(1);
        self.first = PathBuf::from("sub").join(name);
        std::fs::rename(old, self.path(1)).unwrap();
        let folder = File::open(folder).unwrap();
        self.vm().rename_disk(DiskId(1), self.first.clone(), folder, name.into()).unwrap();
    }

    pub fn change_beneath(&mut self) {
        self.file(1).write_all_at(&[9; 10], 12_345).unwrap();
        // A file system may give two changes of one tick the same time; the size tells them too.
        self.file(1).set_len(self.size_max - 1).unwrap();
    }

    pub fn cool(&mut self) {
        self.vm().cool_idle();
        assert!(self.vm().cool_idle() > 0);
    }

    fn read_disks(&self) -> BTreeMap<DiskId, Vec<u8>> {
        (1..=DISKS).map(|id| (DiskId(id), std::fs::read(self.path(id)).unwrap())).collect()
    }

    /// Reads a frozen epoch into the replica and acknowledges it. `None`: it gave up its cut.
    fn deliver(&mut self, cut: &Cut) -> Option<()> {
        let vm = self.vm();
        let blocks = vm.frozen_blocks();
        let mut next = self.replica.clone();
        next.retain(|id, _| cut.disks.iter().any(|d| d.id == *id));
        for disk in &cut.disks {
            let content = next.entry(disk.id).or_default();
            if disk.whole {
                content.clear();
            }
            content.resize(disk.size as usize, 0);
            for range in blocks.get(&disk.id).into_iter().flat_map(ExtentSet::iter) {
                let range = range.start..range.end.min(disk.size.div_ceil(BLOCK));
                if range.start >= range.end {
                    continue;
                }
                let mut buffer = vec![0xee; ((range.end - range.start) * BLOCK) as usize];
                match vm.read_frozen(disk.id, range.clone(), &mut buffer) {
                    Ok(()) => {}
                    Err(e) if e.kind() == ErrorKind::Cancelled => return None,
                    Err(e) => panic!("{e}"),
                }
                let start = (range.start * BLOCK) as usize;
                let end = content.len().min(start + buffer.len());
                content[start..end].copy_from_slice(&buffer[..end - start]);
            }
        }
        if vm.has_given_up() {
            return None;
        }
        self.replica = next;
        vm.acknowledge(cut.epoch).unwrap();
        Some(())
    }

    fn cut(&self, unmade: &BlocksByDisk) -> Cut {
        let vm = self.vm();
        vm.cut(CutKind::Final, unmade, PATIENCE).unwrap();
        vm.drain(PATIENCE).unwrap().unwrap()
    }

    /// Goes on with what is frozen, then cuts with everything pending, until nothing is left.
    pub fn ship_everything(&mut self) {
        if let Some(cut) = self.vm().frozen() {
            self.vm().drain(PATIENCE).unwrap().unwrap();
            if self.deliver(&cut).is_none() {
                self.vm().give_up().unwrap();
            }
        }
        while self.vm().has_changes() {
            let cut = self.cut(&self.vm().pending());
            self.deliver(&cut).expect("nobody writes");
        }
    }

    /// A cut while nobody writes; then changes while it is delivered.
    pub fn cut_and_check(&mut self, change_meanwhile: bool) {
        let cut = self.cut(&self.vm().pending());
        let oracle = self.read_disks();
        if change_meanwhile {
            self.change(15);
        }
        if self.deliver(&cut).is_some() {
            assert!(self.replica == oracle, "epoch {}", cut.epoch);
        } else {
            self.vm().give_up().unwrap();
        }
    }

    pub fn read_some_frozen(&mut self) {
        let vm = self.vm();
        for (disk, set) in vm.frozen_blocks() {
            for range in set.iter().step_by(2) {
                let mut buffer = vec![0; ((range.end - range.start) * BLOCK) as usize];
                vm.read_frozen(disk, range, &mut buffer).unwrap();
            }
        }
    }

    pub fn assert_replica_equals_disks(&self) {
        let disks = self.read_disks();
        for (id, content) in &disks {
            let replica = &self.replica[id];
            assert_eq!(replica.len(), content.len(), "{id}");
            let pairs = replica.chunks(BLOCK as usize).zip(content.chunks(BLOCK as usize));
            assert_eq!(pairs.into_iter().position(|(a, b)| a != b), None, "{id}");
        }
    }

    pub fn assert_pending_covers_differences(&self) {
        let pending = self.vm().pending();
        for (id, content) in self.read_disks() {
            let set = pending.get(&id).cloned().unwrap_or_default();
            let replica = &self.replica[&id];
            for (block, data) in content.chunks(BLOCK as usize).enumerate() {
                // What the replica does not have are zeros once it has the size.
                let start = (block * BLOCK as usize).min(replica.len());
                let mut there = replica[start..replica.len().min(start + data.len())].to_vec();
                there.resize(data.len(), 0);
                let same = there == data;
                assert!(same || set.contains(block as u64), "block {block} of {id}");
            }
        }
    }

    pub fn hrls(&self, disk: usize) -> Vec<HrlReport> {
        let id = DiskId(disk as u128 + 1);
        let folder = self.path(disk as u128 + 1).parent().unwrap().to_owned();
        let mut reports: Vec<_> = std::fs::read_dir(folder)
            .unwrap()
            .map(|e| e.unwrap().path())
            .filter(|p| p.extension().is_some_and(|e| e == "hrl"))
            .map(|p| hrl::read(&mut File::open(p).unwrap()).unwrap())
            .filter(|r| r.header.disk == id)
            .collect();
        reports.sort_by_key(|r| r.header.epoch);
        reports
    }

    /// Writers of numbered records that never pause, pairs across the disks (the second is issued
    /// after the first is acknowledged), and cuts in between.
    pub fn under_load(&mut self, cuts: usize) {
        const WRITERS: u64 = 3;
        let stop = Arc::new(AtomicBool::new(false));
        let acked: Arc<Vec<AtomicU64>> = Arc::new((0..WRITERS).map(|_| AtomicU64::new(0)).collect());
        let failed = Arc::new(Mutex::new(None::<String>));
        let files = [self.file(1), self.file(2)];
        let disks = [1, 2].map(|id| self.vm().disk(DiskId(id)).unwrap());
        std::thread::scope(|scope| {
            for w in 0..WRITERS {
                let (stop, acked, files, disks) = (stop.clone(), acked.clone(), &files, &disks);
                scope.spawn(move || {
                    let mut n = 0u64;
                    while !stop.load(SeqCst) {
                        n += 1;
                        // Disk w % 2 first, then the other: half a block each, two writers share one.
                        for d in [w as usize % 2, 1 - w as usize % 2] {
                            let offset = w * 2048;
                            let ticket = disks[d].begin(Change::Write { offset, length: 2048 }).unwrap();
                            files[d].write_all_at(&n.to_le_bytes().repeat(256), offset).unwrap();
                            disks[d].end(ticket, Ok(2048));
                        }
                        acked[w as usize].store(n, SeqCst);
                        std::thread::yield_now();
                    }
                });
            }
            let mut done = 0;
            while done < cuts {
                let before: Vec<u64> = acked.iter().map(|a| a.load(SeqCst)).collect();
                let cut = self.cut(&self.vm().pending());
                let after: Vec<u64> = acked.iter().map(|a| a.load(SeqCst)).collect();
                if self.deliver(&cut).is_none() {
                    self.vm().give_up().unwrap();
                    continue;
                }
                done += 1;
                for w in 0..WRITERS {
                    let value = |d: u128| {
                        let at = (w * 2048) as usize;
                        let record = &self.replica[&DiskId(d)][at..at + 8];
                        u64::from_le_bytes(record.try_into().unwrap())
                    };
                    let first = value(u128::from(w % 2) + 1);
                    let second = value(u128::from(1 - w % 2) + 1);
                    let bad = first < second || second < before[w as usize] || first > after[w as usize] + 1;
                    if bad && before[w as usize] > 0 {
                        let text = format!("writer {w}: {first} {second}, acknowledged {before:?} {after:?}");
                        *failed.lock().unwrap() = Some(text);
                    }
                }
            }
            stop.store(true, SeqCst);
        });
        assert_eq!(*failed.lock().unwrap(), None);
    }
}
