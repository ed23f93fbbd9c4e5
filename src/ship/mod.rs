//! The shipper: delivers what changed on a VM's disks to its vault, cut by cut.
//!
//! | file | what it is |
//! | --- | --- |
//! | `shipper.rs` | the thread `shipper:VM` and its handle |
//! | `status.rs` | what it tells: status, events, hooks |

mod shipper;
mod status;

pub use shipper::{Shipper, ShipperConfig, ShipperHandle};
pub use status::{
    Counts, Delivered, NoObserver, Progress, ShipHooks, ShipObserver, ShipState, ShipStatus, SyncReply,
};
