//! A transfer: blocks are read, packed and put, part by part.
//!
//! ```text
//!   reader (ship-read) --raw part--> packer (ship-pack) --part--> the shipper's thread: put
//! ```
//!
//! One part in each hand, so at most four in memory. Parts are put in sequence. When a put
//! fails, what was read already is kept in hand and put first by the next attempt: a part that
//! is lost after it was read may cost the epoch its cut (T4). Killed here: the tracker knows
//! what was read, the vault which parts it has.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crossbeam_channel::bounded;

use crate::base::{Error, ErrorKind, Result};
use crate::core::epoch::Event;
use crate::core::ports::source::BlocksByDisk;
use crate::format::part::StoredPart;
use crate::ship::build::{self, MadePart};
use crate::ship::engine::{Engine, Fault, OnVault, Probe};
use crate::ship::priority;
use crate::ship::read::{Mode, Packed, RawPart, ReadFault, Reader, pack};
use crate::ship::status::Progress;

/// A smaller transfer is not worth its threads.
const INLINE_BYTES_MAX: u64 = 4 << 20;

/// How a transfer ended without an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moved {
    Done,
    Interrupted,
}

/// Progress so far, and since when.
struct Meter {
    began: Duration,
    data_bytes: u64,
    progress: Progress,
}

impl Engine {
    /// A live pass: pending blocks as they are now.
    pub(super) fn ship_live(&mut self) -> Result<Event, Fault> {
        let blocks = self.live_unmade()?;
        let (moved, bytes_per_second) = self.transfer(Mode::Live, blocks)?;
        Ok(match moved {
            Moved::Done => Event::PassShipped { bytes_per_second },
            Moved::Interrupted => Event::Interrupted,
        })
    }

    /// The frozen epoch, as of its cut. T5: asked before the first and after the last read.
    pub(super) fn ship_frozen(&mut self) -> Result<Event, Fault> {
        if self.outside.source.has_given_up() {
            return Ok(Event::GaveUp);
        }
        let blocks = self.frozen_unmade();
        match self.transfer(Mode::Frozen, blocks) {
            // T4: what was read and lost cannot be produced any more.
            Err(fault) if fault.error.kind() == ErrorKind::Cancelled => Ok(Event::GaveUp),
            // Whether a part that failed is in the vault has to be found out first, also if the
            // epoch gave up meanwhile.
            Err(fault) => Err(fault),
            Ok(_) if self.outside.source.has_given_up() => Ok(Event::GaveUp),
            Ok((Moved::Done, _)) => Ok(Event::FrozenShipped),
            Ok((Moved::Interrupted, _)) => Ok(Event::Interrupted),
        }
    }

    /// Moves `blocks`; returns bytes a second too.
    fn transfer(&mut self, mode: Mode, mut blocks: BlocksByDisk) -> Result<(Moved, u64), Fault> {
        let progress = Progress { total_bytes: build::bytes_of(&blocks), ..Progress::default() };
        let mut meter = Meter { began: self.outside.clock.monotonic(), data_bytes: 0, progress };
        self.show(&meter);
        let moved = self.put_in_hand(&mut blocks, &mut meter).and_then(|moved| {
            if moved == Moved::Interrupted {
                return Ok(moved);
            }
            let is_small = build::bytes_of(&blocks) <= INLINE_BYTES_MAX;
            let attempt = self.attempt(mode);
            let (source, names) = (self.outside.source.clone(), self.names());
            let reader = Reader::new(source, mode, names, blocks, self.part_bytes);
            if is_small || self.is_inline {
                self.move_inline(reader, attempt, &mut meter)
            } else {
                self.move_with_threads(reader, attempt, &mut meter)
            }
        });
        self.status().progress = None;
        moved.map(|moved| (moved, meter.progress.bytes_per_second))
    }

    /// Parts that an earlier attempt has read come first.
    fn put_in_hand(&mut self, blocks: &mut BlocksByDisk, meter: &mut Meter) -> Result<Moved, Fault> {
        let mut parts = std::mem::take(&mut self.in_hand).into_iter();
        while let Some(part) = parts.next() {
            build::subtract(blocks, &part.blocks);
            let result = if self.is_interrupted() {
                self.in_hand.push(part);
                Ok(Moved::Interrupted)
            } else {
                self.put(part, meter).map(|()| Moved::Done)
            };
            if !matches!(result, Ok(Moved::Done)) {
                self.in_hand.extend(parts);
                return result;
            }
        }
        Ok(Moved::Done)
    }

    fn move_inline(&mut self, mut reader: Reader, attempt: u32, meter: &mut Meter) -> Result<Moved, Fault> {
        let go = AtomicBool::new(false);
        loop {
            if self.is_interrupted() {
                return Ok(Moved::Interrupted);
            }
            let Some(raw) = reader.next(&go).map_err(fault_of)? else { return Ok(Moved::Done) };
            self.put(pack(&raw, attempt)?, meter)?;
        }
    }

    fn move_with_threads(
        &mut self,
        mut reader: Reader,
        attempt: u32,
        meter: &mut Meter,
    ) -> Result<Moved, Fault> {
        let cancel = AtomicBool::new(false);
        let no_thread =
            |e| Error::io("a thread for the transfer cannot be started", e).with_kind(ErrorKind::Busy);
        std::thread::scope(|scope| {
            let (raw_out, raw_in) = bounded::<RawPart>(0);
            let (out, parts) = bounded::<Result<Packed, Fault>>(0);
            let (faults, stop) = (out.clone(), &cancel);
            std::thread::Builder::new()
                .name("ship-read".to_owned())
                .spawn_scoped(scope, move || {
                    priority::yield_to_guests();
                    loop {
                        match reader.next(stop) {
                            Ok(Some(raw)) => {
                                if raw_out.send(raw).is_err() {
                                    return;
                                }
                            }
                            Ok(None) => return,
                            Err(fault) => return drop(faults.send(Err(fault_of(fault)))),
                        }
                    }
                })
                .map_err(no_thread)?;
            std::thread::Builder::new()
                .name("ship-pack".to_owned())
                .spawn_scoped(scope, move || {
                    priority::yield_to_guests();
                    for raw in raw_in {
                        if out.send(pack(&raw, attempt).map_err(Fault::from)).is_err() {
                            return;
                        }
                    }
                })
                .map_err(no_thread)?;
            let mut end = Ok(Moved::Done);
            for part in parts {
                let step = match part {
                    Ok(part) if !matches!(end, Ok(Moved::Done)) => {
                        self.in_hand.push(part);
                        continue;
                    }
                    Ok(part) if self.is_interrupted() => {
                        self.in_hand.push(part);
                        Ok(Moved::Interrupted)
                    }
                    Ok(part) => self.put(part, meter).map(|()| Moved::Done),
                    Err(fault) => Err(fault),
                };
                if !matches!(step, Ok(Moved::Done)) {
                    cancel.store(true, Ordering::Relaxed);
                    // The first error is the one that is told.
                    end = if end.is_err() { end } else { step };
                }
            }
            end
        })
    }

    /// Puts one part and takes its blocks as made. After an error it is kept in hand.
    fn put(&mut self, mut part: Packed, meter: &mut Meter) -> Result<(), Fault> {
        let Some(build) = &mut self.build else {
            return Err(Error::new(ErrorKind::Internal, "there is no epoch for this part").into());
        };
        part.name.sequence = build.next_sequence();
        let number = build.number();
        let result = self.outside.vault.put_part(self.config.vm, number, &part.name, &part.bytes);
        if let Err(e) = result {
            self.in_hand.push(part);
            // Bytes that were changed on the way are sent again.
            let is_damaged = e.kind() == ErrorKind::Damaged;
            return Err(if is_damaged { e.with_kind(ErrorKind::Io) } else { e }).on_vault();
        }
        let stored = StoredPart { name: part.name, length: part.bytes.len() as u64 };
        let made = MadePart { stored, data_bytes: part.data_bytes, hole_bytes: part.hole_bytes };
        if let Some(build) = &mut self.build {
            build.add(made, &part.blocks);
        }
        self.has_progressed = true;
        meter.data_bytes += part.data_bytes;
        meter.progress.done_bytes += build::bytes_of(&part.blocks);
        let elapsed = self.outside.clock.monotonic().saturating_sub(meter.began).as_millis().max(1);
        let rate = u128::from(meter.data_bytes) * 1000 / elapsed;
        meter.progress.bytes_per_second = u64::try_from(rate).unwrap_or(u64::MAX);
        self.show(meter);
        Ok(())
    }

    fn show(&self, meter: &Meter) {
        let is_initial = {
            let mut status = self.status();
            status.progress = Some(meter.progress);
            status.is_initial
        };
        if is_initial {
            self.outside.observer.initial_progress(self.config.vm, &meter.progress);
        }
    }
}

fn fault_of(fault: ReadFault) -> Fault {
    let probe = fault.place.map_or(Probe::Nothing, |(disk, block)| Probe::Block(disk, block));
    Fault { error: fault.error, probe }
}
