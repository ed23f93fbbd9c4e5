//! Guests first: the shipper's threads run with a low CPU and I/O priority.

#![allow(unsafe_code)]

/// CPU niceness of the shipper's threads.
const NICE: i32 = 10;
/// `IOPRIO_WHO_PROCESS` of linux/ioprio.h.
const IOPRIO_WHO_PROCESS: libc::c_long = 1;
/// Best effort, lowest level: yields to guests, and is never starved like the idle class.
const IOPRIO_LOWEST: libc::c_long = (2 << 13) | 7;

/// Lowers the priority of the calling thread. What the kernel refuses is left as it is: it is
/// a courtesy, not a promise.
pub(super) fn yield_to_guests() {
    // SAFETY: both calls take integers only; 0 is the calling thread, and a thread may always
    // lower its own priority.
    let failed = unsafe {
        libc::setpriority(libc::PRIO_PROCESS, 0, NICE) != 0
            || libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IOPRIO_LOWEST) != 0
    };
    if failed {
        log::debug!("a shipper's thread keeps its priority: {}", std::io::Error::last_os_error());
    }
}
