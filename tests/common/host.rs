//! One daemon with a state folder of its own, and the command line that speaks to it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use super::watchdog::{daemons_of, is_alive, kill_for_certain};
use super::{PATIENCE, Watchdog, text, wait_until};

/// A host of the product. The daemon is started by the first command that needs one.
pub struct Host {
    state: PathBuf,
    _watchdog: Watchdog,
}

/// What a command said.
#[derive(Debug)]
pub struct Output {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

/// A point as `points --json` lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Point {
    pub id: String,
    pub epoch: u64,
}

impl Host {
    /// `state` is made if it is missing.
    pub fn new(test: &str, state: &Path) -> Self {
        fs::create_dir_all(state).unwrap();
        let watchdog = Watchdog::new(test, state.to_owned(), Duration::from_secs(600));
        Self { state: state.to_owned(), _watchdog: watchdog }
    }

    /// Preserved blocks beyond this go into the logs; said before the first command.
    pub fn keeps_preserved(&self, memory: &str) {
        let line = format!("preserved_memory = \"{memory}\"\n");
        fs::write(self.state.join("afterimage.toml"), line).unwrap();
    }

    pub fn state(&self) -> &Path {
        &self.state
    }

    /// Runs the command line, whatever comes out.
    pub fn try_run(&self, args: &[&str]) -> Output {
        let out = Command::new("timeout")
            .args(["-k", "5", "300", env!("CARGO_BIN_EXE_afterimage"), "--state", text(&self.state)])
            .args(args)
            .output()
            .unwrap();
        Output {
            code: out.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&out.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&out.stderr).into_owned(),
        }
    }

    /// Runs a command that must succeed; its standard output.
    pub fn run(&self, args: &[&str]) -> String {
        let out = self.try_until_free(args);
        assert!(
            out.code == 0,
            "afterimage {args:?} ended with {}:\n{}{}{}",
            out.code,
            out.stdout,
            out.stderr,
            self.log_tail()
        );
        out.stdout
    }

    /// Between fork and exec, a process that another test starts holds every file that this one had
    /// open, closed here or not: a mount that is in use is asked for again for a while.
    fn try_until_free(&self, args: &[&str]) -> Output {
        let mut out = self.try_run(args);
        for _ in 0..100 {
            let is_in_use = out.stderr.contains("in use") || out.stderr.contains("busy");
            if out.code == 0 || !args.contains(&"umount") || !is_in_use {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
            out = self.try_run(args);
        }
        out
    }

    pub fn json(&self, args: &[&str]) -> Value {
        let mut all = vec!["--json"];
        all.extend(args);
        let out = self.run(&all);
        serde_json::from_str(&out).unwrap_or_else(|e| panic!("{args:?} said no JSON ({e}):\n{out}"))
    }

    pub fn mount(&self, source: &Path, dir: &Path) {
        self.run(&["mount", text(source), text(dir)]);
    }

    pub fn protect(&self, vm: &str, disks: &[&Path], interval: &str) {
        let mut args = vec!["protect", vm];
        for disk in disks {
            args.extend(["--disk", text(disk)]);
        }
        args.extend(["--interval", interval]);
        self.run(&args);
    }

    /// A cut made after the call is durable and can be opened when it returns.
    pub fn sync(&self, vm: &str) {
        self.run(&["sync", vm, "--wait"]);
    }

    /// Points that can be opened, oldest first.
    pub fn points(&self, vm: &str) -> Vec<Point> {
        let said = self.json(&["points", vm]);
        let points = said["points"].as_array().unwrap_or_else(|| panic!("no points in {said}"));
        points
            .iter()
            .map(|p| Point { id: p["id"].as_str().unwrap().into(), epoch: p["epoch"].as_u64().unwrap() })
            .collect()
    }

    pub fn newest(&self, vm: &str) -> Point {
        self.points(vm).pop().expect("a point")
    }

    /// The status of one VM.
    pub fn vm(&self, vm: &str) -> Value {
        let said = self.json(&["status", vm]);
        said["vms"]
            .as_array()
            .and_then(|vms| vms.first())
            .unwrap_or_else(|| panic!("no VM in {said}"))
            .clone()
    }

    pub fn daemon_pid(&self) -> i32 {
        let said = self.json(&["status"]);
        i32::try_from(said["daemon"]["pid"].as_i64().expect("daemon.pid")).unwrap()
    }

    /// SIGKILL, as the kernel would do it when memory is short. Gone when it returns.
    pub fn kill(&self) {
        let pids = daemons_of(&self.state);
        assert!(!pids.is_empty(), "no daemon runs for {}", self.state.display());
        pids.into_iter().for_each(kill_for_certain);
    }

    /// Any command starts the daemon again, which restores its mounts.
    pub fn restart(&self) {
        self.run(&["start"]);
    }

    /// A clean stop.
    pub fn stop(&self) {
        let pids = daemons_of(&self.state);
        self.run(&["stop"]);
        wait_until("the daemon to stop", || !pids.iter().any(|pid| is_alive(*pid)));
    }

    /// The last lines of the daemon's log, for the message of a test that failed.
    pub fn log_tail(&self) -> String {
        let log = fs::read_to_string(self.state.join("daemon.log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        let from = lines.len().saturating_sub(40);
        format!("the daemon's log ends with:\n{}\n", lines[from..].join("\n"))
    }

    /// The maps in shared memory go with the power, not with the daemon; here the state folder that
    /// they belong to goes.
    fn forget_shared_memory(&self) {
        let digest = afterimage::base::Digest::of(self.state.as_os_str().as_encoded_bytes());
        let prefix = format!("afterimage-{}-", digest.short());
        let entries = fs::read_dir("/dev/shm").into_iter().flatten().flatten();
        for entry in entries.filter(|e| e.file_name().to_string_lossy().starts_with(&prefix)) {
            let _ = fs::remove_file(entry.path());
        }
    }

    fn shut_down(&self) {
        let pids = daemons_of(&self.state);
        if pids.is_empty() {
            return;
        }
        let _ = Command::new("timeout")
            .args(["-k", "5", "20", env!("CARGO_BIN_EXE_afterimage"), "--state", text(&self.state), "stop"])
            .output();
        for pid in pids {
            let start = std::time::Instant::now();
            while is_alive(pid) && start.elapsed() < PATIENCE / 10 {
                std::thread::sleep(Duration::from_millis(10));
            }
            if is_alive(pid) {
                kill_for_certain(pid);
            }
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.log_tail());
        }
        self.shut_down();
        self.forget_shared_memory();
    }
}
