//! Pure bytes: the formats of every file of ours, with their byte maps and the reason for their
//! order. Decoders bound before they allocate, and give unverified data a type of its own.

pub mod frames;
pub mod hotlog;
pub mod hrl;
pub mod manifest;
pub mod overlay;
pub mod part;
pub mod qcow2;
pub mod undo;
pub mod vaultstate;
