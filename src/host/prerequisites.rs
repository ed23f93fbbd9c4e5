//! What must hold before a VM is protected; each check with its remedy. Nothing is changed here.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::engine::Engine;
use super::folder::FolderFilter;
use super::lower::Looked;
use super::mounts::Mounted;
use super::records::{DiskRecord, FolderRule};
use super::storage;
use super::targets::Target;
use crate::base::limits::{DISK_BYTES_MAX, DISKS_PER_VM_MAX};
use crate::base::shell::shell;
use crate::base::{DiskId, Error, ErrorKind, Result, Timestamp, VmId};
use crate::core::ports::vault::Vault;
use crate::machine::chain;
use crate::machine::image::{self, ImageFormat, ImageInfo};

/// A clock before this is not set: 2025-01-01 UTC.
const CLOCK_MIN: Timestamp = Timestamp(1_735_689_600_000);
/// The HRLs need at least so much on the file system of the disks.
const IMAGE_ROOM_BYTES_MIN: u64 = 16 << 20;
/// The vault needs the disks and so much more.
const VAULT_ROOM_BYTES_MIN: u64 = 16 << 20;

/// A file that can become a disk.
pub struct Candidate {
    /// Its mount.
    pub mount: Arc<Mounted>,
    /// Its path relative to the root of the mount.
    pub path: PathBuf,
    /// The lower file, looked at.
    pub looked: Looked,
    /// What it is.
    pub info: ImageInfo,
}

impl Candidate {
    /// Its path in the mounted view.
    pub fn view_path(&self) -> PathBuf {
        self.mount.dir().join(&self.path)
    }

    /// Its record, with a new id.
    pub fn record(&self) -> DiskRecord {
        DiskRecord {
            id: DiskId::random(),
            mount: self.mount.dir().to_owned(),
            path: self.path.clone(),
            format: self.info.format,
        }
    }
}

impl Engine {
    /// The mount that `path` lies under and its path there. Symbolic links are followed.
    pub(super) fn locate(&self, path: &Path) -> Result<(Arc<Mounted>, PathBuf)> {
        let what = || format!("{} cannot be protected", path.display());
        if !path.is_absolute() {
            return Err(Error::new(ErrorKind::Usage, what()).why("its path is not absolute"));
        }
        let real = fs::canonicalize(path).map_err(|e| Error::io(what(), e))?;
        let Some(mount) = self.mounts.over(&real) else {
            let folder = real.parent().unwrap_or(&real);
            return Err(Error::new(ErrorKind::Refused, what())
                .why("it does not lie under a mount of afterimage")
                .hint(format!("afterimage mount {}", shell(folder))));
        };
        let inside = real.strip_prefix(mount.dir()).unwrap_or(Path::new("")).to_owned();
        Ok((mount, inside))
    }

    /// Looks at one file of a mount. `is_raw`: somebody declared it so, whatever its bytes say.
    pub(super) fn candidate(&self, mount: Arc<Mounted>, path: &Path, is_raw: bool) -> Result<Candidate> {
        let looked = mount.look(path)?;
        if looked.size > DISK_BYTES_MAX {
            let shown = mount.dir().join(path);
            return Err(Error::new(
                ErrorKind::Refused,
                format!("disk {} cannot be protected", shown.display()),
            )
            .why(format!("it has {} bytes, more than {DISK_BYTES_MAX}", looked.size)));
        }
        let info = match is_raw {
            true => ImageInfo::raw(looked.size),
            false => image::probe(&looked.file)?,
        };
        Ok(Candidate { mount, path: path.to_owned(), looked, info })
    }

    /// The disks named by `paths`, each with its backing chain. No disk twice.
    pub(super) fn disks_of_paths(&self, paths: &[PathBuf]) -> Result<Vec<Candidate>> {
        let mut found: Vec<Candidate> = Vec::new();
        for path in paths {
            let (mount, inside) = self.locate(path)?;
            let first = self.candidate(mount, &inside, false)?;
            if first.info.format == ImageFormat::Iso {
                return Err(Error::new(
                    ErrorKind::Refused,
                    format!("{} cannot be protected", path.display()),
                )
                .why("it is an ISO image, which never changes")
                .hint("name the disks only"));
            }
            if found.iter().any(|c| c.looked.key == first.looked.key) {
                continue;
            }
            for candidate in self.chain(first)? {
                if !found.iter().any(|c| c.looked.key == candidate.looked.key) {
                    found.push(candidate);
                }
            }
        }
        Ok(found)
    }

    /// A disk and the files of its backing chain.
    fn chain(&self, first: Candidate) -> Result<Vec<Candidate>> {
        first.info.verify_supported(&first.view_path())?;
        if first.info.backing().is_none() {
            return Ok(vec![first]);
        }
        let open = |path: &Path| {
            let (mount, inside) = self.locate(path).map_err(|e| backing_elsewhere(path, e))?;
            Ok(mount.look(&inside)?.file)
        };
        let links = chain::resolve(&first.view_path(), &open)?;
        let mut found = vec![first];
        for link in links.into_iter().skip(1) {
            let (mount, inside) = self.locate(&link.path)?;
            let is_raw = link.info.format == ImageFormat::Raw;
            let candidate = self.candidate(mount, &inside, is_raw)?;
            candidate.info.verify_supported(&link.path)?;
            found.push(candidate);
        }
        Ok(found)
    }

    /// The disks in a folder, and what was left out, in words.
    pub(super) fn disks_of_folder(
        &self,
        dir: &Path,
        exclude: &[String],
    ) -> Result<(Vec<Candidate>, FolderRule, Vec<String>)> {
        let (mount, inside) = self.locate(dir)?;
        if !fs::metadata(dir).is_ok_and(|m| m.is_dir()) {
            return Err(Error::new(ErrorKind::Refused, format!("{} cannot be followed", dir.display()))
                .why("it is no folder")
                .hint(format!("afterimage protect NAME --disk {}", shell(dir))));
        }
        let rule = FolderRule { mount: mount.dir().to_owned(), path: inside, exclude: exclude.to_owned() };
        let (found, left_out) = self.scan_folder(&mount, &FolderFilter::new(&rule)?)?;
        if found.is_empty() {
            return Err(Error::new(ErrorKind::Refused, format!("{} cannot be protected", dir.display()))
                .why("there is no disk in it")
                .hint("name its disks with --disk, or look at --exclude"));
        }
        Ok((found, rule, left_out))
    }

    /// Everything about a set of disks that must hold before they are protected as `vm`.
    pub(super) fn verify_disks(&self, vm: VmId, disks: &[Candidate], target: &Target) -> Result<()> {
        if disks.len() > DISKS_PER_VM_MAX {
            return Err(Error::new(ErrorKind::Refused, "the VM cannot be protected")
                .why(format!("it has {} disks; {DISKS_PER_VM_MAX} are possible", disks.len())));
        }
        self.verify_paths(disks)?;
        for disk in disks {
            self.verify_unowned(vm, disk)?;
        }
        verify_not_open_beneath(disks)?;
        self.verify_room(disks, target)?;
        if self.clock.now() < CLOCK_MIN {
            return Err(Error::new(ErrorKind::Refused, "the VM cannot be protected")
                .why(format!("the clock of this machine says {}", self.clock.now()))
                .hint("set the clock: timedatectl set-ntp true"));
        }
        Ok(())
    }

    /// In a point every disk has its path below its mount: two mounts may collide.
    fn verify_paths(&self, disks: &[Candidate]) -> Result<()> {
        let mut seen = BTreeSet::new();
        match disks.iter().find(|d| !seen.insert(&d.path)) {
            None => Ok(()),
            Some(disk) => Err(Error::new(ErrorKind::Refused, "the VM cannot be protected")
                .why(format!("two of its disks have the path {} below their mounts", disk.path.display()))
                .hint("mount their common parent folder instead")),
        }
    }

    fn verify_unowned(&self, vm: VmId, disk: &Candidate) -> Result<()> {
        let owner = self.owner_of(&disk.mount, &disk.path, Some(disk.looked.key)).filter(|o| o.id != vm);
        let Some(owner) = owner else { return Ok(()) };
        let shown = disk.view_path();
        Err(Error::new(ErrorKind::Refused, format!("disk {} cannot be protected", shown.display()))
            .why(format!("it is a disk of VM {}", owner.name()))
            .hint(format!("afterimage status {0}, or: afterimage unprotect {0}", owner.name())))
    }

    fn verify_room(&self, disks: &[Candidate], target: &Target) -> Result<()> {
        for disk in disks {
            let (free, _) = storage::space(&disk.looked.folder)?;
            if free < IMAGE_ROOM_BYTES_MIN {
                return Err(Error::new(
                    ErrorKind::Refused,
                    format!("disk {} cannot be protected", disk.view_path().display()),
                )
                .why(format!(
                    "its file system has {free} bytes free; the change-tracking log needs \
                     {IMAGE_ROOM_BYTES_MIN}"
                ))
                .hint(format!("make room in {}", disk.mount.dir().display())));
            }
        }
        let allocated: u64 = disks.iter().map(|d| d.looked.allocated).sum();
        let needed = allocated + allocated / 20 + VAULT_ROOM_BYTES_MIN;
        let free = target.space()?.free_bytes;
        if free < needed {
            return Err(Error::new(ErrorKind::Refused, "the VM cannot be protected")
                .why(format!("vault {} has {free} bytes free; the first copy needs {needed}", target.name))
                .hint(format!("make room in {}, or name another vault with --to", target.path.display())));
        }
        Ok(())
    }
}

/// A file that some process has open beneath the mount: its writes would not be seen.
fn verify_not_open_beneath(disks: &[Candidate]) -> Result<()> {
    for disk in disks {
        if let Some(holder) = disk.mount.holders(disk.looked.key).first() {
            let shown = disk.view_path();
            return Err(Error::new(
                ErrorKind::Refused,
                format!("disk {} cannot be protected", shown.display()),
            )
            .why(format!("it is open beneath the mount, where writes are not seen: {holder}"))
            .hint("restart the guest, or: virsh managedsave NAME, then virsh start NAME"));
        }
    }
    Ok(())
}

fn backing_elsewhere(path: &Path, e: Error) -> Error {
    match e.kind() {
        ErrorKind::NotFound => e,
        _ => Error::new(e.kind(), format!("backing file {} cannot be protected", path.display()))
            .why(e.reason().unwrap_or_default())
            .hint(e.next_step().unwrap_or("afterimage mount DIR").to_owned()),
    }
}
