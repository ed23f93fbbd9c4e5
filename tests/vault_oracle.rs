//! Thousands of random epochs: every point, byte for byte, against the images that the primary kept.

mod vault_support;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use afterimage::core::ports::points::PointStore;
use afterimage::core::ports::vault::Vault;
use afterimage::core::retention::Keep;
use afterimage::vault::DirectoryVault;
use vault_support::*;

/// How many times the usual number of rounds: `AFTERIMAGE_ROUNDS=20` for the full count.
fn times() -> usize {
    std::env::var("AFTERIMAGE_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(1)
}

/// Rounds of one seed; a round is one to three epochs and something done to the points.
fn run(seed: u64, rounds: usize) {
    let dir = memory_dir();
    let clock = TestClock::new();
    let mut primary = Primary::small(seed, 40);
    let vm = primary.vm;
    let mut images = BTreeMap::new();
    let open = || DirectoryVault::open(dir.path(), Arc::clone(&clock) as _).unwrap();
    let mut vault = open();
    vault.register(vm, &"web1".parse().unwrap()).unwrap();
    let mut random = Random(seed ^ 0xabcd);
    let mut held = Vec::new();
    for round in 0..rounds {
        let what = format!("seed {seed} round {round}");
        for _ in 0..1 + random.below(3) {
            (0..random.below(5)).for_each(|_| primary.mutate());
            let epoch = primary.cut();
            images.insert(epoch.point(), epoch.image.clone());
            epoch.deliver(&*vault).unwrap_or_else(|e| panic!("{what}: {e}"));
            clock.advance(Duration::from_secs(1 + random.below(900) as u64));
        }
        assert!(vault.wait_applied(vm, PATIENCE).unwrap(), "{what}: {:?}", vault.last_error(vm));
        let points = vault.points(vm).unwrap();
        let chosen = points[random.below(points.len())].id;
        match random.below(10) {
            0 => vault.set_pinned(vm, chosen, random.chance(50)).unwrap(),
            1 => held.push((chosen, vault.open(vm, chosen).unwrap())),
            2 => held.clear(),
            3 => {
                held.clear();
                drop(vault);
                vault = open();
            }
            4 => {
                let keep = Keep { all_seconds: 3600, hourly: random.below(5) as u32, daily: 2 };
                vault.set_retention(vm, keep).unwrap();
                vault.expire(vm).unwrap();
            }
            _ => drop(vault.delete(vm, chosen)),
        }
        // Readers that were open before show the same as ever.
        for (point, reader) in &held {
            assert_shows(&**reader, &images[point], &format!("{what}: held {point}"));
        }
        if round % 8 == 0 || round + 1 == rounds {
            assert_points(&*vault, vm, &images, &what);
            assert_eq!(vault.verify(vm).unwrap(), Vec::<String>::new(), "{what}");
        }
        let points = vault.points(vm).unwrap();
        if points.len() > 25 {
            points[..20].iter().for_each(|p| drop(vault.delete(vm, p.id)));
        }
    }
}

#[test]
fn every_point_equals_its_image_seed_1() {
    run(1, 100 * times());
}

#[test]
fn every_point_equals_its_image_seed_2() {
    run(2, 100 * times());
}

#[test]
fn every_point_equals_its_image_many_seeds() {
    (100..100 + 8 * times() as u64).for_each(|seed| run(seed, 20));
}
