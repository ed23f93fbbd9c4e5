//! Carries out the actions of [`crate::core::epoch`] against the tracker and the vault.
//!
//! One action at a time, and its result is the next event. No threads of its own but those of a
//! transfer, so that the simulation drives it as the shipper's thread does.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::base::limits::PART_BYTES;
use crate::base::{
    BLOCK_BYTES, Clock, Digest, DiskId, Error, ErrorKind, ExtentSet, Result, Timestamp, VmName,
};
use crate::core::epoch::{Action, Event, Survey};
use crate::core::health::Failure;
use crate::core::ports::source::{BlocksByDisk, Cut, CutKind, Source};
use crate::core::ports::vault::{Head, Vault};
use crate::format::manifest::Manifest;
use crate::ship::build::{self, Build};
use crate::ship::read::{Mode, Packed};
use crate::ship::record::{Base, Committing, Record};
use crate::ship::shipper::ShipperConfig;
use crate::ship::status::{Delivered, ShipHooks, ShipObserver, ShipStatus};

/// How long a cut, or one wait for writers (T2), may take before commands are looked at.
const DRAIN_PATIENCE: Duration = Duration::from_secs(1);
/// A vault with more committed epochs than this to apply, and more bytes than the next, is behind.
const BACKLOG_EPOCHS_MAX: u64 = 4;
/// See [`BACKLOG_EPOCHS_MAX`].
const BACKLOG_BYTES_MAX: u64 = 1 << 30;
/// However small they are, so many epochs are too many.
const BACKLOG_EPOCHS_EVER: u64 = 256;
/// Free space that ends the wait for space.
const SPACE_PROBE_BYTES: u64 = 64 << 20;

/// What a probe asks while a failure is waited out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Probe {
    /// Nothing can tell.
    Nothing,
    /// The vault answers.
    Head,
    /// The vault has space.
    Space,
    /// The block can be read.
    Block(DiskId, u64),
}

/// An error, and how to find out that its cause is gone.
pub(super) struct Fault {
    pub(super) error: Error,
    pub(super) probe: Probe,
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self { error, probe: Probe::Nothing }
    }
}

/// Errors of the vault, told apart from those of the tracker.
pub(super) trait OnVault<T> {
    fn on_vault(self) -> Result<T, Fault>;
}

impl<T> OnVault<T> for Result<T> {
    fn on_vault(self) -> Result<T, Fault> {
        self.map_err(|error| {
            let probe = if error.kind() == ErrorKind::NoSpace { Probe::Space } else { Probe::Head };
            // A vault that is not there, or does not know the VM (any more), may come back; then it
            // is registered again, and the head tells what the vault has.
            let error = match error.kind() {
                ErrorKind::NotFound => error.with_kind(ErrorKind::Unreachable),
                _ => error,
            };
            Fault { error, probe }
        })
    }
}

/// Everything from outside.
pub(super) struct Outside {
    pub(super) source: Arc<dyn Source>,
    pub(super) vault: Arc<dyn Vault>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) observer: Arc<dyn ShipObserver>,
    pub(super) hooks: Arc<dyn ShipHooks>,
}

/// The engine of one VM.
pub(super) struct Engine {
    pub(super) config: ShipperConfig,
    pub(super) outside: Outside,
    pub(super) status: Arc<Mutex<ShipStatus>>,
    /// Set by who wants a transfer to end at the next part.
    pub(super) interrupt: Arc<AtomicBool>,
    /// Number of the attempt, in the names of parts that are read live.
    attempt: u32,
    pub(super) build: Option<Build>,
    /// Parts in memory that are not in the vault yet.
    pub(super) in_hand: Vec<Packed>,
    /// Something became durable since the last failure.
    pub(super) has_progressed: bool,
    /// Transfers use no threads.
    pub(super) is_inline: bool,
    /// Target size of a part, in bytes of content.
    pub(super) part_bytes: u64,
    pub(super) record: Record,
    pub(super) is_registered: bool,
    pub(super) head: Option<Head>,
    /// The final cut under way.
    pub(super) cut: Option<Cut>,
    /// The newest cut is not drained, and made blocks do not know of it.
    pub(super) undrained: bool,
    /// Blocks of the frozen epoch, once drained.
    pub(super) frozen_blocks: BlocksByDisk,
    /// Disks whose pending blocks must all have a part, or be frozen, before the commit.
    pub(super) uncovered: Vec<DiskId>,
    /// Paths of the disks as of the newest cut, for messages.
    names: BTreeMap<DiskId, PathBuf>,
    pub(super) committed: Option<Committing>,
    surveyed_at: Timestamp,
    probe: Probe,
}

impl Engine {
    /// An engine that has done nothing yet. Reads the record.
    pub(super) fn new(
        config: ShipperConfig,
        outside: Outside,
        status: Arc<Mutex<ShipStatus>>,
        interrupt: Arc<AtomicBool>,
    ) -> Result<Self> {
        let (record, trouble) = Record::load(&config.record_path, config.vm)?;
        if let Some(trouble) = trouble {
            log::warn!("{}: {trouble}; its disks are sent whole, points stay", config.name);
        }
        let surveyed_at = outside.clock.now();
        Ok(Self {
            attempt: rand::random(),
            build: None,
            in_hand: Vec::new(),
            has_progressed: false,
            is_inline: false,
            part_bytes: PART_BYTES,
            record,
            is_registered: false,
            head: None,
            cut: None,
            undrained: false,
            frozen_blocks: BlocksByDisk::new(),
            uncovered: Vec::new(),
            names: BTreeMap::new(),
            committed: None,
            surveyed_at,
            probe: Probe::Nothing,
            config,
            outside,
            status,
            interrupt,
        })
    }

    /// The status, to be changed.
    pub(super) fn status(&self) -> MutexGuard<'_, ShipStatus> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Another name, from the next epoch on.
    pub(super) fn set_name(&mut self, name: VmName) {
        self.is_registered = false;
        self.config.name = name;
    }

    /// Forgets parts in memory beyond `bytes_max`: a long wait must not cost memory. Their blocks
    /// are read again, and where that cannot be done the epoch gives up its cut (T4).
    pub(super) fn trim_in_hand(&mut self, bytes_max: usize) {
        let mut bytes = 0;
        self.in_hand.retain(|p| {
            bytes += p.bytes.len();
            bytes <= bytes_max
        });
    }

    /// Carries out an action that has an event.
    pub(super) fn perform(&mut self, action: &Action) -> Event {
        let result = match action {
            Action::Recover => self.recover().map(Event::Recovered),
            Action::Survey => self.survey().map(Event::Surveyed),
            Action::Renew => self.renew().map(|()| Event::Renewed),
            Action::CutLive => self.cut_live().map(|()| Event::CutMade),
            Action::CutFinal => self.cut_final().map(|()| Event::CutMade),
            Action::Drain => self.drain(),
            Action::ShipLive => self.ship_live(),
            Action::ShipFrozen => self.ship_frozen(),
            Action::Commit => self.commit(),
            Action::Acknowledge => self.acknowledge().map(|()| Event::Acknowledged),
            Action::GiveUp => self.give_up().map(|()| Event::GivenUp),
            Action::Probe => Ok(Event::Probed(self.probe())),
            Action::AnswerSync(..)
            | Action::ReportFailing
            | Action::ReportRecovered
            | Action::ReportStopped
            | Action::ReportGaveUp(_) => Ok(Event::TimePassed),
        };
        result.unwrap_or_else(|fault| self.failed(fault))
    }

    fn failed(&mut self, fault: Fault) -> Event {
        if fault.error.kind() == ErrorKind::ChainBroken {
            log::warn!("{}: {}", self.config.name, fault.error);
            self.probe = Probe::Nothing;
            self.status().failure = Some(Failure::from(&fault.error));
            return Event::ChainBroken;
        }
        // A cut that was given up under our hands is seen by the next look at the tracker.
        let is_recoverable = fault.error.is_recoverable() || fault.error.kind() == ErrorKind::Cancelled;
        self.probe = fault.probe;
        self.is_registered &= fault.probe != Probe::Head;
        self.status().failure = Some(Failure::from(&fault.error));
        Event::Failed { is_recoverable, has_progressed: std::mem::take(&mut self.has_progressed) }
    }

    /// Parts that were read while marks had a gap are made again.
    fn verify_tracking(&mut self) {
        let tracking = self.outside.source.tracking_id();
        if self.cut.is_none()
            && let Some(build) = self.build.as_mut().filter(|b| b.record.tracking != tracking)
        {
            log::info!("{}: changes may have gone unseen, parts are made again", self.config.name);
            build.distrust(tracking);
            self.in_hand.clear();
        }
    }

    fn survey(&mut self) -> Result<Survey, Fault> {
        self.outside.hooks.before_cut()?;
        self.verify_tracking();
        let source = self.outside.source.clone();
        self.surveyed_at = self.outside.clock.now();
        if !source.has_changes() {
            return Ok(Survey::default());
        }
        if self.undrained && !self.drain_now()? {
            return Err(Error::new(ErrorKind::Busy, "the next cut has to wait")
                .why("a write to a disk has not ended yet")
                .hint("if it lasts, look at the device of the disk (dmesg)")
                .into());
        }
        let unmade = self.unmade(&source.pending());
        let (epochs, bytes) = self.outside.vault.backlog(self.config.vm).on_vault()?;
        let is_held_back =
            (epochs > BACKLOG_EPOCHS_MAX && bytes > BACKLOG_BYTES_MAX) || epochs > BACKLOG_EPOCHS_EVER;
        self.status().held_back = is_held_back.then_some((epochs, bytes));
        Ok(Survey {
            has_changes: true,
            unmade_bytes: build::bytes_of(&unmade),
            marked_bytes: source.marked_bytes(),
            is_held_back,
        })
    }

    fn unmade(&self, wanted: &BlocksByDisk) -> BlocksByDisk {
        self.build.as_ref().map_or_else(|| wanted.clone(), |b| b.unmade(wanted))
    }

    fn renew(&mut self) -> Result<(), Fault> {
        let as_of = self.surveyed_at;
        // A vault that was restored from an older state is not current.
        let head = self.outside.vault.head(self.config.vm).on_vault()?;
        if head.map(|h| h.digest) != self.head.map(|h| h.digest) {
            return Err(Error::new(ErrorKind::ChainBroken, "the vault has another head than before").into());
        }
        self.outside.vault.renew(self.config.vm, as_of).on_vault()?;
        let mut status = self.status();
        status.current_as_of = Some(as_of);
        status.counts.cycles += 1;
        Ok(())
    }

    /// Parts made so far are older than the cut that comes. Durable before it, if there are any.
    fn cut_comes(&mut self, is_final: bool) -> Result<()> {
        self.verify_tracking();
        if let Some(build) = self.build.as_mut().filter(|b| !b.parts.is_empty()) {
            let next = build.next_sequence();
            if is_final {
                build.record.cut_at = Some(next);
            } else {
                build.record.trusted_from = next;
                build.record.cut_at = None;
            }
            self.record.build = Some(build.record);
            self.record.save(&self.config.record_path)?;
        } else if is_final && let Some(build) = &mut self.build {
            build.record.cut_at = Some(0);
        }
        self.in_hand.clear();
        Ok(())
    }

    fn cut_live(&mut self) -> Result<(), Fault> {
        self.cut_comes(false)?;
        let cut = self.outside.source.cut(CutKind::Live, &BlocksByDisk::new(), DRAIN_PATIENCE)?;
        self.note_cut(&cut);
        Ok(())
    }

    fn cut_final(&mut self) -> Result<(), Fault> {
        self.cut_comes(true)?;
        let source = self.outside.source.clone();
        let pending = source.pending();
        let cut = source.cut(CutKind::Final, &self.unmade(&pending), DRAIN_PATIENCE)?;
        self.note_cut(&cut);
        // A whole disk that joined after its pending blocks were looked at: they have no part.
        let joined = cut.disks.iter().filter(|d| d.whole && !pending.contains_key(&d.id));
        self.uncovered = joined.map(|d| d.id).collect();
        self.status().last_cut = Some(cut.time);
        let epoch = cut.epoch;
        self.cut = Some(cut);
        if self.build.is_none() {
            self.build = Some(self.new_build(epoch, Some(0))?);
        }
        Ok(())
    }

    fn note_cut(&mut self, cut: &Cut) {
        self.undrained = true;
        self.frozen_blocks.clear();
        self.names = cut.disks.iter().map(|d| (d.id, d.path.clone())).collect();
    }

    fn drain(&mut self) -> Result<Event, Fault> {
        if !self.drain_now()? {
            return Ok(Event::Drained(false));
        }
        if self.cut.is_some() && !self.uncovered.is_empty() && !self.is_covered() {
            return Ok(Event::GaveUp);
        }
        Ok(Event::Drained(true))
    }

    /// T2: nothing is read before the writers have left. Then the cut takes its blocks out of
    /// those made before it.
    fn drain_now(&mut self) -> Result<bool, Fault> {
        if !self.undrained {
            return Ok(true);
        }
        let Some(cut) = self.outside.source.drain(DRAIN_PATIENCE)? else { return Ok(false) };
        let blocks = self.outside.source.frozen_blocks();
        if let Some(build) = &mut self.build {
            build.cut_drained(&blocks);
        }
        if self.cut.is_some() {
            self.names = cut.disks.iter().map(|d| (d.id, d.path.clone())).collect();
            self.frozen_blocks = within(blocks, &cut);
            self.cut = Some(cut);
        }
        self.undrained = false;
        Ok(true)
    }

    /// Whether every pending block has a part or is frozen, on the disks in doubt.
    fn is_covered(&mut self) -> bool {
        let mut pending = self.outside.source.pending();
        pending.retain(|disk, _| self.uncovered.contains(disk));
        if let Some(cut) = &self.cut {
            pending = within(pending, cut);
        }
        let left = build::without(&self.unmade(&pending), &self.frozen_blocks);
        self.uncovered.clear();
        left.is_empty()
    }

    /// The attempt in the names of parts that are made in this mode.
    pub(super) fn attempt(&self, mode: Mode) -> u32 {
        match (mode, &self.cut) {
            (Mode::Frozen, Some(cut)) => cut_tag(cut),
            _ => self.attempt,
        }
    }

    /// The blocks of the frozen epoch that have no part.
    pub(super) fn frozen_unmade(&self) -> BlocksByDisk {
        self.unmade(&self.frozen_blocks)
    }

    /// The pending blocks that have no part, and the build that they go to.
    pub(super) fn live_unmade(&mut self) -> Result<BlocksByDisk, Fault> {
        self.verify_tracking();
        if self.build.is_none() {
            let build = self.new_build(self.record.source_epoch().next(), None)?;
            self.record.build = Some(build.record);
            self.record.save(&self.config.record_path)?;
            self.build = Some(build);
        }
        Ok(self.unmade(&self.outside.source.pending()))
    }

    /// Paths of the disks, for messages.
    pub(super) fn names(&self) -> BTreeMap<DiskId, PathBuf> {
        self.names.clone()
    }

    fn commit(&mut self) -> Result<Event, Fault> {
        let manifest = self.manifest()?;
        let digest = manifest.digest()?;
        let sent_bytes = self.build.as_ref().map_or(0, Build::sent_bytes);
        let delivered = Delivered {
            epoch: manifest.epoch,
            digest,
            point: crate::base::PointId::new(manifest.epoch, &digest),
            kind: manifest.kind,
            cut_time: manifest.cut_time,
            durable_time: manifest.cut_time,
            changed_bytes: manifest.changed_bytes,
            sent_bytes,
        };
        let source_epoch = self.cut.as_ref().map_or(manifest.epoch, |c| c.epoch);
        let entry = Committing { source_epoch, delivered };
        self.record.build = self.build.as_ref().map(|b| b.record);
        if self.record.will_commit(entry) {
            self.record.save(&self.config.record_path)?;
        }
        // T5: asked after the last read and before the commit.
        if self.outside.source.has_given_up() {
            return Ok(Event::GaveUp);
        }
        // A part that the vault does not have as we think: look again at what it has.
        let looks_again = |e: Error| match e.kind() {
            ErrorKind::Damaged | ErrorKind::NotFound => e.with_kind(ErrorKind::ChainBroken),
            _ => e,
        };
        let head = self.outside.vault.commit(self.config.vm, &manifest).map_err(looks_again).on_vault()?;
        if head.digest != digest {
            return Err(Error::new(ErrorKind::ChainBroken, "the vault committed another epoch").into());
        }
        self.head = Some(head);
        self.committed = Some(entry);
        self.has_progressed = true;
        Ok(Event::Committed)
    }

    fn manifest(&self) -> Result<Manifest> {
        let (Some(cut), Some(build)) = (&self.cut, &self.build) else {
            return Err(Error::new(ErrorKind::Internal, "there is no cut to commit"));
        };
        let parent = self.head.map(|h| h.digest);
        let definition = self.outside.hooks.definition();
        let identity = (self.config.vm, self.config.name.clone(), self.config.generation);
        Ok(super::commit::manifest(cut, build, parent, identity, definition))
    }

    fn acknowledge(&mut self) -> Result<(), Fault> {
        let (Some(cut), Some(mut entry)) = (self.cut.clone(), self.committed) else {
            return Err(Error::new(ErrorKind::Internal, "there is no epoch to acknowledge").into());
        };
        entry.delivered.durable_time = self.outside.clock.now();
        self.record.delivered = Some(entry.delivered);
        self.record.base = Some(Base { head: Some(entry.delivered.digest) });
        // Once the tracker has forgotten the epoch, no older head is sound any more: that is
        // durable before it forgets, or a vault restored from an older state would pass for sound
        // after a restart.
        self.record.committing.retain(|c| c.delivered.digest == entry.delivered.digest);
        self.record.build = None;
        self.record.save(&self.config.record_path)?;
        self.outside.source.acknowledge(cut.epoch)?;
        self.forget_build();
        (self.cut, self.committed, self.undrained) = (None, None, false);
        self.show_delivered(&entry.delivered);
        super::commit::count(&mut self.status().counts, &entry.delivered);
        self.outside.observer.epoch_committed(self.config.vm, &entry.delivered);
        Ok(())
    }

    /// T4, T5: the blocks go on as pending; parts made of the frozen epoch stay.
    fn give_up(&mut self) -> Result<(), Fault> {
        let figures = self.outside.source.figures();
        let preserved = figures.iter().map(|(_, f)| f.preserved).sum();
        self.outside.source.give_up()?;
        self.status().preserved_needed = Some(preserved);
        if let Some(build) = &mut self.build {
            let cut_at = build.record.cut_at.take().unwrap_or(0);
            build.record.trusted_from = build.record.trusted_from.max(cut_at);
            self.record.build = (!build.parts.is_empty()).then_some(build.record);
            self.record.save(&self.config.record_path)?;
        }
        self.in_hand.clear();
        self.frozen_blocks.clear();
        self.uncovered.clear();
        self.cut = None;
        Ok(())
    }

    /// Whether the cause of the last failure is gone, as far as a cheap question can tell.
    fn probe(&self) -> bool {
        match self.probe {
            Probe::Nothing => false,
            Probe::Head => self.outside.vault.head(self.config.vm).is_ok(),
            Probe::Space => self.outside.vault.space().is_ok_and(|s| s.free_bytes >= SPACE_PROBE_BYTES),
            Probe::Block(disk, block) => {
                let mut buffer = vec![0; BLOCK_BYTES as usize];
                self.outside.source.read_live(disk, block..block + 1, &mut buffer).is_ok()
            }
        }
    }

    /// Whether somebody wants a transfer to end.
    pub(super) fn is_interrupted(&self) -> bool {
        self.interrupt.load(Ordering::Relaxed)
    }
}

/// What the parts of a frozen epoch have as their attempt: whoever made them, they are as of
/// this cut.
pub(super) fn cut_tag(cut: &Cut) -> u32 {
    let digest = Digest::of(format!("{} {}", cut.epoch, cut.time.0).as_bytes());
    let [a, b, c, d, ..] = *digest.as_bytes();
    u32::from_be_bytes([a, b, c, d])
}

/// The blocks that lie within the disks of a cut (T10: those beyond the end are not sent).
fn within(blocks: BlocksByDisk, cut: &Cut) -> BlocksByDisk {
    let size = |disk: &DiskId| cut.disks.iter().find(|d| d.id == *disk).map_or(0, |d| d.size);
    let cropped = blocks.into_iter().map(|(disk, set)| {
        let end = size(&disk).div_ceil(BLOCK_BYTES);
        (disk, set.overlaps(0..end).collect::<ExtentSet>())
    });
    cropped.filter(|(_, set)| !set.is_empty()).collect()
}
