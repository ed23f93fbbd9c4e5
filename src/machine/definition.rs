//! The definition of a VM: libvirt's XML where a domain uses one of its disks, else a
//! `machine.toml` with what is known.
//!
//! libvirt is asked through `virsh` and only for a few seconds: protection never waits for it,
//! and a host without it is as good. The XML is taken without secrets.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::image::ImageFormat;
use crate::base::{Clock, Error, ErrorKind, Result, SystemClock, VmId, VmName};
use crate::format::manifest::DefinitionFile;

/// File name of our own definition.
pub const MACHINE_FILE: &str = "machine.toml";
/// File name of libvirt's definition.
pub const LIBVIRT_FILE: &str = "libvirt.xml";
/// All questions to libvirt together take at most so long.
pub const VIRSH_SECONDS_MAX: u64 = 5;

const OUTPUT_BYTES_MAX: u64 = 4 << 20;

/// `machine.toml`: enough to start the VM by hand.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Definition {
    /// Name of the VM.
    pub name: VmName,
    /// Command line that starts it, if somebody told.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub command: Option<String>,
    /// Its disks.
    #[serde(rename = "disk", default)]
    pub disks: Vec<DefinedDisk>,
}

/// A disk in `machine.toml`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DefinedDisk {
    /// Path relative to the folder of a point.
    pub path: PathBuf,
    /// Format of the image.
    pub format: ImageFormat,
}

impl Definition {
    /// The file that goes into every manifest.
    pub fn file(&self) -> Result<DefinitionFile> {
        let content = toml::to_string_pretty(self).map_err(|e| {
            Error::new(ErrorKind::Internal, format!("{MACHINE_FILE} cannot be written")).source(e)
        })?;
        Ok(DefinitionFile { name: MACHINE_FILE.to_owned(), content })
    }

    /// Reads a `machine.toml`. The error tells line and column.
    pub fn decode(text: &str) -> Result<Self> {
        toml::from_str(text).map_err(|e| {
            Error::new(ErrorKind::Configuration, format!("{MACHINE_FILE} cannot be read")).source(e)
        })
    }
}

/// A libvirt domain that uses one of the disks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Domain {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: VmId,
    /// Its XML, inactive form where there is one, without secrets.
    pub xml: String,
}

impl Domain {
    /// The file that goes into every manifest.
    pub fn file(&self) -> DefinitionFile {
        DefinitionFile { name: LIBVIRT_FILE.to_owned(), content: self.xml.clone() }
    }
}

/// How libvirt is asked.
#[derive(Clone, Debug)]
pub struct Virsh {
    /// The program; looked up in PATH if it has no slash.
    pub program: PathBuf,
    /// All questions together take at most so long.
    pub patience: Duration,
}

impl Default for Virsh {
    fn default() -> Self {
        Self { program: PathBuf::from("virsh"), patience: Duration::from_secs(VIRSH_SECONDS_MAX) }
    }
}

impl Virsh {
    /// The domain, running or only defined, that uses one of `disks` (paths in the mounted
    /// view). `None`: no libvirt here, it does not answer in time, or no such domain; the reason
    /// goes to the log where an operator could want it.
    pub fn domain_of(&self, disks: &[PathBuf]) -> Option<Domain> {
        let since = SystemClock::default();
        let wanted: Vec<PathBuf> = disks.iter().map(|p| real(p)).collect();
        let names = self.ask(&["list", "--all", "--name"], &since)?;
        for name in names.lines().map(str::trim).filter(|name| !name.is_empty()) {
            let Some(listed) = self.ask(&["domblklist", "--details", "--domain", name], &since) else {
                continue;
            };
            if sources(&listed).iter().any(|source| wanted.contains(&real(source))) {
                return self.domain(name, &since);
            }
        }
        None
    }

    fn domain(&self, name: &str, since: &SystemClock) -> Option<Domain> {
        let uuid = self.ask(&["domuuid", "--domain", name], since)?.trim().parse().ok()?;
        let xml = self
            .ask(&["dumpxml", "--inactive", "--domain", name], since)
            .or_else(|| self.ask(&["dumpxml", "--domain", name], since))?;
        Some(Domain { name: name.to_owned(), uuid, xml })
    }

    /// The output of one question; `None` if it fails or takes too long.
    fn ask(&self, arguments: &[&str], since: &SystemClock) -> Option<String> {
        let mut child = Command::new(&self.program)
            .args(["-c", "qemu:///system", "-q"])
            .args(arguments)
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let text = read_for(&mut child, self.patience.saturating_sub(since.monotonic()));
        if text.is_none() {
            log::warn!("libvirt did not answer `virsh {}` in time", arguments.join(" "));
            // It may have ended meanwhile; then there is nothing to kill.
            let _ = child.kill();
        }
        let ended = child.wait().ok()?;
        text.filter(|_| ended.success())
    }
}

/// Reads what a child says until it closes its output; `None` if it takes longer.
fn read_for(child: &mut Child, patience: Duration) -> Option<String> {
    let output = child.stdout.take()?;
    let (sender, receiver) = crossbeam_channel::bounded(1);
    std::thread::Builder::new()
        .name("virsh".to_owned())
        .spawn(move || {
            let mut bytes = Vec::new();
            let read = output.take(OUTPUT_BYTES_MAX).read_to_end(&mut bytes);
            // Nobody listens any more after that time.
            let _ = sender.send(read.map(|_| String::from_utf8_lossy(&bytes).into_owned()));
        })
        .ok()?;
    receiver.recv_timeout(patience).ok()?.ok()
}

/// The paths in the answer of `domblklist --details`: type, device, target, source.
fn sources(listed: &str) -> Vec<PathBuf> {
    let source = |line: &str| {
        let mut rest = line.trim();
        for _ in 0..3 {
            rest = rest.split_once(char::is_whitespace)?.1.trim_start();
        }
        rest.starts_with('/').then(|| PathBuf::from(rest))
    };
    listed.lines().filter_map(source).collect()
}

/// The path without symlinks, if it exists.
fn real(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn fake(dir: &Path, script: &str) -> Virsh {
        let program = dir.join("virsh");
        std::fs::write(&program, format!("#!/bin/sh\n{script}")).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        Virsh { program, patience: Duration::from_secs(60) }
    }

    #[test]
    fn machine_file_round_trips() {
        let definition = Definition {
            name: "web 1".parse().unwrap(),
            command: Some("qemu-system-x86_64 -m 1G".to_owned()),
            disks: vec![DefinedDisk { path: "sub/a b.qcow2".into(), format: ImageFormat::Qcow2 }],
        };
        let file = definition.file().unwrap();
        assert_eq!(file.name, MACHINE_FILE);
        assert_eq!(Definition::decode(&file.content).unwrap(), definition);
        assert!(Definition::decode("name = \"a\"\nother = 1").unwrap_err().to_string().contains("line 2"));
    }

    #[test]
    fn finds_the_domain_that_uses_a_disk() {
        let dir = tempfile::tempdir().unwrap();
        let virsh = fake(
            dir.path(),
            r#"shift 3
case "$1 $4" in
"list ") echo other; echo "my vm"; echo ;;
"domblklist other") echo " file disk vda -" ;;
"domblklist my vm") printf ' Type   Device   Target   Source\n--------\n file   disk     vda      /vm/a b.qcow2\n' ;;
"domuuid "*) echo 6695eb01-f6a4-8304-79aa-97f2502e193f ;;
"dumpxml my vm") echo "<domain/>" ;;
*) exit 1 ;;
esac"#,
        );
        let domain = virsh.domain_of(&[PathBuf::from("/vm/a b.qcow2")]).unwrap();
        assert_eq!(domain.name, "my vm");
        assert_eq!(domain.uuid.to_string(), "6695eb01-f6a4-8304-79aa-97f2502e193f");
        assert_eq!(domain.file().content, "<domain/>\n");
        assert_eq!(virsh.domain_of(&[PathBuf::from("/vm/b")]), None);
    }

    #[test]
    fn no_libvirt_and_one_that_hangs_are_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let absent = Virsh { program: dir.path().join("none"), ..Virsh::default() };
        assert_eq!(absent.domain_of(&[PathBuf::from("/vm/a")]), None);
        let hanging = Virsh { patience: Duration::from_millis(50), ..fake(dir.path(), "exec sleep 600") };
        assert_eq!(hanging.domain_of(&[PathBuf::from("/vm/a")]), None);
    }
}
