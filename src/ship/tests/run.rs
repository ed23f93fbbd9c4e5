//! One run: a phase with faults, then one without in which vault and source must meet.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crossbeam_channel::{Receiver, bounded};

use super::source::{SimSource, VM};
use super::vault::SimVault;
use super::world::{Canary, Killed, Shared, SimClock, World, lock};
use crate::base::Result;
use crate::core::epoch::{Event, State};
use crate::format::manifest::DefinitionFile;
use crate::ship::driver::Driver;
use crate::ship::engine::{Engine, Outside};
use crate::ship::shipper::{Command, ShipperConfig};
use crate::ship::status::{NoObserver, ShipHooks, ShipStatus, SyncReply};

/// Steps with faults, and those after which it must have come to rest.
const STEPS: u32 = 250;
const STEPS_TO_REST: u32 = 4000;

struct Hooks;

impl ShipHooks for Hooks {
    fn definition(&self) -> Vec<DefinitionFile> {
        Vec::new()
    }
}

/// A `sync` that waits, and when it was asked.
type Waiting = (Receiver<Result<SyncReply>>, i64);

struct Run {
    world: Shared,
    vault: Arc<SimVault>,
    dir: tempfile::TempDir,
    driver: Option<Driver>,
    waiting: Vec<Waiting>,
}

/// Runs a seed. `Ok`: a number that stands for all that happened.
pub(super) fn run(seed: u64, canary: Canary) -> Result<u64, String> {
    let world: Shared = Arc::new(Mutex::new(World::new(seed, canary)));
    let vault = Arc::new(SimVault::new(world.clone()));
    let dir = tempfile::tempdir_in("/dev/shm").map_err(|e| e.to_string())?;
    let mut run = Run { world, vault, dir, driver: None, waiting: Vec::new() };
    for _ in 0..STEPS {
        run.step();
        run.check()?;
    }
    run.come_to_rest()?;
    let trace = lock(&run.world).trace;
    Ok(trace)
}

impl Run {
    fn start(&mut self) {
        let (interval, random, part_bytes, pass_bytes) = {
            let mut w = lock(&self.world);
            let interval = Duration::from_secs(1 + w.rng.below(20));
            (interval, w.rng.next(), 4096 * (1 + w.rng.below(6)), 4096 * w.rng.below(30))
        };
        let config = ShipperConfig {
            vm: VM,
            name: "sim".parse().unwrap(),
            interval,
            paused: false,
            record_path: self.dir.path().join("record.json"),
            generation: 1,
        };
        let outside = Outside {
            source: Arc::new(SimSource { world: self.world.clone(), vault: self.vault.clone() }),
            vault: self.vault.clone(),
            clock: Arc::new(SimClock(self.world.clone())),
            observer: Arc::new(NoObserver),
            hooks: Arc::new(Hooks),
        };
        let status = Arc::new(Mutex::new(ShipStatus::new(interval, false)));
        let mut engine = Engine::new(config, outside, status, Arc::new(AtomicBool::new(false))).unwrap();
        engine.is_inline = true;
        engine.part_bytes = part_bytes;
        let mut driver = Driver::with_random(engine, random);
        driver.machine = driver.machine.clone().with_pass_bytes_min(pass_bytes);
        driver.event(Event::Started);
        self.driver = Some(driver);
    }

    /// One action, or one thing from outside. A kill ends the driver.
    fn step(&mut self) {
        if self.driver.is_none() {
            self.start();
        }
        let killed = catch_unwind(AssertUnwindSafe(|| self.act()));
        if let Err(payload) = killed {
            if !payload.is::<Killed>() {
                std::panic::resume_unwind(payload);
            }
            self.driver = None;
            self.waiting.clear();
        }
    }

    fn act(&mut self) {
        let (commands, restores, dice) = {
            let mut w = lock(&self.world);
            let (command, restore) = (w.faults.command, w.faults.restore);
            (w.rng.one_in(command), w.rng.one_in(restore), w.rng.next())
        };
        if restores {
            self.vault.restore();
        }
        let Some(driver) = &mut self.driver else { return };
        if commands {
            match dice % 6 {
                0..=2 => {
                    let (reply, answer) = bounded(1);
                    let asked = lock(&self.world).now_ms as i64;
                    self.waiting.push((answer, asked));
                    driver.command(Command::Sync { reply, timeout: Duration::from_secs(600) });
                }
                3 => drop(driver.command(Command::Pause)),
                4 => drop(driver.command(Command::Resume)),
                _ => drop(driver.command(Command::Kick)),
            }
        }
        if driver.act() {
            return;
        }
        if let Some(at) = driver.machine.wake_at() {
            let mut w = lock(&self.world);
            w.now_ms = w.now_ms.max(at.as_millis() as u64 + 1);
        } else if dice.is_multiple_of(3) {
            driver.command(Command::Resume);
        }
        driver.event(Event::TimePassed);
    }

    fn check(&mut self) -> Result<(), String> {
        self.waiting.retain(|(answer, asked)| match answer.try_recv() {
            Ok(Ok(reply)) => {
                let time = match reply {
                    SyncReply::Durable(delivered) => delivered.cut_time,
                    SyncReply::NoChanges { current_as_of } => current_as_of,
                };
                if time.0 < *asked {
                    lock(&self.world).violate("a sync was answered by a cut made before it");
                }
                false
            }
            Ok(Err(_)) => false,
            Err(e) => e == crossbeam_channel::TryRecvError::Empty,
        });
        match lock(&self.world).violation.take() {
            Some(violation) => Err(violation),
            None => Ok(()),
        }
    }

    /// Faults and guests off: vault and source must become equal.
    fn come_to_rest(&mut self) -> Result<(), String> {
        let since = {
            let mut w = lock(&self.world);
            w.faults = super::world::Faults::default();
            w.guests = false;
            let epoch = w.epoch;
            w.drain(epoch);
            w.now_ms as i64
        };
        for _ in 0..STEPS_TO_REST {
            self.step();
            self.check()?;
            let Some(driver) = &mut self.driver else { continue };
            if matches!(driver.machine.state(), State::Paused | State::Stopped) {
                driver.command(Command::Resume);
            }
            let source = driver.engine.outside.source.clone();
            let is_current = driver.engine.status().current_as_of.is_some_and(|t| t.0 > since);
            if is_current
                && driver.machine.state() == State::Idle
                && !source.has_changes()
                && source.frozen().is_none()
            {
                return self.compare();
            }
        }
        let state = self.driver.as_ref().map(|d| (d.machine.state(), d.engine.status().failure.clone()));
        Err(format!("it does not come to rest: {state:?}"))
    }

    fn compare(&self) -> Result<(), String> {
        let (image, w) = (self.vault.image(), lock(&self.world));
        if image == w.disks { Ok(()) } else { Err("vault and source differ at rest".to_owned()) }
    }
}
