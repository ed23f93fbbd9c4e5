//! Taking a mount off: when nobody uses it, or at once.
//!
//! Neither follows a link in the last name, so that what is taken off is what was named.

use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};

/// How often a mount in use is asked for again, and after how long: a second in all.
const TRIES: u32 = 10;
const PAUSE: Duration = Duration::from_millis(100);

/// Unmounts `dir`. A program that is just being started holds every file of its parent, closed
/// there or not, between fork and exec; so EBUSY is the answer only when it stays so.
pub fn unmount(dir: &Path) -> nix::Result<()> {
    for _ in 1..TRIES {
        match umount2(dir, MntFlags::UMOUNT_NOFOLLOW) {
            Err(Errno::EBUSY) => std::thread::sleep(PAUSE),
            done => return done,
        }
    }
    umount2(dir, MntFlags::UMOUNT_NOFOLLOW)
}

/// Takes what is mounted on `dir` off the tree at once; it ends with its last user. The error is
/// the kernel's: EINVAL where nothing is mounted.
pub fn detach(dir: &Path) -> nix::Result<()> {
    umount2(dir, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
}
