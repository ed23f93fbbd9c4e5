//! What the command line says to bad input before any daemon is asked: three lines on standard
//! error, the documented exit code, and with `--json` the same as an object.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

fn afterimage(state: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_afterimage"));
    command.arg("--state").arg(state).args(args).stdin(Stdio::null());
    command.output().unwrap()
}

/// Exit code and the three lines.
fn refused(state: &Path, args: &[&str]) -> (i32, [String; 3]) {
    let out = afterimage(state, args);
    let text = String::from_utf8(out.stderr).unwrap();
    let lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let lines: [String; 3] = lines.try_into().unwrap_or_else(|l| panic!("{args:?} said {l:#?}"));
    assert!(lines[0].starts_with("error: "), "{args:?}: {text}");
    assert!(lines[1].starts_with("  why: "), "{args:?}: {text}");
    assert!(lines[2].starts_with("  next: "), "{args:?}: {text}");
    assert!(out.stdout.is_empty(), "{args:?} printed an answer as well");
    (out.status.code().unwrap(), lines)
}

#[test]
fn bad_input_is_refused_in_three_lines() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let file = dir.path().join("file");
    std::fs::write(&file, b"no directory, and none of our files").unwrap();
    let file = file.to_str().unwrap();
    let missing = dir.path().join("missing");
    let missing = missing.to_str().unwrap();
    let here = dir.path().to_str().unwrap();
    let cases: &[(&[&str], i32, &str)] = &[
        (&["frobnicate"], 2, "unrecognized subcommand"),
        (&["mount"], 2, "required arguments are missing"),
        (&["mount", missing], 6, "cannot be mounted"),
        (&["mount", here, missing], 6, "cannot be mounted"),
        (&["mount", file], 2, "cannot be mounted"),
        (&["mount", here, "-o", "singel_host"], 2, "unknown mount option"),
        (&["protect", "web1"], 2, "required arguments are missing"),
        (&["protect", "a/b", "--disk", file], 2, "invalid value 'a/b'"),
        (&["protect", "..", "--disk", file], 2, "invalid value '..'"),
        (&["protect", "web1", "--disk", file, "--interval", "soon"], 2, "invalid value 'soon'"),
        (&["protect", "web1", "--disk", file, "--exclude", "*.iso"], 2, ""),
        (&["sync", "web1", "--timeout", "3s"], 2, "required arguments are missing"),
        (&["restore", "web1", "--to", here, "--point", "never"], 2, "\"never\" names no point"),
        (&["point", "pin", "web1", "25:00"], 2, "\"25:00\" names no point"),
        (&["inspect", missing], 6, "cannot inspect"),
        (&["inspect", file], 2, "cannot inspect"),
        (&["inspect", here], 2, "cannot inspect"),
        (&["man", missing], 6, "is no directory"),
        (&["status"], 7, "the daemon does not run"),
        (&["points", "web1"], 7, "the daemon does not run"),
        (&["jobs"], 7, "the daemon does not run"),
        (&["events"], 7, "the daemon does not run"),
        (&["policy", "list"], 7, "the daemon does not run"),
    ];
    for (args, code, what) in cases {
        let (exit, lines) = refused(&state, args);
        assert_eq!(exit, *code, "{args:?}: {lines:#?}");
        assert!(lines[0].contains(what), "{args:?}: {lines:#?}");
    }
    assert!(!state.exists(), "a refused command made a state folder");
}

#[test]
fn the_mount_helper_is_refused_the_same_way() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("missing");
    let out = Command::new(env!("CARGO_BIN_EXE_afterimage"))
        .arg(&missing)
        .arg(dir.path())
        .args(["-o", "rw,nodev,_netdev"])
        .arg("-o")
        .arg(format!("state={}", dir.path().join("state").display()))
        .output()
        .unwrap();
    assert_eq!(out.status.code(), Some(6));
    assert_eq!(String::from_utf8(out.stderr).unwrap().lines().count(), 3);
}

#[test]
fn who_is_not_root_is_told_to_be() {
    let dir = tempfile::tempdir().unwrap();
    // Where anybody may run it: the folder of the build may be closed.
    let program = dir.path().join("afterimage");
    std::fs::copy(env!("CARGO_BIN_EXE_afterimage"), &program).unwrap();
    let all = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(dir.path(), all).unwrap();
    let run = |args: &[&str]| {
        let mut command = Command::new(&program);
        command.arg("--state").arg(dir.path().join("state")).args(args).uid(65534).gid(65534);
        command.output().unwrap()
    };
    let out = run(&["mount", "/tmp"]);
    let text = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(4), "{text}");
    assert!(text.lines().nth(2).unwrap().contains("sudo afterimage"), "{text}");
    assert_eq!(run(&["status"]).status.code(), Some(7));
    assert_eq!(run(&["doctor"]).status.code(), Some(1));
}

#[test]
fn json_errors_are_objects_too() {
    let dir = tempfile::tempdir().unwrap();
    let out = afterimage(&dir.path().join("state"), &["--json", "status"]);
    assert_eq!(out.status.code(), Some(7));
    let v: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(v["schema"], "afterimage.error/1");
    assert_eq!(v["kind"], "no-daemon");
    assert!(v["hint"].as_str().unwrap().contains("start"));
    assert_eq!(String::from_utf8(out.stderr).unwrap().lines().count(), 3);
}

#[test]
fn help_manual_and_completions_come_out() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let help = afterimage(&state, &["--help"]);
    assert!(help.status.success());
    assert!(String::from_utf8_lossy(&help.stdout).contains("Exit codes:"));
    assert_eq!(afterimage(&state, &["completions", "bash"]).status.code(), Some(0));
    assert!(afterimage(&state, &["man"]).stdout.starts_with(b".ie"));
    assert_eq!(afterimage(&state, &["man", dir.path().to_str().unwrap()]).status.code(), Some(0));
    assert!(dir.path().join("afterimage-protect.1").exists());
    let doctor = afterimage(&state, &["--json", "doctor"]);
    let v: serde_json::Value = serde_json::from_slice(&doctor.stdout).unwrap();
    assert_eq!(v["schema"], "afterimage.doctor/1");
    assert_eq!(doctor.status.success(), v["ok"].as_bool().unwrap());
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_afterimage"))
        .args(["completions", "bash"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let out = child.wait_with_output().unwrap();
    assert!(out.status.success());
    assert!(out.stderr.is_empty(), "{}", String::from_utf8_lossy(&out.stderr));
}
