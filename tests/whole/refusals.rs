//! What people do wrong: each gets a three-line error that says what failed, why, and what to type
//! next, and the documented exit code.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use crate::common::{Host, Scratch, run, sparse, text};

const MIB: u64 = 1 << 20;

/// The command is refused with `code`, in three lines, with `fragment` in them.
fn refused(host: &Host, args: &[&str], code: i32, fragment: &str) {
    let out = host.try_run(args);
    let said = format!("afterimage {args:?} ended with {}:\n{}{}", out.code, out.stdout, out.stderr);
    assert_eq!(out.code, code, "{said}");
    assert!(out.stderr.contains(fragment), "no {fragment:?} in: {said}");
    for line in ["error: ", "  why: ", "  next: "] {
        assert!(out.stderr.lines().any(|l| l.starts_with(line)), "no line {line:?} in: {said}");
    }
}

/// The daemon ends before its folder goes.
struct World {
    host: Host,
    scratch: Scratch,
}

impl World {
    /// A mount with two disks, of which one is protected.
    fn new(test: &str) -> Self {
        let scratch = Scratch::new(test);
        let host = Host::new(test, &scratch.path().join("state"));
        let (lower, mounted) = (scratch.dir("lower"), scratch.dir("mounted"));
        sparse(&lower.join("a.img"), MIB);
        sparse(&lower.join("b.img"), MIB);
        host.mount(&lower, &mounted);
        host.protect("web1", &[&mounted.join("a.img")], "1s");
        Self { scratch, host }
    }

    fn path(&self, name: &str) -> String {
        text(&self.scratch.path().join(name)).to_owned()
    }
}

#[test]
fn bad_mounts() {
    let world = World::new("bad-mounts");
    let host = &world.host;
    refused(host, &["mount", &world.path("missing")], 6, "no such directory");
    refused(host, &["mount", &world.path("lower/a.img")], 2, "no directory");
    refused(host, &["mount", &world.path("lower"), &world.path("mounted")], 4, "already");
    refused(host, &["umount", &world.path("lower")], 6, "next:");
    let open = fs::File::open(world.scratch.path().join("mounted/b.img")).unwrap();
    refused(host, &["umount", &world.path("mounted")], 4, "whole");
    drop(open);
    host.run(&["umount", &world.path("mounted")]);
}

#[test]
fn bad_disks() {
    let world = World::new("bad-disks");
    let host = &world.host;
    let at = |name: &str| world.path(name);
    refused(host, &["protect", "x", "--disk", &at("lower/b.img")], 4, "afterimage mount ");
    refused(host, &["protect", "x", "--disk", &at("mounted/missing.img")], 6, "missing.img");
    refused(host, &["protect", "x", "--disk", &at("mounted/a.img")], 4, "web1");
    refused(host, &["protect", "web1", "--disk", &at("mounted/b.img")], 4, "web1");
    fs::create_dir(at("mounted/folder")).unwrap();
    refused(host, &["protect", "x", "--disk", &at("mounted/folder")], 4, "regular file");
    run("mkfifo", &[&at("lower/fifo")]);
    refused(host, &["protect", "x", "--disk", &at("mounted/fifo")], 4, "regular file");
    symlink("b.img", at("mounted/link.img")).unwrap();
    // Sector 16 of an ISO image says so.
    let mut iso = vec![0; 40 * 2048];
    iso[16 * 2048..16 * 2048 + 6].copy_from_slice(b"\x01CD001");
    fs::write(at("mounted/cd.iso"), iso).unwrap();
    refused(host, &["protect", "x", "--disk", &at("mounted/cd.iso")], 4, "ISO");
    let overlay = at("mounted/overlay.qcow2");
    run(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-u", "-b", "gone.qcow2", "-F", "qcow2", &overlay, "1M"],
    );
    let out = host.try_run(&["protect", "x", "--disk", &overlay]);
    assert!(out.code != 0 && out.stderr.contains("gone.qcow2"), "{} {}", out.code, out.stderr);
    fs::create_dir(at("mounted/empty")).unwrap();
    refused(host, &["protect", "x", "--dir", &at("mounted/empty")], 4, "no disk in it");
    refused(
        host,
        &["protect", "x", "--disk", &at("mounted/b.img"), "--to", &at("mounted/vault")],
        4,
        "vault",
    );
}

#[test]
fn bad_names() {
    let world = World::new("bad-names");
    let host = &world.host;
    let disk = world.path("mounted/b.img");
    for name in ["a/b", "..", "."] {
        refused(host, &["protect", name, "--disk", &disk], 2, name);
    }
    let unknown: [&[&str]; 6] = [
        &["points", "nobody"],
        &["sync", "nobody", "--wait"],
        &["unprotect", "nobody"],
        &["pause", "nobody"],
        &["restore", "nobody", "--to", "/nowhere"],
        &["status", "nobody"],
    ];
    for args in unknown {
        refused(host, args, 6, "nobody");
    }
    let to = world.path("to");
    refused(host, &["restore", "web1", "--point", "9999-00000000", "--to", &to], 6, "9999-00000000");
    refused(host, &["protect", "x", "--disk", &disk, "--policy", "nothing"], 6, "nothing");
    refused(host, &["policy", "show", "nothing"], 6, "nothing");
    refused(host, &["job", "show", "12345"], 6, "12345");
    // Nothing that exists is overwritten without --force.
    let newest = host.newest("web1").id;
    host.run(&["restore", "web1", "--point", &newest, "--to", &to]);
    refused(host, &["restore", "web1", "--point", &newest, "--to", &to], 4, "--force");
    host.run(&["restore", "web1", "--point", &newest, "--to", &to, "--force"]);
}

#[test]
fn without_a_daemon_and_without_rights() {
    let scratch = Scratch::new("nobody");
    let host = Host::new("nobody", &scratch.path().join("state"));
    refused(&host, &["status"], 7, "does not run");
    let out = Command::new("setpriv")
        .args(["--reuid=65534", "--clear-groups", env!("CARGO_BIN_EXE_afterimage"), "mount", "/tmp"])
        .output()
        .unwrap();
    // The checkout may be closed to others; then there is no program to be refused by.
    if is_open_to_all(Path::new(env!("CARGO_BIN_EXE_afterimage"))) {
        assert_eq!(out.status.code(), Some(4), "{}", String::from_utf8_lossy(&out.stderr));
    }
    // State on a disk of the mount is refused.
    let (lower, mounted) = (scratch.dir("lower"), scratch.dir("mounted"));
    host.mount(&lower, &mounted);
    let inner = Host::new("inner", &scratch.dir("mounted").join("state"));
    let out = inner.try_run(&["mount", text(&lower), text(&mounted)]);
    assert_ne!(out.code, 0, "state on the mount itself");
}

fn is_open_to_all(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.ancestors().all(|p| fs::metadata(p).is_ok_and(|m| m.permissions().mode() & 0o001 != 0))
}
