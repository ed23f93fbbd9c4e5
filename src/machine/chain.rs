//! Backing chains: which files together are one disk of a guest.
//!
//! A chain is followed from the overlay down, by the names in the qcow2 headers, as QEMU would:
//! a relative name counts from the folder of the file that has it. Names come from images, and
//! so from guests: every file is opened by the caller's closure, which decides what may be
//! opened (the host opens only below its mounts). A backing format that the overlay declares
//! goes before the probe, so that a raw base whose guest wrote a qcow2 header into it ends the
//! chain, as it does in QEMU.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use super::image::{ImageFormat, ImageInfo, probe};
use crate::base::error::Context;
use crate::base::limits::DISKS_PER_VM_MAX;
use crate::base::shell::shell;
use crate::base::{Error, ErrorKind, FileKey, Result};

/// One file of a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChainLink {
    /// Its path: as given for the first, from the header above for the others.
    pub path: PathBuf,
    /// What it is.
    pub info: ImageInfo,
    /// Which file it is.
    pub key: FileKey,
}

/// A name of a backing file, as QEMU reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackingName {
    /// A path from the root.
    Absolute(PathBuf),
    /// A path from the folder of the overlay.
    Relative(PathBuf),
    /// No plain path: `json:`, `nbd:`, `https:` and so on.
    Other(String),
}

impl BackingName {
    /// Reads the name that a header has.
    pub fn parse(name: &str) -> Self {
        let path = name.strip_prefix("file:").unwrap_or(name);
        // A colon before the first slash makes it a protocol, for QEMU and for us.
        let head = path.split('/').next().unwrap_or_default();
        if path.is_empty() || head.contains(':') {
            return Self::Other(name.to_owned());
        }
        match Path::new(path).is_absolute() {
            true => Self::Absolute(PathBuf::from(path)),
            false => Self::Relative(PathBuf::from(path)),
        }
    }
}

/// Follows the chain of the image at `path` to its end. `open` gives the file at a path.
///
/// Errors: [`ErrorKind::DiskMissing`] names the missing file and who wants it;
/// [`ErrorKind::Refused`] for names that are no files, loops, and formats not understood.
pub fn resolve(path: &Path, open: &dyn Fn(&Path) -> Result<File>) -> Result<Vec<ChainLink>> {
    let mut links: Vec<ChainLink> = Vec::new();
    let mut next = Some((path.to_owned(), None::<String>));
    while let Some((path, declared)) = next.take() {
        let link = open_link(&path, declared.as_deref(), links.last(), open)?;
        if let Some(earlier) = links.iter().find(|l| l.key == link.key) {
            return Err(refused(
                path_of_first(&links, &path),
                format!("its backing chain comes back to {}", earlier.path.display()),
                format!("qemu-img info --backing-chain -U {}", shell(&path)),
            ));
        }
        link.info.verify_supported(&path)?;
        if let Some(name) = link.info.backing() {
            next = Some((backing_path(&path, name)?, link.info.backing_format().map(str::to_owned)));
        }
        links.push(link);
        if links.len() > DISKS_PER_VM_MAX {
            return Err(refused(
                path_of_first(&links, path.as_path()),
                format!("its backing chain has more than {DISKS_PER_VM_MAX} files"),
                "qemu-img rebase or commit, until it is shorter".to_owned(),
            ));
        }
    }
    Ok(links)
}

/// Where the backing file named `name` in the header of `overlay` is.
pub fn backing_path(overlay: &Path, name: &str) -> Result<PathBuf> {
    match BackingName::parse(name) {
        BackingName::Absolute(path) => Ok(tidy(&path)),
        BackingName::Relative(path) => {
            Ok(tidy(&overlay.parent().unwrap_or_else(|| Path::new("")).join(path)))
        }
        BackingName::Other(name) => Err(refused(
            overlay,
            format!("its backing file is {name:?}, which is no path of a file"),
            format!("qemu-img rebase -u -F FORMAT -b FILE {}", shell(overlay)),
        )),
    }
}

/// Without `.` and doubled slashes. `..` stays: what is above a symlink is the kernel's to say.
fn tidy(path: &Path) -> PathBuf {
    path.components().filter(|c| !matches!(c, Component::CurDir)).collect()
}

fn open_link(
    path: &Path,
    declared: Option<&str>,
    above: Option<&ChainLink>,
    open: &dyn Fn(&Path) -> Result<File>,
) -> Result<ChainLink> {
    let file = match open(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => {
            let Some(above) = above else { return Err(e) };
            let what = format!("the backing file {} is missing", path.display());
            return Err(Error::new(ErrorKind::DiskMissing, what)
                .why(format!("{} names it", above.path.display()))
                .hint(format!("qemu-img rebase -u -F FORMAT -b FILE {}", shell(&above.path))));
        }
        other => other?,
    };
    let metadata = file.metadata().context(|| format!("cannot look at {}", path.display()))?;
    if !metadata.is_file() {
        return Err(Error::new(ErrorKind::Refused, format!("{} is no disk image", path.display()))
            .why("it is no regular file")
            .hint("name a file, as in: afterimage protect web1 --disk FILE"));
    }
    let info = match declared {
        Some("raw") => ImageInfo::raw(metadata.len()),
        _ => probe(&file).map_err(|e| about(path, e))?,
    };
    if let (Some(declared), Some(above)) = (declared, above)
        && declared != info.format.name()
        && is_known(declared)
        && info.format != ImageFormat::Raw
    {
        let why =
            format!("{} says that it is {declared}, but it is {}", above.path.display(), info.format.name());
        return Err(refused(
            path,
            why,
            format!("qemu-img rebase -u -F {} -b FILE {}", info.format, shell(&above.path)),
        ));
    }
    Ok(ChainLink {
        path: path.to_owned(),
        info,
        key: FileKey { device: metadata.dev(), inode: metadata.ino() },
    })
}

fn is_known(format: &str) -> bool {
    ["qcow2", "qcow", "vmdk", "vdi", "vhdx", "vpc", "qed", "luks"].contains(&format)
}

fn path_of_first<'a>(links: &'a [ChainLink], otherwise: &'a Path) -> &'a Path {
    links.first().map_or(otherwise, |l| l.path.as_path())
}

fn refused(path: &Path, why: String, hint: String) -> Error {
    Error::new(ErrorKind::Refused, format!("disk {} cannot be protected", path.display())).why(why).hint(hint)
}

fn about(path: &Path, e: Error) -> Error {
    let kind = e.kind();
    let hint = e.next_step().unwrap_or("qemu-img check FILE").replace("IMAGE", &shell(path));
    Error::new(kind, format!("the image {} cannot be read", path.display()))
        .why(e.reason().unwrap_or_default())
        .hint(hint)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn qemu_img(dir: &Path, args: &[&str]) {
        let done = Command::new("qemu-img").args(args).current_dir(dir).status().unwrap();
        assert!(done.success(), "{args:?}");
    }

    fn open(path: &Path) -> Result<File> {
        File::open(path).context(|| format!("cannot open {}", path.display()))
    }

    fn names(links: &[ChainLink]) -> Vec<String> {
        links.iter().map(|l| l.path.file_name().unwrap().to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn names_are_read_as_qemu_reads_them() {
        assert_eq!(BackingName::parse("/a/b"), BackingName::Absolute("/a/b".into()));
        assert_eq!(BackingName::parse("file:/a/b"), BackingName::Absolute("/a/b".into()));
        assert_eq!(BackingName::parse("file:b"), BackingName::Relative("b".into()));
        assert_eq!(BackingName::parse("./a:b"), BackingName::Relative("./a:b".into()));
        for other in ["json:{}", "nbd://h/x", "a:b", ""] {
            assert!(matches!(BackingName::parse(other), BackingName::Other(_)), "{other}");
        }
    }

    #[test]
    fn a_chain_is_followed_through_folders() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("sub")).unwrap();
        qemu_img(dir.path(), &["create", "-q", "-f", "raw", "base", "1M"]);
        qemu_img(dir.path(), &["create", "-q", "-f", "qcow2", "-b", "../base", "-F", "raw", "sub/mid"]);
        let mid = dir.path().join("sub/mid");
        let mid = mid.to_str().unwrap();
        qemu_img(dir.path(), &["create", "-q", "-f", "qcow2", "-b", mid, "-F", "qcow2", "top"]);
        let links = resolve(&dir.path().join("top"), &open).unwrap();
        assert_eq!(names(&links), ["top", "mid", "base"]);
        std::fs::remove_file(dir.path().join("base")).unwrap();
        let missing = resolve(&dir.path().join("top"), &open).unwrap_err();
        assert_eq!(missing.kind(), ErrorKind::DiskMissing);
        assert!(missing.reason().unwrap().contains("mid"));
    }

    #[test]
    fn loops_and_specifications_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        for (name, backing) in [("a", "b"), ("b", "a"), ("c", "json:{\"driver\":\"null-co\"}")] {
            qemu_img(
                dir.path(),
                &["create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", "qcow2", name, "1M"],
            );
        }
        for name in ["a", "c"] {
            let refused = resolve(&dir.path().join(name), &open).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::Refused);
        }
    }

    #[test]
    fn a_raw_base_with_a_forged_header_ends_the_chain() {
        let dir = tempfile::tempdir().unwrap();
        qemu_img(
            dir.path(),
            &["create", "-q", "-u", "-f", "qcow2", "-b", "/etc/shadow", "-F", "raw", "base", "1M"],
        );
        qemu_img(dir.path(), &["create", "-q", "-u", "-f", "qcow2", "-b", "base", "-F", "raw", "top", "1M"]);
        let links = resolve(&dir.path().join("top"), &open).unwrap();
        assert_eq!(names(&links), ["top", "base"]);
    }
}
