//! Power cuts: everything that was not synced is lost, at once, on the file system of the disks, on
//! that of state and vault, or on both. Afterwards only hot regions and marked blocks cross again,
//! and the replica equals the source.
//!
//! The power of a file system goes by its own shutdown call, which drops whatever is not on its
//! device, renames too. The daemon is killed, and what follows sees another boot: the test lives
//! in a mount namespace of its own, in which the kernel's boot id and the
//! time of the boot are files of ours.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::sched::{CloneFlags, unshare};

use crate::common::{Host, Kind, Scratch, Volume, rounds, run, text, unmount, wait_until};
use crate::whole_disks::no_disk_is_whole;

const DISK: u64 = 64 << 20;
/// What the guest writes to while the power goes: two regions.
const AREA: u64 = 8 << 20;

/// A mount namespace with a boot id that can be changed. For the calling thread and whatever it
/// starts.
struct Boots {
    boot_id: PathBuf,
    stat: PathBuf,
    number: u32,
}

impl Boots {
    fn new(scratch: &Scratch) -> Self {
        unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace of its own");
        run("mount", &["--make-rprivate", "/"]);
        let (boot_id, stat) = (scratch.path().join("boot_id"), scratch.path().join("stat"));
        let mut boots = Self { boot_id, stat, number: 0 };
        boots.next();
        run("mount", &["--bind", text(&boots.boot_id), "/proc/sys/kernel/random/boot_id"]);
        run("mount", &["--bind", text(&boots.stat), "/proc/stat"]);
        boots
    }

    /// Another boot, that begins in a moment: everything written so far is older.
    fn next(&mut self) {
        self.number += 1;
        let began = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() + 1;
        fs::write(&self.boot_id, format!("{:08x}-0000-4000-8000-000000000001\n", self.number)).unwrap();
        fs::write(&self.stat, format!("btime {began}\n")).unwrap();
    }
}

/// Overwrites blocks without ever syncing, as a guest with `cache=writeback` does; ends by itself
/// when the disk is gone.
fn write_unsynced(disk: &Path, seed: u64, stop: Arc<AtomicBool>) -> std::thread::JoinHandle<u64> {
    let file = OpenOptions::new().write(true).open(disk).unwrap();
    std::thread::spawn(move || {
        let mut n = 0;
        while !stop.load(Ordering::SeqCst) {
            let content = blake3::hash(&(seed << 32 | n).to_le_bytes());
            let block = u64::from(content.as_bytes()[0]) * 8 + n % 8;
            let at = block * 4096 % AREA;
            if file.write_all_at(&content.as_bytes().repeat(4096 / 32), at).is_err() {
                break;
            }
            n += 1;
        }
        n
    })
}

fn point_bytes(host: &Host, scratch: &Scratch, point: &str) -> Vec<u8> {
    let to = scratch.path().join("restored");
    host.run(&["restore", "web1", "--point", point, "--to", text(&to), "--force"]);
    fs::read(to.join("a.img")).unwrap()
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Cut {
    Source,
    State,
    Both,
}

fn power_is_cut(kind: Kind, cuts: &[Cut]) {
    let label = format!("power-{kind:?}").to_lowercase();
    let scratch = Scratch::alone(&label);
    let mut boots = Boots::new(&scratch);
    let mounted = scratch.dir("mounted");
    let source = Volume::make(&scratch.path().join("source.fs"), kind, 320, &scratch.dir("source"));
    let vault = Volume::make(&scratch.path().join("state.fs"), kind, 480, &scratch.dir("state-fs"));
    let lower = source.dir().join("a.img");
    fs::write(&lower, vec![7; usize::try_from(DISK).unwrap()]).unwrap();
    File::open(&lower).unwrap().sync_all().unwrap();
    let host = Host::new(&label, &vault.dir().join("state"));
    host.mount(source.dir(), &mounted);
    let disk = mounted.join("a.img");
    host.protect("web1", &[&disk], "1s");
    let mut blocks = 0;
    for (round, cut) in cuts.iter().enumerate() {
        host.sync("web1");
        let stop = Arc::new(AtomicBool::new(false));
        let writer = write_unsynced(&disk, round as u64, stop.clone());
        // Some cuts come in an idle vault, others while an epoch is shipped or applied.
        for _ in 0..round % 3 {
            host.run(&["sync", "web1"]);
        }
        std::thread::sleep(std::time::Duration::from_millis(40 + 37 * (round as u64 % 9)));
        if *cut != Cut::State {
            source.cut_power();
        }
        if *cut != Cut::Source {
            vault.cut_power();
        }
        host.kill();
        stop.store(true, Ordering::SeqCst);
        blocks += writer.join().unwrap();
        unmount(&mounted);
        source.power_on();
        vault.power_on();
        boots.next();

        host.restart();
        wait_until("the mount to serve", || disk.exists());
        host.sync("web1");
        no_disk_is_whole(&host, "web1");
        let point = host.json(&["points", "web1"])["points"].as_array().unwrap().last().unwrap().clone();
        let crossed = point["changed_bytes"].as_u64().unwrap();
        assert!(crossed <= DISK / 2, "{crossed} bytes crossed again, of which {AREA} can have changed");
        let shown = point_bytes(&host, &scratch, point["id"].as_str().unwrap());
        assert!(shown == fs::read(&lower).unwrap(), "after cut {round} the replica differs from the source");
    }
    println!("figures: {label}: {} power cuts, {blocks} unsynced blocks written", cuts.len());
}

/// In a thread of its own, whose mount namespace ends with it.
fn in_its_own_namespace(kind: Kind) {
    let order = [Cut::Both, Cut::Source, Cut::State];
    let cuts: Vec<Cut> = (0..rounds("AFTERIMAGE_POWER", 3)).map(|n| order[n % 3]).collect();
    let test = std::thread::spawn(move || power_is_cut(kind, &cuts));
    if let Err(why) = test.join() {
        std::panic::resume_unwind(why);
    }
}

#[test]
fn power_cuts_on_ext4() {
    in_its_own_namespace(Kind::Ext4);
}

#[test]
fn power_cuts_on_xfs() {
    in_its_own_namespace(Kind::Xfs);
}
