//! How attributes, times and device numbers look in FUSE messages.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{FileAttr, FileType, INodeNo};
use nix::sys::stat::{FileStat, SFlag};

use super::attr::SetTime;

pub(super) fn file_type(kind: SFlag) -> FileType {
    match kind {
        SFlag::S_IFDIR => FileType::Directory,
        SFlag::S_IFLNK => FileType::Symlink,
        SFlag::S_IFCHR => FileType::CharDevice,
        SFlag::S_IFBLK => FileType::BlockDevice,
        SFlag::S_IFIFO => FileType::NamedPipe,
        SFlag::S_IFSOCK => FileType::Socket,
        _ => FileType::RegularFile,
    }
}

pub(super) fn time(seconds: i64, nanoseconds: i64) -> SystemTime {
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let part = Duration::from_nanos(nanoseconds.unsigned_abs());
    let base = if seconds < 0 { UNIX_EPOCH.checked_sub(whole) } else { UNIX_EPOCH.checked_add(whole) };
    base.and_then(|base| base.checked_add(part)).unwrap_or(UNIX_EPOCH)
}

/// A time as seconds and nanoseconds, the latter never negative.
pub(super) fn split(time: SystemTime) -> SetTime {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => SetTime::At(after.as_secs().cast_signed(), i64::from(after.subsec_nanos())),
        Err(before) => {
            let before = before.duration();
            let (seconds, part) = (before.as_secs().cast_signed(), i64::from(before.subsec_nanos()));
            if part == 0 { SetTime::At(-seconds, 0) } else { SetTime::At(-seconds - 1, 1_000_000_000 - part) }
        }
    }
}

/// The kernel's encoding of a device number in FUSE messages.
pub(super) fn encode_device(device: u64) -> u32 {
    let (major, minor) = (libc::major(device), libc::minor(device));
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

pub(super) fn decode_device(device: u32) -> u64 {
    let minor = (device & 0xff) | ((device >> 12) & 0xfff00);
    libc::makedev((device & 0xfff00) >> 8, minor)
}

pub(super) fn attributes(id: u64, stat: &FileStat) -> FileAttr {
    FileAttr {
        ino: INodeNo(id),
        size: u64::try_from(stat.st_size).unwrap_or(0),
        blocks: u64::try_from(stat.st_blocks).unwrap_or(0),
        atime: time(stat.st_atime, stat.st_atime_nsec),
        mtime: time(stat.st_mtime, stat.st_mtime_nsec),
        ctime: time(stat.st_ctime, stat.st_ctime_nsec),
        crtime: UNIX_EPOCH,
        kind: file_type(super::lower::kind_of(stat)),
        perm: (stat.st_mode & 0o7777) as u16,
        nlink: u32::try_from(stat.st_nlink).unwrap_or(u32::MAX),
        uid: stat.st_uid,
        gid: stat.st_gid,
        rdev: encode_device(stat.st_rdev),
        blksize: u32::try_from(stat.st_blksize).unwrap_or(4096),
        flags: 0,
    }
}

/// Attributes of an entry about which nothing but its kind is known.
pub(super) fn unknown(ino: INodeNo, kind: FileType) -> FileAttr {
    FileAttr {
        ino,
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind,
        perm: 0,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_and_times_survive_their_encodings() {
        for (major, minor) in [(8, 1), (259, 300), (1, 0xfffff)] {
            let device = libc::makedev(major, minor);
            assert_eq!(decode_device(encode_device(device)), device);
        }
        for (seconds, part) in [(0, 0), (5, 7), (-1, 999_999_999), (-3, 0)] {
            assert_eq!(split(time(seconds, part)), SetTime::At(seconds, part));
        }
    }
}
