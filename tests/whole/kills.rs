//! The daemon is killed under load, again and again: tracking goes on where it was, no disk is
//! shipped whole, no epoch is lost or applied by half, and every point stands up to the journal.

use std::collections::BTreeSet;
use std::fs;

use crate::common::{Host, Scratch, rounds, sparse};
use crate::load::{Checker, Load};
use crate::whole_disks::no_disk_is_whole;

const BYTES: u64 = 4 << 20;

#[test]
fn a_killed_daemon_goes_on_tracking() {
    let scratch = Scratch::new("kills");
    let (lower, mounted) = (scratch.dir("lower"), scratch.dir("mounted"));
    let view = scratch.dir("view");
    let disks = ["a.img", "b.img"].map(|name| {
        sparse(&lower.join(name), BYTES);
        mounted.join(name)
    });
    let host = Host::new("kills", &scratch.path().join("state"));
    host.mount(&lower, &mounted);
    host.protect("web1", &[&disks[0], &disks[1]], "1s");

    let load = Load::start(&disks, BYTES / 512, true);
    let journal = load.journal().clone();
    let mut checker = Checker::new(&journal);
    let mut seen: BTreeSet<String> = host.points("web1").into_iter().map(|p| p.id).collect();
    let rounds = rounds("AFTERIMAGE_KILLS", 8);
    for round in 0..rounds {
        load.wait_pairs(100);
        if round % 2 == 0 {
            // Not waited for: the kill hits the cut, the shipping, the commit or the applying.
            host.run(&["sync", "web1"]);
            std::thread::sleep(std::time::Duration::from_millis(7 * (round as u64 % 11)));
        }
        host.kill();
        host.restart();
        no_disk_is_whole(&host, "web1");
        let before = journal.now();
        host.sync("web1");
        host.run(&["point", "mount", view.to_str().unwrap()]);
        let points = host.points("web1");
        let newest = points.last().expect("a point").id.clone();
        let fresh: Vec<_> = points.into_iter().filter(|p| seen.insert(p.id.clone())).collect();
        for point in &fresh[fresh.len().saturating_sub(super::cuts::POINTS_CHECKED_MAX)..] {
            let at_least = if point.id == newest { before } else { 0 };
            let shown = super::cuts::point_disks(&view, "web1", &point.id);
            checker.check(&shown, at_least).unwrap_or_else(|why| panic!("point {}: {why}", point.id));
        }
        host.run(&["point", "umount", view.to_str().unwrap()]);
    }
    let failed = load.failed_writes();
    let journal = load.stop();

    host.sync("web1");
    no_disk_is_whole(&host, "web1");
    host.run(&["point", "mount", view.to_str().unwrap()]);
    let shown = super::cuts::point_disks(&view, "web1", &host.newest("web1").id);
    for (name, bytes) in ["a.img", "b.img"].iter().zip(&shown) {
        assert!(fs::read(lower.join(name)).unwrap() == *bytes, "{name} differs from the newest point");
    }
    Checker::new(&journal).check(&shown, journal.now()).unwrap();
    host.run(&["point", "umount", view.to_str().unwrap()]);
    println!("figures: {rounds} kills, {failed} writes interrupted, {} points checked", seen.len());
}
