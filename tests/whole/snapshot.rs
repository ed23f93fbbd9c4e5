//! External snapshots and block commits of a working guest, as backup programs do them: the
//! overlay joins the VM, goes again, and every point checks clean and holds what was synced.

use std::fs;
use std::path::Path;

use serde_json::json;

use crate::common::{Guest, Host, Qmp, Scratch, rounds, text};

/// The newest point after everything that the guest has synced so far is opened through `top`.
fn newest_holds_all(host: &Host, guest: &Guest, scratch: &Scratch, top: &str) {
    let synced = guest.synced();
    host.sync("web1");
    let point = host.newest("web1").id;
    let to = scratch.path().join("restored");
    let _ = fs::remove_dir_all(&to);
    host.run(&["restore", "web1", "--point", &point, "--to", text(&to)]);
    all_check_clean(&to);
    let found = Guest::records(&to.join(top), "qcow2", scratch);
    assert!(found >= synced, "point {point} through {top}: {found} records, {synced} were synced");
}

/// Every image in a folder.
fn all_check_clean(folder: &Path) {
    let entries = fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let images = entries.map(|e| e.unwrap().path()).filter(|p| p.extension().is_some_and(|e| e == "qcow2"));
    assert!(images.map(|image| checks_clean(&image)).count() > 0, "no image in {}", folder.display());
}

/// `qemu-img check`: 0 clean, 3 only leaked clusters, as a power loss leaves them.
fn checks_clean(image: &Path) {
    let out = std::process::Command::new("qemu-img").args(["check", "-U", text(image)]).output().unwrap();
    let code = out.status.code();
    assert!(
        matches!(code, Some(0 | 3)),
        "{}: {}{}",
        image.display(),
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
}

#[test]
fn overlays_join_and_go() {
    let scratch = Scratch::new("snapshot");
    let sockets = tempfile::tempdir().unwrap();
    let (lower, mounted) = (scratch.dir("lower"), scratch.dir("mounted"));
    Guest::disk(&lower.join("base.qcow2"), "qcow2");
    let host = Host::new("snapshot", &scratch.path().join("state"));
    host.mount(&lower, &mounted);
    let base = mounted.join("base.qcow2");
    let socket = sockets.path().join("qmp");
    let monitor = format!("unix:{},server=on,wait=off", socket.display());
    let guest = Guest::boot(&base, "qcow2", "none", "work", 0, &["-qmp", &monitor]);
    guest.wait_synced(1);
    host.protect("web1", &[&base], "1s");
    let mut qmp = Qmp::connect(&socket);
    let rounds = rounds("AFTERIMAGE_SNAPSHOTS", 2);
    for round in 0..rounds {
        let name = format!("overlay-{round}.qcow2");
        let overlay = mounted.join(&name);
        let new = json!({"device": "d0", "snapshot-file": text(&overlay), "format": "qcow2"});
        qmp.run("blockdev-snapshot-sync", new);
        guest.wait_synced(guest.synced() + 3);
        newest_holds_all(&host, &guest, &scratch, &name);

        qmp.run("block-commit", json!({"device": "d0", "job-id": "commit"}));
        qmp.wait_event("BLOCK_JOB_READY");
        qmp.run("block-job-complete", json!({"device": "commit"}));
        qmp.wait_event("BLOCK_JOB_COMPLETED");
        guest.wait_synced(guest.synced() + 3);
        fs::remove_file(&overlay).unwrap();
        newest_holds_all(&host, &guest, &scratch, "base.qcow2");
    }
    // The other points, made by the interval at any instant, are clean too.
    let view = scratch.dir("view");
    host.run(&["point", "mount", text(&view)]);
    let points = host.points("web1");
    for point in &points {
        all_check_clean(&view.join("web1").join(&point.id));
    }
    host.run(&["point", "umount", text(&view)]);
    let events = host.json(&["events", "web1", "--limit", "1000"]);
    let kinds: Vec<&str> =
        events["events"].as_array().unwrap().iter().filter_map(|e| e["kind"].as_str()).collect();
    assert!(
        kinds.iter().any(|kind| kind.contains("join")),
        "no event tells of an overlay that joined: {kinds:?}"
    );
    println!("figures: {rounds} snapshots and commits, {} points checked", points.len());
}
