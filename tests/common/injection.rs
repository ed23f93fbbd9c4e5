//! System calls of a running process that fail, or at which it is killed: strace does it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{text, wait_until};

/// strace on some threads of a process. Ends with it, or when it is dropped.
pub struct Injection {
    strace: Child,
    log: PathBuf,
}

/// The threads of a process whose names pass, by their ids.
fn threads_of(pid: i32, wanted: impl Fn(&str) -> bool) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    tasks
        .filter(|t| fs::read_to_string(t.path().join("comm")).is_ok_and(|name| wanted(name.trim_end())))
        .map(|t| t.file_name().to_str().unwrap().to_owned())
        .collect()
}

impl Injection {
    /// From now on `action` (of strace's `inject`) is done to the `calls` (names, with commas) of the
    /// threads that are `wanted`, as they are now. The log is written beside `scratch`.
    pub fn begin(pid: i32, wanted: impl Fn(&str) -> bool, calls: &str, action: &str, scratch: &Path) -> Self {
        let log = scratch.join("strace.log");
        let threads = threads_of(pid, wanted);
        assert!(!threads.is_empty(), "process {pid} has no such thread");
        let strace = Command::new("strace")
            .args(["-q", "-o", text(&log), "-e", &format!("trace={calls}")])
            .args(["-e", &format!("inject={calls}:{action}")])
            .args(threads.iter().flat_map(|t| ["-p", t]))
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|e| panic!("strace does not start: {e}"));
        let is_held = |thread: &String| {
            let status = fs::read_to_string(format!("/proc/{pid}/task/{thread}/status"));
            // A thread, or all of them, may be gone already.
            !status.is_ok_and(|s| s.contains("TracerPid:\t0\n"))
        };
        let mut injection = Self { strace, log };
        wait_until("strace to hold the threads", || {
            threads.iter().all(is_held) || !matches!(injection.strace.try_wait(), Ok(None))
        });
        injection
    }

    /// Lets go of the process. How many calls were tampered with.
    pub fn end(mut self) -> usize {
        self.let_go();
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        log.lines().filter(|line| line.contains("(INJECTED)")).count()
    }

    /// Politely first: what is in a call then is let go as it is. From a process that just dies strace
    /// may never get away; killed, it gives back what is left of it.
    fn let_go(&mut self) {
        let is_over = |strace: &mut Child| !matches!(strace.try_wait(), Ok(None));
        if is_over(&mut self.strace) {
            return;
        }
        if let Ok(pid) = i32::try_from(self.strace.id()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGINT);
        }
        let start = Instant::now();
        while !is_over(&mut self.strace) && start.elapsed() < Duration::from_secs(3) {
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.strace.kill();
        let _ = self.strace.wait();
    }
}

impl Drop for Injection {
    fn drop(&mut self) {
        self.let_go();
    }
}
