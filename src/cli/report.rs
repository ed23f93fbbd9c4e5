//! Errors as people and scripts read them: exactly three lines, and an exit code.

use std::process::ExitCode;

use super::out::{Out, json, plain};
use crate::base::{Error, ErrorKind};
use crate::host::api::types::Failure;

/// Prints `error` and gives the exit code.
pub fn report(out: &Out, error: &Error) -> ExitCode {
    if out.json
        && let Ok(text) = json("afterimage.error/1", &Failure::from(error))
    {
        let _ = out.write(&text);
    }
    eprint!("{}", three_lines(error));
    ExitCode::from(error.kind().exit_code())
}

/// What failed, why, and what to type next.
pub fn three_lines(error: &Error) -> String {
    let why = error.reason().unwrap_or_else(|| why_of(error.kind()).to_owned());
    let next = error.next_step().unwrap_or_else(|| next_of(error.kind()));
    format!("error: {}\n  why: {}\n  next: {}\n", one_line(error.what()), one_line(&why), one_line(next))
}

fn one_line(text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
    plain(&lines.join("; "))
}

/// What an error of this kind means where nothing more is known.
const fn why_of(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::Usage => "the arguments make no sense together",
        ErrorKind::Configuration => "the configuration cannot be used",
        ErrorKind::Refused => "it would not be safe",
        ErrorKind::NotFound => "there is nothing of that name",
        ErrorKind::Exists => "there is one already",
        ErrorKind::Unreachable => "it does not answer",
        ErrorKind::NoDaemon => "nobody answers on its socket",
        ErrorKind::NoSpace => "there is too little room",
        ErrorKind::Busy => "it is in use or not ready",
        ErrorKind::Io => "the file system or the device said no",
        ErrorKind::Damaged => "the bytes are not those that were written",
        ErrorKind::Version => "it was written by another version",
        ErrorKind::ChainBroken => "the vault and this host no longer share a newest epoch",
        ErrorKind::DiskMissing => "a disk is missing or was changed beneath the mount",
        ErrorKind::Cancelled => "it was cancelled",
        ErrorKind::Partial => "some of it failed",
        ErrorKind::Internal => "this is a fault of the program",
    }
}

/// What helps against an error of this kind where nothing better is known.
const fn next_of(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::Usage => "afterimage help",
        ErrorKind::Configuration => "correct it, then try again",
        ErrorKind::NoDaemon => "afterimage start",
        ErrorKind::NoSpace => "make room, then try again: df -h",
        ErrorKind::Busy | ErrorKind::Unreachable => "try again; see: afterimage status",
        ErrorKind::Io => "look at the kernel's messages: dmesg | tail",
        ErrorKind::Version => "use the version of afterimage that wrote it, or a newer one",
        ErrorKind::Cancelled => "afterimage jobs",
        ErrorKind::Internal => "see the daemon's log (afterimage events), and report this",
        _ => "afterimage status",
    }
}

/// An error of clap in our form; `None`: help or version, which clap prints.
///
/// `command`: the command that was typed, as far as it is one.
pub fn usage(e: &clap::Error, command: Option<&str>) -> Option<Error> {
    if !e.use_stderr() || e.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return None;
    }
    let text = e.to_string();
    let mut what = Vec::new();
    let mut usage = None;
    let mut why = Vec::new();
    for paragraph in text.split("\n\n") {
        let first = paragraph.trim();
        if let Some(said) = first.strip_prefix("error: ") {
            what.push(said.to_owned());
        } else if let Some(line) = first.strip_prefix("Usage: ") {
            usage = line.lines().next().map(str::to_owned);
        } else if !first.starts_with("For more information") && !first.is_empty() {
            why.push(first.to_owned());
        }
    }
    let mut said = what.join(" ");
    // "...: reason" of a value parser is the why.
    if let Some((head, tail)) = said.clone().split_once("': ")
        && why.is_empty()
    {
        said = format!("{head}'");
        why.push(tail.to_owned());
    }
    if let Some((_, missing)) = said.clone().split_once("required arguments were not provided:") {
        said = "required arguments are missing".to_owned();
        why.insert(0, missing.trim().to_owned());
    }
    let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
    let why = if why.is_empty() { "the arguments cannot be understood".to_owned() } else { why.join("; ") };
    let why = why.split_whitespace().collect::<Vec<_>>().join(" ");
    let next = usage.unwrap_or_else(|| match command {
        Some(command) => format!("afterimage {command} --help"),
        None => "afterimage --help".to_owned(),
    });
    Some(Error::new(ErrorKind::Usage, said).why(why).hint(next))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::args::Cli;
    use super::*;

    #[test]
    fn every_error_has_three_lines() {
        let bare = three_lines(&Error::new(ErrorKind::NotFound, "there is no VM \"x\""));
        assert_eq!(
            bare,
            "error: there is no VM \"x\"\n  why: there is nothing of that name\n  next: afterimage status\n"
        );
        let long = Error::new(ErrorKind::Io, "a\nb").why("c\n\n d").hint("e\u{1b}");
        assert_eq!(three_lines(&long), "error: a; b\n  why: c; d\n  next: e?\n");
    }

    fn clap_words(line: &str) -> String {
        let e = Cli::try_parse_from(line.split(' ')).unwrap_err();
        three_lines(&usage(&e, Some("jobs")).unwrap())
    }

    #[test]
    fn what_clap_says_has_three_lines_too() {
        let cases = [
            (
                "afterimage protect web1 --disk /a --interval never",
                "error: invalid value 'never' for '--interval <TIME>'\n  why: write a time as in 1s, \
                 500ms, 5min, 2h or 7d\n",
            ),
            (
                "afterimage protect a/b --disk /a",
                "error: invalid value 'a/b' for '<NAME>'\n  why: \"a/b\" cannot",
            ),
            (
                "afterimage protect .. --disk /a",
                "error: invalid value '..' for '<NAME>'\n  why: \"..\" cannot",
            ),
            ("afterimage frobnicate", "error: unrecognized subcommand 'frobnicate'\n"),
            ("afterimage protect web1", "error: required arguments are missing\n  why: <"),
            ("afterimage mount", "error: required arguments are missing\n  why: <"),
            (
                "afterimage statsu",
                "error: unrecognized subcommand 'statsu'\n  why: tip: some similar subcommands",
            ),
            (
                "afterimage jobs --limit x",
                "error: invalid value 'x' for '--limit <LIMIT>'\n  why: invalid digit",
            ),
        ];
        for (line, begin) in cases {
            let words = clap_words(line);
            assert!(words.starts_with(begin), "{line}:\n{words}");
            assert_eq!(words.lines().count(), 3, "{words}");
            assert!(words.lines().nth(2).unwrap().starts_with("  next: afterimage"), "{words}");
        }
    }
}
