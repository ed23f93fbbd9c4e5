//! Sets of half-open ranges: the one place that owns interval arithmetic.

use std::collections::BTreeMap;
use std::ops::Range;

use serde::{Deserialize, Serialize};

/// A run of `length` units at `offset`; the unit (bytes or blocks) is its user's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Extent {
    /// First unit.
    pub offset: u64,
    /// Number of units, never 0 inside an [`ExtentSet`].
    pub length: u64,
}

impl Extent {
    /// One past the last unit.
    pub const fn end(&self) -> u64 {
        self.offset.saturating_add(self.length)
    }
}

/// A set of `u64` as sorted, disjoint, non-adjacent half-open ranges.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExtentSet {
    /// Start of each range to its end.
    ranges: BTreeMap<u64, u64>,
}

impl ExtentSet {
    /// The empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Number of ranges.
    pub fn len(&self) -> usize {
        self.ranges.len()
    }

    /// Number of units in all ranges.
    pub fn total(&self) -> u64 {
        self.ranges.iter().map(|(s, e)| e - s).sum()
    }

    /// Adds a range, joining what it touches.
    pub fn insert(&mut self, range: Range<u64>) {
        if range.start >= range.end {
            return;
        }
        let (mut start, mut end) = (range.start, range.end);
        if let Some((&s, &e)) = self.ranges.range(..=start).next_back()
            && e >= start
        {
            start = s;
            end = end.max(e);
        }
        while let Some((&s, &e)) = self.ranges.range(start..=end).next() {
            end = end.max(e);
            self.ranges.remove(&s);
        }
        self.ranges.insert(start, end);
    }

    /// Takes a range out.
    pub fn remove(&mut self, range: Range<u64>) {
        if range.start >= range.end {
            return;
        }
        if let Some((&s, &e)) = self.ranges.range(..range.start).next_back()
            && e > range.start
        {
            self.ranges.insert(s, range.start);
            if e > range.end {
                self.ranges.insert(range.end, e);
                return;
            }
        }
        while let Some((&s, &e)) = self.ranges.range(range.start..range.end).next() {
            self.ranges.remove(&s);
            if e > range.end {
                self.ranges.insert(range.end, e);
            }
        }
    }

    /// Whether the unit is in the set.
    pub fn contains(&self, unit: u64) -> bool {
        self.ranges.range(..=unit).next_back().is_some_and(|(_, &e)| e > unit)
    }

    /// Whether any unit of the range is in the set.
    pub fn intersects(&self, range: Range<u64>) -> bool {
        self.overlaps(range).next().is_some()
    }

    /// The parts of `range` that are in the set, in order.
    pub fn overlaps(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let first = self.ranges.range(..=range.start).next_back().map_or(range.start, |(&s, _)| s);
        let Range { start, end } = range;
        self.ranges
            .range(first..end.max(first))
            .map(move |(&s, &e)| s.max(start)..e.min(end))
            .filter(|r| r.start < r.end)
    }

    /// The parts of `range` that are not in the set, in order.
    pub fn gaps(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut out = Vec::new();
        let mut at = range.start;
        for r in self.overlaps(range.clone()) {
            if at < r.start {
                out.push(at..r.start);
            }
            at = r.end;
        }
        if at < range.end {
            out.push(at..range.end);
        }
        out
    }

    /// Adds every range of `other`.
    pub fn union_with(&mut self, other: &Self) {
        other.iter().for_each(|r| self.insert(r));
    }

    /// Takes every range of `other` out.
    pub fn subtract(&mut self, other: &Self) {
        other.iter().for_each(|r| self.remove(r));
    }

    /// All ranges in order.
    pub fn iter(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.ranges.iter().map(|(&s, &e)| s..e)
    }
}

impl FromIterator<Range<u64>> for ExtentSet {
    fn from_iter<I: IntoIterator<Item = Range<u64>>>(iter: I) -> Self {
        let mut set = Self::new();
        iter.into_iter().for_each(|r| set.insert(r));
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// The set against the slow obvious one: a vector of booleans.
        #[test]
        fn equals_a_vector_of_booleans(
            ops in prop::collection::vec((any::<bool>(), 0u64..64, 0u64..20), 0..60)
        ) {
            let mut set = ExtentSet::new();
            let mut twin = [false; 100];
            for (add, start, length) in ops {
                let range = start..start + length;
                if add { set.insert(range.clone()) } else { set.remove(range.clone()) }
                for i in range.clone() { twin[i as usize] = add }
                for i in 0..100u64 { prop_assert_eq!(set.contains(i), twin[i as usize]) }
                let mut ends = set.iter().collect::<Vec<_>>();
                prop_assert!(ends.windows(2).all(|w| w[0].end < w[1].start));
                ends.dedup();
                prop_assert_eq!(ends.len(), set.len());
                prop_assert_eq!(set.total() as usize, twin.iter().filter(|b| **b).count());
                let inside: u64 = set.overlaps(range.clone()).map(|r| r.end - r.start).sum();
                let outside: u64 = set.gaps(range.clone()).iter().map(|r| r.end - r.start).sum();
                prop_assert_eq!(inside + outside, length);
                prop_assert_eq!(inside as usize, range.filter(|i| twin[*i as usize]).count());
            }
        }
    }
}
