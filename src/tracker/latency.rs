//! Time that guests spend because of the tracker: a histogram, spread over cache lines.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::gate::SHARDS;

/// Four buckets for each doubling, from 1 ns on.
const BUCKETS: usize = 160;

#[repr(align(128))]
struct Shard {
    counts: [AtomicU64; BUCKETS],
    max: AtomicU64,
}

impl Default for Shard {
    fn default() -> Self {
        Self { counts: std::array::from_fn(|_| AtomicU64::new(0)), max: AtomicU64::new(0) }
    }
}

/// Durations in nanoseconds, within 19 %.
#[derive(Default)]
pub(crate) struct Histogram {
    shards: [Shard; SHARDS],
}

fn bucket_of(ns: u64) -> usize {
    let ns = ns.max(4);
    let octave = ns.ilog2();
    ((octave as usize - 2) * 4 + (ns >> (octave - 2) & 3) as usize).min(BUCKETS - 1)
}

/// The first duration that is longer than every one in the bucket.
fn upper_bound(bucket: usize) -> u64 {
    (5 + bucket as u64 % 4) << (bucket / 4)
}

impl Histogram {
    /// Counts one duration.
    #[inline]
    pub(crate) fn add(&self, shard: usize, ns: u64) {
        let shard = &self.shards[shard % SHARDS];
        shard.counts[bucket_of(ns)].fetch_add(1, Relaxed);
        if ns > shard.max.load(Relaxed) {
            shard.max.fetch_max(ns, Relaxed);
        }
    }

    /// Upper bound in nanoseconds and count of each bucket that is not empty, and the longest.
    pub(crate) fn read(&self) -> (Vec<(u64, u64)>, u64) {
        let count = |b: usize| self.shards.iter().map(|s| s.counts[b].load(Relaxed)).sum::<u64>();
        let buckets = (0..BUCKETS).map(|b| (upper_bound(b), count(b))).filter(|(_, n)| *n > 0).collect();
        (buckets, self.shards.iter().map(|s| s.max.load(Relaxed)).max().unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_duration_lies_below_the_bound_of_its_bucket() {
        let mut last = 0;
        for ns in (0..5000).chain((12..40).map(|i| (1 << i) + 12_345)) {
            let bucket = bucket_of(ns);
            assert!(ns < upper_bound(bucket), "{ns}");
            assert!(ns < 4 || bucket == 0 || ns >= upper_bound(bucket - 1), "{ns}");
            assert!(bucket >= last);
            last = bucket;
        }
        let h = Histogram::default();
        (0..100).for_each(|i| h.add(i, 1000));
        h.add(3, 1_000_000);
        let (buckets, max) = h.read();
        assert_eq!(buckets.iter().map(|b| b.1).sum::<u64>(), 101);
        assert_eq!((buckets.len(), max), (2, 1_000_000));
        let figures = crate::tracker::LatencyFigures { buckets, max_ns: max };
        assert_eq!(figures.count(), 101);
        assert!((1000..1200).contains(&figures.percentile(99)), "{figures:?}");
        assert_eq!(figures.percentile(100), 1_000_000);
        assert_eq!(crate::tracker::LatencyFigures::default().percentile(99), 0);
    }
}
