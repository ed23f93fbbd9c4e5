//! What is mounted where, as the kernel's table (`/proc/thread-self/mountinfo`) tells.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use super::error::{Context, Result};

/// Of the calling thread, because a thread may have left the mount namespace of its process.
const TABLE: &str = "/proc/thread-self/mountinfo";

/// A line of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// `st_dev` of what is mounted (of its super block).
    pub device: u64,
    /// Where.
    pub point: PathBuf,
    /// Type of file system.
    pub kind: String,
}

/// Everything mounted, in the order of mounting. An error if the table cannot be read.
pub fn mounts() -> Result<Vec<Mount>> {
    let table = std::fs::read(TABLE).context(|| "the list of mounts cannot be read")?;
    Ok(table.split(|b| *b == b'\n').filter_map(parse).collect())
}

/// What is mounted on exactly `point` (absolute, without links), the one on top last. An error
/// if the table cannot be read.
pub fn mounts_on(point: &Path) -> Result<Vec<Mount>> {
    let mut here = mounts()?;
    here.retain(|m| m.point == point);
    Ok(here)
}

/// The mount on top at exactly `point` (absolute, without links). An error if the table cannot
/// be read.
pub fn top_mount(point: &Path) -> Result<Option<Mount>> {
    Ok(mounts_on(point)?.pop())
}

/// The one of `mounts` that shows `path`: the last of those with the longest folder.
pub fn mount_of<'a>(mounts: impl IntoIterator<Item = &'a Mount>, path: &Path) -> Option<&'a Mount> {
    let around = mounts.into_iter().filter(|m| path.starts_with(&m.point));
    around.max_by_key(|m| m.point.as_os_str().len())
}

fn parse(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|b| *b == b' ');
    let (major, minor) = std::str::from_utf8(fields.nth(2)?).ok()?.split_once(':')?;
    let point = unescape(fields.nth(1)?);
    let kind = fields.skip_while(|f| *f != b"-").nth(1)?;
    Some(Mount {
        device: nix::sys::stat::makedev(major.parse().ok()?, minor.parse().ok()?),
        point,
        kind: String::from_utf8_lossy(kind).into_owned(),
    })
}

/// Undoes the octal escapes of the table (`\040` is a space).
fn unescape(text: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, tail)) = rest.split_first() {
        let digits = tail.get(..3).filter(|_| *first == b'\\');
        let byte = digits.and_then(octal);
        out.push(byte.unwrap_or(*first));
        rest = if byte.is_some() { tail.get(3..).unwrap_or_default() } else { tail };
    }
    PathBuf::from(OsString::from_vec(out))
}

/// The byte that octal digits name. Nothing but digits: the numbers of `std` may have a sign.
fn octal(digits: &[u8]) -> Option<u8> {
    let text = std::str::from_utf8(digits).ok().filter(|_| digits.iter().all(u8::is_ascii_digit))?;
    u8::from_str_radix(text, 8).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_with_its_escapes_and_optional_fields() {
        let line =
            br"36 35 98:0 /mnt1 /a\040b\134c rw,noatime shared:1 master:2 - fuse.afterimage /dev/root rw";
        let mount = parse(line).unwrap();
        assert_eq!(mount.device, libc::makedev(98, 0));
        assert_eq!(mount.point, Path::new(r"/a b\c"));
        assert_eq!(mount.kind, "fuse.afterimage");
        for bad in [&b"nonsense"[..], b"", b"garbage", b"1 2 3"] {
            assert_eq!(parse(bad), None);
        }
    }

    #[test]
    fn what_is_no_escape_stays() {
        for text in [r"/a\04", r"/a\+40", r"/a\089", r"/a\777", r"\"] {
            assert_eq!(unescape(text.as_bytes()), Path::new(text));
        }
        // A name need not be UTF-8.
        assert_eq!(unescape(b"/\xff\\012").into_os_string().into_vec(), b"/\xff\n");
    }

    #[test]
    fn the_mount_that_shows_a_path_is_the_deepest_and_the_last() {
        let mount = |device, point: &str| Mount { device, point: point.into(), kind: "ext4".to_owned() };
        let mounts = [mount(1, "/vm a"), mount(2, "/"), mount(3, "/vm a"), mount(4, "/vm a/b")];
        let device = |path: &str| mount_of(&mounts, Path::new(path)).map(|m| m.device);
        assert_eq!(device("/vm a/x"), Some(3));
        assert_eq!(device("/vm"), Some(2));
        assert_eq!(device("vm"), None);
    }

    #[test]
    fn the_table_of_this_thread() {
        assert_eq!(top_mount(Path::new("/proc")).unwrap().unwrap().kind, "proc");
        assert_eq!(top_mount(Path::new("/proc/self")).unwrap(), None);
    }
}
