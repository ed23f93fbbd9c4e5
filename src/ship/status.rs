//! What the shipper tells: a status that can be asked for at any time, and events for the host.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::base::{Digest, EpochNumber, PointId, Result, Timestamp, VmId};
use crate::core::health::Failure;
use crate::format::manifest::{DefinitionFile, EpochKind};

/// What the shipper of a VM is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ShipState {
    /// Asks the vault for its head.
    Starting,
    /// Waits for the next cycle.
    Idle,
    /// Sends pending blocks from the live disk.
    LivePass,
    /// Cuts, and waits for the writers of the epoch that ended (T2).
    Draining,
    /// Sends a frozen epoch.
    Shipping,
    /// Commits it.
    Committing,
    /// Acknowledges it to the tracker.
    Acknowledging,
    /// Waits for the vault to apply.
    HeldBack,
    /// Failed; tries again by itself.
    Retrying,
    /// Paused by the operator.
    Paused,
    /// Failed, and does not try again by itself.
    Stopped,
}

/// A transfer under way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Bytes of disk sent, holes not counted.
    pub done_bytes: u64,
    /// Bytes of disk to send in this pass, as far as known.
    pub total_bytes: u64,
    /// Bytes a second over the transfer so far.
    pub bytes_per_second: u64,
}

/// Counts since the shipper started, and the last values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Cycles that ended with the vault current.
    pub cycles: u64,
    /// Of these, epochs committed.
    pub epochs: u64,
    /// Cycles that began a whole interval late or more, each interval counted.
    pub missed: u64,
    /// Give-ups (T5).
    pub give_ups: u64,
    /// Failures that lasted longer than a reconnect.
    pub failures: u64,
    /// Bytes of parts sent.
    pub sent_bytes: u64,
    /// Bytes changed, over all epochs.
    pub changed_bytes: u64,
    /// Bytes changed, largest epoch.
    pub changed_bytes_max: u64,
    /// From cut to durable: milliseconds over all epochs.
    pub latency_ms: u64,
    /// From cut to durable: longest, in milliseconds.
    pub latency_ms_max: u64,
}

impl Counts {
    /// Bytes changed by an epoch, on average.
    pub fn changed_bytes_average(&self) -> u64 {
        self.changed_bytes.checked_div(self.epochs).unwrap_or(0)
    }

    /// Milliseconds from cut to durable, on average.
    pub fn latency_ms_average(&self) -> u64 {
        self.latency_ms.checked_div(self.epochs).unwrap_or(0)
    }
}

/// An epoch that is durable in the vault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delivered {
    /// Its number in the vault (and in the point's id).
    pub epoch: EpochNumber,
    /// Digest of its manifest.
    pub digest: Digest,
    /// The point that it becomes.
    pub point: PointId,
    /// Its kind.
    pub kind: EpochKind,
    /// When the cut was.
    pub cut_time: Timestamp,
    /// When it was durable.
    pub durable_time: Timestamp,
    /// Bytes of disk that it changes.
    pub changed_bytes: u64,
    /// Bytes of parts.
    pub sent_bytes: u64,
}

/// Everything that can be asked of a shipper.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShipStatus {
    /// What it is doing.
    pub state: ShipState,
    /// Paused by the operator (the state may still be that of the step being ended).
    pub paused: bool,
    /// Interval between cycles, in milliseconds.
    pub interval_ms: u64,
    /// The transfer under way.
    pub progress: Option<Progress>,
    /// No epoch was ever committed.
    pub is_initial: bool,
    /// The vault holds everything written before this time: the RPO is its age.
    pub current_as_of: Option<Timestamp>,
    /// When the last cut was made that was to be delivered.
    pub last_cut: Option<Timestamp>,
    /// The newest epoch known durable.
    pub last_delivered: Option<Delivered>,
    /// When the next cycle is due.
    pub next_cycle: Option<Timestamp>,
    /// When a failed delivery is tried next.
    pub next_attempt: Option<Timestamp>,
    /// Since when nothing has worked; none while all is well.
    pub failing_since: Option<Timestamp>,
    /// The last error, until something works again.
    pub failure: Option<Failure>,
    /// Give-ups in a row (T5).
    pub give_ups_in_a_row: u32,
    /// Preserved bytes at the last give-up: the limit would have to be above this.
    pub preserved_needed: Option<u64>,
    /// The vault's backlog in epochs and bytes, while delivery waits for it.
    pub held_back: Option<(u64, u64)>,
    /// Figures since the shipper started.
    pub counts: Counts,
}

impl ShipStatus {
    /// The status of a shipper that has done nothing yet.
    pub(super) fn new(interval: Duration, paused: bool) -> Self {
        Self {
            state: ShipState::Starting,
            paused,
            interval_ms: u64::try_from(interval.as_millis()).unwrap_or(u64::MAX),
            progress: None,
            is_initial: true,
            current_as_of: None,
            last_cut: None,
            last_delivered: None,
            next_cycle: None,
            next_attempt: None,
            failing_since: None,
            failure: None,
            give_ups_in_a_row: 0,
            preserved_needed: None,
            held_back: None,
            counts: Counts::default(),
        }
    }
}

/// The answer to `sync`: the vault holds durably everything acknowledged before the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SyncReply {
    /// A cut made after the call is durable.
    Durable(Delivered),
    /// Nothing had changed since the newest epoch.
    NoChanges {
        /// The vault is current as of this time.
        current_as_of: Timestamp,
    },
}

/// Who is told what happens. Called from the shipper's thread; must not block for long and must
/// not call the shipper's handle in a way that waits for it.
pub trait ShipObserver: Send + Sync {
    /// An epoch is durable in the vault.
    fn epoch_committed(&self, vm: VmId, delivered: &Delivered) {
        let _ = (vm, delivered);
    }

    /// Delivery failed (longer than a reconnect takes). `is_final`: it is not tried again by
    /// itself.
    fn failed(&self, vm: VmId, failure: &Failure, is_final: bool) {
        let _ = (vm, failure, is_final);
    }

    /// After a failure, delivery works again.
    fn recovered(&self, vm: VmId) {
        let _ = vm;
    }

    /// An epoch gave up its cut (T5).
    fn gave_up(&self, vm: VmId, in_a_row: u32, preserved_bytes: u64) {
        let _ = (vm, in_a_row, preserved_bytes);
    }

    /// Every disk is sent whole; why.
    fn ships_whole(&self, vm: VmId, because: &str) {
        let _ = (vm, because);
    }

    /// Progress of a transfer before the first epoch is committed.
    fn initial_progress(&self, vm: VmId, progress: &Progress) {
        let _ = (vm, progress);
    }
}

/// An observer that wants to know nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoObserver;

impl ShipObserver for NoObserver {}

/// What the host does for the shipper around a cut. Called from the shipper's thread.
pub trait ShipHooks: Send + Sync {
    /// Before a cut: new overlays join the VM, what is gone leaves it.
    fn before_cut(&self) -> Result<()> {
        Ok(())
    }

    /// The files that define the VM, for the manifest.
    fn definition(&self) -> Vec<DefinitionFile>;
}
