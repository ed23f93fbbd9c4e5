//! Retention and the clock (A4): after a jump nothing is dropped, over restarts and kills too.

mod vault_support;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use afterimage::base::VmId;
use afterimage::core::ports::points::PointStore;
use afterimage::core::retention::Keep;
use afterimage::vault::{DirectoryVault, Steps};
use vault_support::*;

fn open_at(path: &Path, clock: &Arc<TestClock>) -> Arc<DirectoryVault> {
    DirectoryVault::open(path, Arc::clone(clock) as _).unwrap()
}

/// Four points, of which the two oldest may expire.
fn four_points(vault: &DirectoryVault, clock: &TestClock) -> Primary {
    let mut primary = Primary::small(25, 8);
    begin(vault, &mut primary);
    vault.set_retention(primary.vm, Keep { all_seconds: 60, hourly: 1, daily: 0 }).unwrap();
    for n in 0..3 {
        clock.advance(Duration::from_secs(50));
        primary.disks[0].write(0, &[n; 10]);
        delivered(vault, &mut primary);
    }
    primary
}

/// Five points, the newest from after a jump of the clock: all others may expire, by its time.
fn a_point_after_a_jump(vault: &DirectoryVault, clock: &TestClock) -> VmId {
    let mut primary = four_points(vault, clock);
    clock.jump(400 * 86_400);
    primary.disks[0].write(0, &[77; 10]);
    delivered(vault, &mut primary);
    primary.vm
}

const HOUR: Duration = Duration::from_secs(3600);

#[test]
fn a_jump_of_the_clock_drops_nothing() {
    let dir = memory_dir();
    let clock = TestClock::new();
    let vault = open_at(dir.path(), &clock);
    let vm = a_point_after_a_jump(&vault, &clock);
    assert!(vault.expire(vm).unwrap().is_empty());
    assert_eq!(vault.points(vm).unwrap().len(), 5);
    clock.advance(25 * HOUR);
    assert_eq!(vault.expire(vm).unwrap().len(), 4);
    assert_eq!(vault.retention(vm).unwrap().all_seconds, 60);
    drop(vault);
    let vault = open_at(dir.path(), &clock);
    assert_eq!(vault.retention(vm).unwrap().all_seconds, 60);
    assert_eq!(vault.points(vm).unwrap().len(), 1);
}

/// A4: the point that arrived after the jump has the wrong time too; it proves nothing.
#[test]
fn a_jump_of_the_clock_is_remembered_over_restarts() {
    let dir = memory_dir();
    let clock = TestClock::new();
    let mut vault = open_at(dir.path(), &clock);
    let vm = a_point_after_a_jump(&vault, &clock);
    // Runs of 8 hours, and 10 hours off after each.
    for _ in 0..3 {
        drop(vault);
        clock.jump(10 * 3600);
        vault = open_at(dir.path(), &clock);
        assert!(vault.expire(vm).unwrap().is_empty());
        clock.advance(8 * HOUR - Duration::from_secs(1));
        assert!(vault.expire(vm).unwrap().is_empty());
    }
    assert_eq!(vault.points(vm).unwrap().len(), 5);
    clock.advance(Duration::from_secs(3));
    assert_eq!(vault.expire(vm).unwrap().len(), 4);
}

/// Whatever of it was written.
#[test]
fn a_kill_after_a_jump_of_the_clock_drops_nothing() {
    for n in 1.. {
        let dir = memory_dir();
        let clock = TestClock::new();
        let steps = Arc::new(Steps::default());
        let vault =
            DirectoryVault::open_with(dir.path(), Arc::clone(&clock) as _, Arc::clone(&steps)).unwrap();
        let mut primary = four_points(&vault, &clock);
        primary.disks[0].write(0, &[77; 10]);
        let epoch = primary.cut();
        steps.stop_after(n);
        clock.jump(400 * 86_400);
        let is_delivered = epoch.deliver(&*vault).is_ok();
        assert!(is_delivered || steps.is_stopped());
        let _ = vault.wait_applied(primary.vm, PATIENCE);
        let is_stopped = steps.is_stopped();
        drop(vault);
        let vault = open_at(dir.path(), &clock);
        epoch.deliver(&*vault).unwrap();
        assert!(vault.wait_applied(primary.vm, PATIENCE).unwrap());
        drop(vault);
        let vault = open_at(dir.path(), &clock);
        assert!(vault.expire(primary.vm).unwrap().is_empty(), "stopped at step {n}");
        assert_eq!(vault.points(primary.vm).unwrap().len(), 5, "stopped at step {n}");
        if !is_stopped {
            assert!(n > 10, "only {n} steps");
            break;
        }
    }
}

/// What is not known suspends deletion for a day, and is known from then on.
#[test]
fn a_clock_document_that_cannot_be_read_drops_nothing() {
    let newer = "{\"state\":{\"format\":2},\"digest\":\"\"}";
    for content in [None, Some(""), Some("rotten"), Some(newer)] {
        let dir = memory_dir();
        let clock = TestClock::new();
        let vault = open_at(dir.path(), &clock);
        let vm = four_points(&vault, &clock).vm;
        drop(vault);
        let path = dir.path().join("clock.json");
        match content {
            None => std::fs::remove_file(&path).unwrap(),
            Some(text) => std::fs::write(&path, text).unwrap(),
        }
        let vault = open_at(dir.path(), &clock);
        assert!(vault.expire(vm).unwrap().is_empty(), "{content:?}");
        clock.advance(23 * HOUR);
        assert!(vault.expire(vm).unwrap().is_empty(), "{content:?}");
        drop(vault);
        let vault = open_at(dir.path(), &clock);
        clock.advance(HOUR);
        assert_eq!(vault.expire(vm).unwrap().len(), 2, "{content:?}");
    }
}

/// For want of room, say: what would make room is not held up, and no jump is forgotten.
#[test]
fn a_clock_document_that_cannot_be_written_stops_nothing() {
    let dir = memory_dir();
    let clock = TestClock::new();
    let vault = open_at(dir.path(), &clock);
    std::fs::create_dir(dir.path().join(".clock.json.new")).unwrap();
    let vm = a_point_after_a_jump(&vault, &clock);
    drop(vault);
    let vault = open_at(dir.path(), &clock);
    assert!(vault.expire(vm).unwrap().is_empty());
    clock.advance(24 * HOUR);
    assert_eq!(vault.expire(vm).unwrap().len(), 4);
}
