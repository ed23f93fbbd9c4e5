//! Opening a VM of the vault: what a kill or a power cut left is sorted out here.
//!
//! | found | means | done |
//! | --- | --- | --- |
//! | `vms/.new-*`, `vms/.purged-*` | registration or purge was interrupted | removed |
//! | file in `points/` that `state.json` does not name | unpublished or superseded log | removed |
//! | undo log of the epoch that is *applying* | A1: it is complete | published; the apply is repeated |
//! | inbox of an applied epoch | removal was interrupted | removed |
//! | inbox with a manifest whose parent is the head | committed | applied |
//! | inbox with a manifest that continues nothing | cannot be applied | manifest removed, parts stay |
//! | manifest in the inbox that cannot be read | it may be acknowledged | the VM is not opened |
//! | *applying*, and its manifest does not come next | the disks hold half of it | latched |
//! | inbox without a manifest | an epoch being received | stays; the shipper asks for it |
//! | `inbox/first` and a point | first copy committed | removed |
//! | disk file of no point and no epoch | disk is gone, or first copy abandoned | removed |

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::path::Path;
use std::sync::Arc;

use super::firstcopy::FirstCopy;
use super::layout::{VmDir, VmFile, make_dir, names, remove_dir, remove_disks_except, remove_file};
use super::steps::Steps;
use super::store::{PointRecord, Shared, VmStore, Waiting, head_of, read_manifest};
use super::undolog::UndoLog;
use crate::base::durable::{read_limited, sync_dir, write_atomic};
use crate::base::error::Context;
use crate::base::{Clock, DiskId, EpochNumber, Error, ErrorKind, Result, VmId, VmName};
use crate::core::ports::vault::Head;
use crate::core::retention::Keep;
use crate::format::vaultstate::{VAULT_FORMAT, VmState};

/// Largest `vm.json` and `state.json`.
const SMALL_DOCUMENT_BYTES_MAX: u64 = 64 << 20;

/// Makes the folder of a new VM: whole or not at all.
pub(super) fn create(vault: &Path, vm: VmId, name: &VmName) -> Result<()> {
    let vms = vault.join("vms");
    let new = vms.join(format!(".new-{vm}"));
    remove_dir(&new)?;
    make_dir(&new)?;
    for sub in ["disks", "inbox", "points"] {
        make_dir(&new.join(sub))?;
    }
    let file = VmFile { format: VAULT_FORMAT, id: vm, name: name.clone(), keep: Keep::default() };
    write_atomic(&new.join("vm.json"), &file.encode()?)?;
    write_atomic(&new.join("state.json"), &VmState::default().encode()?)?;
    let what = || format!("cannot make the folder of VM {vm}");
    std::fs::rename(&new, VmDir::new(vault, vm).root()).context(what)?;
    sync_dir(&vms)
}

/// Opens the folder of a VM.
pub(super) fn open(vault: &Path, vm: VmId, clock: Arc<dyn Clock>, steps: Arc<Steps>) -> Result<VmStore> {
    let dir = VmDir::new(vault, vm);
    let missing = |name: &str| {
        Error::new(ErrorKind::Damaged, format!("VM {vm} of the vault cannot be opened"))
            .why(format!("{} is missing", dir.root().join(name).display()))
    };
    let bytes = read_limited(&dir.vm_file(), SMALL_DOCUMENT_BYTES_MAX)?.ok_or_else(|| missing("vm.json"))?;
    let file = VmFile::decode(&bytes)?;
    if file.id != vm {
        return Err(Error::new(ErrorKind::Damaged, format!("VM {vm} of the vault cannot be opened"))
            .why(format!("its folder holds VM {}", file.id)));
    }
    let bytes = read_limited(&dir.state_file(), SMALL_DOCUMENT_BYTES_MAX)?;
    let doc = VmState::decode(&bytes.ok_or_else(|| missing("state.json"))?)?;
    let chain = chain(&dir, &doc);
    remove_leftovers(&dir, &doc, &chain)?;
    let (points, last_error) = load_points(&dir, &doc, &chain);
    let (queue, head) = load_inbox(&dir, &doc)?;
    let latched = half_applied(&doc, &queue);
    let intake = match doc.applied {
        None => Some(FirstCopy::load(&dir)?),
        Some(_) => {
            remove_dir(&dir.first())?;
            None
        }
    };
    let is_complete = doc.points().count() == points.len();
    tidy_disks(&dir, &points, &queue, intake.as_ref(), is_complete && latched.is_none())?;
    let shared = Shared {
        file,
        current_as_of: head.map(|h| h.cut_time),
        head,
        queue,
        points,
        open: HashMap::new(),
        last_error,
        latched,
        is_stopping: false,
        verified: HashSet::new(),
        pokes: 0,
    };
    Ok(VmStore::new(dir, clock, steps, shared, doc, intake, chain))
}

/// The published undo logs: one between each two points, and that of the epoch that is applying.
fn chain(dir: &VmDir, doc: &VmState) -> Vec<Arc<UndoLog>> {
    let mut ends: Vec<EpochNumber> = doc.points().collect();
    ends.extend(doc.applying);
    let pairs = ends.windows(2).filter_map(|w| Some((*w.first()?, *w.last()?)));
    pairs.map(|(base, epoch)| UndoLog::new(dir.undo(epoch, base), epoch, base)).collect()
}

fn remove_leftovers(dir: &VmDir, doc: &VmState, chain: &[Arc<UndoLog>]) -> Result<()> {
    let mut known: HashSet<String> = doc.points().map(|p| format!("{p}.manifest")).collect();
    let logs = chain.iter().filter_map(|log| log.path().file_name()?.to_str());
    known.extend(logs.map(str::to_owned));
    for name in names(&dir.points())?.iter().filter(|n| !known.contains(*n)) {
        remove_file(&dir.points().join(name))?;
    }
    Ok(())
}

/// The points that can be opened, and why others cannot.
fn load_points(dir: &VmDir, doc: &VmState, chain: &[Arc<UndoLog>]) -> (Vec<PointRecord>, Option<String>) {
    let mut points = Vec::new();
    let mut problem = None;
    // From the newest on: a log that is missing takes all older points with it.
    let mut is_reachable = true;
    let all: Vec<EpochNumber> = doc.points().collect();
    for epoch in all.into_iter().rev() {
        let log = chain.binary_search_by_key(&epoch, |log| log.base).ok().and_then(|n| chain.get(n));
        if let Some(log) = log.filter(|log| !log.path().exists()) {
            is_reachable = false;
            problem =
                Some(format!("undo log {} is missing: older points cannot be shown", log.path().display()));
        }
        match read_manifest(&dir.point_manifest(epoch)) {
            Ok(stored) if is_reachable => points.push(PointRecord::new(&stored, doc.pinned.contains(&epoch))),
            Ok(_) => {}
            Err(e) => problem = Some(format!("point {epoch} cannot be shown: {e}")),
        }
    }
    points.reverse();
    if let Some(problem) = &problem {
        log::error!("vault: {problem}");
    }
    (points, problem)
}

/// Why nothing can be applied: an epoch overwrote the disks in part, and is not there to go on with.
/// Its undo log shows all points; another epoch would take the half of it for the newest point.
fn half_applied(doc: &VmState, queue: &VecDeque<Waiting>) -> Option<String> {
    let applying = doc.applying.filter(|epoch| queue.front().map(|w| w.epoch) != Some(*epoch))?;
    let why = format!("epoch {applying} was half applied, and its manifest is not in the inbox any more");
    log::error!("vault: {why}");
    Some(why)
}

/// Committed epochs that continue what is applied, and the newest of them. What cannot be read may
/// have been acknowledged, so it is never taken for something that is not there.
fn load_inbox(dir: &VmDir, doc: &VmState) -> Result<(VecDeque<Waiting>, Option<Head>)> {
    let mut head = doc.applied.map(|a| head_of(a.epoch, a.digest, a.cut_time));
    let mut queue = VecDeque::new();
    let mut epochs: Vec<EpochNumber> =
        names(&dir.inbox())?.into_iter().filter_map(|n| n.parse().ok().map(EpochNumber)).collect();
    epochs.sort();
    for epoch in epochs {
        if head.is_some_and(|h| epoch <= h.epoch) {
            remove_dir(&dir.epoch(epoch))?;
            continue;
        }
        let path = dir.inbox_manifest(epoch);
        for name in names(&dir.epoch(epoch))?.iter().filter(|n| n.ends_with(".new")) {
            remove_file(&dir.epoch(epoch).join(name))?;
        }
        if !path.try_exists().context(|| format!("cannot look for {}", path.display()))? {
            continue;
        }
        let stored = read_manifest(&path).map_err(|e| {
            e.hint(format!(
                "check the disks of the vault, then restart the daemon; without {} the VM is sent whole",
                path.display()
            ))
        })?;
        if stored.manifest.epoch == epoch && stored.manifest.parent == head.map(|h| h.digest) {
            let bytes = stored.manifest.parts.iter().map(|p| p.length).sum();
            queue.push_back(Waiting { epoch, bytes });
            head = Some(head_of(epoch, stored.digest, stored.manifest.cut_time));
        } else if doc.applying.is_some_and(|a| queue.front().map(|w| w.epoch) != Some(a)) {
            log::error!("vault: manifest {} continues nothing; it stays", path.display());
        } else {
            log::error!("vault: manifest {} is removed: it continues nothing", path.display());
            remove_file(&path)?;
        }
    }
    Ok((queue, head))
}

fn tidy_disks(
    dir: &VmDir,
    points: &[PointRecord],
    queue: &VecDeque<Waiting>,
    first: Option<&FirstCopy>,
    is_complete: bool,
) -> Result<()> {
    // While a point cannot be read, nobody knows which disks it needs.
    if !is_complete || first.is_some_and(|f| !f.is_empty()) {
        return Ok(());
    }
    let mut needed: BTreeSet<DiskId> = points.iter().flat_map(|p| p.disks.iter().copied()).collect();
    for waiting in queue {
        let stored = read_manifest(&dir.inbox_manifest(waiting.epoch))?;
        needed.extend(stored.manifest.disks.iter().map(|d| d.id));
    }
    remove_disks_except(dir, &needed)
}
