//! File systems on loop devices over the mount: from every point a writable clone is mounted (its
//! log is replayed), passes its checker, and holds whole every file that was synced before the cut.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::common::{Host, Kind, Scratch, Volume, rounds, text, wait_until};

/// Writes files, each synced before the next one is begun.
struct Writer {
    stop: Arc<AtomicBool>,
    synced: Arc<AtomicU64>,
    /// The oldest file that must not go.
    oldest: Arc<AtomicU64>,
    thread: Option<std::thread::JoinHandle<()>>,
}

fn content(number: u64) -> Vec<u8> {
    let seed = blake3::hash(&number.to_le_bytes());
    let mut bytes = vec![0; 512 + usize::try_from(number * 977 % 40_000).unwrap()];
    blake3::Hasher::new_keyed(seed.as_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// Files are in a few folders, and the oldest go, so that the file system does not fill.
fn name(number: u64) -> String {
    format!("d{}/f{number}", number % 8)
}

/// So many files stay; the writer waits rather than to remove one that a point must have.
const KEPT: u64 = 1500;

/// So many files are looked at in each point.
const NEWEST: u64 = 300;

impl Writer {
    fn start(dir: PathBuf) -> Self {
        let (stop, synced) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let oldest = Arc::new(AtomicU64::new(u64::MAX));
        let (stopped, done, needed) = (stop.clone(), synced.clone(), oldest.clone());
        for n in 0..8 {
            fs::create_dir(dir.join(format!("d{n}"))).unwrap();
        }
        let thread = std::thread::spawn(move || {
            let mut number = 0;
            while !stopped.load(Ordering::SeqCst) {
                number += 1;
                let path = dir.join(name(number));
                let mut file = File::create(&path).unwrap();
                file.write_all(&content(number)).unwrap();
                file.sync_all().unwrap();
                File::open(path.parent().unwrap()).unwrap().sync_all().unwrap();
                done.store(number, Ordering::SeqCst);
                while number.saturating_sub(KEPT) >= needed.load(Ordering::SeqCst) {
                    if stopped.load(Ordering::SeqCst) {
                        return;
                    }
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
                if number > KEPT {
                    fs::remove_file(dir.join(name(number - KEPT))).unwrap();
                }
            }
        });
        Self { stop, synced, oldest, thread: Some(thread) }
    }

    fn synced(&self) -> u64 {
        self.synced.load(Ordering::SeqCst)
    }

    /// Ends it; an error that it met is an error of the test.
    fn stop(mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.take().unwrap().join().expect("the writer");
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The newest files up to `synced` are there and whole.
fn holds(dir: &Path, synced: u64) {
    for number in oldest_of(synced)..=synced {
        let path = dir.join(name(number));
        let found = fs::read(&path).unwrap_or_else(|e| panic!("file {number} of {synced}: {e}"));
        assert!(found == content(number), "file {number} of {synced} is not whole");
    }
}

/// The oldest file that is looked at in a point, before whose cut `synced` were synced.
fn oldest_of(synced: u64) -> u64 {
    synced.saturating_sub(NEWEST) + 1
}

fn file_system_in_points(kind: Kind, mib: u64) {
    let label = format!("{kind:?}").to_lowercase();
    let scratch = Scratch::new(&label);
    let (lower, mounted, inner) = (scratch.dir("lower"), scratch.dir("mounted"), scratch.dir("inner"));
    let (clone, inside) = (scratch.dir("clone"), scratch.dir("inside"));
    let host = Host::new(&label, &scratch.path().join("state"));
    host.mount(&lower, &mounted);
    let disk = mounted.join("a.img");
    // In use before it is protected, through the mount.
    let volume = Volume::make(&disk, kind, mib, &inner);
    let writer = Writer::start(volume.dir().to_owned());
    host.protect("web1", &[&disk], "1s");
    let rounds = rounds("AFTERIMAGE_LOOPS", 3);
    for _ in 0..rounds {
        let until = writer.synced() + 10;
        wait_until("the writer to go on", || writer.synced() >= until);
        let synced = writer.synced();
        writer.oldest.store(oldest_of(synced), Ordering::SeqCst);
        host.sync("web1");
        let point = host.newest("web1").id;
        writer.oldest.store(u64::MAX, Ordering::SeqCst);
        host.run(&["point", "clone", "web1", "--point", &point, text(&clone)]);
        {
            let copy = Volume::attach(&clone.join("a.img"), kind, &inside);
            holds(copy.dir(), synced);
            copy.check();
        }
        host.run(&["point", "umount", text(&clone)]);
    }
    let files = writer.synced();
    writer.stop();
    volume.check();
    println!("figures: {label}: {rounds} points mounted and checked, {files} files synced");
}

#[test]
fn ext4_over_the_mount_is_whole_in_every_point() {
    file_system_in_points(Kind::Ext4, 128);
}

#[test]
fn xfs_over_the_mount_is_whole_in_every_point() {
    file_system_in_points(Kind::Xfs, 320);
}
