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
/// Many more than are written while a point is made.
const KEPT: u64 = 1500;

/// So many files are looked at in each point.
const NEWEST: u64 = 300;

impl Writer {
    fn start(dir: PathBuf) -> Self {
        let (stop, synced) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, done) = (stop.clone(), synced.clone());
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
                if number > KEPT {
                    fs::remove_file(dir.join(name(number - KEPT))).unwrap();
                }
            }
        });
        Self { stop, synced, thread: Some(thread) }
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

/// Every file up to `synced` that cannot have been removed yet is there and whole: the writer had
/// synced `later` after the cut, and may be at work on the next.
fn holds(dir: &Path, synced: u64, later: u64) {
    let first = (later + 1).saturating_sub(KEPT) + 1;
    assert!(first <= synced, "nothing can be checked: {later} files were synced, {synced} before the cut");
    // The oldest of them were checked in earlier points.
    for number in first.max(synced.saturating_sub(NEWEST) + 1)..=synced {
        let path = dir.join(name(number));
        let found = fs::read(&path).unwrap_or_else(|e| panic!("file {number} of {synced}: {e}"));
        assert!(found == content(number), "file {number} of {synced} is not whole");
    }
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
        host.sync("web1");
        let point = host.newest("web1").id;
        let later = writer.synced();
        host.run(&["point", "clone", "web1", "--point", &point, text(&clone)]);
        {
            let copy = Volume::attach(&clone.join("a.img"), kind, &inside);
            holds(copy.dir(), synced, later);
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
