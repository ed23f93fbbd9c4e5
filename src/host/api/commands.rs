//! Every call of the API in one table: its name, who may make it, what it takes and answers.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::types::*;
use crate::base::{Error, ErrorKind, Result};

/// Who may make a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Root, and the group `afterimage`: it changes nothing.
    Read,
    /// Root only.
    Write,
}

/// A request of the API.
pub trait Call: Serialize + DeserializeOwned {
    /// Last element of the path of the call.
    const NAME: &'static str;
    /// Who may make it.
    const ACCESS: Access;
    /// What it answers.
    type Reply: Serialize + DeserializeOwned;
}

macro_rules! calls {
    ($( $(#[$doc:meta])* $access:ident $method:ident($request:ident) -> $reply:ident; )*) => {
        /// What the daemon can do: implemented by its engine, asked for by the server.
        ///
        /// Methods may block; the server calls each from a thread where that is allowed.
        pub trait Commands: Send + Sync + 'static {
            $(
                $(#[$doc])*
                #[cfg(not(test))]
                fn $method(&self, request: $request) -> Result<$reply>;

                // So that a fake engine of a test says only what its test is about.
                $(#[$doc])*
                #[cfg(test)]
                fn $method(&self, _request: $request) -> Result<$reply> {
                    Err(Error::new(ErrorKind::Internal, concat!("no fake of ", stringify!($method))))
                }
            )*
        }

        $( impl Call for $request {
            const NAME: &'static str = stringify!($method);
            const ACCESS: Access = Access::$access;
            type Reply = $reply;
        } )*

        /// Who may make the call `name`; `None`: there is no such call.
        pub fn access(name: &str) -> Option<Access> {
            match name {
                $( stringify!($method) => Some(Access::$access), )*
                _ => None,
            }
        }

        /// Makes the call `name` with a JSON `body` (empty: `{}`); the answer as JSON.
        pub fn dispatch(engine: &dyn Commands, name: &str, body: &[u8]) -> Result<Vec<u8>> {
            match name {
                $( stringify!($method) => encode(&engine.$method(decode::<$request>(name, body)?)?), )*
                _ => Err(Error::new(ErrorKind::NotFound, format!("there is no call {name:?}"))
                    .why("the daemon that runs is of another version")
                    .hint("restart the daemon: afterimage stop, then any command")),
            }
        }
    };
}

calls! {
    /// Who answers: pid, version, uptime.
    Read hello(HelloRequest) -> DaemonStatus;
    /// Everything about daemon, mounts and VMs.
    Read status(StatusRequest) -> StatusReport;
    /// Mounts the filter; returns once it serves.
    Write mount(MountRequest) -> MountReply;
    /// Ends a mount and forgets it.
    Write umount(UmountRequest) -> Done;
    /// All mounts.
    Read mounts(MountsRequest) -> MountsReply;
    /// Starts the job that protects a VM.
    Write protect(ProtectRequest) -> JobStarted;
    /// Ends protection; points stay unless purged.
    Write unprotect(UnprotectRequest) -> Done;
    /// Changes settings of a VM.
    Write set(SetRequest) -> Done;
    /// All policies.
    Read policy_list(PolicyListRequest) -> PoliciesReply;
    /// Makes or changes a policy.
    Write policy_set(PolicySetRequest) -> Policy;
    /// Stops shipping; tracking goes on.
    Write pause(PauseRequest) -> Done;
    /// Ships again; checks the cause of an error again.
    Write resume(ResumeRequest) -> Done;
    /// Asks for a cut now; with `wait`, until it is durable and applied.
    Write sync(SyncRequest) -> SyncReply;
    /// Points that can be opened, oldest first.
    Read points(PointsRequest) -> PointsReply;
    /// Pins or unpins a point.
    Write point_pin(PointPinRequest) -> PointView;
    /// Drops a point.
    Write point_delete(PointDeleteRequest) -> PointView;
    /// Mounts the view of all points.
    Write point_mount(PointMountRequest) -> Done;
    /// Ends a view, or a clone and its overlay.
    Write point_umount(PointUmountRequest) -> Done;
    /// Mounts a writable clone of a point.
    Write point_clone(PointCloneRequest) -> PointCloneReply;
    /// Starts the job that copies a point into a folder.
    Write restore(RestoreRequest) -> JobStarted;
    /// Jobs, newest first.
    Read jobs(JobsRequest) -> JobsReply;
    /// One job.
    Read job_show(JobShowRequest) -> JobView;
    /// The log of a job.
    Read job_log(JobLogRequest) -> JobLogReply;
    /// Asks a job to end.
    Write job_cancel(JobCancelRequest) -> JobView;
    /// Events, oldest first.
    Read events(EventsRequest) -> EventsReply;
    /// Writes marks out to the HRLs, so that files at rest show them.
    Write flush(FlushRequest) -> Done;
    /// Ends the daemon cleanly; mounts are remembered.
    Write stop(StopRequest) -> Done;
}

fn decode<T: DeserializeOwned>(name: &str, body: &[u8]) -> Result<T> {
    let body = if body.is_empty() { b"{}" } else { body };
    serde_json::from_slice(body).map_err(|e| {
        Error::new(ErrorKind::Usage, format!("the call {name:?} cannot be understood"))
            .why(e.to_string())
            .hint("use the command line of the same version as the daemon: afterimage --version")
    })
}

fn encode<T: Serialize>(reply: &T) -> Result<Vec<u8>> {
    serde_json::to_vec(reply)
        .map_err(|e| Error::new(ErrorKind::Internal, "the answer cannot be written as JSON").source(e))
}
