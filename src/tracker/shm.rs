//! Shared memory (S3): objects in `/dev/shm` that survive the daemon and go with the power.
//!
//! ```text
//! page 0                                   disk objects only:
//!   word 0   magic "AFIMSHM\n"              4096 + (3*c + m) * 4096 : map m of chunk c,
//!   word 1   layout version                                           2 bits a block
//!   word 2   id of the VM or disk, low
//!   word 3   id, high
//!   word 8.. fields of its kind (`VM_*`, `DISK_*`)
//! ```
//!
//! A name holds hashes of the state folder, of the boot and the id, so that daemons with other
//! state folders, and other boots, never share one. An object is made under a temporary name and
//! renamed when its header is whole: killed before, the next start makes it again.
//!
//! The object of a disk spans the largest disk and is sparse; the pages of a chunk are allocated
//! before they are touched, so that a full `/dev/shm` is an error to handle and never SIGBUS.
//! Only aligned 64-bit words are ever stored, each meaningful by itself: every step is safe
//! against SIGKILL between any two stores.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::unistd::{Whence, lseek64};

use crate::base::error::Context;
use crate::base::limits::DISK_BYTES_MAX;
use crate::base::{BootId, CHUNK_BYTES, Digest, Error, ErrorKind, Result};

const MAGIC: u64 = u64::from_le_bytes(*b"AFIMSHM\n");
/// Version of the layout.
pub(crate) const LAYOUT: u64 = 2;
const PAGE: usize = 4096;
const PAGE_WORDS: usize = PAGE / 8;
/// Chunks of the largest disk.
pub(crate) const CHUNKS_MAX: u64 = DISK_BYTES_MAX / CHUNK_BYTES;

/// The epoch word of a VM.
pub(crate) const VM_EPOCH: usize = 8;
/// Milliseconds since 1970 when the tracker last said that it lives.
pub(crate) const VM_HEARTBEAT: usize = 9;
/// The epoch in which a disk came, went or was renamed; 0: none that waits.
pub(crate) const VM_RECORDS: usize = 10;
/// Wall-clock time of the cut, for each of the three epochs in turn.
pub(crate) const VM_CUT_TIME: usize = 11;
/// Not 0: the VM was set up whole; without it nothing in shared memory counts.
pub(crate) const VM_READY: usize = 14;
/// `Source::tracking_id`.
pub(crate) const VM_TRACKING: usize = 15;
/// Size at the cut, for each of the three epochs in turn.
pub(crate) const DISK_CUT_SIZE: usize = 8;
/// Not 0: blocks are known to the process only; after its death the disk ships whole.
pub(crate) const DISK_WHOLE: usize = 11;
/// The epoch in which the disk joined the VM.
pub(crate) const DISK_SINCE: usize = 12;
/// Not 0: a write could not be marked (T8), and which is known to the process only.
pub(crate) const DISK_LOST: usize = 13;
/// Inode of the disk file.
pub(crate) const DISK_INODE: usize = 14;

/// Names the objects of one state folder and boot.
#[derive(Clone, Debug)]
pub(crate) struct ShmNames {
    prefix: String,
    boot: String,
}

impl ShmNames {
    pub(crate) fn new(state_dir: &Path, boot: BootId) -> Self {
        let state = Digest::of(state_dir.as_os_str().as_encoded_bytes()).short();
        let boot = Digest::of(&boot.0.to_le_bytes()).short();
        Self { prefix: format!("afterimage-{state}-"), boot }
    }

    fn path(&self, kind: char, id: u128) -> PathBuf {
        Path::new("/dev/shm").join(format!("{}{}-{kind}{id:032x}", self.prefix, self.boot))
    }

    /// Removes one object.
    pub(crate) fn remove(&self, kind: char, id: u128) {
        let _ = std::fs::remove_file(self.path(kind, id));
    }

    /// Removes what other boots of this state folder left (only a test can have done so).
    pub(crate) fn remove_foreign(&self) {
        let own = format!("{}{}-", self.prefix, self.boot);
        remove_where(|name| name.starts_with(&self.prefix) && !name.starts_with(&own));
    }

    /// Removes everything of this state folder.
    pub(crate) fn remove_all(&self) {
        remove_where(|name| name.starts_with(&self.prefix));
    }
}

fn remove_where(wanted: impl Fn(&str) -> bool) {
    for entry in std::fs::read_dir("/dev/shm").into_iter().flatten().flatten() {
        if entry.file_name().to_str().is_some_and(&wanted) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// One object, mapped.
#[derive(Debug)]
pub(crate) struct Shm {
    path: PathBuf,
    file: File,
    base: NonNull<AtomicU64>,
    bytes: usize,
}

// SAFETY: the mapping is reached only as `&AtomicU64`, it stays until the value is dropped, and
// nothing in it is bound to a thread.
unsafe impl Send for Shm {}
// SAFETY: as above; atomics may be shared.
unsafe impl Sync for Shm {}

impl Shm {
    /// The object of a VM.
    pub(crate) fn vm(names: &ShmNames, id: u128) -> Result<(Self, bool)> {
        Self::open(names.path('v', id), id, PAGE, 0)
    }

    /// The object of a disk, with three maps. A new one says that the disk ships whole, until what
    /// has changed is written down somewhere.
    pub(crate) fn disk(names: &ShmNames, id: u128) -> Result<(Self, bool)> {
        Self::open(names.path('d', id), id, PAGE + CHUNKS_MAX as usize * 3 * PAGE, 1)
    }

    /// Opens what is there (`true`) or makes a new one.
    /// [`ErrorKind::Version`]: it has another layout, and was left alone.
    fn open(path: PathBuf, id: u128, bytes: usize, whole: u64) -> Result<(Self, bool)> {
        let what = || format!("cannot use shared memory {}", path.display());
        match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => {
                let shm = Self::map(path.clone(), file, bytes)?;
                let is_ours = shm.word(0) == MAGIC && shm.id() == id;
                if !is_ours || shm.word(1) != LAYOUT {
                    return Err(Error::new(ErrorKind::Version, what())
                        .why(format!("it has layout {}, this program knows {LAYOUT}", shm.word(1))));
                }
                Ok((shm, true))
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                Ok((Self::create(path, id, bytes, whole)?, false))
            }
            Err(e) => Err(Error::io(what(), e)),
        }
    }

    fn create(path: PathBuf, id: u128, bytes: usize, whole: u64) -> Result<Self> {
        let what = || format!("cannot make shared memory {}", path.display());
        let temporary = path.with_extension("new");
        let _ = std::fs::remove_file(&temporary);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)
            .context(what)?;
        file.set_len(bytes as u64).context(what)?;
        fallocate(&file, FallocateFlags::empty(), 0, PAGE as i64).context(what)?;
        let shm = Self::map(path.clone(), file, bytes)?;
        shm.set(0, MAGIC);
        shm.set(1, LAYOUT);
        shm.set(2, id as u64);
        shm.set(3, (id >> 64) as u64);
        shm.set(DISK_WHOLE, whole);
        std::fs::rename(&temporary, &path).context(what)?;
        Ok(shm)
    }

    fn map(path: PathBuf, file: File, bytes: usize) -> Result<Self> {
        let what = || format!("cannot map shared memory {}", path.display());
        if file.metadata().context(what)?.len() != bytes as u64 {
            return Err(Error::new(ErrorKind::Version, what()).why("it has another size"));
        }
        let length = NonZeroUsize::new(bytes)
            .ok_or_else(|| Error::new(ErrorKind::Internal, "shared memory without a size"))?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice, of a file that has this
        // size and that nobody shrinks; it is unmapped only when the value is dropped.
        let base = unsafe { mmap(None, length, protection, flags, &file, 0) }.context(what)?;
        Ok(Self { path, file, base: base.cast(), bytes })
    }

    fn id(&self) -> u128 {
        u128::from(self.word(2)) | u128::from(self.word(3)) << 64
    }

    fn at(&self, index: usize) -> &AtomicU64 {
        assert!(index < self.bytes / 8, "a word of shared memory lies within it");
        // SAFETY: within the mapping (just asked), aligned (page-aligned base plus whole words),
        // and only ever reached as an atomic.
        unsafe { self.base.add(index).as_ref() }
    }

    /// A word of the header page.
    pub(crate) fn field(&self, index: usize) -> &AtomicU64 {
        assert!(index < PAGE_WORDS, "a field lies in the header page");
        self.at(index)
    }

    fn word(&self, index: usize) -> u64 {
        self.field(index).load(SeqCst)
    }

    fn set(&self, index: usize, value: u64) {
        self.field(index).store(value, SeqCst);
    }

    /// The words of map `map` of a chunk, whose pages must have been allocated.
    #[inline]
    pub(crate) fn chunk(&self, map: usize, chunk: u64) -> &[AtomicU64] {
        assert!(map < 3 && chunk < CHUNKS_MAX, "a chunk lies within the map");
        let first = PAGE_WORDS * (1 + chunk as usize * 3 + map);
        assert!(first + PAGE_WORDS <= self.bytes / 8, "the object has maps");
        // SAFETY: the page lies within the mapping (just asked) and is aligned; it is only ever
        // reached as atomics; the borrow ends before the mapping does.
        unsafe { std::slice::from_raw_parts(self.base.add(first).as_ptr(), PAGE_WORDS) }
    }

    /// Allocates the pages of chunks, all three maps of each.
    pub(crate) fn allocate(&self, chunks: std::ops::Range<u64>) -> std::result::Result<(), Errno> {
        let offset = PAGE as u64 * (1 + chunks.start * 3);
        let length = PAGE as u64 * 3 * chunks.end.saturating_sub(chunks.start);
        fallocate(&self.file, FallocateFlags::empty(), offset as i64, length as i64)
    }

    /// Chunks of which any page was ever stored to. Pages that were allocated and never touched
    /// count as holes here, so the finder allocates the whole chunk again before it looks.
    pub(crate) fn allocated(&self) -> Vec<std::ops::Range<u64>> {
        let page = PAGE as u64;
        let mut found = Vec::new();
        let mut at = page as i64;
        while let Ok(data) = lseek64(&self.file, at, Whence::SeekData) {
            let Ok(hole) = lseek64(&self.file, data, Whence::SeekHole) else { break };
            let first = (data as u64 / page - 1) / 3;
            let end = (hole as u64 / page - 1).div_ceil(3).min(CHUNKS_MAX);
            if first < end {
                found.push(first..end);
            }
            at = hole;
        }
        found
    }

    /// Removes the object's name; the mapping stays until the value is dropped.
    pub(crate) fn unlink(&self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Drop for Shm {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, whole, and no borrow of it outlives the value.
        let _ = unsafe { munmap(self.base.cast(), self.bytes) };
    }
}

/// Atomic words of the process, zero at first. The allocator gets whole pages of zeros from the
/// kernel, so that those never touched cost nothing.
pub(crate) fn zeroed_words(count: usize) -> Box<[AtomicU64]> {
    let words = Box::<[AtomicU64]>::new_zeroed_slice(count);
    // SAFETY: all bits zero is the value 0 of an atomic word.
    unsafe { words.assume_init() }
}

/// T8: the extended attribute on a disk file whose activations are not in the log.
const UNTRACKED: &std::ffi::CStr = c"trusted.afterimage.untracked";

/// Puts the untracked mark on a file; the caller syncs it.
pub(crate) fn set_untracked(file: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open, the name ends with a zero byte, the value has one byte.
    let result = unsafe { libc::fsetxattr(file.as_raw_fd(), UNTRACKED.as_ptr(), c"1".as_ptr().cast(), 1, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Whether a file carries the untracked mark.
pub(crate) fn has_untracked(file: &File) -> bool {
    // SAFETY: the descriptor is open, the name ends with a zero byte; size 0 asks for the length.
    unsafe { libc::fgetxattr(file.as_raw_fd(), UNTRACKED.as_ptr(), std::ptr::null_mut(), 0) >= 0 }
}

/// Takes the untracked mark off a file, if it is there.
pub(crate) fn clear_untracked(file: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open, the name ends with a zero byte.
    let result = unsafe { libc::fremovexattr(file.as_raw_fd(), UNTRACKED.as_ptr()) };
    let error = io::Error::last_os_error();
    let is_absent = matches!(error.raw_os_error(), Some(libc::ENODATA | libc::EOPNOTSUPP));
    if result == 0 || is_absent { Ok(()) } else { Err(error) }
}
