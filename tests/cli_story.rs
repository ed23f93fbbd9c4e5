//! What a person types, from the first mount to the last umount, and what they get wrong.

#[allow(dead_code, unused_imports)]
mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use common::{Host, Scratch, text};

const MIB: usize = 1 << 20;

/// Bytes that differ from each other and from those of other seeds.
fn noise(bytes: usize, seed: u8) -> Vec<u8> {
    let mut out = vec![0; bytes];
    blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut out);
    out
}

/// Runs a command that must be refused: three lines, this exit code, these words. What a job
/// told of its steps before comes before them, so JSON keeps it quiet.
fn refused(host: &Host, code: i32, words: &str, args: &[&str]) {
    let mut quiet = vec!["--json"];
    quiet.extend(args);
    let out = host.try_run(&quiet);
    assert_eq!(out.code, code, "{args:?}: {}{}", out.stdout, out.stderr);
    let lines: Vec<&str> = out.stderr.lines().collect();
    assert_eq!(lines.len(), 3, "{args:?}: {}", out.stderr);
    for (line, begin) in lines.iter().zip(["error: ", "  why: ", "  next: "]) {
        assert!(line.starts_with(begin), "{args:?}: {}", out.stderr);
    }
    assert!(out.stderr.contains(words), "{args:?} lacks {words:?}: {}", out.stderr);
}

fn write_at(path: &Path, bytes: &[u8], offset: u64) {
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(bytes, offset).unwrap();
    file.sync_all().unwrap();
}

#[test]
fn from_the_first_mount_to_the_last_umount() {
    let scratch = Scratch::new("story");
    let (images, vms, view) = (scratch.dir("images"), scratch.dir("vms"), scratch.dir("view"));
    fs::write(images.join("a.raw"), noise(4 * MIB, 1)).unwrap();
    fs::write(images.join("b.raw"), noise(MIB, 2)).unwrap();
    let host = Host::new("story", &scratch.dir("state"));
    host.mount(&images, &vms);
    let disk = vms.join("a.raw");
    host.protect("web1", &[&disk], "1s");
    let told = host.run(&["status"]);
    assert!(told.lines().last().unwrap().starts_with("not protected: "), "{told}");
    assert!(told.lines().last().unwrap().contains("b.raw"), "{told}");

    write_at(&disk, &noise(8192, 3), 12288);
    let content = fs::read(&disk).unwrap();
    let synced = host.json(&["sync", "web1", "--wait"]);
    let newest = host.newest("web1");
    assert_eq!(synced["point"]["id"].as_str(), Some(newest.id.as_str()));
    let points = host.points("web1");
    assert!(points.len() >= 2 && points.is_sorted_by_key(|p| p.epoch), "{points:?}");

    host.run(&["point", "mount", text(&view)]);
    assert!(fs::read(view.join("web1").join(&newest.id).join("a.raw")).unwrap() == content);
    let first = fs::read(view.join("web1").join(&points[0].id).join("a.raw")).unwrap();
    assert!(first == noise(4 * MIB, 1));
    host.run(&["point", "umount", text(&view)]);

    let to = scratch.path().join("restored");
    host.run(&["restore", "web1", "--to", text(&to)]);
    assert!(fs::read(to.join("a.raw")).unwrap() == content);
    refused(&host, 4, "--force", &["restore", "web1", "--to", text(&to)]);
    host.run(&["restore", "web1", "--point", &points[0].id, "--to", text(&to), "--force"]);
    assert!(fs::read(to.join("a.raw")).unwrap() == first);

    host.run(&["point", "pin", "web1", &points[0].id]);
    assert_eq!(host.json(&["points", "web1"])["points"][0]["pinned"], true);
    host.run(&["unprotect", "web1"]);
    assert_eq!(host.points("web1").len(), points.len(), "unprotect keeps points");
    host.run(&["--yes", "unprotect", "web1", "--purge"]);
    host.run(&["umount", text(&vms)]);
    assert!(fs::read(images.join("a.raw")).unwrap() == content);
    assert_eq!(fs::read_dir(&images).unwrap().count(), 2, "nothing of ours stays behind");
    let jobs = host.json(&["jobs"]);
    assert!(jobs["jobs"].as_array().unwrap().iter().any(|j| j["kind"] == "protect" && j["state"] == "done"));
}

#[test]
fn every_file_of_ours_can_be_inspected_while_the_daemon_works() {
    let scratch = Scratch::new("inspect");
    let (images, vms) = (scratch.dir("images"), scratch.dir("vms"));
    fs::write(images.join("a.raw"), noise(MIB, 1)).unwrap();
    let host = Host::new("inspect", &scratch.dir("state"));
    host.mount(&images, &vms);
    host.protect("web1", &[&vms.join("a.raw")], "1h");
    write_at(&vms.join("a.raw"), &[7; 4096], 8192);
    let hrl = fs::read_dir(&images).unwrap().map(|e| e.unwrap().path());
    let hrl = hrl.filter(|p| p.extension().is_some_and(|e| e == "hrl")).collect::<Vec<_>>();
    assert_eq!(hrl.len(), 1, "{hrl:?}");
    // The mark is in memory until it is asked for.
    let said = host.json(&["inspect", text(&hrl[0])]);
    assert_eq!(said["report"]["blocks"], serde_json::json!([{"offset": 2, "length": 1}]), "{said}");
    host.sync("web1");
    let mut stack = vec![host.state().to_owned()];
    let mut kinds = std::collections::BTreeSet::new();
    while let Some(path) = stack.pop() {
        if path.is_dir() {
            stack.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
            continue;
        }
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let foreign = ["img", "sums", "db", "db-wal", "db-shm", "sock", "lock"];
        if foreign.iter().any(|f| name.ends_with(f)) || name == "daemon.log" {
            continue;
        }
        let said = host.json(&["inspect", text(&path)]);
        assert_eq!(said["healthy"], true, "{said}");
        kinds.insert(said["kind"].as_str().unwrap().to_owned());
    }
    for kind in ["hot-region log", "manifest of an epoch", "undo log", "state of a VM in a vault"] {
        assert!(kinds.contains(kind), "{kind} is not among {kinds:?}");
    }
}

#[test]
fn a_daemon_that_was_killed_comes_back_with_its_mounts() {
    let scratch = Scratch::new("comes-back");
    let (images, vms) = (scratch.dir("images"), scratch.dir("vms"));
    fs::write(images.join("a.raw"), noise(MIB, 1)).unwrap();
    let host = Host::new("comes-back", &scratch.dir("state"));
    host.mount(&images, &vms);
    host.protect("web1", &[&vms.join("a.raw")], "1s");
    let before = host.daemon_pid();
    host.kill();
    assert_ne!(host.daemon_pid(), before, "status starts it again");
    write_at(&vms.join("a.raw"), &[9; 4096], 0);
    host.sync("web1");
    host.stop();
    let told = host.try_run(&["start"]);
    assert_eq!(told.code, 0, "{}", told.stderr);
    assert_eq!(fs::read(vms.join("a.raw")).unwrap()[..4096], [9; 4096]);
    host.run(&["unprotect", "web1"]);
    host.run(&["umount", text(&vms)]);
    assert_eq!(host.json(&["mounts"])["mounts"], serde_json::json!([]));
}

#[test]
fn the_mount_helper_waits_until_the_mount_serves() {
    let scratch = Scratch::new("helper");
    let (images, vms) = (scratch.dir("images"), scratch.dir("vms"));
    fs::write(images.join("a.raw"), b"a disk").unwrap();
    let host = Host::new("helper", &scratch.dir("state"));
    let options = format!("rw,nodev,_netdev,state={}", text(host.state()));
    let out = Command::new(env!("CARGO_BIN_EXE_afterimage"))
        .args([text(&images), text(&vms), "-o", &options])
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(fs::read(vms.join("a.raw")).unwrap(), b"a disk");
    host.run(&["umount", text(&vms)]);
}

#[test]
fn bad_input_is_refused_with_the_remedy() {
    let scratch = Scratch::new("refused");
    let (images, vms, beside) = (scratch.dir("images"), scratch.dir("vms"), scratch.dir("beside"));
    fs::write(images.join("a.raw"), noise(MIB, 1)).unwrap();
    let mut cd = vec![0; 40 << 10];
    cd[32769..32774].copy_from_slice(b"CD001");
    fs::write(images.join("cd.iso"), cd).unwrap();
    fs::create_dir(images.join("folder")).unwrap();
    fs::write(beside.join("c.raw"), noise(MIB, 3)).unwrap();
    let host = Host::new("refused", &scratch.dir("state"));
    host.mount(&images, &vms);
    let outside = beside.join("c.raw");
    let at = |name: &str| text(&vms.join(name)).to_owned();
    let [a, missing, folder, iso] = ["a.raw", "missing.raw", "folder", "cd.iso"].map(at);
    let cases: &[(i32, &str, &[&str])] = &[
        (4, "afterimage mount", &["protect", "x", "--disk", text(&outside)]),
        (6, "", &["protect", "x", "--disk", &missing]),
        (4, "", &["protect", "x", "--disk", &folder]),
        (4, "ISO", &["protect", "x", "--disk", &iso]),
        (6, "policy list", &["protect", "x", "--disk", &a, "--policy", "nope"]),
        (4, "", &["mount", text(&images), text(&vms)]),
        (6, "", &["umount", text(&beside)]),
        (6, "", &["sync", "nobody"]),
        (6, "", &["points", "nobody"]),
        (6, "", &["status", "nobody"]),
        (6, "", &["restore", "nobody", "--to", text(&beside)]),
        (6, "", &["unprotect", "nobody"]),
        (6, "", &["pause", "nobody"]),
        (6, "", &["policy", "show", "nope"]),
        (6, "afterimage jobs", &["job", "show", "99"]),
    ];
    for (code, words, args) in cases {
        refused(&host, *code, words, args);
    }
    host.protect("web1", &[&vms.join("a.raw")], "1s");
    let point = host.newest("web1").id;
    let cases: &[(i32, &str, &[&str])] = &[
        (4, "web1", &["protect", "web2", "--disk", &a]),
        (4, "", &["protect", "web1", "--disk", &a]),
        (6, "afterimage points", &["restore", "web1", "--point", "99-00000000", "--to", text(&beside)]),
        (6, "", &["restore", "web1", "--point", "2001-01-01 00:00", "--to", text(&beside)]),
        (6, "", &["point", "pin", "web1", "99-00000000"]),
        (4, "newest", &["point", "delete", "web1", &point]),
        (2, "", &["set", "web1", "--interval", "1ms"]),
    ];
    for (code, words, args) in cases {
        refused(&host, *code, words, args);
    }
    let in_use = fs::File::open(vms.join("a.raw")).unwrap();
    refused(&host, 4, &std::process::id().to_string(), &["umount", text(&vms)]);
    drop(in_use);
    refused(&host, 4, "state folder", &["mount", text(scratch.path())]);
    refused(&host, 4, "", &["protect", "x", "--disk", &a, "--to", text(&vms.join("vault"))]);
    host.run(&["unprotect", "web1"]);
    host.run(&["umount", text(&vms)]);
}
