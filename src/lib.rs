//! afterimage: disaster recovery for QEMU/KVM on Linux, for disks that are plain files.
//!
//! # Follow one guest write
//!
//! Ten hops from the guest to a recovery point, each in the file that is named:
//!
//! 1. The kernel hands a FUSE request to an event loop; it is decoded and nothing more
//!    (`filter/adapter.rs`).
//! 2. The handle leads to the open file and its node, and the node to its disk if it is protected,
//!    in O(1) and without a global lock (`filter/data.rs`, `filter/handle.rs`, `filter/node.rs`).
//! 3. *Activate*: the region of the write is pinned; a cold one is first made hot, durably, in the
//!    host's hot-region log (`tracker/disk.rs`, `tracker/hot.rs`; rules T6, T7, T8).
//! 4. *Enter and mark*: the epoch number is read and the blocks are marked in the map of that
//!    epoch, in one section that a cut waits out (`tracker/gate.rs`, `tracker/map.rs`; T1).
//! 5. *Preserve*: a block that is frozen and not shipped yet is copied aside first
//!    (`tracker/preserve.rs`; T3, T5).
//! 6. *Write*: the lower file gets the data, the tracker is told, the guest gets its answer
//!    (`filter/change.rs`, `filter/data.rs`).
//! 7. *Cut*: the shipper's thread ends the epoch for all disks of the VM by one store, waits for
//!    its writers and reads its blocks as of the cut (`ship/shipper.rs`, `ship/engine.rs`,
//!    `tracker/vm.rs`, `tracker/source.rs`; T1 to T4). What it does next is decided by a pure state
//!    machine (`core/epoch.rs`).
//! 8. The blocks become frames of parts: zeros found, the rest compressed and hashed
//!    (`ship/transfer.rs`, `format/part.rs`). The vault has each part durably before the manifest
//!    commits the epoch (`ship/commit.rs`, `format/manifest.rs`, `vault/inbox.rs`).
//! 9. *Acknowledged*: the tracker forgets the epoch after a sync of the disk file
//!    (`tracker/source.rs`; T6), while the vault takes the undo log and applies the epoch
//!    (`vault/apply.rs`, `vault/undolog.rs`; A1).
//! 10. The epoch is a point: listed (`vault/store.rs`), shown as a folder of ordinary files
//!     (`view/points.rs`, `vault/reader.rs`; A2), restored from (`view/restore.rs`), and dropped when
//!     the keep rules no longer keep it (`core/retention.rs`, `vault/expire.rs`; A4).
//!
//! # The house
//!
//! ```text
//! main, cli/                                    operator
//! host/                                         assembly: daemon, jobs, API
//! filter/ tracker/ ship/ vault/ view/ machine/  edges: each does I/O for one outside party
//! core/                                         pure state machines, and the ports between edges
//! format/                                       pure bytes: HRL, part, manifest, undo log, state
//! base/                                         units, extents, ids, limits, clock, digest, errors
//! ```
//!
//! A file uses only its own folder and the layers below; edges see each other through
//! [`core::ports`] alone. `tests/tidy.rs` checks it.

#![deny(unsafe_code)]
#![warn(missing_docs)]

pub mod base;
pub mod cli;
pub mod core;
pub mod filter;
pub mod format;
pub mod host;
pub mod machine;
pub mod ship;
pub mod tracker;
pub mod vault;
pub mod view;
