//! The command line: what people type, and what they read.
//!
//! [`main`] is the whole program: it understands the arguments ([`args`]), reaches the daemon
//! (`reach`), makes a few calls of its API and shows the answers, as tables for people or as JSON
//! for scripts. Nothing here decides anything about data; what can be refused is refused by the
//! daemon, so that every client is told the same.
//!
//! - Errors are three lines on standard error (`error:`, `why:`, `next:`); with `--json` the same
//!   as an object on standard output. Exit codes: see [`crate::base::ErrorKind::exit_code`].
//! - The first command that needs the daemon starts it if none runs. Commands that only look do so
//!   only where a daemon has been before (the state folder has a lock file); elsewhere, or for who
//!   is not root, they say that none runs and exit 7. `stop` is no lasting state: for that,
//!   `systemctl disable`, or `umount` and `unprotect`.
//! - Killed here, or a closed terminal: a job goes on in the daemon.

pub mod args;
mod daemon;
mod doctor;
mod follow;
mod helper;
mod inspect;
mod journal;
mod mounts;
mod out;
mod points;
mod reach;
mod report;
mod run;
mod status;
mod text;
mod vms;
mod when;

pub use run::main;
