//! Every command and option, as clap understands them. The texts are the help and the manual.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;

use super::text::parse_duration;
use crate::base::VmName;
use crate::host::state::STATE_DIR_DEFAULT;

/// Keeps a bootable copy of KVM virtual machines somewhere else, seconds old, without touching
/// the guests.
#[derive(Debug, Parser)]
#[command(name = "afterimage", version, max_term_width = 100, arg_required_else_help = true)]
#[command(after_help = "Exit codes: 0 ok, 1 failed, 2 usage or configuration, 3 partly done, \
    4 refused by a safety check, 5 target unreachable, 6 not found, 7 daemon not running.\n\
    First steps: afterimage doctor; afterimage mount DIR; afterimage protect NAME --disk FILE; \
    afterimage status")]
pub struct Cli {
    /// Folder with everything of one daemon, its socket included
    #[arg(long, global = true, value_name = "DIR", default_value = STATE_DIR_DEFAULT)]
    pub state: PathBuf,
    /// Answer in JSON with a schema name
    #[arg(long, global = true)]
    pub json: bool,
    /// Answer prompts with yes; overrides no safety check
    #[arg(long, global = true)]
    pub yes: bool,
    /// Say more on standard error; twice: much more
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Mount the filter over a directory of disk images, or elsewhere
    Mount(MountArgs),
    /// End a mount and forget it; refused while files are in use
    Umount {
        /// Where it is mounted
        dir: PathBuf,
    },
    /// List the mounts
    Mounts,
    /// Protect a VM: replicate its disks continuously
    Protect(ProtectArgs),
    /// End protection of a VM; its points stay
    Unprotect {
        /// Name or UUID of the VM
        name: String,
        /// Remove its points too; asks for the name
        #[arg(long)]
        purge: bool,
    },
    /// Change settings of a VM
    Set(SetArgs),
    /// Named settings that VMs share
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// Stop shipping a VM; tracking goes on
    Pause {
        /// Name or UUID of the VM
        name: String,
    },
    /// Ship a VM again; checks the cause of an error again
    Resume {
        /// Name or UUID of the VM
        name: String,
    },
    /// Ask for a cut now
    Sync {
        /// Name or UUID of the VM
        name: String,
        /// Return when a cut made after this call is durable and listed by `points`
        #[arg(long)]
        wait: bool,
        /// With --wait: give up after so long (10 min)
        #[arg(long, value_name = "TIME", value_parser = parse_duration, requires = "wait")]
        timeout: Option<Duration>,
    },
    /// Show daemon, mounts and VMs
    Status {
        /// Only this VM, with its disks
        vm: Option<String>,
        /// Show it again each second
        #[arg(long, conflicts_with = "json")]
        watch: bool,
    },
    /// List the recovery points of a VM, oldest first
    Points {
        /// Name or UUID of the VM
        name: String,
    },
    /// Pin, delete, mount or clone recovery points
    #[command(subcommand)]
    Point(PointCommand),
    /// Copy the disks of a point into a folder
    Restore {
        /// Name or UUID of the VM
        name: String,
        /// Which point
        #[command(flatten)]
        point: PointArg,
        /// The folder; made if missing
        #[arg(long, value_name = "DIR")]
        to: PathBuf,
        /// Replace files that exist
        #[arg(long)]
        force: bool,
    },
    /// List jobs, newest first
    Jobs {
        /// At most so many
        #[arg(long, default_value_t = 20)]
        limit: u32,
    },
    /// Show, read or cancel a job
    #[command(subcommand)]
    Job(JobCommand),
    /// Show what happened
    Events {
        /// Only events of this VM
        vm: Option<String>,
        /// Go on showing
        #[arg(long, short)]
        follow: bool,
        /// At most so many of the past
        #[arg(long, default_value_t = 50)]
        limit: u32,
    },
    /// Print a file of afterimage in words (HRL, hot-region log, part, manifest, undo log, state)
    Inspect {
        /// The file; it is only read
        file: PathBuf,
    },
    /// Check this machine, with the line to type for each finding
    Doctor {
        /// Directories of disk images to check besides those that are mounted
        dirs: Vec<PathBuf>,
    },
    /// Run the daemon in the foreground
    Daemon {
        /// Leave the session of the terminal
        #[arg(long, hide = true)]
        detached: bool,
    },
    /// Start the daemon in the background, if none runs
    Start,
    /// End the daemon cleanly; mounts are remembered
    Stop,
    /// Print a completion script
    Completions {
        /// For this shell
        shell: Shell,
    },
    /// Print the manual page, or write all of them into a folder
    Man {
        /// The folder
        dir: Option<PathBuf>,
    },
}

/// Arguments of `mount`.
#[derive(Debug, Args)]
pub struct MountArgs {
    /// DIR: mount over it. SRC DIR: show SRC at DIR
    #[arg(required = true, num_args = 1..=2, value_names = ["SRC", "DIR"])]
    pub dirs: Vec<PathBuf>,
    /// No other host uses the shared file system (NFS, CIFS, GFS2, ...)
    #[arg(long)]
    pub single_host: bool,
    /// Mount options, separated by commas
    #[arg(short, value_name = "OPTS", value_delimiter = ',')]
    pub options: Vec<String>,
}

/// Arguments of `protect`.
#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("what").required(true).args(["disk", "dir"])))]
pub struct ProtectArgs {
    /// Name of the VM
    pub name: VmName,
    /// A disk by its path in the mounted view, its backing chain included; may be repeated
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub disk: Vec<PathBuf>,
    /// A folder; disks that come and go there are followed
    #[arg(long, value_name = "FOLDER")]
    pub dir: Option<PathBuf>,
    /// Leave out files with such names; may be repeated
    #[arg(long, value_name = "GLOB", requires = "dir", conflicts_with = "disk")]
    pub exclude: Vec<String>,
    /// Time between cuts, from 1s; else that of the policy
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub interval: Option<Duration>,
    /// Settings by name; see `policy list`
    #[arg(long, value_name = "POLICY")]
    pub policy: Option<String>,
    /// Where to: a target or a directory; else the vault in the state folder
    #[arg(long, value_name = "TARGET")]
    pub to: Option<String>,
    /// Return at once; the job goes on
    #[arg(long)]
    pub no_wait: bool,
}

/// Arguments of `set`.
#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("change").required(true).multiple(true)
    .args(["rename", "interval", "policy", "exclude"])))]
pub struct SetArgs {
    /// Name or UUID of the VM
    pub name: String,
    /// New name
    #[arg(long, value_name = "NAME")]
    pub rename: Option<VmName>,
    /// Time between cuts, from 1s; 0: that of the policy
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub interval: Option<Duration>,
    /// Settings by name
    #[arg(long, value_name = "POLICY")]
    pub policy: Option<String>,
    /// Leave out files with such names (VM protected by folder); replaces all patterns
    #[arg(long, value_name = "GLOB")]
    pub exclude: Vec<String>,
}

/// Commands of `policy`.
#[derive(Debug, Subcommand)]
pub enum PolicyCommand {
    /// List all policies
    List,
    /// Show one policy
    Show {
        /// Its name
        name: String,
    },
    /// Make a policy, or change one
    Set(PolicySetArgs),
}

/// Arguments of `policy set`.
#[derive(Debug, Args)]
pub struct PolicySetArgs {
    /// Its name
    pub name: String,
    /// Time between cuts, from 1s
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub interval: Option<Duration>,
    /// Keep every point so long
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub keep_all: Option<Duration>,
    /// Keep so many hourly points
    #[arg(long, value_name = "N")]
    pub keep_hourly: Option<u32>,
    /// Keep so many daily points
    #[arg(long, value_name = "N")]
    pub keep_daily: Option<u32>,
    /// Health is Warning when the vault is behind by more; 0: three intervals
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub alert: Option<Duration>,
}

/// Which point.
#[derive(Debug, Args)]
pub struct PointArg {
    /// ID, latest, latest-app, or a time: the newest point at '14:00' or before
    #[arg(long, value_name = "POINT", default_value = "latest")]
    pub point: String,
}

/// Commands of `point`.
#[derive(Debug, Subcommand)]
pub enum PointCommand {
    /// Keep a point, whatever the policy says
    Pin {
        /// Name or UUID of the VM
        name: String,
        /// ID, latest, latest-app or a time
        point: String,
    },
    /// Let the policy decide again
    Unpin {
        /// Name or UUID of the VM
        name: String,
        /// ID, latest, latest-app or a time
        point: String,
    },
    /// Drop a point
    Delete {
        /// Name or UUID of the VM
        name: String,
        /// ID, latest, latest-app or a time
        point: String,
    },
    /// Show all points as folders of ordinary files: DIR/NAME/POINT/FILE
    Mount {
        /// An empty directory
        dir: PathBuf,
    },
    /// End a view, or a clone and what was written to it
    Umount {
        /// Where it is mounted
        dir: PathBuf,
    },
    /// Mount a writable clone of a point
    Clone {
        /// Name or UUID of the VM
        name: String,
        /// Which point
        #[command(flatten)]
        point: PointArg,
        /// An empty directory
        dir: PathBuf,
    },
}

/// Commands of `job`.
#[derive(Debug, Subcommand)]
pub enum JobCommand {
    /// Show a job and its steps
    Show {
        /// Its number
        job: u64,
    },
    /// Print the log of a job
    Log {
        /// Its number
        job: u64,
    },
    /// Ask a job to end
    Cancel {
        /// Its number
        job: u64,
    },
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn what_scripts_rely_on_is_understood() {
        let lines = [
            "afterimage --state /s mount /src /dir --single-host -o ro,noatime",
            "afterimage mount /dir --state /s --json",
            "afterimage protect web1 --disk /a --disk /b --interval 1s --to nas --no-wait",
            "afterimage protect web1 --disk /a /b --policy 5min",
            "afterimage protect web1 --dir /vm --exclude *.iso",
            "afterimage sync web1 --wait --timeout 2h",
            "afterimage points web1 --json",
            "afterimage point mount /p",
            "afterimage point clone web1 --point 7-18349d3b /c",
            "afterimage restore web1 --point 14:00 --to /r --force",
            "afterimage status web1 --watch",
            "afterimage unprotect web1 --purge --yes",
            "afterimage events --follow",
        ];
        for line in lines {
            if let Err(e) = Cli::try_parse_from(line.split(' ')) {
                panic!("{line}: {e}");
            }
        }
        let bad = [
            "afterimage protect web1",
            "afterimage protect a/b --disk /a",
            "afterimage protect web1 --disk /a --dir /vm",
            "afterimage protect web1 --disk /a --interval never",
            "afterimage sync web1 --timeout 2h",
            "afterimage mount",
            "afterimage set web1",
        ];
        for line in bad {
            let e = Cli::try_parse_from(line.split(' ')).unwrap_err();
            assert_eq!(e.exit_code(), 2, "{line}");
        }
    }
}
