//! What the filter tells the host about names below a mount: files that come, go and move.
//!
//! Called after the lower operation succeeded and before the kernel gets its reply, from the
//! thread of that operation. Whoever asked for the change sees it only once the watcher is done,
//! so a file renamed over a disk's path is tracked before anyone can write to it by that name.

use std::path::PathBuf;

use crate::base::FileKey;

/// A change of names. Paths are relative to the root of the mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NameEvent {
    /// A regular file was made (create, mknod, link of another name, O_TMPFILE linked in).
    Created {
        /// Its path.
        path: PathBuf,
        /// The lower file.
        file: FileKey,
    },
    /// A file or folder got another path.
    Renamed {
        /// Path before.
        from: PathBuf,
        /// Path after.
        to: PathBuf,
        /// What was moved.
        file: FileKey,
        /// What had the path `to` before and lost it.
        replaced: Option<FileKey>,
    },
    /// Two paths changed places (RENAME_EXCHANGE).
    Exchanged {
        /// One path.
        a: PathBuf,
        /// The other path.
        b: PathBuf,
        /// The file that was at `a` and is now at `b`.
        a_file: FileKey,
        /// The file that was at `b` and is now at `a`.
        b_file: FileKey,
    },
    /// A name was removed.
    Removed {
        /// Its path.
        path: PathBuf,
        /// The lower file.
        file: FileKey,
    },
    /// The first 4 KiB of a file that is no protected disk were written: it may have become an
    /// image with a backing file.
    HeaderWritten {
        /// The lower file.
        file: FileKey,
        /// A path of it, if the filter knows one.
        path: Option<PathBuf>,
    },
}

/// Who is told.
pub trait NameWatcher: Send + Sync {
    /// `event` has happened below the mount with this root (as given to `mount`).
    fn on_name_event(&self, event: &NameEvent);

    /// The folder holds nothing but files of ours and is about to be removed, they with it.
    /// `false`: one of them is still needed, so the folder stays (ENOTEMPTY).
    fn may_remove_ours(&self, _folder: &std::path::Path) -> bool {
        true
    }
}
