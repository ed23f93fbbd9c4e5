//! Files of ours in the folders of disks: hidden from the mounted view.
//!
//! Recognised by the header, never by the name alone: a user's own `x.5.hrl` stays visible. Only
//! names that end in `.hrl` are looked into, so that nothing else costs anything.

use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{Mode, SFlag, fstat};

use super::lower::{kind_of, reopen};
use crate::format::hrl::{HRL_PREFIX_BYTES, is_hrl_header};

/// Whether the name can be one of ours.
pub(super) fn is_candidate(name: &OsStr) -> bool {
    name.as_bytes().ends_with(b".hrl")
}

/// Whether `name` in `folder` is a file of ours.
pub(super) fn is_hidden(folder: impl AsFd, name: &OsStr) -> bool {
    if !is_candidate(name) {
        return false;
    }
    let look = || {
        // Through O_PATH, so that a pipe or device of that name is not opened.
        let probe = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let probe = openat(folder, name, probe, Mode::empty())?;
        if kind_of(&fstat(&probe)?) != SFlag::S_IFREG {
            return Ok(false);
        }
        let file = reopen(&probe, OFlag::O_RDONLY | OFlag::O_NOATIME)?;
        let mut prefix = [0u8; HRL_PREFIX_BYTES];
        let read = file.read_at(&mut prefix, 0).map_err(|_| Errno::EIO)?;
        Ok::<bool, Errno>(prefix.get(..read).is_some_and(is_hrl_header))
    };
    look().unwrap_or(false)
}
