//! System calls that neither `std` nor `nix` offers safely: file handles, a private clone of a
//! mount, directory reading by offset, extended attributes by descriptor, locked memory, a few
//! ioctls.
//!
//! The only unsafe code of the filter. Every function takes and returns safe types, and its error
//! is the kernel's errno.

#![allow(unsafe_code)]

use std::ffi::{CStr, CString, OsStr};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use nix::errno::Errno;

type Result<T> = std::result::Result<T, Errno>;

/// Longest file handle that the kernel makes (MAX_HANDLE_SZ).
const HANDLE_BYTES_MAX: usize = 128;

/// A file handle as the kernel made it: it names an inode together with its generation, so that
/// a reused inode number is ESTALE and never another file.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct RawHandle {
    kind: i32,
    bytes: Box<[u8]>,
}

#[repr(C)]
struct HandleBuffer {
    header: libc::file_handle,
    bytes: [u8; HANDLE_BYTES_MAX],
}

const _: () = assert!(std::mem::offset_of!(HandleBuffer, bytes) == std::mem::size_of::<libc::file_handle>());

impl HandleBuffer {
    fn new(length: u32, kind: i32) -> Self {
        let header = libc::file_handle { handle_bytes: length, handle_type: kind, f_handle: [] };
        Self { header, bytes: [0; HANDLE_BYTES_MAX] }
    }
}

impl RawHandle {
    /// The handle of the file behind a descriptor (O_PATH will do).
    /// EOPNOTSUPP where the file system has none.
    pub(super) fn of(file: impl AsFd) -> Result<Self> {
        let mut buffer = HandleBuffer::new(HANDLE_BYTES_MAX as u32, 0);
        let mut mount_id = 0;
        // SAFETY: the buffer has the announced room behind its header (asserted above), and all
        // pointers live through the call.
        let rc = unsafe {
            libc::name_to_handle_at(
                file.as_fd().as_raw_fd(),
                c"".as_ptr(),
                (&raw mut buffer).cast(),
                &raw mut mount_id,
                libc::AT_EMPTY_PATH,
            )
        };
        Errno::result(rc)?;
        let length = (buffer.header.handle_bytes as usize).min(HANDLE_BYTES_MAX);
        Ok(Self { kind: buffer.header.handle_type, bytes: buffer.bytes[..length].into() })
    }

    /// Opens the file. ESTALE: it is gone, whoever has its inode number now.
    pub(super) fn open(&self, mount: impl AsFd, flags: i32) -> Result<OwnedFd> {
        let mut buffer = HandleBuffer::new(self.bytes.len() as u32, self.kind);
        buffer.bytes[..self.bytes.len()].copy_from_slice(&self.bytes);
        // SAFETY: as above; the kernel reads `handle_bytes` bytes behind the header.
        let fd = unsafe {
            libc::open_by_handle_at(
                mount.as_fd().as_raw_fd(),
                (&raw mut buffer).cast(),
                flags | libc::O_CLOEXEC,
            )
        };
        // SAFETY: a descriptor that the kernel just made and nobody else knows.
        Errno::result(fd).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

/// Puts a detached mount beneath the mount on top at `path` (Linux 6.5; before: EINVAL).
pub(super) fn move_beneath(tree: impl AsFd, path: &CStr) -> Result<()> {
    // From `linux/mount.h`: MOVE_MOUNT_F_EMPTY_PATH and MOVE_MOUNT_BENEATH.
    const FLAGS: libc::c_uint = 0x4 | 0x200;
    // SAFETY: a plain system call with valid C strings.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            path.as_ptr(),
            FLAGS,
        )
    };
    Errno::result(rc).map(drop)
}

/// A detached, private clone of the mount at `path` with `path` as its root: what is mounted below
/// `path`, now or later, is not in it.
pub(super) fn clone_mount(path: &CStr) -> Result<OwnedFd> {
    // SAFETY: a plain system call with a valid C string.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_open_tree,
            libc::AT_FDCWD,
            path.as_ptr(),
            libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC,
        )
    };
    // SAFETY: a descriptor that the kernel just made and nobody else knows.
    let fd = Errno::result(fd).map(|fd| unsafe { OwnedFd::from_raw_fd(fd as i32) })?;
    let attributes =
        libc::mount_attr { attr_set: 0, attr_clr: 0, propagation: libc::MS_PRIVATE, userns_fd: 0 };
    // SAFETY: the structure lives through the call and its size is given.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            fd.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            std::mem::size_of::<libc::mount_attr>(),
        )
    };
    Errno::result(rc)?;
    Ok(fd)
}

/// Fills `buffer` with `linux_dirent64` records from the position of `folder`; 0 at the end.
pub(super) fn read_directory(folder: impl AsFd, buffer: &mut [u8]) -> Result<usize> {
    // SAFETY: the kernel writes at most `len` bytes into the buffer.
    let rc = unsafe {
        libc::syscall(libc::SYS_getdents64, folder.as_fd().as_raw_fd(), buffer.as_mut_ptr(), buffer.len())
    };
    Errno::result(rc).map(|n| n as usize)
}

/// copy_file_range; the number of bytes copied.
pub(super) fn copy_range(
    (from, mut from_offset): (impl AsFd, i64),
    (to, mut to_offset): (impl AsFd, i64),
    length: usize,
) -> Result<u64> {
    // SAFETY: two descriptors and two offsets that live through the call.
    let rc = unsafe {
        libc::copy_file_range(
            from.as_fd().as_raw_fd(),
            &raw mut from_offset,
            to.as_fd().as_raw_fd(),
            &raw mut to_offset,
            length,
            0,
        )
    };
    Errno::result(rc).map(|n| n as u64)
}

/// The path under which `/proc` shows a descriptor. Calls on it reach the very file behind an
/// O_PATH descriptor, a symbolic link too: a jump into `/proc` is followed once and no further.
pub(super) fn proc_path(file: &impl AsFd) -> CString {
    CString::new(format!("/proc/self/fd/{}", file.as_fd().as_raw_fd())).unwrap_or_default()
}

fn c_name(name: &OsStr) -> Result<CString> {
    CString::new(name.as_bytes()).map_err(|_| Errno::EINVAL)
}

/// getxattr: the number of bytes of the value; with an empty buffer only asks for it.
pub(super) fn get_xattr(file: impl AsFd, name: &OsStr, buffer: &mut [u8]) -> Result<usize> {
    let (path, name) = (proc_path(&file), c_name(name)?);
    // SAFETY: valid C strings; the kernel writes at most `len` bytes.
    let rc =
        unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len()) };
    Errno::result(rc).map(|n| n as usize)
}

/// setxattr with XATTR_CREATE or XATTR_REPLACE in `flags`.
pub(super) fn set_xattr(file: impl AsFd, name: &OsStr, value: &[u8], flags: i32) -> Result<()> {
    let (path, name) = (proc_path(&file), c_name(name)?);
    // SAFETY: valid C strings; the kernel reads `len` bytes.
    let rc =
        unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), flags) };
    Errno::result(rc).map(drop)
}

/// listxattr: the number of bytes of the list; with an empty buffer only asks for it.
pub(super) fn list_xattr(file: impl AsFd, buffer: &mut [u8]) -> Result<usize> {
    let path = proc_path(&file);
    // SAFETY: a valid C string; the kernel writes at most `len` bytes.
    let rc = unsafe { libc::listxattr(path.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len()) };
    Errno::result(rc).map(|n| n as usize)
}

/// removexattr.
pub(super) fn remove_xattr(file: impl AsFd, name: &OsStr) -> Result<()> {
    let (path, name) = (proc_path(&file), c_name(name)?);
    // SAFETY: valid C strings.
    Errno::result(unsafe { libc::removexattr(path.as_ptr(), name.as_ptr()) }).map(drop)
}

/// Sets access and modification time (UTIME_NOW and UTIME_OMIT in `tv_nsec`), of symbolic links too.
pub(super) fn set_times(file: impl AsFd, times: [libc::timespec; 2]) -> Result<()> {
    // SAFETY: two timespecs and a valid C string.
    let rc = unsafe {
        libc::utimensat(file.as_fd().as_raw_fd(), c"".as_ptr(), times.as_ptr(), libc::AT_EMPTY_PATH)
    };
    Errno::result(rc).map(drop)
}

/// An ioctl whose argument is a structure of at most `data.len()` bytes, read and written.
/// Only for commands that are known to touch no more (see `ranges::IOCTL_CASES`).
pub(super) fn ioctl(file: impl AsFd, command: u32, data: &mut [u8; 256]) -> Result<i32> {
    // SAFETY: the allowed commands carry their size (at most 255 bytes here) in the number, and
    // their argument is that many bytes, which the buffer has.
    let rc = unsafe { libc::ioctl(file.as_fd().as_raw_fd(), command as _, data.as_mut_ptr()) };
    Errno::result(rc)
}

/// What is behind a path, by cached attributes only, so that a file system that does not answer
/// (an unreachable server, a FUSE daemon that died) cannot hold up the caller for long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    /// As in `st_dev`.
    pub(super) device: u64,
    /// Inode number.
    pub(super) inode: u64,
    /// As in `st_mode`.
    pub(super) mode: u32,
}

/// Identity of what `path` leads to.
pub(super) fn identify(path: &CStr) -> Result<Identity> {
    let mut out = std::mem::MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: a valid C string and room for one statx.
    let rc = unsafe {
        libc::statx(
            libc::AT_FDCWD,
            path.as_ptr(),
            libc::AT_STATX_DONT_SYNC,
            libc::STATX_INO | libc::STATX_TYPE,
            out.as_mut_ptr(),
        )
    };
    Errno::result(rc)?;
    // SAFETY: zeroed, and filled by the kernel; every bit pattern is valid.
    let out = unsafe { out.assume_init() };
    Ok(Identity {
        device: libc::makedev(out.stx_dev_major, out.stx_dev_minor),
        inode: out.stx_ino,
        mode: u32::from(out.stx_mode),
    })
}

/// Device and inode of the file behind a loop device. ENXIO: it has none.
pub(super) fn loop_backing(device: impl AsFd) -> Result<(u64, u64)> {
    // Layout of struct loop_info64: lo_device and lo_inode are its first two 64-bit words.
    const LOOP_GET_STATUS64: u32 = 0x4C05;
    let mut data = [0u8; 256];
    // SAFETY: struct loop_info64 has 232 bytes, fewer than the buffer.
    let rc = unsafe { libc::ioctl(device.as_fd().as_raw_fd(), LOOP_GET_STATUS64 as _, data.as_mut_ptr()) };
    Errno::result(rc)?;
    let word = |at: usize| {
        u64::from_ne_bytes(std::array::from_fn(|i| data.get(at + i).copied().unwrap_or_default()))
    };
    // The kernel encodes the device as new_encode_dev does.
    let device = word(0);
    let major = (device >> 8) & 0xfff;
    let minor = (device & 0xff) | ((device >> 12) & 0xfff00);
    Ok((libc::makedev(major as u32, minor as u32), word(8)))
}

/// PR_SET_IO_FLUSHER (Linux 5.6): this process never waits for writeback to get memory.
pub(super) fn set_io_flusher() -> Result<()> {
    // From `linux/prctl.h`.
    const PR_SET_IO_FLUSHER: i32 = 57;
    // SAFETY: prctl with plain integers.
    Errno::result(unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) }).map(drop)
}

/// Locks all memory as it is first touched.
pub(super) fn lock_memory() -> Result<()> {
    let unlimited = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: a valid structure; a refusal shows in mlockall below.
    let _ = unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const unlimited) };
    // ONFAULT: event loops have buffers of 16 MiB of which they touch one.
    let flags = libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT;
    // SAFETY: plain flags.
    Errno::result(unsafe { libc::mlockall(flags) }).map(drop)
}

/// Large buffers go back to the kernel when they are freed. glibc would raise both limits by
/// itself with each one that is freed, in every arena, up to 64 MiB apiece.
#[cfg(target_env = "gnu")]
pub(super) fn return_large_buffers() -> Result<()> {
    const MMAP_FROM_BYTES: libc::c_int = 256 << 10;
    const KEEP_BYTES: libc::c_int = 1 << 20;
    for (limit, bytes) in [(libc::M_MMAP_THRESHOLD, MMAP_FROM_BYTES), (libc::M_TRIM_THRESHOLD, KEEP_BYTES)] {
        // SAFETY: sets a number of the allocator; called before the first thread.
        if unsafe { libc::mallopt(limit, bytes) } == 0 {
            return Err(Errno::EINVAL);
        }
    }
    Ok(())
}

/// Other allocators have no such limits.
#[cfg(not(target_env = "gnu"))]
pub(super) fn return_large_buffers() -> Result<()> {
    Ok(())
}
