//! The engine over a real mount: protection from the first check to the restored file, and what
//! happens to a VM while files come, go and move.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::Duration;

use afterimage::base::{Error, ErrorKind, Result};
use afterimage::host::api::Commands;
use afterimage::host::api::types::*;
use afterimage::host::config::Config;
use afterimage::host::engine::Engine;
use afterimage::host::state::StateDir;

/// Long for a machine that does much else; nothing waits so long when all is well.
const PATIENCE: Duration = Duration::from_secs(120);

/// A folder with images, its mount and a daemon's engine.
struct World {
    engine: Option<Arc<Engine>>,
    images: PathBuf,
    dir: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let images = dir.path().canonicalize().unwrap().join("vm");
        fs::create_dir(&images).unwrap();
        let mut world = Self { engine: None, images, dir };
        world.start();
        world
    }

    fn mounted() -> Self {
        let world = Self::new();
        world.mount().unwrap();
        world
    }

    fn start(&mut self) {
        let state = StateDir::at(&self.dir.path().join("state")).unwrap();
        self.engine = Some(Engine::start(state, Config::default()).unwrap());
    }

    fn stop(&mut self) {
        self.engine.take().unwrap().stop();
    }

    fn engine(&self) -> &Engine {
        self.engine.as_ref().unwrap()
    }

    fn mount(&self) -> Result<MountReply> {
        self.engine().mount(MountRequest {
            source: self.images.clone(),
            dir: self.images.clone(),
            single_host: false,
            options: Vec::new(),
        })
    }

    fn disk(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.images.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        File::create(&path).unwrap().set_len(bytes).unwrap();
        path
    }

    fn request(name: &str) -> ProtectRequest {
        ProtectRequest {
            name: name.parse().unwrap(),
            disks: Vec::new(),
            dir: None,
            exclude: Vec::new(),
            interval_ms: Some(3_600_000),
            policy: None,
            target: None,
        }
    }

    fn job(&self, started: JobStarted) -> Result<JobView> {
        let until = std::time::Instant::now() + PATIENCE;
        loop {
            let job = self.engine().job_show(JobShowRequest { job: started.job })?;
            if job.state.is_over() {
                return match job.error {
                    Some(e) => Err(Error::from(e)),
                    None => Ok(job),
                };
            }
            assert!(std::time::Instant::now() < until, "{job:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn protect(&self, name: &str, disks: &[&Path]) -> Result<JobView> {
        let disks = disks.iter().map(|d| d.to_path_buf()).collect();
        self.job(self.engine().protect(ProtectRequest { disks, ..Self::request(name) })?)
    }

    fn sync(&self, name: &str) -> PointView {
        let request = SyncRequest {
            vm: name.to_owned(),
            wait: true,
            timeout_ms: Some(u64::try_from(PATIENCE.as_millis()).unwrap()),
        };
        self.engine().sync(request).unwrap().point.unwrap()
    }

    fn points(&self, name: &str) -> Vec<PointView> {
        self.engine().points(PointsRequest { vm: name.to_owned() }).unwrap().points
    }

    fn restore(&self, name: &str, point: PointSpec, to: &str) -> Result<PathBuf> {
        let to = self.dir.path().join(to);
        self.job(self.engine().restore(RestoreRequest {
            vm: name.to_owned(),
            point,
            to: to.clone(),
            force: false,
        })?)?;
        Ok(to)
    }

    fn vm(&self, name: &str) -> VmStatus {
        let mut report = self.engine().status(StatusRequest { vm: Some(name.to_owned()) }).unwrap();
        report.vms.pop().unwrap()
    }

    fn event_kinds(&self) -> Vec<String> {
        let events = self.engine().events(EventsRequest::default()).unwrap().events;
        events.into_iter().map(|e| e.kind).collect()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if let Some(engine) = self.engine.take() {
            // What a VM has outside of our folder (shared memory) goes with its protection.
            let report = engine.status(StatusRequest::default());
            for vm in report.map(|r| r.vms).unwrap_or_default() {
                let _ = engine.unprotect(UnprotectRequest { vm: vm.name.to_string(), purge: false });
            }
            engine.stop();
        }
        // After a failed test something may still be open: the mount must not stay.
        let _ = nix::mount::umount2(&self.images, nix::mount::MntFlags::MNT_DETACH);
    }
}

fn write(path: &Path, offset: u64, bytes: &[u8]) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(bytes, offset).unwrap();
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn refused(result: Result<JobView>, kind: ErrorKind, says: &str) {
    let e = result.expect_err("it is refused");
    assert_eq!(e.kind(), kind, "{e}");
    let text = format!("{e} {}", e.next_step().unwrap_or_default());
    assert!(text.contains(says), "{text}");
}

#[test]
fn what_cannot_be_protected_is_refused_with_the_remedy() {
    let world = World::new();
    let disk = world.disk("a.raw", 1 << 20);
    let hint = format!("afterimage mount {}", world.images.display());
    refused(world.protect("a", &[&disk]), ErrorKind::Refused, &hint);
    world.mount().unwrap();
    assert_eq!(world.mount().unwrap_err().kind(), ErrorKind::Exists);
    refused(world.protect("a", &[&world.images.join("none")]), ErrorKind::NotFound, "none");
    refused(world.protect("a", &[&world.images]), ErrorKind::Refused, "no file");
    refused(world.protect("a", &[]), ErrorKind::Usage, "--disk");
    let iso = world.disk("cd.iso", 1 << 20);
    write(&iso, 0x8001, b"CD001");
    refused(world.protect("a", &[&iso]), ErrorKind::Refused, "ISO");
    let mut unknown = World::request("a");
    unknown.disks = vec![disk.clone()];
    unknown.target = Some("nas".to_owned());
    let started = world.engine().protect(unknown.clone()).unwrap();
    refused(world.job(started), ErrorKind::NotFound, "no target");
    unknown.target = Some(world.images.join("vault").display().to_string());
    let started = world.engine().protect(unknown).unwrap();
    refused(world.job(started), ErrorKind::Refused, "below the mount");
    let done = world.engine().umount(UmountRequest { dir: world.images.clone() }).unwrap();
    assert!(done.warnings.is_empty(), "{done:?}");
}

#[test]
fn a_disk_that_is_open_beneath_the_mount_is_refused_by_name_of_the_process() {
    let world = World::new();
    let disk = world.disk("a.raw", 1 << 20);
    let open = File::open(&disk).unwrap();
    let child = Killed(Command::new("sleep").arg("600").stdin(open).spawn().unwrap());
    let reply = world.mount().unwrap();
    let beneath = &reply.mount.open_beneath;
    assert!(beneath.iter().any(|o| o.pid == child.0.id() && o.path == disk), "{beneath:?}");
    refused(world.protect("a", &[&disk]), ErrorKind::Refused, &child.0.id().to_string());
    drop(child);
}

#[test]
fn a_protected_disk_is_restored_as_it_was_at_each_point() {
    let mut world = World::mounted();
    let disk = world.disk("sub/a.raw", 4 << 20);
    write(&disk, 4096, &[1; 8192]);
    let job = world.protect("web1", &[&disk]).unwrap();
    assert!(job.steps.iter().all(|s| s.state == JobState::Done), "{job:?}");
    assert_eq!(world.points("web1").len(), 1);
    // The first copy is no trouble.
    let events = world.engine().events(EventsRequest::default()).unwrap().events;
    let troubles: Vec<_> = events.iter().filter(|e| e.severity != Severity::Info).collect();
    assert!(troubles.is_empty(), "{troubles:?}");
    write(&disk, 1 << 20, &[2; 5000]);
    world.sync("web1");
    let old = fs::read(&disk).unwrap();
    let old_point = world.points("web1").pop().unwrap();
    OpenOptions::new().write(true).open(&disk).unwrap().set_len(2 << 20).unwrap();
    write(&disk, 4096, &[3; 100]);
    world.sync("web1");
    let new = fs::read(&disk).unwrap();
    let to = world.restore("web1", PointSpec::Latest, "new").unwrap();
    assert!(fs::read(to.join("sub/a.raw")).unwrap() == new);
    let to = world.restore("web1", PointSpec::Id(old_point.id), "old").unwrap();
    assert!(fs::read(to.join("sub/a.raw")).unwrap() == old);
    let again = world.restore("web1", PointSpec::Latest, "old");
    assert_eq!(again.unwrap_err().kind(), ErrorKind::Exists);
    // A clean stop and start: tracking goes on, nothing ships whole.
    world.stop();
    world.start();
    let before = world.vm("web1");
    assert!(before.disks.iter().all(|d| d.figures.whole_because.is_none()), "{before:?}");
    write(&disk, 8192, &[4; 10]);
    let point = world.sync("web1");
    assert!(point.changed_bytes <= 1 << 20, "{point:?}");
    let to = world.restore("web1", PointSpec::Latest, "after").unwrap();
    assert!(fs::read(to.join("sub/a.raw")).unwrap() == fs::read(&disk).unwrap());
}

#[test]
fn names_are_taken_and_points_outlive_protection() {
    let world = World::mounted();
    let (a, b) = (world.disk("a.raw", 1 << 20), world.disk("b.raw", 1 << 20));
    write(&a, 0, b"first");
    world.protect("web1", &[&a]).unwrap();
    refused(world.protect("web1", &[&b]), ErrorKind::Exists, "protected already");
    refused(world.protect("web2", &[&a]), ErrorKind::Refused, "web1");
    let unprotect = |purge| world.engine().unprotect(UnprotectRequest { vm: "web1".to_owned(), purge });
    assert!(unprotect(false).unwrap().message.ends_with("1 point is kept"));
    assert_eq!(unprotect(false).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(world.points("web1").len(), 1);
    refused(world.protect("web1", &[&b]), ErrorKind::Exists, "--purge");
    // The same disks under the same name go on with the same points.
    write(&a, 0, b"second");
    world.protect("web1", &[&a]).unwrap();
    assert_eq!(world.points("web1").len(), 2);
    unprotect(true).unwrap();
    let gone = world.engine().points(PointsRequest { vm: "web1".to_owned() });
    assert_eq!(gone.unwrap_err().kind(), ErrorKind::NotFound);
    world.protect("web1", &[&b]).unwrap();
}

#[test]
fn renames_removals_and_replacements_are_followed() {
    let world = World::mounted();
    let (a, b) = (world.disk("a.raw", 1 << 20), world.disk("b.raw", 1 << 20));
    write(&a, 0, b"content of a");
    world.protect("web1", &[&a, &b]).unwrap();
    fs::rename(&a, world.images.join("c.raw")).unwrap();
    fs::remove_file(&b).unwrap();
    world.sync("web1");
    let to = world.restore("web1", PointSpec::Latest, "renamed").unwrap();
    assert_eq!(&fs::read(to.join("c.raw")).unwrap()[..12], b"content of a");
    assert!(!to.join("a.raw").exists() && !to.join("b.raw").exists());
    // Another file renamed over the path becomes the disk and is there whole.
    let new = world.disk("new.tmp", 2 << 20);
    write(&new, 1 << 20, b"content of new");
    fs::rename(&new, world.images.join("c.raw")).unwrap();
    write(&world.images.join("c.raw"), 0, b"later");
    world.sync("web1");
    let to = world.restore("web1", PointSpec::Latest, "replaced").unwrap();
    assert!(fs::read(to.join("c.raw")).unwrap() == fs::read(world.images.join("c.raw")).unwrap());
    let first = world.points("web1").remove(0);
    let to = world.restore("web1", PointSpec::Id(first.id), "first").unwrap();
    assert!(to.join("a.raw").exists() && to.join("b.raw").exists());
    let kinds = world.event_kinds();
    for kind in ["disk-renamed", "disk-left", "disk-joined"] {
        assert!(kinds.iter().any(|k| k == kind), "{kind}: {kinds:?}");
    }
}

#[test]
fn overlays_join_and_followed_folders_are_followed() {
    let world = World::mounted();
    let base = world.disk("web1/base.raw", 1 << 20);
    world.disk("web1/cd.iso", 1 << 20);
    world.disk("web1/notes.tmp", 10);
    let request = ProtectRequest {
        dir: Some(world.images.join("web1")),
        exclude: vec!["*.tmp".to_owned()],
        ..World::request("web1")
    };
    world.job(world.engine().protect(request).unwrap()).unwrap();
    assert_eq!(world.vm("web1").disks.len(), 1);
    // One in the folder, one beside it that only its backing file leads to.
    let overlay = world.images.join("overlay.qcow2");
    for path in [world.images.join("web1/over.qcow2"), overlay] {
        let made = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
            .args([&base, &path])
            .status()
            .unwrap();
        assert!(made.success());
    }
    world.disk("web1/second.raw", 4096);
    write(&base, 0, b"changed");
    world.sync("web1");
    let disks: Vec<PathBuf> = world.vm("web1").disks.into_iter().map(|d| d.path).collect();
    for name in ["web1/base.raw", "web1/over.qcow2", "overlay.qcow2", "web1/second.raw"] {
        assert!(disks.contains(&world.images.join(name)), "{name}: {disks:?}");
    }
    assert_eq!(disks.len(), 4, "{disks:?}");
    fs::rename(world.images.join("web1/second.raw"), world.images.join("elsewhere.raw")).unwrap();
    world.sync("web1");
    assert_eq!(world.vm("web1").disks.len(), 3);
    let to = world.restore("web1", PointSpec::Latest, "to").unwrap();
    let check = Command::new("qemu-img").arg("check").arg("-q").arg(to.join("overlay.qcow2")).status();
    assert!(check.unwrap().success());
    // An image whose backing file is nowhere: all is restored that there is, and it is said.
    fs::remove_file(&base).unwrap();
    world.sync("web1");
    let partial = world.restore("web1", PointSpec::Latest, "partial");
    let e = partial.unwrap_err();
    assert!(e.kind() == ErrorKind::Partial && e.to_string().contains("base.raw"), "{e}");
    assert!(world.dir.path().join("partial/overlay.qcow2").exists());
}

#[test]
fn folders_and_disks_that_are_exchanged_keep_what_they_are() {
    let world = World::mounted();
    let (a, b) = (world.disk("one/x.raw", 1 << 20), world.disk("two/x.raw", 2 << 20));
    let c = world.disk("c.raw", 3 << 20);
    world.protect("web1", &[&a, &b, &c]).unwrap();
    for (at, path) in [&a, &b, &c].into_iter().enumerate() {
        write(path, 4096, &[u8::try_from(at).unwrap() + 1; 4096]);
    }
    let exchange = |from: &Path, to: &Path| {
        let flags = nix::fcntl::RenameFlags::RENAME_EXCHANGE;
        nix::fcntl::renameat2(nix::fcntl::AT_FDCWD, from, nix::fcntl::AT_FDCWD, to, flags).unwrap();
    };
    exchange(&world.images.join("one"), &world.images.join("two"));
    exchange(&b, &c);
    let point = world.sync("web1");
    assert!(point.changed_bytes <= 1 << 20, "{point:?}");
    let to = world.restore("web1", PointSpec::Latest, "to").unwrap();
    for path in [&a, &b, &c] {
        let restored = to.join(path.strip_prefix(&world.images).unwrap());
        assert!(fs::read(restored).unwrap() == fs::read(path).unwrap(), "{}", path.display());
    }
}

#[test]
fn a_disk_written_while_its_vm_waits_for_another_mount_is_sent_whole() {
    let world = World::mounted();
    let other = world.images.with_file_name("other");
    fs::create_dir(&other).unwrap();
    let mount_other = || {
        let request = MountRequest {
            source: other.clone(),
            dir: other.clone(),
            single_host: false,
            options: Vec::new(),
        };
        world.engine().mount(request).unwrap();
    };
    mount_other();
    let (a, b) = (world.disk("a.raw", 1 << 20), other.join("b.raw"));
    File::create(&b).unwrap().set_len(1 << 20).unwrap();
    world.protect("web1", &[&a, &b]).unwrap();
    world.engine().umount(UmountRequest { dir: other.clone() }).unwrap();
    // Its mount serves, and nobody tracks it.
    let modified = fs::metadata(&a).unwrap().modified().unwrap();
    write(&a, 0, b"untracked");
    File::open(&a).unwrap().set_modified(modified).unwrap();
    mount_other();
    world.sync("web1");
    let to = world.restore("web1", PointSpec::Latest, "to").unwrap();
    assert!(fs::read(to.join("a.raw")).unwrap() == fs::read(&a).unwrap());
}
