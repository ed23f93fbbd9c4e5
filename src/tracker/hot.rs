//! The hot-region log at work (T6, T7, T8): one thread owns the file, writers ask it.
//!
//! Activations that arrive while a batch is being synced share the next one (group commit). Only
//! this thread sets bits of regions, after their record is durable, and it alone writes *cold*
//! records: a region whose bit is set again by then is left out, and the number in the record
//! voids it for any activation that is newer still.
//!
//! Killed: the next process reads the file and begins a new one. Disk full or an error: the other
//! file is begun from what the log says; if that fails too, writers are told and fall back to the
//! untracked mark on the disk file (T8).

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use super::regions::Regions;
use super::sync::lock;
use crate::base::durable::{read_limited, sync_dir};
use crate::base::error::Context;
use crate::base::{BootId, DiskId, ErrorKind, Result};
use crate::format::hotlog::{
    self, HOT_BYTES_MAX, HOT_HEADER_BYTES, HOT_RECORD_BYTES, HotHeader, HotKind, HotRecord, HotReport, HotSet,
};

/// Bytes of a new file, at least: room for 8 thousand records, each twice.
const FILE_BYTES_MIN: usize = 1 << 20;
/// Requests that share one sync, at most.
const BATCH_MAX: usize = 4096;
/// Written whole or not at all; the header of the file is in its first one.
const SECTOR_BYTES: usize = 512;

/// What was found at the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HotFound {
    /// A log that can be read.
    Good {
        /// Its id.
        log: u128,
        /// Its generation.
        generation: u64,
    },
    /// None, or none that can be trusted.
    Missing,
}

enum Request {
    Hot { regions: Arc<Regions>, range: Range<u64>, reply: Sender<bool> },
    Cold { regions: Arc<Regions>, ranges: Vec<Range<u64>>, number: u64, reply: Sender<bool> },
    Forget { disk: DiskId, reply: Sender<bool> },
    Rewrite { add: Option<Arc<Regions>>, reply: Sender<bool> },
    Stop,
}

/// The log of a host.
pub(crate) struct HotLog {
    sender: Sender<Request>,
    thread: Mutex<Option<JoinHandle<()>>>,
    activation: Arc<AtomicU64>,
    found: Mutex<BTreeMap<DiskId, HotSet>>,
    state: HotFound,
    id: u128,
    generation: Arc<AtomicU64>,
}

impl HotLog {
    /// Reads what is there and begins a new file with it.
    pub(crate) fn open(state_dir: &Path, boot: BootId) -> Result<Self> {
        let old = newest(state_dir)?;
        let state = match &old {
            Some(r) => HotFound::Good { log: r.header.log, generation: r.header.generation },
            None => HotFound::Missing,
        };
        let sets = old.as_ref().map(|r| r.hot.clone()).unwrap_or_default();
        let last = old.as_ref().map_or(0, |r| r.last_activation);
        let activation = Arc::new(AtomicU64::new(last));
        let id = old.as_ref().map_or_else(rand::random, |r| r.header.log);
        let before = old.as_ref().map_or_else(|| unreadable_generation(state_dir), |r| r.header.generation);
        let generation = Arc::new(AtomicU64::new(before));
        let mut writer = Writer {
            dir: state_dir.to_owned(),
            boot,
            id,
            sets: sets.clone(),
            activation: activation.clone(),
            generation: generation.clone(),
            file: None,
        };
        writer.begin_file()?;
        let (sender, receiver) = unbounded();
        let thread = std::thread::Builder::new()
            .name("tracker-hotlog".into())
            .spawn(move || writer.run(&receiver))
            .context(|| "cannot start the thread of the hot-region log")?;
        let thread = Mutex::new(Some(thread));
        Ok(Self { sender, thread, activation, found: Mutex::new(sets), state, id, generation })
    }

    /// What was found at the start.
    pub(crate) fn state(&self) -> HotFound {
        self.state
    }

    /// Id and generation, for the record that tells an older or foreign log.
    pub(crate) fn identity(&self) -> (u128, u64) {
        (self.id, self.generation.load(SeqCst))
    }

    /// Hot regions of a disk at the start.
    pub(crate) fn found(&self, disk: DiskId) -> Vec<Range<u64>> {
        lock(&self.found).get(&disk).map(|s| s.iter().collect()).unwrap_or_default()
    }

    /// Number of the last activation.
    pub(crate) fn last_activation(&self) -> u64 {
        self.activation.load(SeqCst)
    }

    /// Makes regions hot, durably; `false`: not after `patience`, or the log failed.
    pub(crate) fn activate(&self, regions: &Arc<Regions>, range: Range<u64>, patience: Duration) -> bool {
        let (reply, answer) = bounded(1);
        let request = Request::Hot { regions: regions.clone(), range, reply };
        self.sender.send(request).is_ok() && answer.recv_timeout(patience).unwrap_or(false)
    }

    /// Logs regions cold whose bits were cleared before activation `number` was asked for.
    pub(crate) fn cool(&self, regions: &Arc<Regions>, ranges: Vec<Range<u64>>, number: u64) -> bool {
        self.ask(|reply| Request::Cold { regions: regions.clone(), ranges, number, reply })
    }

    /// The disk is not protected any more.
    pub(crate) fn forget(&self, disk: DiskId) -> bool {
        lock(&self.found).remove(&disk);
        self.ask(|reply| Request::Forget { disk, reply })
    }

    /// Begins a new file; with every region whose bit is set in `add`.
    pub(crate) fn rewrite(&self, add: Option<Arc<Regions>>) -> bool {
        self.ask(|reply| Request::Rewrite { add, reply })
    }

    fn ask(&self, request: impl FnOnce(Sender<bool>) -> Request) -> bool {
        let (reply, answer) = bounded(1);
        self.sender.send(request(reply)).is_ok() && answer.recv().unwrap_or(false)
    }

    /// Ends the thread.
    pub(crate) fn stop(&self) {
        let _ = self.sender.send(Request::Stop);
        if let Some(thread) = lock(&self.thread).take() {
            let _ = thread.join();
        }
    }
}

impl Drop for HotLog {
    fn drop(&mut self) {
        self.stop();
    }
}

fn path_of(dir: &Path, generation: u64) -> PathBuf {
    dir.join(format!("hot.log.{}", generation % 2))
}

fn read_file(path: &Path) -> Result<Option<HotReport>> {
    match read_limited(path, HOT_BYTES_MAX)? {
        // Its power went before its first sector was there: it was never the log.
        Some(bytes) if bytes.iter().take(SECTOR_BYTES).any(|b| *b != 0) => hotlog::read(&bytes).map(Some),
        _ => Ok(None),
    }
}

/// The log: the whole file with the highest generation. With a damaged one there is none: an older
/// file instead of it would say too little.
fn newest(dir: &Path) -> Result<Option<HotReport>> {
    let mut files = Vec::new();
    for turn in 0..2 {
        match read_file(&path_of(dir, turn)) {
            Ok(file) => files.extend(file.filter(|r| r.is_whole || r.damaged_at.is_some())),
            Err(e) if e.kind() == ErrorKind::Damaged => {
                log::warn!("{}: {e}: every disk is compared whole", path_of(dir, turn).display());
                return Ok(None);
            }
            Err(e) => return Err(e),
        }
    }
    let newest = files.into_iter().max_by_key(|r| r.header.generation);
    if let Some(at) = newest.as_ref().and_then(|r| r.damaged_at) {
        log::warn!("the hot-region log is damaged at byte {at}: every disk is compared whole");
        return Ok(None);
    }
    Ok(newest)
}

/// The highest generation that any header shows, readable or not.
fn unreadable_generation(dir: &Path) -> u64 {
    let of = |turn| read_file(&path_of(dir, turn)).ok().flatten().map_or(0, |r| r.header.generation);
    of(0).max(of(1))
}

struct OpenFile {
    file: File,
    header: HotHeader,
    offset: u64,
    sequence: u64,
    bytes: u64,
}

/// The thread's own: the file, and what it says.
struct Writer {
    dir: PathBuf,
    boot: BootId,
    id: u128,
    sets: BTreeMap<DiskId, HotSet>,
    activation: Arc<AtomicU64>,
    generation: Arc<AtomicU64>,
    file: Option<OpenFile>,
}

impl Writer {
    fn run(mut self, requests: &Receiver<Request>) {
        while let Ok(first) = requests.recv() {
            let mut batch = vec![first];
            batch.extend(requests.try_iter().take(BATCH_MAX));
            let stop = batch.iter().any(|r| matches!(r, Request::Stop));
            let rewrite = batch.iter().any(|r| matches!(r, Request::Rewrite { .. }));
            let records = self.records_of(&batch);
            let good = self.commit(&records, rewrite);
            for request in batch {
                finish(request, good);
            }
            if stop {
                return;
            }
        }
    }

    /// Records of a batch; the sets say them at once, whatever becomes of the write.
    fn records_of(&mut self, batch: &[Request]) -> Vec<HotRecord> {
        let mut records = Vec::new();
        for request in batch {
            match request {
                Request::Hot { regions, range, .. } => {
                    let covered =
                        self.sets.get(&regions.disk).is_some_and(|s| s.iter().any(|r| contains(&r, range)));
                    // Hot by this very batch, or hot already: nothing to say.
                    if !covered || !regions.are_hot(range.clone()) && !covers(&records, regions.disk, range) {
                        self.push(HotKind::Hot, regions.disk, range.clone(), None, &mut records);
                    }
                }
                Request::Cold { regions, ranges, number, .. } => {
                    for range in ranges {
                        // T6: a region that became hot again is left out.
                        let cold = range.clone().filter(|r| !regions.is_hot(*r));
                        for range in super::regions::ranges_of(cold) {
                            self.push(HotKind::Cold, regions.disk, range, Some(*number), &mut records);
                        }
                    }
                }
                Request::Forget { disk, .. } => self.push(HotKind::Forget, *disk, 0..0, None, &mut records),
                Request::Rewrite { add: Some(regions), .. } => {
                    for range in regions.hot_ranges() {
                        self.push(HotKind::Hot, regions.disk, range, None, &mut records);
                    }
                }
                Request::Rewrite { .. } | Request::Stop => {}
            }
        }
        records
    }

    fn push(
        &mut self,
        kind: HotKind,
        disk: DiskId,
        range: Range<u64>,
        number: Option<u64>,
        records: &mut Vec<HotRecord>,
    ) {
        let activation = number.unwrap_or_else(|| self.activation.fetch_add(1, SeqCst) + 1);
        match kind {
            HotKind::Hot => self.sets.entry(disk).or_default().heat(range.clone(), activation),
            HotKind::Cold => self.sets.entry(disk).or_default().cool(range.clone(), activation),
            HotKind::Forget => {
                self.sets.remove(&disk);
            }
            HotKind::Snapshot => {}
        }
        let length = range.end.saturating_sub(range.start);
        records.push(HotRecord { kind, disk, start: range.start, length, activation });
    }

    /// Makes the records durable: appended, or as part of a new file.
    fn commit(&mut self, records: &[HotRecord], rewrite: bool) -> bool {
        if records.is_empty() && !rewrite && self.file.is_some() {
            return true;
        }
        if !rewrite {
            match self.append(records) {
                Ok(true) => return true,
                Ok(false) => {}
                Err(e) => log::warn!("{e}: a new one is begun"),
            }
        }
        match self.begin_file() {
            Ok(()) => true,
            Err(e) => {
                log::error!("{e}");
                false
            }
        }
    }

    /// `false`: the file is full. After an error nothing is appended to it any more.
    fn append(&mut self, records: &[HotRecord]) -> Result<bool> {
        let Some(mut open) = self.file.take() else { return Ok(false) };
        let mut bytes = Vec::with_capacity(2 * records.len() * HOT_RECORD_BYTES);
        debug_assert!(open.sequence.is_multiple_of(2), "both are in one sector");
        let twice = records.iter().flat_map(|record| [record; 2]);
        for (record, sequence) in twice.zip(open.sequence..) {
            bytes.extend_from_slice(&record.encode(open.header.nonce, sequence));
        }
        if open.offset + bytes.len() as u64 > open.bytes {
            return Ok(false);
        }
        open.file
            .write_all_at(&bytes, open.offset)
            .and_then(|()| open.file.sync_data())
            .context(|| "the hot-region log cannot be written")?;
        open.offset += bytes.len() as u64;
        open.sequence += 2 * records.len() as u64;
        self.file = Some(open);
        Ok(true)
    }

    /// Begins the next file with a snapshot, whole and synced before it counts.
    fn begin_file(&mut self) -> Result<()> {
        self.file = None;
        let generation = self.generation.load(SeqCst) + 1;
        let last_activation = self.activation.load(SeqCst);
        let header =
            HotHeader { log: self.id, generation, nonce: rand::random(), boot: self.boot, last_activation };
        let mut bytes = header.encode();
        let mut sequence = 0;
        let snapshot = self.sets.iter().flat_map(|(disk, set)| {
            set.iter().map(|r| HotRecord {
                kind: HotKind::Hot,
                disk: *disk,
                start: r.start,
                length: r.end - r.start,
                activation: last_activation,
            })
        });
        let end = HotRecord {
            kind: HotKind::Snapshot,
            disk: DiskId(0),
            start: 0,
            length: 0,
            activation: last_activation,
        };
        for record in snapshot {
            bytes.extend_from_slice(&record.encode(header.nonce, sequence));
            sequence += 1;
        }
        // One more where it takes that for what follows to begin at an even number.
        for _ in 0..2 + sequence % 2 {
            bytes.extend_from_slice(&end.encode(header.nonce, sequence));
            sequence += 1;
        }
        let offset = bytes.len() as u64;
        bytes.resize((bytes.len() * 2 - HOT_HEADER_BYTES).max(FILE_BYTES_MIN).next_multiple_of(4096), 0);
        let path = path_of(&self.dir, generation);
        let what = || format!("the hot-region log {} cannot be written", path.display());
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&path)
            .context(what)?;
        file.write_all_at(&bytes, 0).and_then(|()| file.sync_all()).context(what)?;
        // Out of the page cache, which holds it in large pieces: a piece is written again, or at
        // least counted as written, whole for each record. Page by page it comes back.
        let _ = posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        sync_dir(&self.dir)?;
        self.generation.store(generation, SeqCst);
        self.file = Some(OpenFile { file, header, offset, sequence, bytes: bytes.len() as u64 });
        Ok(())
    }
}

fn contains(outer: &Range<u64>, inner: &Range<u64>) -> bool {
    outer.start <= inner.start && inner.end <= outer.end
}

fn covers(records: &[HotRecord], disk: DiskId, range: &Range<u64>) -> bool {
    records
        .iter()
        .any(|r| r.kind == HotKind::Hot && r.disk == disk && contains(&(r.start..r.start + r.length), range))
}

/// Sets bits, then answers.
fn finish(request: Request, good: bool) {
    let reply = match request {
        Request::Hot { regions, range, reply } => {
            if good {
                regions.set_hot(range);
            }
            reply
        }
        Request::Cold { reply, .. } | Request::Forget { reply, .. } | Request::Rewrite { reply, .. } => reply,
        Request::Stop => return,
    };
    let _ = reply.try_send(good);
}
