//! The life of a mount: where it may be, who uses it, how it ends.

mod filter_support;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use afterimage::base::ErrorKind;
use afterimage::base::dead::clear_dead;
use afterimage::base::mountinfo::top_mount;
use afterimage::filter::{MOUNT_TYPE, Mount, MountSpec};
use filter_support::{Events, Mounted, Running, errno, names};
use nix::errno::Errno;

#[test]
fn mounted_over_itself_files_keep_their_paths_and_content() {
    let fs_ = Mounted::over(|dir| {
        fs::write(dir.join("old"), "before").unwrap();
        fs::create_dir(dir.join("sub")).unwrap();
    });
    assert_eq!(fs::read(fs_.path("old")).unwrap(), b"before");
    fs::write(fs_.path("sub/new"), "after").unwrap();
    assert_eq!(fs::read(fs_.path("sub/new")).unwrap(), b"after");
    assert_eq!(names(&fs_.dir), ["old", "sub"]);
    assert_eq!(top_mount(&fs_.dir).unwrap().unwrap().kind, MOUNT_TYPE);
    // What is below has it too, by the same name and number, and not through the mount.
    let below = fs_.mount().resolve(Path::new("sub/new")).unwrap();
    let mut text = [0; 5];
    below.file.read_exact_at(&mut text, 0).unwrap();
    assert_eq!(&text, b"after");
    assert_eq!(below.file_name, "new");
    let seen = fs::metadata(fs_.path("sub/new")).unwrap();
    assert_eq!(seen.ino(), below.key.inode);
    assert_ne!(seen.dev(), below.key.device);
    assert!(fs_.mount().resolve(Path::new("../x")).is_err());
    assert!(fs_.mount().resolve(Path::new("/etc/passwd")).is_err());
    assert_eq!(fs_.mount().resolve(Path::new("sub")).unwrap_err().kind(), ErrorKind::Refused);
}

#[test]
fn mounting_twice_and_bad_directories_are_refused() {
    let fs_ = Mounted::empty();
    let spec = |dir: &Path| MountSpec {
        source: dir.to_owned(),
        dir: dir.to_owned(),
        single_host: false,
        options: vec![],
    };
    let start = |spec| Mount::start(spec, Arc::new(Events::default())).map(drop);
    assert_eq!(start(spec(&fs_.dir)).unwrap_err().kind(), ErrorKind::Exists);
    assert_eq!(start(spec(Path::new("/no/such/folder"))).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(start(spec(Path::new("/etc/passwd"))).unwrap_err().kind(), ErrorKind::Usage);
    let mut odd = spec(fs_.dir.parent().unwrap());
    odd.options = vec!["nonsense".to_owned()];
    assert_eq!(start(odd).unwrap_err().kind(), ErrorKind::Usage);
}

#[test]
fn unmounting_is_refused_while_in_use_and_names_who() {
    let fs_ = Mounted::over(|dir| fs::write(dir.join("a"), "x").unwrap());
    let path = fs_.path("a");
    let user = Running::shell("exec 3<\"$1\"; echo ready; read x", &[&path]);
    let error = fs_.mount().unmount(false).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    let reason = error.reason().unwrap();
    assert!(reason.contains(&format!("process {}", user.0.id())), "{reason}");
    assert!(reason.contains("images/a"), "{reason}");
    assert!(fs_.mount().holders(fs_.mount().resolve(Path::new("a")).unwrap().key).is_empty());
    drop(user);
    fs_.mount().unmount(false).unwrap();
    assert!(fs_.mount().has_ended());
    assert_eq!(fs::read(&path).unwrap(), b"x");
    fs_.mount().unmount(false).unwrap();
}

#[test]
fn removed_from_outside_the_mount_ends() {
    let fs_ = Mounted::empty();
    let done = std::process::Command::new("umount").arg(&fs_.dir).status().unwrap();
    assert!(done.success());
    fs_.mount().wait();
}

#[test]
fn what_is_open_beneath_is_found() {
    let mut user = None;
    let fs_ = Mounted::over(|dir| {
        fs::create_dir(dir.join("vm")).unwrap();
        fs::write(dir.join("vm/a"), "x").unwrap();
        fs::write(dir.join("b"), "x").unwrap();
        user = Some(Running::shell("exec 3<>\"$1\"; echo ready; read x", &[&dir.join("vm/a")]));
    });
    let above = fs_.path("b");
    let _through = Running::shell("exec 3<>\"$1\"; echo ready; read x", &[&above]);
    let beneath = fs_.mount().open_beneath();
    assert_eq!(beneath.len(), 1, "{beneath:?}");
    assert_eq!(beneath[0].0, Path::new("vm/a"));
    assert_eq!(beneath[0].1.pid, Some(user.as_ref().unwrap().0.id()));
    let key = |name: &str| fs_.mount().resolve(Path::new(name)).unwrap().key;
    assert_eq!(fs_.mount().holders(key("vm/a")).len(), 1);
    assert!(fs_.mount().holders(key("b")).is_empty());
}

#[test]
fn what_is_mounted_below_is_not_crossed() {
    struct Unmount(PathBuf);
    impl Drop for Unmount {
        fn drop(&mut self) {
            let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
        }
    }
    let mut inner = None;
    let fs_ = Mounted::over(|dir| {
        fs::create_dir(dir.join("sub")).unwrap();
        fs::write(dir.join("sub/lower"), "x").unwrap();
        let none: Option<&str> = None;
        nix::mount::mount(Some("tmpfs"), &dir.join("sub"), Some("tmpfs"), nix::mount::MsFlags::empty(), none)
            .unwrap();
        inner = Some(Unmount(dir.join("sub")));
        fs::write(dir.join("sub/upper"), "x").unwrap();
    });
    assert_eq!(names(&fs_.path("sub")), ["lower"]);
    drop(fs_);
    drop(inner);
}

#[test]
fn a_mount_elsewhere_and_read_only() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().canonicalize().unwrap();
    let (source, dir) = (root.join("source"), root.join("seen"));
    fs::create_dir(&source).unwrap();
    fs::create_dir(&dir).unwrap();
    fs::write(source.join("a"), "x").unwrap();
    let spec = MountSpec {
        source,
        dir: dir.clone(),
        single_host: false,
        options: vec!["ro,noatime".to_owned(), "x-systemd.automount".to_owned()],
    };
    let mount = Mount::start(spec, Arc::new(Events::default())).unwrap();
    let read = fs::read(dir.join("a"));
    let write = fs::write(dir.join("a"), "y");
    let removed = mount.unmount(false);
    assert_eq!(read.unwrap(), b"x");
    assert_eq!(errno(write.unwrap_err()), Errno::EROFS);
    removed.unwrap();
    assert_eq!(clear_dead(&dir, |kind| kind == MOUNT_TYPE).unwrap(), 0);
}

#[test]
fn a_folder_of_many_files_needs_no_descriptors() {
    let count = 3000;
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let fs_ = Mounted::within(folder, |dir| {
        for i in 0..count {
            File::create(dir.join(format!("file-{i}"))).unwrap();
        }
    });
    let open_now = || fs::read_dir("/proc/self/fd").unwrap().count();
    let before = open_now();
    assert_eq!(names(&fs_.dir).len(), count);
    for i in 0..count {
        assert!(fs::metadata(fs_.path(format!("file-{i}"))).is_ok());
    }
    // Other tests of this process open and close files meanwhile.
    assert!(open_now() < before + 1000);
    let statfs = nix::sys::statvfs::statvfs(&fs_.dir).unwrap();
    assert!(statfs.blocks() > 0 && statfs.name_max() == 255);
}

/// Not a test of its own: the daemon of the next one, which kills it.
#[test]
fn serve_until_killed() {
    let Some(dir) = std::env::var_os("FILTER_TEST_SERVE") else { return };
    let spec =
        MountSpec { source: dir.clone().into(), dir: dir.into(), single_host: false, options: Vec::new() };
    let mount = Mount::start(spec, Arc::new(Events::default())).unwrap();
    println!("\nserving");
    mount.wait();
}

#[test]
fn a_dead_mount_is_cleared_and_mounted_again() {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};
    struct Detach(PathBuf);
    impl Drop for Detach {
        fn drop(&mut self) {
            let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().canonicalize().unwrap();
    fs::write(dir.join("a"), "x").unwrap();
    let _detach = Detach(dir.clone());
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "serve_until_killed", "--nocapture"]).env("FILTER_TEST_SERVE", &dir);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.map_while(Result::ok).any(|line| line == "serving"));
    let open = File::open(dir.join("a")).unwrap();
    assert_eq!(clear_dead(&dir, |kind| kind == MOUNT_TYPE).unwrap(), 0);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(errno(fs::metadata(dir.join("a")).unwrap_err()), Errno::ENOTCONN);
    let spec = MountSpec { source: dir.clone(), dir: dir.clone(), single_host: false, options: vec![] };
    let mount = Mount::start(spec, Arc::new(Events::default())).unwrap();
    let read = fs::read(dir.join("a"));
    assert!(open.read_at(&mut [0], 0).is_err());
    drop(open);
    mount.unmount(false).unwrap();
    assert_eq!(read.unwrap(), b"x");
    assert_eq!(fs::read(dir.join("a")).unwrap(), b"x");
}

#[test]
fn a_loop_device_beneath_is_a_holder() {
    struct Loop(String);
    impl Drop for Loop {
        fn drop(&mut self) {
            let _ = std::process::Command::new("losetup").args(["-d", &self.0]).status();
        }
    }
    let mut device = None;
    let fs_ = Mounted::over(|dir| {
        File::create(dir.join("a")).unwrap().set_len(1 << 20).unwrap();
        let mut losetup = std::process::Command::new("losetup");
        let output = losetup.args(["-f", "--show"]).arg(dir.join("a")).output().unwrap();
        assert!(output.status.success());
        device = Some(Loop(String::from_utf8(output.stdout).unwrap().trim().to_owned()));
    });
    let key = fs_.mount().resolve(Path::new("a")).unwrap().key;
    let holders = fs_.mount().holders(key);
    assert_eq!(holders.len(), 1, "{holders:?}");
    assert_eq!((holders[0].pid, &holders[0].name), (None, &device.as_ref().unwrap().0));
}
