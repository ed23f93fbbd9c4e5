//! The thread and its handle, over the simulation's tracker and vault without faults.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::tests::world::{Canary, Faults, Shared, SimClock, World, lock};
use super::tests::{source::SimSource, source::VM, vault::SimVault};
use super::{
    Delivered, ShipHooks, ShipObserver, ShipState, Shipper, ShipperConfig, ShipperHandle, SyncReply,
};
use crate::base::{Clock, ErrorKind, SystemClock, Timestamp, VmId};
use crate::core::health::Failure;
use crate::format::manifest::{DefinitionFile, EpochKind};

/// Long enough for any machine; nothing waits for it to pass.
const PATIENCE: Duration = Duration::from_secs(120);

#[derive(Default)]
struct Told {
    committed: AtomicU32,
    failed: AtomicU32,
}

impl ShipObserver for Told {
    fn epoch_committed(&self, _: VmId, _: &Delivered) {
        self.committed.fetch_add(1, Ordering::SeqCst);
    }

    fn failed(&self, _: VmId, _: &Failure, _: bool) {
        self.failed.fetch_add(1, Ordering::SeqCst);
    }
}

/// The wall clock of the simulation; what is waited for is real.
struct MixedClock(SimClock, SystemClock);

impl Clock for MixedClock {
    fn now(&self) -> Timestamp {
        self.0.now()
    }

    fn monotonic(&self) -> Duration {
        self.1.monotonic()
    }
}

struct Hooks;

impl ShipHooks for Hooks {
    fn definition(&self) -> Vec<DefinitionFile> {
        vec![DefinitionFile { name: "machine.toml".into(), content: String::new() }]
    }
}

struct Rig {
    world: Shared,
    vault: Arc<SimVault>,
    dir: tempfile::TempDir,
    told: Arc<Told>,
}

impl Rig {
    fn new() -> Self {
        let mut world = World::new(3, Canary::None);
        world.faults = Faults::default();
        world.guests = false;
        let world: Shared = Arc::new(Mutex::new(world));
        let vault = Arc::new(SimVault::new(world.clone()));
        Self { world, vault, dir: tempfile::tempdir().unwrap(), told: Arc::default() }
    }

    fn start(&self, paused: bool) -> ShipperHandle {
        let config = ShipperConfig {
            vm: VM,
            name: "web1".parse().unwrap(),
            // No cycle comes by itself after the first.
            interval: Duration::from_secs(86_400),
            paused,
            record_path: self.dir.path().join("vm.ship.json"),
            generation: 1,
        };
        let source = Arc::new(SimSource { world: self.world.clone(), vault: self.vault.clone() });
        let (vault, told) = (self.vault.clone(), self.told.clone());
        let clock = Arc::new(MixedClock(SimClock(self.world.clone()), SystemClock::default()));
        Shipper::start(config, source, vault, clock, told, Arc::new(Hooks)).unwrap()
    }

    fn write(&self) {
        let mut w = lock(&self.world);
        w.guests = true;
        (0..40).for_each(|_| w.guest());
        w.guests = false;
        let epoch = w.epoch;
        w.drain(epoch);
        // At least one mark, whatever the dice said.
        let block = *w.data.first().unwrap();
        w.marks.insert(block);
    }

    fn is_equal(&self) -> bool {
        let image = self.vault.image();
        let w = lock(&self.world);
        assert_eq!(w.violation, None);
        image == w.disks
    }
}

fn delivered(reply: SyncReply) -> Delivered {
    match reply {
        SyncReply::Durable(delivered) => delivered,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_sync_delivers_and_a_restart_goes_on_with_deltas() {
    let rig = Rig::new();
    let shipper = rig.start(false);
    shipper.sync(PATIENCE).unwrap();
    assert!(rig.is_equal());
    let first = shipper.status().last_delivered.unwrap();
    assert_eq!(first.kind, EpochKind::Full);
    assert!(matches!(shipper.sync(PATIENCE).unwrap(), SyncReply::NoChanges { .. }));
    rig.write();
    let second = delivered(shipper.sync(PATIENCE).unwrap());
    assert_eq!(second.kind, EpochKind::Delta);
    assert!(second.epoch > first.epoch && rig.is_equal());
    shipper.stop();
    shipper.stop();
    assert_eq!(shipper.sync(PATIENCE).unwrap_err().kind(), ErrorKind::Busy);

    rig.write();
    let shipper = rig.start(false);
    // Its first cycle may have delivered it before the call.
    shipper.sync(PATIENCE).unwrap();
    let third = shipper.status().last_delivered.unwrap();
    assert_eq!(third.kind, EpochKind::Delta, "the head is known after a restart");
    assert!(third.epoch > second.epoch && rig.is_equal());
    assert_eq!(rig.told.committed.load(Ordering::SeqCst), 3);
    let status = shipper.status();
    assert!(status.current_as_of >= Some(third.cut_time) && !status.is_initial);
    assert_eq!(status.failure, None);
}

/// Found by the simulation: the tracker had forgotten the epoch, and the record still called the
/// head before it sound.
#[test]
fn a_vault_restored_from_an_older_state_is_found_out_after_a_restart() {
    let rig = Rig::new();
    let shipper = rig.start(false);
    shipper.sync(PATIENCE).unwrap();
    rig.write();
    shipper.sync(PATIENCE).unwrap();
    shipper.stop();
    rig.vault.roll_back(1);
    let shipper = rig.start(false);
    shipper.sync(PATIENCE).unwrap();
    assert_eq!(shipper.status().last_delivered.unwrap().kind, EpochKind::Full);
    assert!(rig.is_equal());
}

#[test]
fn paused_refuses_a_sync_and_resume_goes_on() {
    let rig = Rig::new();
    let shipper = rig.start(true);
    let refused = shipper.sync(PATIENCE).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Refused);
    assert_eq!(refused.next_step(), Some("afterimage resume web1"));
    assert_eq!(shipper.status().state, ShipState::Paused);
    shipper.resume().unwrap();
    shipper.sync(PATIENCE).unwrap();
    assert!(rig.is_equal());
    shipper.pause().unwrap();
    assert_eq!(shipper.sync(PATIENCE).unwrap_err().kind(), ErrorKind::Refused);
}

#[test]
fn a_final_error_stops_is_told_and_ends_with_resume() {
    let rig = Rig::new();
    let shipper = rig.start(false);
    shipper.sync(PATIENCE).unwrap();
    rig.write();
    lock(&rig.world).broken = Some(ErrorKind::DiskMissing);
    assert_eq!(shipper.sync(PATIENCE).unwrap_err().kind(), ErrorKind::DiskMissing);
    assert_eq!(shipper.status().state, ShipState::Stopped);
    let failure = shipper.status().failure.unwrap();
    assert!(failure.what.contains("cannot be read at offset"), "{}", failure.what);
    assert_eq!(shipper.sync(PATIENCE).unwrap_err().kind(), ErrorKind::DiskMissing);
    assert_eq!(rig.told.failed.load(Ordering::SeqCst), 1);
    lock(&rig.world).broken = None;
    shipper.resume().unwrap();
    shipper.sync(PATIENCE).unwrap();
    assert!(rig.is_equal());
}
