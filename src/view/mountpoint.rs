//! A folder that one of our views is mounted on, from mount(2) to the last of its threads.
//!
//! Killed: the mount stays and answers ENOTCONN; [`Mountpoint::mount`] on the same folder clears
//! it first, if it is one of ours. Removed from outside (`umount DIR`): the threads end, and
//! [`Mountpoint::is_mounted`] says so.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, TryRecvError, bounded};
use fuser::{Config, Filesystem, Session, SessionACL};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::base::error::Context;
use crate::base::unmount::unmount;
use crate::base::{Error, ErrorKind, Result};

/// Event loops of a view.
const THREADS: usize = 4;
/// Every file-system type of ours begins so.
const TYPE_PREFIX: &str = "fuse.afterimage";
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
        if let Some(mounted) = mounted_on(&dir)? {
            return Err(Error::new(ErrorKind::Exists, what())
                .why(format!("a file system of type {mounted} is mounted there already"))
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
        match here.iter().position(|(device, _)| *device == self.device) {
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
        unmount(&self.dir, MntFlags::UMOUNT_NOFOLLOW).context(what).map_err(|e| match e.errno() {
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
        if let Err(e) = umount2(self.0, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
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

/// Takes dead mounts of ours off `dir`: their daemon was killed, every call gives ENOTCONN.
/// Asked by statfs, because the kernel answers a stat from its cache for a while.
fn clear_dead(dir: &Path) -> Result<()> {
    let what = || format!("cannot mount on {}", dir.display());
    let real = match (dir.parent().and_then(|p| p.canonicalize().ok()), dir.file_name()) {
        (Some(parent), Some(name)) => parent.join(name),
        _ => dir.to_owned(),
    };
    while let Some(mounted) = mounted_on(&real)? {
        let is_dead = nix::sys::statfs::statfs(&real).err() == Some(Errno::ENOTCONN);
        match (is_dead, mounted.starts_with(TYPE_PREFIX)) {
            (false, _) => return Ok(()),
            (true, true) => {
                umount2(&real, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).context(what)?;
                log::info!("cleared the dead mount on {}", dir.display());
            }
            (true, false) => {
                return Err(Error::new(ErrorKind::Refused, what())
                    .why("a file system is mounted there whose process has died")
                    .hint(format!("umount -l {}", shell(dir))));
            }
        }
    }
    Ok(())
}

/// The file systems mounted on exactly this folder, the one on top last: device and type.
fn mounts_on(dir: &Path) -> Result<Vec<(u64, String)>> {
    let table = std::fs::read("/proc/self/mountinfo").context(|| "cannot read /proc/self/mountinfo")?;
    let lines = table.split(|b| *b == b'\n').filter_map(|line| {
        let mut fields = line.split(|b| *b == b' ');
        let (major, minor) = std::str::from_utf8(fields.nth(2)?).ok()?.split_once(':')?;
        let device = nix::sys::stat::makedev(major.parse().ok()?, minor.parse().ok()?);
        let mount_point = unescape(fields.nth(1)?);
        let kind = fields.skip_while(|f| *f != b"-").nth(1)?;
        let is_here = mount_point == dir.as_os_str().as_bytes();
        is_here.then(|| (device, String::from_utf8_lossy(kind).into_owned()))
    });
    Ok(lines.collect())
}

/// Type of the file system on top of those mounted on exactly this folder.
fn mounted_on(dir: &Path) -> Result<Option<String>> {
    Ok(mounts_on(dir)?.pop().map(|(_, kind)| kind))
}

/// Undoes the `\040` of mountinfo.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let octal = (*first == b'\\')
            .then(|| tail.get(..3))
            .flatten()
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match octal {
            Some(byte) => {
                out.push(byte);
                rest = tail.get(3..).unwrap_or_default();
            }
            None => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    out
}

/// A path as one word of a shell command.
pub(super) fn shell(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@%,=".contains(c);
    match !text.is_empty() && text.chars().all(plain) {
        true => text,
        false => format!("'{}'", text.replace('\'', r"'\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_of_mountinfo_and_of_the_shell() {
        assert_eq!(unescape(br"/a\040b\134c"), br"/a b\c");
        assert_eq!(unescape(br"/a\04"), br"/a\04");
        assert_eq!(shell(Path::new("/a-b/c")), "/a-b/c");
        assert_eq!(shell(Path::new("/a b'c")), r"'/a b'\''c'");
    }

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
