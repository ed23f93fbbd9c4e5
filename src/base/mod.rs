//! Units, extents, ids, limits, clock, digest, errors: what every layer speaks in.
//!
//! Nothing here knows a disk format, a thread or a socket. [`durable`] holds the few
//! file-system idioms (atomic replace, directory sync) that several edges need; [`mountinfo`],
//! [`unmount`] and [`dead`] what those need who mount; [`shell`] writes paths into hints.

pub mod clock;
pub mod dead;
pub mod digest;
pub mod durable;
pub mod error;
pub mod extent_map;
pub mod extents;
pub mod ids;
pub mod limits;
pub mod mountinfo;
pub mod shell;
pub mod units;
pub mod unmount;

pub use clock::{Clock, SystemClock, Timestamp};
pub use digest::Digest;
pub use error::{Error, ErrorKind, Result};
pub use extent_map::ExtentMap;
pub use extents::{Extent, ExtentSet};
pub use ids::{BootId, DiskId, EpochNumber, FileKey, PointId, VmId, VmName};
pub use units::{BLOCK_BYTES, Block, CHUNK_BLOCKS, CHUNK_BYTES, REGION_BYTES, Region};
