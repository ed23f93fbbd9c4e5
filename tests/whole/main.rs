//! The whole product: real daemons, real mounts, real guests.
//!
//! Each file is one promise, in the short form that CI runs; `scripts/long NAME` runs the full
//! count of the same code.

#[allow(dead_code, unused_imports)]
#[path = "../common/mod.rs"]
mod common;
#[path = "../load/mod.rs"]
mod load;

mod conformance;
mod cuts;
mod full;
mod guest;
mod injected;
mod kills;
mod loops;
mod power;
mod readme;
mod refusals;
mod snapshot;
mod whole_disks;
