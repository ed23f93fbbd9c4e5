//! The hot-region log in words.

use std::path::Path;

use super::{Inspection, cannot, human};
use crate::base::durable::read_limited;
use crate::base::{Error, ErrorKind, REGION_BYTES, Result};
use crate::format::hotlog::{HOT_BYTES_MAX, read};

pub(super) fn inspect(path: &Path) -> Result<Inspection> {
    let bytes = read_limited(path, HOT_BYTES_MAX)?.unwrap_or_default();
    let log = read(&bytes).map_err(|e| {
        let hint = match e.kind() {
            ErrorKind::Version => "use the version of afterimage that wrote it, or a newer one",
            _ => "after a power loss every disk is compared whole without it; see: afterimage status",
        };
        Error::new(e.kind(), cannot(path)).why(e.to_string()).hint(hint)
    })?;
    let mut out = Inspection::new(path, "hot-region log");
    let h = &log.header;
    out.say(format!("log {:032x}, file {} of it, begun in boot {}", h.log, h.generation, h.boot));
    out.say(format!("{} records, the last activation is number {}", log.records, log.last_activation));
    if !log.is_whole {
        out.say("its beginning was never completed: the other file of the two is the log");
    }
    for (disk, set) in &log.hot {
        let regions: u64 = set.iter().map(|r| r.end - r.start).sum();
        if regions > 0 {
            out.say(format!("disk {disk}: {regions} hot regions ({})", human(regions * REGION_BYTES)));
        }
    }
    if let Some(at) = log.damaged_at {
        out.damage(format!("the record at byte {at} cannot be read although later ones can"));
    }
    out.report(&log)?;
    Ok(out)
}
