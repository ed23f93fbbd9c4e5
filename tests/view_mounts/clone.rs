//! Writable clones.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use afterimage::base::ErrorKind;
use afterimage::view::CloneMount;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek64};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::fake::{FakePoint, Loop, MountGuard, alone, pattern, run};
use crate::points::start_again;

const MIB: usize = 1 << 20;

fn base() -> Vec<u8> {
    let mut disk = pattern(1, MIB);
    disk[200_000..600_000].fill(0);
    disk.extend(pattern(2, 1234));
    disk
}

fn point(epoch: u64) -> Arc<FakePoint> {
    Arc::new(FakePoint::new(epoch, &[("a.img", base()), ("sub/b.img", vec![0; 4 * MIB])]))
}

fn open(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

/// One random change, made alike to the clone and to a plain file.
fn change(random: &mut StdRng, files: [&File; 2]) {
    let size = files[1].metadata().unwrap().len();
    let mut offset = random.random_range(0..size + 20_000);
    let mut length = random.random_range(1..50_000u64);
    if random.random_bool(0.3) {
        offset &= !4095;
        length = (length | 4095) + 1;
    }
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let zero = FallocateFlags::FALLOC_FL_ZERO_RANGE;
    let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let seed = random.random();
    let kind = random.random_range(0..14);
    for file in files {
        let allocate = |mode| fallocate(file.as_fd(), mode, offset as i64, length as i64).unwrap();
        match kind {
            0 => file.set_len(offset).unwrap(),
            1 => allocate(punch),
            2 => allocate(zero),
            3 => allocate(zero | keep),
            4 => allocate(FallocateFlags::empty()),
            5 => file.sync_all().unwrap(),
            _ => file.write_all_at(&pattern(seed, length as usize), offset).unwrap(),
        }
    }
}

fn assert_alike(clone: &File, twin: &File, random: &mut StdRng) {
    let size = twin.metadata().unwrap().len();
    assert_eq!(clone.metadata().unwrap().len(), size);
    let read = |file: &File| {
        let mut bytes = vec![0; size as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    };
    let (a, b) = (read(clone), read(twin));
    if let Some(at) = a.iter().zip(&b).position(|(a, b)| a != b) {
        panic!("byte {at} of {size} differs");
    }
    let (start, length) = (random.random_range(0..=size), random.random_range(0..10_000));
    let mut part = vec![0; length];
    let n = clone.read_at(&mut part, start).unwrap();
    assert_eq!(part[..n], b[start as usize..(start as usize + length).min(b.len())]);
    // Whatever a seek skips is zeros.
    let mut at = 0;
    while at < size as i64 {
        let data = lseek64(clone.as_fd(), at, Whence::SeekData).unwrap_or(size as i64);
        assert!(b[at as usize..data as usize].iter().all(|b| *b == 0), "data before {data} was skipped");
        if data >= size as i64 {
            break;
        }
        at = lseek64(clone.as_fd(), data, Whence::SeekHole).unwrap();
        assert!(at > data);
    }
}

#[test]
fn random_changes_equal_those_of_a_plain_file() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let at = MountGuard::new(dir.path(), "clone");
    let overlay = dir.path().join("overlay");
    let twin_path = dir.path().join("twin");
    fs::write(&twin_path, base()).unwrap();
    let mut random = StdRng::seed_from_u64(42);
    for _ in 0..6 {
        let mount = CloneMount::start(&at.0, point(1), &overlay).unwrap();
        let (clone, twin) = (open(&at.join("a.img")), open(&twin_path));
        for step in 0..60 {
            change(&mut random, [&clone, &twin]);
            if step % 6 == 0 {
                assert_alike(&clone, &twin, &mut random);
            }
        }
        assert_alike(&clone, &twin, &mut random);
        drop(clone);
        mount.unmount().unwrap();
    }
}

#[test]
fn a_clone_is_sparse_keeps_its_owner_and_belongs_to_one_point() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let at = MountGuard::new(dir.path(), "clone");
    let overlay = dir.path().join("overlay");
    let mount = CloneMount::start(&at.0, point(1), &overlay).unwrap();
    let path = at.join("sub/b.img");
    let file = open(&path);
    file.write_all_at(b"x", 3 * MIB as u64).unwrap();
    std::os::unix::fs::chown(&path, Some(1234), Some(99)).unwrap();
    assert!(mount.overlay_bytes() < 128 << 10);
    let elsewhere = MountGuard::new(dir.path(), "elsewhere");
    assert_eq!(CloneMount::start(&elsewhere.0, point(1), &overlay).err().unwrap().kind(), ErrorKind::Busy);
    assert_eq!(CloneMount::delete_overlay(&overlay).unwrap_err().kind(), ErrorKind::Busy);
    assert_eq!(fs::write(at.join("new"), "x").unwrap_err().raw_os_error(), Some(libc::EPERM));
    assert_eq!(fs::remove_file(&path).unwrap_err().raw_os_error(), Some(libc::EPERM));
    assert!(fs::write(at.join(".afterimage/machine.toml"), "x").is_err());
    drop((file, mount));
    assert_eq!(CloneMount::start(&at.0, point(2), &overlay).err().unwrap().kind(), ErrorKind::Refused);
    let mount = CloneMount::start(&at.0, point(1), &overlay).unwrap();
    let found = path.metadata().unwrap();
    assert_eq!((found.uid(), found.gid(), found.len()), (1234, 99, 4 * MIB as u64));
    assert_eq!(fs::read(&path).unwrap()[3 * MIB], b'x');
    mount.unmount().unwrap();
    CloneMount::delete_overlay(&overlay).unwrap();
    assert!(!overlay.exists());
    fs::create_dir(&overlay).unwrap();
    fs::write(overlay.join("precious"), "x").unwrap();
    assert_eq!(CloneMount::delete_overlay(&overlay).unwrap_err().kind(), ErrorKind::Refused);
    assert_eq!(CloneMount::start(&at.0, point(1), &overlay).err().unwrap().kind(), ErrorKind::Refused);
}

#[test]
fn direct_io_and_mmap_work() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let at = MountGuard::new(dir.path(), "clone");
    let _mount = CloneMount::start(&at.0, point(1), &dir.path().join("overlay")).unwrap();
    let path = at.join("a.img");
    let input = dir.path().join("input");
    fs::write(&input, pattern(5, 64 << 10)).unwrap();
    let (i, o) = (format!("if={}", input.display()), format!("of={}", path.display()));
    run("dd", &[&i, &o, "bs=64k", "seek=1", "oflag=direct", "conv=notrunc,fsync", "status=none"]);
    let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&path).unwrap();
    let mut bytes = vec![0; 128 << 10];
    direct.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes[..64 << 10], base()[..64 << 10]);
    assert_eq!(bytes[64 << 10..], pattern(5, 64 << 10));
}

const STREAMS: u64 = 2;

#[test]
#[ignore = "a part of the test of a killed process, run by it"]
fn serve_clone_until_killed() {
    let Some(dir) = std::env::var_os("VIEW_TEST_CLONE") else { return };
    let dir = Path::new(&dir);
    let _mount = CloneMount::start(&dir.join("clone"), point(1), &dir.join("overlay")).unwrap();
    println!("serving");
    loop {
        std::thread::park();
    }
}

/// Killed under load: what was synced is there, whole; what was not may be, block by block.
#[test]
fn what_was_synced_survives_a_kill() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let at = MountGuard::new(dir.path(), "clone");
    let path = at.join("a.img");
    let mut random = StdRng::seed_from_u64(7);
    // States that a block may be in: that of the last sync, and every one after it.
    let mut states = vec![base()];
    for _ in 0..4 {
        let child = start_again("clone::serve_clone_until_killed", "VIEW_TEST_CLONE", dir.path());
        let found = fs::read(&path).unwrap();
        assert_whole(&found, &states);
        states = vec![found];
        let file = open(&path);
        for step in 0..40 {
            let mut next = states.last().unwrap().clone();
            let offset = random.random_range(0..next.len() + 9000);
            let bytes = pattern(random.random(), random.random_range(1..30_000));
            next.resize(next.len().max(offset + bytes.len()), 0);
            next[offset..offset + bytes.len()].copy_from_slice(&bytes);
            file.write_all_at(&bytes, offset as u64).unwrap();
            states.push(next);
            if step % 11 == 10 {
                file.sync_data().unwrap();
                states.drain(..states.len() - 1);
            }
        }
        drop(child);
    }
    let _mount = CloneMount::start(&at.0, point(1), &dir.path().join("overlay")).unwrap();
    assert_whole(&fs::read(&path).unwrap(), &states);
}

fn assert_whole(found: &[u8], states: &[Vec<u8>]) {
    assert!(found.len() >= states[0].len(), "{} bytes of {}", found.len(), states[0].len());
    for (n, block) in found.chunks(4096).enumerate() {
        let is_one = states.iter().any(|state| {
            let mut wanted = state.get(n * 4096..).unwrap_or_default().to_vec();
            wanted.resize(block.len(), 0);
            wanted == block
        });
        assert!(is_one, "block {n} is none of its {} states", states.len());
    }
}

/// A guest's ext4 as a power cut would leave it, mounted from a clone (log replay), written to,
/// checked; several streams at once.
#[test]
fn ext4_on_a_loop_device_over_a_clone() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    File::create(&image).unwrap().set_len(32 * MIB as u64).unwrap();
    run("mkfs.ext4", &["-q", "-F", "-E", "nodiscard", image.to_str().unwrap()]);
    let content = {
        let on = MountGuard::new(dir.path(), "source");
        let device = Loop::attach(&image, &[]);
        run("mount", &["-t", "ext4", &device.0, on.0.to_str().unwrap()]);
        File::create(on.join("before"))
            .and_then(|mut f| f.write_all(b"kept").and_then(|()| f.sync_all()))
            .unwrap();
        let dirty = fs::read(&device.0).unwrap();
        run("umount", &[on.0.to_str().unwrap()]);
        dirty
    };
    let at = MountGuard::new(dir.path(), "clone");
    let overlay = dir.path().join("overlay");
    let point = Arc::new(FakePoint::new(1, &[("disk.raw", content)]));
    let mount = CloneMount::start(&at.0, point.clone(), &overlay).unwrap();
    for options in [&[][..], &["--direct-io=on"][..]] {
        let on = MountGuard::new(dir.path(), "guest");
        let device = Loop::attach(&at.join("disk.raw"), options);
        run("mount", &["-t", "ext4", "-o", "discard", &device.0, on.0.to_str().unwrap()]);
        assert_eq!(fs::read(on.join("before")).unwrap(), b"kept");
        std::thread::scope(|scope| {
            for stream in 0..STREAMS {
                let on = &on;
                scope.spawn(move || {
                    for n in 0..20 {
                        let path = on.join(&format!("{stream}-{n}"));
                        fs::write(&path, pattern(stream * 100 + n, 50_000)).unwrap();
                        File::open(&path).unwrap().sync_all().unwrap();
                        if n % 3 == 0 {
                            fs::remove_file(&path).unwrap();
                        }
                    }
                });
            }
        });
        assert_eq!(fs::read(on.join("1-4")).unwrap(), pattern(104, 50_000));
        run("umount", &[on.0.to_str().unwrap()]);
        run("e2fsck", &["-n", "-f", &device.0]);
    }
    mount.unmount().unwrap();
    let mount = CloneMount::start(&at.0, point, &overlay).unwrap();
    run("e2fsck", &["-n", "-f", at.join("disk.raw").to_str().unwrap()]);
    mount.unmount().unwrap();
}

/// A clone of a qcow2 image works under qemu-io, which opens with O_DIRECT, discards and flushes.
#[test]
fn qcow2_over_a_clone() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    run("qemu-img", &["create", "-q", "-f", "qcow2", image.to_str().unwrap(), "16M"]);
    let at = MountGuard::new(dir.path(), "clone");
    let point = Arc::new(FakePoint::new(1, &[("d.qcow2", fs::read(&image).unwrap())]));
    let _mount = CloneMount::start(&at.0, point, &dir.path().join("overlay")).unwrap();
    let disk = at.join("d.qcow2");
    let disk = disk.to_str().unwrap();
    let commands =
        ["write -P 7 1M 300k", "write -z 1100k 64k", "discard 1M 64k", "flush", "read -P 7 1200k 64k"];
    for cache in ["none", "writeback"] {
        let mut arguments = vec!["-t", cache, "-f", "qcow2"];
        commands.iter().for_each(|c| arguments.extend(["-c", c]));
        arguments.push(disk);
        let said = run("qemu-io", &arguments);
        assert!(!said.contains("failed"), "{said}");
    }
    run("qemu-img", &["check", "-q", disk]);
    let lines = BufReader::new(File::open("/proc/self/mounts").unwrap()).lines();
    assert!(lines.map_while(Result::ok).any(|l| l.contains("fuse.afterimage-clone")));
}
