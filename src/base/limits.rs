//! Every limit of the program, with the relations between them. The unit comes last.

use super::units::{BLOCK_BYTES, CHUNK_BYTES};

/// Largest disk that can be protected: 64 TiB.
pub const DISK_BYTES_MAX: u64 = 64 << 40;
/// Target size of a part before compression.
pub const PART_BYTES: u64 = 16 << 20;
/// Largest part that a reader accepts.
pub const PART_BYTES_MAX: u64 = 64 << 20;
/// Longest run of blocks in one frame of a part.
pub const FRAME_BYTES_MAX: u64 = 256 << 10;
/// Largest JSON document (manifest, state) that a reader accepts.
pub const DOCUMENT_BYTES_MAX: u64 = 256 << 20;
/// An operation that would preserve more makes the epoch give up its cut (T5).
pub const PRESERVE_OPERATION_BYTES_MAX: u64 = 16 << 20;
/// Share of the disk that preserved data may take, in percent (T5).
pub const PRESERVED_PERCENT_MAX: u64 = 5;
/// Preserved data in memory, of all disks together, of which one gets at most half; more goes into
/// the HRLs.
pub const PRESERVED_MEMORY_BYTES: u64 = 32 << 20;
/// Most that the configuration can make of it.
pub const PRESERVED_MEMORY_BYTES_MAX: u64 = 1 << 30;
/// Preserved data leaves at least this much of the image file system free (T5).
pub const IMAGE_FREE_BYTES_MIN: u64 = 256 << 20;
/// An activation that takes longer gives the disk the untracked mark (T8).
pub const ACTIVATION_SECONDS_MAX: u64 = 2;
/// A region without writes for so long may cool (T6).
pub const COOL_AFTER_SECONDS: u64 = 60;
/// Regions made hot ahead of growth, at most (T7).
pub const ACTIVATE_AHEAD_REGIONS_MAX: u64 = 16;
/// Disks of one VM.
pub const DISKS_PER_VM_MAX: usize = 256;

const _: () = assert!(PART_BYTES <= PART_BYTES_MAX);
const _: () = assert!(FRAME_BYTES_MAX <= PART_BYTES && FRAME_BYTES_MAX.is_multiple_of(BLOCK_BYTES));
const _: () = assert!(DISK_BYTES_MAX.is_multiple_of(CHUNK_BYTES));
