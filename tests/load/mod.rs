//! A load that knows what it wrote, and a checker that says whether what a point shows could have
//! been on the disks at one instant.
//!
//! - [`Journal`]: every write, with its place in one order of all issues and acknowledgements;
//! - [`Load`]: lanes (threads) with one write in flight each;
//! - [`Checker`]: compares the disks of a point with the journal, per 512 bytes.
//!
//! The rule (T1): if a write is in a point, every write that was acknowledged before it was issued
//! is in the point too, or was overwritten there. With `T` the latest issue that is visible in the
//! point, that is: for every sector, every write with an acknowledgement before `T` must have been
//! overwritten by what is seen there, or be it. What is seen may have overwritten a write unless it
//! was itself acknowledged before that write was issued.

mod checker;
mod journal;
mod lanes;
mod sector;

pub use checker::Checker;
pub use lanes::Load;
