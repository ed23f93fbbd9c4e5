//! The state folder: everything of one daemon, its socket included, lives in it, so that several
//! daemons can run on one host.
//!
//! Killed here: the lock is a flock, the kernel gives it back with the last descriptor. A
//! successor waits until the predecessor is gone entirely (S1): the lock is held by every thread
//! of it, also by one that is stuck in the kernel.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};

use crate::base::error::Context;
use crate::base::shell::shell;
use crate::base::{BootId, Error, ErrorKind, Result, VmId};

/// Where the state of the daemon lives when nobody says otherwise.
pub const STATE_DIR_DEFAULT: &str = "/var/lib/afterimage";

/// A lock that is held is looked at again after so long.
const LOCK_LOOK: Duration = Duration::from_millis(20);

/// The paths below a state folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateDir {
    root: PathBuf,
}

/// Held for the life of the daemon.
pub struct StateLock {
    _lock: Flock<File>,
}

impl StateDir {
    /// The folder at `root`, which is not touched. A relative path is taken from the working
    /// folder once, so that the daemon may change it.
    pub fn at(root: &Path) -> Result<Self> {
        let root = std::path::absolute(root).context(|| format!("cannot use {} as state", root.display()))?;
        Ok(Self { root })
    }

    /// Makes the folder, for root alone, and its sub-folders.
    pub fn create(&self) -> Result<()> {
        let fresh = !self.root.exists();
        for dir in [self.root.clone(), self.vms(), self.clones()] {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&dir)
                .context(|| format!("cannot make folder {}", dir.display()))?;
        }
        if fresh {
            std::fs::set_permissions(&self.root, Permissions::from_mode(0o700))
                .context(|| format!("cannot protect folder {}", self.root.display()))?;
            crate::base::durable::sync_parent(&self.root)?;
        }
        Ok(())
    }

    /// Lets a group reach the socket, and nothing else, through the folder.
    pub fn open_to_group(&self, gid: u32) -> Result<()> {
        let what = || format!("cannot open folder {} to group {gid}", self.root.display());
        std::os::unix::fs::chown(&self.root, None, Some(gid)).context(what)?;
        std::fs::set_permissions(&self.root, Permissions::from_mode(0o710)).context(what)
    }

    /// Takes the lock; waits up to `patience` for a predecessor to be gone entirely.
    pub fn lock(&self, patience: Duration) -> Result<StateLock> {
        let path = self.root.join("lock");
        let mut left = patience.as_millis() / LOCK_LOOK.as_millis();
        loop {
            let file = OpenOptions::new()
                .create(true)
                .truncate(false)
                .read(true)
                .write(true)
                .mode(0o600)
                .open(&path)
                .context(|| format!("cannot open {}", path.display()))?;
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(StateLock { _lock: lock }),
                Err((_, nix::errno::Errno::EWOULDBLOCK)) if left > 0 => {
                    left -= 1;
                    std::thread::sleep(LOCK_LOOK);
                }
                Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
                    return Err(Error::new(
                        ErrorKind::Busy,
                        format!("the daemon cannot use {}", self.root.display()),
                    )
                    .why("another daemon holds its lock")
                    .hint(format!("afterimage --state {} status", shell(&self.root))));
                }
                Err((_, e)) => {
                    return Err(Error::io(format!("cannot lock {}", path.display()), e.into()));
                }
            }
        }
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Unix socket of the API.
    pub fn socket(&self) -> PathBuf {
        self.root.join("afterimage.sock")
    }

    /// Log of a daemon that a command started.
    pub fn log(&self) -> PathBuf {
        self.root.join("daemon.log")
    }

    /// SQLite database of jobs and events.
    pub fn database(&self) -> PathBuf {
        self.root.join("afterimage.db")
    }

    /// The remembered mounts.
    pub fn mounts(&self) -> PathBuf {
        self.root.join("mounts.json")
    }

    /// The policies that are not built in.
    pub fn policies(&self) -> PathBuf {
        self.root.join("policies.json")
    }

    /// Folder of the VM configurations.
    pub fn vms(&self) -> PathBuf {
        self.root.join("vms")
    }

    /// Configuration of one VM.
    pub fn vm(&self, vm: VmId) -> PathBuf {
        self.vms().join(format!("{vm}.json"))
    }

    /// The embedded vault.
    pub fn vault(&self) -> PathBuf {
        self.root.join("vault")
    }

    /// Overlays of writable clones.
    pub fn clones(&self) -> PathBuf {
        self.root.join("clones")
    }

    /// Configuration file of a daemon that was given its state folder.
    pub fn config(&self) -> PathBuf {
        self.root.join("afterimage.toml")
    }
}

/// The kernel's boot id.
pub fn boot_id() -> Result<BootId> {
    let path = "/proc/sys/kernel/random/boot_id";
    std::fs::read_to_string(path).context(|| format!("cannot read {path}"))?.trim().parse()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_daemon_is_refused_and_a_dead_one_is_not_in_the_way() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::at(&dir.path().join("s")).unwrap();
        state.create().unwrap();
        let held = state.lock(Duration::ZERO).unwrap();
        assert_eq!(state.lock(Duration::ZERO).err().unwrap().kind(), ErrorKind::Busy);
        drop(held);
        state.lock(Duration::ZERO).unwrap();
        assert_eq!(std::fs::metadata(state.root()).unwrap().permissions().mode() & 0o777, 0o700);
        boot_id().unwrap();
    }
}
