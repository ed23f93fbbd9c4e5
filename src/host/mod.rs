//! Assembly: the daemon, its threads and jobs, and its API.
//!
//! | file | what it is |
//! | --- | --- |
//! | [`daemon`] | the process: signals, log, watchdog |
//! | [`engine`] | everything that runs in it, and the order of start and stop |
//! | `commands` | the calls of the API |
//! | `mounts`, `lower`, `storage` | mounts, remembered and restored; files beneath them |
//! | `records`, `vm`, `lifecycle` | VMs: configuration, at run time, from one to the other |
//! | `prerequisites`, `protect` | the job that enables protection |
//! | `membership`, `folder` | which files are the disks of a VM while files come, go and move |
//! | `points`, `views` | points: lists, restore, retention; mounted views and clones |
//! | `policies`, `targets` | named settings; named vaults |
//! | `jobs`, `events`, `db` | jobs and events, in SQLite |
//! | `status` | the report that `status` prints, and the facts of health |
//! | `housekeeping` | what must be looked after now and then |
//! | [`doctor`], [`inspect`] | looks at a machine; at any file of ours |

pub mod api;
mod commands;
pub mod config;
pub mod daemon;
mod db;
pub mod doctor;
pub mod engine;
mod events;
mod folder;
mod housekeeping;
pub mod inspect;
mod jobs;
mod lifecycle;
mod lower;
mod membership;
mod mounts;
mod points;
mod policies;
mod prerequisites;
mod protect;
mod records;
pub mod state;
mod status;
mod storage;
mod targets;
mod views;
mod vm;
