//! Guests first: the shipper's threads run with a low I/O priority; those of a large transfer, which
//! read and pack, with a low CPU priority too.

#![allow(unsafe_code)]

/// CPU niceness of threads that only work.
const NICE: i32 = 10;
/// `IOPRIO_WHO_PROCESS` of linux/ioprio.h.
const IOPRIO_WHO_PROCESS: libc::c_long = 1;
/// Best effort, lowest level: yields to guests, and is never starved like the idle class.
const IOPRIO_LOWEST: libc::c_long = (2 << 13) | 7;

/// For a thread that only works: low CPU and I/O priority. What the kernel refuses is left as it
/// is: it is a courtesy, not a promise.
pub(super) fn yield_to_guests() {
    yield_io_to_guests();
    // SAFETY: integers only; 0 is the calling thread, which may always lower its own priority.
    log_refusal(unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) } == 0);
}

/// For the thread that makes the cuts: while the gate is closed, guests wait for it, so it must not
/// wait for a processor longer than they would.
pub(super) fn yield_io_to_guests() {
    // SAFETY: as above.
    log_refusal(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IOPRIO_LOWEST) } == 0);
}

fn log_refusal(is_done: bool) {
    if !is_done {
        log::debug!("a shipper's thread keeps its priority: {}", std::io::Error::last_os_error());
    }
}
