//! `daemon`, `start` and `stop`.

use std::time::Duration;

use super::out::Out;
use super::reach::{Reach, need_root};
use crate::base::Result;
use crate::host;
use crate::host::api::types::{DaemonStatus, StopRequest};

/// A daemon that was told to end is gone within this time.
const STOP_PATIENCE: Duration = Duration::from_secs(90);

/// `daemon`: runs it here until it is told to end.
pub fn run(reach: &Reach, detached: bool, verbose: u8) -> Result<()> {
    need_root()?;
    if detached {
        // Fails only for the leader of a group, which a child of a command never is.
        let _ = nix::unistd::setsid();
    }
    host::daemon::run(reach.state().clone(), verbose)
}

/// `start`.
pub fn start(out: &Out, reach: &Reach) -> Result<()> {
    let status: DaemonStatus = reach.needed()?.hello()?;
    out.answer("afterimage.daemon/1", &status, || {
        format!("the daemon runs (pid {}, version {})", status.pid, status.version)
    })
}

/// `stop`.
pub fn stop(out: &Out, reach: &Reach) -> Result<()> {
    need_root()?;
    let Some(client) = reach.if_running() else {
        return super::mounts::done(out, &Default::default(), || "the daemon does not run".to_owned());
    };
    let mut reply = client.call(&StopRequest {})?;
    // The lock is free when the process is gone with all its threads (S1).
    reach.state().lock(STOP_PATIENCE)?;
    reply.message.clear();
    super::mounts::done(out, &reply, || "the daemon ended; its mounts are remembered".to_owned())
}
