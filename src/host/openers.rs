//! Who has which file open, and through which mount: from `/proc`, without touching the files.
//!
//! Asking the kernel about an open file of a mount that does not answer would hang the daemon
//! that is to revive it, so nothing here follows a link: `fdinfo` names mount and inode, and
//! `mountinfo` of the same process names the device of that mount. The text of a link cannot
//! tell a file of an over-mounted folder from the one beneath; the device does.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use super::api::types::OpenFile;
use crate::base::Result;
use crate::base::error::Context;

/// `major:minor` as `mountinfo` has it.
pub type MountDevice = String;

/// A line of `mountinfo`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountLine {
    /// Its id.
    pub id: u64,
    /// Its device.
    pub device: MountDevice,
    /// The folder of the file system that is mounted.
    pub root: PathBuf,
    /// Where it is mounted.
    pub dir: PathBuf,
    /// Type of file system.
    pub file_system: String,
    /// What was mounted.
    pub source: String,
}

/// An open file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opener {
    /// The process.
    pub pid: u32,
    /// Its name.
    pub command: String,
    /// The file, as the kernel calls it for that process.
    pub path: PathBuf,
    /// Inode of the file; `None` for a working folder.
    pub inode: Option<u64>,
}

impl From<Opener> for OpenFile {
    fn from(o: Opener) -> Self {
        Self { pid: o.pid, command: o.command, path: o.path }
    }
}

/// The mounts that process `pid` (or `self`) sees, in mount order.
pub fn mount_lines(pid: &str) -> Result<Vec<MountLine>> {
    let path = format!("/proc/{pid}/mountinfo");
    let text = fs::read_to_string(&path).context(|| format!("cannot read {path}"))?;
    Ok(text.lines().filter_map(parse_line).collect())
}

fn parse_line(line: &str) -> Option<MountLine> {
    let (left, right) = line.split_once(" - ")?;
    let mut left = left.split(' ');
    let id = left.next()?.parse().ok()?;
    let device = left.nth(1)?.to_owned();
    let root = unescape(left.next()?);
    let dir = unescape(left.next()?);
    let mut right = right.split(' ');
    let file_system = right.next()?.to_owned();
    let source = unescape(right.next()?).to_string_lossy().into_owned();
    Some(MountLine { id, device, root, dir, file_system, source })
}

/// `\040` and its like as `mountinfo` writes blanks.
fn unescape(text: &str) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while let Some(&b) = bytes.get(i) {
        let octal = (b == b'\\')
            .then(|| text.get(i + 1..i + 4).and_then(|s| u8::from_str_radix(s, 8).ok()))
            .flatten();
        match octal {
            Some(value) => {
                out.push(value);
                i += 4;
            }
            None => {
                out.push(b);
                i += 1;
            }
        }
    }
    std::ffi::OsString::from_vec(out).into()
}

/// The mount that is on top at exactly `dir`.
pub fn mount_at(dir: &Path) -> Result<Option<MountLine>> {
    Ok(mount_lines("self")?.into_iter().rfind(|m| m.dir == dir))
}

/// Device of the mount that an open descriptor of this process belongs to.
pub fn device_of(file: &impl AsRawFd) -> Result<MountDevice> {
    let fd = file.as_raw_fd();
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{fd}"))
        .context(|| format!("cannot read fdinfo of descriptor {fd}"))?;
    let id = field(&info, "mnt_id:");
    let lines = mount_lines("self")?;
    let line = lines.into_iter().find(|m| Some(m.id) == id);
    line.map(|m| m.device).ok_or_else(|| {
        crate::base::Error::new(crate::base::ErrorKind::Io, "the mount of a folder cannot be found")
    })
}

fn field(fdinfo: &str, name: &str) -> Option<u64> {
    fdinfo.lines().find_map(|l| l.strip_prefix(name))?.trim().parse().ok()
}

/// Every file that a process other than this one has open on `device`, and with `folders` every
/// working folder there whose text lies beneath `dir`.
pub fn openers(device: &MountDevice, dir: Option<&Path>) -> Vec<Opener> {
    let mut found = Vec::new();
    let Ok(processes) = fs::read_dir("/proc") else { return found };
    let own = std::process::id();
    for process in processes.flatten() {
        let name = process.file_name();
        let Some(pid) = name.to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
        if pid != own {
            of_process(pid, device, dir, &mut found);
        }
    }
    found.sort_by(|a, b| (a.pid, &a.path).cmp(&(b.pid, &b.path)));
    found.dedup();
    found
}

/// A process that ends meanwhile has nothing open: errors are no findings.
fn of_process(pid: u32, device: &MountDevice, dir: Option<&Path>, found: &mut Vec<Opener>) {
    let mut candidates = Vec::new();
    if let Ok(fds) = fs::read_dir(format!("/proc/{pid}/fd")) {
        for fd in fds.flatten() {
            let info = fs::read_to_string(format!(
                "/proc/{pid}/fdinfo/{}",
                fd.file_name().to_string_lossy()
            ));
            let Ok(info) = info else { continue };
            if let Some(mount) = field(&info, "mnt_id:") {
                candidates.push((mount, field(&info, "ino:"), fd.path()));
            }
        }
    }
    let ids = mount_ids(pid, device, &candidates);
    let command = || {
        fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned()
    };
    for (mount, inode, link) in candidates {
        if ids.contains(&mount) {
            let path = fs::read_link(link).unwrap_or_default();
            found.push(Opener { pid, command: command(), path, inode });
        }
    }
    if let Some(dir) = dir
        && let Ok(cwd) = fs::read_link(format!("/proc/{pid}/cwd"))
        && cwd.starts_with(dir)
    {
        found.push(Opener { pid, command: command(), path: cwd, inode: None });
    }
}

/// Ids of the mounts of `device` that the process sees, if it has anything open that may matter.
fn mount_ids(pid: u32, device: &MountDevice, open: &[(u64, Option<u64>, PathBuf)]) -> BTreeSet<u64> {
    if open.is_empty() {
        return BTreeSet::new();
    }
    let lines = mount_lines(&pid.to_string()).unwrap_or_default();
    lines.into_iter().filter(|m| m.device == *device).map(|m| m.id).collect()
}

/// Openers of single inodes on `device`, from one walk over `/proc`.
pub fn openers_by_inode(device: &MountDevice) -> HashMap<u64, Vec<Opener>> {
    let mut by_inode: HashMap<u64, Vec<Opener>> = HashMap::new();
    for opener in openers(device, None) {
        if let Some(inode) = opener.inode {
            by_inode.entry(inode).or_default().push(opener);
        }
    }
    by_inode
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;
    use std::process::{Child, Command, Stdio};

    struct Killed(Child);
    impl Drop for Killed {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn a_process_with_an_open_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let file = fs::File::create(&path).unwrap();
        let inode = file.metadata().unwrap().ino();
        let child = Command::new("cat")
            .stdin(fs::File::open(&path).unwrap())
            .stdout(Stdio::piped())
            .spawn();
        // `cat` of an empty file ends; `sleep` keeps it open.
        drop(child.map(Killed));
        let child = Command::new("sleep").arg("60").stdin(fs::File::open(&path).unwrap()).spawn();
        let child = Killed(child.unwrap());
        let found = openers_by_inode(&device_of(&file).unwrap());
        let of_disk = found.get(&inode).expect("the process is found");
        assert!(of_disk.iter().any(|o| o.pid == child.0.id()), "{of_disk:?}");
    }

    #[test]
    fn mount_lines_are_read_with_blanks() {
        let line = parse_line("36 35 98:0 / /mnt\\040a/b rw,noatime master:1 - fuse.afterimage /s rw").unwrap();
        assert_eq!(line.dir, Path::new("/mnt a/b"));
        assert_eq!((line.id, line.device.as_str()), (36, "98:0"));
        assert_eq!(line.file_system, "fuse.afterimage");
        assert!(mount_at(Path::new("/proc")).unwrap().is_some());
    }
}
