//! Every way back into the work: after a start, a failure, a pause, a refused commit.
//!
//! The vault is asked for its head first, and what it says is judged (`record.rs`). Then the
//! parts of the unfinished epoch are taken over: as we remember them, or as a predecessor left
//! them. What is not known to be right is read once more.

use crate::base::{EpochNumber, ErrorKind};
use crate::core::epoch::Found;
use crate::core::ports::source::Cut;
use crate::format::part::{PartIndex, StoredPart};
use crate::ship::build::{self, Build};
use crate::ship::engine::{Engine, Fault, OnVault, cut_tag};
use crate::ship::record::{Base, BuildRecord, Committing, Verdict, judge};
use crate::ship::status::Delivered;

impl Engine {
    /// The head first: is it ours? Then what the unfinished epoch has in the vault.
    pub(super) fn recover(&mut self) -> Result<Found, Fault> {
        let (vm, vault) = (self.config.vm, self.outside.vault.clone());
        if !self.is_registered {
            vault.register(vm, &self.config.name).on_vault()?;
            self.is_registered = true;
        }
        self.head = vault.head(vm).on_vault()?;
        let mut frozen = self.outside.source.frozen();
        if frozen.is_none() && self.outside.source.has_given_up() {
            // A writer's give-up that a predecessor did not complete.
            self.outside.source.give_up()?;
        }
        match judge(self.head.as_ref(), &self.record, frozen.as_ref()) {
            Verdict::Sound => {}
            Verdict::IsFrozen(entry) => {
                self.committed = Some(entry);
                self.cut = frozen;
                return Ok(Found::Committed);
            }
            Verdict::IsOurs(entry) => self.take_head(&entry),
            Verdict::IsUnknown(why) => {
                self.ship_whole(why, frozen.is_some())?;
                frozen = None;
            }
        }
        if let Some(delivered) = self.record.delivered
            && self.status().last_delivered.is_none()
        {
            self.show_delivered(&delivered);
        }
        self.status().is_initial = self.head.is_none();
        self.restore_build(frozen.as_ref())?;
        self.cut = frozen;
        Ok(if self.cut.is_some() { Found::Frozen } else { Found::NothingFrozen })
    }

    /// The chain is broken, or begins: every disk ships whole, and the head is the parent.
    fn ship_whole(&mut self, why: &str, is_frozen: bool) -> Result<(), Fault> {
        log::info!("{}: all disks are sent whole: {why}", self.config.name);
        if is_frozen {
            self.outside.source.give_up()?;
        }
        self.outside.source.ship_whole(why)?;
        // Whatever was built is not counted from this head.
        let number = self.record.build.map(|b| b.number).or(self.build.as_ref().map(Build::number));
        if let Some(number) = number
            && let Err(e) = self.outside.vault.abandon(self.config.vm, number)
        {
            log::warn!("{}: parts of epoch {number} stay in the vault: {e}", self.config.name);
        }
        self.forget_build();
        self.undrained = is_frozen || self.undrained;
        self.record.base = Some(Base { head: self.head.map(|h| h.digest) });
        self.record.committing.clear();
        self.record.build = None;
        self.record.save(&self.config.record_path)?;
        self.outside.observer.ships_whole(self.config.vm, why);
        Ok(())
    }

    /// An epoch of ours is the head.
    fn take_head(&mut self, entry: &Committing) {
        self.record.base = Some(Base { head: Some(entry.delivered.digest) });
        self.record.delivered = Some(entry.delivered);
        self.show_delivered(&entry.delivered);
    }

    pub(super) fn show_delivered(&self, delivered: &Delivered) {
        let mut status = self.status();
        status.last_delivered = Some(*delivered);
        status.is_initial = false;
        status.current_as_of = status.current_as_of.max(Some(delivered.cut_time));
    }

    pub(super) fn forget_build(&mut self) {
        self.build = None;
        self.in_hand.clear();
        self.frozen_blocks.clear();
        self.uncovered.clear();
    }

    /// What has parts in the vault: as we remember it, or as a predecessor left it there.
    fn restore_build(&mut self, frozen: Option<&Cut>) -> Result<(), Fault> {
        let (vm, vault) = (self.config.vm, self.outside.vault.clone());
        let head = self.head;
        let newer = |number| head.is_none_or(|h| number > h.epoch);
        if self.build.as_ref().is_some_and(|b| !newer(b.number())) {
            self.forget_build();
            self.undrained |= frozen.is_some();
        }
        let mut record =
            self.build.as_ref().map(|b| b.record).or(self.record.build.filter(|b| newer(b.number)));
        if record.is_none()
            && let Some(cut) = frozen
        {
            let number = self.number_after(cut.epoch);
            let tracking = self.outside.source.tracking_id();
            record = Some(BuildRecord { number, tracking, trusted_from: 0, cut_at: Some(0) });
        }
        let is_remembered = self.build.is_some() || self.record.build.is_some_and(|b| newer(b.number));
        let Some(mut record) = record else { return Ok(()) };
        let tracking = self.outside.source.tracking_id();
        let is_trusted = record.tracking == tracking;
        if !is_trusted && frozen.is_none() {
            vault.abandon(vm, record.number).on_vault()?;
            self.forget_build();
            self.record.build = None;
            return Ok(());
        }
        let tag = frozen.map(cut_tag);
        let mut stored = vault.parts(vm, record.number).on_vault()?;
        // Without a record of it, only what this cut left there can be taken.
        if !is_remembered && stored.iter().any(|p| Some(p.name.attempt) != tag) {
            vault.abandon(vm, record.number).on_vault()?;
            stored.clear();
        }
        if self.build.as_mut().is_some_and(|b| b.equals(&stored, &mut self.in_hand)) {
            return Ok(());
        }
        if frozen.is_none() {
            // The cut, if it was made, was given up: which blocks it had is not known.
            record.trusted_from = record.trusted_from.max(record.cut_at.take().unwrap_or(0));
        }
        if !is_trusted {
            // Those of the frozen epoch are as of its cut, whatever came after.
            record.trusted_from = stored.last().map_or(0, |p| p.name.sequence.saturating_add(1));
            record.tracking = tracking;
        }
        let indexes = self.indexes(record.number, &stored)?;
        if indexes.is_none() {
            // All of it is made again, from the first part on.
            (record.trusted_from, record.cut_at) = (0, frozen.map(|_| 0));
            stored.clear();
        }
        let mut build = Build::new(record);
        for (part, index) in stored.into_iter().zip(indexes.iter().flatten()) {
            build.restore(part, index, tag);
        }
        self.in_hand.clear();
        self.frozen_blocks.clear();
        self.undrained |= frozen.is_some();
        self.uncovered = self.outside.source.pending().into_keys().collect();
        self.build = Some(build);
        Ok(())
    }

    /// What the parts hold. `None`: one is damaged, and all are thrown away.
    fn indexes(&self, epoch: EpochNumber, stored: &[StoredPart]) -> Result<Option<Vec<PartIndex>>, Fault> {
        let (vm, vault) = (self.config.vm, &self.outside.vault);
        let mut indexes = Vec::new();
        for part in stored {
            let index = vault.part_index(vm, epoch, part).and_then(|bytes| build::decode_index(&bytes, part));
            match index {
                Ok(index) => indexes.push(index),
                Err(e) if e.kind() == ErrorKind::Damaged => {
                    log::warn!("{}: the parts of epoch {epoch} are sent again: {e}", self.config.name);
                    vault.abandon(vm, epoch).on_vault()?;
                    return Ok(None);
                }
                Err(e) => return Err(e).on_vault(),
            }
        }
        Ok(Some(indexes))
    }

    /// The number in the vault of an epoch whose cut is not older than `epoch`.
    pub(super) fn number_after(&self, epoch: EpochNumber) -> EpochNumber {
        self.head.map_or(epoch, |h| epoch.max(h.epoch.next()))
    }

    /// An epoch without parts. What a predecessor left under its number is thrown away: nothing
    /// is known of it.
    pub(super) fn new_build(&self, epoch: EpochNumber, cut_at: Option<u32>) -> Result<Build, Fault> {
        let (vm, number) = (self.config.vm, self.number_after(epoch));
        if !self.outside.vault.parts(vm, number).on_vault()?.is_empty() {
            self.outside.vault.abandon(vm, number).on_vault()?;
        }
        let tracking = self.outside.source.tracking_id();
        Ok(Build::new(BuildRecord { number, tracking, trusted_from: 0, cut_at }))
    }
}
