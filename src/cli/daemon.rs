//! `daemon`, `start` and `stop`.

use super::out::Out;
use super::reach::{Reach, need_root};
use crate::base::{Error, ErrorKind, Result};
use crate::host::api::types::{DaemonStatus, StopRequest};

/// `daemon`: runs it here until it is told to end.
pub fn run(reach: &Reach, detached: bool, verbose: u8) -> Result<()> {
    need_root()?;
    if detached {
        // Fails only for the leader of a group, which a child of a command never is.
        let _ = nix::unistd::setsid();
    }
    let _ = (reach, verbose);
    Err(Error::new(ErrorKind::Internal, "no daemon"))
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
    let reply = client.call(&StopRequest {})?;
    super::mounts::done(out, &reply, || "the daemon ended; its mounts are remembered".to_owned())
}
