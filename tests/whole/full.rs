//! No room, or no vault: guests work on, the status says what happened, and when the cause is gone
//! replication catches up by itself.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::common::{Host, Kind, Scratch, Volume, rounds, run, sparse, text, wait_until};

pub const BYTES: u64 = 24 << 20;

/// Overwrites `count` blocks, each with its own content; every write must succeed.
pub fn overwrite(disk: &File, seed: u64, count: u64) {
    for n in 0..count {
        let block = (n * 7 + seed * 3) % (BYTES / 4096);
        let content = blake3::hash(&(seed << 32 | n).to_le_bytes());
        let bytes = content.as_bytes().repeat(4096 / 32);
        disk.write_all_at(&bytes, block * 4096).unwrap_or_else(|e| panic!("the guest got an error: {e}"));
    }
}

pub fn open(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

/// Fills a file system to its last block.
fn fill(dir: &Path) {
    let ballast = File::create(dir.join("ballast")).unwrap();
    let mut at = 0;
    for step in [1u64 << 20, 64 << 10, 4 << 10] {
        let piece = vec![0xab; usize::try_from(step).unwrap()];
        while ballast.write_all_at(&piece, at).is_ok() {
            at += step;
        }
    }
    let _ = ballast.sync_all();
}

fn is_well(host: &Host) -> bool {
    host.vm("web1")["last_error"].is_null()
}

/// The newest point, made after everything is well again, equals the disk.
pub fn catches_up(host: &Host, scratch: &Scratch, lower: &Path) {
    wait_until("replication to catch up by itself", || {
        host.try_run(&["sync", "web1", "--wait", "--timeout", "20s"]).code == 0
    });
    assert!(is_well(host), "{}", host.vm("web1"));
    let to = scratch.path().join("restored");
    host.run(&["restore", "web1", "--to", text(&to), "--force"]);
    assert!(fs::read(to.join("a.img")).unwrap() == fs::read(lower.join("a.img")).unwrap());
}

#[test]
fn a_full_vault_is_no_matter_for_the_guest() {
    let scratch = Scratch::new("vault-full");
    let (lower, mounted) = (scratch.dir("lower"), scratch.dir("mounted"));
    let vault = Volume::make(&scratch.path().join("vault.fs"), Kind::Ext4, 96, &scratch.dir("vault"));
    sparse(&lower.join("a.img"), BYTES);
    let host = Host::new("vault-full", &scratch.path().join("state"));
    host.mount(&lower, &mounted);
    let disk = mounted.join("a.img");
    host.run(&["protect", "web1", "--disk", text(&disk), "--interval", "1s", "--to", text(vault.dir())]);
    let file = open(&disk);
    overwrite(&file, 1, 500);
    host.sync("web1");
    for round in 0..rounds("AFTERIMAGE_FULL", 1) as u64 {
        fill(vault.dir());
        overwrite(&file, 2 + round, 4000);
        let out = host.try_run(&["sync", "web1", "--wait", "--timeout", "5s"]);
        assert_ne!(out.code, 0, "a full vault cannot take 16 MiB: {}", out.stdout);
        wait_until("the status to say so", || !is_well(&host));
        let status = host.vm("web1");
        assert_ne!(status["health"], "Normal", "{status}");
        overwrite(&file, 3 + round, 500);
        fs::remove_file(vault.dir().join("ballast")).unwrap();
        catches_up(&host, &scratch, &lower);
    }
}

#[test]
fn a_vault_that_is_gone_is_no_matter_for_the_guest() {
    let scratch = Scratch::new("vault-gone");
    let (lower, mounted) = (scratch.dir("lower"), scratch.dir("mounted"));
    let vault = scratch.dir("vault");
    sparse(&lower.join("a.img"), BYTES);
    let host = Host::new("vault-gone", &scratch.path().join("state"));
    host.mount(&lower, &mounted);
    let disk = mounted.join("a.img");
    host.run(&["protect", "web1", "--disk", text(&disk), "--interval", "1s", "--to", text(&vault)]);
    let file = open(&disk);
    overwrite(&file, 1, 500);
    host.sync("web1");
    let points = host.points("web1").len();
    let away = scratch.path().join("vault.away");
    fs::rename(&vault, &away).unwrap();
    overwrite(&file, 2, 500);
    let out = host.try_run(&["sync", "web1", "--wait", "--timeout", "5s"]);
    assert_ne!(out.code, 0, "there is no vault: {}", out.stdout);
    assert_ne!(host.vm("web1")["health"], "Normal");
    assert!(!vault.exists() || fs::read_dir(&vault).unwrap().next().is_none(), "a second vault was begun");
    overwrite(&file, 3, 500);
    let _ = fs::remove_dir(&vault);
    fs::rename(&away, &vault).unwrap();
    catches_up(&host, &scratch, &lower);
    assert!(host.points("web1").len() > points, "older points are still there");
}

/// With old content in the logs, for which there is no space.
#[test]
fn a_full_image_file_system_is_no_matter_for_a_guest_that_overwrites() {
    overwrite_on_a_full_file_system("images-full", "0");
}

/// With old content in memory.
#[test]
fn a_full_image_file_system_is_no_matter_when_old_content_is_in_memory() {
    overwrite_on_a_full_file_system("images-full-memory", "32 MiB");
}

fn overwrite_on_a_full_file_system(name: &str, memory: &str) {
    let scratch = Scratch::new(name);
    let mounted = scratch.dir("mounted");
    let images = Volume::make(&scratch.path().join("images.fs"), Kind::Ext4, 96, &scratch.dir("images"));
    let lower = images.dir();
    fs::write(lower.join("a.img"), vec![1; usize::try_from(BYTES).unwrap()]).unwrap();
    run("sync", &["-f", text(lower)]);
    let host = Host::new(name, &scratch.path().join("state"));
    host.keeps_preserved(memory);
    host.mount(lower, &mounted);
    let disk = mounted.join("a.img");
    host.protect("web1", &[&disk], "1s");
    let file = open(&disk);
    overwrite(&file, 1, 500);
    host.sync("web1");
    for round in 0..rounds("AFTERIMAGE_FULL", 1) as u64 {
        fill(lower);
        for n in 0..4 {
            overwrite(&file, 4 * round + 2 + n, 1000);
            host.run(&["sync", "web1"]);
        }
        file.sync_all().unwrap();
        fs::remove_file(lower.join("ballast")).unwrap();
        overwrite(&file, 4 * round + 7, 500);
        catches_up(&host, &scratch, lower);
    }
}
