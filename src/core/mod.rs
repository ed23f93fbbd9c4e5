//! Pure state machines and decision tables, and the ports between the edges.
//!
//! Nothing here does I/O, starts a thread, asks a clock or logs, so that a simulation can drive
//! the production code. [`ports`] holds the traits through which one edge sees another: an edge
//! uses only its own folder and the layers below, and the host puts them together.

pub mod epoch;
pub mod health;
pub mod ports;
pub mod recovery;
pub mod retention;
pub mod retry;
pub mod schedule;
