//! A disk's map: what kind of bytes each offset holds, as runs.
//!
//! An [`Extents`] is a total function from the offsets `0..size` to kinds, stored as the places
//! where the kind changes:
//!
//! ```text
//!   offset   0        4K              16K   20K=size
//!            |  data  |     hole      | data |
//!   runs     (0,data) (4K,hole)       (16K,data)
//! ```
//!
//! Every question about a map (what is here, where does the next hole begin, what do two maps say
//! together) is then one walk over sorted runs. Invariants: the first run starts at 0, starts rise
//! strictly, all lie below the size, and neighbours differ in kind. A map of size 0 has no runs.

/// A stretch of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent<K> {
    /// First byte.
    pub offset: u64,
    /// Length in bytes, never 0.
    pub length: u64,
    /// What the bytes are.
    pub kind: K,
}

impl<K> Extent<K> {
    /// The byte after the last.
    pub fn end(&self) -> u64 {
        self.offset + self.length
    }
}

/// A map of a whole disk; see the module's comment.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Extents<K> {
    runs: Vec<(u64, K)>,
    size: u64,
}

impl<K: Copy + PartialEq> Extents<K> {
    /// An empty map, to be filled from the front with [`push`](Self::push).
    pub fn new() -> Self {
        Self {
            runs: Vec::new(),
            size: 0,
        }
    }

    /// A map of `size` bytes of one kind.
    pub fn uniform(size: u64, kind: K) -> Self {
        let mut map = Self::new();
        map.push(size, kind);
        map
    }

    /// Appends `length` bytes of `kind`; joins them to the last run if that is of the same kind.
    pub fn push(&mut self, length: u64, kind: K) {
        if length == 0 {
            return;
        }
        if self.runs.last().is_none_or(|&(_, last)| last != kind) {
            self.runs.push((self.size, kind));
        }
        self.size += length;
    }

    /// Length of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// How many extents there are.
    pub fn count(&self) -> usize {
        self.runs.len()
    }

    /// The extents in order of offset.
    pub fn iter(&self) -> impl Iterator<Item = Extent<K>> + '_ {
        self.clip(0, self.size)
    }

    /// The extents of `offset..offset + length`, cut at both ends and at the end of the disk.
    pub fn clip(&self, offset: u64, length: u64) -> impl Iterator<Item = Extent<K>> + '_ {
        let end = offset.saturating_add(length).min(self.size);
        let first = self.index_at(offset);
        let runs = self.runs.get(first..).unwrap_or_default();
        runs.iter()
            .enumerate()
            .map(move |(i, &(start, kind))| {
                let next = self.runs.get(first + i + 1).map_or(self.size, |r| r.0);
                (start.max(offset), next.min(end), kind)
            })
            .take_while(|&(start, next, _)| start < next)
            .map(|(start, next, kind)| Extent {
                offset: start,
                length: next - start,
                kind,
            })
    }

    /// The first offset at or after `offset` whose kind satisfies `wanted`: SEEK_DATA, SEEK_HOLE.
    pub fn seek(&self, offset: u64, wanted: impl Fn(K) -> bool) -> Option<u64> {
        self.clip(offset, u64::MAX)
            .find(|e| wanted(e.kind))
            .map(|e| e.offset)
    }

    /// How many bytes are of a kind that satisfies `wanted`.
    pub fn bytes(&self, wanted: impl Fn(K) -> bool) -> u64 {
        self.iter()
            .filter(|e| wanted(e.kind))
            .map(|e| e.length)
            .sum()
    }

    /// The same disk with every kind replaced; neighbours that become alike are joined.
    pub fn map<L: Copy + PartialEq>(&self, f: impl Fn(K) -> L) -> Extents<L> {
        let mut out = Extents::new();
        for e in self.iter() {
            out.push(e.length, f(e.kind));
        }
        out
    }

    /// What two maps of one disk say together, offset by offset. Where one map is shorter, the
    /// result ends with it.
    pub fn zip<L, M>(&self, other: &Extents<L>, f: impl Fn(K, L) -> M) -> Extents<M>
    where
        L: Copy + PartialEq,
        M: Copy + PartialEq,
    {
        let mut out = Extents::new();
        let (mut left, mut right) = (self.iter(), other.iter());
        let (mut a, mut b) = (left.next(), right.next());
        while let (Some(x), Some(y)) = (a, b) {
            let end = x.end().min(y.end());
            out.push(end - out.size, f(x.kind, y.kind));
            if x.end() == end {
                a = left.next();
            }
            if y.end() == end {
                b = right.next();
            }
        }
        out
    }

    /// Index of the run that holds `offset`, or past the last run.
    fn index_at(&self, offset: u64) -> usize {
        if offset >= self.size {
            return self.runs.len();
        }
        self.runs.partition_point(|r| r.0 <= offset) - 1
    }
}

impl Extents<bool> {
    /// Offsets in either map.
    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        self.zip(other, |a, b| a || b)
    }

    /// Offsets not in the map.
    #[must_use]
    pub fn complement(&self) -> Self {
        self.map(|k| !k)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The model: one kind per byte.
    fn map_of(bytes: &[u8]) -> Extents<u8> {
        let mut map = Extents::new();
        for &b in bytes {
            map.push(1, b);
        }
        map
    }

    fn bytes_of<K: Copy + PartialEq>(map: &Extents<K>) -> Vec<K> {
        map.iter()
            .flat_map(|e| std::iter::repeat_n(e.kind, e.length as usize))
            .collect()
    }

    fn disk() -> impl Strategy<Value = Vec<u8>> {
        // Runs, so that extents longer than one byte are common; three kinds.
        proptest::collection::vec((1usize..6, 0u8..3), 0..12).prop_map(|runs| {
            runs.into_iter()
                .flat_map(|(n, k)| std::iter::repeat_n(k, n))
                .collect()
        })
    }

    proptest! {
        #[test]
        fn runs_and_bytes_say_the_same(bytes in disk()) {
            let map = map_of(&bytes);
            prop_assert_eq!(bytes_of(&map), bytes.clone());
            prop_assert_eq!(map.size(), bytes.len() as u64);
            // Coalesced: neighbours differ.
            let kinds: Vec<u8> = map.iter().map(|e| e.kind).collect();
            prop_assert!(kinds.windows(2).all(|w| w[0] != w[1]));
            prop_assert_eq!(map.count(), kinds.len());
        }

        #[test]
        fn clip_is_a_subrange(bytes in disk(), offset in 0u64..80, length in 0u64..80) {
            let map = map_of(&bytes);
            let from = (offset as usize).min(bytes.len());
            let to = ((offset + length) as usize).min(bytes.len());
            let mut at = offset;
            let mut got = Vec::new();
            for e in map.clip(offset, length) {
                prop_assert_eq!(e.offset, at);
                prop_assert!(e.length > 0);
                at = e.end();
                got.extend(std::iter::repeat_n(e.kind, e.length as usize));
            }
            prop_assert_eq!(got, bytes[from..to.max(from)].to_vec());
        }

        #[test]
        fn seek_finds_the_first(bytes in disk(), offset in 0u64..80, kind in 0u8..3) {
            let expected = (offset as usize..bytes.len()).find(|&i| bytes[i] == kind);
            prop_assert_eq!(map_of(&bytes).seek(offset, |k| k == kind), expected.map(|i| i as u64));
        }

        #[test]
        fn zip_works_byte_by_byte(a in disk(), b in disk()) {
            let expected: Vec<(u8, u8)> = a.iter().copied().zip(b.iter().copied()).collect();
            let both = map_of(&a).zip(&map_of(&b), |x, y| (x, y));
            prop_assert_eq!(bytes_of(&both), expected);
        }

        #[test]
        fn sets_are_sets(a in disk(), b in disk()) {
            let set = |v: &[u8]| map_of(v).map(|k| k == 1);
            let n = a.len().min(b.len());
            let union: Vec<bool> = (0..n).map(|i| a[i] == 1 || b[i] == 1).collect();
            prop_assert_eq!(bytes_of(&set(&a).union(&set(&b))), union);
            let not: Vec<bool> = a.iter().map(|&k| k != 1).collect();
            prop_assert_eq!(bytes_of(&set(&a).complement()), not);
            let ones = a.iter().filter(|&&k| k == 1).count() as u64;
            prop_assert_eq!(map_of(&a).bytes(|k| k == 1), ones);
        }
    }

    #[test]
    fn the_ends_of_a_large_disk() {
        let mut map = Extents::uniform(1 << 44, false);
        map.push(512, true);
        assert_eq!(map.seek(0, |k| k), Some(1 << 44));
        assert_eq!(map.seek((1 << 44) + 512, |k| k), None);
        assert_eq!(map.clip(u64::MAX, u64::MAX).count(), 0);
        assert_eq!(Extents::<bool>::new().seek(0, |_| true), None);
    }
}
