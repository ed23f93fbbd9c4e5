//! What the shipper remembers of a VM: a small file, `STATE/vms/<uuid>.ship.json`.
//!
//! It answers one question after a restart: is the vault's head ours, so that what the tracker
//! has marked or pending is all that the head lacks?
//!
//! - `base`: the head that marks and pending blocks are counted from.
//! - `committing`: manifests that were about to be committed since. Written before the commit;
//!   one of them may be the head without our knowing it (a lost reply, a kill, a late message).
//! - `build`: the unfinished epoch whose parts in the vault may be used again.
//!
//! Killed before it is written: the old one is there, and what it says is still true: an epoch
//! that is not in `committing` was not committed. Killed after: an entry of `committing` that
//! is not the head means nothing. Before an epoch is acknowledged to the tracker its manifest
//! becomes the base, so that a vault that was restored from an older state is found out. No
//! space for it: commit and acknowledgement wait, as for any other recoverable error. Written by a
//! newer version, or unreadable: it counts as missing, and the disks ship whole; points stay.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::base::limits::DOCUMENT_BYTES_MAX;
use crate::base::{Digest, EpochNumber, Error, ErrorKind, Result, VmId, durable};
use crate::core::ports::source::Cut;
use crate::core::ports::vault::Head;
use crate::ship::status::Delivered;

/// Version of the format.
pub(super) const RECORD_FORMAT: u32 = 1;
/// Manifests remembered as about to be committed, at most.
const COMMITTING_MAX: usize = 16;

/// The head that the tracker's marks are counted from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Base {
    /// Digest of its manifest; none: a vault without epochs.
    pub(super) head: Option<Digest>,
}

/// A manifest that was about to be committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Committing {
    /// The tracker's number of its cut.
    pub(super) source_epoch: EpochNumber,
    /// What it would be in the vault.
    pub(super) delivered: Delivered,
}

/// The unfinished epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct BuildRecord {
    /// Its number in the vault.
    pub(super) number: EpochNumber,
    /// What the tracker's marks were known by ([`Source::tracking_id`]) when it was read: under
    /// another number, blocks may have changed since without a mark.
    ///
    /// [`Source::tracking_id`]: crate::core::ports::source::Source::tracking_id
    pub(super) tracking: u64,
    /// Parts from this sequence on hold what they describe; of older ones it is not known any
    /// more which of their blocks were marked again.
    pub(super) trusted_from: u32,
    /// Parts from this sequence on were read after the final cut, older ones before it.
    pub(super) cut_at: Option<u32>,
}

/// The record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    format: u32,
    vm: VmId,
    /// None: nothing is known; the disks ship whole.
    pub(super) base: Option<Base>,
    /// See the module documentation. Oldest first.
    pub(super) committing: Vec<Committing>,
    /// See the module documentation.
    pub(super) build: Option<BuildRecord>,
    /// The newest epoch that is known durable.
    pub(super) delivered: Option<Delivered>,
}

impl Record {
    /// A record that knows nothing.
    pub(super) fn new(vm: VmId) -> Self {
        Self { format: RECORD_FORMAT, vm, base: None, committing: Vec::new(), build: None, delivered: None }
    }

    /// Reads the record; one that is missing, damaged, of another version or of another VM
    /// counts as empty, and the reason is returned.
    pub(super) fn load(path: &Path, vm: VmId) -> Result<(Self, Option<String>)> {
        let Some(bytes) = durable::read_limited(path, DOCUMENT_BYTES_MAX)? else {
            return Ok((Self::new(vm), None));
        };
        let why = match serde_json::from_slice::<Self>(&bytes) {
            Ok(record) if record.format == RECORD_FORMAT && record.vm == vm => return Ok((record, None)),
            Ok(record) if record.vm != vm => format!("it is of VM {}", record.vm),
            Ok(record) => format!("it has format {}, this program knows {RECORD_FORMAT}", record.format),
            Err(e) => e.to_string(),
        };
        Ok((Self::new(vm), Some(format!("{} cannot be used: {why}", path.display()))))
    }

    /// Makes it durable.
    pub(super) fn save(&self, path: &Path) -> Result<()> {
        let bytes = serde_json::to_vec_pretty(self).map_err(|e| {
            Error::new(ErrorKind::Internal, "the shipper's record cannot be written").source(e)
        })?;
        // A missing folder is no missing VM: it is tried again.
        durable::write_atomic(path, &bytes).map_err(|e| match e.kind() {
            ErrorKind::NotFound => e.with_kind(ErrorKind::Io),
            _ => e,
        })
    }

    /// Remembers a manifest that is about to be committed. Returns whether that is news.
    pub(super) fn will_commit(&mut self, entry: Committing) -> bool {
        if self.committing.iter().any(|c| c.delivered.digest == entry.delivered.digest) {
            return false;
        }
        if self.committing.len() >= COMMITTING_MAX {
            self.committing.remove(0);
        }
        self.committing.push(entry);
        true
    }

    /// The newest epoch number of the tracker that is known.
    pub(super) fn source_epoch(&self) -> EpochNumber {
        self.committing.iter().map(|c| c.source_epoch).max().unwrap_or(EpochNumber(0))
    }
}

/// What the vault's head means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is the one that marks are counted from.
    Sound,
    /// It is the frozen epoch, committed without our knowing it: acknowledge it.
    IsFrozen(Committing),
    /// It is an epoch of ours whose blocks are acknowledged, or pending once more: go on from it.
    IsOurs(Committing),
    /// It is not known: the disks ship whole, with it as the parent. Why.
    IsUnknown(&'static str),
}

/// Judges the head. The rows are tried in order; the last one matches everything.
pub(super) fn judge(head: Option<&Head>, record: &Record, frozen: Option<&Cut>) -> Verdict {
    let digest = head.map(|h| h.digest);
    let ours = record.committing.iter().find(|c| Some(c.delivered.digest) == digest);
    match (ours, record.base) {
        (Some(entry), _) if frozen.is_some_and(|cut| cut.epoch == entry.source_epoch) => {
            Verdict::IsFrozen(*entry)
        }
        // Its cut was given up after the commit was sent: its blocks are pending, and shipped
        // once more they do no harm. Or it is acknowledged and forgotten.
        (Some(entry), _) => Verdict::IsOurs(*entry),
        (None, Some(base)) if base.head == digest => Verdict::Sound,
        (None, Some(_)) if digest.is_none() => Verdict::IsUnknown("the vault has lost all epochs of this VM"),
        (None, Some(_)) => Verdict::IsUnknown("the newest epoch in the vault is not one that was sent last"),
        (None, None) if digest.is_none() => Verdict::IsUnknown("the vault has no epoch of this VM yet"),
        (None, None) => Verdict::IsUnknown("it is not known what the vault has of this VM"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::{PointId, Timestamp};
    use crate::format::manifest::EpochKind;

    fn entry(epoch: u64) -> Committing {
        let digest = Digest::of(&epoch.to_le_bytes());
        let delivered = Delivered {
            epoch: EpochNumber(epoch),
            digest,
            point: PointId::new(EpochNumber(epoch), &digest),
            kind: EpochKind::Delta,
            cut_time: Timestamp(1),
            durable_time: Timestamp(2),
            changed_bytes: 3,
            sent_bytes: 4,
        };
        Committing { source_epoch: EpochNumber(epoch), delivered }
    }

    fn head(epoch: u64) -> Head {
        let d = entry(epoch).delivered;
        Head { epoch: d.epoch, digest: d.digest, cut_time: d.cut_time }
    }

    fn cut(epoch: u64) -> Cut {
        Cut { epoch: EpochNumber(epoch), time: Timestamp(1), disks: vec![] }
    }

    #[test]
    fn each_head_has_one_row() {
        let mut record = Record::new(VmId(1));
        let unknown = |v| matches!(v, Verdict::IsUnknown(_));
        assert!(unknown(judge(None, &record, None)));
        assert!(unknown(judge(Some(&head(1)), &record, None)));
        record.base = Some(Base { head: None });
        assert_eq!(judge(None, &record, None), Verdict::Sound);
        record.base = Some(Base { head: Some(head(5).digest) });
        assert_eq!(judge(Some(&head(5)), &record, Some(&cut(6))), Verdict::Sound);
        assert!(unknown(judge(None, &record, None)));
        assert!(unknown(judge(Some(&head(7)), &record, None)));
        assert!(record.will_commit(entry(6)) && !record.will_commit(entry(6)));
        assert_eq!(judge(Some(&head(6)), &record, Some(&cut(6))), Verdict::IsFrozen(entry(6)));
        assert_eq!(judge(Some(&head(6)), &record, Some(&cut(7))), Verdict::IsOurs(entry(6)));
        assert_eq!(judge(Some(&head(6)), &record, None), Verdict::IsOurs(entry(6)));
        assert_eq!(judge(Some(&head(5)), &record, Some(&cut(6))), Verdict::Sound);
    }

    #[test]
    fn a_record_of_another_vm_or_version_or_none_counts_as_empty() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.json");
        assert_eq!(Record::load(&path, VmId(1)).unwrap(), (Record::new(VmId(1)), None));
        let mut record = Record::new(VmId(1));
        record.will_commit(entry(3));
        record.save(&path).unwrap();
        assert_eq!(Record::load(&path, VmId(1)).unwrap(), (record.clone(), None));
        assert!(Record::load(&path, VmId(2)).unwrap().1.unwrap().contains("of VM"));
        record.format = 2;
        record.save(&path).unwrap();
        assert!(Record::load(&path, VmId(1)).unwrap().1.unwrap().contains("format 2"));
        std::fs::write(&path, b"{").unwrap();
        assert_eq!(Record::load(&path, VmId(1)).unwrap().0, Record::new(VmId(1)));
    }

    #[test]
    fn the_list_of_possible_commits_is_bounded() {
        let mut record = Record::new(VmId(1));
        (0..100).for_each(|n| assert!(record.will_commit(entry(n))));
        assert_eq!(record.committing.len(), COMMITTING_MAX);
        assert_eq!(record.source_epoch(), EpochNumber(99));
    }
}
