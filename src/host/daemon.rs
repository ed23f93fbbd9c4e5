//! The daemon process: what is set before its first thread, its signals, its end.
//!
//! Killed here: everything is in the modules of what it was doing; the next daemon takes the lock
//! when this one is gone with all its threads (S1). SIGTERM and SIGINT are a clean stop: shippers
//! end, idle mounts are unmounted and leave a record that the next start trusts; a mount in use
//! goes with the process, which the log says, and the recovery table sees to its disks.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};

use super::api::server::Server;
use super::config::{CONFIG_DEFAULT, Config};
use super::engine::Engine;
use super::state::{STATE_DIR_DEFAULT, StateDir};
use crate::base::Result;
use crate::filter::memory;

/// Group whose members may use read-only commands, unless the configuration names another.
const GROUP_DEFAULT: &str = "afterimage";
/// Without a watchdog the main thread looks so often whether it is to stop.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Reads the configuration that belongs to a state folder: the file of the host for the default
/// one, else the file in the folder itself.
pub fn config_of(state: &StateDir) -> Result<Config> {
    if state.root() == Path::new(STATE_DIR_DEFAULT) {
        return Config::load(Path::new(CONFIG_DEFAULT));
    }
    Config::load(&state.config())
}

/// Runs the daemon until it is told to end. `verbose`: how many levels more than the
/// configuration says are logged.
pub fn run(state: StateDir, verbose: u8) -> Result<()> {
    let config = config_of(&state)?;
    start_log(&config, verbose);
    prepare_process();
    let signals = block_signals();
    let group = config.group.clone().unwrap_or_else(|| GROUP_DEFAULT.to_owned());
    let socket = state.socket();
    log::info!("afterimage {} starts with state in {}", env!("CARGO_PKG_VERSION"), state.root().display());
    state.create()?;
    if let Ok(Some(found)) = nix::unistd::Group::from_name(&group)
        && let Err(e) = state.open_to_group(found.gid.as_raw())
    {
        log::warn!("{e}");
    }
    let engine = Engine::start(state, config)?;
    let server = match Server::start(&socket, &group, engine.clone()) {
        Ok(server) => server,
        Err(e) => {
            engine.stop();
            return Err(e);
        }
    };
    end_on_signal(&engine, signals);
    tell(&[sd_notify::NotifyState::Ready]);
    log::info!("serving on {}", socket.display());
    wait(&engine);
    tell(&[sd_notify::NotifyState::Stopping]);
    log::info!("stopping");
    server.stop();
    engine.stop();
    Ok(())
}

fn start_log(config: &Config, verbose: u8) {
    let level = config.log_level.as_deref().and_then(|l| l.parse().ok()).unwrap_or(log::LevelFilter::Info);
    let level = match (verbose, level) {
        (0, level) => level,
        (1, level) => level.max(log::LevelFilter::Debug),
        _ => log::LevelFilter::Trace,
    };
    let mut builder = env_logger::Builder::new();
    // Crates below us are of no interest to an operator.
    builder.filter_level(level.min(log::LevelFilter::Warn)).filter_module("afterimage", level);
    if builder.format_timestamp_millis().try_init().is_err() {
        log::debug!("the log was started already");
    }
}

/// Before the first thread, which inherits it: never wait for memory that needs the mount.
fn prepare_process() {
    for (what, result) in [
        ("unused memory is kept", memory::return_unused_memory()),
        ("memory is not locked", memory::lock_memory()),
        ("not marked as an I/O flusher", memory::become_io_flusher()),
        ("few files can be open", memory::raise_descriptor_limit().map(drop)),
    ] {
        if let Err(e) = result {
            log::warn!("{what}: {e}");
        }
    }
    // A file made by us is for nobody else unless it says so.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
}

/// Threads inherit the mask, so that only the thread below gets these signals.
fn block_signals() -> SigSet {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        signals.add(signal);
    }
    if let Err(e) = signals.thread_block() {
        log::warn!("signals cannot be waited for: {e}");
    }
    signals
}

fn end_on_signal(engine: &Arc<Engine>, signals: SigSet) {
    let engine = Arc::downgrade(engine);
    let body = move || {
        while let Ok(signal) = signals.wait() {
            let Some(engine) = engine.upgrade() else { return };
            match signal {
                // The terminal that started us is gone; we are not.
                Signal::SIGHUP => log::info!("SIGHUP is ignored"),
                other => {
                    log::info!("{other}: stopping");
                    engine.request_stop();
                }
            }
        }
    };
    if let Err(e) = std::thread::Builder::new().name("signals".to_owned()).spawn(body) {
        log::error!("signals are not waited for: {e}");
    }
}

/// Until somebody says stop; tells systemd's watchdog meanwhile that we live.
fn wait(engine: &Engine) {
    let watchdog = sd_notify::watchdog_enabled();
    let tick = watchdog.map_or(LOOK_EVERY, |limit| limit / 3);
    while !engine.pause_or_stop(tick) {
        if watchdog.is_some() {
            tell(&[sd_notify::NotifyState::Watchdog]);
        }
    }
}

fn tell(states: &[sd_notify::NotifyState<'_>]) {
    if let Err(e) = sd_notify::notify(states) {
        log::debug!("systemd cannot be told: {e}");
    }
}
