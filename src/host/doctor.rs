//! Checks the machine before it is trusted: every finding in words, with the line to type.
//!
//! It only looks: nothing is changed, mounted or started, so that it can be run at any time and
//! by anybody (what only root can see is said to be unknown). A check that hangs (a dead mount)
//! is given up after two seconds and is itself the finding.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::channel;
use std::time::Duration;

use nix::sys::statvfs::statvfs;
use serde::{Deserialize, Serialize};

use super::state::StateDir;
use crate::base::limits::IMAGE_FREE_BYTES_MIN;
use crate::base::mountinfo::{self, Mount, mount_of};
use crate::base::shell::shell;
use crate::base::{Clock, Timestamp};
use crate::filter::MOUNT_TYPE;

/// The state folder needs this much room: maps, logs, database, in bytes.
const STATE_FREE_BYTES_MIN: u64 = 1 << 30;
/// Shared memory needs this much room, in bytes.
const SHM_FREE_BYTES_MIN: u64 = 64 << 20;
/// No clock that is right shows less: 2025-01-01, in milliseconds.
const CLOCK_MIN: Timestamp = Timestamp(1_735_689_600_000);
/// A look at a mount that takes longer hangs.
const LOOK_PATIENCE: Duration = Duration::from_secs(2);
/// File systems that several hosts can write to at once.
const SHARED: [&str; 12] =
    ["nfs", "nfs4", "cifs", "smb3", "gfs2", "ocfs2", "ceph", "glusterfs", "lustre", "9p", "afs", "beegfs"];

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Good to know.
    Note,
    /// To be put right.
    Problem,
}

/// What one check found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Name of the check.
    pub check: String,
    /// How much it matters.
    pub level: Level,
    /// What was found.
    pub text: String,
    /// The line to type.
    #[serde(default)]
    pub fix: Option<String>,
}

impl Finding {
    fn new(check: &str, level: Level, text: impl Into<String>) -> Self {
        Self { check: check.to_owned(), level, text: text.into(), fix: None }
    }

    fn fix(mut self, line: impl Into<String>) -> Self {
        self.fix = Some(line.into());
        self
    }
}

/// What the checks need to know.
pub struct Patient<'a> {
    /// The state folder.
    pub state: &'a StateDir,
    /// Where vaults are; the embedded one at least.
    pub vaults: Vec<PathBuf>,
    /// Directories of disk images.
    pub images: Vec<PathBuf>,
    /// Version of the daemon that runs, if one does.
    pub daemon: Option<String>,
}

/// Every finding, in the order of the checks.
pub fn examine(patient: &Patient<'_>, clock: &dyn Clock) -> Vec<Finding> {
    let mut all = vec![root(), kernel(), fuse(), daemon(patient)];
    all.push(clock_sane(clock));
    all.extend(clock_synchronised());
    all.push(shared_memory());
    let mounts = mountinfo::mounts().unwrap_or_default();
    all.push(state_folder(patient, &mounts));
    all.extend(patient.vaults.iter().map(|v| vault(v, patient, &mounts)));
    all.extend(patient.images.iter().flat_map(|i| images(i, &mounts)));
    all.extend(mounts.iter().filter(|m| m.kind == MOUNT_TYPE).map(mount_alive));
    all.push(libvirt());
    all.extend(apparmor(&patient.images));
    all.extend(selinux());
    all.extend(boot(patient));
    all
}

fn root() -> Finding {
    match nix::unistd::geteuid().is_root() {
        true => Finding::new("root", Level::Ok, "this is root"),
        false => Finding::new("root", Level::Problem, "this is not root; mounting is for root")
            .fix("sudo afterimage doctor"),
    }
}

fn kernel() -> Finding {
    let release =
        nix::sys::utsname::uname().map(|u| u.release().to_string_lossy().into_owned()).unwrap_or_default();
    kernel_finding(&release)
}

fn kernel_finding(release: &str) -> Finding {
    let survival = "when the daemon is killed, disks that guests have open fail (ENOTCONN) until the \
                    guests are restarted; this version cannot hand them over on any kernel";
    match kernel_version(release) {
        None => {
            Finding::new("kernel", Level::Note, format!("Linux {release} has no version that is understood"))
        }
        Some(v) if v < (5, 15) => {
            let text = format!("Linux {release} is too old; 5.15 is the oldest that is known to work");
            Finding::new("kernel", Level::Problem, text).fix("install a newer kernel, then: reboot")
        }
        Some(v) if v < (6, 2) => Finding::new(
            "kernel",
            Level::Note,
            format!("Linux {release} serialises direct writes to one disk (6.2 does not); {survival}"),
        ),
        Some(_) => Finding::new("kernel", Level::Note, format!("Linux {release} is new enough; {survival}")),
    }
}

fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn fuse() -> Finding {
    let path = "/dev/fuse";
    match std::fs::OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => Finding::new("fuse", Level::Ok, "/dev/fuse can be opened"),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            Finding::new("fuse", Level::Problem, "there is no /dev/fuse").fix("modprobe fuse")
        }
        Err(e) => Finding::new("fuse", Level::Problem, format!("/dev/fuse cannot be opened: {e}"))
            .fix("ls -l /dev/fuse"),
    }
}

fn daemon(patient: &Patient<'_>) -> Finding {
    let ours = env!("CARGO_PKG_VERSION");
    match &patient.daemon {
        None => Finding::new("daemon", Level::Note, "the daemon does not run").fix("afterimage start"),
        Some(v) if v == ours => Finding::new("daemon", Level::Ok, format!("the daemon runs, version {v}")),
        Some(v) => {
            let text = format!("the daemon that runs has version {v}, this command {ours}");
            Finding::new("daemon", Level::Problem, text).fix("afterimage stop && afterimage start")
        }
    }
}

fn clock_sane(clock: &dyn Clock) -> Finding {
    let now = clock.now();
    if now < CLOCK_MIN {
        return Finding::new("clock", Level::Problem, format!("the clock shows {now}, which cannot be"))
            .fix("timedatectl set-ntp true");
    }
    Finding::new("clock", Level::Ok, format!("the clock shows {now}"))
}

fn clock_synchronised() -> Option<Finding> {
    let output = Command::new("timedatectl").args(["show", "-p", "NTPSynchronized", "--value"]).output();
    match String::from_utf8_lossy(&output.ok()?.stdout).trim() {
        "yes" => Some(Finding::new("clock sync", Level::Ok, "the clock is synchronised")),
        "no" => Some(
            Finding::new(
                "clock sync",
                Level::Problem,
                "the clock is not synchronised; points get wrong times",
            )
            .fix("timedatectl set-ntp true"),
        ),
        _ => Some(Finding::new("clock sync", Level::Note, "whether the clock is synchronised is not known")),
    }
}

fn shared_memory() -> Finding {
    let name = "shared memory";
    match space(Path::new("/dev/shm")) {
        None => Finding::new(name, Level::Problem, "there is no /dev/shm; maps do not survive the daemon")
            .fix("mount -t tmpfs tmpfs /dev/shm"),
        Some((free, _)) if free < SHM_FREE_BYTES_MIN => {
            Finding::new(name, Level::Problem, format!("/dev/shm has {} free", human(free)))
                .fix("mount -o remount,size=50% /dev/shm")
        }
        Some((free, _)) => Finding::new(name, Level::Ok, format!("/dev/shm has {} free", human(free))),
    }
}

fn state_folder(patient: &Patient<'_>, mounts: &[Mount]) -> Finding {
    let name = "state folder";
    let root = existing(patient.state.root());
    let shown = patient.state.root().display();
    let below = mount_of(mounts, &root);
    if below.is_some_and(|m| m.kind == MOUNT_TYPE) {
        let text = format!("{shown} lies on a disk of a mount: the daemon would wait for itself");
        return Finding::new(name, Level::Problem, text).fix("afterimage --state ANOTHER-DIR ...");
    }
    if below.is_some_and(|m| m.kind == "tmpfs" || m.kind == "ramfs") {
        let text = format!("{shown} is in memory and goes with the power");
        return Finding::new(name, Level::Problem, text).fix("afterimage --state DIR-ON-A-DISK ...");
    }
    room(name, &root, STATE_FREE_BYTES_MIN)
}

fn vault(dir: &Path, patient: &Patient<'_>, mounts: &[Mount]) -> Finding {
    let root = existing(dir);
    if mount_of(mounts, &root).is_some_and(|m| m.kind == MOUNT_TYPE) {
        let text = format!("{} lies on a disk of a mount", dir.display());
        return Finding::new("vault", Level::Problem, text)
            .fix("afterimage protect NAME ... --to ANOTHER-DIR");
    }
    let device = |p: &Path| mount_of(mounts, &existing(p)).map(|m| m.device);
    let shared: Vec<String> = patient
        .images
        .iter()
        .filter(|i| lower_mount(mounts, i).map(|m| m.device) == device(dir) && device(dir).is_some())
        .map(|i| i.display().to_string())
        .collect();
    let low = room("vault", &root, STATE_FREE_BYTES_MIN);
    if low.level == Level::Problem || shared.is_empty() {
        return low;
    }
    let text = format!(
        "{} is on the device of {}: no protection against loss of this machine",
        dir.display(),
        shared.join(", ")
    );
    Finding::new("vault", Level::Note, text).fix("afterimage protect NAME ... --to DIR-ON-ANOTHER-DEVICE")
}

fn images(dir: &Path, mounts: &[Mount]) -> Vec<Finding> {
    let name = "images";
    if !dir.is_dir() {
        return vec![
            Finding::new(name, Level::Problem, format!("{} is no directory", dir.display()))
                .fix("name a directory of disk images: afterimage doctor DIR"),
        ];
    }
    let mut all = Vec::new();
    if let Some(m) = lower_mount(mounts, dir)
        && SHARED.contains(&m.kind.as_str())
    {
        let text = format!("{} is on {}, which other hosts may write to", dir.display(), m.kind);
        all.push(
            Finding::new(name, Level::Problem, text)
                .fix(format!("if no other host does: afterimage mount {} --single-host", shell(dir))),
        );
    }
    let least = space(dir).map_or(0, |(_, total)| (total / 20).max(IMAGE_FREE_BYTES_MIN));
    all.push(room(name, dir, least));
    all
}

fn mount_alive(mount: &Mount) -> Finding {
    let dir = mount.point.clone();
    let (said, heard) = channel();
    // Not joined: on a mount that hangs it never ends.
    let looking = std::thread::Builder::new().name("doctor".to_owned()).spawn(move || {
        let _ = said.send(std::fs::metadata(&dir).map(drop));
    });
    let shown = mount.point.display();
    let answer = looking.ok().and_then(|_| heard.recv_timeout(LOOK_PATIENCE).ok());
    match answer {
        Some(Ok(())) => Finding::new("mount", Level::Ok, format!("{shown} answers")),
        Some(Err(e)) => Finding::new("mount", Level::Problem, format!("{shown} is a dead mount: {e}")).fix(
            format!("afterimage start; if it is not wanted any more: umount -l {}", shell(&mount.point)),
        ),
        None => Finding::new("mount", Level::Problem, format!("{shown} does not answer"))
            .fix("afterimage status; journalctl -u afterimage"),
    }
}

fn libvirt() -> Finding {
    match Command::new("virsh").arg("--version").output() {
        Ok(o) if o.status.success() => {
            let version = String::from_utf8_lossy(&o.stdout).trim().to_owned();
            Finding::new("libvirt", Level::Ok, format!("virsh {version} is there"))
        }
        _ => Finding::new("libvirt", Level::Note, "there is no virsh; definitions of VMs are not stored")
            .fix("apt-get install libvirt-clients"),
    }
}

/// libvirt's helper reads an image to find its backing chain, and its profile names the folders
/// in which it may.
fn apparmor(images: &[PathBuf]) -> Vec<Finding> {
    let name = "AppArmor";
    let profiles = match std::fs::read_to_string("/sys/kernel/security/apparmor/profiles") {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => {
            return vec![Finding::new(name, Level::Note, "AppArmor's profiles can be read by root only")];
        }
        Err(_) => return Vec::new(),
    };
    let helper = profiles.lines().any(|l| l.contains("virt-aa-helper") && l.contains("(enforce)"));
    if !helper {
        return vec![Finding::new(name, Level::Ok, "AppArmor does not confine libvirt")];
    }
    let local = "/etc/apparmor.d/local/usr.lib.libvirt.virt-aa-helper";
    let allowed = std::fs::read_to_string(local).unwrap_or_default();
    let usual = Path::new("/var/lib/libvirt/images");
    images
        .iter()
        .filter(|dir| !dir.starts_with(usual) && !allowed.contains(&*dir.to_string_lossy()))
        .map(|dir| {
            let text = format!("libvirt's helper may not read images in {}", dir.display());
            Finding::new(name, Level::Note, text).fix(format!(
                "echo {} >> {local} && apparmor_parser -r /etc/apparmor.d/usr.lib.libvirt.virt-aa-helper",
                shell(Path::new(&format!("  {}/** r,", dir.display())))
            ))
        })
        .collect()
}

fn selinux() -> Option<Finding> {
    let enforce = std::fs::read_to_string("/sys/fs/selinux/enforce").ok()?;
    if enforce.trim() != "1" {
        return Some(Finding::new("SELinux", Level::Ok, "SELinux does not enforce"));
    }
    let allowed = std::fs::read_to_string("/sys/fs/selinux/booleans/virt_use_fusefs").unwrap_or_default();
    Some(match allowed.trim_start().starts_with('1') {
        true => Finding::new("SELinux", Level::Ok, "SELinux lets guests use disks on FUSE"),
        false => Finding::new("SELinux", Level::Problem, "SELinux keeps guests from disks on FUSE")
            .fix("setsebool -P virt_use_fusefs 1"),
    })
}

fn boot(patient: &Patient<'_>) -> Option<Finding> {
    let usual = patient.state.root() == Path::new(super::state::STATE_DIR_DEFAULT);
    if !usual || !Path::new("/run/systemd/system").is_dir() {
        return None;
    }
    let output = Command::new("systemctl").args(["is-enabled", "afterimage.service"]).output().ok()?;
    Some(match String::from_utf8_lossy(&output.stdout).trim() {
        "enabled" => Finding::new("boot", Level::Ok, "the daemon starts at boot, before libvirt"),
        _ => Finding::new("boot", Level::Note, "the daemon does not start at boot")
            .fix("scripts/install, then: systemctl enable --now afterimage"),
    })
}

/// The mount that shows `path` below our own mounts.
fn lower_mount<'a>(mounts: &'a [Mount], path: &Path) -> Option<&'a Mount> {
    mount_of(mounts.iter().filter(|m| m.kind != MOUNT_TYPE), path)
}

/// `path`, or the nearest folder above it that exists, without links.
fn existing(path: &Path) -> PathBuf {
    let found = path.ancestors().find_map(|p| p.canonicalize().ok());
    found.unwrap_or_else(|| PathBuf::from("/"))
}

/// Free and total bytes of the file system of `path`.
fn space(path: &Path) -> Option<(u64, u64)> {
    let s = statvfs(path).ok()?;
    Some((s.blocks_available() * s.fragment_size(), s.blocks() * s.fragment_size()))
}

fn room(check: &str, dir: &Path, least: u64) -> Finding {
    let shown = dir.display();
    match space(dir) {
        Some((free, _)) if free < least => {
            let text = format!("{shown} has {} free; {} are needed", human(free), human(least));
            Finding::new(check, Level::Problem, text).fix(format!("make room: df -h {}", shell(dir)))
        }
        Some((free, total)) => {
            let text = format!("{shown} has {} of {} free", human(free), human(total));
            Finding::new(check, Level::Ok, text)
        }
        None => Finding::new(check, Level::Problem, format!("{shown} cannot be looked at"))
            .fix(format!("stat {}", shell(dir))),
    }
}

fn human(bytes: u64) -> String {
    bytesize::ByteSize(bytes).display().iec().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::SystemClock;

    #[test]
    fn kernels_are_judged_by_their_version() {
        assert_eq!(kernel_version("6.18.5-fc-v30"), Some((6, 18)));
        assert_eq!(kernel_finding("5.4.0").level, Level::Problem);
        for known in ["5.15.0", "6.1.0-13-amd64", "6.18.5"] {
            let f = kernel_finding(known);
            assert_eq!(f.level, Level::Note);
            assert!(f.text.contains("ENOTCONN"), "{f:?}");
        }
    }

    #[test]
    fn our_own_mounts_are_looked_through() {
        let mount =
            |device, point: &str, kind: &str| Mount { device, point: point.into(), kind: kind.into() };
        let mounts = [mount(1, "/", "ext4"), mount(2, "/vm", MOUNT_TYPE)];
        assert_eq!(mount_of(&mounts, Path::new("/vm/x")).unwrap().device, 2);
        assert_eq!(lower_mount(&mounts, Path::new("/vm/x")).unwrap().device, 1);
    }

    #[test]
    fn every_problem_has_a_line_to_type() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::at(dir.path()).unwrap();
        let missing = dir.path().join("missing");
        let patient = Patient {
            state: &state,
            vaults: vec![state.vault()],
            images: vec![missing, dir.path().to_owned()],
            daemon: Some("0.0.1".to_owned()),
        };
        let findings = examine(&patient, &SystemClock::default());
        let problems: Vec<&Finding> = findings.iter().filter(|f| f.level == Level::Problem).collect();
        assert!(problems.iter().any(|f| f.check == "images" && f.text.contains("no directory")));
        assert!(problems.iter().any(|f| f.check == "daemon"));
        assert!(problems.iter().all(|f| f.fix.is_some()), "{problems:?}");
    }
}
