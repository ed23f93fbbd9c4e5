//! One story for the tests that stop or damage a vault.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use afterimage::base::{Error, ErrorKind, PointId, Result, VmId};
use afterimage::core::ports::points::PointStore;
use afterimage::core::ports::vault::Vault;
use afterimage::vault::DirectoryVault;

use super::*;

/// What is done to the vault, in order.
pub enum Deed {
    Deliver(Box<Epoch>),
    Pin(PointId),
    Delete(PointId),
}

/// What happens to a vault, and what each point must show.
pub struct Story {
    pub deeds: Vec<Deed>,
    pub images: BTreeMap<PointId, Image>,
    pub vm: VmId,
}

/// Disks grow, shrink, come, go and are renamed; points are pinned and deleted.
pub fn story() -> Story {
    let mut primary = Primary::small(5, 24);
    let vm = primary.vm;
    let mut deeds = Vec::new();
    let mut images = BTreeMap::new();
    let mut points = Vec::new();
    for n in 0..9usize {
        match n {
            1 => primary.disks[0].write(3 * BLOCK, &[7; 5 * BLOCK]),
            2 => primary.disks[0].truncate(10 * BLOCK + 100),
            3 => {
                primary.disks[0].write(20 * BLOCK, &[9; 3000]);
                primary.disks.push(Disk::new(2, "second.raw", vec![5; 6 * BLOCK]));
            }
            4 => primary.disks[0].whole = true,
            5 => primary.disks[1].write(0, &vec![0; 4 * BLOCK]),
            6 => drop(primary.disks.remove(1)),
            7 => primary.disks[0].path = "renamed.raw".into(),
            _ => primary.disks[0].write(4 * BLOCK, &[n as u8; 2 * BLOCK]),
        }
        let epoch = primary.cut();
        images.insert(epoch.point(), epoch.image.clone());
        points.push(epoch.point());
        deeds.push(Deed::Deliver(Box::new(epoch)));
    }
    // The oldest; two in a row in the middle, then their neighbour; and one that is pinned stays.
    deeds.push(Deed::Pin(points[6]));
    for n in [0, 2, 3, 1] {
        deeds.push(Deed::Delete(points[n]));
    }
    let epoch = {
        primary.disks[0].write(0, &[1; BLOCK]);
        primary.cut()
    };
    images.insert(epoch.point(), epoch.image.clone());
    deeds.push(Deed::Deliver(Box::new(epoch)));
    deeds.push(Deed::Delete(points[5]));
    Story { deeds, images, vm }
}

/// Waits until whatever was begun is finished, or cannot be.
pub fn settled(story: &Story, vault: &DirectoryVault) -> Result<()> {
    const LOOK: Duration = Duration::from_millis(50);
    let start = Instant::now();
    loop {
        let looked = Instant::now();
        if vault.wait_applied(story.vm, LOOK)? {
            return Ok(());
        }
        let error = vault.last_error(story.vm);
        // A vault that was stopped does not wait.
        let is_stopped = looked.elapsed() < LOOK;
        if is_stopped || error.is_some() || start.elapsed() > PATIENCE {
            return Err(Error::new(ErrorKind::Cancelled, error.unwrap_or_default()));
        }
    }
}

/// Does what is not done yet; an error when the vault was stopped.
pub fn go_on(story: &Story, vault: &DirectoryVault, next: &mut usize) -> Result<()> {
    vault.register(story.vm, &"web1".parse().unwrap())?;
    while let Some(deed) = story.deeds.get(*next) {
        match deed {
            Deed::Deliver(epoch) => {
                epoch.deliver(vault)?;
                settled(story, vault)?;
            }
            Deed::Pin(point) => vault.set_pinned(story.vm, *point, true)?,
            Deed::Delete(point) => match vault.delete(story.vm, *point) {
                // The kill came after the commit.
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                other => other?,
            },
        }
        *next += 1;
    }
    Ok(())
}
