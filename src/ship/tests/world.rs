//! The world of the simulation: disks, guests, time, faults, and what is to be believed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::base::{Clock, DiskId, Error, ErrorKind, Result, Timestamp};
use crate::core::ports::source::Cut;

/// A rule that is switched off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::ship) enum Canary {
    /// None: the production rules.
    None,
    /// T4: blocks read before are read again from the live disk.
    LostPartFromLive,
    /// T5: a give-up is neither seen by reads nor by asking.
    GiveUpNotAsked,
    /// A live cut does not say which blocks it had.
    StaleParts,
    /// T2: draining does not wait.
    NoDrain,
}

/// The unwinding that stands for SIGKILL.
pub(in crate::ship) struct Killed;

/// A small fast generator (splitmix64).
#[derive(Clone, Debug)]
pub(in crate::ship) struct Rng(pub(in crate::ship) u64);

impl Rng {
    pub(in crate::ship) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(in crate::ship) fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }

    pub(in crate::ship) fn one_in(&mut self, n: u64) -> bool {
        n > 0 && self.below(n) == 0
    }
}

/// Which faults there are, each one in so many calls; 0: never. Every seed has other weights.
#[derive(Clone, Debug, Default)]
pub(in crate::ship) struct Faults {
    pub(in crate::ship) kill: u64,
    pub(in crate::ship) power: u64,
    pub(in crate::ship) call: u64,
    pub(in crate::ship) give_up: u64,
    pub(in crate::ship) restore: u64,
    pub(in crate::ship) command: u64,
    pub(in crate::ship) join: u64,
}

/// State of a block of the frozen epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::ship) enum Kept {
    Frozen,
    Read,
    Preserved(u64),
}

/// The frozen epoch.
#[derive(Clone, Debug)]
pub(in crate::ship) struct Frozen {
    pub(in crate::ship) cut: Cut,
    pub(in crate::ship) blocks: BTreeMap<(DiskId, u64), Kept>,
    pub(in crate::ship) gave_up: bool,
}

/// A write that has entered and marked, and not written yet.
#[derive(Clone, Debug)]
pub(in crate::ship) struct Writer {
    pub(in crate::ship) epoch: u64,
    pub(in crate::ship) at: (DiskId, u64),
    pub(in crate::ship) value: u64,
}

/// Content of all disks: a number per block, 0 for zeros.
pub(in crate::ship) type Image = BTreeMap<DiskId, Vec<u64>>;

/// Everything.
pub(in crate::ship) struct World {
    pub(in crate::ship) rng: Rng,
    pub(in crate::ship) canary: Canary,
    pub(in crate::ship) faults: Faults,
    pub(in crate::ship) guests: bool,
    pub(in crate::ship) now_ms: u64,
    /// As long as marks have no gap.
    pub(in crate::ship) tracking: u64,
    pub(in crate::ship) disks: Image,
    /// Blocks that the lower file has as data.
    pub(in crate::ship) data: BTreeSet<(DiskId, u64)>,
    pub(in crate::ship) epoch: u64,
    pub(in crate::ship) marks: BTreeSet<(DiskId, u64)>,
    pub(in crate::ship) pending: BTreeSet<(DiskId, u64)>,
    /// Disks that ship whole, and in which epoch they began to.
    pub(in crate::ship) whole: BTreeMap<DiskId, u64>,
    pub(in crate::ship) frozen: Option<Frozen>,
    /// Blocks of a give-up that nobody completed before the kill.
    pub(in crate::ship) gave_up_unfinished: Option<BTreeSet<(DiskId, u64)>>,
    /// Blocks of the epoch that ended last.
    pub(in crate::ship) ended: BTreeSet<(DiskId, u64)>,
    pub(in crate::ship) writers: Vec<Writer>,
    /// Value before the last write, of blocks that a power cut may take back.
    pub(in crate::ship) unsynced: BTreeMap<(DiskId, u64), u64>,
    /// What each cut has, by its time.
    pub(in crate::ship) oracles: BTreeMap<i64, Image>,
    pub(in crate::ship) last_cut: Option<i64>,
    pub(in crate::ship) next_value: u64,
    /// What went wrong.
    pub(in crate::ship) violation: Option<String>,
    pub(in crate::ship) trace: u64,
    /// Every read fails like this.
    pub(in crate::ship) broken: Option<ErrorKind>,
    /// The vault was restored from an older state, and no epoch was committed since.
    pub(in crate::ship) is_rolled_back: bool,
}

/// The world, shared.
pub(in crate::ship) type Shared = Arc<Mutex<World>>;

/// Locks the world; a kill may have unwound through it.
pub(in crate::ship) fn lock(world: &Shared) -> MutexGuard<'_, World> {
    world.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The simulated clock.
pub(in crate::ship) struct SimClock(pub(in crate::ship) Shared);

impl Clock for SimClock {
    fn now(&self) -> Timestamp {
        let mut w = lock(&self.0);
        w.now_ms += 1;
        Timestamp(w.now_ms as i64)
    }

    fn monotonic(&self) -> Duration {
        Duration::from_millis(lock(&self.0).now_ms)
    }
}

impl World {
    pub(in crate::ship) fn new(seed: u64, canary: Canary) -> Self {
        let mut rng = Rng(seed.wrapping_mul(0x1234_5678_9abc_def1));
        let mut weight = |often: u64| if rng.one_in(2) { often + rng.below(often * 4) } else { 0 };
        let faults = Faults {
            kill: weight(20),
            power: weight(150),
            call: weight(8),
            give_up: weight(3),
            restore: weight(200),
            command: weight(5),
            join: weight(60),
        };
        let mut world = Self {
            rng,
            canary,
            faults,
            guests: true,
            now_ms: 1_000_000,
            tracking: 1,
            disks: Image::new(),
            data: BTreeSet::new(),
            epoch: 1,
            marks: BTreeSet::new(),
            pending: BTreeSet::new(),
            whole: BTreeMap::new(),
            frozen: None,
            gave_up_unfinished: None,
            ended: BTreeSet::new(),
            writers: Vec::new(),
            unsynced: BTreeMap::new(),
            oracles: BTreeMap::new(),
            last_cut: None,
            next_value: 1,
            violation: None,
            trace: 0,
            broken: None,
            is_rolled_back: false,
        };
        world.join_disk();
        world.join_disk();
        world
    }

    pub(in crate::ship) fn violate(&mut self, what: impl Into<String>) {
        let what = what.into();
        self.violation.get_or_insert(what);
    }

    /// A disk joins the VM: it ships whole.
    pub(in crate::ship) fn join_disk(&mut self) {
        let id = DiskId(100 + self.disks.len() as u128);
        let blocks = 24 + self.rng.below(30);
        let mut content = vec![0; blocks as usize];
        for block in 0..blocks {
            if self.rng.one_in(3) {
                content[block as usize] = self.value();
                self.data.insert((id, block));
                self.pending.insert((id, block));
            }
        }
        self.disks.insert(id, content);
        self.whole.insert(id, self.epoch);
    }

    fn value(&mut self) -> u64 {
        self.next_value += 1;
        if self.rng.one_in(9) { 0 } else { self.next_value }
    }

    /// What happens before (and within) a call of a port: guests, time, a kill.
    pub(in crate::ship) fn turn(&mut self) {
        self.trace = self.trace.wrapping_mul(31).wrapping_add(self.rng.0);
        self.now_ms += if self.rng.one_in(10) { self.rng.below(4000) } else { self.rng.below(20) };
        if self.guests {
            for _ in 0..self.rng.below(4) {
                self.guest();
            }
        }
        if self.rng.one_in(self.faults.kill) {
            self.kill();
        }
    }

    /// The daemon dies: writes in flight are done or not; shared memory stays.
    pub(in crate::ship) fn kill(&mut self) -> ! {
        while let Some(writer) = self.writers.pop() {
            if self.rng.one_in(2) {
                self.finish(&writer);
            }
        }
        if let Some(frozen) = self.frozen.take_if(|f| f.gave_up) {
            self.gave_up_unfinished = Some(frozen.blocks.into_keys().collect());
        }
        if self.rng.one_in(self.faults.power.min(4)) {
            self.power_cut();
        } else if self.rng.one_in(self.faults.power.min(8)) {
            self.change_beneath();
        }
        std::panic::resume_unwind(Box::new(Killed))
    }

    /// A disk is changed while the daemon is dead: it ships whole, and the cut is abandoned.
    fn change_beneath(&mut self) {
        self.tracking += 1;
        let disk = self.pick();
        for block in 0..self.disks[&disk].len() {
            if self.rng.one_in(3) {
                let value = self.value();
                if let Some(at) = self.disks.get_mut(&disk).and_then(|d| d.get_mut(block)) {
                    *at = value;
                }
                self.data.insert((disk, block as u64));
            }
        }
        if let Some(frozen) = self.frozen.take() {
            self.pending.extend(frozen.blocks.into_keys());
        }
        self.pending.extend(self.gave_up_unfinished.take().unwrap_or_default());
        self.pending.extend(self.data.iter().filter(|at| at.0 == disk));
        self.whole.insert(disk, self.epoch);
    }

    /// Unsynced writes are kept or lost; hot blocks and maps become pending; the cut is abandoned.
    fn power_cut(&mut self) {
        self.tracking += 1;
        let unsynced = std::mem::take(&mut self.unsynced);
        for (at, before) in unsynced {
            let lost = self.rng.one_in(2);
            if let Some(value) = self.disks.get_mut(&at.0).and_then(|d| d.get_mut(at.1 as usize)) {
                if lost {
                    *value = before;
                    self.data.insert(at);
                }
                self.pending.insert(at);
            }
        }
        if let Some(frozen) = self.frozen.take() {
            self.pending.extend(frozen.blocks.into_keys());
        }
        self.pending.extend(self.gave_up_unfinished.take().unwrap_or_default());
        self.pending.append(&mut self.marks);
        self.epoch += 1;
    }

    fn pick(&mut self) -> DiskId {
        let ids: Vec<_> = self.disks.keys().copied().collect();
        ids[self.rng.below(ids.len() as u64) as usize]
    }

    /// One step of a guest.
    pub(in crate::ship) fn guest(&mut self) {
        let disk = self.pick();
        let blocks = self.disks[&disk].len() as u64;
        match self.rng.below(40) {
            0..=17 => self.enter(disk, blocks),
            18..=35 => {
                if !self.writers.is_empty() {
                    let index = self.rng.below(self.writers.len() as u64) as usize;
                    let writer = self.writers.remove(index);
                    self.finish(&writer);
                }
            }
            36 | 37 => {
                let first = self.rng.below(blocks.max(1));
                let end = first + 1 + self.rng.below(6);
                self.punch(disk, first..end.min(blocks));
            }
            38 => self.resize(disk, blocks),
            _ => {
                if self.rng.one_in(self.faults.join) && self.disks.len() < 5 {
                    self.join_disk();
                }
            }
        }
    }

    /// Steps 1 and 2 of a write; sometimes one that grows the disk.
    fn enter(&mut self, disk: DiskId, blocks: u64) {
        let growth = if self.rng.one_in(20) && blocks < 70 { 3 } else { 0 };
        let at = (disk, self.rng.below(blocks + growth));
        if self.writers.len() > 4 || self.writers.iter().any(|w| w.at == at) {
            return;
        }
        let value = self.value();
        self.marks.insert(at);
        self.writers.push(Writer { epoch: self.epoch, at, value });
    }

    /// Steps 3 to 5.
    fn finish(&mut self, writer: &Writer) {
        self.preserve(writer.epoch, writer.at);
        self.store(writer.at, writer.value, true);
        // A write of the epoch that was cut: the cut may have it, and after draining has it.
        let is_late = writer.epoch < self.epoch;
        if is_late && let Some(oracle) = self.last_cut.and_then(|t| self.oracles.get_mut(&t)) {
            put(oracle.entry(writer.at.0).or_default(), writer.at.1, writer.value);
        }
    }

    fn store(&mut self, at: (DiskId, u64), value: u64, is_data: bool) {
        let disk = self.disks.entry(at.0).or_default();
        let before = disk.get(at.1 as usize).copied().unwrap_or(0);
        self.unsynced.entry(at).or_insert(before);
        put(disk, at.1, value);
        if is_data {
            self.data.insert(at);
        } else {
            self.data.remove(&at);
        }
    }

    /// Step 3 (T3), or a give-up (T5), said before the write.
    fn preserve(&mut self, epoch: u64, at: (DiskId, u64)) {
        let old = self.disks.get(&at.0).and_then(|d| d.get(at.1 as usize)).copied().unwrap_or(0);
        let gives_up = self.rng.one_in(self.faults.give_up);
        let Some(frozen) = self.frozen.as_mut().filter(|f| f.cut.epoch.0 + 1 == epoch && !f.gave_up) else {
            return;
        };
        if let Some(kept @ Kept::Frozen) = frozen.blocks.get_mut(&at) {
            if gives_up {
                frozen.gave_up = true;
            } else {
                *kept = Kept::Preserved(old);
            }
        }
    }

    fn punch(&mut self, disk: DiskId, blocks: std::ops::Range<u64>) {
        for block in blocks {
            let at = (disk, block);
            if self.writers.iter().all(|w| w.at != at) {
                self.marks.insert(at);
                self.preserve(self.epoch, at);
                self.store(at, 0, false);
            }
        }
    }

    /// T10: truncation marks from the smaller to the larger size; the cut waits for it.
    fn resize(&mut self, disk: DiskId, blocks: u64) {
        if self.writers.iter().any(|w| w.at.0 == disk) {
            return;
        }
        let to = 8 + self.rng.below(60);
        for block in to.min(blocks)..to.max(blocks) {
            let at = (disk, block);
            self.marks.insert(at);
            self.preserve(self.epoch, at);
            if block < blocks {
                self.store(at, 0, false);
                self.unsynced.remove(&at);
            }
        }
        self.disks.entry(disk).or_default().resize(to as usize, 0);
    }

    /// Writers of epochs up to `epoch` leave.
    pub(in crate::ship) fn drain(&mut self, epoch: u64) {
        let (gone, rest) = std::mem::take(&mut self.writers).into_iter().partition(|w| w.epoch <= epoch);
        self.writers = rest;
        let gone: Vec<Writer> = gone;
        gone.iter().for_each(|w| self.finish(w));
    }

    /// A fault of a call: an error before or after its effect.
    pub(in crate::ship) fn fault(&mut self, what: &str) -> Result<()> {
        if let Some(kind) = self.broken.filter(|_| what == "reading") {
            return Err(Error::new(kind, "the file is gone"));
        }
        if !self.rng.one_in(self.faults.call) {
            return Ok(());
        }
        let kinds = [ErrorKind::Unreachable, ErrorKind::Io, ErrorKind::NoSpace, ErrorKind::Busy];
        let kind = if self.rng.one_in(40) { ErrorKind::NotFound } else { kinds[self.rng.below(4) as usize] };
        Err(Error::new(kind, format!("{what} failed")))
    }

    /// P2a: what differs between vault and source is marked, frozen, pending or being written.
    pub(in crate::ship) fn check_marks(&mut self, image: &Image, when: &str) {
        let mut lost = None;
        for (id, disk) in &self.disks {
            let copy = image.get(id);
            for block in 0..disk.len().max(copy.map_or(0, Vec::len)) as u64 {
                let at = (*id, block);
                let value = |d: &Vec<u64>| d.get(block as usize).copied().unwrap_or(0);
                let is_known = self.marks.contains(&at)
                    || self.pending.contains(&at)
                    || self.whole.contains_key(id)
                    || self.gave_up_unfinished.as_ref().is_some_and(|u| u.contains(&at))
                    || self.frozen.as_ref().is_some_and(|f| f.blocks.contains_key(&at));
                if !is_known && copy.map_or(0, value) != value(disk) {
                    lost = Some(format!("{when}: block {block} of {id} differs and is not marked"));
                }
            }
        }
        if let Some(lost) = lost
            && !self.is_rolled_back
        {
            self.violate(lost);
        }
    }
}

/// Writes a block, and grows the disk if it lies beyond its end.
pub(in crate::ship) fn put(disk: &mut Vec<u64>, block: u64, value: u64) {
    let index = block as usize;
    if disk.len() <= index {
        disk.resize(index + 1, 0);
    }
    disk[index] = value;
}
