//! Who has files open: below a mount (so that it cannot go), or in its lower directory but not
//! through it (so that its writes are not seen).
//!
//! Asked of `/proc`: descriptors, mappings, working and root directories, and of the loop devices.
//! Attributes come from caches only, so that neither our own mount nor a dead server elsewhere is
//! asked.

use std::collections::HashMap;
use std::ffi::CString;
use std::fmt;
use std::fs::{File, read_dir};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{Mode, SFlag, fstatat};

use super::dir::DirEntry;
use super::lower::{Lower, key_of, kind_of};
use super::sys::{Identity, identify, loop_backing};
use crate::base::FileKey;

/// A process or device that has a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its process; none: it is a loop device.
    pub pid: Option<u32>,
    /// Name of the program or device.
    pub name: String,
    /// What it has: a path as the holder sees it.
    pub what: PathBuf,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pid {
            Some(pid) => write!(f, "{} (process {pid}) has {}", self.name, self.what.display()),
            None => write!(f, "{} is on {}", self.name, self.what.display()),
        }
    }
}

fn identity(path: &Path) -> Option<Identity> {
    let path = CString::new(path.as_os_str().as_encoded_bytes()).ok()?;
    identify(&path).ok()
}

/// Calls `see` for everything that any process but this one holds, with what it is.
fn each_held(mut see: impl FnMut(&Identity, &dyn Fn() -> Holder)) {
    let own = std::process::id();
    let Ok(processes) = read_dir("/proc") else { return };
    for process in processes.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else {
            continue;
        };
        if pid == own {
            continue;
        }
        let root = process.path();
        let mut look = |link: PathBuf| {
            let Some(found) = identity(&link) else { return };
            see(&found, &|| {
                let name = std::fs::read_to_string(root.join("comm")).unwrap_or_default();
                let what = std::fs::read_link(&link).unwrap_or_default();
                Holder { pid: Some(pid), name: name.trim_end().to_owned(), what }
            });
        };
        for single in ["cwd", "root", "exe"] {
            look(root.join(single));
        }
        // Processes end while we look; what cannot be read holds nothing any more.
        for folder in ["fd", "map_files"] {
            for entry in read_dir(root.join(folder)).into_iter().flatten().flatten() {
                look(entry.path());
            }
        }
    }
}

/// Processes that hold anything of the file system with this `st_dev`; each once.
pub(super) fn holders_of_device(device: u64) -> Vec<Holder> {
    let mut found: Vec<Holder> = Vec::new();
    each_held(|identity, holder| {
        if identity.device == device {
            let holder = holder();
            if !found.iter().any(|h| h.pid == holder.pid) {
                found.push(holder);
            }
        }
    });
    found
}

/// Who holds regular files with one of these keys, which are those of lower files: files of the
/// mount have another device.
pub(super) fn holders_of_files(is_wanted: impl Fn(FileKey) -> bool) -> Vec<(FileKey, Holder)> {
    let mut found: Vec<(FileKey, Holder)> = Vec::new();
    each_held(|identity, holder| {
        let key = FileKey { device: identity.device, inode: identity.inode };
        if identity.mode & libc::S_IFMT == libc::S_IFREG && is_wanted(key) {
            let holder = holder();
            if !found.iter().any(|(k, h)| *k == key && h.pid == holder.pid) {
                found.push((key, holder));
            }
        }
    });
    for (key, holder) in loop_devices() {
        if is_wanted(key) {
            found.push((key, holder));
        }
    }
    found
}

fn loop_devices() -> Vec<(FileKey, Holder)> {
    let mut found = Vec::new();
    for block in read_dir("/sys/block").into_iter().flatten().flatten() {
        let file = block.path().join("loop/backing_file");
        let Ok(backing) = std::fs::read_to_string(file) else { continue };
        let device = Path::new("/dev").join(block.file_name());
        let Ok((device_number, inode)) =
            File::open(&device).map_err(drop).and_then(|d| loop_backing(d).map_err(drop))
        else {
            continue;
        };
        let name = device.display().to_string();
        let holder = Holder { pid: None, name, what: PathBuf::from(backing.trim_end()) };
        found.push((FileKey { device: device_number, inode }, holder));
    }
    found
}

/// Every regular file below the lower root, with its path relative to it.
pub(super) fn files_below(lower: &Lower) -> HashMap<FileKey, PathBuf> {
    let mut found = HashMap::new();
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mut folders = vec![PathBuf::new()];
    while let Some(path) = folders.pop() {
        let at = if path.as_os_str().is_empty() { Path::new(".") } else { path.as_path() };
        let Ok(folder) = openat(lower.root(), at, flags, Mode::empty()) else { continue };
        for entry in DirEntry::all(&File::from(folder)).unwrap_or_default() {
            if entry.name == "." || entry.name == ".." {
                continue;
            }
            let child = path.join(&entry.name);
            let Ok(stat) = fstatat(lower.root().as_fd(), &child, AtFlags::AT_SYMLINK_NOFOLLOW) else {
                continue;
            };
            match kind_of(&stat) {
                SFlag::S_IFDIR => folders.push(child),
                SFlag::S_IFREG => drop(found.insert(key_of(&stat), child)),
                _ => (),
            }
        }
    }
    found
}
