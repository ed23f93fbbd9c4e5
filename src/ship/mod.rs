//! The shipper: delivers what changed on a VM's disks to its vault, cut by cut.
//!
//! | file | what it is |
//! | --- | --- |
//! | `shipper.rs` | the thread `shipper:VM` and its handle |
//! | `driver.rs` | the body of the thread: commands, actions, status |
//! | `recover.rs` | every way back into the work: the head first |
//! | `engine.rs` | carries out the actions of the state machine `core::epoch` |
//! | `transfer.rs` | a transfer: read, pack, put |
//! | `read.rs` | from sets of blocks to parts in memory |
//! | `build.rs` | the epoch being built: its parts, and which blocks have one |
//! | `commit.rs` | its manifest |
//! | `record.rs` | what is remembered over a restart, and what the vault's head means |
//! | `status.rs` | what it tells: status, events, hooks |
//! | `priority.rs` | guests first |
//!
//! Killed at any step: the next shipper asks the vault for its head first and finds out whether a
//! commit arrived (`record.rs`), the vault lists the durable parts, and the tracker knows which
//! blocks of the frozen epoch were read (T4). Vault full or gone: the epoch stays frozen, guests
//! write on (T5), and delivery is tried again. An older vault: it says so by
//! [`crate::base::ErrorKind::Version`], and the operator is told.

mod build;
mod commit;
mod driver;
mod engine;
mod priority;
mod read;
mod record;
mod recover;
mod shipper;
mod status;
mod transfer;

pub use shipper::{Shipper, ShipperConfig, ShipperHandle};
pub use status::{
    Counts, Delivered, NoObserver, Progress, ShipHooks, ShipObserver, ShipState, ShipStatus, SyncReply,
};

#[cfg(test)]
mod tests;
#[cfg(test)]
mod thread_tests;
