//! Disks that fail: guests work on where they can, the status says what happened, and when the cause
//! is gone replication catches up by itself.

use std::path::PathBuf;

use serde_json::Value;

use crate::common::{Host, Injection, Scratch, sparse, text, wait_until};
use crate::full::{BYTES, catches_up, open, overwrite};

struct Rig {
    host: Host,
    lower: PathBuf,
    disk: PathBuf,
    scratch: Scratch,
}

impl Rig {
    fn new(name: &str) -> Self {
        let scratch = Scratch::new(name);
        let (lower, mounted) = (scratch.dir("lower"), scratch.dir("mounted"));
        sparse(&lower.join("a.img"), BYTES);
        let host = Host::new(name, &scratch.path().join("state"));
        host.keeps_preserved("0");
        host.mount(&lower, &mounted);
        let disk = mounted.join("a.img");
        host.protect("web1", &[&disk], "1s");
        Self { host, lower, disk, scratch }
    }

    /// `calls` of one thread fail with EIO while the guest writes, which must succeed, and while a
    /// cut is asked for, which must not. Returns the status then; afterwards all is well again.
    fn fails(self, thread: &str, calls: &str) -> Value {
        overwrite(&open(&self.disk), 1, 100);
        self.host.sync("web1");
        let pid = self.host.daemon_pid();
        let injection = Injection::begin(pid, |name| name == thread, calls, "error=EIO", self.scratch.path());
        overwrite(&open(&self.disk), 2, 500);
        let out = self.host.try_run(&["sync", "web1", "--wait", "--timeout", "5s"]);
        assert_ne!(out.code, 0, "{calls} of {thread} fail: {}", out.stdout);
        let mut status = Value::Null;
        wait_until("the status to say so", || {
            status = self.host.vm("web1");
            is_ill(&status)
        });
        overwrite(&open(&self.disk), 3, 500);
        assert!(injection.end() > 0, "{thread} made no {calls}");
        overwrite(&open(&self.disk), 4, 100);
        catches_up(&self.host, &self.scratch, &self.lower);
        status
    }
}

fn is_ill(vm: &Value) -> bool {
    !vm["last_error"].is_null() || text_of(vm).contains("the vault does not take everything")
}

fn text_of(vm: &Value) -> String {
    format!("{} {}", vm["reasons"], vm["last_error"])
}

#[test]
fn a_block_that_cannot_be_read_is_named_and_not_sent_as_zeros() {
    let said = text_of(&Rig::new("unreadable").fails("shipper:web1", "pread64"));
    assert!(said.contains("a.img cannot be read at offset"), "{said}");
}

#[test]
fn a_part_that_cannot_be_synced_is_not_acknowledged() {
    let said = text_of(&Rig::new("part-sync").fails("shipper:web1", "fdatasync,fsync"));
    assert!(said.contains("Input/output error"), "{said}");
}

#[test]
fn an_epoch_that_cannot_be_synced_is_no_point() {
    let said = text_of(&Rig::new("apply-sync").fails("apply:web1", "fdatasync,fsync"));
    assert!(said.contains("Input/output error"), "{said}");
}

/// T8: activations fail; the mark on the disk file stands in for them.
#[test]
fn a_hot_region_log_that_fails_is_no_matter_for_the_guest() {
    // Bound so that the host ends before its folder goes.
    let Rig { scratch, lower, disk, host } = Rig::new("hot-log");
    let pid = host.daemon_pid();
    let is_log = |name: &str| name == "tracker-hotlog";
    let injection = Injection::begin(pid, is_log, "fdatasync,fsync", "error=EIO", scratch.path());
    // Its regions are cold.
    overwrite(&open(&disk), 2, 500);
    assert!(has_untracked_mark(&lower.join("a.img")), "the mark is on the file");
    host.sync("web1");
    assert!(injection.end() > 0, "nothing was activated");
    wait_until("the log to be used again", || !has_untracked_mark(&lower.join("a.img")));
    overwrite(&open(&disk), 3, 500);
    catches_up(&host, &scratch, &lower);
}

fn has_untracked_mark(file: &std::path::Path) -> bool {
    let out = std::process::Command::new("getfattr").args(["-m", "-", "--", text(file)]).output();
    String::from_utf8_lossy(&out.expect("getfattr").stdout).contains("trusted.afterimage.untracked")
}
