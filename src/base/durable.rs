//! File-system idioms that make a change durable: whole or not at all.
//!
//! Assumed of the file system below (ext4, xfs): `rename` is atomic, `fsync` of a file makes its
//! data and size durable, `fsync` of a directory makes the names in it durable.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::error::{Context, Error, ErrorKind, Result};

/// Replaces the file at `path` by `bytes`: killed or out of power at any step, a reader finds the
/// old content or the new one. The temporary file `.NAME.new` may be left behind by a kill; the
/// next call overwrites it.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let what = || format!("cannot write {}", path.display());
    let temporary = temporary_for(path)?;
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)
        .context(what)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).context(what)?;
    drop(file);
    fs::rename(&temporary, path).context(what)?;
    sync_parent(path)
}

fn temporary_for(path: &Path) -> Result<PathBuf> {
    let name = path
        .file_name()
        .ok_or_else(|| Error::new(ErrorKind::Internal, format!("{} has no file name", path.display())))?;
    let mut temporary = std::ffi::OsString::from(".");
    temporary.push(name);
    temporary.push(".new");
    Ok(path.with_file_name(temporary))
}

/// Makes the names in a directory durable.
pub fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|d| d.sync_all()).context(|| format!("cannot sync directory {}", dir.display()))
}

/// Makes the name of a file durable.
pub fn sync_parent(path: &Path) -> Result<()> {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => sync_dir(dir),
        _ => sync_dir(Path::new(".")),
    }
}

/// Reads a whole file of at most `bytes_max` bytes; `None` if there is none.
pub fn read_limited(path: &Path, bytes_max: u64) -> Result<Option<Vec<u8>>> {
    let what = || format!("cannot read {}", path.display());
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io(what(), e)),
    };
    let length = file.metadata().context(what)?.len();
    if length > bytes_max {
        return Err(Error::new(ErrorKind::Damaged, what())
            .why(format!("it has {length} bytes, more than the {bytes_max} that it can have")));
    }
    let mut bytes = Vec::with_capacity(usize::try_from(length).unwrap_or(0));
    std::io::Read::read_to_end(&mut std::io::Read::take(file, bytes_max), &mut bytes).context(what)?;
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaces_whole_and_reads_within_the_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        assert_eq!(read_limited(&path, 10).unwrap(), None);
        write_atomic(&path, b"one").unwrap();
        write_atomic(&path, b"two").unwrap();
        assert_eq!(read_limited(&path, 10).unwrap().unwrap(), b"two");
        assert_eq!(read_limited(&path, 2).unwrap_err().kind(), ErrorKind::Damaged);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
