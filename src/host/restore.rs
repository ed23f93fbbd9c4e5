//! Restore: the disks of a point as files in a folder, sparse, never over an existing file
//! unless forced.
//!
//! Each disk is written to `.NAME.restoring` beside its place, synced, and only then renamed, so
//! that a file with the right name is always whole. Killed here: a `.restoring` file is left,
//! which the next restore to that folder overwrites. Disk full: the job says so, the file is
//! removed, files already complete stay.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::base::digest::is_zero;
use crate::base::durable::sync_parent;
use crate::base::error::Context;
use crate::base::{BLOCK_BYTES, Error, ErrorKind, Result};
use crate::core::ports::points::{PointDisk, PointReader};
use crate::format::qcow2::Qcow2Header;
use crate::machine::chain::BackingName;
use crate::machine::image;

/// Bytes read at once.
const STEP_BYTES: usize = 1 << 20;

/// Told how far a restore is, and asked whether it may go on.
pub trait Watch {
    /// Bytes done, of all.
    fn progress(&self, done_bytes: u64, total_bytes: u64);
    /// Something worth a line.
    fn say(&self, line: String);
    /// An error ends the restore.
    fn check(&self) -> Result<()>;
}

/// Files that a restore of this point to `to` would make.
pub fn files(point: &dyn PointReader, to: &Path) -> Vec<PathBuf> {
    let disks = point.disks().iter().map(|d| to.join(&d.path));
    disks.chain(point.definition().iter().map(|d| to.join(&d.name))).collect()
}

/// Refuses if a file is in the way and `force` was not said.
pub fn check_free(point: &dyn PointReader, to: &Path, force: bool) -> Result<()> {
    for disk in point.disks() {
        // The vault promises it; a restore must not write outside its folder if it is wrong.
        let plain = disk.path.components().all(|c| matches!(c, std::path::Component::Normal(_)));
        if !plain || disk.path.as_os_str().is_empty() {
            return Err(Error::new(ErrorKind::Damaged, "the point cannot be restored")
                .why(format!("a disk has the path {:?}", disk.path)));
        }
    }
    let taken = files(point, to).into_iter().find(|f| f.symlink_metadata().is_ok());
    match taken {
        Some(file) if file.is_dir() => {
            Err(Error::new(ErrorKind::Exists, format!("{} is a folder", file.display()))
                .hint("name another folder with --to"))
        }
        Some(file) if !force => Err(Error::new(ErrorKind::Exists, format!("{} exists", file.display()))
            .why("a restore never replaces a file unasked")
            .hint("name an empty folder with --to, or say --force")),
        _ => Ok(()),
    }
}

/// Writes every disk of the point below `to`. Returns what the operator should know.
pub fn restore(point: &dyn PointReader, to: &Path, force: bool, watch: &dyn Watch) -> Result<Vec<String>> {
    check_free(point, to, force)?;
    fs::create_dir_all(to).context(|| format!("cannot make folder {}", to.display()))?;
    let mut notes = Vec::new();
    let mut meter = Meter { done: 0, total: point.disks().iter().map(|d| d.size).sum(), watch };
    for (number, disk) in point.disks().iter().enumerate() {
        let place = to.join(&disk.path);
        watch.say(format!("{} ({} bytes)", place.display(), disk.size));
        write_whole(&place, force, |file| {
            copy_disk(point, number, disk, file, &mut meter)?;
            notes.extend(fit_backing_name(point, disk, file, &place)?);
            Ok(())
        })?;
    }
    for definition in point.definition() {
        let place = to.join(&definition.name);
        write_whole(&place, force, |file| {
            file.write_all_at(definition.content.as_bytes(), 0)
                .context(|| format!("cannot write {}", place.display()))
        })?;
    }
    Ok(notes)
}

struct Meter<'a> {
    done: u64,
    total: u64,
    watch: &'a dyn Watch,
}

impl Meter<'_> {
    fn at(&self, within_disk: u64) -> Result<()> {
        self.watch.progress(self.done + within_disk, self.total);
        self.watch.check()
    }
}

/// Calls `fill` on a new file beside `place`, which gets its name when it is durable.
fn write_whole(place: &Path, force: bool, fill: impl FnOnce(&File) -> Result<()>) -> Result<()> {
    let what = || format!("cannot write {}", place.display());
    if let Some(folder) = place.parent() {
        fs::create_dir_all(folder).context(what)?;
    }
    let mut name = std::ffi::OsString::from(".");
    name.push(place.file_name().unwrap_or_default());
    name.push(".restoring");
    let temporary = Temporary(place.with_file_name(name));
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary.0)
        .context(what)?;
    fill(&file)?;
    file.sync_all().context(what)?;
    if force {
        fs::rename(&temporary.0, place).context(what)?;
    } else {
        // Fails if somebody made the file meanwhile; the temporary name goes with the guard.
        fs::hard_link(&temporary.0, place).context(what)?;
    }
    drop(temporary);
    sync_parent(place)
}

/// Removes the file unless it was renamed.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn copy_disk(
    point: &dyn PointReader,
    number: usize,
    disk: &PointDisk,
    file: &File,
    meter: &mut Meter<'_>,
) -> Result<()> {
    let what = || format!("cannot write {}", disk.path.display());
    file.set_len(disk.size).context(what)?;
    let mut buffer = vec![0; STEP_BYTES];
    let mut at = 0;
    while let Some(run) = point.next_data(number, at)? {
        let end = run.end().min(disk.size);
        at = run.offset;
        while at < end {
            meter.at(at)?;
            let want = usize::try_from(end - at).unwrap_or(STEP_BYTES).min(STEP_BYTES);
            let piece = buffer.get_mut(..want).unwrap_or_default();
            let got = point.read_at(number, at, piece)?;
            if got == 0 {
                return Err(Error::new(ErrorKind::Damaged, what())
                    .why(format!("the point ends at byte {at} of {}", disk.size)));
            }
            write_sparse(file, at, piece.get(..got).unwrap_or_default()).context(what)?;
            at += got as u64;
        }
        if at >= disk.size {
            break;
        }
    }
    meter.at(disk.size)?;
    meter.done += disk.size;
    Ok(())
}

/// Writes what is not zero, block by block, joined into runs.
fn write_sparse(file: &File, offset: u64, bytes: &[u8]) -> std::io::Result<()> {
    let step = BLOCK_BYTES as usize;
    let mut start = None;
    for (n, block) in bytes.chunks(step).enumerate() {
        match (is_zero(block), start) {
            (false, None) => start = Some(n * step),
            (true, Some(from)) => {
                file.write_all_at(bytes.get(from..n * step).unwrap_or_default(), offset + from as u64)?;
                start = None;
            }
            _ => {}
        }
    }
    match start {
        Some(from) => file.write_all_at(bytes.get(from..).unwrap_or_default(), offset + from as u64),
        None => Ok(()),
    }
}

/// Lets a restored overlay find its backing file: a relative name is kept, an absolute one that
/// means a disk of the same point is rewritten. Returns what the operator must see to.
fn fit_backing_name(
    point: &dyn PointReader,
    disk: &PointDisk,
    file: &File,
    place: &Path,
) -> Result<Option<String>> {
    let Some(name) = &disk.backing else { return Ok(None) };
    let others = || point.disks().iter().filter(|d| d.id != disk.id);
    let note = |why: &str| {
        Some(format!(
            "{}: its backing file is {name:?}, {why}; where it is now: \
             qemu-img rebase -u -b FILE -F FORMAT {}",
            place.display(),
            place.display()
        ))
    };
    match BackingName::parse(name) {
        BackingName::Relative(path) => {
            let path = normal(&disk.path.parent().unwrap_or(Path::new("")).join(path));
            let is_there = others().any(|d| d.path == path);
            Ok(if is_there { None } else { note("which is no disk of this point") })
        }
        BackingName::Absolute(path) => {
            let base = others().filter(|d| path.ends_with(&d.path));
            let Some(base) = base.max_by_key(|d| d.path.components().count()) else {
                return Ok(note("which is no disk of this point"));
            };
            let rewritten = rewrite(file, place, &relative(&disk.path, &base.path))?;
            Ok(if rewritten { None } else { note("and the new name does not fit into its header") })
        }
        BackingName::Other(_) => Ok(note("which is no file")),
    }
}

/// Without `.` and with `..` taken off, for paths inside a point.
fn normal(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            std::path::Component::ParentDir => {
                out.pop();
            }
            std::path::Component::Normal(name) => out.push(name),
            _ => {}
        }
    }
    out
}

/// `base` as seen from the folder of `from`; both relative to the same folder.
fn relative(from: &Path, base: &Path) -> PathBuf {
    let folder: Vec<_> = from.parent().map(|p| p.components().collect()).unwrap_or_default();
    let target: Vec<_> = base.components().collect();
    let common = folder.iter().zip(&target).take_while(|(a, b)| a == b).count();
    let up = folder.iter().skip(common).map(|_| std::path::Component::ParentDir);
    up.chain(target.into_iter().skip(common)).collect()
}

/// Writes another backing name into the header; `false`: it does not fit.
fn rewrite(file: &File, place: &Path, name: &Path) -> Result<bool> {
    let what = || format!("cannot write {}", place.display());
    let Some(name) = name.to_str() else { return Ok(false) };
    let read = |length: usize| -> Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        let got = file.read_at(&mut bytes, 0).context(what)?;
        bytes.truncate(got);
        Ok(bytes)
    };
    if image::probe(file)?.qcow2.is_none() {
        return Ok(false);
    }
    let start = read(crate::format::qcow2::HEADER_BYTES_MIN)?;
    let bytes = read(Qcow2Header::bytes_needed(&start)?)?;
    let Some(patches) = Qcow2Header::decode(&bytes)?.rewrite_backing(&bytes, name) else {
        return Ok(false);
    };
    for patch in patches {
        file.write_all_at(&patch.bytes, patch.offset).context(what)?;
    }
    Ok(true)
}
