//! Every write of a load, with its place in the one order of issues and acknowledgements. It lives
//! in the memory of the test, which nothing that is tested can reach.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// One write.
#[derive(Clone, Copy, Debug)]
pub struct Write {
    /// Its place in the order when it was issued.
    pub issued: u64,
    /// Its place when it was acknowledged; `u64::MAX`: never.
    pub acknowledged: u64,
    pub disk: u32,
    /// First sector, and how many.
    pub first: u64,
    pub count: u64,
}

#[derive(Default)]
struct Lane {
    writes: Vec<Write>,
    /// Indices of acknowledged writes, in the order of their acknowledgement.
    acknowledged: Vec<usize>,
}

/// All writes of a load; lanes add, a checker reads at the same time.
pub struct Journal {
    order: AtomicU64,
    lanes: Vec<Mutex<Lane>>,
    /// Size of each disk in sectors.
    pub disks: Vec<u64>,
}

impl Journal {
    pub fn new(lanes: usize, disks: Vec<u64>) -> Self {
        Self { order: AtomicU64::new(0), lanes: (0..lanes).map(|_| Mutex::default()).collect(), disks }
    }

    /// A place in the order that is later than everything so far.
    pub fn now(&self) -> u64 {
        self.order.load(Ordering::SeqCst) + 1
    }

    /// Before a write is handed to the kernel. Returns its number in its lane.
    pub fn issue(&self, lane: usize, disk: u32, first: u64, count: u64) -> u32 {
        let mut lane = self.lanes[lane].lock().unwrap();
        let issued = self.order.fetch_add(1, Ordering::SeqCst) + 1;
        lane.writes.push(Write { issued, acknowledged: u64::MAX, disk, first, count });
        u32::try_from(lane.writes.len()).unwrap()
    }

    /// After the kernel has said that a write is done.
    pub fn acknowledge(&self, lane: usize, write: u32) {
        let mut lane = self.lanes[lane].lock().unwrap();
        let index = write as usize - 1;
        lane.writes[index].acknowledged = self.order.fetch_add(1, Ordering::SeqCst) + 1;
        lane.acknowledged.push(index);
    }

    pub fn lanes(&self) -> usize {
        self.lanes.len()
    }

    pub fn find(&self, lane: u32, write: u32) -> Option<Write> {
        let lane = self.lanes.get(lane as usize)?.lock().unwrap();
        lane.writes.get((write as usize).checked_sub(1)?).copied()
    }

    /// Acknowledged writes of a lane from number `from` on whose acknowledgement is before `until`.
    pub fn acknowledged(&self, lane: usize, from: usize, until: u64) -> Vec<Write> {
        let lane = self.lanes[lane].lock().unwrap();
        lane.acknowledged[from..]
            .iter()
            .map(|index| lane.writes[*index])
            .take_while(|w| w.acknowledged < until)
            .collect()
    }

    /// Writes issued, and those of them acknowledged.
    pub fn counts(&self) -> (usize, usize) {
        self.lanes.iter().fold((0, 0), |(issued, acknowledged), lane| {
            let lane = lane.lock().unwrap();
            (issued + lane.writes.len(), acknowledged + lane.acknowledged.len())
        })
    }
}
