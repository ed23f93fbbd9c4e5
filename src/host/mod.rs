//! Assembly: the daemon, its threads and jobs, and its API.

pub mod api;
pub mod config;
pub mod db;
pub mod doctor;
pub mod events;
pub mod inspect;
pub mod jobs;
pub mod policies;
pub mod state;
