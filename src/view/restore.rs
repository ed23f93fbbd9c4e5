//! Restore: sparse copies of the disks of a point, as ordinary files.
//!
//! Order: look at everything (names, what is there already, room), copy every disk under a
//! temporary name beside its place, write backing names, sync, and only then give the files
//! their names. So a restore that fails or is cancelled before that leaves nothing behind, and
//! one that is killed leaves files named `.afterimage-restore-*` and no half-written disk.
//! Without `force` the last step itself refuses to replace a file that came meanwhile.
//!
//! Bytes are verified while they are read (checksums of the vault); a damaged block ends the
//! restore with the disk and offset in the error.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use serde::Serialize;

use super::restore_backing::settle_backing;
use super::restore_copy::{copy_disk, data_bytes};
use super::tree::{definition_path, inside};
use crate::base::durable::sync_dir;
use crate::base::error::Context;
use crate::base::shell::shell;
use crate::base::{Error, ErrorKind, PointId, Result};
use crate::core::ports::points::PointReader;

pub use super::restore_backing::Backing;

/// Files that exist already are named in the error up to this number.
const NAMED_FILES_MAX: usize = 5;
/// A restore leaves at least so many bytes free.
const FREE_BYTES_MIN: u64 = 16 << 20;

/// What a restore is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestorePhase {
    /// Counting what there is to copy.
    Plan,
    /// Copying and verifying.
    Copy,
    /// Syncing and naming the files.
    Finish,
}

/// Progress, for a bar.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RestoreProgress {
    /// What it is doing.
    pub phase: RestorePhase,
    /// The disk that is being worked on, relative to the target folder.
    pub path: PathBuf,
    /// Bytes of data copied, of all disks.
    pub done_bytes: u64,
    /// Bytes of data to copy, of all disks. Grows while planning.
    pub total_bytes: u64,
}

/// A restored disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RestoredFile {
    /// Path relative to the target folder.
    pub path: PathBuf,
    /// Size in bytes.
    pub bytes: u64,
    /// Bytes that are data; the rest are holes.
    pub data_bytes: u64,
    /// What became of the name of its backing file; none: it has none.
    pub backing: Option<Backing>,
}

/// What was restored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RestoreReport {
    /// From which point.
    pub point: PointId,
    /// The disks, by path.
    pub files: Vec<RestoredFile>,
    /// The definition files, relative to the target folder.
    pub definition: Vec<PathBuf>,
}

/// Restores every disk and definition file of an open point into the folder `to`, which is made
/// if it is missing.
///
/// `progress` is called from this thread; `Break` cancels ([`ErrorKind::Cancelled`]). Errors:
/// [`ErrorKind::Exists`] a file is there and `force` is not; [`ErrorKind::NoSpace`] before
/// anything is written; [`ErrorKind::Damaged`] a block that fails its checksum.
pub fn restore(
    reader: &dyn PointReader,
    to: &Path,
    force: bool,
    progress: &dyn Fn(RestoreProgress) -> ControlFlow<()>,
) -> Result<RestoreReport> {
    let mut job = Job::plan(reader, to, force, progress)?;
    job.verify_room()?;
    job.copy()?;
    let files = job.finish()?;
    log::info!("restored point {} to {}", reader.info().id, job.to.display());
    Ok(RestoreReport { point: reader.info().id, files, definition: job.definition_paths() })
}

/// One file on its way: the temporary one is removed unless it gets its name.
struct Staged {
    path: PathBuf,
    temporary: PathBuf,
    file: File,
    is_named: bool,
}

impl Drop for Staged {
    fn drop(&mut self) {
        if !self.is_named
            && let Err(e) = fs::remove_file(&self.temporary)
        {
            log::warn!("{} is left behind: {e}", self.temporary.display());
        }
    }
}

struct Job<'a> {
    reader: &'a dyn PointReader,
    to: PathBuf,
    force: bool,
    progress: &'a dyn Fn(RestoreProgress) -> ControlFlow<()>,
    /// Bytes of data of each disk.
    data: Vec<u64>,
    // Before `folders`: the files in a folder go before the folder does.
    staged: Vec<Staged>,
    folders: MadeFolders,
}

/// Folders that this restore made, outermost first; removed again, if empty, when it fails.
#[derive(Default)]
struct MadeFolders(Vec<PathBuf>);

impl Drop for MadeFolders {
    fn drop(&mut self) {
        for folder in self.0.iter().rev() {
            // Not empty: somebody put something there, or the restore succeeded.
            let _ = fs::remove_dir(folder);
        }
    }
}

impl<'a> Job<'a> {
    fn plan(
        reader: &'a dyn PointReader,
        to: &Path,
        force: bool,
        progress: &'a dyn Fn(RestoreProgress) -> ControlFlow<()>,
    ) -> Result<Self> {
        let to = std::path::absolute(to).context(|| format!("{} is no path", to.display()))?;
        let mut job = Self {
            reader,
            to,
            force,
            progress,
            data: Vec::new(),
            staged: Vec::new(),
            folders: MadeFolders::default(),
        };
        job.verify_targets()?;
        let mut total = 0u64;
        for number in 0..reader.disks().len() {
            let path = job.disk_path(number);
            job.tell(RestorePhase::Plan, &path, 0, total)?;
            let bytes = data_bytes(reader, number)?;
            job.data.push(bytes);
            total = total.saturating_add(bytes);
        }
        Ok(job)
    }

    fn disk_path(&self, number: usize) -> PathBuf {
        self.reader.disks().get(number).map(|d| d.path.clone()).unwrap_or_default()
    }

    fn definition_paths(&self) -> Vec<PathBuf> {
        self.reader.definition().iter().map(|file| definition_path(&file.name)).collect()
    }

    fn tell(&self, phase: RestorePhase, path: &Path, done_bytes: u64, total_bytes: u64) -> Result<()> {
        let now = RestoreProgress { phase, path: path.to_owned(), done_bytes, total_bytes };
        match (self.progress)(now) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => {
                Err(Error::new(ErrorKind::Cancelled, "the restore was cancelled").why("nothing was changed"))
            }
        }
    }

    /// Looks at every place a file would go to, before the first byte is written.
    fn verify_targets(&self) -> Result<()> {
        let mut taken = Vec::new();
        let paths = self.reader.disks().iter().map(|d| d.path.clone()).chain(self.definition_paths());
        for path in paths {
            if inside(&path).is_none() {
                return Err(Error::new(ErrorKind::Damaged, format!("cannot restore {}", path.display()))
                    .why("it is no path inside the folder of a point"));
            }
            let target = self.to.join(&path);
            match fs::symlink_metadata(&target) {
                Ok(found) if !found.is_file() => {
                    return Err(Error::new(
                        ErrorKind::Refused,
                        format!("cannot restore to {}", target.display()),
                    )
                    .why("something that is no regular file has this name")
                    .hint("name another folder with --to DIR"));
                }
                Ok(_) => taken.push(target),
                Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT)) => {}
                Err(e) => return Err(Error::io(format!("cannot restore to {}", target.display()), e)),
            }
        }
        if taken.is_empty() || self.force {
            return Ok(());
        }
        let more = taken.len().saturating_sub(NAMED_FILES_MAX);
        let mut names: Vec<String> =
            taken.iter().take(NAMED_FILES_MAX).map(|p| p.display().to_string()).collect();
        if more > 0 {
            names.push(format!("{more} more"));
        }
        Err(Error::new(ErrorKind::Exists, format!("cannot restore to {}", self.to.display()))
            .why(format!("it would replace {}", names.join(", ")))
            .hint("name another folder with --to DIR, or say --force to replace them"))
    }

    /// Asks for the room of all data at once. What `force` replaces is not counted as free: it
    /// stays until everything is copied.
    fn verify_room(&mut self) -> Result<()> {
        self.make_folder(&self.to.clone())?;
        let needed = self.data.iter().sum::<u64>().saturating_add(FREE_BYTES_MIN);
        let what = || format!("cannot restore to {}", self.to.display());
        let space = nix::sys::statvfs::statvfs(&self.to).context(what)?;
        let free = space.blocks_available().saturating_mul(space.fragment_size());
        if free < needed {
            let size = |n| bytesize::ByteSize(n).display().iec();
            return Err(Error::new(ErrorKind::NoSpace, what())
                .why(format!("it needs {} and {} are free", size(needed), size(free)))
                .hint("free some space there, or name another folder with --to DIR"));
        }
        Ok(())
    }

    fn copy(&mut self) -> Result<()> {
        let total = self.data.iter().sum();
        let mut before = 0;
        for (number, bytes) in self.data.clone().into_iter().enumerate() {
            let path = self.disk_path(number);
            let staged = self.stage(&path)?;
            copy_disk(self.reader, number, &staged.file, &|done| {
                self.tell(RestorePhase::Copy, &path, before + done, total)
            })?;
            before += bytes;
            self.staged.push(staged);
        }
        for (file, path) in self.reader.definition().iter().zip(self.definition_paths()) {
            let mut staged = self.stage(&path)?;
            staged
                .file
                .write_all(file.content.as_bytes())
                .context(|| format!("cannot write {}", staged.path.display()))?;
            self.staged.push(staged);
        }
        Ok(())
    }

    /// A new temporary file in the folder of its later place, with the owner and mode of the file
    /// that it will replace.
    fn stage(&mut self, path: &Path) -> Result<Staged> {
        let target = self.to.join(path);
        if let Some(folder) = target.parent() {
            self.make_folder(folder)?;
        }
        let name = OsString::from(format!(".afterimage-restore-{:08x}", rand::random::<u32>()));
        let temporary = target.with_file_name(name);
        let what = || format!("cannot write {}", target.display());
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)
            .context(what)?;
        let staged = Staged { path: target.clone(), temporary, file, is_named: false };
        if let Ok(old) = fs::symlink_metadata(&target) {
            nix::unistd::fchown(
                staged.file.as_fd(),
                Some(nix::unistd::Uid::from_raw(old.uid())),
                Some(nix::unistd::Gid::from_raw(old.gid())),
            )
            .context(what)?;
            let mode = fs::Permissions::from_mode(old.mode() & 0o777);
            staged.file.set_permissions(mode).context(what)?;
        }
        Ok(staged)
    }

    /// Makes a folder and those above it; remembers them, so that a failure removes them.
    fn make_folder(&mut self, folder: &Path) -> Result<()> {
        let missing: Vec<&Path> = folder.ancestors().take_while(|p| !p.exists()).collect();
        for path in missing.into_iter().rev() {
            match fs::create_dir(path) {
                Ok(()) => self.folders.0.push(path.to_owned()),
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(Error::io(format!("cannot make the folder {}", path.display()), e)),
            }
        }
        if !folder.is_dir() {
            return Err(Error::new(ErrorKind::Refused, format!("cannot restore to {}", folder.display()))
                .why("it is no folder")
                .hint("name another folder with --to DIR"));
        }
        Ok(())
    }

    /// Backing names, sync, and then the names of the files themselves.
    fn finish(&mut self) -> Result<Vec<RestoredFile>> {
        let total = self.data.iter().sum();
        let mut files = Vec::new();
        for (number, disk) in self.reader.disks().iter().enumerate() {
            self.tell(RestorePhase::Finish, &disk.path, total, total)?;
            let Some(staged) = self.staged.get(number) else { continue };
            let backing = settle_backing(self.reader, number, &self.to, &staged.file)?;
            files.push(RestoredFile {
                path: disk.path.clone(),
                bytes: disk.size,
                data_bytes: self.data.get(number).copied().unwrap_or(0),
                backing,
            });
        }
        for staged in &self.staged {
            staged.file.sync_all().context(|| format!("cannot write {}", staged.path.display()))?;
        }
        self.name_all()?;
        self.sync_folders()?;
        self.folders.0.clear();
        Ok(files)
    }

    /// Gives every file its name. If one of them cannot get it, those that this call named anew
    /// are taken away again.
    fn name_all(&mut self) -> Result<()> {
        let mut named: Vec<PathBuf> = Vec::new();
        for staged in &mut self.staged {
            let was_there = fs::symlink_metadata(&staged.path).is_ok();
            if let Err(e) = name_one(staged, self.force) {
                for path in named {
                    if let Err(e) = fs::remove_file(&path) {
                        log::warn!("{} is left behind: {e}", path.display());
                    }
                }
                return Err(e);
            }
            staged.is_named = true;
            if !was_there {
                named.push(staged.path.clone());
            }
        }
        Ok(())
    }

    /// Makes the new names durable: in every folder that got a file, and above every new folder.
    fn sync_folders(&self) -> Result<()> {
        let of_files = self.staged.iter().filter_map(|s| s.path.parent());
        let of_folders = self.folders.0.iter().filter_map(|f| f.parent());
        let all: std::collections::BTreeSet<&Path> = of_files.chain(of_folders).collect();
        all.into_iter().try_for_each(sync_dir)
    }
}

fn name_one(staged: &Staged, force: bool) -> Result<()> {
    let what = || format!("cannot name {}", staged.path.display());
    if force {
        return fs::rename(&staged.temporary, &staged.path).context(what);
    }
    match renameat2(AT_FDCWD, &staged.temporary, AT_FDCWD, &staged.path, RenameFlags::RENAME_NOREPLACE) {
        Ok(()) => Ok(()),
        Err(Errno::EEXIST) => Err(Error::new(ErrorKind::Exists, what())
            .why("a file of this name came while the disks were copied")
            .hint(format!("ls -l {}", shell(&staged.path)))),
        // A file system without this flag: a hard link refuses to replace as well.
        Err(Errno::EINVAL) => fs::hard_link(&staged.temporary, &staged.path)
            .and_then(|()| fs::remove_file(&staged.temporary))
            .context(what),
        Err(e) => Err(e).context(what),
    }
}
