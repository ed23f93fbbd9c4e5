//! The manifest of a built epoch, and the figures of a committed one.

use crate::base::{Digest, VmId, VmName};
use crate::core::ports::source::Cut;
use crate::format::manifest::{
    Consistency, DefinitionFile, EpochKind, MANIFEST_FORMAT, Manifest, ManifestDisk,
};
use crate::ship::build::Build;
use crate::ship::status::{Counts, Delivered};

/// The manifest that commits `build` as of `cut`. An epoch is full when every disk is whole.
pub(super) fn manifest(
    cut: &Cut,
    build: &Build,
    parent: Option<Digest>,
    (vm, name, generation): (VmId, VmName, u64),
    definition: Vec<DefinitionFile>,
) -> Manifest {
    let is_full = !cut.disks.is_empty() && cut.disks.iter().all(|d| d.whole);
    let disk = |d: &crate::core::ports::source::CutDisk| ManifestDisk {
        id: d.id,
        path: d.path.clone(),
        size: d.size,
        whole: d.whole,
        backing: d.backing.clone(),
    };
    Manifest {
        format: MANIFEST_FORMAT,
        vm,
        name,
        generation,
        epoch: build.number(),
        kind: if is_full { EpochKind::Full } else { EpochKind::Delta },
        parent,
        cut_time: cut.time,
        consistency: Consistency::Crash,
        disks: cut.disks.iter().map(disk).collect(),
        parts: build.parts.iter().map(|p| p.stored).collect(),
        changed_bytes: build.changed_bytes(&cut.disks),
        definition,
        key_id: 0,
    }
}

/// Counts a committed epoch.
pub(super) fn count(counts: &mut Counts, delivered: &Delivered) {
    let latency = delivered.durable_time.since(delivered.cut_time).as_millis();
    let latency = u64::try_from(latency).unwrap_or(u64::MAX);
    counts.cycles += 1;
    counts.epochs += 1;
    counts.sent_bytes = counts.sent_bytes.saturating_add(delivered.sent_bytes);
    counts.changed_bytes = counts.changed_bytes.saturating_add(delivered.changed_bytes);
    counts.changed_bytes_max = counts.changed_bytes_max.max(delivered.changed_bytes);
    counts.latency_ms = counts.latency_ms.saturating_add(latency);
    counts.latency_ms_max = counts.latency_ms_max.max(latency);
}
