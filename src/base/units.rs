//! Units: the block (4 KiB, what is tracked), the region (4 MiB, what is durably hot) and
//! the chunk (64 MiB, what a block map allocates at once).
//!
//! Offsets and lengths in bytes are plain `u64`; block and region numbers are newtypes, so
//! that a byte offset never passes for a block number.

/// Bytes of one tracking unit.
pub const BLOCK_BYTES: u64 = 4096;
/// Bytes of one hot-region unit.
pub const REGION_BYTES: u64 = 4 << 20;
/// Bytes of disk that one chunk of a block map covers.
pub const CHUNK_BYTES: u64 = 64 << 20;
/// Blocks that one chunk of a block map covers.
pub const CHUNK_BLOCKS: u64 = CHUNK_BYTES / BLOCK_BYTES;

const _: () = assert!(REGION_BYTES.is_multiple_of(BLOCK_BYTES));
const _: () = assert!(CHUNK_BYTES.is_multiple_of(REGION_BYTES));

/// Number of a 4 KiB block of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Block(pub u64);

/// Number of a 4 MiB region of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Region(pub u64);

impl Block {
    /// The block that holds byte `offset`.
    pub const fn at(offset: u64) -> Self {
        Self(offset / BLOCK_BYTES)
    }

    /// Offset in bytes of the first byte of the block.
    pub const fn offset(self) -> u64 {
        self.0 * BLOCK_BYTES
    }

    /// The region that holds the block.
    pub const fn region(self) -> Region {
        Region(self.0 / (REGION_BYTES / BLOCK_BYTES))
    }
}

impl Region {
    /// The region that holds byte `offset`.
    pub const fn at(offset: u64) -> Self {
        Self(offset / REGION_BYTES)
    }

    /// Offset in bytes of the first byte of the region.
    pub const fn offset(self) -> u64 {
        self.0 * REGION_BYTES
    }
}

/// Blocks touched by `length` bytes at `offset`, as a half-open range of block numbers.
/// Empty for a length of 0.
pub const fn blocks_touched(offset: u64, length: u64) -> std::ops::Range<u64> {
    if length == 0 {
        return Block::at(offset).0..Block::at(offset).0;
    }
    Block::at(offset).0..Block::at(offset.saturating_add(length - 1)).0 + 1
}

/// Regions touched by `length` bytes at `offset`, as a half-open range of region numbers.
pub const fn regions_touched(offset: u64, length: u64) -> std::ops::Range<u64> {
    if length == 0 {
        return Region::at(offset).0..Region::at(offset).0;
    }
    Region::at(offset).0..Region::at(offset.saturating_add(length - 1)).0 + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_touch_both_boundary_blocks() {
        assert_eq!(blocks_touched(4095, 2), 0..2);
        assert_eq!(blocks_touched(4096, 4096), 1..2);
        assert_eq!(blocks_touched(5000, 0), 1..1);
        assert_eq!(regions_touched(REGION_BYTES - 1, 2), 0..2);
    }
}
