//! What every vault must do, written against the traits: later implementations run it too.

mod vault_support;

use std::collections::BTreeMap;
use std::sync::Arc;

use afterimage::base::{EpochNumber, ErrorKind, Timestamp, VmId};
use afterimage::core::ports::points::PointStore;
use afterimage::core::ports::vault::Vault;
use afterimage::format::part::{PartIndex, PartName, StoredPart};
use afterimage::vault::DirectoryVault;
use vault_support::*;

/// A vault and what keeps it alive.
struct Subject {
    vault: Arc<dyn Vault>,
    store: Arc<dyn PointStore>,
    _keep: Box<dyn std::any::Any>,
}

/// A name, and how a new, empty one is made.
type Implementation = (&'static str, fn() -> Subject);

/// Every implementation.
const IMPLEMENTATIONS: [Implementation; 1] = [("directory", directory)];

fn directory() -> Subject {
    let dir = memory_dir();
    let vault = DirectoryVault::open(&dir.path().join("vault"), TestClock::new()).unwrap();
    Subject { vault: vault.clone(), store: vault, _keep: Box::new(dir) }
}

fn each(test: impl Fn(&dyn Vault, &dyn PointStore)) {
    for (name, make) in IMPLEMENTATIONS {
        println!("vault: {name}");
        let subject = make();
        test(&*subject.vault, &*subject.store);
    }
}

fn registered(vault: &dyn Vault, primary: &Primary) {
    vault.register(primary.vm, &"web1".parse().unwrap()).unwrap();
}

#[test]
fn a_vm_must_be_registered_and_can_be_renamed() {
    each(|vault, store| {
        let vm = VmId(5);
        assert_eq!(kind(vault.head(vm)), ErrorKind::NotFound);
        assert_eq!(kind(store.points(vm)), ErrorKind::NotFound);
        assert!(store.vms().unwrap().is_empty());
        vault.register(vm, &"web1".parse().unwrap()).unwrap();
        vault.register(vm, &"web1".parse().unwrap()).unwrap();
        vault.register(vm, &"web2".parse().unwrap()).unwrap();
        let vms = store.vms().unwrap();
        assert_eq!((vms.len(), vms[0].name.as_str(), vms[0].points), (1, "web2", 0));
        assert_eq!(vault.head(vm).unwrap(), None);
        assert!(vault.space().unwrap().total_bytes > 0);
    });
}

#[test]
fn the_first_epoch_and_deltas_become_points() {
    each(|vault, store| {
        let mut primary = Primary::small(3, 20);
        registered(vault, &primary);
        let mut images = BTreeMap::new();
        for n in 0..12 {
            (0..3).for_each(|_| primary.mutate());
            let epoch = primary.cut();
            images.insert(epoch.point(), epoch.image.clone());
            let head = epoch.deliver(vault).unwrap();
            assert_eq!((head.epoch, head.digest), (epoch.manifest.epoch, epoch.digest()));
            assert_eq!(vault.head(primary.vm).unwrap(), Some(head));
            // Idempotent: what is the head already is acknowledged again.
            assert_eq!(vault.commit(primary.vm, &epoch.manifest).unwrap(), head);
            assert!(store.wait_applied(primary.vm, PATIENCE).unwrap());
            assert_eq!(vault.backlog(primary.vm).unwrap(), (0, 0));
            let points = store.points(primary.vm).unwrap();
            assert_eq!(points.len(), n + 1);
            assert!(points.is_sorted_by_key(|p| p.id.epoch));
            let newest = points.last().unwrap();
            assert_eq!((newest.id, newest.time), (epoch.point(), epoch.manifest.cut_time));
            let reader = store.open(primary.vm, newest.id).unwrap();
            assert_eq!(reader.definition(), epoch.manifest.definition);
            assert_eq!(reader.info(), newest);
        }
        assert_points(store, primary.vm, &images, "deltas");
        vault.renew(primary.vm, Timestamp(1_800_000_000_000)).unwrap();
        assert_eq!(store.points(primary.vm).unwrap().len(), 12);
    });
}

#[test]
fn delivery_goes_on_with_the_parts_that_are_there() {
    each(|vault, store| {
        let mut primary = Primary::small(4, 60);
        registered(vault, &primary);
        for round in 0..3 {
            let epoch = loop {
                let epoch = primary.clone().cut();
                if epoch.parts.len() > 1 {
                    primary.cut();
                    break epoch;
                }
                primary.random.next();
            };
            let (vm, number) = (primary.vm, epoch.manifest.epoch);
            assert!(vault.parts(vm, number).unwrap().is_empty());
            // Later parts may come first; the same one may come twice.
            for (name, bytes) in epoch.parts.iter().rev().skip(1).chain(&epoch.parts[..1]) {
                vault.put_part(vm, number, name, bytes).unwrap();
            }
            assert!(kind(vault.commit(vm, &epoch.manifest)) != ErrorKind::ChainBroken, "a part is missing");
            let listed = vault.parts(vm, number).unwrap();
            assert_eq!(listed.len(), epoch.parts.len() - 1);
            assert!(listed.is_sorted_by_key(|p| p.name.sequence));
            for part in &listed {
                let tail = vault.part_index(vm, number, part).unwrap();
                let index = PartIndex::decode(&tail, part.length).unwrap();
                assert!(!index.covered().is_empty());
            }
            epoch.deliver(vault).unwrap();
            assert!(store.wait_applied(vm, PATIENCE).unwrap());
            let reader = store.open(vm, epoch.point()).unwrap();
            assert_shows(&*reader, &epoch.image, &format!("round {round}"));
            (0..12).for_each(|_| primary.mutate());
        }
    });
}

#[test]
fn parts_that_the_manifest_does_not_name_leave_no_trace() {
    each(|vault, store| {
        let mut primary = Primary::small(6, 16);
        registered(vault, &primary);
        // Content that was read before the guest shrank and zeroed the disk.
        let stale = primary.clone().cut();
        primary.disks[0].truncate(9 * BLOCK + 10);
        primary.disks[0].write(0, &vec![0; 4 * BLOCK]);
        let epoch = primary.cut();
        let vm = primary.vm;
        for (name, bytes) in &stale.parts {
            vault.put_part(vm, epoch.manifest.epoch, name, bytes).unwrap();
        }
        // One named part was put before and overwritten by a stale one: it has to be sent again.
        epoch.deliver(vault).or_else(|_| epoch.deliver(vault)).unwrap();
        let reader = store.open(vm, epoch.point()).unwrap();
        assert_shows(&*reader, &epoch.image, "first copy");
        vault.abandon(vm, epoch.manifest.epoch).unwrap();
        assert_eq!(vault.head(vm).unwrap().unwrap().digest, epoch.digest());
    });
}

#[test]
fn abandoned_parts_are_gone() {
    each(|vault, store| {
        let mut primary = Primary::small(7, 16);
        registered(vault, &primary);
        for _ in 0..2 {
            let epoch = primary.clone().cut();
            let (vm, number) = (primary.vm, epoch.manifest.epoch);
            for (name, bytes) in &epoch.parts {
                vault.put_part(vm, number, name, bytes).unwrap();
            }
            vault.abandon(vm, number).unwrap();
            vault.abandon(vm, number).unwrap();
            assert!(vault.parts(vm, number).unwrap().is_empty());
            let epoch = primary.cut();
            epoch.deliver(vault).unwrap();
            assert!(store.wait_applied(vm, PATIENCE).unwrap());
            assert_shows(&*store.open(vm, epoch.point()).unwrap(), &epoch.image, "after abandon");
            primary.disks[0].write(0, &[3; 5 * BLOCK]);
        }
    });
}

#[test]
fn a_broken_chain_is_refused_in_words() {
    each(|vault, store| {
        let mut primary = Primary::small(8, 8);
        registered(vault, &primary);
        let mut foreign = primary.clone().cut();
        foreign.manifest.parent = Some(afterimage::base::Digest::of(b"another vault"));
        assert_eq!(kind(foreign.deliver(vault)), ErrorKind::ChainBroken);
        vault.abandon(primary.vm, foreign.manifest.epoch).unwrap();
        let first = primary.cut();
        first.deliver(vault).unwrap();
        primary.disks[0].write(0, &[1; BLOCK]);
        let mut lost = primary.clone();
        let second = primary.cut();
        primary.disks[0].write(0, &[2; BLOCK]);
        let third = primary.cut();
        let error = third.deliver(vault).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ChainBroken);
        assert!(error.to_string().contains(&first.digest().short()), "{error}");
        assert!(error.next_step().is_some());
        second.deliver(vault).unwrap();
        // Another epoch with the same number.
        lost.disks[0].write(BLOCK, &[3; BLOCK]);
        let fork = lost.cut();
        assert_eq!(kind(fork.deliver(vault)), ErrorKind::ChainBroken);
        third.deliver(vault).unwrap();
        assert!(store.wait_applied(primary.vm, PATIENCE).unwrap());
        assert_eq!(store.points(primary.vm).unwrap().len(), 3);
    });
}

#[test]
fn damaged_parts_and_wrong_names_are_refused() {
    each(|vault, store| {
        let mut primary = Primary::small(9, 8);
        registered(vault, &primary);
        for _ in 0..2 {
            primary.disks[0].write(0, &[9; 3 * BLOCK]);
            let epoch = primary.clone().cut();
            let (vm, number) = (primary.vm, epoch.manifest.epoch);
            let (name, bytes) = epoch.parts.last().unwrap();
            let mut flipped = bytes.clone();
            flipped[70] ^= 1;
            for bad in [&flipped[..], &bytes[..bytes.len() - 1], &bytes[..10], &[]] {
                assert_eq!(kind(vault.put_part(vm, number, name, bad)), ErrorKind::Damaged);
            }
            let other = PartName { digest: afterimage::base::Digest::of(b"other"), ..*name };
            assert_eq!(kind(vault.put_part(vm, number, &other, bytes)), ErrorKind::Damaged);
            assert!(vault.parts(vm, number).unwrap().is_empty());
            primary.cut().deliver(vault).unwrap();
            assert!(store.wait_applied(vm, PATIENCE).unwrap());
            // Too late.
            assert_eq!(kind(vault.put_part(vm, number, name, bytes)), ErrorKind::ChainBroken);
        }
    });
}

#[test]
fn manifests_that_could_do_harm_are_refused() {
    each(|vault, _| {
        let mut primary = Primary::small(10, 4);
        registered(vault, &primary);
        let good = primary.cut();
        for (name, bytes) in &good.parts {
            vault.put_part(primary.vm, EpochNumber(1), name, bytes).unwrap();
        }
        let refused = |change: &dyn Fn(&mut afterimage::format::manifest::Manifest), expected: ErrorKind| {
            let mut manifest = good.manifest.clone();
            change(&mut manifest);
            assert_eq!(kind(vault.commit(primary.vm, &manifest)), expected);
        };
        for path in ["/etc/passwd", "../x", "a/../../x", "", "."] {
            refused(&|m| m.disks[0].path = path.into(), ErrorKind::Damaged);
        }
        refused(&|m| m.disks[0].size = u64::MAX, ErrorKind::Damaged);
        refused(&|m| m.disks.push(m.disks[0].clone()), ErrorKind::Damaged);
        for name in ["../x", "a/b", "", "..", "/x"] {
            refused(&|m| m.definition[0].name = name.into(), ErrorKind::Damaged);
        }
        refused(&|m| m.vm = VmId(1), ErrorKind::Damaged);
        refused(&|m| m.format = 99, ErrorKind::Version);
        refused(&|m| m.key_id = 1, ErrorKind::Damaged);
        refused(&|m| m.parts.push(m.parts[0]), ErrorKind::Damaged);
        refused(&|m| m.parts[0].length += 1, ErrorKind::Io);
        let stray = StoredPart {
            name: PartName { sequence: 99, attempt: 0, digest: afterimage::base::Digest::of(b"") },
            length: 1,
        };
        refused(&|m| m.parts.push(stray), ErrorKind::Io);
        good.deliver(vault).unwrap();
    });
}

#[test]
fn points_are_pinned_deleted_and_kept_while_open() {
    each(|vault, store| {
        let mut primary = Primary::small(11, 12);
        registered(vault, &primary);
        let vm = primary.vm;
        let mut images = BTreeMap::new();
        for _ in 0..6 {
            (0..2).for_each(|_| primary.mutate());
            let epoch = primary.cut();
            images.insert(epoch.point(), epoch.image.clone());
            epoch.deliver(vault).unwrap();
        }
        assert!(store.wait_applied(vm, PATIENCE).unwrap());
        let ids: Vec<_> = store.points(vm).unwrap().iter().map(|p| p.id).collect();
        store.set_pinned(vm, ids[1], true).unwrap();
        let open = store.open(vm, ids[2]).unwrap();
        assert_eq!(kind(store.delete(vm, ids[5])), ErrorKind::Refused);
        assert_eq!(kind(store.delete(vm, ids[1])), ErrorKind::Refused);
        assert_eq!(kind(store.delete(vm, ids[2])), ErrorKind::Busy);
        assert_eq!(kind(store.purge(vm)), ErrorKind::Busy);
        for n in [3, 0, 4] {
            store.delete(vm, ids[n]).unwrap();
            assert_eq!(kind(store.delete(vm, ids[n])), ErrorKind::NotFound);
            assert_eq!(kind(store.open(vm, ids[n]).map(drop)), ErrorKind::NotFound);
            assert_points(store, vm, &images, "after a delete");
            assert_shows(&*open, &images[&ids[2]], "open over a delete");
        }
        drop(open);
        store.delete(vm, ids[2]).unwrap();
        store.set_pinned(vm, ids[1], false).unwrap();
        store.delete(vm, ids[1]).unwrap();
        assert_points(store, vm, &images, "the last one");
        assert_eq!(store.verify(vm).unwrap(), Vec::<String>::new());
        store.purge(vm).unwrap();
        assert_eq!(kind(store.points(vm)), ErrorKind::NotFound);
        assert_eq!(kind(store.purge(vm)), ErrorKind::NotFound);
        assert!(store.vms().unwrap().is_empty());
        vault.register(vm, &"again".parse().unwrap()).unwrap();
        assert_eq!(vault.head(vm).unwrap(), None);
    });
}

#[test]
fn reads_are_cut_at_the_end_and_at_any_offset() {
    each(|vault, store| {
        let mut primary = Primary::small(12, 70);
        registered(vault, &primary);
        primary.disks[0].truncate(66 * BLOCK + 77);
        let epoch = primary.cut();
        epoch.deliver(vault).unwrap();
        primary.disks[0].write(10 * BLOCK + 5, &[1; 3 * BLOCK]);
        primary.cut().deliver(vault).unwrap();
        assert!(store.wait_applied(primary.vm, PATIENCE).unwrap());
        let reader = store.open(primary.vm, epoch.point()).unwrap();
        let expected = epoch.image.values().next().unwrap();
        let mut random = Random(1);
        for _ in 0..300 {
            let at = random.below(expected.len() + 2 * BLOCK);
            let mut buffer = vec![9; random.below(70 * BLOCK)];
            let read = reader.read_at(0, at as u64, &mut buffer).unwrap();
            let rest = expected.get(at..).unwrap_or_default();
            assert_eq!(read, buffer.len().min(rest.len()));
            assert_eq!(buffer[..read], rest[..read]);
        }
        assert_eq!(kind(reader.read_at(1, 0, &mut [0])), ErrorKind::NotFound);
        assert_eq!(reader.next_data(0, u64::MAX - 5000).unwrap(), None);
    });
}
