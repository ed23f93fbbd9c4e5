//! The change-tracking log in words.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use nix::unistd::{Whence, lseek};
use serde::Serialize;

use super::{Inspection, cannot, human};
use crate::base::{BLOCK_BYTES, Result};
use crate::format::hrl::{HrlRecord, HrlReport, PRESERVED_OFFSET, read};

/// Runs of blocks that are told in words; JSON has all.
const RUNS_TOLD_MAX: usize = 20;
/// Runs of preserved blocks that are looked for.
const PRESERVED_RUNS_MAX: usize = 1 << 20;

#[derive(Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    log: &'a HrlReport,
    marked_bytes: u64,
    preserved_bytes: u64,
    complete: bool,
}

pub(super) fn inspect(path: &Path, file: File) -> Result<Inspection> {
    let preserved = preserved_bytes(&file);
    let log = read(&mut BufReader::new(file)).map_err(|e| named(e, path))?;
    let marked = log.blocks.total() * BLOCK_BYTES;
    let mut out = Inspection::new(path, "change-tracking log (HRL)");
    let h = &log.header;
    out.say(format!("disk {:?} ({}) of VM {}", h.path, h.disk, h.vm));
    out.say(format!("epoch {}, made {} in boot {}", h.epoch, h.created, h.boot));
    let runs = log.blocks.iter().count();
    out.say(format!(
        "marked: {} blocks of 4 KiB ({}) in {runs} runs, from {} map records",
        log.blocks.total(),
        human(marked),
        log.map_records
    ));
    for run in log.blocks.iter().take(RUNS_TOLD_MAX) {
        let (first, blocks) = (run.start, run.end - run.start);
        out.say(format!(
            "  blocks {first} to {} (byte {}, {blocks} blocks)",
            run.end - 1,
            first * BLOCK_BYTES
        ));
    }
    if runs > RUNS_TOLD_MAX {
        out.say(format!("  and {} more runs: --json has all", runs - RUNS_TOLD_MAX));
    }
    out.say(format!(
        "preserved: {} in this file; of a log in use, the daemon may hold more in memory",
        human(preserved)
    ));
    log.records.iter().for_each(|r| out.say(record(r)));
    for spot in &log.damaged {
        let place = format!("{} bytes at {}", spot.length, spot.offset);
        if spot.synced {
            out.damage(format!("{place}: synced once and not readable now"));
        } else {
            out.say(format!("{place}: a torn end that a kill or a power cut left; nothing relied on it"));
        }
    }
    let complete = log.is_complete();
    out.report(&Report { log: &log, marked_bytes: marked, preserved_bytes: preserved, complete })?;
    Ok(out)
}

fn named(e: crate::base::Error, path: &Path) -> crate::base::Error {
    let why = e.to_string();
    let hint = e.next_step().map(str::to_owned);
    let e = crate::base::Error::new(e.kind(), cannot(path)).why(why);
    match hint {
        Some(hint) => e.hint(hint),
        None => e.hint("its disk ships whole if the daemon cannot read it either: afterimage status"),
    }
}

fn record(record: &HrlRecord) -> String {
    match record {
        HrlRecord::Range { start, length } => {
            format!("hot when the power was lost: blocks {start} to {}", start.saturating_add(*length))
        }
        HrlRecord::Cut { time, size } => format!("cut at {time}, the disk had {}", human(*size)),
        HrlRecord::Whole { reason } => format!("every allocated block counts as changed: {reason}"),
        HrlRecord::Renamed { path } => format!("the disk was renamed to {path:?}"),
        HrlRecord::GaveUp => "the epoch gave up its cut".to_owned(),
        HrlRecord::Sync => "synced".to_owned(),
        HrlRecord::Stopped => "the daemon stopped cleanly".to_owned(),
    }
}

/// Bytes of preserved blocks in the file: what is data behind [`PRESERVED_OFFSET`].
fn preserved_bytes(file: &File) -> u64 {
    let mut at = i64::try_from(PRESERVED_OFFSET).unwrap_or(i64::MAX);
    let mut total = 0u64;
    for _ in 0..PRESERVED_RUNS_MAX {
        let Ok(data) = lseek(file, at, Whence::SeekData) else { break };
        let Ok(hole) = lseek(file, data, Whence::SeekHole) else { break };
        total += u64::try_from(hole - data).unwrap_or(0);
        at = hole;
    }
    let _ = lseek(file, 0, Whence::SeekSet);
    total
}
