//! Real daemons on real file systems, with everything gone afterwards, also when a test fails.
//!
//! - [`Scratch`]: a folder whose mounts, loop devices and files end with it;
//! - [`Host`]: one daemon with a state folder of its own, and the command line that speaks to it;
//! - [`Volume`]: a file system on a loop device;
//! - [`Guest`]: QEMU on the small guest of `scripts/guest`, [`Qmp`]: its monitor;
//! - [`Injection`]: system calls of a daemon that fail, or at which it is killed;
//! - [`Watchdog`]: names a test that hangs, and ends its daemon so that the test ends too.
//!
//! Only processes that were started here are ended, each by its id.

mod guest;
mod host;
mod injection;
mod qmp;
mod scratch;
mod volume;
mod watchdog;

pub use guest::Guest;
pub use host::Host;
pub use injection::Injection;
pub use qmp::Qmp;
pub use scratch::{Scratch, unmount};
pub use volume::{Kind, Volume};
pub use watchdog::{Watchdog, is_alive};

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// How long something may take that a machine under load does late but surely.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The folder of the package.
pub fn package() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// The full count of a long form, or the short one of CI.
pub fn rounds(variable: &str, short: usize) -> usize {
    std::env::var(variable).ok().and_then(|n| n.parse().ok()).unwrap_or(short)
}

/// Waits until `ready` says so; fails with `what` when patience is over.
pub fn wait_until(what: &str, mut ready: impl FnMut() -> bool) {
    let start = Instant::now();
    while !ready() {
        assert!(start.elapsed() < PATIENCE, "{what}: not after {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Runs a program that must succeed; its standard output.
pub fn run(program: &str, args: &[&str]) -> String {
    let out = Command::new("timeout")
        .args(["-k", "5", "300", program])
        .args(args)
        .output()
        .unwrap_or_else(|e| panic!("{program} does not start: {e}"));
    assert!(
        out.status.success(),
        "{program} {args:?}: {}\n{}{}",
        out.status,
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// A path as an argument.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("paths of tests are UTF-8")
}

/// A fresh sparse file.
pub fn sparse(path: &Path, bytes: u64) {
    std::fs::File::create(path).and_then(|f| f.set_len(bytes)).unwrap();
}
