//! The filter: a faithful FUSE passthrough over a directory of disk images (design, section 3).
//! Every change of a protected disk goes through its tracker first.
//!
//! ```text
//!   kernel -> adapter (fuser) -> ops: names, attr, xattr, dir, data, ranges -> lower directory
//!                                          | change: begin / end
//!                                          v
//!                                   core::ports::tracking (the tracker)
//! ```
//!
//! [`Mount`] is what the host holds; [`Filter`] are the operations behind it, which need no mount.

mod adapter;
mod attr;
mod buffer;
mod change;
mod data;
mod dir;
mod encode;
mod handle;
mod hidden;
mod holders;
mod lower;
pub mod memory;
mod mount;
mod names;
mod node;
mod ops;
mod pool;
mod ranges;
mod shared;
mod succession;
mod sys;
mod xattr;

pub use attr::{SetAttr, SetTime};
pub use dir::DirEntry;
pub use holders::Holder;
pub use lower::LowerFile;
pub use mount::{MOUNT_TYPE, Mount, MountSpec, Prepared, absolute};
pub use ops::{Caller, Filter, OpResult};
pub use xattr::MARK_PREFIX;
