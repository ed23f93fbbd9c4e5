//! The daemon is killed under load, again and again: tracking goes on where it was, no disk is
//! shipped whole, no epoch is lost or applied by half, and every point stands up to the journal.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;

use crate::common::{Host, Injection, Scratch, is_alive, rounds, sparse, text};
use crate::load::{Checker, Load};
use crate::whole_disks::no_disk_is_whole;

const BYTES: u64 = 4 << 20;

/// Two disks of a protected VM under load. It ends from the first to the last.
struct Rig {
    load: Load,
    host: Host,
    seen: BTreeSet<String>,
    lower: PathBuf,
    view: PathBuf,
    scratch: Scratch,
}

impl Rig {
    fn new(name: &str) -> Self {
        let scratch = Scratch::new(name);
        let (lower, mounted) = (scratch.dir("lower"), scratch.dir("mounted"));
        let view = scratch.dir("view");
        let disks = ["a.img", "b.img"].map(|name| {
            sparse(&lower.join(name), BYTES);
            mounted.join(name)
        });
        let host = Host::new(name, &scratch.path().join("state"));
        host.keeps_preserved("256 KiB");
        host.mount(&lower, &mounted);
        host.protect("web1", &[&disks[0], &disks[1]], "1s");
        let load = Load::start(&disks, BYTES / 512, true);
        let seen = host.points("web1").into_iter().map(|p| p.id).collect();
        Self { host, load, seen, lower, view, scratch }
    }

    /// After a kill: tracking goes on, and every new point stands up to the journal.
    fn goes_on(&mut self, checker: &mut Checker<'_>) {
        self.host.restart();
        no_disk_is_whole(&self.host, "web1");
        let before = self.load.journal().now();
        self.host.sync("web1");
        self.host.run(&["point", "mount", text(&self.view)]);
        let points = self.host.points("web1");
        let newest = points.last().expect("a point").id.clone();
        let fresh: Vec<_> = points.into_iter().filter(|p| self.seen.insert(p.id.clone())).collect();
        for point in &fresh[fresh.len().saturating_sub(super::cuts::POINTS_CHECKED_MAX)..] {
            let at_least = if point.id == newest { before } else { 0 };
            let shown = super::cuts::point_disks(&self.view, "web1", &point.id);
            checker.check(&shown, at_least).unwrap_or_else(|why| panic!("point {}: {why}", point.id));
        }
        self.host.run(&["point", "umount", text(&self.view)]);
    }

    /// The last point is the disks, byte by byte. Returns how many writes were interrupted, and how
    /// many points there were.
    fn end(self) -> (u64, usize) {
        // The other way round, should something fail here.
        let Self { scratch, lower, view, seen, host, load } = self;
        let failed = load.failed_writes();
        let journal = load.stop();
        host.sync("web1");
        no_disk_is_whole(&host, "web1");
        host.run(&["point", "mount", text(&view)]);
        let shown = super::cuts::point_disks(&view, "web1", &host.newest("web1").id);
        for (name, bytes) in ["a.img", "b.img"].iter().zip(&shown) {
            assert!(fs::read(lower.join(name)).unwrap() == *bytes, "{name} differs from the newest point");
        }
        Checker::new(&journal).check(&shown, journal.now()).unwrap();
        host.run(&["point", "umount", text(&view)]);
        drop(host);
        drop(scratch);
        (failed, seen.len())
    }
}

#[test]
fn a_killed_daemon_goes_on_tracking() {
    let mut rig = Rig::new("kills");
    let journal = rig.load.journal().clone();
    let mut checker = Checker::new(&journal);
    let rounds = rounds("AFTERIMAGE_KILLS", 8);
    for round in 0..rounds {
        rig.load.wait_pairs(100);
        if round % 2 == 0 {
            // Not waited for: the kill hits the cut, the shipping, the commit or the applying.
            rig.host.run(&["sync", "web1"]);
            std::thread::sleep(std::time::Duration::from_millis(7 * (round as u64 % 11)));
        }
        rig.host.kill();
        rig.goes_on(&mut checker);
    }
    let (failed, points) = rig.end();
    println!("figures: {rounds} kills, {failed} writes interrupted, {points} points checked");
}

/// Calls that change a file, a folder, or make them durable.
const CALLS: &[&str] = &[
    "pwrite64",
    "write",
    "fdatasync",
    "fsync",
    "rename",
    "unlink",
    "unlinkat",
    "openat",
    "fallocate",
    "mkdir",
];

/// Frozen at the first, second, ... call of each kind by whatever writes HRLs, the hot-region log,
/// the vault and the state: all threads but those that serve the guest.
#[test]
fn a_daemon_that_is_frozen_at_any_call_goes_on() {
    let mut rig = Rig::new("frozen");
    let journal = rig.load.journal().clone();
    let mut checker = Checker::new(&journal);
    let rounds = rounds("AFTERIMAGE_FROZEN", CALLS.len());
    let mut frozen = BTreeMap::new();
    for round in 0..rounds {
        let (calls, number) = (CALLS[round % CALLS.len()], 1 + round / CALLS.len());
        let is_ours = |thread: &str| !thread.starts_with("fuser") && !thread.starts_with("filter");
        let action = format!("signal=KILL:when={number}");
        let pid = rig.host.daemon_pid();
        let injection = Injection::begin(pid, is_ours, calls, &action, rig.scratch.path());
        // May start the next daemon, if the kill comes early.
        rig.host.try_run(&["sync", "web1", "--wait", "--timeout", "10s"]);
        injection.end();
        // Otherwise it makes fewer such calls.
        if !is_alive(pid) {
            frozen.entry(calls).and_modify(|n| *n += 1).or_insert(1);
            rig.goes_on(&mut checker);
        }
    }
    for calls in ["pwrite64", "fdatasync", "fsync", "rename", "openat"] {
        assert!(frozen.contains_key(calls), "no {calls} was met, but {frozen:?}");
    }
    let (failed, points) = rig.end();
    println!("figures: frozen at {frozen:?}, {failed} writes interrupted, {points} points checked");
}

/// Another daemon than the one that died, and a path that is not the one in the table of mounts.
#[test]
fn a_dead_mount_is_replaced_by_whatever_path_it_is_named() {
    let scratch = Scratch::new("dead");
    let (lower, mounted) = (scratch.dir("lower"), scratch.dir("mounted"));
    sparse(&lower.join("a.img"), BYTES);
    let link = scratch.path().join("link");
    std::os::unix::fs::symlink(&mounted, &link).unwrap();
    let dead = Host::new("dead", &scratch.path().join("state.dead"));
    dead.mount(&lower, &mounted);
    dead.kill();
    assert!(fs::metadata(mounted.join("a.img")).is_err(), "the mount should be dead");
    let host = Host::new("dead", &scratch.path().join("state"));
    host.mount(&lower, &link);
    assert_eq!(fs::metadata(mounted.join("a.img")).unwrap().len(), BYTES);
    host.run(&["umount", text(&mounted)]);
    assert!(!mounted.join("a.img").exists(), "something is left of the dead mount");
}
