//! Says whether the disks of a point are what one instant could have left (see the parent module).

use super::journal::{Journal, Write};
use super::sector::{SECTOR, Tag};

/// Checks points against a journal; quick for points in the order of their cuts.
pub struct Checker<'a> {
    journal: &'a Journal,
    /// Everything acknowledged before this place is in `required`.
    until: u64,
    /// How many acknowledged writes of each lane are in `required`.
    taken: Vec<usize>,
    /// Per disk and sector: the latest issue of a write that must be there or be overwritten.
    required: Vec<Vec<u64>>,
}

impl<'a> Checker<'a> {
    pub fn new(journal: &'a Journal) -> Self {
        let required =
            journal.disks.iter().map(|sectors| vec![0; usize::try_from(*sectors).unwrap()]).collect();
        Self { journal, until: 0, taken: vec![0; journal.lanes()], required }
    }

    /// Checks the content of all disks of one point. `at_least`: a place in the order from before
    /// the cut was asked for, so that everything acknowledged earlier must be in it; 0: not known.
    /// Returns the latest issue that is visible.
    pub fn check(&mut self, disks: &[Vec<u8>], at_least: u64) -> Result<u64, String> {
        let visible = self.visible(disks)?;
        let latest = visible.iter().flatten().flatten().map(|w| w.issued).max().unwrap_or(0);
        self.require_until(latest.max(at_least));
        for (disk, sectors) in visible.iter().enumerate() {
            for (sector, seen) in sectors.iter().enumerate() {
                let required = self.required[disk][sector];
                if required > 0 && seen.is_none_or(|w| w.acknowledged < required) {
                    return Err(format!(
                        "disk {disk}, sector {sector}: a write issued at {required} and acknowledged before \
                         {} is missing; seen is {seen:?}",
                        self.until
                    ));
                }
            }
        }
        Ok(latest)
    }

    fn visible(&self, disks: &[Vec<u8>]) -> Result<Vec<Vec<Option<Write>>>, String> {
        if disks.len() != self.journal.disks.len() {
            return Err(format!("{} disks instead of {}", disks.len(), self.journal.disks.len()));
        }
        let mut all = Vec::new();
        for (number, bytes) in disks.iter().enumerate() {
            let sectors = usize::try_from(self.journal.disks[number]).unwrap();
            if bytes.len() != sectors * SECTOR {
                return Err(format!(
                    "disk {number} has {} bytes instead of {}",
                    bytes.len(),
                    sectors * SECTOR
                ));
            }
            let seen = bytes.chunks_exact(SECTOR).enumerate();
            let seen: Result<Vec<_>, String> =
                seen.map(|(sector, bytes)| self.write_of(number, sector, bytes)).collect();
            all.push(seen?);
        }
        Ok(all)
    }

    fn write_of(&self, disk: usize, sector: usize, bytes: &[u8]) -> Result<Option<Write>, String> {
        let bad = |why: &str| format!("disk {disk}, sector {sector}: {why}");
        let Some(tag) = Tag::decode(bytes).map_err(|why| bad(&why))? else { return Ok(None) };
        if tag.disk as usize != disk || tag.sector != sector as u64 {
            return Err(bad(&format!("what is there belongs elsewhere: {tag:?}")));
        }
        let write = self.journal.find(tag.lane, tag.write);
        let write = write.ok_or_else(|| bad(&format!("a write that never was: {tag:?}")))?;
        if write.disk as usize != disk || !(write.first..write.first + write.count).contains(&tag.sector) {
            return Err(bad(&format!("{tag:?} is not what that write was: {write:?}")));
        }
        Ok(Some(write))
    }

    fn require_until(&mut self, until: u64) {
        if until < self.until {
            *self = Self::new(self.journal);
        }
        for lane in 0..self.journal.lanes() {
            let writes = self.journal.acknowledged(lane, self.taken[lane], until);
            self.taken[lane] += writes.len();
            for w in writes {
                let required = &mut self.required[w.disk as usize];
                for sector in w.first..w.first + w.count {
                    let slot = &mut required[usize::try_from(sector).unwrap()];
                    *slot = (*slot).max(w.issued);
                }
            }
        }
        self.until = until;
    }
}

/// The checker finds what it must find: each of these is a point that could not have been.
mod canaries {
    use super::*;

    struct World {
        journal: Journal,
        disks: Vec<Vec<u8>>,
    }

    impl World {
        fn new() -> Self {
            Self { journal: Journal::new(2, vec![8, 8]), disks: vec![vec![0; 8 * SECTOR]; 2] }
        }

        fn issue(&self, lane: usize, disk: u32, first: u64, count: u64) -> u32 {
            self.journal.issue(lane, disk, first, count)
        }

        fn put(&mut self, lane: u32, write: u32, disk: u32, sector: u64) {
            let at = usize::try_from(sector).unwrap() * SECTOR;
            Tag { disk, lane, write, sector }.encode(&mut self.disks[disk as usize][at..at + SECTOR]);
        }

        fn check(&self, at_least: u64) -> Result<u64, String> {
            Checker::new(&self.journal).check(&self.disks, at_least)
        }
    }

    #[test]
    fn the_second_of_a_pair_without_the_first_is_found() {
        let mut w = World::new();
        let a = w.issue(0, 0, 1, 1);
        w.journal.acknowledge(0, a);
        let b = w.issue(0, 1, 1, 1);
        w.put(0, b, 1, 1);
        assert!(w.check(0).unwrap_err().contains("missing"));
        w.put(0, a, 0, 1);
        w.check(0).unwrap();
    }

    #[test]
    fn an_acknowledged_write_that_is_there_in_part_is_found() {
        let mut w = World::new();
        let a = w.issue(0, 0, 0, 8);
        for sector in 0..4 {
            w.put(0, a, 0, sector);
        }
        w.check(0).unwrap();
        w.journal.acknowledge(0, a);
        w.check(0).unwrap();
        w.check(w.journal.now()).unwrap_err();
    }

    #[test]
    fn an_old_write_over_a_newer_one_is_found() {
        let mut w = World::new();
        let old = w.issue(0, 0, 3, 1);
        w.journal.acknowledge(0, old);
        let newer = w.issue(1, 0, 3, 1);
        w.journal.acknowledge(1, newer);
        let last = w.issue(1, 1, 0, 1);
        w.put(1, last, 1, 0);
        w.put(0, old, 0, 3);
        w.check(0).unwrap_err();
        w.put(1, newer, 0, 3);
        w.check(0).unwrap();
    }

    #[test]
    fn of_two_writes_at_once_either_may_win() {
        let mut w = World::new();
        let (a, b) = (w.issue(0, 0, 3, 1), w.issue(1, 0, 3, 1));
        w.journal.acknowledge(0, a);
        w.journal.acknowledge(1, b);
        let now = w.journal.now();
        w.put(0, a, 0, 3);
        w.check(now).unwrap();
        w.put(1, b, 0, 3);
        w.check(now).unwrap();
    }

    #[test]
    fn wrong_bytes_and_wrong_places_are_found() {
        let mut w = World::new();
        let a = w.issue(0, 0, 3, 1);
        w.put(0, a, 0, 3);
        let copy = w.disks[0][3 * SECTOR..4 * SECTOR].to_vec();
        w.disks[0][4 * SECTOR..5 * SECTOR].copy_from_slice(&copy);
        assert!(w.check(0).unwrap_err().contains("elsewhere"));
        w.disks[0][4 * SECTOR..5 * SECTOR].fill(7);
        assert!(w.check(0).unwrap_err().contains("nobody wrote"));
        w.disks[0][4 * SECTOR..5 * SECTOR].fill(0);
        w.disks[0][3 * SECTOR + 40] ^= 1;
        assert!(w.check(0).unwrap_err().contains("checksum"));
    }
}
