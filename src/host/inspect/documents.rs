//! Our JSON documents in words: manifests, and the state of vault and daemon.

use std::path::Path;

use serde_json::Value;

use super::{Inspection, cannot, human};
use crate::base::durable::read_limited;
use crate::base::limits::DOCUMENT_BYTES_MAX;
use crate::base::{Digest, Error, ErrorKind, Result};
use crate::format::manifest::Manifest;
use crate::format::vaultstate::{ClockState, VmState};
use crate::vault::VmFile;

/// Documents by the keys that only they have; a key within another one is a path.
const DOCUMENT_CASES: [(&str, &[&str]); 10] = [
    (MANIFEST, &["parent", "parts", "disks", "cut_time"]),
    (CLOCK, &["state/seen", "digest"]),
    (IDENTITY, &["state/keep", "digest"]),
    (STATE, &["state", "digest"]),
    ("configuration of a VM", &["format", "vm"]),
    ("remembered mounts", &["format", "mounts"]),
    ("policies", &["format", "policies"]),
    (IDENTITY, &["format", "id", "name", "keep"]),
    ("identity of a clone", &["format", "point", "disks"]),
    ("a document of afterimage", &["format"]),
];
const MANIFEST: &str = "manifest of an epoch";
const CLOCK: &str = "clock of a vault";
const STATE: &str = "state of a VM in a vault";
const IDENTITY: &str = "identity of a VM in a vault";
/// Version of every document that says it only by its member `format`.
const DOCUMENT_FORMAT: u64 = 1;

/// Reads the document at `path`; `None`: it does not begin like one.
pub(super) fn inspect(path: &Path, first: &[u8]) -> Result<Option<Inspection>> {
    if first.iter().find(|b| !b.is_ascii_whitespace()) != Some(&b'{') {
        return Ok(None);
    }
    let bytes = read_limited(path, DOCUMENT_BYTES_MAX)?.unwrap_or_default();
    if let Some(split) = stored_manifest(&bytes) {
        return manifest(path, split).map(Some);
    }
    let value: Value = match serde_json::from_slice(&bytes) {
        Ok(value) => value,
        Err(e) => return torn(path, &bytes, &e).map(Some),
    };
    let has = |key: &&str| value.pointer(&format!("/{key}")).is_some();
    let Some((kind, _)) = DOCUMENT_CASES.iter().find(|(_, keys)| keys.iter().all(has)) else {
        return Ok(None);
    };
    if *kind == MANIFEST {
        return manifest(path, (None, &bytes)).map(Some);
    }
    check_format(path, &value)?;
    let mut out = Inspection::new(path, *kind);
    let sealed = match *kind {
        STATE => VmState::decode(&bytes).map(drop),
        CLOCK => ClockState::decode(&bytes).map(drop),
        IDENTITY => VmFile::decode(&bytes).map(drop),
        _ => Ok(()),
    };
    match sealed {
        Err(e) if e.kind() == ErrorKind::Version => return Err(e),
        Err(e) => out.damage(e.to_string()),
        Ok(()) => {}
    }
    lines(&mut out, &value, 0);
    out.report(&value)?;
    Ok(Some(out))
}

fn check_format(path: &Path, value: &Value) -> Result<()> {
    match value.get("format").map(Value::as_u64) {
        None | Some(Some(DOCUMENT_FORMAT)) => Ok(()),
        Some(_) => Err(Error::new(ErrorKind::Version, cannot(path))
            .why(format!("it has format {}, this program knows {DOCUMENT_FORMAT}", value["format"]))
            .hint("use the version of afterimage that wrote it, or a newer one")),
    }
}

/// A manifest as the vault stores it: one line about it, then exactly the bytes that were
/// committed.
fn stored_manifest(bytes: &[u8]) -> Option<(Option<Value>, &[u8])> {
    let newline = bytes.iter().position(|b| *b == b'\n')?;
    let (line, rest) = bytes.split_at_checked(newline)?;
    let about: Value = serde_json::from_slice(line).ok()?;
    about.get("digest")?;
    Some((Some(about), rest.get(1..)?))
}

fn manifest(path: &Path, (about, bytes): (Option<Value>, &[u8])) -> Result<Inspection> {
    let mut out = Inspection::new(path, MANIFEST);
    let digest = Digest::of(bytes);
    let said = about.as_ref().and_then(|a| a.get("digest")).and_then(Value::as_str);
    if said.is_some_and(|d| d != digest.to_string()) {
        out.damage("it does not match the digest that was stored with it");
    }
    let m = match Manifest::decode(bytes) {
        Ok(m) => m,
        Err(e) if e.kind() == ErrorKind::Version => return Err(e),
        Err(e) => {
            out.damage(e.to_string());
            return Ok(out);
        }
    };
    out.say(format!(
        "epoch {} ({:?}) of VM {} ({}), generation {}",
        m.epoch, m.kind, m.name, m.vm, m.generation
    ));
    out.say(format!("cut at {}, {:?}-consistent", m.cut_time, m.consistency));
    let parent = m.parent.map_or_else(|| "none, it is the first".to_owned(), |p| p.to_string());
    out.say(format!("digest {digest}"));
    out.say(format!("parent {parent}"));
    let stored: u64 = m.parts.iter().map(|p| p.length).sum();
    out.say(format!("{} changed, {} in parts: {}", human(m.changed_bytes), human(stored), m.parts.len()));
    for disk in &m.disks {
        let whole = if disk.whole { ", whole" } else { "" };
        let backing = disk.backing.as_ref().map(|b| format!(", backed by {b:?}")).unwrap_or_default();
        let path = disk.path.display();
        out.say(format!("disk {path} ({}): {}{whole}{backing}", disk.id, human(disk.size)));
    }
    for part in &m.parts {
        let name = part.name;
        out.say(format!("part {:06} {}: {}", name.sequence, name.digest.short(), human(part.length)));
    }
    for file in &m.definition {
        out.say(format!("definition {:?}: {} bytes", file.name, file.content.len()));
    }
    out.report(&m)?;
    Ok(out)
}

/// A document that cannot be read as a whole: where it breaks, and its readable beginning.
fn torn(path: &Path, bytes: &[u8], e: &serde_json::Error) -> Result<Inspection> {
    let text = String::from_utf8_lossy(bytes);
    let ours = DOCUMENT_CASES.iter().flat_map(|(_, keys)| *keys);
    if !ours.into_iter().any(|key| text.contains(&format!("\"{key}\""))) {
        return Err(Error::new(ErrorKind::Usage, cannot(path))
            .why("it is no document of afterimage")
            .hint("see what it is: file FILE"));
    }
    let mut out = Inspection::new(path, "damaged document");
    out.damage(format!("it cannot be read as JSON: {e}"));
    out.say("its beginning:");
    text.lines().take(10).for_each(|l| out.say(format!("  {}", l.chars().take(100).collect::<String>())));
    Ok(out)
}

/// `key: value`, nested ones indented; long lists are counted.
fn lines(out: &mut Inspection, value: &Value, depth: usize) {
    const LIST_TOLD_MAX: usize = 20;
    let indent = "  ".repeat(depth);
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                if value.is_object() || value.as_array().is_some_and(|a| a.iter().any(|v| !v.is_number())) {
                    out.say(format!("{indent}{key}:"));
                    lines(out, value, depth + 1);
                } else {
                    out.say(format!("{indent}{key}: {value}"));
                }
            }
        }
        Value::Array(items) => {
            for item in items.iter().take(LIST_TOLD_MAX) {
                out.say(format!("{indent}-"));
                lines(out, item, depth + 1);
            }
            if items.len() > LIST_TOLD_MAX {
                out.say(format!("{indent}and {} more", items.len() - LIST_TOLD_MAX));
            }
        }
        other => out.say(format!("{indent}{other}")),
    }
}
