//! Succession: a new mount takes the place of a dead one without ever baring the directory.
//!
//! A mount over its own directory hides the images. Were the dead mount removed before the new
//! one is there, a process that opens an image in between would have it beneath the mount, and
//! its writes would never be seen. So the lower directory is opened where the dead mount is
//! not: in a mount namespace of a short-lived thread. The new mount is made elsewhere, served,
//! put *beneath* the dead one (Linux 6.5), and only then is the dead one taken off: a process
//! meets ENOTCONN or the new mount, nothing else.
//!
//! Killed here: the dead mount stays, over the new one or over nothing, and the next start does
//! the same. On an older kernel the directory is bare for a moment, and the log says so.

use std::ffi::CString;
use std::fs::DirBuilder;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::mount::MOUNT_TYPE;
use super::sys;
use crate::base::dead;
use crate::base::error::Context;
use crate::base::unmount::detach;
use crate::base::{Error, ErrorKind, Result};

fn is_filter(kind: &str) -> bool {
    kind == MOUNT_TYPE
}

/// Whether a filter is mounted over `directory` and nobody serves it.
pub(super) fn is_dead(directory: &Path) -> bool {
    dead::is_dead(directory, is_filter).unwrap_or(false)
}

/// Removes filters over `directory` (absolute, without links) whose daemon is dead. How many
/// there were; a mount that is alive stays. An error if one cannot be removed.
pub(super) fn clear_dead_mount(directory: &Path) -> Result<usize> {
    dead::clear_dead(directory, is_filter)
}

/// Does `work` where the dead mounts over `directories` are not.
pub(super) fn without_dead<T: Send>(
    directories: &[&Path],
    work: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    let body = || {
        let what = || "the directory beneath a dead mount cannot be reached";
        unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).context(what)?;
        let everything = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, everything, None::<&str>).context(what)?;
        for directory in directories {
            clear_dead_mount(directory)?;
        }
        work()
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("filter:beneath".to_owned()).spawn_scoped(scope, body);
        let thread = thread.context(|| "no thread to look beneath a dead mount")?;
        thread
            .join()
            .unwrap_or_else(|_| Err(Error::new(ErrorKind::Internal, "looking beneath a mount failed")))
    })
}

/// A folder of nobody else's to mount on for a moment.
pub(super) struct Aside(PathBuf);

impl Aside {
    /// Makes it.
    pub(super) fn make() -> Result<Self> {
        // The end that mkdtemp replaces.
        let name = format!(".afterimage-{:016x}", rand::random::<u64>());
        let path = std::env::temp_dir().join(name);
        DirBuilder::new().mode(0o700).create(&path).context(|| "no folder to mount on for a moment")?;
        Ok(Self(path))
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    /// Puts what is mounted here beneath the dead mount over `directory`, and takes the dead one
    /// off. `false`: the kernel cannot, and nothing has changed.
    pub(super) fn succeed(self, directory: &Path) -> Result<bool> {
        let what = || format!("the dead mount over {} cannot be replaced", directory.display());
        let path = |p: &Path| {
            CString::new(p.as_os_str().as_bytes()).map_err(|e| Error::new(ErrorKind::Usage, what()).source(e))
        };
        let tree = sys::clone_mount(&path(&self.0)?).context(what)?;
        match sys::move_beneath(&tree, &path(directory)?) {
            Ok(()) => {}
            Err(Errno::EINVAL | Errno::ENOSYS | Errno::EOPNOTSUPP | Errno::EPERM) => return Ok(false),
            Err(e) => return Err(Error::io(what(), e.into())),
        }
        clear_dead_mount(directory)?;
        Ok(true)
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        let _ = detach(&self.0);
        let _ = std::fs::remove_dir(&self.0);
    }
}
