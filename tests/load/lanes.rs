//! The lanes of a load: each a thread with one write in flight, so that as many are in flight as
//! there are lanes.
//!
//! What they write: whole blocks, 512-byte records of which several share a block, 4 KiB records
//! that begin in the middle of a block, and pairs over two disks of which the second is issued
//! after the first was acknowledged. Most of it goes to a small hot area, so that blocks are
//! overwritten again and again while they are being shipped. Every other lane writes `O_DIRECT`.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use super::journal::Journal;
use super::sector::{SECTOR, Tag};

/// Streams of single writes; each has several lanes. Half as many write pairs.
const STREAMS: usize = 4;
/// With many lanes most writes wait in a queue before the daemon sees them, so that few are both
/// issued and done in the moment of a cut: `AFTERIMAGE_LANES=1` shows what goes wrong in one.
const LANES_PER_STREAM: usize = 8;

/// Sectors of a block, and of the hot area at the start of a disk.
const BLOCK: u64 = 8;
const HOT: u64 = 24 * BLOCK;
const ALIGN: usize = 4096;

/// A load at work. Dropping it stops it.
pub struct Load {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    journal: Arc<Journal>,
    disks: Vec<PathBuf>,
    per_stream: usize,
    /// After an error a lane opens its disks again and goes on; else the error is the result.
    reopens: bool,
    stop: AtomicBool,
    pairs: AtomicU64,
    errors: Mutex<Vec<String>>,
    failed_writes: AtomicU64,
}

impl Load {
    /// Starts all lanes on `disks` (two, existing, of `sectors` sectors each).
    pub fn start(disks: &[PathBuf], sectors: u64, reopens: bool) -> Self {
        assert_eq!(disks.len(), 2);
        let per_stream = crate::common::rounds("AFTERIMAGE_LANES", LANES_PER_STREAM);
        let lanes = STREAMS * per_stream + per_stream.div_ceil(2);
        let shared = Arc::new(Shared {
            journal: Arc::new(Journal::new(lanes, vec![sectors; disks.len()])),
            disks: disks.to_vec(),
            per_stream,
            reopens,
            stop: AtomicBool::new(false),
            pairs: AtomicU64::new(0),
            errors: Mutex::default(),
            failed_writes: AtomicU64::new(0),
        });
        let threads = (0..lanes)
            .map(|number| {
                let shared = shared.clone();
                let name = format!("lane {number}");
                std::thread::Builder::new().name(name).spawn(move || Lane::new(shared, number).run()).unwrap()
            })
            .collect();
        Self { shared, threads }
    }

    pub fn journal(&self) -> &Arc<Journal> {
        &self.shared.journal
    }

    /// Pairs written so far.
    pub fn pairs(&self) -> u64 {
        self.shared.pairs.load(Ordering::SeqCst)
    }

    /// Waits until `more` further pairs are written.
    pub fn wait_pairs(&self, more: u64) {
        let until = self.pairs() + more;
        while self.pairs() < until {
            self.no_errors();
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn no_errors(&self) {
        let errors = self.shared.errors.lock().unwrap();
        assert!(errors.is_empty(), "the load failed: {}", errors.join("; "));
    }

    /// Writes that ended with an error, after which the lane reopened its disk.
    pub fn failed_writes(&self) -> u64 {
        self.shared.failed_writes.load(Ordering::SeqCst)
    }

    /// Stops; every write has been acknowledged or has failed when it returns.
    pub fn stop(mut self) -> Arc<Journal> {
        self.end();
        self.no_errors();
        self.shared.journal.clone()
    }

    fn end(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.end();
    }
}

struct Lane {
    shared: Arc<Shared>,
    number: usize,
    random: u64,
    files: Vec<Option<File>>,
    /// Holds an aligned buffer of a block, for `O_DIRECT`.
    memory: Vec<u8>,
}

impl Lane {
    fn new(shared: Arc<Shared>, number: usize) -> Self {
        let files = shared.disks.iter().map(|_| None).collect();
        let random = 0x9e37_79b9_7f4a_7c15u64.wrapping_mul(number as u64 + 1);
        Self { shared, number, random, files, memory: vec![0; 2 * ALIGN] }
    }

    fn run(mut self) {
        while !self.stopped() {
            let is_pair = self.number >= STREAMS * self.shared.per_stream;
            let written = if is_pair { self.pair() } else { self.single() };
            if let Err(why) = written {
                self.shared.errors.lock().unwrap().push(format!("lane {}: {why}", self.number));
                return;
            }
        }
    }

    fn stopped(&self) -> bool {
        self.shared.stop.load(Ordering::SeqCst)
    }

    fn random(&mut self, below: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) % below
    }

    fn block(&mut self, sectors: u64) -> u64 {
        let area = if self.random(4) == 0 { sectors } else { HOT.min(sectors) };
        self.random(area / BLOCK) * BLOCK
    }

    fn single(&mut self) -> Result<(), String> {
        let disk = u32::try_from(self.random(self.shared.disks.len() as u64)).unwrap();
        let sectors = self.shared.journal.disks[disk as usize];
        let block = self.block(sectors);
        let (first, count) = match self.number / self.shared.per_stream {
            0 => (block, BLOCK),
            1 => (block + self.random(BLOCK), 1),
            2 => ((block + 1 + self.random(BLOCK - 1)).min(sectors - BLOCK), BLOCK),
            _ => (block + self.random(4), 1 + self.random(4)),
        };
        self.write(disk, first, count).map(|_| ())
    }

    /// The second write is issued only after the first was acknowledged.
    fn pair(&mut self) -> Result<(), String> {
        let (a, b) = if self.random(2) == 0 { (0, 1) } else { (1, 0) };
        let sectors = self.shared.journal.disks[a as usize];
        let place = self.block(sectors) + self.random(BLOCK);
        if self.write(a, place, 1)? && self.write(b, place, 1)? {
            self.shared.pairs.fetch_add(1, Ordering::SeqCst);
        }
        Ok(())
    }

    /// `false`: the write failed and may be done or not; the next one opens the disk again.
    fn write(&mut self, disk: u32, first: u64, count: u64) -> Result<bool, String> {
        if !self.open(disk)? {
            return Ok(false);
        }
        let write = self.shared.journal.issue(self.number, disk, first, count);
        let start = self.memory.as_ptr().align_offset(ALIGN);
        let length = usize::try_from(count).unwrap() * SECTOR;
        let buffer = &mut self.memory[start..start + length];
        let lane = u32::try_from(self.number).unwrap();
        for (sector, bytes) in (first..).zip(buffer.chunks_exact_mut(SECTOR)) {
            Tag { disk, lane, write, sector }.encode(bytes);
        }
        let file = self.files[disk as usize].as_ref().unwrap();
        match file.write_all_at(buffer, first * SECTOR as u64) {
            Ok(()) => {
                self.shared.journal.acknowledge(self.number, write);
                Ok(true)
            }
            Err(_) if self.shared.reopens => {
                self.shared.failed_writes.fetch_add(1, Ordering::SeqCst);
                self.files[disk as usize] = None;
                Ok(false)
            }
            Err(e) => Err(format!("write to {}: {e}", self.shared.disks[disk as usize].display())),
        }
    }

    /// `false`: the load is being stopped.
    fn open(&mut self, disk: u32) -> Result<bool, String> {
        while self.files[disk as usize].is_none() {
            let path = &self.shared.disks[disk as usize];
            let flags = if self.number.is_multiple_of(2) { libc::O_DIRECT } else { 0 };
            match OpenOptions::new().write(true).custom_flags(flags).open(path) {
                Ok(file) => self.files[disk as usize] = Some(file),
                Err(e) if !self.shared.reopens => return Err(format!("open {}: {e}", path.display())),
                Err(_) if self.stopped() => return Ok(false),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
        Ok(true)
    }
}

/// What lanes write on ordinary files stands up to their own journal, and a file that lost one
/// acknowledged sector does not.
#[test]
fn a_load_on_ordinary_files_stands_up_to_its_journal() {
    let scratch = crate::common::Scratch::new("load");
    let bytes = 4 << 20;
    let disks = ["a.img", "b.img"].map(|name| scratch.path().join(name));
    disks.iter().for_each(|disk| crate::common::sparse(disk, bytes));
    let load = Load::start(&disks, bytes / 512, false);
    load.wait_pairs(2000);
    let journal = load.stop();
    let mut content = disks.clone().map(|disk| std::fs::read(disk).unwrap()).to_vec();
    super::Checker::new(&journal).check(&content, journal.now()).unwrap();
    let written = content[1].chunks(SECTOR).position(|s| s[0] != 0).unwrap();
    content[1][written * SECTOR..(written + 1) * SECTOR].fill(0);
    super::Checker::new(&journal).check(&content, journal.now()).unwrap_err();
}
