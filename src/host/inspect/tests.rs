//! Good, torn, damaged and foreign files.

use std::path::PathBuf;

use tempfile::TempDir;

use super::*;
use crate::base::{BootId, Digest, DiskId, EpochNumber, Timestamp};
use crate::format::hrl::{CHUNK_WORDS, HrlEncoder, HrlRecord};
use crate::format::manifest::{Consistency, EpochKind, MANIFEST_FORMAT, Manifest, ManifestDisk};
use crate::format::part::{PartBuilder, StoredPart};

fn file(dir: &TempDir, bytes: &[u8]) -> PathBuf {
    let path = dir.path().join("file");
    std::fs::write(&path, bytes).unwrap();
    path
}

fn hrl() -> Vec<u8> {
    let header = HrlHeader {
        vm: VmId(1),
        disk: DiskId(2),
        epoch: EpochNumber(5),
        created: Timestamp(1_700_000_000_000),
        boot: BootId(3),
        path: "web/a.raw".into(),
        nonce: 4,
    };
    let mut bytes = header.encode();
    let mut encoder = HrlEncoder::new(&header);
    let mut bits = [0u64; CHUNK_WORDS];
    bits[0] = 0b1111;
    encoder.chunk(1, &bits, &mut bytes);
    encoder.record(&HrlRecord::Sync, &mut bytes);
    encoder.record(&HrlRecord::Whole { reason: "new disk".into() }, &mut bytes);
    bytes
}

#[test]
fn an_hrl_is_told_in_words() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(&dir, &hrl());
    let found = inspect(&path).unwrap();
    let words = found.words.join("\n");
    assert!(found.healthy, "{found:?}");
    for part in [
        "web/a.raw",
        "epoch 5",
        "4 blocks of 4 KiB (16.0 KiB) in 1 runs",
        "blocks 16384 to 16387",
        "new disk",
    ] {
        assert!(words.contains(part), "{part}:\n{words}");
    }
    assert_eq!(found.report["marked_bytes"], 16384);
    assert_eq!(hrl_vm(&path), Some(VmId(1)));
}

#[test]
fn a_torn_end_is_no_damage_and_a_damaged_record_is() {
    let dir = tempfile::tempdir().unwrap();
    let mut torn = hrl();
    torn.extend_from_slice(&[7; 100]);
    assert!(inspect(&file(&dir, &torn)).unwrap().healthy);
    let mut damaged = hrl();
    damaged[4096 + 30] ^= 1;
    let found = inspect(&file(&dir, &damaged)).unwrap();
    assert!(!found.healthy);
    assert_eq!(found.damaged.len(), 1, "{found:?}");
    let mut header = hrl();
    header[100] ^= 1;
    assert_eq!(inspect(&file(&dir, &header)).unwrap_err().kind(), ErrorKind::Damaged);
}

fn part() -> (StoredPart, Vec<u8>) {
    let mut builder = PartBuilder::new();
    builder.add_data(DiskId(7), 8192, &[1; 8192]).unwrap();
    let noise: Vec<u8> =
        (0..65536u32).flat_map(|i| blake3::hash(&i.to_le_bytes()).as_bytes()[..1].to_vec()).collect();
    builder.add_data(DiskId(7), 1 << 20, &noise).unwrap();
    builder.add_hole(DiskId(8), 0, 1 << 30).unwrap();
    let (name, bytes) = builder.finish(0, 9);
    (StoredPart { name, length: bytes.len() as u64 }, bytes)
}

#[test]
fn a_part_is_read_with_and_without_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let (_, bytes) = part();
    let whole = inspect(&file(&dir, &bytes)).unwrap();
    assert!(whole.healthy, "{whole:?}");
    assert_eq!(whole.report["frames"], 3);
    let cut = inspect(&file(&dir, &bytes[..bytes.len() - 10])).unwrap();
    assert!(!cut.healthy);
    assert_eq!(cut.report["frames"], 3, "{cut:?}");
    let mut flipped = bytes.clone();
    let middle = bytes.len() / 2;
    flipped[middle] ^= 1;
    let found = inspect(&file(&dir, &flipped)).unwrap();
    assert_eq!(found.report["frames_damaged"], 1, "{found:?}");
    let mut newer = bytes;
    newer[8] = 99;
    let e = inspect(&file(&dir, &newer)).unwrap_err();
    assert_eq!((e.kind(), e.kind().exit_code()), (ErrorKind::Version, 1));
}

fn manifest() -> Manifest {
    Manifest {
        format: MANIFEST_FORMAT,
        vm: VmId(1),
        name: "web1".parse().unwrap(),
        generation: 1,
        epoch: EpochNumber(3),
        kind: EpochKind::Delta,
        parent: None,
        cut_time: Timestamp(1_700_000_000_000),
        consistency: Consistency::Crash,
        disks: vec![ManifestDisk {
            id: DiskId(7),
            path: "a.raw".into(),
            size: 1 << 30,
            whole: true,
            backing: None,
        }],
        parts: vec![part().0],
        changed_bytes: 8192,
        definition: vec![],
        key_id: 0,
    }
}

#[test]
fn manifests_bare_and_stored() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = manifest().encode().unwrap();
    let found = inspect(&file(&dir, &bytes)).unwrap();
    assert!(found.healthy);
    assert!(found.words.iter().any(|w| w.contains("a.raw") && w.contains("1.0 GiB, whole")), "{found:?}");
    let digest = Digest::of(&bytes);
    let stored = [format!("{{\"arrived\":\"x\",\"digest\":\"{digest}\"}}\n").as_bytes(), &bytes].concat();
    assert!(inspect(&file(&dir, &stored)).unwrap().healthy);
    let mut damaged = stored.clone();
    let at = damaged.len() - 30;
    damaged[at] ^= 1;
    assert!(!inspect(&file(&dir, &damaged)).unwrap().healthy);
    let mut newer = manifest();
    newer.format = 99;
    let e = inspect(&file(&dir, &newer.encode().unwrap())).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Version);
    let torn = inspect(&file(&dir, &bytes[..bytes.len() / 2])).unwrap();
    assert!(!torn.healthy);
}

#[test]
fn foreign_files_are_not_guessed_at() {
    let dir = tempfile::tempdir().unwrap();
    for bytes in [&b""[..], b"hello", b"{}", b"{\"a\":1}", b"{ nonsense", &[0; 5000], b"AFIMHRL\n"] {
        let e = inspect(&file(&dir, bytes)).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Usage, "{bytes:?}: {e}");
    }
    assert_eq!(inspect(dir.path()).unwrap_err().kind(), ErrorKind::Usage);
    assert_eq!(inspect(&dir.path().join("missing")).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn no_bytes_make_it_panic() {
    let dir = tempfile::tempdir().unwrap();
    let samples = [hrl(), part().1, manifest().encode().unwrap()];
    for sample in samples {
        for at in (0..sample.len()).step_by(sample.len() / 60 + 1) {
            let mut bytes = sample.clone();
            bytes[at] = bytes[at].wrapping_add(0x81);
            let _ = inspect(&file(&dir, &bytes));
            let _ = inspect(&file(&dir, &sample[..at]));
        }
    }
}

#[test]
fn the_state_of_a_vm_is_sealed() {
    use crate::format::vaultstate::{AppliedEpoch, VmState};
    let dir = tempfile::tempdir().unwrap();
    let mut state = VmState::default();
    state.push_point(EpochNumber(4));
    let applied = AppliedEpoch { epoch: EpochNumber(4), digest: Digest::of(b"x"), cut_time: Timestamp(5) };
    state.applied = Some(applied);
    let bytes = state.encode().unwrap();
    let good = inspect(&file(&dir, &bytes)).unwrap();
    assert!(good.healthy, "{good:?}");
    let text = String::from_utf8(bytes).unwrap();
    let flipped = text.replace("\"applying\":null", "\"applying\":9");
    assert!(!inspect(&file(&dir, flipped.as_bytes())).unwrap().healthy);
    let newer = text.replace("\"format\":1", "\"format\":2");
    assert_eq!(inspect(&file(&dir, newer.as_bytes())).unwrap_err().kind(), ErrorKind::Version);
    let mounts = b"{\"format\":2,\"mounts\":[]}";
    assert_eq!(inspect(&file(&dir, mounts)).unwrap_err().kind(), ErrorKind::Version);
}

#[test]
fn the_identity_of_a_vm_is_sealed() {
    use crate::core::retention::Keep;
    use crate::vault::VmFile;
    let dir = tempfile::tempdir().unwrap();
    let identity = VmFile { format: 1, id: VmId(7), name: "web1".parse().unwrap(), keep: Keep::default() };
    let text = String::from_utf8(identity.encode().unwrap()).unwrap();
    let good = inspect(&file(&dir, text.as_bytes())).unwrap();
    assert!(good.healthy && good.kind == "identity of a VM in a vault", "{good:?}");
    let flipped = text.replace("web1", "web0");
    assert!(!inspect(&file(&dir, flipped.as_bytes())).unwrap().healthy);
    // The first version had no seal.
    let first = serde_json::to_vec(&identity).unwrap();
    let good = inspect(&file(&dir, &first)).unwrap();
    assert!(good.healthy && good.kind == "identity of a VM in a vault", "{good:?}");
    assert_eq!(VmFile::decode(&first).unwrap(), identity);
}

#[test]
fn the_clock_of_a_vault_is_sealed() {
    use crate::format::vaultstate::ClockState;
    let dir = tempfile::tempdir().unwrap();
    let clock = ClockState::new(Timestamp(1_700_000_000_000), std::time::Duration::from_secs(86_400));
    let text = String::from_utf8(clock.encode().unwrap()).unwrap();
    let good = inspect(&file(&dir, text.as_bytes())).unwrap();
    assert!(good.healthy && good.kind == "clock of a vault", "{good:?}");
    assert!(good.words.iter().any(|w| w.contains("suspended_seconds: 86400")), "{good:?}");
    let flipped = text.replace("86400", "0");
    assert!(!inspect(&file(&dir, flipped.as_bytes())).unwrap().healthy);
    let newer = text.replace("\"format\":1", "\"format\":2");
    assert_eq!(inspect(&file(&dir, newer.as_bytes())).unwrap_err().kind(), ErrorKind::Version);
}

#[test]
fn the_map_of_a_clone_counts_its_blocks() {
    use crate::format::overlay::{OVERLAY_BITMAP_OFFSET, OverlayHeader};
    let dir = tempfile::tempdir().unwrap();
    let header = OverlayHeader {
        sequence: 3,
        disk: DiskId(7),
        size: 1 << 20,
        base_limit: 4096,
        mode: 0o600,
        uid: 0,
        gid: 0,
        mtime_ms: 5,
    };
    let mut bytes = vec![0; OVERLAY_BITMAP_OFFSET as usize];
    let slot = header.slot() as usize;
    let encoded = header.encode();
    bytes[slot..slot + encoded.len()].copy_from_slice(&encoded);
    bytes.extend([0xff, 0, 1]);
    let found = inspect(&file(&dir, &bytes)).unwrap();
    assert!(found.healthy);
    assert!(found.words.iter().any(|w| w.starts_with("9 blocks")), "{found:?}");
    bytes[slot + 40] ^= 1;
    assert_eq!(inspect(&file(&dir, &bytes)).unwrap_err().kind(), ErrorKind::Damaged);
}

#[test]
fn the_hot_region_log_is_told_in_words() {
    use crate::format::hotlog::{HotHeader, HotKind, HotRecord};
    let dir = tempfile::tempdir().unwrap();
    let header = HotHeader { log: u128::MAX, generation: 2, nonce: 3, boot: BootId(4), last_activation: 5 };
    let mut bytes = header.encode();
    let record = |kind, activation| HotRecord { kind, disk: DiskId(7), start: 10, length: 3, activation };
    bytes.extend(record(HotKind::Snapshot, 5).encode(header.nonce, 0));
    bytes.extend(record(HotKind::Hot, 6).encode(header.nonce, 1));
    bytes.extend([0; 640]);
    let found = inspect(&file(&dir, &bytes)).unwrap();
    assert!(found.healthy);
    assert!(found.words.iter().any(|w| w.contains("3 hot regions (12.0 MiB)")), "{found:?}");
    bytes[4096 + 20] ^= 1;
    assert!(!inspect(&file(&dir, &bytes)).unwrap().healthy);
    bytes[40] ^= 1;
    assert_eq!(inspect(&file(&dir, &bytes)).unwrap_err().kind(), ErrorKind::Damaged);
}
