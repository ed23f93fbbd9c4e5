//! The vault: where epochs go, and where points come from (design, section 6).
//!
//! [`DirectoryVault`] keeps everything in one folder. The way of an epoch through the files here:
//!
//! | step | file | rule |
//! | --- | --- | --- |
//! | parts arrive, the manifest commits them | `inbox` | idempotent; the parent must be the head |
//! | the first one is applied as it arrives | `firstcopy` | A3 |
//! | what it changes is worked out | `plan` | later parts win |
//! | what it replaces is saved, then it is applied | `apply`, `undolog` | A1 |
//! | it is a point: read while newer ones are applied | `reader` | A2 |
//! | points expire | `expire`, `clock`, `core::retention` | A4 |
//! | after a kill or power cut | `opening` | what `state.json` does not name never was |
//! | every byte is verified | `diskfile`, `verify` | 8 bytes of checksum a block |
//!
//! Assumed of the file system (ext4, xfs): what `base::durable` says; `fallocate` makes later writes
//! into the range succeed. Where it cannot, a write that finds no room waits with its undo log
//! published: points stay readable, and the apply is repeated once there is room.

mod apply;
mod clock;
mod directory;
mod diskfile;
mod expire;
mod firstcopy;
mod inbox;
mod layout;
mod opening;
mod plan;
mod reader;
mod steps;
mod store;
mod undolog;
mod verify;

pub use directory::DirectoryVault;
pub use layout::VmFile;
#[doc(hidden)]
pub use steps::Steps;
