//! Taking a mount off, when it may be in use for an instant only.

use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};

/// How often a mount in use is asked for again, and after how long: a second in all.
const TRIES: u32 = 10;
const PAUSE: Duration = Duration::from_millis(100);

/// Unmounts `dir`. A program that is just being started holds every file of its parent, closed
/// there or not, between fork and exec; so EBUSY is the answer only when it stays so.
pub fn unmount(dir: &Path, flags: MntFlags) -> nix::Result<()> {
    for _ in 1..TRIES {
        match umount2(dir, flags) {
            Err(Errno::EBUSY) => std::thread::sleep(PAUSE),
            done => return done,
        }
    }
    umount2(dir, flags)
}
