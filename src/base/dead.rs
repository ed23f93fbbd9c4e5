//! Dead mounts: the process that served them was killed, and every call on them is ENOTCONN
//! until somebody takes them off.
//!
//! Killed here: some of them are off and the others stay, and the next call takes those.

use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::statfs::statfs;

use super::error::{Context, Error, ErrorKind, Result};
use super::mountinfo::top_mount;
use super::unmount::detach;

/// Dead mounts that are stacked on one folder, at most.
const STACKED_MAX: usize = 1024;

/// Whether nobody serves what is mounted at `dir`. Not asked by stat: the kernel may still answer
/// that from its cache. On a mount that hangs, this does too.
pub fn is_disconnected(dir: &Path) -> bool {
    statfs(dir).err() == Some(Errno::ENOTCONN)
}

/// Whether the mount on top at exactly `dir` (absolute, without links) has a type that `is_ours`
/// takes, and is dead. A mount of somebody else's is not touched at all. Where a new mount was moved
/// beneath a dead one the table may name the new one; both are ours then. An error if the table of
/// mounts cannot be read.
pub fn is_dead(dir: &Path, is_ours: impl Fn(&str) -> bool) -> Result<bool> {
    Ok(top_mount(dir)?.is_some_and(|top| is_ours(&top.kind)) && is_disconnected(dir))
}

/// Takes the mounts for which [`is_dead`] holds off `dir`, down to the first that is alive or not
/// ours. How many there were. An error if one cannot be taken off.
pub fn clear_dead(dir: &Path, is_ours: impl Fn(&str) -> bool) -> Result<usize> {
    let mut cleared = 0;
    while cleared < STACKED_MAX && is_dead(dir, &is_ours)? {
        detach(dir).context(|| format!("the dead mount over {} cannot be removed", dir.display()))?;
        cleared += 1;
    }
    Ok(cleared)
}

/// The absolute path of a folder whose mount is dead and may be asked nothing: its last name is taken
/// for no link. An error if the folder above it does not exist.
pub fn absolute_of_dead(dir: &Path) -> Result<PathBuf> {
    let what = || format!("the directory {} cannot be opened", dir.display());
    let (Some(parent), Some(name)) = (dir.parent(), dir.file_name()) else {
        return Err(Error::new(ErrorKind::Usage, what()).why("it has no name"));
    };
    Ok(parent.canonicalize().context(what)?.join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_alive_or_no_mount_is_not_dead() {
        assert!(!is_disconnected(Path::new("/proc")));
        assert!(!is_disconnected(Path::new("/none/such")));
        assert_eq!(clear_dead(Path::new("/proc"), |kind| kind == "proc").unwrap(), 0);
        assert_eq!(clear_dead(Path::new("/none/such"), |_| true).unwrap(), 0);
    }

    #[test]
    fn links_above_a_dead_folder_are_followed() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().canonicalize().unwrap();
        std::os::unix::fs::symlink(&real, real.join("link")).unwrap();
        assert_eq!(absolute_of_dead(&real.join("link/dead")).unwrap(), real.join("dead"));
        assert_eq!(absolute_of_dead(Path::new("/")).unwrap_err().kind(), ErrorKind::Usage);
    }
}
