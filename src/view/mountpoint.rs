//! A folder that one of our views is mounted on, from mount(2) to the last of its threads.
//!
//! Killed: the mount stays and answers ENOTCONN; [`Mountpoint::mount`] on the same folder clears
//! it first, if it is one of ours. Removed from outside (`umount DIR`): the threads end, and
//! [`Mountpoint::is_mounted`] says so.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, TryRecvError, bounded};
use fuser::{Config, Filesystem, Session, SessionACL};
use nix::mount::{MsFlags, mount};

use crate::base::dead::{self, absolute_of_dead, is_disconnected};
use crate::base::error::Context;
use crate::base::mountinfo::{mounts_on, top_mount};
use crate::base::shell::shell;
use crate::base::unmount::{detach, unmount};
use crate::base::{Error, ErrorKind, Result};

/// Event loops of a view.
const THREADS: usize = 4;
/// The file-system type of every view begins so; that of the filter does not.
const TYPE_PREFIX: &str = "fuse.afterimage-";
/// Threads of a removed mount end within so long, unless another mount namespace keeps it.
const END_SECONDS_MAX: u64 = 10;

/// Owner and mode that the files of a view get: those of the folder that it is mounted on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Owner {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Permission bits of the folder.
    pub mode: u16,
}

/// What to mount.
pub(super) struct Kind {
    /// File-system type after `fuse.`: `afterimage-points`, `afterimage-clone`.
    pub subtype: &'static str,
    /// Whether the kernel refuses every change.
    pub read_only: bool,
}

/// A served mount.
pub(super) struct Mountpoint {
    dir: PathBuf,
    /// Device number of the mounted file system: tells our mount from one put over it or after it.
    device: u64,
    /// Never gets anything; disconnected when the session has ended.
    ended: Receiver<()>,
}

impl Mountpoint {
    /// Whether a view can be mounted on `dir`: a folder that exists, is empty, and is no mount.
    /// Clears a dead mount of ours. Returns its path without symlinks, and its owner.
    pub(super) fn verify(dir: &Path) -> Result<(PathBuf, Owner)> {
        let what = || format!("cannot mount on {}", dir.display());
        let dir = std::path::absolute(dir).context(|| format!("{} is no path", dir.display()))?;
        clear_dead(&dir)?;
        let dir = match dir.canonicalize() {
            Ok(dir) => dir,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(Error::new(ErrorKind::NotFound, what())
                    .why("there is no such folder")
                    .hint(format!("mkdir -p {}", shell(&dir))));
            }
            Err(e) => return Err(Error::io(what(), e)),
        };
        let metadata = dir.metadata().context(what)?;
        if !metadata.is_dir() {
            return Err(Error::new(ErrorKind::Refused, what())
                .why("it is no folder")
                .hint("name an empty folder"));
        }
        if let Some(mounted) = top_mount(&dir)? {
            return Err(Error::new(ErrorKind::Exists, what())
                .why(format!("a file system of type {} is mounted there already", mounted.kind))
                .hint(format!("umount {}", shell(&dir))));
        }
        if dir.read_dir().context(what)?.next().is_some() {
            return Err(Error::new(ErrorKind::Refused, what())
                .why("the folder is not empty, and its files would be hidden")
                .hint(format!("name an empty folder, as in: mkdir {}", shell(&dir.join("points")))));
        }
        let mode = u16::try_from(metadata.mode() & 0o777).unwrap_or(0o700);
        Ok((dir, Owner { uid: metadata.uid(), gid: metadata.gid(), mode }))
    }

    /// Mounts `filesystem` on a folder that [`Mountpoint::verify`] has returned, and serves it.
    pub(super) fn mount<F: Filesystem>(dir: PathBuf, kind: &Kind, filesystem: F) -> Result<Self> {
        let what = || format!("cannot mount on {}", dir.display());
        let device = OpenOptions::new().read(true).write(true).open("/dev/fuse").map_err(|e| {
            Error::io(what(), e)
                .with_kind(ErrorKind::Io)
                .why("/dev/fuse cannot be opened")
                .hint("modprobe fuse")
        })?;
        let options = format!(
            "fd={},rootmode=40000,user_id={},group_id={},allow_other,default_permissions",
            device.as_raw_fd(),
            nix::unistd::geteuid(),
            nix::unistd::getegid(),
        );
        let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
        flags.set(MsFlags::MS_RDONLY, kind.read_only);
        let fs_type = format!("fuse.{}", kind.subtype);
        mount(Some(kind.subtype), &dir, Some(fs_type.as_str()), flags, Some(options.as_str()))
            .context(what)
            .map_err(|e| match e.errno() {
                Some(libc::EPERM) => e.why("only root can mount").hint("run it as root"),
                _ => e,
            })?;
        // From here on the mount is taken away again if anything fails.
        let detach = Detach(&dir);
        let (sender, ended) = bounded(0);
        serve(filesystem, device, sender).context(what)?;
        let device = dir.metadata().context(what)?.dev();
        std::mem::forget(detach);
        Ok(Self { dir, device, ended })
    }

    /// Where it is mounted.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether it is still served: not after an umount, by us or from outside.
    pub(super) fn is_mounted(&self) -> bool {
        self.ended.try_recv() != Err(TryRecvError::Disconnected)
    }

    /// Removes the mount and waits for its threads. Nothing to do if it is gone already.
    /// [`ErrorKind::Busy`] while files in it are open.
    pub(super) fn unmount(&self) -> Result<()> {
        let what = || format!("cannot unmount {}", self.dir.display());
        if !self.is_mounted() {
            return Ok(());
        }
        let here = mounts_on(&self.dir)?;
        match here.iter().position(|m| m.device == self.device) {
            // Removed from outside a moment ago.
            None => {
                self.wait_for_end();
                return Ok(());
            }
            Some(place) if place + 1 < here.len() => {
                return Err(Error::new(ErrorKind::Refused, what())
                    .why("another file system is mounted over it")
                    .hint(format!("umount {}", shell(&self.dir))));
            }
            Some(_) => {}
        }
        unmount(&self.dir).context(what).map_err(|e| match e.errno() {
            Some(libc::EBUSY) => e
                .with_kind(ErrorKind::Busy)
                .why("files in it are in use")
                .hint(format!("fuser -vm {}", shell(&self.dir))),
            _ => e,
        })?;
        self.wait_for_end();
        Ok(())
    }

    fn wait_for_end(&self) {
        let patience = Duration::from_secs(END_SECONDS_MAX);
        if self.ended.recv_timeout(patience) == Err(RecvTimeoutError::Timeout) {
            log::warn!("{} is unmounted, but another mount namespace still uses it", self.dir.display());
        }
    }
}

impl Drop for Mountpoint {
    fn drop(&mut self) {
        match self.unmount() {
            Ok(()) => {}
            Err(e) if e.kind() == ErrorKind::Busy => {
                log::warn!("{e}; it goes away when its last user does");
                drop(Detach(&self.dir));
            }
            Err(e) => log::warn!("{e}"),
        }
    }
}

/// Takes a mount off the tree when dropped; it ends with its last user.
struct Detach<'a>(&'a Path);

impl Drop for Detach<'_> {
    fn drop(&mut self) {
        if let Err(e) = detach(self.0) {
            log::warn!("{} stays mounted: {e}", self.0.display());
        }
    }
}

fn serve<F: Filesystem>(
    filesystem: F,
    device: File,
    ended: crossbeam_channel::Sender<()>,
) -> std::io::Result<()> {
    let mut config = Config::default();
    config.acl = SessionACL::All;
    config.n_threads = Some(THREADS);
    let session = Session::from_fd(filesystem, OwnedFd::from(device), SessionACL::All, config)?;
    std::thread::Builder::new().name("view".to_owned()).spawn(move || {
        if let Err(e) = session.run() {
            log::warn!("a mounted view has ended: {e}");
        }
        drop(ended);
    })?;
    Ok(())
}

/// Takes dead views off `dir`. A dead filter is not taken off: that would bare the images below it.
fn clear_dead(dir: &Path) -> Result<()> {
    let real = absolute_of_dead(dir).unwrap_or_else(|_| dir.to_owned());
    if dead::clear_dead(&real, |kind| kind.starts_with(TYPE_PREFIX))? > 0 {
        log::info!("cleared the dead mount on {}", dir.display());
    }
    if top_mount(&real)?.is_none() || !is_disconnected(&real) {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Refused, format!("cannot mount on {}", dir.display()))
        .why("a file system is mounted there whose process has died")
        .hint(format!("name another folder, or, if nothing needs it: umount -l {}", shell(dir))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_that_cannot_take_a_view() {
        let dir = tempfile::tempdir().unwrap();
        let missing = Mountpoint::verify(&dir.path().join("none")).unwrap_err();
        assert_eq!(missing.kind(), ErrorKind::NotFound);
        assert!(missing.next_step().unwrap().starts_with("mkdir -p "));
        std::fs::write(dir.path().join("file"), "x").unwrap();
        assert_eq!(Mountpoint::verify(dir.path()).unwrap_err().kind(), ErrorKind::Refused);
        assert_eq!(Mountpoint::verify(&dir.path().join("file")).unwrap_err().kind(), ErrorKind::Refused);
        assert_eq!(Mountpoint::verify(Path::new("/proc")).unwrap_err().kind(), ErrorKind::Exists);
    }
}
