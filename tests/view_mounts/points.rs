//! The points view.

use std::fs::{self, File};
use std::io::ErrorKind as IoKind;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use afterimage::base::{ErrorKind, VmId};
use afterimage::view::PointsMount;
use nix::unistd::{Whence, lseek64};

use crate::fake::{Alone, FakePoint, FakeStore, MountGuard, alone, pattern, run};

/// A disk with data, a hole of 1 MiB, data, and an end that is no whole block.
fn holey(seed: u64) -> Vec<u8> {
    let mut disk = pattern(seed, 64 << 10);
    disk.resize((64 << 10) + (1 << 20), 0);
    disk.extend(pattern(seed + 1, 5000));
    disk
}

struct World {
    _alone: Alone,
    _dir: tempfile::TempDir,
    at: MountGuard,
    store: Arc<FakeStore>,
    vm: VmId,
    mount: PointsMount,
}

fn world() -> World {
    let alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let at = MountGuard::new(dir.path(), "points");
    let store = Arc::new(FakeStore::default());
    let vm = store.add_vm("web 1 \u{e4}");
    for epoch in [1, 2] {
        store.add(vm, FakePoint::new(epoch, &[("a.img", holey(epoch)), ("sub/deep/b.img", vec![7; 10_000])]));
    }
    let mount = PointsMount::start(&at.0, store.clone()).unwrap();
    World { _alone: alone, _dir: dir, at, store, vm, mount }
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn points_are_folders_of_ordinary_files() {
    let w = world();
    let vm = w.at.join("web 1 \u{e4}");
    assert_eq!(names(&w.at.0), ["web 1 \u{e4}"]);
    assert_eq!(names(&vm), ["1-abcd0001", "2-abcd0002", "latest"]);
    assert_eq!(fs::read_link(vm.join("latest")).unwrap(), Path::new("2-abcd0002"));
    let point = vm.join("1-abcd0001");
    assert_eq!(names(&point), [".afterimage", "a.img", "sub"]);
    assert_eq!(fs::read(point.join("a.img")).unwrap(), holey(1));
    assert_eq!(fs::read(vm.join("latest/a.img")).unwrap(), holey(2));
    assert_eq!(fs::read(point.join("sub/deep/b.img")).unwrap(), vec![7; 10_000]);
    assert_eq!(fs::read_to_string(point.join(".afterimage/machine.toml")).unwrap(), "name = \"x\"\n");
    let a = point.join("a.img").metadata().unwrap();
    assert_eq!((a.len(), a.mtime(), a.mode() & 0o777), (holey(1).len() as u64, 1_700_000_001, 0o440));
    assert_eq!(point.metadata().unwrap().mtime(), 1_700_000_001);
    let mut part = [0; 100];
    let file = File::open(point.join("a.img")).unwrap();
    file.read_exact_at(&mut part, 4000).unwrap();
    assert_eq!(part, holey(1)[4000..4100]);
}

#[test]
fn nothing_can_be_changed() {
    let w = world();
    let point = w.at.join("web 1 \u{e4}/1-abcd0001");
    for result in [
        File::create(point.join("new")).map(drop),
        File::options().write(true).open(point.join("a.img")).map(drop),
        fs::remove_file(point.join("a.img")),
        fs::create_dir(w.at.join("x")),
    ] {
        assert_eq!(result.unwrap_err().kind(), IoKind::ReadOnlyFilesystem);
    }
}

#[test]
fn holes_are_found_and_copied_as_holes() {
    let w = world();
    let path = w.at.join("web 1 \u{e4}/1-abcd0001/a.img");
    let file = File::open(&path).unwrap();
    let seek = |offset, whence| lseek64(file.as_fd(), offset, whence);
    assert_eq!(seek(10, Whence::SeekData), Ok(10));
    assert_eq!(seek(10, Whence::SeekHole), Ok(64 << 10));
    assert_eq!(seek(64 << 10, Whence::SeekData), Ok((64 << 10) + (1 << 20)));
    assert_eq!(seek((64 << 10) + (1 << 20) + 1, Whence::SeekHole), Ok(holey(1).len() as i64));
    assert_eq!(seek(holey(1).len() as i64, Whence::SeekData), Err(nix::errno::Errno::ENXIO));
    let copy = w._dir.path().join("copy");
    run("cp", &[path.to_str().unwrap(), copy.to_str().unwrap()]);
    assert_eq!(fs::read(&copy).unwrap(), holey(1));
    assert!(copy.metadata().unwrap().blocks() * 512 < 512 << 10);
}

#[test]
fn inode_numbers_are_the_same_after_another_mount() {
    let w = world();
    let inodes = |at: &MountGuard| {
        ["web 1 \u{e4}", "web 1 \u{e4}/2-abcd0002", "web 1 \u{e4}/2-abcd0002/sub/deep/b.img"]
            .map(|path| at.join(path).metadata().unwrap().ino())
    };
    let before = inodes(&w.at);
    w.mount.unmount().unwrap();
    let _again = PointsMount::start(&w.at.0, w.store.clone()).unwrap();
    assert_eq!(inodes(&w.at), before);
}

#[test]
fn points_come_and_go_while_it_is_mounted() {
    let w = world();
    let vm = w.at.join("web 1 \u{e4}");
    let first = w.store.vms.lock().unwrap()[0].2[0].info.id;
    let kept = File::open(vm.join("1-abcd0001/a.img")).unwrap();
    w.store.add(w.vm, FakePoint::new(3, &[("a.img", holey(3))]));
    assert_eq!(fs::read(vm.join("3-abcd0003/a.img")).unwrap(), holey(3));
    assert_eq!(fs::read_link(vm.join("latest")).unwrap(), Path::new("3-abcd0003"));
    w.store.remove(w.vm, first);
    w.mount.release_idle();
    assert_eq!(names(&vm), ["2-abcd0002", "3-abcd0003", "latest"]);
    let gone = File::open(vm.join("1-abcd0001/a.img")).unwrap_err();
    assert!([libc::ENOENT, libc::ESTALE].contains(&gone.raw_os_error().unwrap()), "{gone}");
    // What was open stays as it was: it pins its point.
    let mut all = vec![0; holey(1).len()];
    kept.read_exact_at(&mut all, 0).unwrap();
    assert_eq!(all, holey(1));
    let other = w.store.add_vm("db");
    w.store.add(other, FakePoint::new(1, &[("d", vec![1; 10])]));
    assert_eq!(fs::read(w.at.join("db/latest/d")).unwrap(), vec![1; 10]);
    let twin = w.store.add_vm("db");
    assert_eq!(
        names(&w.at.0),
        ["db".to_owned(), format!("db ({:.8})", twin.to_string()), "web 1 \u{e4}".into()]
    );
    assert_eq!(fs::metadata(w.at.join("none")).unwrap_err().kind(), IoKind::NotFound);
    assert_eq!(fs::metadata(vm.join("02-abcd0002")).unwrap_err().kind(), IoKind::NotFound);
}

#[test]
fn many_read_while_points_change() {
    let w = world();
    let vm = w.at.join("web 1 \u{e4}");
    let is_done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !is_done.load(Ordering::Relaxed) {
                    for name in names(&vm) {
                        let Ok(bytes) = fs::read(vm.join(&name).join("a.img")) else { continue };
                        let epoch = match name.split('-').next().unwrap().parse() {
                            Ok(epoch) => epoch,
                            // `latest` may move between its names and its content.
                            Err(_) => continue,
                        };
                        assert!(bytes == holey(epoch), "{name}");
                    }
                }
            });
        }
        for epoch in 3..60 {
            let point = w.store.add(w.vm, FakePoint::new(epoch, &[("a.img", holey(epoch))]));
            assert_eq!(fs::read_link(vm.join("latest")).unwrap().to_str(), Some(&*point.info.id.to_string()));
            let oldest = w.store.vms.lock().unwrap()[0].2[0].info.id;
            w.store.remove(w.vm, oldest);
        }
        is_done.store(true, Ordering::Relaxed);
    });
}

#[test]
fn damaged_bytes_are_an_error_and_the_rest_is_not() {
    let w = world();
    let point = w.store.add(w.vm, FakePoint::new(9, &[("a.img", pattern(9, 8 << 20))]));
    point.damaged_at.store(6 << 20, Ordering::Relaxed);
    let file = File::open(w.at.join("web 1 \u{e4}/9-abcd0009/a.img")).unwrap();
    let mut bytes = vec![0; 4096];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, pattern(9, 4096));
    let error = file.read_at(&mut bytes, 6 << 20).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
}

#[test]
fn mounts_end_from_inside_and_outside() {
    let w = world();
    let again = PointsMount::start(&w.at.0, w.store.clone()).err().unwrap();
    assert_eq!(again.kind(), ErrorKind::Exists);
    assert!(again.next_step().unwrap().starts_with("umount "));
    let file = File::open(w.at.join("web 1 \u{e4}/latest/a.img")).unwrap();
    assert_eq!(w.mount.unmount().unwrap_err().kind(), ErrorKind::Busy);
    drop(file);
    assert!(w.mount.is_mounted());
    run("umount", &[w.at.0.to_str().unwrap()]);
    w.mount.unmount().unwrap();
    assert!(!w.mount.is_mounted());
    assert_eq!(names(&w.at.0), [""; 0]);
}

/// Kills and reaps a process when the test ends.
pub struct Killed(pub Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts this test program again to run `test` (an ignored one) with `variable` set, and waits
/// until it prints a line.
pub fn start_again(test: &str, variable: &str, value: &Path) -> Killed {
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--ignored", "--nocapture", "--test-threads=1"])
        .env(variable, value)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut child = Killed(child);
    let output = std::io::BufReader::new(child.0.stdout.take().unwrap());
    let served = std::io::BufRead::lines(output).any(|line| line.unwrap().contains("serving"));
    assert!(served, "the other process did not start");
    child
}

#[test]
#[ignore = "a part of the test of a killed process, run by it"]
fn serve_points_until_killed() {
    let Some(dir) = std::env::var_os("VIEW_TEST_POINTS") else { return };
    let store = Arc::new(FakeStore::default());
    store.add_vm("x");
    let _mount = PointsMount::start(Path::new(&dir), store).unwrap();
    println!("serving");
    loop {
        std::thread::park();
    }
}

#[test]
fn a_dead_mount_of_ours_is_cleared() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let at = MountGuard::new(dir.path(), "points");
    let child = start_again("points::serve_points_until_killed", "VIEW_TEST_POINTS", &at.0);
    assert_eq!(names(&at.0), ["x"]);
    drop(child);
    assert_eq!(fs::read_dir(&at.0).unwrap_err().raw_os_error(), Some(libc::ENOTCONN));
    let store = Arc::new(FakeStore::default());
    store.add_vm("y");
    let _mount = PointsMount::start(&at.0, store).unwrap();
    assert_eq!(names(&at.0), ["y"]);
}
