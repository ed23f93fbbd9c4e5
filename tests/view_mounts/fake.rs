//! A vault in memory, and guards that leave nothing mounted.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use afterimage::base::digest::is_zero;
use afterimage::base::{
    BLOCK_BYTES, DiskId, EpochNumber, Error, ErrorKind, Extent, PointId, Result, Timestamp, VmId,
};
use afterimage::core::ports::points::{PointDisk, PointInfo, PointReader, PointStore, StoredVm};
use afterimage::core::retention::Keep;
use afterimage::format::manifest::{Consistency, DefinitionFile, EpochKind};

/// A point whose disks are vectors.
pub struct FakePoint {
    pub info: PointInfo,
    pub disks: Vec<PointDisk>,
    pub contents: Vec<Vec<u8>>,
    pub definition: Vec<DefinitionFile>,
    /// Reads of this byte of disk 0 fail; `u64::MAX`: none.
    pub damaged_at: AtomicU64,
}

impl FakePoint {
    pub fn new(epoch: u64, disks: &[(&str, Vec<u8>)]) -> Self {
        let id = |n: usize| DiskId(0x1000 + n as u128);
        let disk = |(n, (path, content)): (usize, &(&str, Vec<u8>))| PointDisk {
            id: id(n),
            path: PathBuf::from(path),
            size: content.len() as u64,
            backing: None,
        };
        let info = PointInfo {
            id: PointId { epoch: EpochNumber(epoch), tag: 0xabcd_0000 + epoch as u32 },
            time: Timestamp(1_700_000_000_000 + epoch as i64 * 1000),
            arrived: Timestamp(1_700_000_000_500 + epoch as i64 * 1000),
            kind: EpochKind::Delta,
            consistency: Consistency::Crash,
            pinned: false,
            changed_bytes: 0,
            size_bytes: disks.iter().map(|(_, c)| c.len() as u64).sum(),
        };
        Self {
            info,
            disks: disks.iter().enumerate().map(disk).collect(),
            contents: disks.iter().map(|(_, c)| c.clone()).collect(),
            definition: vec![DefinitionFile {
                name: "machine.toml".to_owned(),
                content: "name = \"x\"\n".to_owned(),
            }],
            damaged_at: AtomicU64::new(u64::MAX),
        }
    }
}

impl PointReader for FakePoint {
    fn info(&self) -> &PointInfo {
        &self.info
    }

    fn disks(&self) -> &[PointDisk] {
        &self.disks
    }

    fn definition(&self) -> &[DefinitionFile] {
        &self.definition
    }

    fn read_at(&self, disk: usize, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        let content = &self.contents[disk];
        let start = (offset as usize).min(content.len());
        let end = (start + buffer.len()).min(content.len());
        let damaged = self.damaged_at.load(Ordering::Relaxed);
        if disk == 0 && (start as u64..end as u64).contains(&damaged) {
            return Err(Error::new(ErrorKind::Damaged, "a block fails its checksum"));
        }
        buffer[..end - start].copy_from_slice(&content[start..end]);
        Ok(end - start)
    }

    fn next_data(&self, disk: usize, offset: u64) -> Result<Option<Extent>> {
        let size = self.contents[disk].len() as u64;
        let block = |n: u64| {
            let start = (n * BLOCK_BYTES) as usize;
            &self.contents[disk][start..(start + BLOCK_BYTES as usize).min(size as usize)]
        };
        let blocks = size.div_ceil(BLOCK_BYTES);
        let Some(first) = (offset / BLOCK_BYTES..blocks).find(|n| !is_zero(block(*n))) else {
            return Ok(None);
        };
        let last = (first..blocks).find(|n| is_zero(block(*n))).unwrap_or(blocks);
        let start = (first * BLOCK_BYTES).max(offset);
        Ok(Some(Extent { offset: start, length: (last * BLOCK_BYTES).min(size) - start }))
    }
}

/// A VM: its id, its name, its points, oldest first.
pub type FakeVm = (VmId, String, Vec<Arc<FakePoint>>);

/// A vault in memory.
#[derive(Default)]
pub struct FakeStore {
    pub vms: Mutex<Vec<FakeVm>>,
}

impl FakeStore {
    pub fn add_vm(&self, name: &str) -> VmId {
        let id = VmId::random();
        self.vms.lock().unwrap().push((id, name.to_owned(), Vec::new()));
        id
    }

    pub fn add(&self, vm: VmId, point: FakePoint) -> Arc<FakePoint> {
        let point = Arc::new(point);
        self.with(vm, |points| points.push(point.clone()));
        point
    }

    pub fn remove(&self, vm: VmId, id: PointId) {
        self.with(vm, |points| points.retain(|p| p.info.id != id));
    }

    fn with<T>(&self, vm: VmId, f: impl FnOnce(&mut Vec<Arc<FakePoint>>) -> T) -> T {
        let mut vms = self.vms.lock().unwrap();
        f(&mut vms.iter_mut().find(|(id, _, _)| *id == vm).expect("a known VM").2)
    }
}

fn not_asked<T>() -> Result<T> {
    Err(Error::new(ErrorKind::Internal, "no view asks for this"))
}

impl PointStore for FakeStore {
    fn vms(&self) -> Result<Vec<StoredVm>> {
        let vms = self.vms.lock().unwrap();
        let stored = |(id, name, points): &FakeVm| StoredVm {
            id: *id,
            name: name.parse().unwrap(),
            points: points.len() as u64,
            bytes: 0,
        };
        Ok(vms.iter().map(stored).collect())
    }

    fn points(&self, vm: VmId) -> Result<Vec<PointInfo>> {
        Ok(self.with(vm, |points| points.iter().map(|p| p.info.clone()).collect()))
    }

    fn open(&self, vm: VmId, point: PointId) -> Result<Arc<dyn PointReader>> {
        let found = self.with(vm, |points| points.iter().find(|p| p.info.id == point).cloned());
        match found {
            Some(point) => Ok(point),
            None => Err(Error::new(ErrorKind::NotFound, format!("there is no point {point}"))),
        }
    }

    fn set_pinned(&self, _: VmId, _: PointId, _: bool) -> Result<()> {
        not_asked()
    }

    fn delete(&self, _: VmId, _: PointId) -> Result<()> {
        not_asked()
    }

    fn set_retention(&self, _: VmId, _: Keep) -> Result<()> {
        not_asked()
    }

    fn expire(&self, _: VmId) -> Result<Vec<PointId>> {
        not_asked()
    }

    fn wait_applied(&self, _: VmId, _: Duration) -> Result<bool> {
        not_asked()
    }

    fn verify(&self, _: VmId) -> Result<Vec<String>> {
        not_asked()
    }

    fn purge(&self, _: VmId) -> Result<()> {
        not_asked()
    }
}

/// Held by every test that mounts or starts a process: a process that is being started holds all
/// open files of this one for an instant, and a mount with an open file cannot be removed.
pub type Alone = MutexGuard<'static, ()>;

/// Waits for its turn.
pub fn alone() -> Alone {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes whatever is mounted on a folder off it when the test ends. Declare it before what it
/// guards, so that it is dropped after it.
pub struct MountGuard(pub PathBuf);

impl MountGuard {
    /// A new empty folder of `dir`.
    pub fn new(dir: &Path, name: &str) -> Self {
        let path = dir.join(name);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub fn join(&self, path: &str) -> PathBuf {
        self.0.join(path)
    }
}

impl Drop for MountGuard {
    fn drop(&mut self) {
        // Fails when nothing is mounted there, which is the usual case.
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

/// A loop device over a file.
pub struct Loop(pub String);

impl Loop {
    pub fn attach(file: &Path, options: &[&str]) -> Self {
        let made =
            Command::new("losetup").args(options).args(["--find", "--show"]).arg(file).output().unwrap();
        assert!(made.status.success(), "losetup: {}", String::from_utf8_lossy(&made.stderr));
        Self(String::from_utf8(made.stdout).unwrap().trim().to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
    }
}

/// Runs a command that must succeed; returns what it printed.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let mut done = Command::new(program).args(arguments).output().unwrap();
    // Between fork and exec, what another test starts holds the files of this process too.
    for _ in 0..50 {
        if program != "umount" || done.status.success() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
        done = Command::new(program).args(arguments).output().unwrap();
    }
    let text = format!("{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success(), "{program} {arguments:?}: {text}");
    text
}

/// Bytes that no other offset or seed has.
pub fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(length + 8);
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    while out.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend(state.to_le_bytes());
    }
    out.truncate(length);
    out
}
