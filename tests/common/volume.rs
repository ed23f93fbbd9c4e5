//! A file system on a loop device: small enough to fill, and with a power switch of its own.

use std::path::{Path, PathBuf};

use super::{run, sparse, text};
use crate::common::scratch::{mounts_below, unmount};

/// Which file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Ext4,
    Xfs,
}

/// A mounted file system of its own. Dropping it unmounts it and detaches its device.
pub struct Volume {
    device: String,
    dir: PathBuf,
    kind: Kind,
}

impl Volume {
    /// Makes a file system of `mib` MiB in `image` (xfs: 300 at least) and mounts it at `dir`.
    pub fn make(image: &Path, kind: Kind, mib: u64, dir: &Path) -> Self {
        sparse(image, mib << 20);
        match kind {
            Kind::Ext4 => run("mkfs.ext4", &["-q", "-F", "-E", "nodiscard", text(image)]),
            Kind::Xfs => run("mkfs.xfs", &["-q", "-f", "-K", text(image)]),
        };
        Self::attach(image, kind, dir)
    }

    /// Mounts the file system that is in `image` at `dir`.
    pub fn attach(image: &Path, kind: Kind, dir: &Path) -> Self {
        std::fs::create_dir_all(dir).unwrap();
        let device = run("losetup", &["--find", "--show", text(image)]).trim().to_owned();
        let volume = Self { device, dir: dir.to_owned(), kind };
        volume.mount();
        volume
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn mount(&self) {
        match self.kind {
            Kind::Ext4 => run("mount", &["-t", "ext4", &self.device, text(&self.dir)]),
            // A copy has the same UUID as the file system that it is a copy of.
            Kind::Xfs => run("mount", &["-t", "xfs", "-o", "nouuid", &self.device, text(&self.dir)]),
        };
    }

    pub fn unmount(&self) {
        while mounts_below(&self.dir).contains(&self.dir) {
            unmount(&self.dir);
        }
    }

    /// The power goes: whatever was not synced is lost, renames too.
    pub fn cut_power(&self) {
        run("xfs_io", &["-x", "-c", "shutdown", text(&self.dir)]);
    }

    /// The power comes back: the log is replayed by the mount.
    pub fn power_on(&self) {
        self.unmount();
        self.mount();
    }

    /// Unmounted and detached, it passes the checker of its kind.
    pub fn check(&self) {
        self.unmount();
        match self.kind {
            Kind::Ext4 => run("fsck.ext4", &["-n", "-f", &self.device]),
            Kind::Xfs => run("xfs_repair", &["-n", &self.device]),
        };
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        self.unmount();
        let _ = std::process::Command::new("losetup").args(["-d", &self.device]).output();
    }
}
