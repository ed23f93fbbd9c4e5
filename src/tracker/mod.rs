//! The tracker: in the write path of every protected disk (design, section 4, rules T1 to T10).
//!
//! | file | what it is | rules |
//! | --- | --- | --- |
//! | `disk` | [`Disk`]: what the filter calls before and after each change | the five steps, T8, T10 |
//! | `gate` | writers count in, the cut waits them out and stores | T1, T2 |
//! | `map` | three block maps per disk | T2, T3 |
//! | `regions`, `hot` | pins and hot regions; the durable log of them | T6, T7 |
//! | `preserve`, `preserve_memory` | old content of frozen blocks, in memory and in the HRL | T3, T5 |
//! | `vm`, `source` | [`VmTracker`]: cuts, and what the shipper reads | T1 to T6, T9 |
//! | `book`, `hrl`, `record` | what is pending, and where it is durable | T4, T6 |
//! | `start` | opening a VM, by the table in `core::recovery` | crash rules |
//! | `cooler` | heartbeat and lazy background work | T6, T7, T8 |
//! | `shm`, `sync` | shared memory; primitives that tests can replace | S3 |

mod book;
mod canary;
mod cooler;
mod disk;
mod gate;
mod hot;
mod hrl;
#[cfg(test)]
mod interleaving_tests;
mod latency;
mod map;
mod preserve;
mod preserve_memory;
mod record;
mod regions;
mod shared;
mod shm;
mod source;
mod start;
mod sync;
mod vm;

pub use cooler::Tracker;
pub use disk::{Disk, DiskSpec};
pub use vm::{GiveUps, LatencyFigures, RecoveredDisk, VmTracker};
