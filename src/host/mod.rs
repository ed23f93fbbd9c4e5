//! Assembly: the daemon, its threads and jobs, and its API.

pub mod api;
