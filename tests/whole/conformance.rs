//! The mount is as good a file system as the one below it: pjdfstest and fsx, which `scripts/suites`
//! installs, on the mount and on the bare file system in the same run.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::{Host, Kind, Scratch, Volume, rounds, run, sparse, text};

/// What every kernel here has. Not: `chflags`, birth times in `stat` and NFSv4 lists, which Linux has
/// not; read-only remounts, which the suite does with a call of another system.
const FEATURES: &str = r#"
[features]
posix_fallocate = {}
rename_ctime = {}
utimensat = {}
utime_now = {}
[settings]
naptime = 0.01
allow_remount = false
[dummy_auth]
entries = [["nobody", "nogroup"], ["daemon", "daemon"]]
"#;

/// Cases that run on the bare file system and not on the mount, each with its reason.
const NOT_ON_THE_MOUNT: &[&str] = &[
    // The C library knows how many links a file can have by the type of its file system, and FUSE is
    // not in its list; the links themselves are made by the lower file system, with its limit.
    "link::link_count_max",
];

/// One operation in a thousand is a sync; sizes reach over the end of the disk and its regions.
const OPERATIONS: &str = "
flen = 12582912
[opsize]
min = 1
max = 262144
[weights]
close_open = 1.0
invalidate = 0.2
mapread = 5.0
mapwrite = 5.0
read = 10.0
write = 10.0
truncate = 1.0
fsync = 0.02
fdatasync = 0.02
posix_fallocate = 2.0
punch_hole = 3.0
sendfile = 1.0
posix_fadvise = 0.5
copy_file_range = 3.0
";

/// A program of `scripts/suites`.
fn suite(name: &str) -> PathBuf {
    let target = Path::new(env!("CARGO_BIN_EXE_afterimage")).ancestors().nth(2).unwrap();
    let program = target.join("suites/bin").join(name);
    assert!(program.exists(), "{name} is not installed; type: scripts/suites");
    program
}

/// What became of each case of pjdfstest: `ok`, `skipped` or `FAILED`.
fn pjdfstest(scratch: &Scratch, dir: &Path, other: &Path) -> BTreeMap<String, String> {
    let config = scratch.path().join("pjdfstest.toml");
    fs::write(&config, FEATURES).unwrap();
    let out = Command::new("timeout")
        .args(["-k", "5", "300", text(&suite("pjdfstest"))])
        .args(["-c", text(&config), "-p", text(dir), "-s", text(other)])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&out.stdout);
    let results: BTreeMap<_, _> = said
        .lines()
        .filter_map(|line| line.split_once(char::is_whitespace))
        .filter(|(name, _)| name.contains("::"))
        .map(|(name, result)| (name.to_owned(), result.trim().to_owned()))
        .collect();
    let counted = said.lines().find(|l| l.starts_with("Summary:")).unwrap_or_default().to_owned();
    assert!(counted.contains(&format!(" {} total", results.len())) && results.len() > 390, "{said}");
    println!("{}: {counted}", dir.display());
    results
}

/// Every case that passes on the bare file system passes on the mount over it.
fn posix(name: &str, kind: Kind) {
    let scratch = Scratch::searchable(name);
    let volume = |name: &str| {
        let volume =
            Volume::make(&scratch.path().join(name).with_extension("fs"), kind, 320, &scratch.dir(name));
        fs::set_permissions(volume.dir(), Permissions::from_mode(0o777)).unwrap();
        volume
    };
    let (below, other) = (volume("below"), volume("other"));
    let [bare, lower] = ["bare", "images"].map(|name| {
        let dir = below.dir().join(name);
        fs::create_dir(&dir).unwrap();
        fs::set_permissions(&dir, Permissions::from_mode(0o777)).unwrap();
        dir
    });
    let mounted = scratch.dir("mounted");
    let host = Host::new(name, &scratch.path().join("state"));
    host.mount(&lower, &mounted);
    // The write path of a protected disk is in use meanwhile.
    sparse(&mounted.join("a.img"), 1 << 20);
    host.protect("web1", &[&mounted.join("a.img")], "1s");
    let expected = pjdfstest(&scratch, &bare, other.dir());
    let mut found = pjdfstest(&scratch, &mounted, other.dir());
    for case in NOT_ON_THE_MOUNT {
        assert_eq!(found.insert((*case).to_owned(), expected[*case].clone()).unwrap(), "skipped");
    }
    let worse: Vec<_> = found.iter().filter(|(case, result)| expected[*case] != **result).collect();
    assert!(worse.is_empty(), "otherwise than on the bare file system: {worse:?}");
    assert!(found.values().filter(|r| *r == "ok").count() > 380);
}

#[test]
fn posix_on_ext4() {
    posix("posix-ext4", Kind::Ext4);
}

#[test]
fn posix_on_xfs() {
    posix("posix-xfs", Kind::Xfs);
}

/// fsx on a protected disk finds what it wrote, and so does who restores the newest point. One round
/// is one seed.
#[test]
fn fsx_on_a_protected_disk() {
    let operations = if std::env::var_os("AFTERIMAGE_FSX").is_some() { "10000" } else { "2000" };
    for round in 0..rounds("AFTERIMAGE_FSX", 3) {
        let seed = if operations == "2000" { round as u64 } else { rand::random::<u32>().into() };
        let scratch = Scratch::new("fsx");
        let (lower, mounted) = (scratch.dir("lower"), scratch.dir("mounted"));
        let host = Host::new("fsx", &scratch.path().join("state"));
        host.keeps_preserved(["0", "256 KiB", "32 MiB"][round % 3]);
        host.mount(&lower, &mounted);
        let disk = mounted.join("a.img");
        sparse(&disk, 1 << 20);
        host.protect("web1", &[&disk], "1s");
        let config = scratch.path().join("fsx.toml");
        fs::write(&config, OPERATIONS).unwrap();
        println!("fsx: seed {seed}, {operations} operations");
        let fsx = suite("fsx");
        // It also compares the whole file with what it should be, at its end.
        run(text(&fsx), &["-f", text(&config), "-S", &seed.to_string(), "-N", operations, text(&disk)]);
        host.sync("web1");
        let restored = scratch.path().join("restored");
        host.run(&["restore", "web1", "--to", text(&restored)]);
        run("cmp", &[text(&disk), text(&restored.join("a.img"))]);
        run("cmp", &[text(&disk), text(&lower.join("a.img"))]);
    }
}
