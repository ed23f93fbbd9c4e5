//! Copies the data of one disk: a few threads read, verify and write; one tells progress.
//!
//! Holes stay holes: only runs that the point calls data are read, and pages of zeros in them
//! are not written. The first error stops all threads.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam_channel::{Receiver, Sender, bounded};

use super::reading::fill;
use crate::base::digest::is_zero;
use crate::base::error::Context;
use crate::base::{BLOCK_BYTES, Error, ErrorKind, Extent, Result};
use crate::core::ports::points::PointReader;

/// Bytes that one thread reads at once.
const PIECE_BYTES: u64 = 1 << 20;
/// Threads that read and write.
const THREADS_MAX: usize = 4;

/// Bytes of a disk that are data.
pub(super) fn data_bytes(reader: &dyn PointReader, disk: usize) -> Result<u64> {
    let mut total = 0u64;
    for run in Runs::of(reader, disk) {
        total = total.saturating_add(run?.length);
    }
    Ok(total)
}

/// The runs of data of a disk, in order.
struct Runs<'a> {
    reader: &'a dyn PointReader,
    disk: usize,
    at: u64,
    size: u64,
}

impl<'a> Runs<'a> {
    fn of(reader: &'a dyn PointReader, disk: usize) -> Self {
        Self { reader, disk, at: 0, size: reader.disks().get(disk).map_or(0, |d| d.size) }
    }
}

impl Iterator for Runs<'_> {
    type Item = Result<Extent>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.size {
            return None;
        }
        let run = match self.reader.next_data(self.disk, self.at) {
            Ok(run) => run?,
            Err(e) => {
                self.at = self.size;
                return Some(Err(e));
            }
        };
        let start = run.offset.max(self.at);
        let end = run.end().min(self.size);
        self.at = end.max(self.at);
        // A run that does not move on would never end.
        (start < end).then_some(Ok(Extent { offset: start, length: end.saturating_sub(start) }))
    }
}

/// Copies a disk into an empty file. `tell(bytes done)` is called from this thread; its error
/// stops the copy.
pub(super) fn copy_disk(
    reader: &dyn PointReader,
    disk: usize,
    file: &File,
    tell: &dyn Fn(u64) -> Result<()>,
) -> Result<()> {
    let size = reader.disks().get(disk).map_or(0, |d| d.size);
    file.set_len(size).context(|| "cannot set the size of the restored disk")?;
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).clamp(1, THREADS_MAX);
    let (pieces, work) = bounded::<Extent>(threads * 2);
    let (done, results) = bounded::<Result<u64>>(threads * 2);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            let (work, done, stop) = (work.clone(), done.clone(), &stop);
            scope.spawn(move || copy_pieces(reader, disk, file, &work, &done, stop));
        }
        drop((work, done));
        let result = feed(reader, disk, pieces, &results, tell);
        stop.store(true, Ordering::Relaxed);
        // Threads that wait to report end when nobody listens any more.
        drop(results);
        result
    })
}

/// Hands out pieces and takes results until everything is copied or something fails.
fn feed(
    reader: &dyn PointReader,
    disk: usize,
    pieces: Sender<Extent>,
    results: &Receiver<Result<u64>>,
    tell: &dyn Fn(u64) -> Result<()>,
) -> Result<()> {
    let mut copied = 0u64;
    for run in Runs::of(reader, disk) {
        let run = run?;
        let mut at = run.offset;
        while at < run.end() {
            // Pieces end at multiples of their size, so that blocks are verified once.
            let end = (at / PIECE_BYTES + 1).saturating_mul(PIECE_BYTES).min(run.end());
            let piece = Extent { offset: at, length: end - at };
            at = end;
            let mut waiting = Some(piece);
            while let Some(piece) = waiting.take() {
                crossbeam_channel::select! {
                    send(pieces, piece) -> sent => if sent.is_err() { return Err(ended()) },
                    recv(results) -> result => {
                        copied = copied.saturating_add(result.map_err(|_| ended())??);
                        tell(copied)?;
                        waiting = Some(piece);
                    }
                }
            }
        }
    }
    drop(pieces);
    for result in results {
        copied = copied.saturating_add(result?);
        tell(copied)?;
    }
    Ok(())
}

fn ended() -> Error {
    Error::new(ErrorKind::Internal, "a thread of the restore has ended early")
}

fn copy_pieces(
    reader: &dyn PointReader,
    disk: usize,
    file: &File,
    work: &Receiver<Extent>,
    done: &Sender<Result<u64>>,
    stop: &AtomicBool,
) {
    let mut buffer = vec![0; PIECE_BYTES as usize];
    for piece in work {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let result = copy_piece(reader, disk, file, piece, &mut buffer);
        if done.send(result).is_err() {
            return;
        }
    }
}

fn copy_piece(
    reader: &dyn PointReader,
    disk: usize,
    file: &File,
    piece: Extent,
    buffer: &mut [u8],
) -> Result<u64> {
    let length = usize::try_from(piece.length).unwrap_or(usize::MAX).min(buffer.len());
    let bytes = buffer.get_mut(..length).unwrap_or_default();
    if fill(reader, disk, piece.offset, bytes)? < length {
        return Err(Error::new(ErrorKind::Damaged, "a disk of the point ends before its size"));
    }
    let mut at = piece.offset;
    for block in bytes.chunks(BLOCK_BYTES as usize) {
        if !is_zero(block) {
            file.write_all_at(block, at).context(|| "cannot write the restored disk")?;
        }
        at += block.len() as u64;
    }
    Ok(piece.length)
}
