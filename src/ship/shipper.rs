//! The thread `shipper:VM` and its handle.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crossbeam_channel::{Sender, bounded, unbounded};

use crate::base::{Clock, Error, ErrorKind, Result, VmId, VmName};
use crate::core::ports::source::Source;
use crate::core::ports::vault::Vault;
use crate::ship::driver::Driver;
use crate::ship::engine::{Engine, Outside};
use crate::ship::priority;
use crate::ship::status::{ShipHooks, ShipObserver, ShipStatus, SyncReply};

/// What a shipper is started with.
#[derive(Clone, Debug)]
pub struct ShipperConfig {
    /// Which VM.
    pub vm: VmId,
    /// Its name.
    pub name: VmName,
    /// Interval between cycles, from 1 s.
    pub interval: Duration,
    /// Starts paused.
    pub paused: bool,
    /// The file that remembers what was delivered, as `STATE/vms/<uuid>.ship.json`.
    pub record_path: PathBuf,
    /// Fencing identity; 1 until roles change.
    pub generation: u64,
}

/// Starts shippers.
#[derive(Clone, Copy, Debug)]
pub struct Shipper;

/// What the handle asks of the thread.
pub(super) enum Command {
    Sync { reply: Sender<Result<SyncReply>>, timeout: Duration },
    Pause,
    Resume,
    SetInterval(Duration),
    SetName(VmName),
    Kick,
    Stop,
}

impl Shipper {
    /// Starts the thread `shipper:VM`.
    pub fn start(
        config: ShipperConfig,
        source: Arc<dyn Source>,
        vault: Arc<dyn Vault>,
        clock: Arc<dyn Clock>,
        observer: Arc<dyn ShipObserver>,
        hooks: Arc<dyn ShipHooks>,
    ) -> Result<ShipperHandle> {
        let (sender, receiver) = unbounded();
        let status = Arc::new(Mutex::new(ShipStatus::new(config.interval, config.paused)));
        let interrupt = Arc::new(AtomicBool::new(false));
        let name = format!("shipper:{}", config.name);
        let outside = Outside { source, vault, clock, observer, hooks };
        let engine = Engine::new(config, outside, status.clone(), interrupt.clone())?;
        let thread = std::thread::Builder::new()
            .name(name)
            .spawn(move || {
                priority::yield_io_to_guests();
                Driver::new(engine).run(&receiver);
            })
            .map_err(|e| Error::io("the shipper's thread cannot be started", e))?;
        Ok(ShipperHandle { sender, status, interrupt, thread: Mutex::new(Some(thread)) })
    }
}

/// A running shipper. Dropping it stops the thread.
pub struct ShipperHandle {
    sender: Sender<Command>,
    status: Arc<Mutex<ShipStatus>>,
    interrupt: Arc<AtomicBool>,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
}

impl ShipperHandle {
    /// Makes a cut now and waits until it is durable in the vault, at most `timeout`.
    ///
    /// Errors: what made the attempt fail; [`ErrorKind::Refused`] while paused;
    /// [`ErrorKind::Busy`] if it was not durable within `timeout` (delivery goes on).
    pub fn sync(&self, timeout: Duration) -> Result<SyncReply> {
        let (reply, answer) = bounded(1);
        self.send(Command::Sync { reply, timeout })?;
        match answer.recv_timeout(timeout) {
            Ok(result) => result,
            Err(crossbeam_channel::RecvTimeoutError::Timeout) => {
                Err(Error::new(ErrorKind::Busy, "the cut is not durable in the vault yet")
                    .why(format!("it took longer than {} s; delivery goes on", timeout.as_secs()))
                    .hint("afterimage status"))
            }
            Err(crossbeam_channel::RecvTimeoutError::Disconnected) => Err(stopped()),
        }
    }

    /// Pauses delivery; a transfer under way ends at the next part. Tracking goes on.
    pub fn pause(&self) -> Result<()> {
        self.interrupt.store(true, Ordering::Relaxed);
        self.send(Command::Pause)
    }

    /// Resumes after a pause, or after an error that is not retried.
    pub fn resume(&self) -> Result<()> {
        self.send(Command::Resume)
    }

    /// Another interval, from 1 s.
    pub fn set_interval(&self, interval: Duration) -> Result<()> {
        self.send(Command::SetInterval(interval))
    }

    /// Another name for the VM, from the next epoch on.
    pub fn set_name(&self, name: VmName) -> Result<()> {
        self.send(Command::SetName(name))
    }

    /// Begins a cycle now, without waiting for it.
    pub fn kick(&self) -> Result<()> {
        self.send(Command::Kick)
    }

    /// What it is doing.
    pub fn status(&self) -> ShipStatus {
        self.status.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Stops at the next part boundary and waits for the thread. An unfinished epoch stays
    /// frozen and is resumed by the next shipper. Idempotent.
    pub fn stop(&self) {
        self.interrupt.store(true, Ordering::Relaxed);
        let _ = self.sender.send(Command::Stop);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            log::error!("a shipper's thread ended by a panic");
        }
    }

    fn send(&self, command: Command) -> Result<()> {
        self.sender.send(command).map_err(|_| stopped())
    }
}

impl Drop for ShipperHandle {
    fn drop(&mut self) {
        self.stop();
    }
}

fn stopped() -> Error {
    Error::new(ErrorKind::Busy, "replication of this VM has been stopped")
        .hint("see what happened to it: afterimage events")
}
