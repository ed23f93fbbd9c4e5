//! What a file system lives on: so that state and vault are not on a disk of the mount, where
//! the daemon would wait for itself.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::base::error::Context;
use crate::base::{Error, ErrorKind, Result};

/// `major:minor` of a device number.
fn device_name(device: u64) -> String {
    format!("{}:{}", nix::sys::stat::major(device), nix::sys::stat::minor(device))
}

/// Device of the file system that holds `path`, or of its nearest folder that exists.
pub fn device_of_path(path: &Path) -> Result<u64> {
    let mut at = path;
    loop {
        match fs::metadata(at) {
            Ok(meta) => return Ok(meta.dev()),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => match at.parent() {
                Some(parent) => at = parent,
                None => return Err(Error::io(format!("cannot use {}", path.display()), e)),
            },
            Err(e) => return Err(Error::io(format!("cannot use {}", path.display()), e)),
        }
    }
}

/// Files that the block device lies on, through loop devices, partitions and device mapper.
pub fn files_below(device: u64) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut seen = BTreeSet::new();
    let mut folders = vec![PathBuf::from(format!("/sys/dev/block/{}", device_name(device)))];
    while let Some(folder) = folders.pop() {
        let Ok(folder) = fs::canonicalize(&folder) else { continue };
        if !seen.insert(folder.clone()) || seen.len() > 64 {
            continue;
        }
        if let Ok(text) = fs::read_to_string(folder.join("loop/backing_file")) {
            files.push(PathBuf::from(text.trim_end_matches('\n')));
        }
        if folder.join("partition").exists()
            && let Some(parent) = folder.parent()
        {
            folders.push(parent.to_owned());
        }
        if let Ok(slaves) = fs::read_dir(folder.join("slaves")) {
            folders.extend(slaves.flatten().map(|s| s.path()));
        }
    }
    files
}

/// Refuses if `path` (called `what`) is inside the folder `dir` or on a disk image in it.
pub fn verify_apart(what: &str, path: &Path, dir: &Path) -> Result<()> {
    let refused = |why: String| {
        Err(Error::new(ErrorKind::Refused, format!("{what} cannot be in {}", path.display()))
            .why(why)
            .hint("put it elsewhere: afterimage --state DIR, or protect NAME --to DIR"))
    };
    let real = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    if real.starts_with(dir) || path.starts_with(dir) {
        return refused(format!("it is below the mount {}: the daemon would wait for itself", dir.display()));
    }
    let below = files_below(device_of_path(path)?);
    match below.into_iter().find(|f| f.starts_with(dir)) {
        Some(file) => refused(format!(
            "its file system lives on {}, a disk of the mount: the daemon would wait for itself",
            file.display()
        )),
        None => Ok(()),
    }
}

/// Free and total bytes of the file system of an open file.
pub fn space(file: &impl std::os::fd::AsFd) -> Result<(u64, u64)> {
    let stat = nix::sys::statvfs::fstatvfs(file)
        .map_err(std::io::Error::from)
        .context(|| "the file system does not tell its free space")?;
    let unit = stat.fragment_size();
    Ok((stat.blocks_available().saturating_mul(unit), stat.blocks().saturating_mul(unit)))
}

/// Type of the file system of an open file, as far as it is known by name.
pub fn type_of(file: &impl std::os::fd::AsFd) -> String {
    use nix::sys::statfs;
    let Ok(stat) = statfs::fstatfs(file) else { return String::new() };
    let name = match stat.filesystem_type() {
        statfs::EXT4_SUPER_MAGIC => "ext4",
        statfs::XFS_SUPER_MAGIC => "xfs",
        statfs::BTRFS_SUPER_MAGIC => "btrfs",
        statfs::TMPFS_MAGIC => "tmpfs",
        statfs::OVERLAYFS_SUPER_MAGIC => "overlay",
        statfs::NFS_SUPER_MAGIC => "nfs",
        other => return format!("{:#x}", other.0),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_inside_is_refused_and_one_beside_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let mount = dir.path().join("m");
        fs::create_dir(&mount).unwrap();
        let e = verify_apart("the vault", &mount.join("v/w"), &mount).unwrap_err();
        assert_eq!(e.kind().exit_code(), 4);
        verify_apart("the vault", &dir.path().join("v"), &mount).unwrap();
        assert!(space(&fs::File::open(dir.path()).unwrap()).unwrap().1 > 0);
    }
}
