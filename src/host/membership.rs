//! Which files are the disks of a VM, while files come, go and move.
//!
//! | what happens | what follows |
//! | --- | --- |
//! | a disk, or a folder above it, is renamed | it has its new path from the next point on |
//! | a disk is removed | the next point is without it |
//! | another file is renamed over its path or exchanged with it | that is the disk, and ships whole |
//! | a qcow2 image appears whose backing file is a disk | it joins that VM before its next cut |
//! | a file appears in a followed folder | it joins that VM before its next cut |
//!
//! The filter calls [`Watcher`] from the thread of the operation, before its reply. Renames and
//! removals are followed at once, under the membership lock of the VM; what appears is only
//! noted, and looked at before the next cut. Nothing done under that lock goes through a mount.
//!
//! A move is told to the tracker first, whose log is then durable beside the disk, and only then
//! becomes the record: a record never names a path whose log is elsewhere.
//!
//! Killed between the lower rename and the record: the next start finds no file at the old path
//! and lets that disk go; in a followed folder the new path joins. Older points show the VM as
//! it was. Disk full: the record is changed in memory and written with the next change.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use super::api::types::Severity;
use super::engine::Engine;
use super::folder::FolderFilter;
use super::mounts::Mounted;
use super::prerequisites::Candidate;
use super::records::{DiskRecord, VmRecord};
use super::vm::Vm;
use crate::base::{DiskId, Error, ErrorKind, FileKey, Result};
use crate::core::ports::names::{NameEvent, NameWatcher};
use crate::machine::chain::backing_path;
use crate::tracker::DiskSpec;

/// A disk on its way into the write path.
pub(super) struct Entering {
    /// What the tracker needs.
    pub spec: DiskSpec,
    /// Where it will be attached.
    pub mount: Arc<Mounted>,
    /// As which file.
    pub key: FileKey,
}

/// Opens a file that was looked at as the disk `id`; it must still be the same file.
pub(super) fn enter(id: DiskId, disk: &Candidate) -> Result<Entering> {
    let lower = disk.mount.resolve(&disk.path)?;
    if lower.key != disk.looked.key {
        return Err(Error::new(
            ErrorKind::Busy,
            format!("disk {} was replaced just now", disk.view_path().display()),
        )
        .hint("try again"));
    }
    let spec = DiskSpec {
        id,
        path: disk.path.clone(),
        lower: lower.file,
        folder: lower.folder,
        file_name: lower.file_name,
        backing: disk.info.backing().map(str::to_owned),
        changed_beneath: false,
    };
    Ok(Entering { spec, mount: disk.mount.clone(), key: lower.key })
}

/// Told by the filter of one mount.
pub struct Watcher {
    /// The engine; gone while it stops.
    pub engine: Weak<Engine>,
    /// The directory of the mount.
    pub mount: PathBuf,
}

impl NameWatcher for Watcher {
    fn on_name_event(&self, event: &NameEvent) {
        let Some(engine) = self.engine.upgrade() else { return };
        let Some(mount) = engine.mounts.get(&self.mount) else { return };
        match event {
            NameEvent::Created { path, .. } => mount.note(path.clone()),
            NameEvent::HeaderWritten { path, .. } => {
                if let Some(path) = path {
                    mount.note(path.clone());
                }
            }
            NameEvent::Renamed { from, to, file, replaced } => {
                engine.renamed(&mount, from, to, *file, *replaced);
            }
            NameEvent::Removed { path, file } => engine.removed(&mount, path, *file),
            NameEvent::Exchanged { a, b, a_file, b_file } => {
                engine.exchanged(&mount, (a, *a_file), (b, *b_file));
            }
        }
    }
}

impl Engine {
    /// The VM that protects the file with this path, or with this identity.
    pub(super) fn owner_of(&self, mount: &Mounted, path: &Path, key: Option<FileKey>) -> Option<Arc<Vm>> {
        let id = key.and_then(|k| mount.attached(k));
        self.vms().into_iter().find(|vm| {
            let record = vm.record();
            let owns = |d: &DiskRecord| Some(d.id) == id || (d.mount == mount.dir() && d.path == path);
            record.is_protected() && record.disks.iter().any(owns)
        })
    }

    /// The VM and the record of an attached file.
    fn attached_disk(&self, mount: &Mounted, key: FileKey) -> Option<(Arc<Vm>, DiskRecord)> {
        let id = mount.attached(key)?;
        self.vms().into_iter().find_map(|vm| {
            let disk = vm.record().disks.into_iter().find(|d| d.id == id)?;
            Some((vm, disk))
        })
    }

    fn renamed(
        &self,
        mount: &Arc<Mounted>,
        from: &Path,
        to: &Path,
        file: FileKey,
        replaced: Option<FileKey>,
    ) {
        let moved = self.attached_disk(mount, file).filter(|(_, d)| d.path == from);
        let lost = replaced
            .filter(|r| *r != file)
            .and_then(|r| self.attached_disk(mount, r))
            .filter(|(_, d)| d.path == to);
        if let Some((vm, disk)) = &lost {
            let _one = vm.lock_membership();
            self.leave(vm, mount, disk, "another file was renamed over it");
            if moved.is_none() {
                self.take_place(vm, mount, to);
            }
        }
        match moved {
            Some((vm, disk)) => {
                let _one = vm.lock_membership();
                self.move_disk(&vm, mount, &disk, to);
            }
            None => {
                self.move_folder(mount, from, to);
                mount.note(to.to_owned());
            }
        }
    }

    /// Everything below a folder that was renamed, and rules that follow it.
    fn move_folder(&self, mount: &Arc<Mounted>, from: &Path, to: &Path) {
        let moved_to = |path: &Path| path.strip_prefix(from).ok().map(|rest| join(to, rest));
        for vm in self.vms() {
            let record = vm.record();
            let below = |d: &&DiskRecord| d.mount == mount.dir() && d.path.starts_with(from);
            let disks: Vec<DiskRecord> = record.disks.iter().filter(below).cloned().collect();
            let rule = record.folder.filter(|f| f.mount == mount.dir() && f.path.starts_with(from));
            if disks.is_empty() && rule.is_none() {
                continue;
            }
            let _one = vm.lock_membership();
            if let Some(path) = rule.and_then(|f| moved_to(&f.path)) {
                vm.follow(&self.state, |r| {
                    if let Some(folder) = &mut r.folder {
                        folder.path = path.clone();
                    }
                });
            }
            for disk in disks {
                if let Some(path) = moved_to(&disk.path) {
                    self.move_disk(&vm, mount, &disk, &path);
                }
            }
        }
    }

    fn removed(&self, mount: &Arc<Mounted>, path: &Path, file: FileKey) {
        let Some((vm, disk)) = self.attached_disk(mount, file).filter(|(_, d)| d.path == path) else {
            return;
        };
        let _one = vm.lock_membership();
        self.leave(&vm, mount, &disk, "it was removed");
    }

    /// Where both files are disks of one VM they keep what they are and get each other's path;
    /// else whatever is at the path of a disk now is the disk.
    fn exchanged(&self, mount: &Arc<Mounted>, a: (&Path, FileKey), b: (&Path, FileKey)) {
        let at =
            |place: (&Path, FileKey)| self.attached_disk(mount, place.1).filter(|(_, d)| d.path == place.0);
        let (first, second) = (at(a), at(b));
        if first.is_none() && second.is_none() {
            return self.exchange_folders(mount, a.0, b.0);
        }
        if let (Some((vm, one)), Some((other, two))) = (&first, &second)
            && vm.id == other.id
        {
            let _one = vm.lock_membership();
            self.tell_tracker_of_move(vm, mount, one, b.0);
            self.tell_tracker_of_move(vm, mount, two, a.0);
            // The records change together: a path is never that of two disks.
            vm.follow(&self.state, |r| {
                for disk in &mut r.disks {
                    if disk.id == one.id {
                        disk.path = b.0.to_owned();
                    } else if disk.id == two.id {
                        disk.path = a.0.to_owned();
                    }
                }
            });
            return;
        }
        for (disk, path) in [(first, a.0), (second, b.0)] {
            if let Some((vm, disk)) = disk {
                let _one = vm.lock_membership();
                self.leave(&vm, mount, &disk, "another file was exchanged with it");
                self.take_place(&vm, mount, path);
            }
        }
    }

    fn exchange_folders(&self, mount: &Arc<Mounted>, a: &Path, b: &Path) {
        let moved = |path: &Path| {
            let to = |from: &Path, to: &Path| path.strip_prefix(from).ok().map(|rest| join(to, rest));
            to(a, b).or_else(|| to(b, a))
        };
        for vm in self.vms() {
            let _one = vm.lock_membership();
            for disk in vm.record().disks.iter().filter(|d| d.mount == mount.dir()) {
                if let Some(to) = moved(&disk.path) {
                    self.tell_tracker_of_move(&vm, mount, disk, &to);
                }
            }
            // All at once, so that no path is that of two disks.
            vm.follow(&self.state, |r| {
                for disk in r.disks.iter_mut().filter(|d| d.mount == mount.dir()) {
                    disk.path = moved(&disk.path).unwrap_or_else(|| disk.path.clone());
                }
            });
        }
    }

    /// The disk has another path.
    fn move_disk(&self, vm: &Vm, mount: &Arc<Mounted>, disk: &DiskRecord, to: &Path) {
        let rule = vm.record().folder.filter(|f| f.mount == mount.dir());
        let filter = rule.and_then(|rule| FolderFilter::new(&rule).ok());
        if filter.is_some_and(|f| f.matches(&disk.path) && !f.matches(to)) {
            return self.leave(vm, mount, disk, "it was moved out of the folder");
        }
        self.tell_tracker_of_move(vm, mount, disk, to);
        vm.follow(&self.state, |r| {
            for d in r.disks.iter_mut().filter(|d| d.id == disk.id) {
                d.path = to.to_owned();
            }
        });
        let text = format!("disk {} is now {}", disk.view_path().display(), mount.dir().join(to).display());
        self.events.add(Severity::Info, Some(vm.name().as_str()), "disk-renamed", &text);
    }

    fn tell_tracker_of_move(&self, vm: &Vm, mount: &Mounted, disk: &DiskRecord, to: &Path) {
        let Some(running) = vm.running() else { return };
        let told = mount.resolve(to).and_then(|lower| {
            running.tracker.rename_disk(disk.id, to.to_owned(), lower.folder, lower.file_name)
        });
        if let Err(e) = told {
            let text = format!("the new path of disk {} cannot be followed: {e}", to.display());
            self.events.add(Severity::Warning, Some(vm.name().as_str()), "disk-renamed", &text);
        }
    }

    /// The disk is none any more.
    pub(super) fn leave(&self, vm: &Vm, mount: &Mounted, disk: &DiskRecord, why: &str) {
        mount.detach(disk.id);
        if let Some(running) = vm.running()
            && let Err(e) = running.tracker.remove_disk(disk.id)
        {
            log::error!("{}: disk {} cannot be let go: {e}", vm.name(), disk.path.display());
        }
        vm.follow(&self.state, |r| r.disks.retain(|d| d.id != disk.id));
        let left = vm.record().disks.len();
        let text = format!("disk {} left: {why}; {left} disks remain", disk.view_path().display());
        let severity = if left == 0 { Severity::Warning } else { Severity::Info };
        self.events.add(severity, Some(vm.name().as_str()), "disk-left", &text);
    }

    /// Whatever file is at `path` now becomes a disk of the VM.
    fn take_place(&self, vm: &Vm, mount: &Arc<Mounted>, path: &Path) {
        let joined = self.candidate(mount.clone(), path, false).and_then(|c| self.join(vm, c));
        match joined {
            Ok(()) => {}
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => {
                let shown = mount.dir().join(path);
                let text = format!("{} took the place of a disk and is not protected: {e}", shown.display());
                self.events.add(Severity::Critical, Some(vm.name().as_str()), "disk-refused", &text);
            }
        }
    }

    /// A file joins a VM that runs. The caller holds the membership lock.
    fn join(&self, vm: &Vm, disk: Candidate) -> Result<()> {
        let running = vm.expect_running()?;
        let record = disk.record();
        let entering = enter(record.id, &disk)?;
        let added = running.tracker.add_disk(entering.spec)?;
        // No cut is made until the tracker is told that the disk is in the write path.
        let attached = entering
            .mount
            .attach(entering.key, added)
            .and_then(|()| running.tracker.disk_attached(record.id));
        if let Err(e) = attached {
            entering.mount.detach(record.id);
            running.tracker.remove_disk(record.id)?;
            return Err(e);
        }
        let (shown, backing) = (disk.view_path(), disk.info.backing());
        vm.follow(&self.state, |r| r.disks.push(record.clone()));
        let why = backing.map(|b| format!(", backing file {b}")).unwrap_or_default();
        let text = format!("disk {} joined ({}{why})", shown.display(), record.format);
        self.events.add(Severity::Info, Some(vm.name().as_str()), "disk-joined", &text);
        Ok(())
    }

    /// Before a cut: files that appeared and belong to this VM join it. An error: one could not be
    /// looked at, or could not join; it stays noted, and nothing counts as current without it.
    pub(super) fn before_cut(&self, vm: &Vm) -> Result<()> {
        let mut result = Ok(());
        for mount in self.mounts.all() {
            for path in mount.noted() {
                let settled = self.settle(vm, &mount, &path);
                result = result.and(settled);
            }
        }
        result
    }

    /// Deals with a file that appeared.
    fn settle(&self, vm: &Vm, mount: &Arc<Mounted>, path: &Path) -> Result<()> {
        match self.look_at(vm, mount, path) {
            Ok(Verdict::Joins(disk)) => {
                let _one = vm.lock_membership();
                match self.join(vm, *disk) {
                    Err(e) if is_gone(&e) => {}
                    // It is tried again, whatever it is.
                    Err(e) if !e.is_recoverable() => return Err(e.with_kind(ErrorKind::Io)),
                    joined => joined?,
                }
            }
            Ok(Verdict::Another) => return Ok(()),
            Ok(Verdict::Nobody) => {}
            Ok(Verdict::Skipped(why)) => {
                if mount.tell_once(path) {
                    self.events.add(Severity::Info, Some(vm.name().as_str()), "disk-skipped", &why);
                }
            }
            Err(e) if matches!(e.errno(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM)) => return Err(e),
            // Any other error is about a file that is no image, or an unreadable one: a file of
            // somebody else must not hold up this VM.
            Err(e) => log::debug!("{}: {e}", path.display()),
        }
        mount.forget_note(path);
        Ok(())
    }

    /// Whom a file that appeared belongs to.
    fn look_at(&self, vm: &Vm, mount: &Arc<Mounted>, path: &Path) -> Result<Verdict> {
        let candidate = self.candidate(mount.clone(), path, false)?;
        if mount.attached(candidate.looked.key).is_some() {
            return Ok(Verdict::Nobody);
        }
        let base = candidate.info.backing().and_then(|name| {
            let overlay = candidate.view_path();
            self.disk_named(&backing_path(&overlay, name).ok()?)
        });
        let follows = |record: &VmRecord| {
            let rule = record.folder.as_ref().filter(|f| f.mount == mount.dir());
            rule.is_some_and(|rule| FolderFilter::new(rule).is_ok_and(|f| f.matches(path)))
        };
        let mut owner = base;
        if owner.is_none() {
            owner = self.vms().into_iter().find(|v| {
                let record = v.record();
                record.is_protected() && follows(&record)
            });
        }
        match owner {
            None => Ok(Verdict::Nobody),
            Some(owner) if owner.id != vm.id => Ok(Verdict::Another),
            Some(_) => Ok(match self.folder_candidate(mount, path)? {
                Ok(_) if vm.record().disks.iter().any(|d| d.path == path) => Verdict::Nobody,
                Ok(candidate) => Verdict::Joins(Box::new(candidate)),
                Err(why) => Verdict::Skipped(why),
            }),
        }
    }

    /// The VM that has the disk with this path in the mounted view, by name or through links.
    fn disk_named(&self, path: &Path) -> Option<Arc<Vm>> {
        let plain = lexical(path);
        let mount = self.mounts.over(&plain)?;
        let inside = plain.strip_prefix(mount.dir()).ok()?;
        let key = mount.look(inside).ok().map(|looked| looked.key);
        self.owner_of(&mount, inside, key)
    }

    /// Followed folders are looked through whole: at start, and now and then.
    pub(super) fn note_followed_folders(&self) {
        for vm in self.vms() {
            let record = vm.record();
            let Some(rule) = record.folder.filter(|_| vm.running().is_some()) else { continue };
            let Some(mount) = self.mounts.get(&rule.mount) else { continue };
            let known: Vec<&PathBuf> = record.disks.iter().map(|d| &d.path).collect();
            let Ok(filter) = FolderFilter::new(&rule) else { continue };
            match super::folder::files_below(mount.dir(), &rule.path) {
                Ok(files) => {
                    let new = files.into_iter().filter(|f| filter.matches(f) && !known.contains(&f));
                    new.for_each(|f| mount.note(f));
                }
                Err(e) => log::warn!("{}: {e}", vm.name()),
            }
        }
    }
}

/// Whom a file that appeared belongs to.
enum Verdict {
    Joins(Box<Candidate>),
    Another,
    Nobody,
    Skipped(String),
}

/// `folder/rest`, where an empty rest is the folder itself.
fn join(folder: &Path, rest: &Path) -> PathBuf {
    if rest.as_os_str().is_empty() { folder.to_owned() } else { folder.join(rest) }
}

/// Without `.` and with `..` taken off, by the text alone.
fn lexical(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            std::path::Component::ParentDir => {
                out.pop();
            }
            std::path::Component::CurDir => {}
            part => out.push(part),
        }
    }
    out
}

/// A disk whose file is gone.
pub(super) fn is_gone(e: &Error) -> bool {
    e.kind() == ErrorKind::NotFound
}
