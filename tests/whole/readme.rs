//! The commands of the README's section "On your own host" do what it says, in its order, on a
//! machine of their own: a private view of the file system in which `/var/lib` and `/mnt` are
//! fresh folders, and the programs are installed into a folder.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use crate::common::{Guest, Scratch, package, text};

const SECTION: &str = "## On your own host";

/// The lines of all shell blocks of the section.
fn commands() -> Vec<String> {
    let readme = fs::read_to_string(package().join("README.md")).unwrap();
    let section = readme.split(SECTION).nth(1).expect("the section is there");
    let section = section.split("\n## ").next().unwrap();
    let mut commands = Vec::new();
    for block in section.split("```sh\n").skip(1) {
        let block = block.split("```").next().unwrap();
        commands.extend(block.lines().filter(|l| !l.trim().is_empty()).map(str::to_owned));
    }
    commands
}

#[test]
fn on_your_own_host() {
    let commands = commands();
    for wanted in ["scripts/install", "doctor", "mount", "protect", "status", "restore", "umount", "--remove"]
    {
        assert!(commands.iter().any(|c| c.contains(wanted)), "the README no longer shows {wanted}");
    }
    let scratch = Scratch::alone("readme");
    let (var_lib, mnt, root) = (scratch.dir("var-lib"), scratch.dir("mnt"), scratch.dir("root"));
    fs::create_dir_all(var_lib.join("libvirt/images")).unwrap();
    Guest::disk(&var_lib.join("libvirt/images/web1.qcow2"), "qcow2");

    let mut script = String::from("set -eu\n");
    script += "trap 'afterimage stop >/dev/null 2>&1 || true' EXIT\n";
    script += &format!("mount --bind '{}' /var/lib\n", text(&var_lib));
    script += &format!("mount --bind '{}' /mnt\n", text(&mnt));
    script += &format!("cd '{}'\n", text(&package()));
    for command in &commands {
        // `doctor` finds what this machine lacks, which is not what is tested here.
        let tolerant = if command.ends_with("doctor") { " || true" } else { "" };
        script += &format!("echo '$ {}'\n{command}{tolerant}\n", command.replace('\'', "'\\''"));
    }
    script += "test -s /var/lib/libvirt/restored/web1.qcow2\n";
    script += "qemu-img check -q /var/lib/libvirt/restored/web1.qcow2\n";
    let file = scratch.path().join("commands");
    fs::write(&file, script).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o700)).unwrap();

    let path = format!("{}/usr/local/bin:{}", root.display(), std::env::var("PATH").unwrap());
    let out = Command::new("timeout")
        .args(["-k", "10", "300", "unshare", "--mount", "--propagation", "private", "bash", text(&file)])
        .env("PATH", path)
        .env("DESTDIR", &root)
        .env("AFTERIMAGE_BIN", env!("CARGO_BIN_EXE_afterimage"))
        .output()
        .unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{}:\n{said}", out.status);
    let left: Vec<_> = fs::read_dir(root.join("usr/local/bin")).unwrap().collect();
    assert!(left.is_empty(), "scripts/install --remove leaves {left:?}");
}

/// The unit is where systemd looks for it, and says what the boot order needs.
#[test]
fn the_unit_is_ordered_before_libvirt() {
    let unit = fs::read_to_string(package().join("scripts/packaging/afterimage.service")).unwrap();
    for wanted in ["Type=notify", "WatchdogSec=", "Before=libvirtd.service", "libvirt-guests.service"] {
        assert!(unit.contains(wanted), "the unit lacks {wanted}");
    }
}

/// Every message that the README explains is one that the product says.
#[test]
fn explained_messages_exist() {
    let readme = fs::read_to_string(package().join("README.md")).unwrap();
    let section = readme.split("## When something is wrong").nth(1).expect("the section is there");
    let rows = section.split("\n## ").next().unwrap().lines().filter(|l| l.starts_with("| "));
    let messages: Vec<&str> =
        rows.flat_map(|row| row.split(" | ").next().unwrap().split('`').skip(1).step_by(2)).collect();
    assert!(messages.len() > 5, "{messages:?}");
    let mut folders = vec![package().join("src")];
    let mut source = String::new();
    while let Some(folder) = folders.pop() {
        for path in fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()) {
            match path.is_dir() {
                true => folders.push(path),
                false => source += &fs::read_to_string(&path).unwrap(),
            }
        }
    }
    for message in messages {
        assert!(source.contains(message), "nothing says {message:?}");
    }
}
