//! Real guests: they boot through the mount, work while they are protected, and what they had
//! synced before a point is in it.

use crate::common::{Guest, Host, Scratch, text};

/// The guest works through the mount; its disk restored from a point boots and holds what the
/// guest had synced before the cut.
fn works_and_comes_back(format: &str, cache: &str) {
    let scratch = Scratch::new(&format!("guest-{format}-{cache}"));
    let (lower, mounted) = (scratch.dir("lower"), scratch.dir("mounted"));
    let file = format!("web1.{format}");
    Guest::disk(&lower.join(&file), format);
    let host = Host::new(cache, &scratch.path().join("state"));
    host.mount(&lower, &mounted);
    let disk = mounted.join(&file);
    let guest = Guest::boot(&disk, format, cache, "work", 0, &[]);
    guest.wait_synced(3);
    host.protect("web1", &[&disk], "1s");
    let synced = guest.wait_synced(guest.synced() + 9);
    host.sync("web1");
    let point = host.newest("web1").id;
    guest.wait_synced(guest.synced() + 2);
    guest.kill();
    let to = scratch.path().join("restored");
    host.run(&["restore", "web1", "--point", &point, "--to", text(&to)]);
    let found = Guest::verify(&to.join(&file), format);
    assert!(found >= synced, "{found} records restored, {synced} were synced before the cut");
    println!("figures: {format}, cache={cache}: {synced} records synced before the point, {found} in it");
}

#[test]
fn qcow2_without_host_cache() {
    works_and_comes_back("qcow2", "none");
}

#[test]
fn raw_with_writeback() {
    works_and_comes_back("raw", "writeback");
}

#[test]
fn qcow2_with_directsync() {
    works_and_comes_back("qcow2", "directsync");
}

/// A guest that was started before the mount writes around it: it cannot be protected, and the
/// refusal says by whom and what to do.
#[test]
fn a_disk_that_is_open_beneath_the_mount_is_refused() {
    let scratch = Scratch::new("beneath");
    let images = scratch.dir("images");
    let disk = images.join("web1.raw");
    Guest::disk(&disk, "raw");
    let guest = Guest::boot(&disk, "raw", "writeback", "work", 0, &[]);
    guest.wait_synced(1);
    let host = Host::new("beneath", &scratch.path().join("state"));
    let said = host.run(&["mount", text(&images)]);
    assert!(said.contains("qemu-system"), "the mount names who has it open: {said}");
    let out = host.try_run(&["protect", "web1", "--disk", text(&disk)]);
    assert_eq!(out.code, 4, "{}{}", out.stdout, out.stderr);
    assert!(out.stderr.contains("qemu-system"), "{}", out.stderr);
    assert!(out.stderr.contains("next:"), "{}", out.stderr);
    guest.kill();
    host.protect("web1", &[&disk], "1s");
    assert!(!host.points("web1").is_empty());
}
