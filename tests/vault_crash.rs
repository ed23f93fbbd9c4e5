//! A kill at every step: the vault is stopped at its n-th step, for all n, and opened again. After
//! each kill the shipper goes on as it would (head first, then what is missing); nothing is lost,
//! nothing half done, every point shows its image.

mod vault_support;

use std::path::Path;
use std::sync::Arc;

use afterimage::core::ports::points::PointStore;
use afterimage::core::ports::vault::Vault;
use afterimage::vault::{DirectoryVault, Steps};
use vault_support::story::{Deed, Story, go_on, story};
use vault_support::*;

fn open(path: &Path, steps: &Arc<Steps>) -> Arc<DirectoryVault> {
    DirectoryVault::open_with(path, TestClock::new(), Arc::clone(steps)).unwrap()
}

/// Stops at step `n`, opens, and finishes the story. `false`: it has fewer steps.
fn stop_at(story: &Story, n: u64) -> bool {
    let dir = memory_dir();
    let steps = Arc::new(Steps::default());
    steps.stop_after(n);
    let vault = open(dir.path(), &steps);
    let mut next = 0;
    let result = go_on(story, &vault, &mut next);
    drop(vault);
    if !steps.is_stopped() {
        result.unwrap();
        return false;
    }
    let what = format!("stopped at step {n}, in deed {next}");
    let vault = open(dir.path(), &Arc::default());
    if vault.head(story.vm).is_ok() {
        // Right after the kill, and again once what was begun is finished.
        assert_points(&*vault, story.vm, &story.images, &what);
        vault.wait_applied(story.vm, PATIENCE).unwrap();
        assert_points(&*vault, story.vm, &story.images, &what);
        let listed = vault.points(story.vm).unwrap().len();
        let delivered = story.deeds[..next].iter().filter(|d| matches!(d, Deed::Deliver(_))).count();
        let deleted = story.deeds[..next].iter().filter(|d| matches!(d, Deed::Delete(_))).count();
        // The deed that was cut short may have been done.
        assert!(listed + 1 >= delivered - deleted && listed <= delivered - deleted + 1, "{what}: {listed}");
    }
    go_on(story, &vault, &mut next).unwrap_or_else(|e| panic!("{what}: {e}"));
    finish(story, &vault, &what);
    true
}

fn finish(story: &Story, vault: &DirectoryVault, what: &str) {
    assert_points(vault, story.vm, &story.images, what);
    let points = vault.points(story.vm).unwrap();
    assert_eq!(points.len(), 5, "{what}");
    assert_eq!(points.iter().filter(|p| p.pinned).count(), 1, "{what}");
    assert_eq!(vault.verify(story.vm).unwrap(), Vec::<String>::new(), "{what}");
    // Nothing is left over.
    let root = vault.path().join("vms").join(story.vm.to_string());
    let files = |sub: &str| std::fs::read_dir(root.join(sub)).unwrap().count();
    assert_eq!(files("inbox"), 0, "{what}");
    assert_eq!(files("points"), 5 + 4, "{what}");
}

#[test]
fn a_kill_at_any_step_loses_and_tears_nothing() {
    let story = story();
    let mut n = 1;
    while stop_at(&story, n) {
        n += 1;
    }
    assert!(n > 100, "only {n} steps");
}

/// Kills within kills: the vault is stopped again and again while it recovers.
#[test]
fn kills_in_a_row_lose_and_tear_nothing() {
    let story = story();
    for stride in [4, 11] {
        let dir = memory_dir();
        let mut next = 0;
        let mut kills = 0;
        loop {
            let steps = Arc::new(Steps::default());
            steps.stop_after(stride + kills % 7 + kills / 8);
            let vault = open(dir.path(), &steps);
            if next > 0 && !steps.is_stopped() {
                assert_points(&*vault, story.vm, &story.images, &format!("stride {stride}, kill {kills}"));
            }
            let result = go_on(&story, &vault, &mut next);
            if !steps.is_stopped() {
                result.unwrap();
                finish(&story, &vault, &format!("stride {stride}"));
                break;
            }
            kills += 1;
            assert!(kills < 2000, "no progress");
        }
    }
}
