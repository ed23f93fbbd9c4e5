//! Frozen epochs against an independent journal: random changes from several threads, cuts,
//! kills and losses of power, on real files.

mod tracker_rig;

use std::os::unix::fs::FileExt;
use std::time::Duration;

use afterimage::base::{BootId, DiskId, ErrorKind};
use afterimage::core::ports::source::{BlocksByDisk, CutKind, Source};
use afterimage::core::ports::tracking::{Change, TrackedDisk};
use tracker_rig::{BLOCK, Rig};

const PATIENCE: Duration = Duration::from_secs(20);

/// Every cut equals the journal: writers pause at each cut, so the file is its own oracle; then
/// they go on while the frozen epoch is read.
#[test]
fn each_frozen_epoch_equals_the_disk_as_of_its_cut() {
    for seed in [0, 2, 3] {
        let mut rig = Rig::new(seed, 3 << 20);
        rig.open(BootId(1), true);
        rig.ship_everything();
        for _ in 0..6 {
            rig.change(40);
            rig.cut_and_check(true);
        }
    }
}

/// Writers never pause: what was acknowledged before the cut is in it, what was issued after the
/// cut returned is not.
#[test]
fn cuts_under_load_are_between_acknowledged_and_issued() {
    let mut rig = Rig::new(99, 4 << 20);
    rig.open(BootId(1), true);
    rig.ship_everything();
    rig.under_load(12);
}

/// Killed at some point (nothing is stopped, same boot): nothing is lost, no disk is whole.
#[test]
fn a_kill_loses_nothing_and_makes_no_disk_whole() {
    for seed in [10, 11] {
        let mut rig = Rig::new(seed, 3 << 20);
        rig.open(BootId(1), true);
        rig.ship_everything();
        for round in 0..4 {
            rig.change(30);
            if round % 2 == 0 {
                // Killed while an epoch is frozen, half of it read.
                let vm = rig.vm();
                vm.cut(CutKind::Final, &BlocksByDisk::new(), PATIENCE).unwrap();
                vm.drain(PATIENCE).unwrap().unwrap();
                rig.read_some_frozen();
                rig.change(10);
            }
            rig.reopen(BootId(1));
            assert!(
                rig.vm().recovered().iter().all(|r| r.label == "shared-memory"),
                "{:?}",
                rig.vm().recovered()
            );
            rig.ship_everything();
            rig.assert_replica_equals_disks();
        }
    }
}

/// The power is lost: what is pending covers every block that differs, and no more than the hot
/// regions and what was marked.
#[test]
fn after_a_loss_of_power_pending_covers_every_difference() {
    for seed in [20, 22] {
        let mut rig = Rig::new(seed, 20 << 20);
        rig.open(BootId(1), true);
        rig.ship_everything();
        for boot in 2..5u128 {
            rig.change(25);
            rig.cool();
            rig.change(10);
            rig.reopen(BootId(boot));
            assert!(
                rig.vm().recovered().iter().all(|r| r.label == "power-lost"),
                "{:?}",
                rig.vm().recovered()
            );
            rig.assert_pending_covers_differences();
            rig.ship_everything();
            rig.assert_replica_equals_disks();
        }
    }
}

/// A clean stop: the next start trusts the HRLs alone, in another boot too.
#[test]
fn after_a_clean_stop_only_marked_blocks_are_pending() {
    let mut rig = Rig::new(30, 8 << 20);
    rig.open(BootId(1), true);
    rig.ship_everything();
    rig.write_at(0, 5 * BLOCK, BLOCK as usize);
    rig.vm().stop_clean().unwrap();
    rig.reopen(BootId(2));
    assert!(rig.vm().recovered().iter().all(|r| r.label == "clean-stop"));
    assert_eq!(rig.vm().pending().values().map(|s| s.total()).sum::<u64>(), 1);
    rig.ship_everything();
    rig.assert_replica_equals_disks();
    // Changed while nobody tracked it, in the same boot.
    rig.vm().stop_clean().unwrap();
    rig.change_beneath();
    rig.reopen(BootId(2));
    assert_eq!(rig.vm().recovered()[0].label, "changed-after-stop");
    rig.ship_everything();
    rig.assert_replica_equals_disks();
}

/// Two HRLs per disk while an epoch ships, one after the acknowledgement; their blocks are those
/// that were written.
#[test]
fn hrls_hold_what_was_written() {
    let mut rig = Rig::new(32, 4 << 20);
    rig.open(BootId(1), true);
    rig.ship_everything();
    assert_eq!(rig.hrls(0).len(), 1);
    rig.write_at(0, 7 * BLOCK + 100, 2 * BLOCK as usize);
    let vm = rig.vm();
    let cut = vm.cut(CutKind::Final, &BlocksByDisk::new(), PATIENCE).unwrap();
    vm.drain(PATIENCE).unwrap().unwrap();
    rig.write_at(0, 0, 10);
    vm.flush().unwrap();
    let blocks: Vec<_> = rig.hrls(0).iter().flat_map(|r| r.blocks.iter().collect::<Vec<_>>()).collect();
    assert_eq!(blocks, [7..10, 0..1]);
    vm.acknowledge(cut.epoch).unwrap();
    assert_eq!(rig.hrls(0).len(), 1);
    vm.forget().unwrap();
    assert_eq!(rig.hrls(0).len(), 0);
}

/// T5: an operation that would preserve more than 16 MiB makes the epoch give up its cut; its
/// blocks stay pending until acknowledged.
#[test]
fn a_large_discard_gives_up_the_cut_and_nothing_is_lost() {
    let mut rig = Rig::new(40, 48 << 20);
    rig.open(BootId(1), true);
    rig.ship_everything();
    rig.write_at(0, 0, 20 << 20);
    let vm = rig.vm();
    vm.cut(CutKind::Final, &BlocksByDisk::new(), PATIENCE).unwrap();
    vm.drain(PATIENCE).unwrap().unwrap();
    rig.change_one(0, Change::Zero { offset: 0, length: 20 << 20 });
    assert!(vm.has_given_up());
    assert_eq!(vm.give_ups().in_a_row, 1);
    vm.give_up().unwrap();
    assert_eq!(vm.pending().values().map(|s| s.total()).sum::<u64>(), 5120);
    assert_eq!(vm.frozen_blocks().values().map(|s| s.total()).sum::<u64>(), 5120);
    rig.reopen(BootId(1));
    assert_eq!(rig.vm().pending().values().map(|s| s.total()).sum::<u64>(), 5120);
    rig.ship_everything();
    rig.assert_replica_equals_disks();
}

/// A disk leaves while an epoch with its blocks is frozen: the cut is given up, not stuck.
#[test]
fn a_disk_that_is_removed_while_an_epoch_is_frozen_gives_up_the_cut() {
    let mut rig = Rig::new(31, 2 << 20);
    rig.open(BootId(1), true);
    rig.ship_everything();
    rig.change(40);
    let vm = rig.vm();
    let cut = vm.cut(CutKind::Final, &BlocksByDisk::new(), PATIENCE).unwrap();
    assert!(cut.disks.iter().any(|d| d.id == DiskId(1)));
    let frozen = vm.drain(PATIENCE).unwrap().map(|_| vm.frozen_blocks()).unwrap();
    vm.remove_disk(DiskId(1)).unwrap();
    assert!(vm.has_given_up() && vm.frozen().is_none());
    vm.give_up().unwrap();
    let pending = vm.pending();
    for (disk, blocks) in frozen.iter().filter(|(disk, _)| **disk != DiskId(1)) {
        assert!(blocks.iter().all(|run| pending[disk].gaps(run).is_empty()), "disk {disk}");
    }
    assert!(!pending.contains_key(&DiskId(1)));
    let next = vm.cut(CutKind::Final, &pending, PATIENCE).unwrap();
    assert!(next.disks.iter().all(|d| d.id != DiskId(1)));
}

/// T10: a writer that is in flight at the cut grows the file after it: the size follows.
#[test]
fn late_growth_belongs_to_the_cut() {
    let mut rig = Rig::new(42, 1 << 20);
    rig.open(BootId(1), true);
    rig.ship_everything();
    let vm = rig.vm();
    let disk = vm.disk(DiskId(1)).unwrap();
    let ticket = disk.begin(Change::Write { offset: 1 << 20, length: 10 }).unwrap();
    vm.cut(CutKind::Final, &BlocksByDisk::new(), PATIENCE).unwrap();
    assert!(vm.drain(Duration::ZERO).unwrap().is_none(), "a writer is still there");
    rig.raw_write(0, 1 << 20, &[7; 10]);
    disk.end(ticket, Ok(10));
    let cut = vm.drain(PATIENCE).unwrap().unwrap();
    assert_eq!(cut.disks[0].size, (1 << 20) + 10);
    // Growing by 4 TiB marks two blocks.
    rig.change_one(0, Change::Truncate { from: (1 << 20) + 10, to: 4 << 40 });
    assert_eq!(vm.marked_bytes(), 2 * BLOCK);
    assert_eq!(vm.drain(PATIENCE).unwrap().unwrap().disks[0].size, (1 << 20) + 10);
}

/// T9: after a failed sync everything written since the last good one is marked again.
#[test]
fn a_failed_sync_marks_what_was_written_since_the_last_good_one() {
    let mut rig = Rig::new(44, 16 << 20);
    rig.open(BootId(1), true);
    rig.ship_everything();
    let vm = rig.vm();
    let disk = vm.disk(DiskId(1)).unwrap();
    rig.write_at(0, 0, 10);
    let good = disk.sync_begins();
    disk.sync_ended(good, Ok(()));
    rig.write_at(0, 9 << 20, 10);
    rig.ship_everything();
    assert_eq!(vm.marked_bytes(), 0);
    rig.write_at(0, 9 << 20, 10);
    let bad = disk.sync_begins();
    disk.sync_ended(bad, Err(nix::errno::Errno::EIO));
    assert_eq!(vm.marked_bytes(), 4 << 20);
}

/// T8: the log is gone: the disk gets the untracked mark, writes go on, and after a loss of power
/// it is whole.
#[test]
fn without_a_log_the_disk_is_marked_untracked() {
    let mut rig = Rig::new(46, 32 << 20);
    rig.open(BootId(1), true);
    rig.ship_everything();
    rig.stop_threads();
    rig.write_at(0, 30 << 20, 10);
    rig.reopen(BootId(2));
    let labels: Vec<_> = rig.vm().recovered().iter().map(|r| r.label).collect();
    assert_eq!(labels, ["untracked", "power-lost"]);
    rig.ship_everything();
    rig.assert_replica_equals_disks();
    rig.reopen(BootId(3));
    assert!(rig.vm().recovered().iter().all(|r| r.label == "power-lost"));
}

/// A disk moves to another folder and the longest name: its HRLs follow and are found again.
#[test]
fn hrls_follow_a_renamed_disk() {
    let mut rig = Rig::new(48, 1 << 20);
    rig.open(BootId(1), true);
    rig.ship_everything();
    rig.write_at(0, 0, 10);
    rig.rename_first_disk(&"n".repeat(255));
    assert!(rig.vm().has_changes());
    rig.vm().flush().unwrap();
    rig.write_at(0, 8 * BLOCK, 10);
    rig.reopen(BootId(1));
    assert!(rig.vm().recovered().iter().all(|r| r.label == "shared-memory"));
    rig.ship_everything();
    rig.assert_replica_equals_disks();
    assert_eq!(rig.hrls(0).len(), 1);
}

/// A start that comes to nothing takes no fact from the next one: after a loss of power, and
/// where a disk ships whole.
#[test]
fn a_start_that_fails_leaves_every_fact_to_the_next() {
    let mut rig = Rig::new(50, 8 << 20);
    rig.open(BootId(1), true);
    rig.ship_everything();
    rig.change(10);
    rig.fail_to_reopen(BootId(2));
    rig.reopen(BootId(2));
    assert!(rig.vm().recovered().iter().all(|r| r.label == "power-lost"), "{:?}", rig.vm().recovered());
    rig.assert_pending_covers_differences();
    rig.ship_everything();
    rig.assert_replica_equals_disks();
    rig.vm().stop_clean().unwrap();
    rig.change_beneath();
    rig.fail_to_reopen(BootId(2));
    rig.reopen(BootId(2));
    assert_ne!(rig.vm().recovered()[0].label, "shared-memory");
    rig.ship_everything();
    rig.assert_replica_equals_disks();
}

/// Another file with old times is another file: after a kill, and after a loss of power. What
/// was made before counts for nothing then, and only then.
#[test]
fn a_file_that_took_the_place_of_a_disk_ships_whole() {
    let mut rig = Rig::new(52, 2 << 20);
    rig.open(BootId(1), true);
    rig.ship_everything();
    let id = rig.vm().tracking_id();
    rig.reopen(BootId(1));
    assert_eq!(rig.vm().tracking_id(), id);
    rig.replace_first_disk();
    rig.reopen(BootId(1));
    let labels: Vec<_> = rig.vm().recovered().iter().map(|r| r.label).collect();
    assert_eq!(labels, ["changed-beneath", "shared-memory"]);
    assert_ne!(rig.vm().tracking_id(), id);
    rig.ship_everything();
    rig.assert_replica_equals_disks();
    rig.replace_first_disk();
    rig.reopen(BootId(2));
    let labels: Vec<_> = rig.vm().recovered().iter().map(|r| r.label).collect();
    assert_eq!(labels, ["changed-since-boot", "power-lost"]);
    rig.ship_everything();
    rig.reopen_changed_beneath(BootId(2));
    let labels: Vec<_> = rig.vm().recovered().iter().map(|r| r.label).collect();
    assert_eq!(labels, ["shared-memory", "changed-beneath"]);
    rig.vm().stop_clean().unwrap();
    rig.reopen_changed_beneath(BootId(3));
    let labels: Vec<_> = rig.vm().recovered().iter().map(|r| r.label).collect();
    assert_eq!(labels, ["clean-stop", "off-changed"]);
}

/// No cut before a new disk is in the write path, nor before the shipper knows that it is whole.
#[test]
fn a_cut_waits_for_a_new_disk() {
    let mut rig = Rig::new(54, 1 << 20);
    rig.open(BootId(1), true);
    rig.ship_everything();
    let vm = rig.vm();
    vm.add_disk(rig.third_disk()).unwrap();
    let cut = |unmade: &BlocksByDisk| vm.cut(CutKind::Final, unmade, PATIENCE);
    vm.pending();
    assert_eq!(cut(&BlocksByDisk::new()).unwrap_err().kind(), ErrorKind::Busy);
    vm.disk_attached(DiskId(3)).unwrap();
    vm.ship_whole("the test says so").unwrap();
    assert_eq!(cut(&BlocksByDisk::new()).unwrap_err().kind(), ErrorKind::Busy);
    let made = cut(&vm.pending()).unwrap();
    assert!(made.disks.iter().all(|d| d.whole));
}

/// T9 over a kill: what was written before it and not synced is marked when the sync fails.
#[test]
fn a_failed_sync_after_a_kill_marks_what_was_written_before() {
    let mut rig = Rig::new(56, 16 << 20);
    rig.open(BootId(1), true);
    rig.ship_everything();
    rig.write_at(0, 9 << 20, 10);
    rig.reopen(BootId(1));
    let vm = rig.vm();
    assert_eq!(vm.marked_bytes(), BLOCK);
    let disk = vm.disk(DiskId(1)).unwrap();
    let bad = disk.sync_begins();
    disk.sync_ended(bad, Err(nix::errno::Errno::EIO));
    assert!(vm.marked_bytes() >= 4 << 20);
}

/// T8: killed while the untracked mark is on: when the log is back and the mark gone, a loss of
/// power still finds every region that was written to.
#[test]
fn regions_written_without_a_log_are_in_the_next_one() {
    let mut rig = Rig::new(58, 32 << 20);
    rig.open(BootId(1), true);
    rig.ship_everything();
    rig.stop_threads();
    rig.write_at(0, 30 << 20, 10);
    rig.reopen(BootId(1));
    assert!(rig.vm().recovered().iter().all(|r| r.label == "shared-memory"));
    rig.vm().flush().unwrap();
    assert!(rig.vm().figures()[0].1.hot_regions > 0);
}

/// A rig whose frozen epoch has one preserved block, with this much memory for it.
fn rig_with_a_preserved_block(seed: u64, memory: u64) -> Rig {
    let mut rig = Rig::new(seed, 4 << 20);
    rig.preserved_bytes = memory;
    rig.open(BootId(1), true);
    assert!(!rig.vm().disk(DiskId(1)).unwrap().make_room(), "nothing was saved yet");
    rig.ship_everything();
    rig.write_at(0, 0, 10);
    let vm = rig.vm();
    vm.cut(CutKind::Final, &BlocksByDisk::new(), PATIENCE).unwrap();
    vm.drain(PATIENCE).unwrap().unwrap();
    rig.write_at(0, 0, 10);
    assert_eq!(vm.figures()[0].1.preserved, BLOCK);
    rig
}

/// T5: room that is made for guests takes the cut with it.
#[test]
fn making_room_gives_up_the_cut() {
    let rig = rig_with_a_preserved_block(60, 0);
    let vm = rig.vm();
    let disk = vm.disk(DiskId(2)).unwrap();
    assert!(disk.make_room(), "one block was saved in a file");
    assert!(disk.make_room(), "another writer, that met the full file system too");
    let read = vm.read_frozen(DiskId(1), 0..1, &mut [0; BLOCK as usize]);
    assert_eq!(read.unwrap_err().kind(), ErrorKind::Cancelled);
    vm.give_up().unwrap();
    assert_eq!(vm.pending().values().map(|s| s.total()).sum::<u64>(), 1);
    vm.cut(CutKind::Final, &vm.pending(), PATIENCE).unwrap();
    assert!(!disk.make_room(), "that was for the cut before");
}

/// T5: what is in memory takes no room: there is none to be made, and the cut stays.
#[test]
fn a_cut_whose_copies_are_in_memory_is_not_given_up_for_room() {
    let rig = rig_with_a_preserved_block(61, 1 << 20);
    let vm = rig.vm();
    assert!(!vm.disk(DiskId(2)).unwrap().make_room());
    let mut now = [0; BLOCK as usize];
    rig.file(1).read_exact_at(&mut now, 0).unwrap();
    let mut frozen = now;
    vm.read_frozen(DiskId(1), 0..1, &mut frozen).unwrap();
    assert_ne!(frozen, now, "what was there at the cut");
}

/// A disk goes where its HRLs cannot follow (another file system): it ships whole, and the
/// folder that it is in says so.
#[test]
fn a_disk_whose_hrls_cannot_follow_ships_whole() {
    let mut rig = Rig::new(62, 1 << 20);
    rig.open(BootId(1), true);
    rig.ship_everything();
    let elsewhere = tempfile::tempdir_in("/var/tmp").unwrap();
    let folder = std::fs::File::open(elsewhere.path()).unwrap();
    let vm = rig.vm();
    vm.rename_disk(DiskId(1), "elsewhere.img".into(), folder, "elsewhere.img".into()).unwrap();
    assert!(vm.figures()[0].1.whole_because.is_some());
    let there: Vec<_> = std::fs::read_dir(elsewhere.path()).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(there.len(), 1);
    let report = afterimage::format::hrl::read(&mut std::fs::File::open(&there[0]).unwrap()).unwrap();
    assert!(report.whole().is_some());
    rig.ship_everything();
    assert_eq!(rig.hrls(0).len(), 0, "nothing is left behind");
}
