//! Consistent cuts: every point is what one instant could have left on all disks together (T1).

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::common::{Host, Scratch, rounds, sparse};
use crate::load::{Checker, Load};

/// Size of each of the two disks.
const BYTES: u64 = 4 << 20;
/// Pairs written between two cuts, at least.
const PAIRS: u64 = 500;

/// Points of one round that are read whole, at most: on a slow machine the interval makes many.
pub const POINTS_CHECKED_MAX: usize = 4;

/// The content of both disks as a point shows them.
pub fn point_disks(view: &Path, vm: &str, point: &str) -> Vec<Vec<u8>> {
    ["a.img", "b.img"]
        .map(|name| {
            let path = view.join(vm).join(point).join(name);
            fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
        })
        .to_vec()
}

#[test]
fn cuts_are_consistent_across_disks_under_load() {
    let scratch = Scratch::new("cuts");
    let (lower, mounted) = (scratch.dir("lower"), scratch.dir("mounted"));
    let view = scratch.dir("view");
    let disks = ["a.img", "b.img"].map(|name| {
        sparse(&lower.join(name), BYTES);
        mounted.join(name)
    });
    let host = Host::new("cuts", &scratch.path().join("state"));
    // Less than an epoch can need: memory and file are both used.
    host.keeps_preserved("256 KiB");
    host.mount(&lower, &mounted);
    host.protect("web1", &[&disks[0], &disks[1]], "1s");
    host.run(&["point", "mount", view.to_str().unwrap()]);

    let load = Load::start(&disks, BYTES / 512, false);
    let journal = load.journal().clone();
    let mut checker = Checker::new(&journal);
    let mut seen: BTreeSet<String> = host.points("web1").into_iter().map(|p| p.id).collect();
    let mut checked = 0;
    for _ in 0..rounds("AFTERIMAGE_CUTS", 12) {
        load.wait_pairs(PAIRS);
        let before = journal.now();
        host.sync("web1");
        let points = host.points("web1");
        let newest = points.last().expect("a point").id.clone();
        // That of the call, and of those that the interval made meanwhile the last.
        let fresh: Vec<_> = points.into_iter().filter(|p| seen.insert(p.id.clone())).collect();
        for point in &fresh[fresh.len().saturating_sub(POINTS_CHECKED_MAX)..] {
            let at_least = if point.id == newest { before } else { 0 };
            let shown = point_disks(&view, "web1", &point.id);
            checker.check(&shown, at_least).unwrap_or_else(|why| panic!("point {}: {why}", point.id));
            checked += 1;
        }
    }
    let pairs = load.pairs();
    let journal = load.stop();
    let (issued, acknowledged) = journal.counts();
    assert_eq!(issued, acknowledged);

    // The newest point is the source as of its cut, byte by byte.
    host.sync("web1");
    let newest = host.newest("web1").id;
    let shown = point_disks(&view, "web1", &newest);
    for (name, bytes) in ["a.img", "b.img"].iter().zip(&shown) {
        assert!(fs::read(lower.join(name)).unwrap() == *bytes, "{name} differs from point {newest}");
    }
    Checker::new(&journal).check(&shown, journal.now()).unwrap();

    // Older points still show what they showed, through the undo logs.
    let points = host.points("web1");
    for point in points.iter().step_by(points.len().div_ceil(5)).rev() {
        let shown = point_disks(&view, "web1", &point.id);
        Checker::new(&journal).check(&shown, 0).unwrap_or_else(|why| panic!("point {}: {why}", point.id));
    }
    println!("figures: {checked} cuts, none inconsistent; {issued} writes, {pairs} pairs");
}
