//! What the tests of the filter share: a mount that goes away however a test ends, a watcher that
//! remembers, and a disk that records what it is told.

#![allow(dead_code, missing_docs)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use afterimage::base::DiskId;
use afterimage::core::ports::names::{NameEvent, NameWatcher};
use afterimage::core::ports::tracking::{Change, SyncMark, Ticket, TrackedDisk};
use afterimage::filter::{Mount, MountSpec};
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};

pub fn errno(error: std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap())
}

/// The names in a folder, sorted.
pub fn names(dir: &Path) -> Vec<String> {
    let name = |e: std::io::Result<std::fs::DirEntry>| e.unwrap().file_name().to_string_lossy().into_owned();
    let mut names: Vec<String> = std::fs::read_dir(dir).unwrap().map(name).collect();
    names.sort();
    names
}

/// Remembers every event.
#[derive(Default)]
pub struct Events(pub Mutex<Vec<NameEvent>>);

impl NameWatcher for Events {
    fn on_name_event(&self, event: &NameEvent) {
        self.0.lock().unwrap().push(event.clone());
    }
}

impl Events {
    pub fn take(&self) -> Vec<NameEvent> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

/// A directory in a temporary folder, with the filter mounted over it.
pub struct Mounted {
    pub dir: PathBuf,
    pub events: Arc<Events>,
    mount: Option<Mount>,
    _folder: tempfile::TempDir,
}

impl Mounted {
    /// Mounts over a directory that `prepare` has filled.
    pub fn over(prepare: impl FnOnce(&Path)) -> Self {
        Self::within(tempfile::tempdir().unwrap(), prepare)
    }

    /// The same in a temporary folder of choice.
    pub fn within(folder: tempfile::TempDir, prepare: impl FnOnce(&Path)) -> Self {
        let dir = folder.path().canonicalize().unwrap().join("images");
        std::fs::create_dir(&dir).unwrap();
        prepare(&dir);
        let events = Arc::new(Events::default());
        let spec = MountSpec { source: dir.clone(), dir: dir.clone(), single_host: false, options: vec![] };
        let mount = Mount::start(spec, events.clone()).unwrap();
        Self { dir, events, mount: Some(mount), _folder: folder }
    }

    pub fn empty() -> Self {
        Self::over(|_| ())
    }

    pub fn mount(&self) -> &Mount {
        self.mount.as_ref().unwrap()
    }

    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir.join(name)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.dir, MntFlags::MNT_DETACH);
        if let Some(mount) = self.mount.take()
            && !std::thread::panicking()
        {
            mount.wait();
        }
    }
}

/// A child process that ends with the test.
pub struct Running(pub Child);

impl Running {
    /// `sh -c SCRIPT` with these arguments; returns once it has written a line.
    pub fn shell(script: &str, arguments: &[&Path]) -> Self {
        use std::io::BufRead;
        let mut command = Command::new("sh");
        command.arg("-c").arg(script).arg("sh").args(arguments).stdout(Stdio::piped());
        let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        std::io::BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        Self(child)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A disk that records every change it is told of.
pub struct Recorder {
    id: DiskId,
    pub begun: Mutex<Vec<Change>>,
    pub ended: Mutex<Vec<(Change, Result<u64, Errno>)>>,
    pub syncs: AtomicU64,
    /// Answers of `make_room` that are still `true`.
    pub room: AtomicU64,
}

impl Recorder {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            id: DiskId::random(),
            begun: Mutex::default(),
            ended: Mutex::default(),
            syncs: AtomicU64::new(0),
            room: AtomicU64::new(0),
        })
    }

    pub fn take(&self) -> Vec<Change> {
        let ended = std::mem::take(&mut *self.ended.lock().unwrap());
        assert_eq!(std::mem::take(&mut *self.begun.lock().unwrap()).len(), ended.len());
        ended.into_iter().map(|(change, _)| change).collect()
    }
}

impl TrackedDisk for Recorder {
    fn id(&self) -> DiskId {
        self.id
    }

    fn begin(&self, change: Change) -> Result<Ticket, Errno> {
        self.begun.lock().unwrap().push(change);
        Ok(Ticket { epoch: 1, change, shard: 0 })
    }

    fn end(&self, ticket: Ticket, result: Result<u64, Errno>) {
        self.ended.lock().unwrap().push((ticket.change, result));
    }

    fn make_room(&self) -> bool {
        self.room.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok()
    }

    fn sync_begins(&self) -> SyncMark {
        SyncMark(self.syncs.fetch_add(1, Ordering::SeqCst))
    }

    fn sync_ended(&self, _mark: SyncMark, _result: Result<(), Errno>) {
        self.syncs.fetch_add(1, Ordering::SeqCst);
    }
}
