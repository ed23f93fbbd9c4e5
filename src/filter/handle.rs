//! Open files and folders, by the number that the kernel has for them.
//!
//! [`Slab`] leads from a number to its entry without a lock that others share: chunks are made
//! once and never move, each slot has a lock of its own. Only open and release touch the list of
//! free slots.

use std::fs::File;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

use nix::errno::Errno;
use nix::fcntl::OFlag;

use super::lower::Lower;
use super::node::{Node, lock};

const CHUNK: usize = 256;
const CHUNKS: usize = 4096;

type Slot<T> = RwLock<Option<Arc<T>>>;
type Chunk<T> = Box<[Slot<T>]>;

/// Entries by number.
pub(super) struct Slab<T> {
    chunks: Box<[OnceLock<Chunk<T>>]>,
    free: Mutex<Free>,
}

#[derive(Default)]
struct Free {
    numbers: Vec<u64>,
    next: u64,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self { chunks: (0..CHUNKS).map(|_| OnceLock::new()).collect(), free: Mutex::default() }
    }
}

impl<T> Slab<T> {
    fn slot(&self, number: u64) -> Option<&Slot<T>> {
        let number = usize::try_from(number).ok()?;
        self.chunks.get(number / CHUNK)?.get()?.get(number % CHUNK)
    }

    /// The entry with this number.
    pub(super) fn get(&self, number: u64) -> Result<Arc<T>, Errno> {
        let slot = self.slot(number).ok_or(Errno::EBADF)?;
        slot.read().unwrap_or_else(PoisonError::into_inner).clone().ok_or(Errno::EBADF)
    }

    /// Stores an entry. ENFILE: there are a million already.
    pub(super) fn insert(&self, entry: Arc<T>) -> Result<u64, Errno> {
        let number = {
            let mut free = lock(&self.free);
            free.numbers.pop().unwrap_or_else(|| {
                free.next += 1;
                free.next - 1
            })
        };
        let chunk = usize::try_from(number).ok().and_then(|n| self.chunks.get(n / CHUNK));
        let Some(chunk) = chunk else {
            lock(&self.free).numbers.push(number);
            return Err(Errno::ENFILE);
        };
        chunk.get_or_init(|| (0..CHUNK).map(|_| RwLock::new(None)).collect());
        if let Some(slot) = self.slot(number) {
            *slot.write().unwrap_or_else(PoisonError::into_inner) = Some(entry);
        }
        Ok(number)
    }

    /// Takes an entry out.
    pub(super) fn remove(&self, number: u64) -> Result<Arc<T>, Errno> {
        let slot = self.slot(number).ok_or(Errno::EBADF)?;
        let entry = slot.write().unwrap_or_else(PoisonError::into_inner).take();
        let entry = entry.ok_or(Errno::EBADF)?;
        lock(&self.free).numbers.push(number);
        Ok(entry)
    }
}

/// An open file.
pub(super) struct OpenFile {
    /// What is open. Pinned as long as it is.
    pub(super) node: Arc<Node>,
    /// The lower file.
    pub(super) file: File,
    /// It is open with O_DIRECT, here and below.
    pub(super) is_direct: bool,
    /// The same without O_DIRECT, for pages that the kernel writes back from a mapping: the last
    /// one of a file has any length.
    buffered: OnceLock<File>,
}

impl OpenFile {
    pub(super) fn new(node: Arc<Node>, file: File, is_direct: bool, lower: &Lower) -> Result<Self, Errno> {
        node.pin(lower)?;
        Ok(Self { node, file, is_direct, buffered: OnceLock::new() })
    }

    /// The lower file without O_DIRECT.
    pub(super) fn buffered(&self, lower: &Lower) -> Result<&File, Errno> {
        if !self.is_direct {
            return Ok(&self.file);
        }
        if let Some(file) = self.buffered.get() {
            return Ok(file);
        }
        let file = self.node.open(lower, OFlag::O_RDWR)?;
        Ok(self.buffered.get_or_init(|| file))
    }
}

impl Drop for OpenFile {
    fn drop(&mut self) {
        self.node.unpin();
    }
}
