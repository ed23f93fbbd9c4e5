//! What is said over the API, both ways. The same types are what `--json` prints.
//!
//! Times are RFC 3339 in UTC, durations whole milliseconds or seconds as the name says, sizes
//! bytes. A top-level answer that scripts read has a `schema`; a change that is not an addition
//! raises its number. Requests refuse fields that they do not know, replies do not, so that a
//! newer daemon can be asked by an older command line.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use super::journal::*;
use crate::base::{DiskId, EpochNumber, Error, ErrorKind, PointId, Timestamp, VmId, VmName};
use crate::core::ports::points::PointInfo;
use crate::core::ports::source::DiskFigures;
use crate::core::retention::Keep;
use crate::format::manifest::{Consistency, EpochKind};

macro_rules! empty_requests {
    ($( $(#[$doc:meta])* $name:ident; )*) => {
        $( $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct $name {} )*
    };
}

empty_requests! {
    /// Asks who answers.
    HelloRequest;
    /// Asks for all mounts.
    MountsRequest;
    /// Asks for all policies.
    PolicyListRequest;
    /// Asks the daemon to end cleanly.
    StopRequest;
}

/// An [`Error`] on the wire and in JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Its class.
    pub kind: ErrorKind,
    /// What failed.
    pub what: String,
    /// Why.
    #[serde(default)]
    pub why: Option<String>,
    /// What to type next.
    #[serde(default)]
    pub hint: Option<String>,
}

impl From<&Error> for Failure {
    fn from(e: &Error) -> Self {
        Self {
            kind: e.kind(),
            what: e.what().to_owned(),
            why: e.reason(),
            hint: e.next_step().map(str::to_owned),
        }
    }
}

impl From<Failure> for Error {
    fn from(f: Failure) -> Self {
        let mut e = Self::new(f.kind, f.what);
        if let Some(why) = f.why {
            e = e.why(why);
        }
        if let Some(hint) = f.hint {
            e = e.hint(hint);
        }
        e
    }
}

/// The answer of a command that has nothing to tell but what it did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    /// What was done, one sentence; empty: the command line says it.
    #[serde(default)]
    pub message: String,
    /// What the operator should know besides.
    #[serde(default)]
    pub warnings: Vec<String>,
}

/// A job was started; follow it with [`JobShowRequest`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobStarted {
    /// Its number.
    pub job: u64,
}

// ---- mounts ----

/// Mounts the filter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MountRequest {
    /// The lower directory, absolute.
    pub source: PathBuf,
    /// Where the view goes, absolute; the same as `source`: over itself.
    pub dir: PathBuf,
    /// The operator says that no other host uses the shared file system.
    #[serde(default)]
    pub single_host: bool,
    /// Further mount options (`ro`, `noatime`, ...), already freed of those that are ours.
    #[serde(default)]
    pub options: Vec<String>,
}

/// The mount serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountReply {
    /// The mount.
    pub mount: MountStatus,
    /// What the operator should know.
    #[serde(default)]
    pub warnings: Vec<String>,
}

/// Ends a mount and forgets it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UmountRequest {
    /// Where it is mounted, absolute.
    pub dir: PathBuf,
}

/// All mounts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountsReply {
    /// `afterimage.mounts/1`.
    pub schema: String,
    /// The mounts, by directory.
    pub mounts: Vec<MountStatus>,
}

/// One mount of the filter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountStatus {
    /// Where the view is.
    pub dir: PathBuf,
    /// The lower directory as it was given.
    pub source: PathBuf,
    /// Whether requests are answered.
    pub serving: bool,
    /// Why not.
    #[serde(default)]
    pub error: Option<Failure>,
    /// Type of the lower file system (`ext4`, `xfs`).
    #[serde(default)]
    pub file_system: String,
    /// Free bytes of the lower file system.
    #[serde(default)]
    pub free_bytes: u64,
    /// Disks below it that are protected.
    #[serde(default)]
    pub protected_disks: u64,
    /// Processes that have a file open beneath the mount, around the filter.
    #[serde(default)]
    pub open_beneath: Vec<OpenFile>,
}

/// A file that some process has open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenFile {
    /// The process.
    pub pid: u32,
    /// Its name.
    pub command: String,
    /// The file.
    pub path: PathBuf,
}

// ---- VMs ----

/// Starts to protect a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProtectRequest {
    /// Name of the VM.
    pub name: VmName,
    /// Its disks by their path in the mounted view, absolute.
    #[serde(default)]
    pub disks: Vec<PathBuf>,
    /// Or a folder: what comes and goes there is followed.
    #[serde(default)]
    pub dir: Option<PathBuf>,
    /// Patterns of names in `dir` that are left out.
    #[serde(default)]
    pub exclude: Vec<String>,
    /// Time between cuts; else the policy's.
    #[serde(default)]
    pub interval_ms: Option<u64>,
    /// Name of a policy; else the default one.
    #[serde(default)]
    pub policy: Option<String>,
    /// Name or directory of a target; else the embedded vault.
    #[serde(default)]
    pub target: Option<String>,
}

/// Ends protection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnprotectRequest {
    /// Name or UUID.
    pub vm: String,
    /// Removes its points too. Also for a VM that is no longer protected.
    #[serde(default)]
    pub purge: bool,
}

/// Changes settings of a VM; what is `None` stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetRequest {
    /// Name or UUID.
    pub vm: String,
    /// New name.
    #[serde(default)]
    pub name: Option<VmName>,
    /// Time between cuts; 0: the policy's again.
    #[serde(default)]
    pub interval_ms: Option<u64>,
    /// Name of a policy.
    #[serde(default)]
    pub policy: Option<String>,
    /// Patterns of names that are left out (only for a VM protected by folder).
    #[serde(default)]
    pub exclude: Option<Vec<String>>,
}

/// Stops shipping.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PauseRequest {
    /// Name or UUID.
    pub vm: String,
}

/// Ships again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResumeRequest {
    /// Name or UUID.
    pub vm: String,
}

/// Asks for a cut.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SyncRequest {
    /// Name or UUID.
    pub vm: String,
    /// Until a cut made after this call is durable and applied.
    #[serde(default)]
    pub wait: bool,
    /// How long to wait; then [`ErrorKind::Busy`]. `None`: 10 minutes.
    #[serde(default)]
    pub timeout_ms: Option<u64>,
}

/// Answer to [`SyncRequest`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyncReply {
    /// With `wait`: the newest point, which shows every write acknowledged before the call.
    #[serde(default)]
    pub point: Option<PointView>,
    /// With `wait`: the vault has everything up to here.
    #[serde(default)]
    pub current_as_of: Option<Timestamp>,
}

// ---- policies ----

/// Named settings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// Its name.
    pub name: String,
    /// Time between cuts.
    pub interval_ms: u64,
    /// Which points to keep.
    pub keep: Keep,
    /// Health is Warning when the RPO is older; 0: three intervals, at least 10 s.
    #[serde(default)]
    pub rpo_alert_ms: u64,
    /// Comes with the program and cannot be changed.
    #[serde(default)]
    pub preset: bool,
    /// How many VMs use it.
    #[serde(default)]
    pub vms: u64,
}

/// All policies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoliciesReply {
    /// `afterimage.policies/1`.
    pub schema: String,
    /// The policies, presets first.
    pub policies: Vec<Policy>,
}

/// Makes a policy, or changes one; what is `None` stays or is as in the default policy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicySetRequest {
    /// Its name.
    pub name: String,
    /// Time between cuts.
    #[serde(default)]
    pub interval_ms: Option<u64>,
    /// Every point is kept so long.
    #[serde(default)]
    pub keep_all_seconds: Option<u64>,
    /// Hourly points.
    #[serde(default)]
    pub keep_hourly: Option<u32>,
    /// Daily points.
    #[serde(default)]
    pub keep_daily: Option<u32>,
    /// See [`Policy::rpo_alert_ms`].
    #[serde(default)]
    pub rpo_alert_ms: Option<u64>,
}

// ---- status ----

/// Asks for the status.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StatusRequest {
    /// Only this VM, by name or UUID.
    #[serde(default)]
    pub vm: Option<String>,
}

/// Everything about daemon, mounts and VMs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusReport {
    /// `afterimage.status/1`.
    pub schema: String,
    /// When this was true.
    pub time: Timestamp,
    /// The daemon.
    pub daemon: DaemonStatus,
    /// The targets in use, the embedded vault among them.
    #[serde(default)]
    pub targets: Vec<TargetStatus>,
    /// The mounts.
    pub mounts: Vec<MountStatus>,
    /// The protected VMs, by name.
    pub vms: Vec<VmStatus>,
    /// Disks under mounts that nobody protects.
    pub unprotected: Vec<UnprotectedDisk>,
    /// What concerns the host as a whole.
    #[serde(default)]
    pub warnings: Vec<String>,
}

/// The schema of [`StatusReport`].
pub const STATUS_SCHEMA: &str = "afterimage.status/1";

/// The daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DaemonStatus {
    /// Its process.
    pub pid: u32,
    /// Its version.
    pub version: String,
    /// Seconds since it began to serve.
    pub uptime_seconds: u64,
    /// Its state folder.
    pub state_dir: PathBuf,
}

/// A vault in use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetStatus {
    /// Its name (`embedded`).
    pub name: String,
    /// Where it is.
    pub location: String,
    /// Room left, if it can be reached.
    #[serde(default)]
    pub free_bytes: Option<u64>,
    /// Room in all, if it can be reached.
    #[serde(default)]
    pub total_bytes: Option<u64>,
    /// Why it cannot be reached.
    #[serde(default)]
    pub error: Option<Failure>,
}

/// State of a protected VM (design, section 8).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmState {
    /// Protection is being enabled.
    ReadyForInitialReplication,
    /// The first copy is on its way.
    InitialReplicationInProgress,
    /// Cut by cut.
    Replicating,
    /// The vault and this host no longer share a head; disks ship whole.
    ResynchronizationRequired,
    /// Paused by the operator.
    Suspended,
    /// Stopped by an error that does not go away by itself.
    Error,
}

/// Health in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Health {
    /// Nothing to do.
    Normal,
    /// Works, but not as it should.
    Warning,
    /// Does not work.
    Critical,
}

/// One protected VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmStatus {
    /// Its name.
    pub name: VmName,
    /// Its UUID.
    pub id: VmId,
    /// Its state.
    pub state: VmState,
    /// Its health.
    pub health: Health,
    /// Why the health is not Normal, and what to do, in plain words.
    pub reasons: Vec<String>,
    /// Target.
    pub target: String,
    /// Policy.
    pub policy: String,
    /// Time between cuts.
    pub interval_ms: u64,
    /// The folder that is followed, if it was protected by folder.
    #[serde(default)]
    pub folder: Option<PathBuf>,
    /// Its disks.
    pub disks: Vec<DiskStatus>,
    /// The vault has everything up to here.
    #[serde(default)]
    pub current_as_of: Option<Timestamp>,
    /// Age of `current_as_of`.
    #[serde(default)]
    pub rpo_ms: Option<u64>,
    /// Number of the current epoch.
    #[serde(default)]
    pub epoch: Option<EpochNumber>,
    /// Points that can be opened.
    #[serde(default)]
    pub points: u64,
    /// The newest of them.
    #[serde(default)]
    pub newest_point: Option<PointId>,
    /// When the next cut or attempt is due.
    #[serde(default)]
    pub next_cycle: Option<Timestamp>,
    /// What is being shipped now.
    #[serde(default)]
    pub shipping: Option<Transfer>,
    /// Epochs committed in the vault and not applied yet.
    #[serde(default)]
    pub backlog_epochs: u64,
    /// Attempts that failed since the last success.
    #[serde(default)]
    pub failed_attempts: u32,
    /// The last error, until the next success.
    #[serde(default)]
    pub last_error: Option<Failure>,
    /// When that was.
    #[serde(default)]
    pub last_error_at: Option<Timestamp>,
    /// What tracking costs its writes, since the daemon started.
    #[serde(default)]
    pub tracking_delay: Option<TrackingDelay>,
}

/// How long writes were held up because they are tracked: marking, cuts, preserving; without the
/// activation of cold regions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrackingDelay {
    /// Number of writes.
    pub writes: u64,
    /// Half of them less than this, in nanoseconds.
    pub median_ns: u64,
    /// 99 % of them less than this, in nanoseconds.
    pub p99_ns: u64,
    /// The longest, in nanoseconds.
    pub max_ns: u64,
}

/// Bytes on their way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transfer {
    /// What is done (`pass 1`, `epoch 17`).
    pub what: String,
    /// Bytes done.
    pub done_bytes: u64,
    /// Bytes in all, as far as known.
    pub total_bytes: u64,
}

/// One disk of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStatus {
    /// Its id.
    pub id: DiskId,
    /// Its path in the mounted view.
    pub path: PathBuf,
    /// `raw`, `qcow2`, ...
    #[serde(default)]
    pub format: String,
    /// Figures of the tracker, in the same object.
    #[serde(flatten)]
    pub figures: DiskFigures,
}

/// A disk that nobody protects.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnprotectedDisk {
    /// Its path in the mounted view.
    pub path: PathBuf,
    /// Its size.
    pub size: u64,
    /// `raw`, `qcow2`, ...
    #[serde(default)]
    pub format: String,
}

// ---- points ----

/// Which point is meant. The command line resolves `'14:00'`, because it knows the time zone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PointSpec {
    /// The newest.
    Latest,
    /// The newest app-consistent one.
    LatestApp,
    /// This one.
    Id(PointId),
    /// The newest whose cut was at this time or before.
    At(Timestamp),
}

/// Asks for the points of a VM (protected or not, as long as the vault has it).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PointsRequest {
    /// Name or UUID.
    pub vm: String,
}

/// Points that can be opened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointsReply {
    /// `afterimage.points/1`.
    pub schema: String,
    /// Name of the VM.
    pub vm: VmName,
    /// Its points, oldest first.
    pub points: Vec<PointView>,
}

/// The schema of [`PointsReply`].
pub const POINTS_SCHEMA: &str = "afterimage.points/1";

/// One point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointView {
    /// Its name.
    pub id: PointId,
    /// Its epoch.
    pub epoch: EpochNumber,
    /// When its cut was.
    pub time: Timestamp,
    /// When the vault had it durably.
    pub arrived: Timestamp,
    /// Kind of its epoch.
    pub kind: EpochKind,
    /// How consistent the guest is.
    pub consistency: Consistency,
    /// Never dropped by retention.
    pub pinned: bool,
    /// Bytes that the epoch changed.
    pub changed_bytes: u64,
    /// Bytes of all disks.
    pub size_bytes: u64,
}

impl From<&PointInfo> for PointView {
    fn from(p: &PointInfo) -> Self {
        Self {
            id: p.id,
            epoch: p.id.epoch,
            time: p.time,
            arrived: p.arrived,
            kind: p.kind,
            consistency: p.consistency,
            pinned: p.pinned,
            changed_bytes: p.changed_bytes,
            size_bytes: p.size_bytes,
        }
    }
}

/// Pins or unpins a point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PointPinRequest {
    /// Name or UUID of the VM.
    pub vm: String,
    /// Which point.
    pub point: PointSpec,
    /// `false`: unpin.
    pub pinned: bool,
}

/// Drops a point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PointDeleteRequest {
    /// Name or UUID of the VM.
    pub vm: String,
    /// Which point.
    pub point: PointSpec,
}

/// Mounts the view of all points: `DIR/NAME/POINT-ID/FILE`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PointMountRequest {
    /// An empty directory, absolute.
    pub dir: PathBuf,
}

/// Ends a view or a clone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PointUmountRequest {
    /// Where it is mounted, absolute.
    pub dir: PathBuf,
}

/// Mounts a writable clone of a point: its disks as files in `dir`; changes go to an overlay in
/// the state folder that `point umount` removes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PointCloneRequest {
    /// Name or UUID of the VM.
    pub vm: String,
    /// Which point.
    pub point: PointSpec,
    /// An empty directory, absolute.
    pub dir: PathBuf,
}

/// The clone can be used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointCloneReply {
    /// The point it shows; pinned while the clone exists.
    pub point: PointView,
    /// Where.
    pub dir: PathBuf,
}

/// Copies a point into a folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoreRequest {
    /// Name or UUID of the VM.
    pub vm: String,
    /// Which point.
    pub point: PointSpec,
    /// The folder, absolute; made if missing.
    pub to: PathBuf,
    /// Files that exist are replaced.
    #[serde(default)]
    pub force: bool,
}

/// Writes marks out to the HRLs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FlushRequest {
    /// Only those of this VM, by name or UUID; `None`: of all.
    #[serde(default)]
    pub vm: Option<String>,
}
