//! Reads any of our files and says in words what it holds, damaged ones too. Changes nothing.
//!
//! What a file is, its first bytes say, never its name: a user's own `x.5.hrl` is not ours, and a
//! part that was renamed still is a part. A file of another version is told as such and not
//! guessed at. A damaged file is read as far as it can be, and every spot that cannot is named.

mod documents;
mod frames;
mod hotlog;
mod hrl;
mod overlay;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

use crate::base::error::Context;
use crate::base::{Error, ErrorKind, Result, VmId};
use crate::format::frames::FramesKind;
use crate::format::hotlog::HOT_MAGIC;
use crate::format::hrl::{HRL_HEADER_BYTES, HrlHeader, is_hrl_header};
use crate::format::overlay::is_overlay;

/// The schema of an [`Inspection`].
pub const INSPECT_SCHEMA: &str = "afterimage.inspect/1";
/// Bytes that are enough to tell what a file is.
const PEEK_BYTES: usize = HRL_HEADER_BYTES;

/// What a file holds.
#[derive(Clone, Debug, Serialize)]
pub struct Inspection {
    /// The file.
    pub file: PathBuf,
    /// What it is, in words.
    pub kind: String,
    /// Whether all of it that must be readable is.
    pub healthy: bool,
    /// What cannot be read, in words.
    pub damaged: Vec<String>,
    /// What it holds, for scripts.
    pub report: Value,
    /// What it holds, for people: one line each.
    #[serde(skip)]
    pub words: Vec<String>,
}

impl Inspection {
    fn new(file: &Path, kind: impl Into<String>) -> Self {
        Self {
            file: file.to_owned(),
            kind: kind.into(),
            healthy: true,
            damaged: Vec::new(),
            report: Value::Null,
            words: Vec::new(),
        }
    }

    fn say(&mut self, line: impl Into<String>) {
        self.words.push(line.into());
    }

    fn damage(&mut self, line: impl Into<String>) {
        self.healthy = false;
        self.damaged.push(line.into());
    }

    fn report<T: Serialize>(&mut self, report: &T) -> Result<()> {
        self.report = serde_json::to_value(report)
            .map_err(|e| Error::new(ErrorKind::Internal, "the report cannot be written as JSON").source(e))?;
        Ok(())
    }
}

fn cannot(path: &Path) -> String {
    format!("cannot inspect {}", path.display())
}

/// First bytes of a file, as many as there are.
fn peek(file: &File, path: &Path) -> Result<Vec<u8>> {
    let mut bytes = vec![0; PEEK_BYTES];
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|r| !r.is_empty()) {
        match file.read_at(rest, filled as u64).context(|| cannot(path))? {
            0 => break,
            n => filled += n,
        }
    }
    bytes.truncate(filled);
    Ok(bytes)
}

/// The VM of an HRL, if the file is one: its marks may still be in the daemon's memory.
pub fn hrl_vm(path: &Path) -> Option<VmId> {
    let file = File::open(path).ok()?;
    HrlHeader::decode(&peek(&file, path).ok()?).ok().map(|h| h.vm)
}

/// Reads the file at `path`.
///
/// [`ErrorKind::Usage`]: it is none of ours. [`ErrorKind::Version`]: another version wrote it.
/// [`ErrorKind::Damaged`]: nothing of it can be read.
pub fn inspect(path: &Path) -> Result<Inspection> {
    let what = || cannot(path);
    let file = File::open(path).context(what)?;
    let metadata = file.metadata().context(what)?;
    if !metadata.is_file() {
        return Err(Error::new(ErrorKind::Usage, what())
            .why("it is no regular file")
            .hint("name a file, as in: afterimage inspect DIR/disk.raw.5.hrl"));
    }
    let first = peek(&file, path)?;
    if is_hrl_header(&first) {
        return hrl::inspect(path, file);
    }
    if let Some(kind) = FramesKind::of_header(&first) {
        return frames::inspect(path, &file, metadata.len(), kind);
    }
    if first.starts_with(&HOT_MAGIC) {
        return hotlog::inspect(path);
    }
    if is_overlay(&first) {
        return overlay::inspect(path, &first, metadata.len());
    }
    if let Some(inspection) = documents::inspect(path, &first)? {
        return Ok(inspection);
    }
    Err(Error::new(ErrorKind::Usage, what())
        .why("its first bytes are not those of a file of afterimage")
        .hint("an image of a disk is not one of them; see what it is: file FILE"))
}

/// `48.0 KiB` and the like.
fn human(bytes: u64) -> String {
    bytesize::ByteSize(bytes).display().iec().to_string()
}
