//! The API of the daemon: one HTTP call per command, over a Unix socket.
//!
//! - [`types`]: what is said, both ways, and by `--json`;
//! - [`commands`]: the table of all calls, and the trait that the engine implements;
//! - [`server`]: answers, in the daemon; [`client`]: asks, in the command line.
//!
//! A call is `POST /v1/NAME` with a JSON object; the answer is a JSON object, or with another
//! status than 200 a [`types::Failure`]. What if we are killed here? The caller sees the
//! connection end; no call leaves a change half announced, because what takes long is a job that
//! the daemon owns. What if the other side is older? It answers 404 to a call that it does not
//! know, and 400 to a field that it does not know; both become an error that says so.

pub mod client;
pub mod commands;
mod journal;
pub mod server;
mod socket;
pub mod types;

pub use client::Client;
pub use commands::{Access, Call, Commands};
pub use server::Server;
