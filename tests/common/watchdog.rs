//! Ends what hangs. A test that waits for a daemon that never answers would hold up everything
//! until the time of the whole run is over, and nobody would know which test it was.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// While it lives: after `limit` it says who hangs and kills the daemons of one state folder, so
/// that whatever waits for them gets an error.
pub struct Watchdog {
    _alive: Sender<()>,
}

impl Watchdog {
    pub fn new(test: &str, state: PathBuf, limit: Duration) -> Self {
        let (alive, gone) = channel::<()>();
        let test = test.to_owned();
        std::thread::spawn(move || {
            if gone.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                eprintln!("{test} hangs after {limit:?}; its daemon is killed");
                while gone.recv_timeout(Duration::from_secs(1)) == Err(RecvTimeoutError::Timeout) {
                    daemons_of(&state).into_iter().for_each(kill_for_certain);
                }
            }
        });
        Self { _alive: alive }
    }
}

/// Processes of the binary under test that were given this state folder.
pub fn daemons_of(state: &Path) -> Vec<i32> {
    let binary = Path::new(env!("CARGO_BIN_EXE_afterimage"));
    let wanted = state.to_str().unwrap();
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .filter_map(|e| e.ok()?.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == binary))
        .filter(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.split(|b| *b == 0).any(|argument| argument == wanted.as_bytes())
                && line.split(|b| *b == 0).any(|a| a == b"daemon")
        })
        .collect()
}

/// Processes whose program lies in a folder of a test.
pub fn programs_below(folder: &Path) -> Vec<i32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .filter_map(|e| e.ok()?.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe.starts_with(folder)))
        .collect()
}

/// Kills a process and waits until it is gone.
pub fn kill_for_certain(pid: i32) {
    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    super::wait_until("a killed process to be gone", || !is_alive(pid));
}

/// Whether a process runs: a zombie does not.
pub fn is_alive(pid: i32) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    let state = stat.rsplit(')').next().and_then(|rest| rest.trim_start().chars().next());
    !matches!(state, None | Some('Z' | 'X'))
}
