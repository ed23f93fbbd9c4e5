//! The operations of the filter against the same operations on a plain directory: after every
//! step the answers and the whole trees must be equal, and of a tracked file nothing may have
//! changed that was not announced.

mod filter_support;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use afterimage::base::BLOCK_BYTES;
use afterimage::core::ports::tracking::Change;
use afterimage::filter::{Caller, Filter, SetAttr, SetTime};
use filter_support::Recorder;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, FallocateFlags, OFlag, RenameFlags, fallocate, open, renameat2};
use nix::sys::stat::{Mode, SFlag, mknod, umask};
use nix::unistd::{Whence, linkat, lseek};
use proptest::prelude::*;

const NAMES: [&str; 5] = ["a", "b", "dir", "dir/a", "dir/sub"];
const ROOT: u64 = 1;

#[derive(Clone, Debug)]
enum Op {
    Create(usize, u32),
    Mkdir(usize, u32),
    Fifo(usize),
    Symlink(usize, usize),
    Link(usize, usize),
    Unlink(usize),
    Rmdir(usize),
    Rename(usize, usize, u32),
    Chmod(usize, u32),
    Chown(usize, u32, u32),
    Utimes(usize, i64),
    Truncate(usize, u64),
    SetXattr(usize, u8),
    RemoveXattr(usize),
    Open(usize, bool),
    Close(usize),
    Write(usize, u64, usize, u8),
    Fallocate(usize, u64, u64, i32),
    Copy(usize, u64, usize, u64, u64),
    Seek(usize, i64, bool),
    SetLen(usize, u64),
    Attach(usize),
}

fn ops() -> impl Strategy<Value = Op> {
    let name = || 0..NAMES.len();
    let file = || 0..3usize;
    let at = || prop_oneof![0..20_000u64, 60_000..70_000u64];
    let modes = prop_oneof![Just(0), Just(1), Just(3), Just(0x10), Just(0x11), Just(2), Just(8)];
    prop_oneof![
        3 => (name(), 0..0o10000u32).prop_map(|(n, m)| Op::Create(n, m)),
        2 => (name(), 0..0o1000u32).prop_map(|(n, m)| Op::Mkdir(n, m)),
        1 => name().prop_map(Op::Fifo),
        1 => (name(), name()).prop_map(|(n, t)| Op::Symlink(n, t)),
        1 => (name(), name()).prop_map(|(n, t)| Op::Link(n, t)),
        1 => name().prop_map(Op::Unlink),
        1 => name().prop_map(Op::Rmdir),
        3 => (name(), name(), 0..5u32).prop_map(|(n, t, f)| Op::Rename(n, t, f)),
        1 => (name(), 0..0o10000u32).prop_map(|(n, m)| Op::Chmod(n, m)),
        1 => (name(), 0..3u32, 0..3u32).prop_map(|(n, u, g)| Op::Chown(n, u, g)),
        1 => (name(), -5..2_000_000_000i64).prop_map(|(n, t)| Op::Utimes(n, t)),
        1 => (name(), at()).prop_map(|(n, s)| Op::Truncate(n, s)),
        1 => (name(), any::<u8>()).prop_map(|(n, v)| Op::SetXattr(n, v)),
        1 => name().prop_map(Op::RemoveXattr),
        4 => (name(), any::<bool>()).prop_map(|(n, t)| Op::Open(n, t)),
        1 => file().prop_map(Op::Close),
        6 => (file(), at(), 1..9000usize, 1..255u8).prop_map(|(f, o, l, b)| Op::Write(f, o, l, b)),
        3 => (file(), at(), 0..20_000u64, modes).prop_map(|(f, o, l, m)| Op::Fallocate(f, o, l, m)),
        2 => (file(), at(), file(), at(), 0..20_000u64)
            .prop_map(|(f, o, t, p, l)| Op::Copy(f, o, t, p, l)),
        1 => (file(), 0..70_000i64, any::<bool>()).prop_map(|(f, o, d)| Op::Seek(f, o, d)),
        2 => (file(), at()).prop_map(|(f, s)| Op::SetLen(f, s)),
        2 => name().prop_map(Op::Attach),
    ]
}

/// What a tree looks like: by path kind, mode, owner, group, links, size, content or target.
type Tree = BTreeMap<PathBuf, (u32, u32, u32, u64, u64, Vec<u8>)>;

fn tree(root: &Path) -> Tree {
    let mut found = Tree::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(root.join(&folder)).unwrap() {
            let path = folder.join(entry.unwrap().file_name());
            let full = root.join(&path);
            let stat = fs::symlink_metadata(&full).unwrap();
            let kind = stat.file_type();
            let content = match () {
                () if kind.is_file() => fs::read(&full).unwrap(),
                () if kind.is_symlink() => {
                    fs::read_link(&full).unwrap().into_os_string().into_encoded_bytes()
                }
                () => Vec::new(),
            };
            let size = if kind.is_dir() { 0 } else { stat.size() };
            if kind.is_dir() {
                folders.push(path.clone());
            }
            assert!(kind.is_file() || kind.is_dir() || kind.is_symlink() || kind.is_fifo());
            let row = (stat.mode(), stat.uid(), stat.gid(), stat.nlink(), size, content);
            found.insert(path, row);
        }
    }
    found
}

fn errno(error: std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap())
}

struct Pair {
    filter: Filter,
    below: PathBuf,
    plain: PathBuf,
    /// Open files: handle in the filter and plain file.
    files: Vec<(u64, File)>,
    /// Attached file, as the filter's lower file, with what it is told.
    tracked: Option<(File, Arc<Recorder>)>,
}

impl Pair {
    fn new(root: &Path) -> Self {
        let (below, plain) = (root.join("below"), root.join("plain"));
        fs::create_dir(&below).unwrap();
        fs::create_dir(&plain).unwrap();
        let filter = Filter::over(&below).unwrap();
        Self { filter, below, plain, files: Vec::new(), tracked: None }
    }

    /// Parent node and last name of a path; calls `f` with them and forgets.
    fn at<R>(&self, name: usize, f: impl FnOnce(u64, &OsStr) -> Result<R, Errno>) -> Result<R, Errno> {
        match NAMES[name].split_once('/') {
            None => f(ROOT, OsStr::new(NAMES[name])),
            Some((folder, last)) => {
                let (id, stat) = self.filter.lookup(ROOT, OsStr::new(folder))?;
                let is_folder = stat.st_mode & libc::S_IFMT == libc::S_IFDIR;
                let result = if is_folder { f(id, OsStr::new(last)) } else { Err(Errno::ENOTDIR) };
                self.filter.forget(id, 1);
                result
            }
        }
    }

    fn node<R>(&self, name: usize, f: impl FnOnce(u64) -> Result<R, Errno>) -> Result<R, Errno> {
        let (id, _) = self.at(name, |parent, last| self.filter.lookup(parent, last))?;
        let result = f(id);
        self.filter.forget(id, 1);
        result
    }

    fn new_node(&self, made: Result<(u64, libc::stat), Errno>) -> Result<(), Errno> {
        made.map(|(id, _)| self.filter.forget(id, 1))
    }

    fn path(&self, name: usize) -> PathBuf {
        self.plain.join(NAMES[name])
    }

    /// Symbolic links would be followed by the kernel before it asks us; leave those out.
    fn is_linked(&self, name: usize) -> bool {
        let path = Path::new(NAMES[name]);
        path.ancestors().any(|p| self.plain.join(p).is_symlink())
    }

    fn apply(&mut self, op: &Op) -> Option<(Result<i64, Errno>, Result<i64, Errno>)> {
        if self.plain.join("dir").is_symlink() && !matches!(op, Op::Unlink(2) | Op::Write(..)) {
            // The kernel would follow it before it asks us.
            return None;
        }
        match op {
            Op::Open(..) | Op::Close(_) | Op::Attach(_) => self.handles(op),
            Op::Write(..) | Op::Fallocate(..) | Op::Copy(..) | Op::Seek(..) | Op::SetLen(..) => self.data(op),
            Op::Chmod(..) | Op::Chown(..) | Op::Utimes(..) | Op::Truncate(..) => self.attributes(op),
            Op::SetXattr(..) | Op::RemoveXattr(_) => self.xattrs(op),
            _ => self.names(op),
        }
    }

    fn names(&mut self, op: &Op) -> Option<(Result<i64, Errno>, Result<i64, Errno>)> {
        let (root, filter) = (Caller::ROOT, &self.filter);
        let bits = Mode::from_bits_truncate;
        let (ours, plain) = match *op {
            Op::Create(n, m) => {
                let made = self.at(n, |p, l| filter.create(root, p, l, m, libc::O_RDWR | libc::O_EXCL));
                let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_RDWR;
                (
                    made.map(|(id, _, handle)| {
                        filter.release(handle).unwrap();
                        filter.forget(id, 1);
                    }),
                    open(&self.path(n), flags, bits(m)).map(drop),
                )
            }
            Op::Mkdir(n, m) => (
                self.new_node(self.at(n, |p, l| filter.mkdir(root, p, l, m))),
                nix::unistd::mkdir(&self.path(n), bits(m)),
            ),
            Op::Fifo(n) => (
                self.new_node(self.at(n, |p, l| filter.mknod(root, p, l, libc::S_IFIFO | 0o644, 0))),
                mknod(&self.path(n), SFlag::S_IFIFO, bits(0o644), 0),
            ),
            Op::Symlink(n, t) => {
                let made = self.at(n, |p, l| filter.symlink(root, p, l, OsStr::new(NAMES[t])));
                let plain = std::os::unix::fs::symlink(NAMES[t], self.path(n)).map_err(errno);
                (self.new_node(made), plain)
            }
            Op::Link(n, t) => (
                self.new_node(self.node(n, |id| self.at(t, |p, l| filter.link(id, p, l)))),
                linkat(AT_FDCWD, &self.path(n), AT_FDCWD, &self.path(t), AtFlags::empty()),
            ),
            Op::Unlink(n) => (self.at(n, |p, l| filter.unlink(p, l)), nix::unistd::unlink(&self.path(n))),
            Op::Rmdir(n) => {
                (self.at(n, |p, l| filter.rmdir(p, l)), fs::remove_dir(self.path(n)).map_err(errno))
            }
            Op::Rename(n, t, f) => {
                // 3 and 4 are flags that the kernel or we refuse.
                let how = RenameFlags::from_bits_retain(f);
                let plain = match f {
                    3 | 4 => Err(Errno::EINVAL),
                    _ => renameat2(AT_FDCWD, &self.path(n), AT_FDCWD, &self.path(t), how),
                };
                let ours = self.at(n, |p, l| self.at(t, |q, m| filter.rename(p, l, q, m, f)));
                // Which error comes first is of no interest where several apply.
                match (ours, plain) {
                    (Err(_), Err(_)) => (Ok(()), Ok(())),
                    both => both,
                }
            }
            _ => return None,
        };
        Some((ours.map(|()| 0), plain.map(|()| 0)))
    }

    fn attributes(&mut self, op: &Op) -> Option<(Result<i64, Errno>, Result<i64, Errno>)> {
        let (n, set) = match *op {
            Op::Chmod(n, m) => (n, SetAttr { mode: Some(m), ..SetAttr::default() }),
            Op::Chown(n, u, g) => (n, SetAttr { uid: Some(u), gid: Some(g), ..SetAttr::default() }),
            Op::Truncate(n, s) => (n, SetAttr { size: Some(s), ..SetAttr::default() }),
            Op::Utimes(n, t) => {
                let time = Some(SetTime::At(t, 5));
                (n, SetAttr { atime: time, mtime: time, ..SetAttr::default() })
            }
            _ => return None,
        };
        if self.is_linked(n) {
            return None;
        }
        let path = self.path(n);
        let is_fifo = fs::metadata(&path).is_ok_and(|m| m.file_type().is_fifo());
        let plain = match *op {
            Op::Chmod(_, m) => fs::set_permissions(&path, fs::Permissions::from_mode(m)).map_err(errno),
            Op::Chown(_, u, g) => std::os::unix::fs::chown(&path, Some(u), Some(g)).map_err(errno),
            Op::Truncate(..) if is_fifo => Err(Errno::EINVAL),
            Op::Truncate(_, s) => nix::unistd::truncate(&path, s as i64),
            Op::Utimes(_, t) => {
                let time = nix::sys::time::TimeSpec::new(t, 5);
                let follow = nix::sys::stat::UtimensatFlags::FollowSymlink;
                nix::sys::stat::utimensat(AT_FDCWD, &path, &time, &time, follow)
            }
            _ => return None,
        };
        let ours = self.node(n, |id| self.filter.setattr(id, None, &set));
        if let (Ok(stat), Op::Utimes(_, t)) = (&ours, op) {
            assert_eq!((stat.st_atime, stat.st_mtime, stat.st_mtime_nsec), (*t, *t, 5));
        }
        Some((ours.map(|_| 0), plain.map(|()| 0)))
    }

    fn xattrs(&mut self, op: &Op) -> Option<(Result<i64, Errno>, Result<i64, Errno>)> {
        let name = OsStr::new("user.x");
        let (n, ours) = match *op {
            Op::SetXattr(n, v) => (n, self.node(n, |id| self.filter.setxattr(id, name, &[v; 9], 0))),
            Op::RemoveXattr(n) => (n, self.node(n, |id| self.filter.removexattr(id, name))),
            _ => return None,
        };
        let Op::SetXattr(_, v) = *op else { return None };
        if self.is_linked(n) || ours.is_err() {
            return None;
        }
        let back = self.node(n, |id| self.filter.getxattr(id, name));
        assert_eq!(back, Ok(vec![v; 9]));
        assert_eq!(self.node(n, |id| self.filter.listxattr(id)), Ok(b"user.x\0".to_vec()));
        None
    }

    fn handles(&mut self, op: &Op) -> Option<(Result<i64, Errno>, Result<i64, Errno>)> {
        match *op {
            Op::Open(n, is_truncated) => {
                if !self.path(n).is_file() || self.is_linked(n) {
                    return None;
                }
                let flags = libc::O_RDWR | if is_truncated { libc::O_TRUNC } else { 0 };
                let handle = self.node(n, |id| self.filter.open(id, flags)).unwrap();
                let mut options = File::options();
                let plain = options.read(true).write(true).truncate(is_truncated).open(self.path(n));
                self.files.push((handle, plain.unwrap()));
                if self.files.len() > 3 {
                    let (handle, _) = self.files.remove(0);
                    self.filter.release(handle).unwrap();
                }
            }
            Op::Close(f) if f < self.files.len() => {
                let (handle, _) = self.files.remove(f);
                self.filter.flush(handle).unwrap();
                self.filter.fsync(handle, true).unwrap();
                self.filter.release(handle).unwrap();
            }
            Op::Attach(n) if self.tracked.is_none() => {
                let found = self.filter.resolve(Path::new(NAMES[n])).ok()?;
                let disk = Recorder::new();
                self.filter.attach(found.key, disk.clone()).unwrap();
                self.tracked = Some((found.file, disk));
            }
            Op::Attach(_) => {
                let (file, _) = self.tracked.take()?;
                let stat = file.metadata().unwrap();
                let key = afterimage::base::FileKey { device: stat.dev(), inode: stat.ino() };
                assert!(self.filter.detach(key).is_some());
                assert!(self.filter.attached().is_empty());
            }
            _ => (),
        }
        None
    }

    fn data(&mut self, op: &Op) -> Option<(Result<i64, Errno>, Result<i64, Errno>)> {
        let filter = &self.filter;
        let get = |f: usize| self.files.get(f);
        Some(match *op {
            Op::Write(f, offset, length, byte) => {
                let (handle, plain) = get(f)?;
                let data = vec![byte; length];
                (
                    filter.write(*handle, offset, &data, false).map(i64::from),
                    plain.write_at(&data, offset).map(|n| n as i64).map_err(errno),
                )
            }
            Op::Fallocate(f, offset, length, mode) => {
                let (handle, plain) = get(f)?;
                // 8 is COLLAPSE_RANGE, which FUSE does not forward.
                let expected = match mode {
                    2 | 8 if length > 0 => Err(Errno::EOPNOTSUPP),
                    _ => {
                        let mode = FallocateFlags::from_bits_retain(mode);
                        fallocate(plain, mode, offset as i64, length as i64)
                    }
                };
                let ours = filter.fallocate(*handle, offset, length, mode);
                match (ours, expected) {
                    (Err(_), Err(_)) => (Ok(0), Ok(0)),
                    (a, b) => (a.map(|()| 0), b.map(|()| 0)),
                }
            }
            Op::Copy(f, from, t, to, length) => {
                let ((a, plain_a), (b, plain_b)) = (get(f)?, get(t)?);
                // The plain side is a read and a write: the same, unless the ranges overlap.
                let is_same = plain_a.metadata().unwrap().ino() == plain_b.metadata().unwrap().ino();
                if is_same {
                    return None;
                }
                let mut data = vec![0; length as usize];
                let read = plain_a.read_at(&mut data, from).unwrap();
                data.truncate(read);
                let expected = plain_b.write_at(&data, to).map(|n| n as i64).map_err(errno);
                (filter.copy_file_range((*a, from), (*b, to), length).map(|n| n as i64), expected)
            }
            Op::Seek(f, offset, is_data) => {
                let (handle, plain) = get(f)?;
                let (whence, number) = match is_data {
                    true => (Whence::SeekData, libc::SEEK_DATA),
                    false => (Whence::SeekHole, libc::SEEK_HOLE),
                };
                // Where blocks are is the lower file system's business: only the answers' sense.
                let (ours, expected) = (filter.lseek(*handle, offset, number), lseek(plain, offset, whence));
                (ours.map(|_| 0), expected.map(|_| 0))
            }
            Op::SetLen(f, size) => {
                let (handle, plain) = get(f)?;
                let stat = plain.metadata().unwrap();
                let id = self.tree_node(*handle);
                let set = SetAttr { size: Some(size), ..SetAttr::default() };
                let ours = filter.setattr(id, Some(*handle), &set);
                assert!(stat.is_file());
                (ours.map(|s| s.st_size), plain.set_len(size).map(|()| size as i64).map_err(errno))
            }
            _ => return None,
        })
    }

    /// The node of an open file: the kernel knows it from the lookup before.
    fn tree_node(&self, handle: u64) -> u64 {
        self.filter.node_of(handle).unwrap()
    }

    fn tracked_content(&self) -> Option<Vec<u8>> {
        let (file, _) = self.tracked.as_ref()?;
        let mut content = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut content, 0).unwrap();
        Some(content)
    }

    /// Whatever differs between `before` and now was announced.
    fn check_announced(&self, before: Option<Vec<u8>>) {
        let (Some(before), Some(after)) = (before, self.tracked_content()) else { return };
        let (_, disk) = self.tracked.as_ref().unwrap();
        let changes = disk.take();
        let is_announced = |at: u64| {
            changes.iter().any(|change| match *change {
                Change::Write { offset, length } | Change::Zero { offset, length } => {
                    offset / BLOCK_BYTES <= at / BLOCK_BYTES
                        && at / BLOCK_BYTES <= (offset + length).div_ceil(BLOCK_BYTES)
                }
                Change::Truncate { from, to } => {
                    from.min(to) / BLOCK_BYTES <= at / BLOCK_BYTES
                        && at / BLOCK_BYTES <= from.max(to) / BLOCK_BYTES
                }
            })
        };
        let longest = before.len().max(after.len());
        for at in 0..longest {
            if before.get(at).unwrap_or(&0) != after.get(at).unwrap_or(&0) {
                assert!(is_announced(at as u64), "byte {at} of {changes:?}");
            }
        }
        if before.len() != after.len() {
            let end = after.len() as u64;
            let is_told = changes.iter().any(|change| match *change {
                Change::Write { offset, length } | Change::Zero { offset, length } => offset + length >= end,
                Change::Truncate { to, .. } => to == end,
            });
            assert!(is_told, "size {} to {end} of {changes:?}", before.len());
        }
    }
}

fn run(steps: &[Op]) {
    umask(Mode::empty());
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut pair = Pair::new(folder.path());
    for (number, op) in steps.iter().enumerate() {
        let before = pair.tracked_content();
        if let Some((ours, plain)) = pair.apply(op) {
            assert_eq!(ours, plain, "step {number}: {op:?}");
        }
        pair.check_announced(before);
        for (handle, plain) in &pair.files {
            let mut expected = vec![0; 80_000];
            let length = plain.read_at(&mut expected, 0).unwrap();
            let is_equal = pair.filter.read(*handle, 0, 80_000, |data| data == &expected[..length]);
            assert_eq!(is_equal, Ok(true), "step {number}: {op:?}");
        }
        assert_eq!(tree(&pair.below), tree(&pair.plain), "step {number}: {op:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 120, ..ProptestConfig::default() })]

    #[test]
    fn equals_a_plain_directory(steps in prop::collection::vec(ops(), 1..40)) {
        run(&steps);
    }
}

/// Design, section 3: a reused inode is ESTALE, never another file.
#[test]
fn a_reused_inode_is_stale_and_a_new_node() {
    let folder = tempfile::tempdir().unwrap();
    let filter = Filter::over(folder.path()).unwrap();
    let path = folder.path().join("a");
    fs::write(&path, "old").unwrap();
    let (old, before) = filter.lookup(ROOT, OsStr::new("a")).unwrap();
    // Beneath the filter, until the file system hands the number out again.
    for _ in 0..1000 {
        fs::remove_file(&path).unwrap();
        assert_eq!(filter.getattr(old, None).map(drop), Err(Errno::ESTALE));
        fs::write(&path, "new").unwrap();
        if fs::metadata(&path).unwrap().ino() == before.st_ino {
            break;
        }
    }
    assert_eq!(fs::metadata(&path).unwrap().ino(), before.st_ino, "the number was not reused");
    assert_eq!(filter.getattr(old, None).map(drop), Err(Errno::ESTALE));
    assert_eq!(filter.open(old, libc::O_RDONLY), Err(Errno::ESTALE));
    let (new, _) = filter.lookup(ROOT, OsStr::new("a")).unwrap();
    assert_ne!(new, old);
    assert_eq!(filter.lookup(ROOT, OsStr::new("a")).unwrap().0, new);
    let handle = filter.open(new, libc::O_RDONLY).unwrap();
    assert_eq!(filter.read(handle, 0, 10, <[u8]>::to_vec), Ok(b"new".to_vec()));
    filter.release(handle).unwrap();
    filter.forget(old, 1);
    filter.forget(new, 2);
    assert_eq!(filter.getattr(new, None).map(drop), Err(Errno::ESTALE));
    assert_eq!(filter.lookup(ROOT, OsStr::new("a")).unwrap().0, before.st_ino);
}

/// T5: ENOSPC of the lower file frees preserved data, and the change is tried once more.
#[test]
fn room_is_made_once() {
    struct Unmount(PathBuf);
    impl Drop for Unmount {
        fn drop(&mut self) {
            let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let none = nix::mount::MsFlags::empty();
    nix::mount::mount(Some("tmpfs"), folder.path(), Some("tmpfs"), none, Some("size=64k")).unwrap();
    let _unmount = Unmount(folder.path().to_owned());
    fs::write(folder.path().join("a"), "x").unwrap();
    let filter = Filter::over(folder.path()).unwrap();
    let found = filter.resolve(Path::new("a")).unwrap();
    let disk = Recorder::new();
    filter.attach(found.key, disk.clone()).unwrap();
    let (id, _) = filter.lookup(ROOT, OsStr::new("a")).unwrap();
    let handle = filter.open(id, libc::O_RDWR).unwrap();
    assert_eq!(filter.fallocate(handle, 0, 1 << 20, 0), Err(Errno::ENOSPC));
    assert_eq!(disk.take().len(), 1);
    disk.room.store(1, std::sync::atomic::Ordering::SeqCst);
    assert_eq!(filter.fallocate(handle, 0, 1 << 20, 0), Err(Errno::ENOSPC));
    assert_eq!(disk.take().len(), 2);
    assert_eq!(disk.room.load(std::sync::atomic::Ordering::SeqCst), 0);
}
