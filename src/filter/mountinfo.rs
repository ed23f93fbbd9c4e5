//! What is mounted where, as `/proc/self/mountinfo` tells: our own mounts (type
//! `fuse.afterimage`), those of ours whose daemon is dead, and file systems that other hosts
//! write to as well.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::sys::statfs::statfs;

use crate::base::error::Context;
use crate::base::{Error, ErrorKind, Result};

/// The type that our mounts have.
pub const MOUNT_TYPE: &str = "fuse.afterimage";

/// A line of mountinfo.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MountLine {
    /// `st_dev` of what is mounted (of its super block).
    pub(super) device: u64,
    /// Where.
    pub(super) point: PathBuf,
    /// Type of file system.
    pub(super) kind: String,
}

/// Undoes the octal escapes of mountinfo (`\040` is a space).
fn unescape(text: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|d| *first == b'\\' && d.iter().all(|b| (b'0'..b'8').contains(b)));
        if let Some(digits) = octal {
            out.push(digits.iter().fold(0u8, |n, d| n.wrapping_mul(8).wrapping_add(d - b'0')));
            rest = tail.get(3..).unwrap_or_default();
        } else {
            out.push(*first);
            rest = tail;
        }
    }
    PathBuf::from(OsString::from_vec(out))
}

fn parse(line: &[u8]) -> Option<MountLine> {
    let mut fields = line.split(|b| *b == b' ');
    let device = std::str::from_utf8(fields.nth(2)?).ok()?;
    let (major, minor) = device.split_once(':')?;
    let point = unescape(fields.nth(1)?);
    let kind = fields.skip_while(|f| *f != b"-").nth(1)?;
    Some(MountLine {
        device: libc::makedev(major.parse().ok()?, minor.parse().ok()?),
        point,
        kind: String::from_utf8_lossy(kind).into_owned(),
    })
}

/// Everything mounted, in the order of mounting.
pub(super) fn mounts() -> Result<Vec<MountLine>> {
    let text = std::fs::read("/proc/self/mountinfo").context(|| "the list of mounts cannot be read")?;
    Ok(text.split(|b| *b == b'\n').filter_map(parse).collect())
}

/// The mount on top at exactly `point`.
pub(super) fn top_mount(point: &Path) -> Result<Option<MountLine>> {
    Ok(mounts()?.into_iter().rev().find(|m| m.point == point))
}

/// Folders where a filter is mounted, by whomever; the daemon may be dead.
pub fn filter_mounts() -> Result<Vec<PathBuf>> {
    Ok(mounts()?.into_iter().filter(|m| m.kind == MOUNT_TYPE).map(|m| m.point).collect())
}

/// Removes mounts of ours over `directory` (absolute, without links) whose daemon is dead. How
/// many there were; a mount that is alive stays.
pub fn clear_dead_mount(directory: &Path) -> Result<usize> {
    let mut cleared = 0;
    while let Some(top) = top_mount(directory)?
        && top.kind == MOUNT_TYPE
        // Not stat: the kernel may still answer that from its cache.
        && statfs(directory).err() == Some(Errno::ENOTCONN)
    {
        umount2(directory, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
            .context(|| format!("the dead mount over {} cannot be removed", directory.display()))?;
        cleared += 1;
    }
    Ok(cleared)
}

/// File systems that more than one host may write to, by their magic number in `statfs`.
const SHARED_CASES: &[(u32, &str)] = &[
    (0x6969, "NFS"),
    (0xff53_4d42, "CIFS"),
    (0xfe53_4d42, "SMB"),
    (0x517b, "SMB"),
    (0x0116_1970, "GFS2"),
    (0x7461_636f, "OCFS2"),
    (0x00c3_6400, "CephFS"),
    (0x0102_1997, "9p"),
    (0x0bd0_0bd0, "Lustre"),
    (0x5346_414f, "AFS"),
    (0x6b41_4653, "AFS"),
    (0x1983_0326, "BeeGFS"),
    (0x4750_4653, "GPFS"),
    (0x7375_7245, "Coda"),
    (0x786f_4256, "vboxsf"),
    (0xbacb_acbc, "vmhgfs"),
    (0xaad7_aaea, "PanFS"),
];
const FUSE_MAGIC: u32 = 0x6573_5546;

/// The name of the shared file system that `directory` is on; none: it is a local one.
pub fn shared_file_system(directory: &Path) -> Result<Option<String>> {
    let what = || format!("the file system of {} is unknown", directory.display());
    let magic = statfs(directory).context(what)?.filesystem_type().0 as u32;
    if let Some((_, name)) = SHARED_CASES.iter().find(|(m, _)| *m == magic) {
        return Ok(Some((*name).to_owned()));
    }
    if magic != FUSE_MAGIC {
        return Ok(None);
    }
    // FUSE (sshfs, GlusterFS, virtiofs, ...): whatever is not a block device may be shared.
    let mut around = mounts()?;
    around.retain(|m| directory.starts_with(&m.point));
    let deepest = around.into_iter().enumerate().max_by_key(|(i, m)| (m.point.as_os_str().len(), *i));
    match deepest {
        Some((_, m)) if m.kind != "fuseblk" && m.kind != MOUNT_TYPE => Ok(Some(m.kind)),
        _ => Ok(None),
    }
}

/// Refuses a directory on a shared file system.
pub(super) fn refuse_shared(directory: &Path) -> Result<()> {
    match shared_file_system(directory)? {
        None => Ok(()),
        Some(name) => Err(Error::new(
            ErrorKind::Refused,
            format!("the filter cannot be mounted over {}", directory.display()),
        )
        .why(format!("it is on a shared file system ({name}): writes of other hosts would not be seen"))
        .hint(format!(
            "if no other host ever writes there: afterimage mount --single-host {}",
            directory.display()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_is_read_with_its_escapes_and_optional_fields() {
        let line =
            br"36 35 98:0 /mnt1 /a\040b\134c rw,noatime shared:1 master:2 - fuse.afterimage /dev/root rw";
        let mount = parse(line).unwrap();
        assert_eq!(mount.device, libc::makedev(98, 0));
        assert_eq!(mount.point, Path::new(r"/a b\c"));
        assert_eq!(mount.kind, MOUNT_TYPE);
        assert_eq!(parse(b"nonsense"), None);
        assert_eq!(parse(b""), None);
    }

    #[test]
    fn a_local_directory_is_not_shared() {
        assert_eq!(shared_file_system(Path::new("/proc")).unwrap(), None);
    }
}
