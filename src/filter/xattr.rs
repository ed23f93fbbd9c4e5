//! Extended attributes of every namespace, except our own marks: `trusted.afterimage.*` is not
//! listed, not readable and not to be set through the mount.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use nix::errno::Errno;

use super::ops::{Filter, OpResult};
use super::sys;

/// What our own marks on files begin with.
pub const MARK_PREFIX: &str = "trusted.afterimage.";
/// Longest value, and longest list of names, that Linux has.
const BYTES_MAX: usize = 64 << 10;

fn is_mark(name: &[u8]) -> bool {
    name.starts_with(MARK_PREFIX.as_bytes())
}

impl Filter {
    /// The value of an attribute; ENODATA: there is none.
    pub fn getxattr(&self, id: u64, name: &OsStr) -> OpResult<Vec<u8>> {
        if is_mark(name.as_bytes()) {
            return Err(Errno::ENODATA);
        }
        let node = self.node(id)?;
        let fd = self.path_fd(&node)?;
        let mut value = vec![0; 256];
        loop {
            match sys::get_xattr(&fd, name, &mut value) {
                Ok(length) => {
                    value.truncate(length);
                    return Ok(value);
                }
                Err(Errno::ERANGE) if value.len() < BYTES_MAX => value.resize(BYTES_MAX, 0),
                Err(e) => return Err(e),
            }
        }
    }

    /// The names of all attributes, each ended by a zero byte.
    pub fn listxattr(&self, id: u64) -> OpResult<Vec<u8>> {
        let node = self.node(id)?;
        let fd = self.path_fd(&node)?;
        let mut list = vec![0; 1024];
        let length = loop {
            match sys::list_xattr(&fd, &mut list) {
                Ok(length) => break length,
                Err(Errno::ERANGE) if list.len() < BYTES_MAX => list.resize(BYTES_MAX, 0),
                Err(e) => return Err(e),
            }
        };
        list.truncate(length);
        let names = list.split_inclusive(|b| *b == 0).filter(|name| !is_mark(name));
        Ok(names.flatten().copied().collect())
    }

    /// Sets an attribute; `flags` as for setxattr.
    pub fn setxattr(&self, id: u64, name: &OsStr, value: &[u8], flags: i32) -> OpResult<()> {
        if is_mark(name.as_bytes()) {
            return Err(Errno::EPERM);
        }
        let node = self.node(id)?;
        sys::set_xattr(self.path_fd(&node)?, name, value, flags)
    }

    /// Removes an attribute.
    pub fn removexattr(&self, id: u64, name: &OsStr) -> OpResult<()> {
        if is_mark(name.as_bytes()) {
            return Err(Errno::EPERM);
        }
        let node = self.node(id)?;
        sys::remove_xattr(self.path_fd(&node)?, name)
    }
}
