//! The overlay against a model: random changes, syncs, kills, reopenings.
//!
//! A kill is a drop without a sync: the files are as the kernel has them, memory is gone. After it
//! every block must be in the state of the last sync or in a later one, and the size that of
//! the last sync or truncation.

use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;

use super::mountpoint::Owner;
use super::overlay::OverlayDisk;
use super::overlay_sync::create_disk;
use crate::base::{BLOCK_BYTES, DiskId, EpochNumber, Error, Extent, PointId, Result, Timestamp};
use crate::core::ports::points::{PointDisk, PointInfo, PointReader};
use crate::format::manifest::{Consistency, DefinitionFile, EpochKind};

const BLOCK: usize = BLOCK_BYTES as usize;
const SIZE: usize = 10 * BLOCK + 100;

/// One disk: blocks 3 to 5 are zeros, the rest is data.
struct Point {
    info: PointInfo,
    disks: Vec<PointDisk>,
    content: Vec<u8>,
}

fn point() -> Arc<Point> {
    let mut content: Vec<u8> = (0..SIZE).map(|i| (i / BLOCK + i % 251) as u8 | 1).collect();
    content[3 * BLOCK..6 * BLOCK].fill(0);
    let info = PointInfo {
        id: PointId { epoch: EpochNumber(1), tag: 1 },
        time: Timestamp(0),
        arrived: Timestamp(0),
        kind: EpochKind::Full,
        consistency: Consistency::Crash,
        pinned: false,
        changed_bytes: 0,
        size_bytes: SIZE as u64,
    };
    let disk = PointDisk { id: DiskId(7), path: "d".into(), size: SIZE as u64, backing: None };
    Arc::new(Point { info, disks: vec![disk], content })
}

impl PointReader for Point {
    fn info(&self) -> &PointInfo {
        &self.info
    }

    fn disks(&self) -> &[PointDisk] {
        &self.disks
    }

    fn definition(&self) -> &[DefinitionFile] {
        &[]
    }

    fn read_at(&self, _: usize, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        let rest = &self.content[SIZE.min(offset as usize)..];
        let n = rest.len().min(buffer.len());
        buffer[..n].copy_from_slice(&rest[..n]);
        Ok(n)
    }

    fn next_data(&self, _: usize, offset: u64) -> Result<Option<Extent>> {
        let runs = [0..3 * BLOCK as u64, 6 * BLOCK as u64..SIZE as u64];
        let run = runs.into_iter().find(|r| r.end > offset);
        Ok(run.map(|r| {
            let start = r.start.max(offset);
            Extent { offset: start, length: r.end - start }
        }))
    }
}

#[derive(Clone, Debug)]
enum Op {
    Write(usize, usize, u8),
    Zero(usize, usize, bool),
    Allocate(usize, usize),
    Truncate(usize),
    Sync,
    Reopen,
    Kill,
}

fn op() -> impl Strategy<Value = Op> {
    let at = || 0..14 * BLOCK;
    let length = || prop_oneof![1..600usize, Just(BLOCK), 1..5 * BLOCK];
    let aligned = || prop_oneof![at(), (0..14usize).prop_map(|n| n * BLOCK)];
    prop_oneof![
        6 => (aligned(), length(), 1u8..255).prop_map(|(a, l, v)| Op::Write(a, l, v)),
        3 => (aligned(), length(), any::<bool>()).prop_map(|(a, l, k)| Op::Zero(a, l, k)),
        1 => (aligned(), length()).prop_map(|(a, l)| Op::Allocate(a, l)),
        2 => aligned().prop_map(Op::Truncate),
        2 => Just(Op::Sync),
        1 => Just(Op::Reopen),
        2 => Just(Op::Kill),
    ]
}

/// What the disk should be. `states`: that of the last sync and every one since; the last is now.
struct Model {
    states: Vec<Vec<u8>>,
    /// Size after a kill, at least: that of the last sync or shrinking truncation.
    size: usize,
}

impl Model {
    fn now(&self) -> &Vec<u8> {
        self.states.last().unwrap()
    }

    fn change(&mut self, f: impl FnOnce(&mut Vec<u8>)) {
        let mut next = self.now().clone();
        f(&mut next);
        self.states.push(next);
    }

    fn settle(&mut self) {
        let now = self.now().clone();
        self.size = now.len();
        self.states = vec![now];
    }

    /// A disk found after a kill is one that the model allows; from now on it is the state.
    fn take(&mut self, found: Vec<u8>) {
        assert!(found.len() == self.size, "size {} after a kill, not {}", found.len(), self.size);
        for (n, block) in found.chunks(BLOCK).enumerate() {
            let allowed = self.states.iter().any(|state| {
                let mut wanted = state.get(n * BLOCK..).unwrap_or_default().to_vec();
                wanted.resize(block.len(), 0);
                wanted == block
            });
            assert!(allowed, "block {n} is none of its {} states", self.states.len());
        }
        self.states = vec![found];
    }
}

fn content(disk: &OverlayDisk) -> Vec<u8> {
    disk.read(0, 1 << 20).unwrap()
}

fn open(folder: &Path, point: &Arc<Point>) -> OverlayDisk {
    OverlayDisk::open(folder, point.clone(), 0).unwrap()
}

/// Every byte that SEEK_DATA skips is zero, and the seeks end.
fn assert_seeks(disk: &OverlayDisk, now: &[u8]) {
    let or_end = |found: Result<u64, Error>| found.map_or(now.len(), |at| at as usize);
    let mut at = 0;
    while at < now.len() {
        let data = or_end(disk.seek(at as u64, libc::SEEK_DATA));
        assert!(now[at..data].iter().all(|b| *b == 0), "data before {data} was skipped");
        at = or_end(disk.seek(data as u64, libc::SEEK_HOLE));
        assert!(data == now.len() || at > data);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]
    #[test]
    fn equals_its_model_through_kills(ops in prop::collection::vec(op(), 1..40)) {
        let folder = tempfile::tempdir().unwrap();
        let point = point();
        let owner = Owner { uid: 0, gid: 0, mode: 0o700 };
        create_disk(folder.path(), &point.disks[0], owner, Timestamp(1)).unwrap();
        let mut disk = open(folder.path(), &point);
        let mut model = Model { states: vec![point.content.clone()], size: SIZE };
        for op in ops {
            match op {
                Op::Write(at, length, value) => {
                    disk.write(at as u64, &vec![value; length], Timestamp(2)).unwrap();
                    model.change(|now| {
                        now.resize(now.len().max(at + length), 0);
                        now[at..at + length].fill(value);
                    });
                }
                Op::Zero(at, length, keep_size) => {
                    disk.zero(at as u64, length as u64, keep_size, Timestamp(2)).unwrap();
                    model.change(|now| {
                        let wanted = if keep_size { now.len() } else { now.len().max(at + length) };
                        now.resize(wanted, 0);
                        let end = (at + length).min(now.len());
                        now[at.min(end)..end].fill(0);
                    });
                }
                Op::Allocate(at, length) => {
                    disk.allocate(at as u64, length as u64, false).unwrap();
                    model.change(|now| now.resize(now.len().max(at + length), 0));
                }
                Op::Truncate(size) => {
                    disk.truncate(size as u64, Timestamp(2)).unwrap();
                    if size < model.now().len() {
                        // Durable at once; what is cut off never comes back.
                        model.states.iter_mut().for_each(|state| state.truncate(size));
                        model.size = size;
                    } else {
                        model.change(|now| now.resize(size, 0));
                    }
                }
                Op::Sync => {
                    disk.sync(false).unwrap();
                    model.settle();
                }
                Op::Reopen => {
                    disk.sync(true).unwrap();
                    disk = open(folder.path(), &point);
                    model.settle();
                }
                Op::Kill => {
                    disk = open(folder.path(), &point);
                    model.take(content(&disk));
                }
            }
            prop_assert!(&content(&disk) == model.now());
            assert_seeks(&disk, model.now());
        }
    }
}
