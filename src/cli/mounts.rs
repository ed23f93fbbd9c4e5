//! `mount`, `umount`, `mounts`.

use std::path::{Path, PathBuf};

use super::args::MountArgs;
use super::out::Out;
use super::reach::{Reach, need_root};
use super::text::{bytes, count};
use crate::base::error::Context;
use crate::base::{Error, ErrorKind, Result};
use crate::host::api::types::*;

/// Mount options that say how the view is mounted.
const FLAGS: [&str; 9] =
    ["ro", "nosuid", "nodev", "noexec", "noatime", "nodiratime", "relatime", "sync", "dirsync"];
/// Options for other programs, or what holds anyway.
const ACCEPTED: [&str; 22] = [
    "defaults",
    "rw",
    "suid",
    "dev",
    "exec",
    "async",
    "atime",
    "auto",
    "noauto",
    "user",
    "nouser",
    "users",
    "owner",
    "group",
    "nofail",
    "_netdev",
    "allow_other",
    "default_permissions",
    "nonempty",
    "strictatime",
    "lazytime",
    "silent",
];
/// Beginnings of options for other programs.
const ACCEPTED_BEGINNINGS: [&str; 5] = ["x-", "X-", "comment=", "fsname=", "subtype="];

/// What `-o` said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MountOptions {
    /// `single_host`.
    pub single_host: bool,
    /// `state=DIR`.
    pub state: Option<PathBuf>,
    /// Flags of the mount itself.
    pub flags: Vec<String>,
}

impl MountOptions {
    /// Sorts out what `-o` said; an option that nobody knows is an error, because it may be a
    /// misspelt one.
    pub fn parse<'a>(options: impl IntoIterator<Item = &'a str>) -> Result<Self> {
        let mut parsed = Self::default();
        for option in options.into_iter().map(str::trim).filter(|o| !o.is_empty()) {
            if option == "single_host" || option == "single-host" {
                parsed.single_host = true;
            } else if let Some(dir) = option.strip_prefix("state=") {
                parsed.state = Some(PathBuf::from(dir));
            } else if FLAGS.contains(&option) {
                parsed.flags.push(option.to_owned());
            } else if !ACCEPTED.contains(&option)
                && !ACCEPTED_BEGINNINGS.iter().any(|b| option.starts_with(b))
            {
                return Err(Error::new(ErrorKind::Usage, format!("unknown mount option {option:?}"))
                    .why("it is neither an option of afterimage nor one of mount(8)")
                    .hint("ours are: state=DIR, single_host"));
            }
        }
        Ok(parsed)
    }
}

/// An absolute path, with links and `..` left for the daemon to judge.
pub fn absolute(path: &Path) -> Result<PathBuf> {
    if path.as_os_str().is_empty() {
        return Err(Error::new(ErrorKind::Usage, "an empty path names no file"));
    }
    std::path::absolute(path).context(|| format!("cannot use {}", path.display()))
}

/// `mount`.
pub fn mount(out: &Out, reach: &Reach, args: &MountArgs) -> Result<()> {
    let options = MountOptions::parse(args.options.iter().map(String::as_str))?;
    if options.state.is_some() {
        return Err(Error::new(ErrorKind::Usage, "the state folder cannot be given by -o here")
            .why("state=DIR is for /etc/fstab")
            .hint("afterimage --state DIR mount ..."));
    }
    let (source, dir) = match args.dirs.as_slice() {
        [dir] => (dir, dir),
        [source, dir] => (source, dir),
        _ => return Err(Error::new(ErrorKind::Usage, "mount takes one or two directories")),
    };
    let request = MountRequest {
        source: absolute(source)?,
        dir: absolute(dir)?,
        single_host: args.single_host || options.single_host,
        options: options.flags,
    };
    need_root()?;
    need_dir(&request.source)?;
    need_dir(&request.dir)?;
    let reply = reach.needed()?.call(&request)?;
    out.answer("afterimage.mount/1", &reply, || mounted(&reply))
}

/// A directory that is missing is told before a daemon is started for it.
pub fn need_dir(dir: &Path) -> Result<()> {
    let fail = |kind, why: String| {
        Err(Error::new(kind, format!("{} cannot be mounted", dir.display()))
            .why(why)
            .hint("name a directory that holds disk images: afterimage mount DIR"))
    };
    match std::fs::metadata(dir) {
        Ok(m) if m.is_dir() => Ok(()),
        Ok(_) => fail(ErrorKind::Usage, "it is no directory".to_owned()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            fail(ErrorKind::NotFound, "there is no such directory".to_owned())
        }
        // A dead mount answers ENOTCONN; the daemon knows what to do with it.
        Err(_) => Ok(()),
    }
}

fn mounted(reply: &MountReply) -> String {
    let m = &reply.mount;
    let mut text = if m.dir == m.source {
        format!("mounted over {}", m.dir.display())
    } else {
        format!("mounted {} at {}", m.source.display(), m.dir.display())
    };
    for open in &m.open_beneath {
        text += &format!(
            "\nwarning: {} is open around the filter by {} (pid {}); restart it before the disk is protected",
            open.path.display(),
            open.command,
            open.pid
        );
    }
    for warning in &reply.warnings {
        text += &format!("\nwarning: {warning}");
    }
    text
}

/// `umount`.
pub fn umount(out: &Out, reach: &Reach, dir: &Path) -> Result<()> {
    let dir = absolute(dir)?;
    let reply = reach.needed()?.call(&UmountRequest { dir: dir.clone() })?;
    done(out, &reply, || format!("{} is no longer mounted", dir.display()))
}

/// `mounts`.
pub fn list(out: &Out, reach: &Reach) -> Result<()> {
    let reply = reach.running()?.call(&MountsRequest {})?;
    out.answer("afterimage.mounts/1", &reply, || table(out, &reply.mounts))
}

/// The table of mounts.
pub fn table(out: &Out, mounts: &[MountStatus]) -> String {
    if mounts.is_empty() {
        return "nothing is mounted (afterimage mount DIR)\n".to_owned();
    }
    let rows: Vec<Vec<String>> = mounts
        .iter()
        .map(|m| {
            let over = m.source == m.dir;
            let source = if over { "(itself)".to_owned() } else { m.source.display().to_string() };
            let state = match (&m.error, m.serving) {
                (_, true) => "serving".to_owned(),
                (Some(e), false) => format!("failed: {}", e.why.as_deref().unwrap_or(&e.what)),
                (None, false) => "not serving".to_owned(),
            };
            let disks = count(m.protected_disks, "disk");
            vec![
                m.dir.display().to_string(),
                source,
                state,
                m.file_system.clone(),
                bytes(m.free_bytes),
                disks,
            ]
        })
        .collect();
    out.table(&["MOUNT", "OVER", "STATE", "FILE SYSTEM", "FREE", "PROTECTED"], &rows)
}

/// The answer of a command that has nothing to tell but that it was done.
pub fn done(out: &Out, reply: &Done, words: impl FnOnce() -> String) -> Result<()> {
    out.answer("afterimage.done/1", reply, || {
        let mut text = if reply.message.is_empty() { words() } else { reply.message.clone() };
        for warning in &reply.warnings {
            text += &format!("\nwarning: {warning}");
        }
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_of_fstab_are_sorted_out() {
        let o = MountOptions::parse("rw,nodev,_netdev,x-systemd.automount,state=/s,single_host".split(','));
        let o = o.unwrap();
        assert_eq!(o.flags, ["nodev"]);
        assert_eq!(o.state.unwrap(), PathBuf::from("/s"));
        assert!(o.single_host);
        assert_eq!(MountOptions::parse(["singel_host"]).unwrap_err().kind().exit_code(), 2);
    }
}
