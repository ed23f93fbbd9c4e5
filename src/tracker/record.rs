//! What the tracker keeps of a VM in the state folder: `tracker/VM.json`, replaced as a whole.
//!
//! `ceiling`: no epoch with this number or a higher one was ever begun, so that after a loss of
//! power the numbers go on above everything that a vault may have seen. `stopped`: the disks as a
//! clean stop left them; taken out before the first write is let through. `hot_log`: id and
//! generation of the hot-region log, to tell an older or foreign one. `files`: which file each
//! disk was, because a file that took its place may be older than everything that is known.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::base::durable::{read_limited, write_atomic};
use crate::base::error::Context;
use crate::base::{DiskId, Error, ErrorKind, Result, VmId};

const FORMAT: u32 = 1;
const BYTES_MAX: u64 = 1 << 20;
/// Epoch numbers that are reserved at once.
pub(crate) const CEILING_STEP: u64 = 16;

/// A disk as a clean stop left it. Device numbers are left out: they change with a boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DiskStat {
    pub(crate) id: DiskId,
    inode: u64,
    size: u64,
    mtime_ns: i128,
    ctime_ns: i128,
}

impl DiskStat {
    pub(crate) fn of(id: DiskId, file: &std::fs::File) -> Result<Self> {
        let m = file.metadata().context(|| "a disk cannot be examined")?;
        let ns = |s: i64, n: i64| i128::from(s) * 1_000_000_000 + i128::from(n);
        Ok(Self {
            id,
            inode: m.ino(),
            size: m.len(),
            mtime_ns: ns(m.mtime(), m.mtime_nsec()),
            ctime_ns: ns(m.ctime(), m.ctime_nsec()),
        })
    }

    /// When the file or what describes it last changed, in ms since 1970: the content of one that
    /// was moved here or restored with its times is older than the change.
    pub(crate) fn modified_ms(&self) -> i64 {
        i64::try_from(self.mtime_ns.max(self.ctime_ns) / 1_000_000).unwrap_or(i64::MAX)
    }

    /// Number of the file in its file system.
    pub(crate) fn inode(&self) -> u64 {
        self.inode
    }
}

/// The record of one VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VmRecord {
    pub(crate) format: u32,
    pub(crate) ceiling: u64,
    pub(crate) stopped: Option<Vec<DiskStat>>,
    pub(crate) hot_log: Option<HotIdentity>,
    #[serde(default)]
    pub(crate) files: Vec<DiskFile>,
}

/// Which file a disk was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DiskFile {
    pub(crate) id: DiskId,
    pub(crate) inode: u64,
}

/// Which hot-region log was in use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HotIdentity {
    pub(crate) log: String,
    pub(crate) generation: u64,
}

fn path_of(state_dir: &Path, vm: VmId) -> PathBuf {
    state_dir.join("tracker").join(format!("{vm}.json"))
}

impl VmRecord {
    /// Reads it; `None`: there is none, or it is damaged (then nothing it could say is believed).
    pub(crate) fn read(state_dir: &Path, vm: VmId) -> Result<Option<Self>> {
        let path = path_of(state_dir, vm);
        let Some(bytes) = read_limited(&path, BYTES_MAX)? else { return Ok(None) };
        match serde_json::from_slice::<Self>(&bytes) {
            Ok(record) if record.format == FORMAT => Ok(Some(record)),
            Ok(record) => Err(Error::new(ErrorKind::Version, format!("{} cannot be read", path.display()))
                .why(format!("it has format {}, this program knows {FORMAT}", record.format))
                .hint("use the version of afterimage that wrote it, or a newer one")),
            Err(e) => {
                log::warn!("{} is damaged: {e}", path.display());
                Ok(None)
            }
        }
    }

    /// Replaces it, durably.
    pub(crate) fn write(&mut self, state_dir: &Path, vm: VmId) -> Result<()> {
        self.format = FORMAT;
        let path = path_of(state_dir, vm);
        let dir = state_dir.join("tracker");
        std::fs::create_dir_all(&dir).context(|| format!("cannot make {}", dir.display()))?;
        let bytes = serde_json::to_vec_pretty(self)
            .map_err(|e| Error::new(ErrorKind::Internal, "the record of a VM cannot be written").source(e))?;
        write_atomic(&path, &bytes)
    }

    /// Removes it.
    pub(crate) fn remove(state_dir: &Path, vm: VmId) {
        let _ = std::fs::remove_file(path_of(state_dir, vm));
    }
}
