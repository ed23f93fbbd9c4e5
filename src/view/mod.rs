//! Points as files: the read-only view, writable clones, restore.
//!
//! | file | noun |
//! | --- | --- |
//! | [`points`] | the points view: `DIR/NAME/POINT-ID/FILE`, a mount of its own |
//! | [`clone`] | a writable clone of one point: the view plus a sparse overlay per disk |
//! | [`restore`] | sparse copies of the disks of a point |
//!
//! All three read through [`PointReader`](crate::core::ports::points::PointReader), which
//! verifies checksums: damaged bytes are an error here and never content.
//!
//! What if we are killed here? The view holds no state; its dead mount is cleared by the next
//! start. A clone has everything its user synced (see `overlay`). A restore leaves only files
//! whose names begin with `.afterimage-restore-`. What if the disk is full here? Only clones and
//! restores write: a clone answers ENOSPC to the write that does not fit, a restore asks for the
//! room before its first byte. What if the other side is older? An overlay of another version is
//! refused by number.

pub mod clone;
mod clone_fs;
mod mountpoint;
mod overlay;
mod overlay_sync;
#[cfg(test)]
mod overlay_tests;
pub mod points;
mod points_fs;
mod reading;
pub mod restore;
mod restore_backing;
mod restore_copy;
mod tree;

pub use clone::CloneMount;
pub use points::PointsMount;
pub use restore::{Backing, RestorePhase, RestoreProgress, RestoreReport, RestoredFile, restore};
