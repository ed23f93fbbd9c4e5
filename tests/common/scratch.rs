//! A folder whose mounts, loop devices and files end with it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::watchdog::{kill_for_certain, programs_below};

/// A folder below cargo's, on an ordinary file system.
pub struct Scratch {
    path: PathBuf,
}

impl Scratch {
    pub fn new(name: &str) -> Self {
        let parent = Path::new(env!("CARGO_TARGET_TMPDIR"));
        fs::create_dir_all(parent).unwrap();
        let folder = tempfile::Builder::new().prefix(&format!("{name}-")).tempdir_in(parent).unwrap();
        Self { path: folder.keep() }
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
    let dir = dir.to_str().unwrap();
    if !quietly("umount", &[dir]) {
        quietly("umount", &["-l", dir]);
    }
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
