//! The whole program: arguments in, exit code out.

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use super::args::{Cli, Command};
use super::helper::{HelperArgs, is_helper};
use super::out::Out;
use super::reach::Reach;
use super::report::{report, usage};
use super::{daemon, helper, journal, mounts, points, status, vms};
use crate::base::error::Context;
use crate::base::shell::shell;
use crate::base::{Error, ErrorKind, Result};

/// Runs the command of this process's arguments.
pub fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    if is_helper(&args) {
        let out = Out::new(false, false);
        return match HelperArgs::try_parse_from(&args) {
            Ok(args) => helper::run(&args).map_or_else(|e| report(&out, &e), |()| ExitCode::SUCCESS),
            Err(e) => misuse(&out, &args, &e),
        };
    }
    match Cli::try_parse_from(&args) {
        Ok(cli) => {
            let out = Out::new(cli.json, cli.yes);
            run(&out, cli).unwrap_or_else(|e| report(&out, &e))
        }
        Err(e) => misuse(&Out::new(args.iter().any(|a| a == "--json"), false), &args, &e),
    }
}

fn misuse(out: &Out, args: &[OsString], e: &clap::Error) -> ExitCode {
    let cli = Cli::command();
    let command = args.iter().skip(1).filter_map(|a| a.to_str()).find(|a| cli.find_subcommand(a).is_some());
    match usage(e, command) {
        Some(error) => report(out, &error),
        None => {
            let _ = e.print();
            ExitCode::from(u8::try_from(e.exit_code()).unwrap_or(2))
        }
    }
}

fn run(out: &Out, cli: Cli) -> Result<ExitCode> {
    let reach = Reach::new(&cli.state, cli.verbose)?;
    if !matches!(cli.command, Command::Daemon { .. }) {
        log_to_stderr(cli.verbose);
    }
    match cli.command {
        Command::Mount(args) => mounts::mount(out, &reach, &args),
        Command::Umount { dir } => mounts::umount(out, &reach, &dir),
        Command::Mounts => mounts::list(out, &reach),
        Command::Protect(args) => return vms::protect(out, &reach, args),
        Command::Unprotect { name, purge } => vms::unprotect(out, &reach, name, purge),
        Command::Set(args) => vms::set(out, &reach, args),
        Command::Policy(command) => vms::policy(out, &reach, command),
        Command::Pause { name } => vms::pause(out, &reach, name),
        Command::Resume { name } => vms::resume(out, &reach, name),
        Command::Sync { name, wait, timeout } => vms::sync(out, &reach, name, wait, timeout),
        Command::Status { vm, watch } => status::status(out, &reach, vm, watch),
        Command::Points { name } => points::list(out, &reach, name),
        Command::Point(command) => points::point(out, &reach, command),
        Command::Restore { name, point, to, force } => {
            return points::restore(out, &reach, name, &point.point, &to, force);
        }
        Command::Jobs { limit } => journal::jobs(out, &reach, limit),
        Command::Job(command) => journal::job(out, &reach, command),
        Command::Events { vm, follow, limit } => journal::events(out, &reach, vm, follow, limit),
        Command::Inspect { file } => return super::inspect::inspect(out, &reach, &file),
        Command::Doctor { dirs } => return super::doctor::doctor(out, &reach, &dirs),
        Command::Daemon { detached } => daemon::run(&reach, detached, cli.verbose),
        Command::Start => daemon::start(out, &reach),
        Command::Stop => daemon::stop(out, &reach),
        Command::Completions { shell } => completions(out, shell),
        Command::Man { dir } => man(out, dir.as_deref()),
    }
    .map(|()| ExitCode::SUCCESS)
}

fn log_to_stderr(verbose: u8) {
    let level = match verbose {
        0 => log::LevelFilter::Off,
        1 => log::LevelFilter::Info,
        _ => log::LevelFilter::Debug,
    };
    let _ = env_logger::Builder::new().filter_level(level).try_init();
}

fn completions(out: &Out, shell: clap_complete::Shell) -> Result<()> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "afterimage", &mut text);
    out.write(&String::from_utf8_lossy(&text))
}

fn man(out: &Out, dir: Option<&Path>) -> Result<()> {
    let Some(dir) = dir else {
        let mut text = Vec::new();
        clap_mangen::Man::new(Cli::command()).render(&mut text).context(|| "cannot write the manual page")?;
        return out.write(&String::from_utf8_lossy(&text));
    };
    if !dir.is_dir() {
        return Err(Error::new(ErrorKind::NotFound, format!("{} is no directory", dir.display()))
            .why("the manual pages are written into a directory that exists")
            .hint(format!("mkdir -p {0} && afterimage man {0}", shell(dir))));
    }
    clap_mangen::generate_to(Cli::command(), dir)
        .context(|| format!("cannot write the manual pages into {}", dir.display()))?;
    out.line(&format!("the manual pages are in {0}; read one: man {0}/afterimage.1", shell(dir)))
}
