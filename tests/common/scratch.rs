//! A folder whose mounts, loop devices and files end with it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use super::watchdog::{kill_for_certain, programs_below};

/// A mount namespace of its own starts with a copy of every mount, so that what another test
/// unmounts meanwhile stays in use: a test that makes one has the machine for itself.
static MACHINE: RwLock<()> = RwLock::new(());

/// A folder below cargo's, on an ordinary file system.
pub struct Scratch {
    path: PathBuf,
    _machine: Machine,
}

/// Held while a test uses the machine; given back after everything of the test is gone.
enum Machine {
    Shared { _guard: RwLockReadGuard<'static, ()> },
    Alone { _guard: RwLockWriteGuard<'static, ()> },
}

impl Scratch {
    /// One for each test, no more.
    pub fn new(name: &str) -> Self {
        let guard = MACHINE.read().unwrap_or_else(PoisonError::into_inner);
        Self { path: Self::folder(name), _machine: Machine::Shared { _guard: guard } }
    }

    /// For a test whose programs become other users: these may search every folder above.
    pub fn searchable(name: &str) -> Self {
        let guard = MACHINE.read().unwrap_or_else(PoisonError::into_inner);
        let path = Self::folder_in(Path::new("/var/tmp"), name);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        Self { path, _machine: Machine::Shared { _guard: guard } }
    }

    /// For a test that makes a mount namespace: waits until no other test runs.
    pub fn alone(name: &str) -> Self {
        let guard = MACHINE.write().unwrap_or_else(PoisonError::into_inner);
        Self { path: Self::folder(name), _machine: Machine::Alone { _guard: guard } }
    }

    fn folder(name: &str) -> PathBuf {
        let parent = Path::new(env!("CARGO_TARGET_TMPDIR"));
        fs::create_dir_all(parent).unwrap();
        Self::folder_in(parent, name)
    }

    fn folder_in(parent: &Path, name: &str) -> PathBuf {
        let folder = tempfile::Builder::new().prefix(&format!("{name}-")).tempdir_in(parent).unwrap();
        folder.keep()
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A folder in it, made if it is missing.
    pub fn dir(&self, name: &str) -> PathBuf {
        let dir = self.path.join(name);
        fs::create_dir_all(&dir).unwrap();
        dir
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Daemons of a binary that was installed into the folder.
        programs_below(&self.path).into_iter().for_each(kill_for_certain);
        for dir in mounts_below(&self.path).iter().rev() {
            unmount(dir);
        }
        for device in loops_below(&self.path) {
            quietly("losetup", &["-d", &device]);
        }
        if let Err(e) = fs::remove_dir_all(&self.path) {
            eprintln!("{} stays behind: {e}", self.path.display());
        }
    }
}

/// Mount points at or below a folder, in the order in which they were mounted, as the calling
/// thread sees them.
pub fn mounts_below(folder: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/thread-self/mountinfo").unwrap_or_default();
    table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|field| PathBuf::from(field.replace("\\040", " ")))
        .filter(|dir| dir.starts_with(folder))
        .collect()
}

/// Gone when it returns, whatever is still open below it.
pub fn unmount(dir: &Path) {
    let name = dir.to_str().unwrap();
    // A program that another thread is about to start has copies of every open file for a moment.
    for _ in 0..50 {
        if quietly("umount", &[name]) {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    quietly("umount", &["-l", name]);
}

fn loops_below(folder: &Path) -> Vec<String> {
    let Ok(out) = Command::new("losetup").args(["-l", "-n", "-O", "NAME,BACK-FILE"]).output() else {
        return Vec::new();
    };
    let folder = folder.to_str().unwrap();
    String::from_utf8_lossy(&out.stdout)
        .lines()
        .filter(|line| line.contains(folder))
        .filter_map(|line| line.split_whitespace().next().map(str::to_owned))
        .collect()
}

fn quietly(program: &str, args: &[&str]) -> bool {
    let out = Command::new("timeout").args(["-k", "5", "60", program]).args(args).output();
    out.is_ok_and(|o| o.status.success())
}
