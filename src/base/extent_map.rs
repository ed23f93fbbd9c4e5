//! Maps of half-open ranges of `u64` to values: who owns which bytes, when several describe them.

use std::collections::BTreeMap;
use std::ops::Range;

/// Sorted, disjoint ranges, each with a value.
#[derive(Clone, Debug)]
pub struct ExtentMap<V> {
    /// Start of each range to its end and value.
    ranges: BTreeMap<u64, (u64, V)>,
}

impl<V> Default for ExtentMap<V> {
    fn default() -> Self {
        Self { ranges: BTreeMap::new() }
    }
}

impl<V: Copy> ExtentMap<V> {
    /// The empty map.
    pub fn new() -> Self {
        Self::default()
    }

    /// Number of ranges.
    pub fn len(&self) -> usize {
        self.ranges.len()
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Takes a range out.
    pub fn remove(&mut self, range: Range<u64>) {
        if range.start >= range.end {
            return;
        }
        if let Some((&s, &(e, v))) = self.ranges.range(..range.start).next_back()
            && e > range.start
        {
            self.ranges.insert(s, (range.start, v));
            if e > range.end {
                self.ranges.insert(range.end, (e, v));
                return;
            }
        }
        while let Some((&s, &(e, v))) = self.ranges.range(range.start..range.end).next() {
            self.ranges.remove(&s);
            if e > range.end {
                self.ranges.insert(range.end, (e, v));
            }
        }
    }

    /// Gives the whole range to `value`, whoever had it.
    pub fn insert(&mut self, range: Range<u64>, value: V) {
        if range.start < range.end {
            self.remove(range.clone());
            self.ranges.insert(range.start, (range.end, value));
        }
    }

    /// Gives `value` what nobody has yet.
    pub fn insert_gaps(&mut self, range: Range<u64>, value: V) {
        for gap in self.gaps(range) {
            self.ranges.insert(gap.start, (gap.end, value));
        }
    }

    /// What of `range` somebody has, in order, cut to `range`.
    pub fn overlaps(&self, range: Range<u64>) -> impl Iterator<Item = (Range<u64>, V)> + '_ {
        let first = self.ranges.range(..=range.start).next_back().map_or(range.start, |(&s, _)| s);
        let Range { start, end } = range;
        self.ranges
            .range(first..end.max(first))
            .map(move |(&s, &(e, v))| (s.max(start)..e.min(end), v))
            .filter(|(r, _)| r.start < r.end)
    }

    /// What of `range` nobody has, in order.
    pub fn gaps(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut out = Vec::new();
        let mut at = range.start;
        for (r, _) in self.overlaps(range.clone()) {
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

    /// The whole range that holds `unit`, or the first one after it.
    pub fn at_or_after(&self, unit: u64) -> Option<(Range<u64>, V)> {
        let holds = self.ranges.range(..=unit).next_back().filter(|(_, (e, _))| *e > unit);
        let found = holds.or_else(|| self.ranges.range(unit..).next());
        found.map(|(&s, &(e, v))| (s..e, v))
    }

    /// All ranges in order.
    pub fn iter(&self) -> impl Iterator<Item = (Range<u64>, V)> + '_ {
        self.ranges.iter().map(|(&s, &(e, v))| (s..e, v))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// The map against the slow obvious one: a vector of options.
        #[test]
        fn equals_a_vector_of_options(ops in prop::collection::vec((0u8..3, 0u64..64, 0u64..20), 0..60)) {
            let mut map = ExtentMap::new();
            let mut twin = [None; 100];
            for (n, (op, start, length)) in ops.into_iter().enumerate() {
                let range = start..start + length;
                match op {
                    0 => map.insert(range.clone(), n),
                    1 => map.insert_gaps(range.clone(), n),
                    _ => map.remove(range.clone()),
                }
                for i in range.clone() {
                    let slot = &mut twin[i as usize];
                    *slot = match op { 0 => Some(n), 1 => slot.or(Some(n)), _ => None };
                }
                let mut seen = [None; 100];
                for (r, v) in map.iter() {
                    for i in r { prop_assert!(seen[i as usize].replace(v).is_none()) }
                }
                prop_assert_eq!(&seen[..], &twin[..]);
                for (r, v) in map.overlaps(range.clone()) {
                    for i in r { prop_assert_eq!(twin[i as usize], Some(v)) }
                }
                for r in map.gaps(range.clone()) { for i in r { prop_assert_eq!(twin[i as usize], None) } }
                let next = map.at_or_after(start).map(|(r, _)| r.start.max(start));
                let expected = (start as usize..100).find(|i| twin[*i].is_some()).map(|i| i as u64);
                prop_assert_eq!(next, expected);
            }
        }
    }
}
