//! The vault's own documents: `vault.json`, `state.json`, `clock.json`, and the stored manifest.
//!
//! `state.json` is what publishes everything: a point exists if and only if it is named there. It
//! is replaced once per applied epoch, so it must not grow with the number of points: consecutive
//! epochs are one range (7200 points at one a second: one line), and everything else that is known
//! about a point is in its stored manifest, which is written once.
//!
//! ```text
//! {"state":{"format":1,"applied":{"epoch":9,"digest":"..","cut_time":".."},"applying":null,
//!           "points":[[1,1],[4,9]],"pinned":[4]},"digest":"<blake3 of the compact state>"}
//! ```
//!
//! A stored manifest is one line of JSON (when it arrived, and its digest), a newline, and then
//! exactly the bytes that were committed.

use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::manifest::Manifest;
use crate::base::{Digest, EpochNumber, Error, ErrorKind, Result, Timestamp};

/// Version of the vault's layout and documents.
pub const VAULT_FORMAT: u32 = 1;

/// `vault.json`: what the folder is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VaultFile {
    /// [`VAULT_FORMAT`].
    pub format: u32,
}

/// The epoch that the disk files hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AppliedEpoch {
    /// Its number.
    pub epoch: EpochNumber,
    /// Digest of its manifest.
    pub digest: Digest,
    /// Its cut, by the primary's clock.
    pub cut_time: Timestamp,
}

/// `state.json`: what is published.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmState {
    /// [`VAULT_FORMAT`].
    pub format: u32,
    /// The newest applied epoch; always a point.
    pub applied: Option<AppliedEpoch>,
    /// The epoch that is being applied: its undo log is durable, the disk files are in between.
    pub applying: Option<EpochNumber>,
    /// Points as ranges of epochs, both ends included, ascending.
    points: Vec<(u64, u64)>,
    /// Points that retention never drops, ascending.
    pub pinned: Vec<EpochNumber>,
}

/// `clock.json`: how far the clock of the vault is believed (A4), sealed like `state.json`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClockState {
    /// [`VAULT_FORMAT`].
    pub format: u32,
    /// The wall clock when this was written.
    pub seen: Timestamp,
    /// Run time for which retention drops nothing yet.
    pub suspended_seconds: u64,
}

impl ClockState {
    /// Seen at `seen`, with so much left of a suspension: whole seconds, never less.
    pub fn new(seen: Timestamp, suspended: Duration) -> Self {
        let suspended_seconds = suspended.as_secs().saturating_add(u64::from(suspended.subsec_nanos() > 0));
        Self { format: VAULT_FORMAT, seen, suspended_seconds }
    }

    /// The bytes of `clock.json`.
    pub fn encode(&self) -> Result<Vec<u8>> {
        seal(self)
    }

    /// Reads `clock.json`.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        unseal("clock.json", bytes)
    }
}

/// A document and its digest, so that a flipped bit is noticed.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sealed<T> {
    state: T,
    digest: Digest,
}

/// The bytes of a document with its digest.
pub(crate) fn seal<T: Serialize>(state: &T) -> Result<Vec<u8>> {
    let digest = Digest::of(&to_json(state)?);
    to_json(&Sealed { state, digest })
}

/// Reads what [`seal`] made; `what` is its name.
pub(crate) fn unseal<T: Serialize + DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T> {
    let outer: Outer = from_json(what, bytes)?;
    check_format(what, outer.state.format)?;
    let sealed: Sealed<T> = from_json(what, bytes)?;
    if Digest::of(&to_json(&sealed.state)?) != sealed.digest {
        return Err(damaged(what, "it does not match its digest"));
    }
    Ok(sealed.state)
}

/// As much of a sealed document as every version has.
#[derive(Deserialize)]
struct Outer {
    state: VaultFile,
}

fn damaged(what: &str, why: &str) -> Error {
    Error::new(ErrorKind::Damaged, format!("{what} cannot be read")).why(why)
}

impl Default for VmState {
    fn default() -> Self {
        Self { format: VAULT_FORMAT, applied: None, applying: None, points: Vec::new(), pinned: Vec::new() }
    }
}

impl VmState {
    /// Every point, oldest first.
    pub fn points(&self) -> impl DoubleEndedIterator<Item = EpochNumber> + '_ {
        self.points.iter().flat_map(|(first, last)| (*first..=*last).map(EpochNumber))
    }

    /// Replaces the points; ascending.
    pub fn set_points(&mut self, points: impl IntoIterator<Item = EpochNumber>) {
        self.points.clear();
        points.into_iter().for_each(|p| self.push_point(p));
    }

    /// Adds a point newer than all others.
    pub fn push_point(&mut self, epoch: EpochNumber) {
        match self.points.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(epoch.0) => *last = epoch.0,
            _ => self.points.push((epoch.0, epoch.0)),
        }
    }

    /// The bytes of `state.json`.
    pub fn encode(&self) -> Result<Vec<u8>> {
        seal(self)
    }

    /// Reads `state.json`.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let state: Self = unseal("state.json", bytes)?;
        let ordered = state.points.iter().all(|(a, b)| a <= b) && state.points.is_sorted_by(|a, b| a.1 < b.0);
        let newest = state.points.last().map(|p| p.1);
        if !ordered || newest != state.applied.map(|h| h.epoch.0) {
            return Err(damaged("state.json", "its points are not in order"));
        }
        Ok(state)
    }
}

/// A manifest with what the vault knows about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredManifest {
    /// When the vault had the epoch durably, by the vault's clock.
    pub arrived: Timestamp,
    /// Digest of the manifest.
    pub digest: Digest,
    /// The manifest.
    pub manifest: Manifest,
}

#[derive(Serialize, Deserialize)]
struct Envelope {
    arrived: Timestamp,
    digest: Digest,
}

impl StoredManifest {
    /// The bytes of the file.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let mut bytes = to_json(&Envelope { arrived: self.arrived, digest: self.digest })?;
        bytes.push(b'\n');
        bytes.extend_from_slice(&self.manifest.encode()?);
        Ok(bytes)
    }

    /// Reads the file; the manifest must have the digest that the first line names.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let damaged = |why: &str| damaged("the stored manifest", why);
        let at = bytes.iter().position(|b| *b == b'\n').ok_or_else(|| damaged("it has no first line"))?;
        let (first, rest) = bytes.split_at(at);
        let body = rest.get(1..).unwrap_or_default();
        let envelope: Envelope = from_json("the first line of the stored manifest", first)?;
        if Digest::of(body) != envelope.digest {
            return Err(damaged("it does not match its digest"));
        }
        Ok(Self { arrived: envelope.arrived, digest: envelope.digest, manifest: Manifest::decode(body)? })
    }
}

/// Compact JSON.
pub fn to_json<T: Serialize>(value: &T) -> Result<Vec<u8>> {
    serde_json::to_vec(value)
        .map_err(|e| Error::new(ErrorKind::Internal, "a document of the vault cannot be written").source(e))
}

/// Reads JSON; [`ErrorKind::Damaged`] if it is none.
pub fn from_json<'a, T: Deserialize<'a>>(what: &str, bytes: &'a [u8]) -> Result<T> {
    serde_json::from_slice(bytes)
        .map_err(|e| Error::new(ErrorKind::Damaged, format!("{what} cannot be read")).source(e))
}

/// [`ErrorKind::Version`] unless `format` is the one that this program knows.
pub fn check_format(what: &str, format: u32) -> Result<()> {
    if format == VAULT_FORMAT {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Version, format!("{what} cannot be read"))
        .why(format!("it has format {format}, this program knows {VAULT_FORMAT}"))
        .hint("use the version of afterimage that wrote it, or a newer one"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> VmState {
        let mut state = VmState::default();
        state.set_points([1, 4, 5, 6].map(EpochNumber));
        (7..7200).for_each(|e| state.push_point(EpochNumber(e)));
        let digest = Digest::of(b"x");
        state.applied = Some(AppliedEpoch { epoch: EpochNumber(7199), digest, cut_time: Timestamp(5) });
        state
    }

    #[test]
    fn thousands_of_points_stay_small_and_a_flip_is_noticed() {
        let bytes = state().encode().unwrap();
        assert!(bytes.len() < 400, "{}", bytes.len());
        let back = VmState::decode(&bytes).unwrap();
        assert_eq!(back, state());
        assert_eq!(back.points().count(), 7197);
        let text = String::from_utf8(bytes).unwrap();
        let flipped = text.replace("[4,7199]", "[3,7199]");
        assert_eq!(VmState::decode(flipped.as_bytes()).unwrap_err().kind(), ErrorKind::Damaged);
        let newer = text.replace("\"format\":1", "\"format\":2");
        assert_eq!(VmState::decode(newer.as_bytes()).unwrap_err().kind(), ErrorKind::Version);
    }

    #[test]
    fn the_clock_is_sealed_too() {
        let clock = ClockState::new(Timestamp(1_700_000_000_000), Duration::from_millis(86_399_001));
        assert_eq!(clock.suspended_seconds, 86_400);
        let bytes = clock.encode().unwrap();
        assert_eq!(ClockState::decode(&bytes).unwrap(), clock);
        let text = String::from_utf8(bytes).unwrap();
        let kind = |text: &str| ClockState::decode(text.as_bytes()).unwrap_err().kind();
        assert_eq!(kind(&text.replace("86400", "6400")), ErrorKind::Damaged);
        assert_eq!(kind(&text.replace("2023", "2024")), ErrorKind::Damaged);
        assert_eq!(kind(&text.replace("\"format\":1", "\"format\":2")), ErrorKind::Version);
        assert_eq!(kind(&text[..30]), ErrorKind::Damaged);
    }
}
