//! The mount: over the directory itself or elsewhere.
//!
//! The lower directory is opened first and kept; then `/dev/fuse` is opened and mounted, and
//! several event loops serve that one descriptor. So files keep their paths when the mount is
//! over its own directory, and nothing of ours ever goes through it.
//!
//! Killed here: a mount without a daemon stays, every call on it is ENOTCONN, and the next start
//! replaces it ([`super::succession`]). Removed from outside by plain `umount`: the loops
//! end, and so does [`Mount::wait`].

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::statvfs::{FsFlags, fstatvfs};

use super::adapter::Adapter;
use super::holders::{Holder, files_below, holders_of_device, holders_of_files};
use super::lower::LowerFile;
use super::node::lock;
use super::ops::Filter;
use super::shared::refuse_shared;
use super::succession::{Aside, clear_dead_mount, is_dead, without_dead};
use crate::base::dead::absolute_of_dead;
use crate::base::error::Context;
use crate::base::mountinfo::top_mount;
use crate::base::shell::shell;
use crate::base::unmount::{detach, unmount};
use crate::base::{Error, ErrorKind, FileKey, Result};
use crate::core::ports::names::NameWatcher;

/// The type that our mounts have.
pub const MOUNT_TYPE: &str = "fuse.afterimage";

/// Event loops of one mount. More than cores, since each waits for the lower file system.
const LOOPS: usize = 8;

/// What to mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountSpec {
    /// The lower directory.
    pub source: PathBuf,
    /// Where it is to be seen; the same directory to mount over itself.
    pub dir: PathBuf,
    /// The operator says that no other host writes there.
    pub single_host: bool,
    /// Options as after `mount -o`: `ro`, `nosuid`, `nodev`, `noexec`, `noatime`, `relatime`;
    /// `rw`, `defaults`, `allow_other`, `default_permissions` and the words of fstab mean nothing
    /// here.
    pub options: Vec<String>,
}

/// A mounted filter. It stays mounted when this is dropped; see [`Mount::unmount`].
pub struct Mount {
    spec: MountSpec,
    filter: Arc<Filter>,
    /// `st_dev` of the mount.
    device: u64,
    state: Arc<State>,
}

/// A mount whose lower directory is open and which does not serve yet.
pub struct Prepared {
    spec: MountSpec,
    filter: Arc<Filter>,
}

#[derive(Default)]
struct State {
    has_ended: Mutex<bool>,
    ended: Condvar,
}

/// Options that say nothing to the kernel about this mount.
const IGNORED_OPTIONS: &[&str] = &[
    "",
    "rw",
    "defaults",
    "allow_other",
    "default_permissions",
    "auto",
    "noauto",
    "nofail",
    "_netdev",
    "user",
    "nouser",
    "suid",
    "dev",
    "exec",
    "atime",
    "async",
    "single_host",
    "nonempty",
];

fn mount_flags(options: &[String], lower: &File) -> Result<MsFlags> {
    let mut flags = MsFlags::empty();
    for option in options.iter().flat_map(|o| o.split(',')) {
        flags |= match option {
            "ro" => MsFlags::MS_RDONLY,
            "nosuid" => MsFlags::MS_NOSUID,
            "nodev" => MsFlags::MS_NODEV,
            "noexec" => MsFlags::MS_NOEXEC,
            "noatime" => MsFlags::MS_NOATIME,
            "nodiratime" => MsFlags::MS_NODIRATIME,
            "relatime" => MsFlags::MS_RELATIME,
            "strictatime" => MsFlags::MS_STRICTATIME,
            "sync" => MsFlags::MS_SYNCHRONOUS,
            "dirsync" => MsFlags::MS_DIRSYNC,
            x if IGNORED_OPTIONS.contains(&x) || x.starts_with("x-") || x.starts_with("comment=") => {
                MsFlags::empty()
            }
            other => {
                return Err(Error::new(ErrorKind::Usage, format!("unknown mount option {other:?}"))
                    .hint("leave it out; known are ro, nosuid, nodev, noexec, noatime, relatime, sync"));
            }
        };
    }
    // What the lower mount forbids stays forbidden.
    let below = fstatvfs(lower).context(|| "the lower file system does not answer")?.flags();
    for (has, flag) in [
        (FsFlags::ST_RDONLY, MsFlags::MS_RDONLY),
        (FsFlags::ST_NOSUID, MsFlags::MS_NOSUID),
        (FsFlags::ST_NODEV, MsFlags::MS_NODEV),
        (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
    ] {
        if below.contains(has) {
            flags |= flag;
        }
    }
    Ok(flags)
}

/// The absolute path of a directory, without links; also of one whose filter is dead, which cannot
/// be looked at. An error if there is no such directory.
pub fn absolute(directory: &Path) -> Result<PathBuf> {
    let canonical = match directory.canonicalize() {
        Err(e) if e.raw_os_error() == Some(Errno::ENOTCONN as i32) => absolute_of_dead(directory)?,
        other => other.map_err(|e| {
            let error = Error::io(format!("the directory {} cannot be opened", directory.display()), e);
            error.hint("name a directory that exists, as in: afterimage mount /var/lib/libvirt/images")
        })?,
    };
    if is_dead(&canonical) || canonical.is_dir() {
        return Ok(canonical);
    }
    Err(Error::new(ErrorKind::Usage, format!("{} is not a directory", directory.display()))
        .hint("name the directory that holds the disk images"))
}

impl Mount {
    /// Mounts and serves. A dead mount of ours at `dir` is replaced.
    pub fn start(spec: MountSpec, watcher: Arc<dyn NameWatcher>) -> Result<Self> {
        Self::prepare(spec, watcher)?.serve()
    }

    /// Opens the lower directory, so that disks can be attached before anything is mounted. A
    /// dead mount of ours at `dir` stays until [`Prepared::serve`] replaces it.
    pub fn prepare(spec: MountSpec, watcher: Arc<dyn NameWatcher>) -> Result<Prepared> {
        let spec = MountSpec { source: absolute(&spec.source)?, dir: absolute(&spec.dir)?, ..spec };
        let what = || format!("the filter cannot be mounted over {}", spec.dir.display());
        for directory in [&spec.source, &spec.dir] {
            if !is_dead(directory) && top_mount(directory)?.is_some_and(|m| m.kind == MOUNT_TYPE) {
                return Err(Error::new(ErrorKind::Exists, what())
                    .why(format!("a filter is mounted over {} already", directory.display()))
                    .hint(format!("afterimage umount {}", shell(directory))));
            }
        }
        if let Err(e) = super::memory::raise_descriptor_limit() {
            log::warn!("{e}");
        }
        let open = || {
            if !spec.single_host {
                refuse_shared(&spec.source)?;
            }
            Filter::over(&spec.source)
        };
        let mut dead = vec![spec.source.as_path(), spec.dir.as_path()];
        dead.retain(|d| is_dead(d));
        let filter = Arc::new(if dead.is_empty() { open()? } else { without_dead(&dead, open)? });
        filter.set_watcher(Some(watcher));
        Ok(Prepared { spec, filter })
    }

    /// What is mounted; paths absolute and without links.
    pub fn spec(&self) -> &MountSpec {
        &self.spec
    }

    /// The operations behind the mount: attach and detach disks there.
    pub fn filter(&self) -> &Arc<Filter> {
        &self.filter
    }

    /// The root of the lower directory; descriptor-relative calls on it never meet the mount.
    pub fn root(&self) -> &File {
        self.filter.lower.root()
    }

    /// See [`Filter::resolve`]. `relative` is the path in the mounted view, without links.
    pub fn resolve(&self, relative: &Path) -> Result<LowerFile> {
        self.filter.resolve(relative)
    }

    /// Who has this file open, or mapped, or behind a loop device, beneath the mount: not through
    /// it, so that its writes are not seen. This process is not counted.
    pub fn holders(&self, file: FileKey) -> Vec<Holder> {
        holders_of_files(|key| key == file).into_iter().map(|(_, holder)| holder).collect()
    }

    /// Every file below the lower directory that is open beneath the mount, by its path relative
    /// to the root, with its holders.
    pub fn open_beneath(&self) -> Vec<(PathBuf, Holder)> {
        let files = files_below(&self.filter.lower);
        let held = holders_of_files(|key| files.contains_key(&key));
        let mut found: Vec<_> =
            held.into_iter().filter_map(|(key, holder)| Some((files.get(&key)?.clone(), holder))).collect();
        found.sort_by(|a, b| a.0.cmp(&b.0));
        found
    }

    /// Who has anything below the mount open.
    pub fn users(&self) -> Vec<Holder> {
        holders_of_device(self.device)
    }

    /// Removes the mount and waits until it is served no more. Refused while files are in use,
    /// saying by whom; `lazy` takes the name away at once and serves what is open to its end.
    pub fn unmount(&self, lazy: bool) -> Result<()> {
        let what = || format!("{} cannot be unmounted", self.spec.dir.display());
        if self.has_ended() {
            return Ok(());
        }
        if top_mount(&self.spec.dir)?.is_none_or(|top| top.device != self.device) {
            return Err(Error::new(ErrorKind::Refused, what())
                .why("something else is mounted over it")
                .hint(format!("umount {}", shell(&self.spec.dir))));
        }
        let removed = if lazy { detach(&self.spec.dir) } else { unmount(&self.spec.dir) };
        match removed {
            Ok(()) if lazy => Ok(()),
            Ok(()) => {
                self.wait();
                Ok(())
            }
            Err(Errno::EBUSY) => {
                let users: Vec<String> = self.users().iter().map(Holder::to_string).collect();
                let why = match users.is_empty() {
                    true => "it is in use, by a mount or by the kernel".to_owned(),
                    false => format!("it is in use: {}", users.join("; ")),
                };
                Err(Error::new(ErrorKind::Refused, what())
                    .why(why)
                    .hint("end them, or shut down the guests, and try again"))
            }
            Err(e) => Err(Error::io(what(), e.into())),
        }
    }

    /// Whether the mount is served no more.
    pub fn has_ended(&self) -> bool {
        *lock(&self.state.has_ended)
    }

    /// Waits until the mount is served no more: unmounted by us or from outside, and nothing of
    /// it open.
    pub fn wait(&self) {
        let mut ended = lock(&self.state.has_ended);
        while !*ended {
            ended = self.state.ended.wait(ended).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Prepared {
    /// What will be mounted; paths absolute and without links.
    pub fn spec(&self) -> &MountSpec {
        &self.spec
    }

    /// The operations behind the mount: attach disks there.
    pub fn filter(&self) -> &Arc<Filter> {
        &self.filter
    }

    /// The root of the lower directory.
    pub fn root(&self) -> &File {
        self.filter.lower.root()
    }

    /// Mounts and serves. A dead mount of ours is replaced without baring the directory.
    pub fn serve(self) -> Result<Mount> {
        let what = || format!("the filter cannot be mounted over {}", self.spec.dir.display());
        let state = if is_dead(&self.spec.dir) {
            log::warn!("replacing a mount over {} whose daemon is dead", self.spec.dir.display());
            self.succeed_dead()?
        } else {
            self.serve_at(&self.spec.dir)?
        };
        let top = top_mount(&self.spec.dir)?
            .ok_or_else(|| Error::new(ErrorKind::Io, what()).why("it is gone already"))?;
        let Self { spec, filter } = self;
        log::info!("mounted {} over {}", spec.source.display(), spec.dir.display());
        Ok(Mount { spec, filter, device: top.device, state })
    }

    fn succeed_dead(&self) -> Result<Arc<State>> {
        let aside = Aside::make()?;
        let state = self.serve_at(aside.path())?;
        if aside.succeed(&self.spec.dir)? {
            return Ok(state);
        }
        let dir = self.spec.dir.display();
        log::warn!(
            "{dir} is bare for a moment (an old kernel): an image that is opened now bypasses the filter"
        );
        clear_dead_mount(&self.spec.dir)?;
        self.serve_at(&self.spec.dir)
    }

    /// Mounts at `place` and starts the event loops.
    fn serve_at(&self, place: &Path) -> Result<Arc<State>> {
        let what = || format!("the filter cannot be mounted over {}", place.display());
        let flags = mount_flags(&self.spec.options, self.filter.lower.root())?;
        let fuse = open_device().map_err(|e| {
            e.hint("load the module, as in: modprobe fuse; in a container, pass /dev/fuse into it")
        })?;
        let data = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions",
            fuse.as_raw_fd()
        );
        mount(Some(&self.spec.source), place, Some(MOUNT_TYPE), flags, Some(data.as_str())).context(what)?;
        let state = Arc::new(State::default());
        if let Err(e) = serve(&self.filter, fuse, &self.spec.dir, state.clone()) {
            let _ = detach(place);
            return Err(e);
        }
        Ok(state)
    }
}

fn open_device() -> Result<OwnedFd> {
    let fuse = OpenOptions::new().read(true).write(true).open("/dev/fuse");
    fuse.map(OwnedFd::from).context(|| "/dev/fuse cannot be opened")
}

/// Shakes hands with the kernel and starts the event loops.
fn serve(filter: &Arc<Filter>, fuse: OwnedFd, directory: &Path, state: Arc<State>) -> Result<()> {
    let mut config = fuser::Config::default();
    config.n_threads = Some(LOOPS);
    let adapter = Adapter::new(filter.clone(), LOOPS);
    let session = fuser::Session::from_fd(adapter, fuse, fuser::SessionACL::All, config)
        .context(|| "the kernel does not speak FUSE as expected")?;
    let directory = directory.display().to_string();
    let body = move || {
        match session.run() {
            Ok(()) => log::info!("{directory} is unmounted"),
            Err(e) => log::error!("{directory} is served no more: {e}"),
        }
        *lock(&state.has_ended) = true;
        state.ended.notify_all();
    };
    std::thread::Builder::new()
        .name("filter".to_owned())
        .spawn(body)
        .map(drop)
        .context(|| "no thread for the filter")
}
