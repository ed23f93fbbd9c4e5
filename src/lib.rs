//! afterimage: disaster recovery for QEMU/KVM on Linux.

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
