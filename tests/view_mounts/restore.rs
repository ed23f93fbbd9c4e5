//! Restore.

use std::cell::Cell;
use std::fs;
use std::ops::ControlFlow;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use afterimage::base::{ErrorKind, Result};
use afterimage::core::ports::points::PointReader;
use afterimage::view::{Backing, RestorePhase, RestoreProgress, RestoreReport, restore};

use crate::fake::{FakePoint, alone, pattern, run};

fn holey() -> Vec<u8> {
    let mut disk = pattern(3, 3_000_000);
    disk.resize(8 << 20, 0);
    disk.extend(pattern(4, 777));
    disk
}

fn point() -> FakePoint {
    FakePoint::new(5, &[("a.img", holey()), ("sub/deep/b.img", pattern(6, 100_000))])
}

fn go(reader: &dyn PointReader, to: &Path, force: bool) -> Result<RestoreReport> {
    restore(reader, to, force, &|_| ControlFlow::Continue(()))
}

/// Everything below a folder, with sizes.
fn everything(dir: &Path) -> Vec<(PathBuf, u64)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let metadata = path.symlink_metadata().unwrap();
        found.push((path.clone(), metadata.len()));
        if metadata.is_dir() {
            found.extend(everything(&path));
        }
    }
    found.sort();
    found
}

#[test]
fn disks_are_restored_sparse_with_their_definition() {
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("new/folder");
    let last = Cell::new(None);
    let report = restore(&point(), &to, false, &|p: RestoreProgress| {
        last.set(Some((p.phase, p.done_bytes, p.total_bytes)));
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(fs::read(to.join("a.img")).unwrap(), holey());
    assert_eq!(fs::read(to.join("sub/deep/b.img")).unwrap(), pattern(6, 100_000));
    assert_eq!(fs::read_to_string(to.join(".afterimage/machine.toml")).unwrap(), "name = \"x\"\n");
    assert!(to.join("a.img").metadata().unwrap().blocks() * 512 < 4 << 20);
    assert_eq!(to.join("a.img").metadata().unwrap().mode() & 0o777, 0o600);
    assert_eq!(report.point.to_string(), "5-abcd0005");
    assert_eq!(report.definition, [PathBuf::from(".afterimage/machine.toml")]);
    let sizes: Vec<_> = report.files.iter().map(|f| (f.bytes, f.data_bytes)).collect();
    let data = 3_000_000u64.div_ceil(4096) * 4096 + 777;
    assert_eq!(sizes, [(holey().len() as u64, data), (100_000, 100_000)]);
    assert_eq!(last.get(), Some((RestorePhase::Finish, data + 100_000, data + 100_000)));
    assert_eq!(everything(&to).len(), 6);
}

#[test]
fn nothing_is_replaced_without_force() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("sub/deep")).unwrap();
    let there = dir.path().join("sub/deep/b.img");
    fs::write(&there, "mine").unwrap();
    fs::set_permissions(&there, fs::Permissions::from_mode(0o640)).unwrap();
    std::os::unix::fs::chown(&there, Some(77), Some(78)).unwrap();
    let before = everything(dir.path());
    let refused = go(&point(), dir.path(), false).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Exists);
    assert!(refused.next_step().unwrap().contains("--force"));
    assert!(refused.reason().unwrap().contains("b.img"));
    assert_eq!(everything(dir.path()), before);
    go(&point(), dir.path(), true).unwrap();
    assert_eq!(fs::read(&there).unwrap(), pattern(6, 100_000));
    let found = there.metadata().unwrap();
    assert_eq!((found.uid(), found.gid(), found.mode() & 0o777), (77, 78, 0o640));
    fs::remove_file(&there).unwrap();
    fs::create_dir(&there).unwrap();
    assert_eq!(go(&point(), dir.path(), true).unwrap_err().kind(), ErrorKind::Refused);
}

#[test]
fn a_cancelled_restore_leaves_nothing() {
    for phase in [RestorePhase::Plan, RestorePhase::Copy, RestorePhase::Finish] {
        for skip in [0, 2] {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join("a.img"), "mine").unwrap();
            let before = everything(dir.path());
            let seen = Cell::new(0);
            let result = restore(&point(), dir.path(), true, &|p| {
                seen.set(seen.get() + i32::from(p.phase == phase));
                if seen.get() > skip { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            });
            match result {
                Err(e) => {
                    assert_eq!(e.kind(), ErrorKind::Cancelled);
                    assert_eq!(everything(dir.path()), before, "{phase:?} {skip}");
                }
                Ok(_) => assert!(seen.get() <= skip),
            }
        }
    }
}

#[test]
fn damage_is_told_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let point = point();
    point.damaged_at.store(2_000_000, Ordering::Relaxed);
    let error = go(&point, &dir.path().join("new"), false).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Damaged);
    assert_eq!(everything(dir.path()), []);
}

/// A point that says that a disk of 60 TiB is all data.
struct Huge(FakePoint);

impl PointReader for Huge {
    fn info(&self) -> &afterimage::core::ports::points::PointInfo {
        self.0.info()
    }

    fn disks(&self) -> &[afterimage::core::ports::points::PointDisk] {
        self.0.disks()
    }

    fn definition(&self) -> &[afterimage::format::manifest::DefinitionFile] {
        &[]
    }

    fn read_at(&self, _: usize, _: u64, _: &mut [u8]) -> Result<usize> {
        panic!("nothing is read before the room is there");
    }

    fn next_data(&self, _: usize, offset: u64) -> Result<Option<afterimage::base::Extent>> {
        Ok(Some(afterimage::base::Extent { offset, length: (60 << 40) - offset }))
    }
}

#[test]
fn room_is_asked_for_before_the_first_byte() {
    let dir = tempfile::tempdir().unwrap();
    let mut huge = Huge(FakePoint::new(1, &[("a.img", vec![1; 10])]));
    huge.0.disks[0].size = 60 << 40;
    let error = go(&huge, &dir.path().join("x/y"), false).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    assert!(error.reason().unwrap().contains("60.0 TiB"), "{error}");
    assert_eq!(everything(dir.path()), []);
}

#[test]
fn paths_that_leave_the_folder_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    for path in ["../a", "/etc/a", "x/../../a"] {
        let error = go(&FakePoint::new(1, &[(path, vec![1; 10])]), dir.path(), true).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Damaged);
        assert_eq!(everything(dir.path()), []);
    }
}

/// A VM whose overlays name their backing files in every way.
#[test]
fn restored_overlays_find_their_backing_files() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let vm = dir.path().join("vm");
    fs::create_dir_all(vm.join("sub")).unwrap();
    let absolute = vm.join("base.raw");
    let elsewhere = dir.path().join("elsewhere");
    fs::write(&elsewhere, vec![9; 1 << 20]).unwrap();
    fs::write(&absolute, pattern(1, 1 << 20)).unwrap();
    let create = |name: &str, backing: &str, format: &str| {
        let path = vm.join(name);
        let path = path.to_str().unwrap();
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", backing, "-F", format, path]);
    };
    create("sub/abs.qcow2", absolute.to_str().unwrap(), "raw");
    create("rel.qcow2", "sub/abs.qcow2", "qcow2");
    create("out.qcow2", elsewhere.to_str().unwrap(), "raw");
    let names = ["base.raw", "out.qcow2", "rel.qcow2", "sub/abs.qcow2"];
    let disks: Vec<_> = names.iter().map(|n| (*n, fs::read(vm.join(n)).unwrap())).collect();
    let mut point = FakePoint::new(1, &disks);
    let backing = [None, elsewhere.to_str(), Some("sub/abs.qcow2"), absolute.to_str()];
    point.disks.iter_mut().zip(backing).for_each(|(d, b)| d.backing = b.map(str::to_owned));
    fs::remove_dir_all(&vm).unwrap();
    fs::remove_file(&elsewhere).unwrap();
    let to = dir.path().join("restored");
    let report = go(&point, &to, false).unwrap();
    let found: Vec<_> = report.files.into_iter().map(|f| f.backing).collect();
    assert_eq!(found[0], None);
    assert!(matches!(&found[1], Some(Backing::Missing { why, .. }) if why.contains("no such file")));
    assert_eq!(found[2], Some(Backing::Kept { name: "sub/abs.qcow2".to_owned() }));
    let from = absolute.to_str().unwrap().to_owned();
    assert_eq!(found[3], Some(Backing::Rewritten { from, to: "../base.raw".to_owned() }));
    let top = to.join("rel.qcow2");
    let top = top.to_str().unwrap();
    assert!(run("qemu-img", &["info", "--backing-chain", top]).contains("base.raw"));
    run("qemu-img", &["check", "-q", top]);
    run("qemu-img", &["check", "-q", to.join("sub/abs.qcow2").to_str().unwrap()]);
    let base = to.join("base.raw");
    let same = run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", top, base.to_str().unwrap()]);
    assert!(same.contains("identical"), "{same}");
}
