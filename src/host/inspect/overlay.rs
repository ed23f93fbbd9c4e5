//! The map of a clone's overlay in words.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::{Inspection, human};
use crate::base::error::Context;
use crate::base::{BLOCK_BYTES, Result, Timestamp};
use crate::format::overlay::{OVERLAY_BITMAP_OFFSET, OVERLAY_HEADER_BYTES, OVERLAY_SLOTS, OverlayHeader};

/// Bytes of the bitmap that are read at a time.
const CHUNK_BYTES: usize = 1 << 20;

pub(super) fn inspect(path: &Path, first: &[u8], length: u64) -> Result<Inspection> {
    let slot = |at: u64| {
        let at = at as usize;
        first.get(at..at + OVERLAY_HEADER_BYTES).unwrap_or_default()
    };
    let slots = OVERLAY_SLOTS.map(slot);
    let header = OverlayHeader::newest(slots)?;
    let mut out = Inspection::new(path, "map of a clone's overlay");
    out.say(format!("disk {}, {}, state {}", header.disk, human(header.size), header.sequence));
    out.say(format!("the point is seen below byte {}", header.base_limit));
    out.say(format!("last change {}", Timestamp(header.mtime_ms)));
    let unread = slots.iter().filter(|s| !s.is_empty() && s.iter().any(|b| *b != 0));
    for e in unread.filter_map(|s| OverlayHeader::decode(s).err()) {
        out.say(format!("one of its two headers cannot be read, a torn write: {e}"));
    }
    let blocks = blocks(path, length)?;
    out.say(format!("{blocks} blocks are its own ({})", human(blocks * BLOCK_BYTES)));
    out.report(&header)?;
    Ok(out)
}

/// Bits that are set in the bitmap.
fn blocks(path: &Path, length: u64) -> Result<u64> {
    let what = || format!("cannot read {}", path.display());
    let file = File::open(path).context(what)?;
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut at = OVERLAY_BITMAP_OFFSET;
    let mut total = 0;
    while at < length {
        let read = file.read_at(&mut buffer, at).context(what)?;
        if read == 0 {
            break;
        }
        total += buffer.iter().take(read).map(|b| u64::from(b.count_ones())).sum::<u64>();
        at += read as u64;
    }
    Ok(total)
}
