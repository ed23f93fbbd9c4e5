//! File systems that other hosts write to as well: their writes would not be seen.

use std::path::Path;

use nix::sys::statfs::statfs;

use super::mount::MOUNT_TYPE;
use crate::base::error::Context;
use crate::base::mountinfo::{mount_of, mounts};
use crate::base::shell::shell;
use crate::base::{Error, ErrorKind, Result};

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
fn shared_file_system(directory: &Path) -> Result<Option<String>> {
    let what = || format!("the file system of {} is unknown", directory.display());
    let magic = statfs(directory).context(what)?.filesystem_type().0 as u32;
    if let Some((_, name)) = SHARED_CASES.iter().find(|(m, _)| *m == magic) {
        return Ok(Some((*name).to_owned()));
    }
    if magic != FUSE_MAGIC {
        return Ok(None);
    }
    // FUSE (sshfs, GlusterFS, virtiofs, ...): whatever is not a block device may be shared.
    match mount_of(&mounts()?, directory) {
        Some(m) if m.kind != "fuseblk" && m.kind != MOUNT_TYPE => Ok(Some(m.kind.clone())),
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
            shell(directory)
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_local_directory_is_not_shared() {
        assert_eq!(shared_file_system(Path::new("/proc")).unwrap(), None);
    }
}
