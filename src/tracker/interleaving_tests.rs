//! Rules T1, T2, T3, T4 and T6 under `shuttle`: the production gate, maps and pins, with the disk,
//! the vault and the log as arrays. Each rule holds in every schedule that was tried, and each
//! mutation of it is found, as in the SPIN model (`model/tracker.pml`).
//!
//! A block has one sector here and a region one block; a write is a store of a number that counts
//! up, so that a later write is a larger number.

use std::time::Duration;

use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use shuttle::sync::{Arc, Mutex};
use shuttle::{Config, Runner, thread};

use super::canary::{Mutation, Rule};
use super::gate::{EpochWord, Gate, Previous, announce_give_up};
use super::map::{BlockState, mark, settle, state};
use super::regions::Pins;
use super::sync::shuttled::Shuttle;

const BLOCKS: usize = 2;
/// Schedules per test.
const SCHEDULES: usize = 700;

/// A VM of `BLOCKS` disks of one block each.
struct World {
    word: AtomicU64,
    gate: Gate<Shuttle>,
    maps: [Vec<AtomicU64>; 3],
    disk: [AtomicU64; BLOCKS],
    /// Copies of the frozen epoch.
    preserved: Mutex<[Option<u64>; BLOCKS]>,
    /// Highest number acknowledged per block.
    acknowledged: [AtomicU64; BLOCKS],
    mutation: Mutation,
}

impl World {
    fn new(broken: Option<Rule>) -> Arc<Self> {
        let mutation = broken.map_or_else(Mutation::default, Mutation::broken);
        let map = || vec![AtomicU64::new(0)];
        Arc::new(Self {
            word: AtomicU64::new(EpochWord::new(4, Previous::Forgotten).0),
            gate: Gate::new(mutation),
            maps: [map(), map(), map()],
            disk: Default::default(),
            preserved: Mutex::new([None; BLOCKS]),
            acknowledged: Default::default(),
            mutation,
        })
    }

    /// Steps 2 to 5 of a write.
    fn write(&self, shard: usize, block: usize, value: u64) {
        let entered = self.gate.enter(&self.word, shard, |word| {
            mark(&self.maps[EpochWord::map_of(word.epoch())], block as u64..block as u64 + 1);
        });
        let frozen = entered.epoch() - 1;
        let map = &self.maps[EpochWord::map_of(frozen)];
        if entered.previous() == Previous::Frozen && state(map, block as u64) == BlockState::Marked {
            let copy = self.disk[block].load(SeqCst);
            let mut preserved = self.preserved.lock().unwrap();
            if settle(map, block as u64, BlockState::Preserved).is_ok() {
                preserved[block] = Some(copy);
            }
        }
        self.disk[block].store(value, SeqCst);
        self.gate.leave(entered.epoch(), shard);
        self.acknowledged[block].store(value, SeqCst);
    }

    fn cut(&self) -> u64 {
        let epoch = EpochWord(self.word.load(SeqCst)).epoch();
        self.gate.cut(&self.word, || Some(EpochWord::new(epoch + 1, Previous::Frozen)));
        epoch
    }

    /// Reads block of the frozen epoch as `Source::read_frozen` does. `None`: it gave up its cut.
    fn read(&self, frozen: u64, block: usize) -> Option<u64> {
        let map = &self.maps[EpochWord::map_of(frozen)];
        let current = &self.maps[EpochWord::map_of(frozen + 1)];
        let asked_first = self.mutation.breaks(Rule::T4).then(|| state(current, block as u64));
        let read = self.disk[block].load(SeqCst);
        match settle(map, block as u64, BlockState::Read) {
            Ok(()) => Some(read),
            Err(BlockState::Preserved) if self.mutation.breaks(Rule::T3) => Some(read),
            Err(BlockState::Preserved) => self.preserved.lock().unwrap()[block],
            Err(BlockState::Read) => {
                // T4: asked after the block has been read again.
                let asked = asked_first.unwrap_or_else(|| state(current, block as u64));
                if asked == BlockState::Clean {
                    return Some(read);
                }
                announce_give_up(&self.word, frozen);
                None
            }
            Err(_) => Some(0),
        }
    }

    fn drain(&self, epoch: u64) {
        if !self.mutation.breaks(Rule::T2) {
            self.gate.wait_writers(&[epoch], Duration::MAX);
        }
    }
}

/// Two writers with dependent pairs that cross the blocks in opposite directions, a cut, and its
/// content: in both blocks what was acknowledged before, and no second write without its first.
fn cut_is_a_prefix(broken: Option<Rule>) {
    let world = World::new(broken);
    let writers: Vec<_> = (0..2)
        .map(|w| {
            let world = world.clone();
            thread::spawn(move || {
                let (first, second) = (w, 1 - w);
                world.write(w, first, 1 + w as u64);
                world.write(w, second, 11 + w as u64);
            })
        })
        .collect();
    let before: Vec<u64> = world.acknowledged.iter().map(|a| a.load(SeqCst)).collect();
    let epoch = world.cut();
    world.drain(epoch);
    let point: Vec<u64> = (0..BLOCKS).map(|b| world.read(epoch, b).expect("nothing is lost")).collect();
    for w in 0..2u64 {
        let (first, second) = (w as usize, 1 - w as usize);
        let has_second = point[second] == 11 + w;
        let has_first = point[first] != 0;
        assert!(!has_second || has_first, "writer {w}: the second write without the first: {point:?}");
    }
    for block in 0..BLOCKS {
        assert!(before[block] == 0 || point[block] != 0, "acknowledged, and missing: {before:?} {point:?}");
    }
    writers.into_iter().for_each(|t| t.join().unwrap());
    // What the point lacks is marked in the epoch after it (P2a).
    for (block, shown) in point.iter().enumerate() {
        let marked = state(&world.maps[EpochWord::map_of(epoch + 1)], block as u64) != BlockState::Clean;
        let now = world.disk[block].load(SeqCst);
        assert!(now == *shown || marked, "block {block} differs and is not marked");
    }
}

/// A writer of block 1, and one that writes block 0 and then block 1, around a cut: what the
/// point shows of the second writer is a prefix of what it did.
fn later_writes_do_not_leak_into_the_cut(broken: Option<Rule>) {
    let world = World::new(broken);
    let spawn = |shard: usize, writes: &'static [(usize, u64)]| {
        let world = world.clone();
        thread::spawn(move || writes.iter().for_each(|(block, value)| world.write(shard, *block, *value)))
    };
    let one = spawn(0, &[(1, 1)]);
    let two = spawn(1, &[(0, 11), (1, 12)]);
    let epoch = world.cut();
    world.drain(epoch);
    let point: Vec<u64> = (0..BLOCKS).map(|b| world.read(epoch, b).expect("nothing is lost")).collect();
    assert!(point[1] != 12 || point[0] == 11, "the second write without the first: {point:?}");
    one.join().unwrap();
    two.join().unwrap();
}

/// The cut is known to hold value 1: two writers of the next epoch overwrite, the shipper reads.
fn preserved_content_is_that_of_the_cut(broken: Option<Rule>) {
    let world = World::new(broken);
    world.write(0, 0, 1);
    let epoch = world.cut();
    world.drain(epoch);
    let writers: Vec<_> = (0..2)
        .map(|w| {
            let world = world.clone();
            thread::spawn(move || world.write(w, 0, 2 + w as u64))
        })
        .collect();
    assert_eq!(world.read(epoch, 0), Some(1), "content of after the cut");
    writers.into_iter().for_each(|t| t.join().unwrap());
}

/// A part is lost after its block was read: it is made again only if nobody has written since.
fn lost_part_is_not_made_from_live_data(broken: Option<Rule>) {
    let world = World::new(broken);
    world.write(0, 0, 1);
    let epoch = world.cut();
    world.drain(epoch);
    assert_eq!(world.read(epoch, 0), Some(1));
    let writer = {
        let world = world.clone();
        thread::spawn(move || world.write(1, 0, 2))
    };
    let again = world.read(epoch, 0);
    assert!(matches!(again, None | Some(1)), "content of after the cut: {again:?}");
    writer.join().unwrap();
}

/// A writer, and a cooler that clears the bit, waits, makes durable, logs cold. At the end a
/// block that was written is durably marked or its region is durably hot (P2b).
fn cooling_loses_no_mark(broken: Option<Rule>) {
    struct Cooling {
        pins: Pins<Shuttle>,
        hot: AtomicBool,
        /// Log: last word and number of the last activation.
        log: Mutex<(bool, u64)>,
        marked: AtomicBool,
        durable: AtomicBool,
    }
    let c = Arc::new(Cooling {
        pins: Pins::default(),
        hot: AtomicBool::new(true),
        log: Mutex::new((true, 1)),
        marked: AtomicBool::new(false),
        durable: AtomicBool::new(false),
    });
    let writers: Vec<_> = (0..2)
        .map(|w| {
            let c = c.clone();
            thread::spawn(move || {
                let turn = c.pins.pin(w);
                if !c.hot.load(SeqCst) {
                    let mut log = c.log.lock().unwrap();
                    *log = (true, log.1 + 1);
                    c.hot.store(true, SeqCst);
                }
                c.marked.store(true, SeqCst);
                // The write itself: from here on the block differs.
                let covered = c.durable.load(SeqCst) || c.log.lock().unwrap().0;
                assert!(covered, "written to a region that is durably cold");
                c.pins.unpin(w, turn);
            })
        })
        .collect();
    for _ in 0..2 {
        c.durable.store(false, SeqCst);
        c.hot.store(false, SeqCst);
        let number = c.log.lock().unwrap().1;
        if broken != Some(Rule::T6) {
            c.pins.wait_all(Duration::MAX);
        }
        if c.marked.load(SeqCst) {
            c.durable.store(true, SeqCst);
        }
        let mut log = c.log.lock().unwrap();
        // T6: a newer activation voids it.
        if log.1 == number {
            log.0 = false;
        }
    }
    writers.into_iter().for_each(|t| t.join().unwrap());
}

fn holds(scenario: fn(Option<Rule>)) {
    by_chance(SCHEDULES).run(move || scenario(None));
    by_priority(SCHEDULES / 2, 3).run(move || scenario(None));
}

/// The mutation gives a counterexample.
fn is_found(scenario: fn(Option<Rule>), rule: Rule) {
    let found = std::panic::catch_unwind(|| {
        by_priority(20_000, 4).run(move || scenario(Some(rule)));
        by_chance(20_000).run(move || scenario(Some(rule)));
    });
    assert!(found.is_err(), "{rule:?} broken, and no schedule shows it");
}

/// The same schedules in every run: what passes once passes always.
const SEED: u64 = 20;

fn by_chance(schedules: usize) -> Runner<RandomScheduler> {
    Runner::new(RandomScheduler::new_from_seed(SEED, schedules), Config::default())
}

fn by_priority(schedules: usize, depth: usize) -> Runner<PctScheduler> {
    Runner::new(PctScheduler::new_from_seed(SEED, depth, schedules), Config::default())
}

#[test]
fn t1_t2_a_cut_is_a_prefix() {
    holds(cut_is_a_prefix);
    holds(later_writes_do_not_leak_into_the_cut);
}

#[test]
fn t1_storing_first_is_found() {
    is_found(later_writes_do_not_leak_into_the_cut, Rule::T1);
}

#[test]
fn t2_reading_before_writers_have_left_is_found() {
    is_found(cut_is_a_prefix, Rule::T2);
}

#[test]
fn t3_the_first_settles_the_block() {
    holds(preserved_content_is_that_of_the_cut);
}

#[test]
fn t3_believing_a_late_read_is_found() {
    is_found(preserved_content_is_that_of_the_cut, Rule::T3);
}

#[test]
fn t4_a_lost_part_is_not_made_from_live_data() {
    holds(lost_part_is_not_made_from_live_data);
}

#[test]
fn t4_asking_before_reading_is_found() {
    is_found(lost_part_is_not_made_from_live_data, Rule::T4);
}

#[test]
fn t6_cooling_loses_no_mark() {
    holds(cooling_loses_no_mark);
}

#[test]
fn t6_cooling_without_waiting_is_found() {
    is_found(cooling_loses_no_mark, Rule::T6);
}
