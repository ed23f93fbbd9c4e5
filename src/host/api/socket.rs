//! The Unix socket's address, also where the path of the state folder is long.
//!
//! A socket address holds 107 bytes of path. A longer one is reached through the descriptor of
//! its folder (`/proc/self/fd/N/afterimage.sock`), which the kernel resolves like any path.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::base::Result;
use crate::base::error::Context;

/// Longest path that a socket address holds, in bytes.
const PATH_BYTES_MAX: usize = 107;

/// A path that fits into a socket address; valid as long as it lives.
pub(super) struct Address {
    path: PathBuf,
    _folder: Option<File>,
}

impl Address {
    /// The address of the socket at `socket`.
    pub(super) fn of(socket: &Path) -> Result<Self> {
        if socket.as_os_str().len() <= PATH_BYTES_MAX {
            return Ok(Self { path: socket.to_owned(), _folder: None });
        }
        let folder = socket.parent().unwrap_or(Path::new("."));
        let name = socket.file_name().unwrap_or(socket.as_os_str());
        let folder = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
            .open(folder)
            .context(|| format!("cannot open {}", folder.display()))?;
        let path = PathBuf::from(format!("/proc/self/fd/{}", folder.as_raw_fd())).join(name);
        Ok(Self { path, _folder: Some(folder) })
    }

    /// The path to bind or connect to.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}
