//! `inspect`: any file of ours in words. Marks that the daemon has only in memory are asked for.

use std::path::Path;
use std::process::ExitCode;

use super::out::{Out, plain};
use super::reach::Reach;
use crate::base::shell::shell;
use crate::base::{Error, ErrorKind, Result};
use crate::host::api::types::FlushRequest;
use crate::host::inspect::{INSPECT_SCHEMA, Inspection, hrl_vm, inspect as read};

/// `inspect`: exit code 0 if the file is whole, 1 if it is damaged.
pub fn inspect(out: &Out, reach: &Reach, file: &Path) -> Result<ExitCode> {
    if let Some(vm) = hrl_vm(file)
        && let Some(client) = reach.if_running()
        && let Err(e) = client.call(&FlushRequest { vm: Some(vm.to_string()) })
        && e.kind() != ErrorKind::NotFound
    {
        eprintln!("warning: the newest marks may be missing: {e}");
    }
    let found = read(file).map_err(|e| more(e, file))?;
    out.answer(INSPECT_SCHEMA, &found, || words(&found))?;
    Ok(ExitCode::from(u8::from(!found.healthy)))
}

fn more(e: Error, file: &Path) -> Error {
    match e.kind() {
        ErrorKind::NotFound => Error::new(ErrorKind::NotFound, e.what().to_owned())
            .why("there is no such file; ours are hidden in the mounted view, look in the lower directory")
            .hint(format!("ls -la {}", shell(file.parent().unwrap_or(Path::new("."))))),
        _ => e,
    }
}

fn words(found: &Inspection) -> String {
    let mut text = format!("{}: {}\n", found.file.display(), found.kind);
    found.words.iter().for_each(|line| text += &format!("  {}\n", plain(line)));
    found.damaged.iter().for_each(|line| text += &format!("  DAMAGED: {}\n", plain(line)));
    text += if found.healthy { "  everything in it can be read\n" } else { "  it is damaged\n" };
    text
}
