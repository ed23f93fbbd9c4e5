//! One error type: a small kind to match on, what failed, why, and what to type next.
//!
//! The kind decides the exit code and whether the shipper tries again (design, section 5).

use std::fmt;
use std::io;

/// Result with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What class of failure this is. Names are stable: they appear in `--json` and in events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorKind {
    /// Wrong arguments, or a name that cannot be one.
    Usage,
    /// A configuration file that cannot be understood.
    Configuration,
    /// Refused by a safety check.
    Refused,
    /// No such VM, disk, point, policy, job or file.
    NotFound,
    /// The name or file is taken.
    Exists,
    /// The target cannot be reached.
    Unreachable,
    /// The daemon does not run.
    NoDaemon,
    /// No space, or too little.
    NoSpace,
    /// Something is in use or not ready; trying again later makes sense.
    Busy,
    /// The file system or the device said no.
    Io,
    /// Bytes at rest or on the wire are not what was written.
    Damaged,
    /// Written by another version of the format.
    Version,
    /// The parent of an epoch is not the head of the vault.
    ChainBroken,
    /// A disk, or a file of its backing chain, is missing or was changed beneath the mount.
    DiskMissing,
    /// Cancelled by the operator.
    Cancelled,
    /// Some of it was done.
    Partial,
    /// A fault of the program itself.
    Internal,
}

impl ErrorKind {
    /// Exit code of the command line (design, section 9).
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Usage | Self::Configuration => 2,
            Self::Partial => 3,
            Self::Refused | Self::Exists => 4,
            Self::Unreachable => 5,
            Self::NotFound => 6,
            Self::NoDaemon => 7,
            _ => 1,
        }
    }

    /// Whether the shipper tries again by itself (network, space, memory, busy, I/O).
    pub const fn is_recoverable(self) -> bool {
        matches!(self, Self::Unreachable | Self::NoSpace | Self::Busy | Self::Io | Self::NoDaemon)
    }
}

/// What failed, why, and what to type next: three lines on the terminal.
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    what: String,
    why: Option<String>,
    hint: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of `kind`; `what` is a phrase such as `disk /vm/a.qcow2 cannot be protected`.
    pub fn new(kind: ErrorKind, what: impl Into<String>) -> Self {
        Self(Box::new(Inner { kind, what: what.into(), why: None, hint: None, source: None }))
    }

    /// An I/O error; the kind is [`ErrorKind::NoSpace`] for ENOSPC and EDQUOT, else [`ErrorKind::Io`].
    pub fn io(what: impl Into<String>, source: io::Error) -> Self {
        let kind = match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => ErrorKind::NoSpace,
            Some(libc::ENOENT) => ErrorKind::NotFound,
            _ => ErrorKind::Io,
        };
        Self::new(kind, what).source(source)
    }

    /// Says why.
    pub fn why(mut self, why: impl Into<String>) -> Self {
        self.0.why = Some(why.into());
        self
    }

    /// Says what to type next.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint = Some(hint.into());
        self
    }

    /// Keeps the cause.
    pub fn source(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// The same error as another kind.
    pub fn with_kind(mut self, kind: ErrorKind) -> Self {
        self.0.kind = kind;
        self
    }

    /// The class of failure.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// What failed.
    pub fn what(&self) -> &str {
        &self.0.what
    }

    /// Why: as said, else the text of the cause.
    pub fn reason(&self) -> Option<String> {
        let mut text = self.0.why.clone();
        if let Some(source) = &self.0.source {
            let cause = source.to_string();
            text = Some(match text {
                Some(why) => format!("{why}: {cause}"),
                None => cause,
            });
        }
        text
    }

    /// What to type next.
    pub fn next_step(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }

    /// The `errno` at the bottom, if there is one.
    pub fn errno(&self) -> Option<i32> {
        self.0.source.as_ref()?.downcast_ref::<io::Error>()?.raw_os_error()
    }

    /// Whether the shipper tries again by itself.
    pub fn is_recoverable(&self) -> bool {
        self.0.kind.is_recoverable()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.what)?;
        match self.reason() {
            Some(why) => write!(f, ": {why}"),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.0.kind)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_ref().map(|s| s.as_ref() as _)
    }
}

/// Adds what was tried to an I/O result.
pub trait Context<T> {
    /// Turns the error into [`Error`] with `what()` as its first line.
    fn context<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T>;
}

impl<T> Context<T> for io::Result<T> {
    fn context<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|e| Error::io(what(), e))
    }
}

impl<T> Context<T> for nix::Result<T> {
    fn context<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|e| Error::io(what(), e.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_space_is_recoverable_and_keeps_its_errno() {
        let e = Error::io("cannot write", io::Error::from_raw_os_error(libc::ENOSPC));
        assert_eq!(e.kind(), ErrorKind::NoSpace);
        assert!(e.is_recoverable());
        assert_eq!(e.errno(), Some(libc::ENOSPC));
    }
}
