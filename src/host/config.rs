//! The optional configuration file: `/etc/afterimage/afterimage.toml`, or `afterimage.toml` in
//! the state folder when one is given. Everything works without it.
//!
//! ```toml
//! policy = "30s"              # policy of a VM that names none
//! vault = "/srv/vault"        # the vault of a VM that names no target (default: STATE/vault)
//! group = "afterimage"        # may use read-only commands
//! log_level = "info"
//! preserved_memory = "32 MiB" # preserved blocks in memory, of all disks; more goes into the logs
//!
//! [targets]
//! nas = "/mnt/nas/afterimage" # a directory vault
//! ```
//!
//! An unknown key is an error with line and column: a typing error must not become a default.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bytesize::ByteSize;
use serde::Deserialize;

use crate::base::durable::read_limited;
use crate::base::limits::{PRESERVED_MEMORY_BYTES, PRESERVED_MEMORY_BYTES_MAX};
use crate::base::{Error, ErrorKind, Result};

/// Where the file is when no state folder was given.
pub const CONFIG_DEFAULT: &str = "/etc/afterimage/afterimage.toml";
/// Largest configuration file, in bytes.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// What the file can say.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Policy of a VM that names none.
    pub policy: Option<String>,
    /// Vault of a VM that names no target.
    pub vault: Option<PathBuf>,
    /// Group that may use read-only commands.
    pub group: Option<String>,
    /// Level of the log: error, warn, info, debug or trace.
    pub log_level: Option<String>,
    /// Preserved blocks in memory, of all disks together, of which one gets at most half; more goes
    /// into their HRLs.
    pub preserved_memory: Option<ByteSize>,
    /// Directory vaults by name.
    pub targets: BTreeMap<String, PathBuf>,
}

impl Config {
    /// See `preserved_memory`, in bytes.
    pub fn preserved_memory_bytes(&self) -> u64 {
        self.preserved_memory.map_or(PRESERVED_MEMORY_BYTES, |size| size.as_u64())
    }

    /// Reads the file at `path`; the defaults if there is none.
    pub fn load(path: &Path) -> Result<Self> {
        match read_limited(path, CONFIG_BYTES_MAX)? {
            None => Ok(Self::default()),
            Some(bytes) => Self::decode(path, &bytes),
        }
    }

    fn decode(path: &Path, bytes: &[u8]) -> Result<Self> {
        let bad = |why: String| {
            Error::new(ErrorKind::Configuration, format!("cannot use {}", path.display()))
                .why(why)
                .hint(format!("correct {}, then: afterimage status", path.display()))
        };
        let text = std::str::from_utf8(bytes).map_err(|e| bad(format!("it is no UTF-8: {e}")))?;
        let config: Self = toml::from_str(text).map_err(|e: toml::de::Error| {
            let (line, column) = position(text, e.span().map_or(0, |s| s.start));
            bad(format!("line {line}, column {column}: {}", e.message().trim()))
        })?;
        config.check().map_err(bad)?;
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        if self.preserved_memory_bytes() > PRESERVED_MEMORY_BYTES_MAX {
            let most = ByteSize(PRESERVED_MEMORY_BYTES_MAX).display().iec();
            return Err(format!("preserved_memory is locked memory; it can be {most} at most"));
        }
        if let Some(level) = &self.log_level {
            level.parse::<log::LevelFilter>().map_err(|_| {
                format!("log_level is {level:?}; it can be error, warn, info, debug or trace")
            })?;
        }
        let paths = self.vault.iter().chain(self.targets.values());
        match paths.into_iter().find(|p| !p.is_absolute()) {
            Some(p) => Err(format!("{} is no absolute path", p.display())),
            None => Ok(()),
        }
    }
}

/// Line and column, both from 1, of the byte at `offset`.
fn position(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or("").chars().count() + 1;
    (line, column)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_key_is_an_error_with_its_place() {
        let e = Config::decode(Path::new("/x"), b"policy = \"30s\"\nvalut = \"/v\"\n").unwrap_err();
        assert_eq!(e.kind().exit_code(), 2);
        assert!(e.reason().unwrap().contains("line 2, column 1"), "{e}");
        assert!(e.reason().unwrap().contains("valut"), "{e}");
        let e = Config::decode(Path::new("/x"), b"vault = \"v\"\n").unwrap_err();
        assert!(e.reason().unwrap().contains("absolute"), "{e}");
        let good = Config::decode(Path::new("/x"), b"[targets]\nnas = \"/n\"\n").unwrap();
        assert_eq!(good.targets["nas"], PathBuf::from("/n"));
        assert_eq!(good.preserved_memory_bytes(), PRESERVED_MEMORY_BYTES);
    }

    #[test]
    fn sizes_are_numbers_or_words() {
        let bytes = |text: &str| Config::decode(Path::new("/x"), text.as_bytes());
        for (text, expected) in [("0", 0), ("\"0\"", 0), ("\"64 MiB\"", 64 << 20)] {
            let config = bytes(&format!("preserved_memory = {text}\n")).unwrap();
            assert_eq!(config.preserved_memory_bytes(), expected);
        }
        let e = bytes("preserved_memory = \"much\"\n").unwrap_err();
        assert!(e.reason().unwrap().contains("line 1, column 20"), "{e}");
        let e = bytes("preserved_memory = \"2 TiB\"\n").unwrap_err();
        assert!(e.reason().unwrap().contains("at most"), "{e}");
    }
}
