//! What to do with a disk when the daemon starts: one exhaustive, labelled table.
//!
//! The image is the truth; nothing is ever replayed onto a disk. Every combination of facts
//! matches exactly one row of [`START_CASES`] (a test goes through all of them), and each row says
//! why. Whether the vault's head is the one that is known is asked by the shipper, which then
//! makes disks whole by itself; here it is a fact so that the table says so.

/// Shared memory of this boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SharedMemory {
    /// Present, with a layout that is known.
    Present,
    /// Present, with a layout that is not known.
    UnknownLayout,
    /// None: the power was lost, the machine was started again, or it was never there.
    Absent,
}

/// How the last daemon ended, by the record it left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LastStop {
    /// It left none.
    Unclean,
    /// Size, mtime, ctime and inode of the disk are those recorded.
    CleanAndSame,
    /// They are not.
    CleanButDiffers,
}

/// The hot-region log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HotLogState {
    /// The one that was in use, as new as it was.
    Good,
    /// None, or damaged.
    Missing,
    /// That of another state folder.
    Foreign,
    /// An earlier one: restored from a backup.
    Older,
}

/// Whether the vault knows the newest epoch that was acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VaultHead {
    /// Not asked yet.
    NotAsked,
    /// It does.
    Known,
    /// It does not.
    Unknown,
}

/// Everything that counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StartFacts {
    /// The disk was not protected before.
    pub is_fresh: bool,
    /// Shared memory of the VM and the disk.
    pub shared_memory: SharedMemory,
    /// Shared memory says that blocks were known to the dead process only.
    pub lost_with_process: bool,
    /// Modified later than the last sign of life of a tracker.
    pub changed_beneath: bool,
    /// Modified later than this boot began.
    pub changed_since_boot: bool,
    /// How the last daemon ended.
    pub last_stop: LastStop,
    /// The disk file carries the untracked mark (T8).
    pub is_untracked: bool,
    /// The hot-region log.
    pub hot_log: HotLogState,
    /// Everything that was synced in the HRLs can be read.
    pub hrls_readable: bool,
    /// The vault.
    pub head: VaultHead,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StartDecision {
    /// Go on with the maps in shared memory.
    GoOn,
    /// Changed is what the HRLs say.
    Durable,
    /// Changed is what the HRLs say, and every block of every hot region.
    DurableAndHot,
    /// The disk is compared, or ships, whole.
    Whole,
}

/// A row of the table.
pub struct StartCase {
    /// Its name, stable.
    pub label: &'static str,
    /// Why, in words.
    pub reason: &'static str,
    /// What to do.
    pub decision: StartDecision,
    matches: fn(&StartFacts) -> bool,
}

use HotLogState as Log;
use LastStop as Stop;
use SharedMemory as Shm;
use StartDecision::{Durable, DurableAndHot, GoOn, Whole};

/// It was protected before, and the vault does not say that it lacks it.
fn known(f: &StartFacts) -> bool {
    !f.is_fresh && f.head != VaultHead::Unknown
}

/// Shared memory is there.
fn present(f: &StartFacts) -> bool {
    known(f) && f.shared_memory == Shm::Present
}

/// Shared memory is there, and nobody wrote past the tracker.
fn undisturbed(f: &StartFacts) -> bool {
    present(f) && !f.changed_beneath && f.last_stop != Stop::CleanButDiffers
}

/// Only what is on disk is left.
fn absent(f: &StartFacts) -> bool {
    known(f) && f.shared_memory == Shm::Absent
}

/// Only what is on disk is left, and it is whole.
fn absent_whole(f: &StartFacts) -> bool {
    absent(f) && f.last_stop != Stop::CleanButDiffers && !f.is_untracked && f.hrls_readable
}

/// The power was lost while the tracker ran, and nobody has touched the disk since.
fn power_lost(f: &StartFacts) -> bool {
    absent_whole(f) && f.last_stop == Stop::Unclean && !f.changed_since_boot
}

/// The table. Each row says why.
pub const START_CASES: &[StartCase] = &[
    StartCase {
        label: "fresh",
        reason: "the disk was not protected before",
        decision: Whole,
        matches: |f| f.is_fresh,
    },
    StartCase {
        label: "head-unknown",
        reason: "the vault does not know the newest epoch that was acknowledged",
        decision: Whole,
        matches: |f| !f.is_fresh && f.head == VaultHead::Unknown,
    },
    StartCase {
        label: "shared-memory",
        reason: "the daemon ended and the kernel did not: its block maps are in shared memory",
        decision: GoOn,
        matches: |f| undisturbed(f) && f.hrls_readable && !f.lost_with_process,
    },
    StartCase {
        label: "lost-with-process",
        reason: "blocks were known to the dead daemon only, because its change-tracking log could not be written",
        decision: Whole,
        matches: |f| undisturbed(f) && f.lost_with_process,
    },
    StartCase {
        label: "shared-memory-log-damaged",
        reason: "a change-tracking log beside the disk is damaged",
        decision: Whole,
        matches: |f| undisturbed(f) && !f.lost_with_process && !f.hrls_readable,
    },
    StartCase {
        label: "changed-beneath",
        reason: "the disk was modified while no daemon tracked it",
        decision: Whole,
        matches: |f| present(f) && f.last_stop != Stop::CleanButDiffers && f.changed_beneath,
    },
    StartCase {
        label: "changed-after-stop",
        reason: "size, time or inode of the disk differ from those recorded at the clean stop",
        decision: Whole,
        matches: |f| present(f) && f.last_stop == Stop::CleanButDiffers,
    },
    StartCase {
        label: "unknown-layout",
        reason: "shared memory has a layout that this version does not know",
        decision: Whole,
        matches: |f| known(f) && f.shared_memory == Shm::UnknownLayout,
    },
    StartCase {
        label: "off-changed",
        reason: "the disk differs from what was recorded at the clean stop",
        decision: Whole,
        matches: |f| absent(f) && f.last_stop == Stop::CleanButDiffers,
    },
    StartCase {
        label: "untracked",
        reason: "the disk carries the untracked mark: an activation had failed",
        decision: Whole,
        matches: |f| absent(f) && f.last_stop != Stop::CleanButDiffers && f.is_untracked,
    },
    StartCase {
        label: "log-damaged",
        reason: "a change-tracking log beside the disk is damaged",
        decision: Whole,
        matches: |f| absent(f) && f.last_stop != Stop::CleanButDiffers && !f.is_untracked && !f.hrls_readable,
    },
    StartCase {
        label: "clean-stop",
        reason: "the daemon had stopped cleanly, and the disk is as it left it",
        decision: Durable,
        matches: |f| absent_whole(f) && f.last_stop == Stop::CleanAndSame,
    },
    StartCase {
        label: "changed-since-boot",
        reason: "the disk was modified after this boot and before the daemon",
        decision: Whole,
        matches: |f| absent_whole(f) && f.last_stop == Stop::Unclean && f.changed_since_boot,
    },
    StartCase {
        label: "power-lost",
        reason: "the power was lost: what is marked durably or lay in a hot region may have changed",
        decision: DurableAndHot,
        matches: |f| power_lost(f) && f.hot_log == Log::Good,
    },
    StartCase {
        label: "hot-log-missing",
        reason: "the hot-region log is missing or damaged",
        decision: Whole,
        matches: |f| power_lost(f) && f.hot_log == Log::Missing,
    },
    StartCase {
        label: "hot-log-foreign",
        reason: "the hot-region log belongs to another state folder",
        decision: Whole,
        matches: |f| power_lost(f) && f.hot_log == Log::Foreign,
    },
    StartCase {
        label: "hot-log-older",
        reason: "the hot-region log is older than the one that was in use",
        decision: Whole,
        matches: |f| power_lost(f) && f.hot_log == Log::Older,
    },
];

/// The row that matches. Should none do (the test says that one does), the disk is whole.
pub fn decide(facts: &StartFacts) -> (&'static str, &'static str, StartDecision) {
    START_CASES
        .iter()
        .find(|case| (case.matches)(facts))
        .map_or(("none", "no rule covers what was found", Whole), |c| (c.label, c.reason, c.decision))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all_facts() -> Vec<StartFacts> {
        let bools = [false, true];
        let mut all = vec![];
        for bits in 0u32..64 {
            let bit = |n: u32| bools[(bits >> n & 1) as usize];
            for shared_memory in [Shm::Present, Shm::UnknownLayout, Shm::Absent] {
                for last_stop in [Stop::Unclean, Stop::CleanAndSame, Stop::CleanButDiffers] {
                    for hot_log in [Log::Good, Log::Missing, Log::Foreign, Log::Older] {
                        for head in [VaultHead::NotAsked, VaultHead::Known, VaultHead::Unknown] {
                            all.push(StartFacts {
                                is_fresh: bit(0),
                                shared_memory,
                                lost_with_process: bit(1),
                                changed_beneath: bit(2),
                                changed_since_boot: bit(3),
                                last_stop,
                                is_untracked: bit(4),
                                hot_log,
                                hrls_readable: bit(5),
                                head,
                            });
                        }
                    }
                }
            }
        }
        all
    }

    #[test]
    fn every_combination_of_facts_matches_exactly_one_row_and_every_row_is_reached() {
        let mut reached = std::collections::BTreeSet::new();
        for facts in all_facts() {
            let labels: Vec<_> =
                START_CASES.iter().filter(|c| (c.matches)(&facts)).map(|c| c.label).collect();
            assert_eq!(labels.len(), 1, "{facts:?}: {labels:?}");
            reached.extend(labels);
        }
        assert_eq!(reached.len(), START_CASES.len());
    }

    #[test]
    fn nothing_but_whole_without_shared_memory_and_a_good_log_after_an_unclean_stop() {
        for facts in all_facts() {
            let (label, _, decision) = decide(&facts);
            let has_proof = match decision {
                Whole => true,
                GoOn => facts.shared_memory == Shm::Present && !facts.changed_beneath,
                Durable => facts.last_stop == Stop::CleanAndSame && !facts.is_untracked,
                DurableAndHot => facts.hot_log == Log::Good && !facts.is_untracked && facts.hrls_readable,
            };
            assert!(has_proof, "{label}: {facts:?}");
        }
    }
}
