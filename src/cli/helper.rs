//! `afterimage SRC DIR -o OPTS`: what `mount -t fuse.afterimage SRC DIR` runs, also from fstab.
//!
//! mount(8) waits for this process: it ends when the mount serves (0) or cannot (not 0). The
//! first argument holds a slash, which no command does.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Parser;

use super::mounts::{MountOptions, absolute, need_dir};
use super::reach::{Reach, need_root};
use crate::base::Result;
use crate::host::api::types::MountRequest;
use crate::host::state::STATE_DIR_DEFAULT;

/// The arguments that mount(8) and mount.fuse give.
#[derive(Debug, Parser)]
#[command(name = "afterimage")]
pub struct HelperArgs {
    /// The lower directory
    source: PathBuf,
    /// Where the view goes
    dir: PathBuf,
    /// Mount options
    #[arg(short, value_delimiter = ',')]
    options: Vec<String>,
    /// Said by mount(8); of no meaning here
    #[arg(short = 's')]
    _sloppy: bool,
    /// Said by mount(8); of no meaning here
    #[arg(short = 'n')]
    _no_mtab: bool,
    /// The type with its subtype, said by mount(8)
    #[arg(short = 't')]
    _kind: Option<String>,
    /// Fake: everything but the mount itself
    #[arg(short = 'f')]
    fake: bool,
    /// Said by mount(8)
    #[arg(short = 'v', action = clap::ArgAction::Count)]
    verbose: u8,
}

/// Whether the program was called as a mount helper: as `mount.fuse.afterimage`, or with a path
/// where a command would be.
pub fn is_helper(args: &[OsString]) -> bool {
    let program = args.first().map(PathBuf::from).unwrap_or_default();
    if program.file_name().is_some_and(|n| n.to_string_lossy().starts_with("mount.")) {
        return true;
    }
    args.get(1).is_some_and(|first| {
        let first = first.to_string_lossy();
        first.contains('/') && !first.starts_with('-')
    })
}

/// Mounts, and returns once the mount serves.
pub fn run(args: &HelperArgs) -> Result<()> {
    let options = MountOptions::parse(args.options.iter().map(String::as_str))?;
    let state = options.state.unwrap_or_else(|| PathBuf::from(STATE_DIR_DEFAULT));
    need_root()?;
    let request = MountRequest {
        source: absolute(&args.source)?,
        dir: absolute(&args.dir)?,
        single_host: options.single_host,
        options: options.flags,
    };
    need_dir(&request.source)?;
    need_dir(&request.dir)?;
    if args.fake {
        return Ok(());
    }
    Reach::new(&state, args.verbose)?.needed()?.call(&request)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_helper_is_told_by_its_first_argument() {
        let args = |line: &str| line.split(' ').map(OsString::from).collect::<Vec<_>>();
        assert!(is_helper(&args("afterimage /src /dir -o rw")));
        assert!(is_helper(&args("afterimage ./src /dir")));
        assert!(is_helper(&args("/sbin/mount.fuse.afterimage src /dir")));
        assert!(!is_helper(&args("afterimage mount /dir")));
        assert!(!is_helper(&args("afterimage --state=/s status")));
        assert!(!is_helper(&args("afterimage")));
        let parsed = HelperArgs::try_parse_from(args("afterimage /src /dir -s -o rw,nodev -o state=/s"));
        assert_eq!(parsed.unwrap().options, ["rw", "nodev", "state=/s"]);
    }
}
