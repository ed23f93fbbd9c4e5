//! Bit rot: one bit of one file of a vault that lies still is flipped. Whoever reads a point gets
//! what it was or an error, never other bytes, also after the story went on over the damage; and a
//! flip that nobody notices changes nothing.

mod vault_support;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use afterimage::base::{Error, ErrorKind, Result};
use afterimage::core::ports::points::{PointReader, PointStore};
use afterimage::vault::{DirectoryVault, Steps};
use vault_support::story::{Story, go_on, settled, story};
use vault_support::*;

/// A vault that was stopped somewhere in the story.
struct Template {
    dir: tempfile::TempDir,
    /// The deed that was cut short.
    next: usize,
    /// Points that it lists, undamaged.
    points: usize,
}

/// Copies with holes as they are.
fn copy(from: &Path) -> tempfile::TempDir {
    let dir = memory_dir();
    let status = Command::new("cp").arg("-a").arg(from.join(".")).arg(dir.path()).status().unwrap();
    assert!(status.success());
    dir
}

fn open(path: &Path) -> Result<Arc<DirectoryVault>> {
    DirectoryVault::open(path, TestClock::new())
}

fn template(story: &Story, steps_done: u64) -> Template {
    let dir = memory_dir();
    let steps = Arc::new(Steps::default());
    steps.stop_after(steps_done);
    let vault = DirectoryVault::open_with(dir.path(), TestClock::new(), steps.clone()).unwrap();
    let mut next = 0;
    let _ = go_on(story, &vault, &mut next);
    drop(vault);
    let whole = copy(dir.path());
    let vault = open(whole.path()).unwrap();
    let points = settled(story, &vault).map_or(0, |()| vault.points(story.vm).unwrap().len());
    Template { dir, next, points }
}

/// Every file with something in it, by its kind.
fn files(dir: &Path, found: &mut BTreeMap<String, Vec<PathBuf>>) {
    for entry in fs::read_dir(dir).unwrap() {
        let (path, meta) = entry.map(|e| (e.path(), e.metadata().unwrap())).unwrap();
        let folder = dir.file_name().unwrap().to_string_lossy();
        let name = path.file_name().unwrap().to_string_lossy();
        if meta.is_dir() {
            files(&path, found);
        } else if meta.len() > 0 {
            let kind = match (name.rsplit_once('.'), dir.parent().and_then(Path::file_name)) {
                (None, _) if name == "manifest" => "inbox/manifest".to_owned(),
                (None, _) => "inbox/part".to_owned(),
                (Some((_, ending)), Some(parent)) if parent == "inbox" && folder != "first" => {
                    format!("inbox/{ending}")
                }
                (Some((_, "json")), _) => name.clone().into_owned(),
                (Some((_, ending)), _) => format!("{folder}/{ending}"),
            };
            found.entry(kind).or_default().push(path);
        }
    }
}

/// Reads a point block by block. `Ok`: everything is as it should be. `Err`: something is an error.
/// Panics on a wrong byte, and on a hole where there is data.
fn shows_nothing_wrong(reader: &dyn PointReader, image: &Image, what: &str) -> Result<()> {
    let paths: Vec<&PathBuf> = reader.disks().iter().map(|d| &d.path).collect();
    assert_eq!(paths, image.keys().collect::<Vec<_>>(), "{what}: disks");
    assert_eq!(reader.definition()[0].content, format!("# {}", reader.info().id.epoch), "{what}");
    let mut damage = Ok(());
    for (n, (path, expected)) in image.iter().enumerate() {
        assert_eq!(reader.disks()[n].size, expected.len() as u64, "{what}: size of {}", path.display());
        for (block, right) in expected.chunks(BLOCK).enumerate() {
            let mut content = [0xee; BLOCK];
            match reader.read_at(n, (block * BLOCK) as u64, &mut content) {
                Ok(read) => assert!(
                    read == right.len() && content[..read] == *right,
                    "{what}: block {block} of {} is wrong and nobody says so",
                    path.display()
                ),
                Err(e) => damage = Err(e),
            }
        }
        let mut at = 0;
        while at < expected.len() as u64 {
            let run = match reader.next_data(n, at) {
                Ok(run) => run,
                Err(e) => {
                    damage = Err(e);
                    break;
                }
            };
            let end = run.map_or(expected.len() as u64, |r| r.offset);
            let hole = &expected[at as usize..end as usize];
            assert!(hole.iter().all(|b| *b == 0), "{what}: data of {} is a hole", path.display());
            at = run.map_or(end, |r| r.end());
        }
    }
    damage
}

/// Every point that is listed; an error if any could not be read. How many there are.
fn points_show_nothing_wrong(story: &Story, vault: &DirectoryVault, what: &str) -> Result<usize> {
    let points = vault.points(story.vm)?;
    let mut damage = Ok(points.len());
    for info in &points {
        let image = story.images.get(&info.id).unwrap_or_else(|| panic!("{what}: unknown point {}", info.id));
        let shown = vault
            .open(story.vm, info.id)
            .and_then(|reader| shows_nothing_wrong(&*reader, image, &format!("{what}: point {}", info.id)));
        if let Err(e) = shown {
            damage = Err(e);
        }
    }
    damage
}

/// Everything that can be done with a vault. `Err`: somebody noticed.
fn live_on(story: &Story, template: &Template, dir: &Path, what: &str) -> Result<()> {
    let vault = open(dir)?;
    let mut noticed = Ok(());
    if template.points > 0 {
        noticed = points_show_nothing_wrong(story, &vault, what).map(drop).and(settled(story, &vault));
        let listed = points_show_nothing_wrong(story, &vault, what);
        let verified = vault.verify(story.vm).and_then(|found| match found.is_empty() {
            true => Ok(()),
            false => Err(Error::new(ErrorKind::Damaged, found.join("; "))),
        });
        let listed = noticed.and(verified).and(listed);
        noticed = listed.map(|n| assert_eq!(n, template.points, "{what}: points are gone"));
    }
    // The story goes on over the damage.
    let mut next = template.next;
    let went_on = go_on(story, &vault, &mut next);
    let shown = points_show_nothing_wrong(story, &vault, &format!("{what}, later"));
    let found = vault.verify(story.vm);
    noticed.and(went_on)?;
    assert_eq!(shown?, 5, "{what}: points are gone in the end");
    assert_eq!(found?, Vec::<String>::new(), "{what}: damage that was not there before");
    Ok(())
}

/// One flip.
fn rot(story: &Story, template: &Template, kind: &str, file: &Path, random: &mut Random) -> bool {
    let dir = copy(template.dir.path());
    let path = dir.path().join(file.strip_prefix(template.dir.path()).unwrap());
    let at = random.next() % fs::metadata(&path).unwrap().len();
    let bit = random.below(8);
    let handle = fs::File::options().read(true).write(true).open(&path).unwrap();
    let mut byte = [0];
    handle.read_exact_at(&mut byte, at).unwrap();
    handle.write_all_at(&[byte[0] ^ 1 << bit], at).unwrap();
    drop(handle);
    let what = format!("bit {bit} of byte {at} of {kind}, stopped in deed {}", template.next);
    live_on(story, template, dir.path(), &what).is_err()
}

/// `AFTERIMAGE_ROT` positions; 400 without.
#[test]
fn a_flipped_bit_is_noticed_or_changes_nothing() {
    let count = std::env::var("AFTERIMAGE_ROT").ok().and_then(|n| n.parse().ok()).unwrap_or(400);
    let seed = std::env::var("AFTERIMAGE_ROT").map_or(1, |_| rand::random());
    println!("seed {seed}");
    let story = story();
    let mut random = Random(seed);
    let mut figures: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    let mut done = 0;
    while done < count {
        let template = template(&story, 20 + random.next() % 250);
        let mut kinds = BTreeMap::new();
        files(template.dir.path(), &mut kinds);
        for (kind, files) in &kinds {
            for _ in 0..2 {
                let file = &files[random.below(files.len())];
                let noticed = rot(&story, &template, kind, file, &mut random);
                let figure = figures.entry(kind.clone()).or_default();
                figure.0 += 1;
                figure.1 += u64::from(noticed);
                done += 1;
            }
        }
    }
    for (kind, (flips, noticed)) in &figures {
        println!("{kind}: {flips} flips, {noticed} noticed");
    }
    let (flips, noticed) = figures.values().fold((0, 0), |(a, b), (f, n)| (a + f, b + n));
    println!("figures: {flips} flips, {noticed} noticed, the others changed nothing");
    assert!(figures.len() >= 11, "{figures:?}");
}
