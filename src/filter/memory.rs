//! What keeps the daemon from waiting for memory that needs the mount: writeback of a guest's
//! pages goes through us, so we must never wait for it (design, section 3).
//!
//! Called once by the host, before its first thread.

#![allow(unsafe_code)]

use nix::errno::Errno;

use crate::base::error::Context;
use crate::base::{Error, ErrorKind, Result};

/// From `linux/prctl.h`, Linux 5.6.
const PR_SET_IO_FLUSHER: i32 = 57;

/// Marks this process as part of a block I/O path (PR_SET_IO_FLUSHER): its allocations never
/// wait for writeback. Inherited by threads made later.
pub fn become_io_flusher() -> Result<()> {
    // SAFETY: prctl with plain integers.
    let rc = unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) };
    Errno::result(rc).map(drop).context(|| "the daemon cannot mark itself as an I/O flusher")
}

/// Locks all memory, now and later, as it is first touched: nothing of the daemon is ever paged
/// out to a disk behind the mount.
pub fn lock_memory() -> Result<()> {
    let unlimited = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: a valid structure; a refusal shows in mlockall below.
    let _ = unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const unlimited) };
    // SAFETY: plain flags. ONFAULT: event loops have buffers of 16 MiB of which they use one.
    let rc = unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT) };
    Errno::result(rc).map(drop).context(|| "the memory of the daemon cannot be locked")
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
