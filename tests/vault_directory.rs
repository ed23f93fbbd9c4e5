//! The directory vault itself: reading while epochs are applied, damage, lack of space, versions,
//! locks, the clock, many points.

mod vault_support;

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use afterimage::base::{EpochNumber, ErrorKind, PointId, VmId};
use afterimage::core::ports::points::PointStore;
use afterimage::core::ports::vault::Vault;
use afterimage::format::vaultstate::VmState;
use afterimage::vault::{DirectoryVault, Steps};
use vault_support::*;

fn open(path: &Path) -> Arc<DirectoryVault> {
    DirectoryVault::open(path, TestClock::new()).unwrap()
}

fn vm_dir(vault: &DirectoryVault, vm: VmId) -> PathBuf {
    vault.path().join("vms").join(vm.to_string())
}

/// The only file with this ending below a folder.
fn file_in(dir: &Path, ending: &str) -> PathBuf {
    let found = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    found.filter(|p| p.to_string_lossy().ends_with(ending)).min().unwrap()
}

fn flip(path: &Path, at: u64) {
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 4], at).unwrap();
}

#[test]
fn readers_see_their_point_while_epochs_are_applied() {
    let dir = memory_dir();
    let vault = open(dir.path());
    let mut primary = Primary::small(21, 48);
    let first = begin(&vault, &mut primary);
    let is_done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let reader = vault.open(primary.vm, first.point()).unwrap();
                while !is_done.load(Ordering::SeqCst) {
                    assert_shows(&*reader, &first.image, "while applying");
                }
            });
        }
        let mut primary = primary.clone();
        for _ in 0..60 {
            (0..3).for_each(|_| primary.mutate());
            delivered(&vault, &mut primary);
        }
        is_done.store(true, Ordering::SeqCst);
    });
}

/// An error of a part that rotted, of a disk, of an undo log: never wrong bytes.
#[test]
fn flipped_bits_are_found_and_named() {
    let dir = memory_dir();
    let vault = open(dir.path());
    let mut primary = Primary::small(22, 16);
    let vm = primary.vm;
    let first = begin(&vault, &mut primary);
    let mut noise = vec![0; 2 * BLOCK];
    Random(1).fill(&mut noise);
    primary.disks[0].write(4 * BLOCK, &noise);
    let second = delivered(&vault, &mut primary);
    assert!(vault.verify(vm).unwrap().is_empty());

    let image = file_in(&vm_dir(&vault, vm).join("disks"), ".img");
    flip(&image, 9 * BLOCK as u64 + 5);
    let undo = file_in(&vm_dir(&vault, vm).join("points"), ".undo");
    flip(&undo, 1000);
    let found = vault.verify(vm).unwrap();
    assert_eq!(found.len(), 2, "{found:?}");

    let reader = vault.open(vm, second.point()).unwrap();
    let mut block = vec![0; BLOCK];
    let error = reader.read_at(0, 9 * BLOCK as u64, &mut block).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Damaged);
    assert!(error.what().contains(&(9 * BLOCK).to_string()) && error.next_step().is_some(), "{error}");
    reader.read_at(0, 0, &mut block).unwrap();
    let older = vault.open(vm, first.point()).unwrap();
    assert_eq!(kind(older.read_at(0, 4 * BLOCK as u64, &mut block)), ErrorKind::Damaged);
    older.read_at(0, 0, &mut block).unwrap();

    // What was damaged when an epoch replaced it stays damaged in the older points, and is whole
    // in the newer one.
    primary.disks[0].write(9 * BLOCK, &[1; BLOCK]);
    let third = delivered(&vault, &mut primary);
    let newest = vault.open(vm, third.point()).unwrap();
    assert_shows(&*newest, &third.image, "healed");
    assert_eq!(kind(reader.read_at(0, 9 * BLOCK as u64, &mut block)), ErrorKind::Damaged);
    // The index of an undo log.
    let length = std::fs::metadata(&undo).unwrap().len();
    flip(&undo, length - 80);
    drop((reader, older, newest, vault));
    let vault = open(dir.path());
    assert_eq!(kind(vault.open(vm, first.point()).map(drop)), ErrorKind::Damaged);
    assert_shows(&*vault.open(vm, third.point()).unwrap(), &third.image, "newest");
}

/// A hole where there should be data is damage too.
#[test]
fn lost_data_is_found() {
    let dir = memory_dir();
    let vault = open(dir.path());
    let mut primary = Primary::small(23, 16);
    begin(&vault, &mut primary);
    let image = file_in(&vm_dir(&vault, primary.vm).join("disks"), ".img");
    let file = std::fs::File::options().write(true).open(&image).unwrap();
    file.set_len(0).unwrap();
    file.set_len(16 * BLOCK as u64).unwrap();
    assert_eq!(vault.verify(primary.vm).unwrap().len(), 16);

    // Neither the newest point nor, once it was replaced, the older one shows zeros instead.
    let first = vault.points(primary.vm).unwrap()[0].id;
    let reader = vault.open(primary.vm, first).unwrap();
    let data = reader.next_data(0, 0).unwrap().unwrap();
    assert_eq!((data.offset, data.length), (0, 16 * BLOCK as u64));
    primary.disks[0].write(4 * BLOCK, &[7; 2 * BLOCK]);
    let second = delivered(&vault, &mut primary);
    let mut block = vec![0; BLOCK];
    assert_eq!(kind(reader.read_at(0, 4 * BLOCK as u64, &mut block)), ErrorKind::Damaged);
    assert_eq!(kind(reader.read_at(0, 0, &mut block)), ErrorKind::Damaged);
    let newest = vault.open(primary.vm, second.point()).unwrap();
    assert_eq!(newest.read_at(0, 4 * BLOCK as u64, &mut block).unwrap(), BLOCK);
    assert_eq!(block, [7; BLOCK]);
}

/// A2: a disk that vanished is not made anew under the points that show it.
#[test]
fn a_lost_disk_file_is_told() {
    for ending in [".img", ".sums"] {
        let dir = memory_dir();
        let vault = open(dir.path());
        let mut primary = Primary::small(31, 8);
        begin(&vault, &mut primary);
        let lost = file_in(&vm_dir(&vault, primary.vm).join("disks"), ending);
        std::fs::remove_file(&lost).unwrap();
        primary.disks[0].write(0, &[1; BLOCK]);
        primary.cut().deliver(&*vault).unwrap();
        let is_told = || vault.last_error(primary.vm).is_some_and(|e| e.contains("is gone"));
        while !is_told() {
            assert!(!vault.wait_applied(primary.vm, Duration::from_millis(20)).unwrap());
        }
        assert!(!lost.exists());
    }
}

/// A kill between the two files of a new disk does not stop the VM.
#[test]
fn half_of_a_new_disk_is_made_whole() {
    for ending in ["img", "sums"] {
        let dir = memory_dir();
        let vault = open(dir.path());
        let mut primary = Primary::small(32, 8);
        begin(&vault, &mut primary);
        primary.disks.push(Disk::new(5, "web1/disk5.raw", vec![9; 3 * BLOCK]));
        let id = primary.disks[1].id;
        std::fs::write(vm_dir(&vault, primary.vm).join("disks").join(format!("{id}.{ending}")), "").unwrap();
        let epoch = delivered(&vault, &mut primary);
        let reader = vault.open(primary.vm, epoch.point()).unwrap();
        assert_shows(&*reader, &epoch.image, "a new disk");
    }
}

/// One VM that cannot be opened takes neither its files nor the other VMs with it.
#[test]
fn a_vm_that_cannot_be_read_leaves_the_others_alone() {
    let dir = memory_dir();
    let vault = open(dir.path());
    let (mut bad, mut good) = (Primary::small(33, 8), Primary::small(34, 8));
    begin(&vault, &mut bad);
    begin(&vault, &mut good);
    let inbox = vm_dir(&vault, bad.vm).join("inbox").join(EpochNumber(99).to_string());
    drop(vault);
    std::fs::create_dir_all(&inbox).unwrap();
    std::fs::write(inbox.join("manifest"), "rotten").unwrap();
    let vault = open(dir.path());
    assert_eq!(kind(vault.head(bad.vm)), ErrorKind::Damaged);
    assert_eq!(kind(vault.register(bad.vm, &"web1".parse().unwrap())), ErrorKind::Damaged);
    assert!(inbox.join("manifest").exists());
    delivered(&vault, &mut good);
    assert_eq!(vault.points(good.vm).unwrap().len(), 2);
}

struct Mounted(tempfile::TempDir);

impl Mounted {
    fn tmpfs(options: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("tmpfs"), dir.path(), Some("tmpfs"), flags, Some(options)).unwrap();
        Self(dir)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.0.path(), nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_full_vault_waits_says_so_and_recovers() {
    let mount = Mounted::tmpfs("size=8m");
    let vault = open(&mount.0.path().join("vault"));
    let mut primary = Primary::small(24, 512);
    let first = begin(&vault, &mut primary);
    let vm = primary.vm;
    let mut noise = vec![0; 256 * BLOCK];
    Random(9).fill(&mut noise);
    primary.disks[0].write(0, &noise);
    // Room for the part, but not for the undo log.
    let free = vault.space().unwrap().free_bytes;
    let ballast = mount.0.path().join("ballast");
    std::fs::write(&ballast, vec![1; (free as usize).saturating_sub(1600 << 10)]).unwrap();
    let epoch = loop {
        let epoch = primary.clone().cut();
        if epoch.parts.len() == 1 {
            break epoch;
        }
        primary.random.next();
    };
    epoch.deliver(&*vault).unwrap();
    assert!(!vault.wait_applied(vm, Duration::from_millis(300)).unwrap());
    assert!(vault.last_error(vm).unwrap().contains("bytes are needed"), "{:?}", vault.last_error(vm));
    assert_eq!(vault.backlog(vm).unwrap().0, 1);
    assert_shows(&*vault.open(vm, first.point()).unwrap(), &first.image, "while it waits");
    // More does not fit; that is recoverable.
    std::fs::write(mount.0.path().join("more"), vec![1; 400 << 10]).unwrap();
    let mut next = primary.clone();
    next.parent = Some(epoch.digest());
    next.epoch = epoch.manifest.epoch.0;
    next.disks[0].whole = true;
    let big = next.cut();
    let error = big.deliver(&*vault).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
    assert!(error.is_recoverable());
    std::fs::remove_file(&ballast).unwrap();
    assert!(vault.wait_applied(vm, PATIENCE).unwrap());
    assert_eq!(vault.last_error(vm), None);
    assert_shows(&*vault.open(vm, epoch.point()).unwrap(), &epoch.image, "after the remedy");
    assert_shows(&*vault.open(vm, first.point()).unwrap(), &first.image, "the older one");
}

#[test]
fn only_one_process_and_only_a_vault_of_this_version() {
    let dir = memory_dir();
    let vault = open(dir.path());
    let again = DirectoryVault::open(dir.path(), TestClock::new()).err().unwrap();
    assert_eq!(again.kind(), ErrorKind::Busy);
    drop(vault);
    drop(open(dir.path()));
    std::fs::write(dir.path().join("vault.json"), "{\"format\":2}").unwrap();
    let newer = DirectoryVault::open(dir.path(), TestClock::new()).err().unwrap();
    assert_eq!(newer.kind(), ErrorKind::Version);
    assert!(newer.next_step().is_some());
    let other = memory_dir();
    std::fs::write(other.path().join("letter.txt"), "x").unwrap();
    let error = DirectoryVault::open(other.path(), TestClock::new()).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert_eq!(std::fs::read_dir(other.path()).unwrap().count(), 1);
}

#[test]
fn the_disk_of_a_vm_that_lost_it_stays_as_long_as_a_point_shows_it() {
    let dir = memory_dir();
    let vault = open(dir.path());
    let mut primary = Primary::small(26, 8);
    primary.disks.push(Disk::new(2, "b.raw", vec![3; 5 * BLOCK]));
    let vm = primary.vm;
    let both = begin(&vault, &mut primary);
    let gone = primary.disks.remove(1);
    let one = delivered(&vault, &mut primary);
    // It comes back with other content and is shipped whole.
    primary.disks.push(Disk { bytes: vec![4; 2 * BLOCK], whole: true, ..gone });
    let back = delivered(&vault, &mut primary);
    let images: BTreeMap<PointId, Image> =
        [&both, &one, &back].iter().map(|e| (e.point(), e.image.clone())).collect();
    assert_points(&*vault, vm, &images, "three points");
    primary.disks.remove(1);
    delivered(&vault, &mut primary);
    let files = || std::fs::read_dir(vm_dir(&vault, vm).join("disks")).unwrap().count();
    assert_eq!(files(), 4);
    vault.delete(vm, both.point()).unwrap();
    vault.delete(vm, one.point()).unwrap();
    assert_eq!(files(), 4);
    vault.delete(vm, back.point()).unwrap();
    assert_eq!(files(), 2);
}

/// Hundreds of points: `state.json` stays small, and the oldest opens.
#[test]
fn many_points_keep_the_state_small() {
    let dir = memory_dir();
    let vault = open(dir.path());
    let mut primary = Primary::small(27, 16);
    let vm = primary.vm;
    let first = begin(&vault, &mut primary);
    for n in 0..300u64 {
        primary.disks[0].write((n as usize % 16) * BLOCK, &n.to_le_bytes());
        primary.cut().deliver(&*vault).unwrap();
    }
    assert!(vault.wait_applied(vm, PATIENCE).unwrap());
    assert_eq!(vault.points(vm).unwrap().len(), 301);
    let state = std::fs::metadata(vm_dir(&vault, vm).join("state.json")).unwrap().len();
    assert!(state < 1024, "{state} bytes");
    drop(vault);
    let vault = open(dir.path());
    assert_shows(&*vault.open(vm, first.point()).unwrap(), &first.image, "the oldest of 301");
}

/// A2, with the interleaving forced: an epoch is applied between the two looks of a read.
#[test]
fn an_epoch_applied_within_a_read_is_not_seen() {
    let dir = memory_dir();
    let steps = Arc::new(Steps::default());
    let vault = DirectoryVault::open_with(dir.path(), TestClock::new(), Arc::clone(&steps)).unwrap();
    let mut primary = Primary::small(28, 8);
    let first = begin(&vault, &mut primary);
    let reader = vault.open(primary.vm, first.point()).unwrap();
    let weak = Arc::downgrade(&vault);
    let is_armed = AtomicBool::new(true);
    let writer = std::sync::Mutex::new(primary);
    steps.set_between_looks(move || {
        if is_armed.swap(false, Ordering::SeqCst)
            && let Some(vault) = weak.upgrade()
        {
            let mut primary = writer.lock().unwrap();
            primary.disks[0].write(0, &[9; 8 * BLOCK]);
            delivered(&vault, &mut primary);
        }
    });
    assert_shows(&*reader, &first.image, "an epoch came between the looks");
}

/// A reader of a vault that is closed shows nothing: its folder is another's, who may drop points.
#[test]
fn a_reader_ends_with_its_vault() {
    let dir = memory_dir();
    let vault = open(dir.path());
    let mut primary = Primary::small(35, 8);
    let first = begin(&vault, &mut primary);
    assert!(!vault.has_open_points());
    let reader = vault.open(primary.vm, first.point()).unwrap();
    assert!(vault.has_open_points());
    assert_shows(&*reader, &first.image, "while the vault is open");
    drop(vault);
    let vault = open(dir.path());
    let mut block = vec![0; BLOCK];
    assert_eq!(kind(reader.read_at(0, 0, &mut block)), ErrorKind::Io);
    assert_eq!(kind(reader.next_data(0, 0)), ErrorKind::Io);
    assert_shows(&*vault.open(primary.vm, first.point()).unwrap(), &first.image, "opened anew");
}

/// A purge that fails leaves the VM as it was.
#[test]
fn a_failed_purge_changes_nothing() {
    let dir = memory_dir();
    let vault = open(dir.path());
    let mut primary = Primary::small(36, 8);
    let first = begin(&vault, &mut primary);
    let vm = primary.vm;
    let reader = vault.open(vm, first.point()).unwrap();
    assert_eq!(kind(vault.purge(vm)), ErrorKind::Busy);
    drop(reader);
    // Something that is no folder is in the way.
    let obstacle = dir.path().join("vms").join(format!(".purged-{vm}"));
    std::fs::write(&obstacle, "x").unwrap();
    assert!(vault.purge(vm).is_err());
    primary.disks[0].write(0, &[5; BLOCK]);
    let second = delivered(&vault, &mut primary);
    assert_shows(&*vault.open(vm, second.point()).unwrap(), &second.image, "after a failed purge");
    std::fs::remove_file(&obstacle).unwrap();
    vault.purge(vm).unwrap();
    assert_eq!(kind(vault.points(vm)), ErrorKind::NotFound);
}

/// A rotted frame does not stop the points around it from being dropped, and stays damaged.
#[test]
fn a_rotted_frame_is_merged_as_damaged() {
    let dir = memory_dir();
    let vault = open(dir.path());
    let mut primary = Primary::small(37, 16);
    let vm = primary.vm;
    let first = begin(&vault, &mut primary);
    primary.disks[0].write(4 * BLOCK, &[1; 2 * BLOCK]);
    let second = delivered(&vault, &mut primary);
    let undo = file_in(&vm_dir(&vault, vm).join("points"), ".undo");
    flip(&undo, 1000);
    primary.disks[0].write(10 * BLOCK, &[2; BLOCK]);
    delivered(&vault, &mut primary);
    vault.delete(vm, second.point()).unwrap();
    let reader = vault.open(vm, first.point()).unwrap();
    let mut block = vec![0; BLOCK];
    assert_eq!(kind(reader.read_at(0, 4 * BLOCK as u64, &mut block)), ErrorKind::Damaged);
    reader.read_at(0, 10 * BLOCK as u64, &mut block).unwrap();
    assert_eq!(block, first.image.values().next().unwrap()[10 * BLOCK..11 * BLOCK]);
}

/// An epoch that overwrote a part of the disks and is gone from the inbox: nothing is built on it.
#[test]
fn nothing_follows_half_an_epoch() {
    let dir = memory_dir();
    let vault = open(dir.path());
    let mut primary = Primary::small(38, 16);
    let first = begin(&vault, &mut primary);
    let state = vm_dir(&vault, primary.vm).join("state.json");
    drop(vault);
    let mut half = VmState::decode(&std::fs::read(&state).unwrap()).unwrap();
    half.applying = Some(EpochNumber(9));
    std::fs::write(&state, half.encode().unwrap()).unwrap();
    let vault = open(dir.path());
    assert!(vault.last_error(primary.vm).unwrap().contains("half applied"));
    assert_eq!(vault.head(primary.vm).unwrap().map(|h| h.digest), Some(first.digest()));
    primary.disks[0].write(0, &[5; BLOCK]);
    assert_eq!(kind(primary.cut().deliver(&*vault)), ErrorKind::Io);
}
