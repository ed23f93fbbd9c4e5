//! Folders that are followed: which of their files are disks.
//!
//! Every regular file that is not hidden, not excluded and no ISO image is a disk:
//! what lies in the folder of a VM (firmware variables, for example) belongs to it. Links are
//! not followed, sub-folders are.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use globset::{Glob, GlobSet, GlobSetBuilder};

use super::engine::Engine;
use super::mounts::Mounted;
use super::prerequisites::Candidate;
use super::records::FolderRule;
use crate::base::error::Context;
use crate::base::limits::DISKS_PER_VM_MAX;
use crate::base::{Error, ErrorKind, Result};
use crate::machine::image::ImageFormat;

/// Sub-folders are followed so deep.
const DEPTH_MAX: usize = 8;
/// Entries of a folder that are looked at.
const ENTRIES_MAX: usize = 20_000;

/// A folder rule, ready to be asked.
pub struct FolderFilter {
    path: PathBuf,
    exclude: GlobSet,
}

impl FolderFilter {
    /// Reads the patterns of a rule.
    pub fn new(rule: &FolderRule) -> Result<Self> {
        let mut set = GlobSetBuilder::new();
        for pattern in &rule.exclude {
            let glob = Glob::new(pattern).map_err(|e| {
                Error::new(ErrorKind::Usage, format!("--exclude {pattern:?} cannot be used"))
                    .why(e.to_string())
                    .hint("write it as in: --exclude '*.tmp'")
            })?;
            set.add(glob);
        }
        let exclude = set
            .build()
            .map_err(|e| Error::new(ErrorKind::Usage, "the patterns cannot be used").why(e.to_string()))?;
        Ok(Self { path: rule.path.clone(), exclude })
    }

    /// Whether a file of the mount with this path may be a disk of the folder.
    pub fn matches(&self, path: &Path) -> bool {
        let Ok(inside) = path.strip_prefix(&self.path) else { return false };
        let mut parts = inside.components().peekable();
        let depth = inside.components().count();
        let is_hidden = parts.any(|c| c.as_os_str().as_encoded_bytes().starts_with(b"."));
        let name = inside.file_name().map(Path::new);
        depth > 0
            && depth <= DEPTH_MAX
            && !is_hidden
            && !self.exclude.is_match(inside)
            && !name.is_some_and(|n| self.exclude.is_match(n))
    }
}

impl Engine {
    /// The disks that a rule finds in its folder now, and what is left out, in words. Reads the
    /// folder through the mount, where files of ours are hidden.
    pub(super) fn scan_folder(
        &self,
        mount: &Arc<Mounted>,
        filter: &FolderFilter,
    ) -> Result<(Vec<Candidate>, Vec<String>)> {
        let (mut found, mut left_out) = (Vec::new(), Vec::new());
        for path in files_below(mount.dir(), &filter.path)? {
            if !filter.matches(&path) {
                continue;
            }
            match self.folder_candidate(mount, &path) {
                Ok(Ok(candidate)) => found.push(candidate),
                Ok(Err(why)) => left_out.push(why),
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                Err(e) => left_out.push(e.to_string()),
            }
            if found.len() > DISKS_PER_VM_MAX {
                break;
            }
        }
        Ok((found, left_out))
    }

    /// A file of a followed folder as a disk, or why it is none.
    pub(super) fn folder_candidate(
        &self,
        mount: &Arc<Mounted>,
        path: &Path,
    ) -> Result<Result<Candidate, String>> {
        let shown = mount.dir().join(path);
        let candidate = self.candidate(mount.clone(), path, false)?;
        // By name too: one that is being copied here has no mark yet.
        let is_called_iso = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("iso"));
        if candidate.info.format == ImageFormat::Iso || is_called_iso {
            return Ok(Err(format!("{} is an ISO image and is skipped", shown.display())));
        }
        if let Err(e) = candidate.info.verify_supported(&shown) {
            return Ok(Err(e.to_string()));
        }
        Ok(Ok(candidate))
    }
}

/// Regular files below `folder` of the mount at `dir`, by path relative to `dir`, sorted.
pub fn files_below(dir: &Path, folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![(folder.to_owned(), 0)];
    while let Some((at, depth)) = folders.pop() {
        let place = dir.join(&at);
        let entries = match fs::read_dir(&place) {
            Ok(entries) => entries,
            Err(e) if at == folder => {
                return Err(e).context(|| format!("cannot list {}", place.display()));
            }
            Err(_) => continue,
        };
        for entry in entries.flatten() {
            let path = at.join(entry.file_name());
            match entry.file_type() {
                Ok(t) if t.is_dir() && depth < DEPTH_MAX => folders.push((path, depth + 1)),
                Ok(t) if t.is_file() => found.push(path),
                _ => {}
            }
            if found.len() >= ENTRIES_MAX {
                break;
            }
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_match_what_lies_in_the_folder_and_is_not_excluded() {
        let rule = |path: &str, exclude: &[&str]| {
            FolderFilter::new(&FolderRule {
                mount: "/m".into(),
                path: path.into(),
                exclude: exclude.iter().map(|s| (*s).to_owned()).collect(),
            })
        };
        let filter = rule("web1", &["*.tmp", "old/*"]).unwrap();
        for (path, expected) in [
            ("web1/a.raw", true),
            ("web1/sub/a.raw", true),
            ("web1/a.tmp", false),
            ("web1/sub/a.tmp", false),
            ("web1/old/a.raw", false),
            ("web1/.hidden", false),
            ("web1/.trash/a.raw", false),
            ("web10/a.raw", false),
            ("web1", false),
        ] {
            assert_eq!(filter.matches(Path::new(path)), expected, "{path}");
        }
        assert!(rule("", &[]).unwrap().matches(Path::new("a.raw")));
        assert_eq!(rule("", &["["]).err().unwrap().kind(), ErrorKind::Usage);
    }
}
