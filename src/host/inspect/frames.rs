//! Parts and undo logs in words: whole ones by their index, others frame by frame.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::Serialize;
use serde_json::Value;

use super::{Inspection, cannot, human};
use crate::base::error::Context;
use crate::base::limits::FRAME_BYTES_MAX;
use crate::base::{DiskId, Error, ErrorKind, Result};
use crate::format::frames::{
    Encoding, FOOTER_BYTES, FRAME_HEADER_BYTES, FRAMES_FORMAT, Frame, FrameIndex, FramesKind, HEADER_BYTES,
};

/// Longest tail (meta and index) that is read into memory, in bytes.
const TAIL_BYTES_MAX: u64 = 1 << 30;
/// Damaged frames that are named; the rest are counted.
const DAMAGED_NAMED_MAX: usize = 20;

#[derive(Default, Serialize)]
struct DiskSum {
    frames: u64,
    bytes: u64,
    stored: u64,
    zero_bytes: u64,
    hole_bytes: u64,
}

#[derive(Serialize)]
struct Report {
    format: u32,
    length: u64,
    has_index: bool,
    frames: u64,
    frames_damaged: u64,
    disks: BTreeMap<DiskId, DiskSum>,
    meta: Value,
}

pub(super) fn inspect(path: &Path, file: &File, length: u64, kind: FramesKind) -> Result<Inspection> {
    check_version(path, file)?;
    let noun = match kind {
        FramesKind::Part => "part of an epoch",
        FramesKind::Undo => "undo log",
    };
    let mut out = Inspection::new(path, noun);
    let (frames, meta, has_index) = match index(file, length, kind) {
        Ok(index) => (index.frames().to_vec(), index.meta().to_vec(), true),
        Err(e) => {
            out.damage(format!("{e}; its frames are read one after the other instead"));
            (walk(file, length), Vec::new(), false)
        }
    };
    let mut report = Report {
        format: FRAMES_FORMAT,
        length,
        has_index,
        frames: frames.len() as u64,
        frames_damaged: 0,
        disks: BTreeMap::new(),
        meta: serde_json::from_slice(&meta).unwrap_or(Value::Null),
    };
    out.say(format!("{} frames, {}", report.frames, human(length)));
    for frame in &frames {
        add(report.disks.entry(frame.disk).or_default(), frame);
        if let Err(e) = verify(file, frame, has_index) {
            report.frames_damaged += 1;
            if report.frames_damaged as usize <= DAMAGED_NAMED_MAX {
                out.damage(e.to_string());
            }
        }
    }
    if report.frames_damaged as usize > DAMAGED_NAMED_MAX {
        out.damage(format!("and {} more frames", report.frames_damaged as usize - DAMAGED_NAMED_MAX));
    }
    for (disk, sum) in &report.disks {
        out.say(format!(
            "disk {disk}: {} in {} frames ({} stored, {} zeros, {} holes)",
            human(sum.bytes),
            sum.frames,
            human(sum.stored),
            human(sum.zero_bytes),
            human(sum.hole_bytes)
        ));
    }
    if !report.meta.is_null() {
        out.say(format!("meta: {}", report.meta));
    }
    if !has_index {
        out.say(format!(
            "{} of {} frames can be read; nothing vouches for their content",
            report.frames - report.frames_damaged,
            report.frames
        ));
    }
    out.report(&report)?;
    Ok(out)
}

fn check_version(path: &Path, file: &File) -> Result<()> {
    let mut header = [0; HEADER_BYTES];
    file.read_exact_at(&mut header, 0).map_err(|e| {
        Error::new(ErrorKind::Damaged, cannot(path)).why("it ends within its header").source(e)
    })?;
    let version = u32::from_le_bytes([header[8], header[9], header[10], header[11]]);
    if version != FRAMES_FORMAT {
        return Err(Error::new(ErrorKind::Version, cannot(path))
            .why(format!("it has format {version}, this program knows {FRAMES_FORMAT}"))
            .hint("use the version of afterimage that wrote it, or a newer one"));
    }
    Ok(())
}

fn index(file: &File, length: u64, kind: FramesKind) -> Result<FrameIndex> {
    let short = || Error::new(ErrorKind::Damaged, "its end is missing");
    let mut footer = [0; FOOTER_BYTES];
    file.read_exact_at(&mut footer, length.checked_sub(FOOTER_BYTES as u64).ok_or_else(short)?)
        .context(|| "its end cannot be read")?;
    let place = FrameIndex::tail_place(kind, &footer, length)?;
    let bytes = length.checked_sub(place).filter(|b| *b <= TAIL_BYTES_MAX).ok_or_else(short)?;
    let mut tail = vec![0; usize::try_from(bytes).unwrap_or(0)];
    file.read_exact_at(&mut tail, place).context(|| "its index cannot be read")?;
    FrameIndex::decode(kind, &tail, length)
}

/// Frames by their headers, until one makes no sense.
fn walk(file: &File, length: u64) -> Vec<Frame> {
    let mut frames = Vec::new();
    let mut at = HEADER_BYTES as u64;
    while let Some(frame) = header_at(file, at) {
        at = frame.place.saturating_add(u64::from(frame.stored));
        if at > length {
            break;
        }
        frames.push(frame);
    }
    frames
}

fn header_at(file: &File, at: u64) -> Option<Frame> {
    let mut h = [0; FRAME_HEADER_BYTES];
    file.read_exact_at(&mut h, at).ok()?;
    let number = |at: usize| h.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes);
    let encoding = [Encoding::Raw, Encoding::Lz4, Encoding::Zero, Encoding::Hole, Encoding::Damaged]
        .into_iter()
        .find(|e| *e as u8 == h[36])?;
    let frame = Frame {
        disk: DiskId(u128::from_le_bytes(h.get(..16)?.try_into().ok()?)),
        offset: number(16)?,
        length: number(24)?,
        place: at + FRAME_HEADER_BYTES as u64,
        stored: u32::from_le_bytes(h.get(32..36)?.try_into().ok()?),
        encoding,
        digest: [0; 16],
    };
    let plausible = frame.length > 0
        && frame.offset.is_multiple_of(4096)
        && frame.length.is_multiple_of(4096)
        && frame.offset.checked_add(frame.length).is_some()
        && (encoding.is_empty() == (frame.stored == 0))
        && u64::from(frame.stored) <= FRAME_BYTES_MAX
        && h.get(37..40)? == [0; 3];
    plausible.then_some(frame)
}

fn add(sum: &mut DiskSum, frame: &Frame) {
    sum.frames += 1;
    sum.bytes += frame.length;
    sum.stored += u64::from(frame.stored);
    match frame.encoding {
        Encoding::Zero => sum.zero_bytes += frame.length,
        Encoding::Hole => sum.hole_bytes += frame.length,
        _ => {}
    }
}

/// Reads the content of a frame. Without the index there is no digest, so it is only unpacked.
fn verify(file: &File, frame: &Frame, has_digest: bool) -> Result<()> {
    if frame.encoding.is_empty() {
        return Ok(());
    }
    let what = || format!("disk {} at byte {} cannot be read", frame.disk, frame.offset);
    let mut stored = vec![0; frame.stored as usize];
    file.read_exact_at(&mut stored, frame.place).context(what)?;
    let mut content = vec![0; usize::try_from(frame.length).unwrap_or(0)];
    let mut frame = *frame;
    if !has_digest {
        frame.digest.copy_from_slice(blake3::hash(&stored).as_bytes().get(..16).unwrap_or(&[0; 16]));
    }
    frame.decode_content(&stored, &mut content)
}
