//! Bit rot on the source: one bit of one file of the tracker (hot-region log, HRL, record of the VM)
//! is flipped while nobody runs. The next start finds every block that the replica does not have.

mod tracker_rig;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use afterimage::base::BootId;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use tracker_rig::Rig;

/// Only so much of a file is looked at: preserved blocks lie far behind.
const LOOKED_AT: usize = 1 << 20;

/// Flips a bit of what is not zeros up to the end; what was flipped.
fn flip(path: &Path, random: &mut SmallRng) -> String {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut bytes = vec![0; LOOKED_AT];
    let length = file.read_at(&mut bytes, 0).unwrap();
    let used = bytes[..length].iter().rposition(|b| *b != 0).unwrap();
    // Most of the first page of a log is never used.
    let at = match used {
        4096.. if random.random_bool(0.8) => random.random_range(4096..=used),
        4096.. => random.random_range(0..128),
        _ => random.random_range(0..=used),
    } as u64;
    let bit = random.random_range(0..8);
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1 << bit], at).unwrap();
    format!("bit {bit} of byte {at} of {}", path.file_name().unwrap().display())
}

/// The kind of a file, and how often it was flipped, and how often that was an error or made a start
/// other than without.
type Figures = BTreeMap<String, (u64, u64)>;

/// One flip, after the power was lost or a clean stop.
fn rot(seed: u64, figures: &mut Figures) {
    let mut random = SmallRng::seed_from_u64(seed);
    let mut rig = Rig::new(seed, 10 << 20);
    rig.open(BootId(1), true);
    rig.ship_everything();
    // The hot-region log has two files: the older one says too little.
    rig.change(5);
    rig.reopen(BootId(1));
    rig.change(20);
    rig.vm().flush().unwrap();
    rig.change(5);
    let clean = random.random_bool(0.5);
    if clean {
        rig.vm().stop_clean().unwrap();
    }
    let files = rig.end();
    let file = &files[random.random_range(0..files.len())];
    let what = flip(file, &mut random);
    let kind = file.extension().or(file.file_name()).unwrap().to_string_lossy().into_owned();
    let figure = figures.entry(kind).or_default();
    figure.0 += 1;
    println!("seed {seed}: {what}, clean: {clean}");
    match rig.try_open(BootId(2)) {
        Err(e) => {
            println!("    {e}");
            figure.1 += 1;
        }
        Ok(()) => {
            let expected = if clean { "clean-stop" } else { "power-lost" };
            let labels: Vec<_> = rig.vm().recovered().iter().map(|r| r.label).collect();
            println!("    {labels:?}");
            figure.1 += u64::from(labels.iter().any(|l| *l != expected));
            rig.ship_everything();
            rig.assert_replica_equals_disks();
        }
    }
}

/// `AFTERIMAGE_ROT` flips; 40 without.
#[test]
fn a_flipped_bit_hides_no_change() {
    let count = std::env::var("AFTERIMAGE_ROT").ok().and_then(|n| n.parse().ok()).unwrap_or(40);
    let start = std::env::var("AFTERIMAGE_ROT").map_or(0, |_| rand::random::<u32>().into());
    let mut figures = Figures::new();
    (start..start + count).for_each(|seed| rot(seed, &mut figures));
    for (kind, (flips, noticed)) in &figures {
        println!("{kind}: {flips} flips, {noticed} noticed");
    }
    let (flips, noticed) = figures.values().fold((0, 0), |(a, b), (f, n)| (a + f, b + n));
    println!("figures: {flips} flips, {noticed} noticed, the others changed nothing");
    assert!(figures.len() >= 3, "{figures:?}");
    assert!(noticed < flips, "a start must not compare whole disks without a reason");
}
