//! The view through a real mount: what a guest, `libvirt`, `cp` and an operator see.

mod filter_support;

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use afterimage::base::{BootId, DiskId, EpochNumber, ErrorKind, FileKey, Timestamp, VmId};
use afterimage::core::ports::names::NameEvent;
use afterimage::core::ports::tracking::Change;
use afterimage::format::hrl::HrlHeader;
use filter_support::{Mounted, Recorder, errno, names};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, RenameFlags, fallocate, renameat2};
use nix::unistd::{Whence, lseek};

fn hrl() -> Vec<u8> {
    HrlHeader {
        vm: VmId(1),
        disk: DiskId(2),
        epoch: EpochNumber(5),
        created: Timestamp(0),
        boot: BootId(3),
        path: "a.raw".to_owned(),
        nonce: 7,
    }
    .encode()
}

fn rename(from: &Path, to: &Path, flags: RenameFlags) -> nix::Result<()> {
    renameat2(nix::fcntl::AT_FDCWD, from, nix::fcntl::AT_FDCWD, to, flags)
}

#[test]
fn direct_io_is_direct_below_and_unaligned_is_refused_as_below() {
    let fs_ = Mounted::over(|dir| fs::write(dir.join("a"), vec![7; 1 << 20]).unwrap());
    let direct = |path: &Path| {
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(path).unwrap()
    };
    let file = direct(&fs_.path("a"));
    let mut bytes = vec![0u8; (64 << 10) + 4096];
    let start = bytes.as_ptr().align_offset(4096);
    assert_eq!(errno(file.read_at(&mut bytes[start..start + 1], 0).unwrap_err()), Errno::EINVAL);
    let aligned = &mut bytes[start..start + (64 << 10)];
    assert_eq!(file.read_at(aligned, 0).unwrap(), 64 << 10);
    assert!(aligned.iter().all(|b| *b == 7));
    aligned.fill(9);
    file.write_all_at(aligned, 128 << 10).unwrap();
    assert_eq!(errno(file.write_at(&aligned[..100], 0).unwrap_err()), Errno::EINVAL);
    // The lower descriptor has O_DIRECT as well.
    let below = fs_.mount().resolve(Path::new("a")).unwrap();
    let mut back = vec![0; 64 << 10];
    below.file.read_exact_at(&mut back, 128 << 10).unwrap();
    assert!(back.iter().all(|b| *b == 9));
    // A buffered descriptor takes anything.
    let buffered = File::options().write(true).open(fs_.path("a")).unwrap();
    assert_eq!(buffered.write_at(b"xyz", 1).unwrap(), 3);
}

#[test]
fn a_shared_mapping_reaches_the_file_and_is_tracked() {
    let fs_ = Mounted::over(|dir| fs::write(dir.join("a"), vec![1; 10_000]).unwrap());
    let below = fs_.mount().resolve(Path::new("a")).unwrap();
    let disk = Recorder::new();
    fs_.mount().filter().attach(below.key, disk.clone()).unwrap();
    // In another process: a page fault of ours must not wait for ourselves.
    let script = "import mmap,sys,os\n\
        f=os.open(sys.argv[1],os.O_RDWR|os.O_DIRECT)\n\
        m=mmap.mmap(f,10000)\n\
        assert m[0]==1 and m[9999]==1\n\
        m[9000:9003]=b'xyz'\n\
        m.flush()\n";
    let done =
        std::process::Command::new("python3").args(["-c", script]).arg(fs_.path("a")).status().unwrap();
    assert!(done.success());
    let mut text = [0; 3];
    below.file.read_exact_at(&mut text, 9000).unwrap();
    assert_eq!(&text, b"xyz");
    assert!(disk.take().iter().any(
        |c| matches!(c, Change::Write { offset, length } if *offset <= 9000 && offset + length >= 9003)
    ));
    assert_eq!(fs::metadata(fs_.path("a")).unwrap().len(), 10_000);
}

#[test]
fn append_and_sparse_offsets() {
    let fs_ = Mounted::empty();
    for text in ["one ", "two ", "three"] {
        let mut file = OpenOptions::new().append(true).create(true).open(fs_.path("log")).unwrap();
        file.write_all(text.as_bytes()).unwrap();
    }
    assert_eq!(fs::read(fs_.path("log")).unwrap(), b"one two three");
    let far = (1u64 << 40) + 12_345;
    let mut file = File::options().read(true).write(true).create_new(true).open(fs_.path("far")).unwrap();
    file.write_all_at(b"far away", far).unwrap();
    assert_eq!(file.metadata().unwrap().len(), far + 8);
    assert_eq!(file.seek(SeekFrom::End(0)).unwrap(), far + 8);
    let data = lseek(&file, 0, Whence::SeekData).unwrap() as u64;
    assert!(data > (1 << 40) && data <= far, "{data}");
    assert_eq!(lseek(&file, 0, Whence::SeekHole).unwrap(), 0);
    let mut text = [0; 8];
    file.read_exact_at(&mut text, far).unwrap();
    assert_eq!(&text, b"far away");
}

#[test]
fn locks_are_the_kernels() {
    let fs_ = Mounted::over(|dir| fs::write(dir.join("a"), "x").unwrap());
    let open = || File::options().read(true).write(true).open(fs_.path("a")).unwrap();
    let (first, second) = (open(), open());
    let lock = libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 100,
        l_len: 1,
        l_pid: 0,
    };
    let set = |file: &File| nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_OFD_SETLK(&lock));
    set(&first).unwrap();
    assert_eq!(set(&second), Err(Errno::EAGAIN));
    drop(first);
    set(&second).unwrap();
}

#[test]
fn files_of_ours_are_hidden_by_header_and_not_by_name() {
    let fs_ = Mounted::over(|dir| {
        fs::write(dir.join("a.raw.5.hrl"), hrl()).unwrap();
        fs::write(dir.join("x.5.hrl"), "a user's own").unwrap();
        fs::write(dir.join("empty.hrl"), "").unwrap();
        for folder in ["ours", "mixed"] {
            fs::create_dir(dir.join(folder)).unwrap();
            fs::write(dir.join(folder).join("d.9.hrl"), hrl()).unwrap();
        }
        fs::write(dir.join("mixed/other"), "").unwrap();
    });
    assert_eq!(names(&fs_.dir), ["empty.hrl", "mixed", "ours", "x.5.hrl"]);
    let hidden = fs_.path("a.raw.5.hrl");
    assert_eq!(errno(fs::metadata(&hidden).unwrap_err()), Errno::ENOENT);
    assert_eq!(errno(File::open(&hidden).unwrap_err()), Errno::ENOENT);
    assert_eq!(errno(fs::remove_file(&hidden).unwrap_err()), Errno::ENOENT);
    assert_eq!(errno(fs::rename(&hidden, fs_.path("b")).unwrap_err()), Errno::ENOENT);
    assert_eq!(errno(File::create(&hidden).unwrap_err()), Errno::EBUSY);
    assert_eq!(errno(fs::create_dir(&hidden).unwrap_err()), Errno::EBUSY);
    assert_eq!(errno(fs::rename(fs_.path("x.5.hrl"), &hidden).unwrap_err()), Errno::EBUSY);
    assert_eq!(fs::read(fs_.path("x.5.hrl")).unwrap(), b"a user's own");
    assert_eq!(names(&fs_.path("ours")), Vec::<String>::new());
    fs::remove_dir(fs_.path("ours")).unwrap();
    assert_eq!(errno(fs::remove_dir(fs_.path("mixed")).unwrap_err()), Errno::ENOTEMPTY);
    fs::remove_file(fs_.path("mixed/other")).unwrap();
    fs::remove_dir(fs_.path("mixed")).unwrap();
}

#[test]
fn long_and_strange_names() {
    let fs_ = Mounted::empty();
    let long = "n".repeat(255);
    let strange = OsStr::from_bytes(b"\xff\xfe tab\t new\nline");
    for name in [OsStr::new(&long), strange, OsStr::new("-rf"), OsStr::new("...")] {
        fs::write(fs_.path(name), "x").unwrap();
        assert_eq!(fs::read(fs_.path(name)).unwrap(), b"x");
        assert!(fs::read_dir(&fs_.dir).unwrap().any(|e| e.unwrap().file_name() == name));
        fs::remove_file(fs_.path(name)).unwrap();
    }
    let longer = fs_.path("n".repeat(256));
    assert_eq!(errno(fs::write(longer, "x").unwrap_err()), Errno::ENAMETOOLONG);
}

#[test]
fn renames_and_unlinks_while_open() {
    let fs_ = Mounted::empty();
    for name in ["a", "b", "c"] {
        fs::write(fs_.path(name), name).unwrap();
    }
    let key = |name: &str| fs_.mount().resolve(Path::new(name)).unwrap().key;
    let (a, b, c) = (key("a"), key("b"), key("c"));
    fs_.events.take();
    let open = File::options().read(true).write(true).open(fs_.path("a")).unwrap();
    let no_replace = RenameFlags::RENAME_NOREPLACE;
    assert_eq!(rename(&fs_.path("a"), &fs_.path("b"), no_replace), Err(Errno::EEXIST));
    rename(&fs_.path("a"), &fs_.path("b"), RenameFlags::RENAME_EXCHANGE).unwrap();
    rename(&fs_.path("b"), &fs_.path("c"), RenameFlags::empty()).unwrap();
    assert_eq!(fs::read(fs_.path("a")).unwrap(), b"b");
    assert_eq!(fs::read(fs_.path("c")).unwrap(), b"a");
    fs::remove_file(fs_.path("c")).unwrap();
    let path = PathBuf::from;
    assert_eq!(
        fs_.events.take(),
        [
            NameEvent::Exchanged { a: path("a"), b: path("b"), a_file: a, b_file: b },
            NameEvent::Renamed { from: path("b"), to: path("c"), file: a, replaced: Some(c) },
            NameEvent::Removed { path: path("c"), file: a },
        ]
    );
    // Gone by name, alive by descriptor: data, size, attributes.
    open.write_all_at(b"still here", 0).unwrap();
    open.set_len(5).unwrap();
    open.set_permissions(fs::Permissions::from_mode(0o600)).unwrap();
    let stat = open.metadata().unwrap();
    assert_eq!((stat.len(), stat.nlink(), stat.mode() & 0o777), (5, 0, 0o600));
    let mut text = [0; 5];
    open.read_exact_at(&mut text, 0).unwrap();
    assert_eq!(&text, b"still");
}

#[test]
fn events_tell_new_files_links_and_written_headers() {
    let fs_ = Mounted::empty();
    fs::create_dir(fs_.path("vm")).unwrap();
    let file = File::create(fs_.path("vm/a")).unwrap();
    file.write_all_at(b"QFI\xfb", 0).unwrap();
    file.write_all_at(b"x", 4096).unwrap();
    fs::hard_link(fs_.path("vm/a"), fs_.path("b")).unwrap();
    fs::rename(fs_.path("vm"), fs_.path("vn")).unwrap();
    let stat = fs::metadata(fs_.path("b")).unwrap();
    assert_eq!(stat.nlink(), 2);
    let key = fs_.mount().resolve(Path::new("b")).unwrap().key;
    let path = PathBuf::from;
    let events = fs_.events.take();
    assert_eq!(
        events[..3],
        [
            NameEvent::Created { path: path("vm/a"), file: key },
            NameEvent::HeaderWritten { file: key, path: Some(path("vm/a")) },
            NameEvent::Created { path: path("b"), file: key },
        ]
    );
    assert!(matches!(&events[3], NameEvent::Renamed { from, to, replaced: None, .. }
            if from == Path::new("vm") && to == Path::new("vn")));
    assert_eq!(events.len(), 4);
}

#[test]
fn copies_holes_zeros_and_preallocation() {
    let fs_ = Mounted::over(|dir| {
        fs::write(dir.join("a"), vec![5; 1 << 20]).unwrap();
        fs::write(dir.join("b"), "").unwrap();
    });
    let open = |name: &str| File::options().read(true).write(true).open(fs_.path(name)).unwrap();
    let (mut a, mut b) = (open("a"), open("b"));
    let below = fs_.mount().resolve(Path::new("b")).unwrap();
    let disk = Recorder::new();
    fs_.mount().filter().attach(below.key, disk.clone()).unwrap();
    assert_eq!(std::io::copy(&mut a, &mut b).unwrap(), 1 << 20);
    let written: u64 = disk
        .take()
        .iter()
        .map(|c| match c {
            Change::Write { length, .. } => *length,
            other => panic!("{other:?}"),
        })
        .sum();
    assert!(written >= 1 << 20);
    let flags = |bits: i32| FallocateFlags::from_bits(bits).unwrap();
    let (keep, punch, zero) =
        (libc::FALLOC_FL_KEEP_SIZE, libc::FALLOC_FL_PUNCH_HOLE, libc::FALLOC_FL_ZERO_RANGE);
    fallocate(&b, flags(punch | keep), 4096, 8192).unwrap();
    fallocate(&b, flags(zero), (1 << 20) - 4096, 8192).unwrap();
    fallocate(&b, flags(0), 0, (1 << 20) + 10_000).unwrap();
    fallocate(&b, flags(keep), 0, 4 << 20).unwrap();
    b.set_len(100).unwrap();
    let grown = (1 << 20) + 4096;
    assert_eq!(
        disk.take(),
        [
            Change::Zero { offset: 4096, length: 8192 },
            Change::Zero { offset: (1 << 20) - 4096, length: 8192 },
            Change::Truncate { from: grown, to: (1 << 20) + 10_000 },
            Change::Truncate { from: (1 << 20) + 10_000, to: 100 },
        ]
    );
    assert_eq!(b.metadata().unwrap().len(), 100);
    assert_eq!(below.file.metadata().unwrap().len(), 100);
    let mut text = [0; 100];
    b.read_exact_at(&mut text, 0).unwrap();
    assert!(text.iter().all(|x| *x == 5));
    assert!(fs_.mount().filter().detach(below.key).is_some());
    b.write_all_at(b"z", 0).unwrap();
    assert!(disk.take().is_empty());
}

#[test]
fn extended_attributes_but_not_our_marks() {
    let fs_ = Mounted::over(|dir| fs::write(dir.join("a"), "x").unwrap());
    let python = |script: &str, path: &Path| {
        let script = format!("import os,sys\np=sys.argv[1]\nm='trusted.afterimage.untracked'\n{script}");
        let output = std::process::Command::new("python3").args(["-c", &script]).arg(path).output();
        String::from_utf8_lossy(&output.unwrap().stdout).trim().to_owned()
    };
    // The mark is set beneath the mount.
    let below = fs_.mount().resolve(Path::new("a")).unwrap();
    let path = format!("/proc/{}/fd/{}", std::process::id(), below.file.as_raw_fd());
    assert_eq!(python("os.setxattr(p,m,b'1')\nprint(os.getxattr(p,m))", Path::new(&path)), "b'1'");
    let seen = python(
        "def fails(f,*a):\n try: f(p,*a)\n except OSError as e: return e.errno\n\
         os.setxattr(p,'user.a',b'1')\nos.setxattr(p,'trusted.b',b'2'*300)\n\
         print(sorted(os.listxattr(p)),len(os.getxattr(p,'trusted.b')),fails(os.setxattr,m,b'1'),\
         fails(os.getxattr,m),fails(os.removexattr,m),fails(os.removexattr,'user.a'))",
        &fs_.path("a"),
    );
    assert_eq!(
        seen,
        format!("['trusted.b', 'user.a'] 300 {} {} {} None", libc::EPERM, libc::ENODATA, libc::EPERM)
    );
}

#[test]
fn attaching_while_eight_threads_write_misses_nothing() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let fs_ = Mounted::over(|dir| {
        File::create(dir.join("a")).unwrap().set_len(64 << 20).unwrap();
    });
    let key = fs_.mount().resolve(Path::new("a")).unwrap().key;
    let is_done = AtomicBool::new(false);
    for _round in 0..20 {
        let disk = Recorder::new();
        is_done.store(false, Ordering::SeqCst);
        let is_attached = AtomicBool::new(false);
        let after: Vec<Vec<u64>> = std::thread::scope(|scope| {
            let writers: Vec<_> = (0..8u64)
                .map(|writer| {
                    let file = File::options().write(true).open(fs_.path("a")).unwrap();
                    let (is_done, is_attached) = (&is_done, &is_attached);
                    scope.spawn(move || {
                        let mut after = Vec::new();
                        let mut count = 0u64;
                        while !is_done.load(Ordering::SeqCst) || count < 20 {
                            let offset = (writer * 1000 + count % 1000) * 512;
                            let late = is_attached.load(Ordering::SeqCst);
                            file.write_all_at(&[1; 512], offset).unwrap();
                            if late {
                                after.push(offset);
                            }
                            count += 1;
                        }
                        after
                    })
                })
                .collect();
            fs_.mount().filter().attach(key, disk.clone()).unwrap();
            is_attached.store(true, Ordering::SeqCst);
            // Some writes after the attachment, however slow the machine is.
            while disk.ended.lock().unwrap().len() < 100 {
                std::thread::yield_now();
            }
            is_done.store(true, Ordering::SeqCst);
            writers.into_iter().map(|w| w.join().unwrap()).collect()
        });
        let mut recorded: std::collections::HashMap<u64, usize> = Default::default();
        for change in disk.take() {
            match change {
                Change::Write { offset, length: 512 } => *recorded.entry(offset).or_default() += 1,
                other => panic!("{other:?}"),
            }
        }
        for offset in after.iter().flatten() {
            let count = recorded.get_mut(offset).expect("a write after attach was not recorded");
            *count = count.checked_sub(1).expect("a write after attach was not recorded");
        }
        let detached = fs_.mount().filter().detach(key).unwrap();
        assert_eq!(std::sync::Arc::as_ptr(&disk).addr(), std::sync::Arc::as_ptr(&detached).addr());
        fs_.mount().resolve(Path::new("a")).unwrap();
    }
}

#[test]
fn syncs_are_told_and_room_is_made_once() {
    let fs_ = Mounted::over(|dir| fs::write(dir.join("a"), "x").unwrap());
    let key = fs_.mount().resolve(Path::new("a")).unwrap().key;
    let disk = Recorder::new();
    fs_.mount().filter().attach(key, disk.clone()).unwrap();
    let file = File::options().write(true).open(fs_.path("a")).unwrap();
    file.sync_data().unwrap();
    file.sync_all().unwrap();
    assert_eq!(disk.syncs.load(std::sync::atomic::Ordering::SeqCst), 4);
    assert_eq!(fs_.mount().filter().attached(), [key]);
    let again = fs_.mount().filter().attach(key, Recorder::new()).unwrap_err();
    assert_eq!(again.kind(), ErrorKind::Exists);
    let unknown = FileKey { device: 1, inode: u64::MAX >> 1 };
    assert_eq!(
        fs_.mount().filter().attach(unknown, Recorder::new()).unwrap_err().kind(),
        ErrorKind::NotFound
    );
}

#[test]
fn new_files_belong_to_the_caller() {
    let fs_ = Mounted::over(|dir| {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o777)).unwrap();
        fs::set_permissions(dir.parent().unwrap(), fs::Permissions::from_mode(0o755)).unwrap();
        for name in ["w", "t"] {
            fs::write(dir.join(name), "").unwrap();
            fs::set_permissions(dir.join(name), fs::Permissions::from_mode(0o6777)).unwrap();
        }
        fs::create_dir(dir.join("group")).unwrap();
        std::os::unix::fs::chown(dir.join("group"), None, Some(7)).unwrap();
        fs::set_permissions(dir.join("group"), fs::Permissions::from_mode(0o2777)).unwrap();
    });
    let script = "import os,sys\nos.setgroups([])\nos.setgid(65534)\nos.setuid(65534)\nos.umask(0o027)\n\
        os.chdir(sys.argv[1])\n\
        os.close(os.open('f',os.O_CREAT|os.O_WRONLY,0o666))\nos.mkdir('d',0o777)\nos.symlink('f','l')\n\
        os.mknod('p',0o010666)\nos.close(os.open('group/f',os.O_CREAT|os.O_WRONLY,0o666))\n\
        os.mkdir('group/d')\nos.close(os.open('s',os.O_CREAT|os.O_WRONLY,0o4755))\n\
        os.pwrite(os.open('w',os.O_WRONLY),b'x',0)\nos.truncate('t',5)\n";
    let done = std::process::Command::new("python3").args(["-c", script]).arg(&fs_.dir).status().unwrap();
    assert!(done.success());
    let seen = |name: &str| {
        let stat = fs::symlink_metadata(fs_.path(name)).unwrap();
        (stat.uid(), stat.gid(), stat.mode() & 0o7777)
    };
    assert_eq!(seen("f"), (65534, 65534, 0o640));
    assert_eq!(seen("d"), (65534, 65534, 0o750));
    assert_eq!(seen("l"), (65534, 65534, 0o777));
    assert_eq!(seen("p"), (65534, 65534, 0o640));
    assert_eq!(seen("group/f"), (65534, 7, 0o640));
    assert_eq!(seen("group/d"), (65534, 7, 0o2750));
    assert_eq!(seen("s"), (65534, 65534, 0o4750));
    assert_eq!((seen("w").2, seen("t").2), (0o777, 0o777));
}
