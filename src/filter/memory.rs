//! What keeps the daemon from waiting for memory that needs the mount: writeback of a guest's
//! pages goes through us, so we must never wait for it (design, section 3).
//!
//! Called once by the host, before its first thread.

use super::sys;
use crate::base::error::Context;
use crate::base::{Error, ErrorKind, Result};

/// Marks this process as part of a block I/O path (PR_SET_IO_FLUSHER): its allocations never
/// wait for writeback. Inherited by threads made later.
pub fn become_io_flusher() -> Result<()> {
    sys::set_io_flusher().context(|| "the daemon cannot mark itself as an I/O flusher")
}

/// Locks all memory, now and later, as it is first touched: nothing of the daemon is ever paged
/// out to a disk behind the mount.
pub fn lock_memory() -> Result<()> {
    sys::lock_memory().context(|| "the memory of the daemon cannot be locked")
}

/// Memory that is not used goes back to the kernel: what a burst of deliveries needed does not stay
/// locked for ever.
pub fn return_unused_memory() -> Result<()> {
    sys::return_large_buffers().context(|| "the allocator of the daemon cannot be limited")
}

/// Raises the limit of open descriptors to what the kernel allows. Returns the limit.
pub fn raise_descriptor_limit() -> Result<u64> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let most = std::fs::read_to_string("/proc/sys/fs/nr_open")
        .ok()
        .and_then(|text| text.trim().parse::<u64>().ok())
        .unwrap_or(1 << 20);
    if setrlimit(Resource::RLIMIT_NOFILE, most, most).is_ok() {
        return Ok(most);
    }
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)
        .map_err(|e| Error::new(ErrorKind::Io, "the limit of open files is unknown").source(e))?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context(|| "the limit of open files cannot be raised")?;
    Ok(hard)
}
