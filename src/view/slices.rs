//! A disk in slices of one size, each stamped with the moment its content last changed.
//!
//! ```text
//!   checkpoints      mon        tue        wed        now
//!   slice 0           |   w      |          |          |      stamp: tue
//!   slice 1           |          |     w    |   w      |      stamp: now
//!   slice 2           |          |          |          |      stamp: mon, the oldest known
//! ```
//!
//! A stamp is the end of the newest interval in which the slice was written, in seconds since 1970.
//! Two instants between which a slice was written have stamps that differ: an end comes after the
//! write, and the earlier instant's stamp is no later than that instant. So a tool that compares
//! times never takes a changed slice for an unchanged one. The other way round it may err: less
//! history makes stamps newer, and costs a read.

use super::coarse::coarse;
use crate::model::Extents;

/// The stamp of each offset; its runs begin and end with slices.
pub type Stamps = Extents<u64>;

/// How a disk is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// Size of the disk in bytes.
    pub size: u64,
    /// Size of a slice in bytes; the last one may be smaller.
    pub slice: u64,
}

/// Slices in one directory: few enough to be listed at once, and 16 TiB make some two thousand
/// directories of 8 MiB slices.
const IN_A_DIRECTORY: u64 = 1000;

impl Cut {
    /// How many slices there are.
    pub fn count(&self) -> u64 {
        self.size.div_ceil(self.slice.max(1))
    }

    /// How many directories hold them.
    pub fn directories(&self) -> u64 {
        self.count().div_ceil(IN_A_DIRECTORY)
    }

    /// Offset and length of a slice; `None` past the last.
    pub fn range(&self, slice: u64) -> Option<(u64, u64)> {
        let start = slice.checked_mul(self.slice)?;
        let length = self.size.checked_sub(start)?.min(self.slice);
        (length > 0).then_some((start, length))
    }

    /// The slices in a directory.
    pub fn in_directory(&self, directory: u64) -> std::ops::Range<u64> {
        let first = directory.saturating_mul(IN_A_DIRECTORY).min(self.count());
        first..first.saturating_add(IN_A_DIRECTORY).min(self.count())
    }

    /// The directory of a slice.
    pub fn directory_of(&self, slice: u64) -> u64 {
        slice / IN_A_DIRECTORY
    }

    /// Name of a slice. All are equally long, so that a shell's `*` gives them in order.
    pub fn slice_name(&self, slice: u64) -> String {
        format!("{slice:0width$}", width = digits(self.count(), 7))
    }

    /// Name of a directory.
    pub fn directory_name(&self, directory: u64) -> String {
        format!("{directory:0width$}", width = digits(self.directories(), 4))
    }

    /// The slice of this name.
    pub fn slice_named(&self, name: &str) -> Option<u64> {
        let slice = name.parse().ok().filter(|s| *s < self.count())?;
        (self.slice_name(slice) == name).then_some(slice)
    }

    /// The directory of this name.
    pub fn directory_named(&self, name: &str) -> Option<u64> {
        let directory = name.parse().ok().filter(|d| *d < self.directories())?;
        (self.directory_name(directory) == name).then_some(directory)
    }

    /// What was written, in whole slices.
    fn whole(&self, written: &Extents<bool>) -> Extents<bool> {
        let mut out = Extents::new();
        for e in coarse(written, self.slice, |a, b| a || b).iter() {
            let end = e.end().saturating_mul(self.slice).min(self.size);
            out.push(end.saturating_sub(out.size()), e.kind);
        }
        out
    }
}

/// Digits of the largest number below `count`, but at least so many.
fn digits(count: u64, least: usize) -> usize {
    count.saturating_sub(1).to_string().len().max(least)
}

/// The stamps after what was written since the old ones: those slices get the new stamp.
pub fn restamp(cut: Cut, old: &Stamps, written: &Extents<bool>, stamp: u64) -> Stamps {
    old.zip(&cut.whole(written), |old, written| match written {
        true => stamp,
        false => old,
    })
}

/// The stamps from scratch. `since` tells, oldest first, of each checkpoint its time and what was
/// written between it and `now`.
pub fn from_history(cut: Cut, since: &[(u64, Extents<bool>)], now: u64) -> Stamps {
    let Some((oldest, _)) = since.first() else {
        return Extents::uniform(cut.size, now);
    };
    let mut stamps = Extents::uniform(cut.size, *oldest);
    let ends = since.iter().skip(1).map(|(time, _)| *time).chain([now]);
    // What was written since a later checkpoint is stamped again in its turn.
    for ((_, written), end) in since.iter().zip(ends) {
        stamps = restamp(cut, &stamps, written, end);
    }
    stamps
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SLICE: u64 = 8;

    fn set(size: u64, bytes: &[u64]) -> Extents<bool> {
        let mut map = Extents::new();
        for at in 0..size {
            map.push(1, bytes.contains(&at));
        }
        map
    }

    fn of_slices(stamps: &Stamps) -> Vec<u64> {
        let slices = (0..stamps.size()).step_by(SLICE as usize);
        let one = |at| stamps.clip(at, SLICE).map(|e| e.kind).collect::<Vec<_>>();
        slices
            .map(|at| {
                let kinds = one(at);
                assert_eq!(kinds.len(), 1, "one stamp a slice");
                kinds[0]
            })
            .collect()
    }

    proptest! {
        /// A disk of whole numbers, written to in rounds; each round ends with a checkpoint. What is
        /// carried forward, and what is worked out from the whole history, are the same; and stamps of
        /// two instants differ wherever the content does.
        #[test]
        fn stamps_tell_the_truth(
            size in 1u64..100,
            rounds in proptest::collection::vec(proptest::collection::vec(0u64..100, 0..6), 1..8),
        ) {
            let cut = Cut { size, slice: SLICE };
            let rounds: Vec<Vec<u64>> = rounds
                .into_iter()
                .map(|r| r.into_iter().filter(|at| *at < size).collect())
                .collect();
            let mut content = vec![0u64; size as usize];
            let mut carried = Extents::uniform(size, 100);
            let mut seen: Vec<(Vec<u64>, Vec<u64>)> = vec![(content.clone(), of_slices(&carried))];
            for (i, round) in rounds.iter().enumerate() {
                let now = 101 + i as u64;
                round.iter().for_each(|at| content[*at as usize] = now);
                carried = restamp(cut, &carried, &set(size, round), now);
                let since: Vec<(u64, Extents<bool>)> = (0..=i)
                    .map(|from| (100 + from as u64, set(size, &rounds[from..=i].concat())))
                    .collect();
                let rebuilt = from_history(cut, &since, now);
                prop_assert_eq!(&rebuilt, &carried);
                // Less history: newer stamps, and never a wrong one.
                let later = from_history(cut, &since[i / 2..], now);
                for (whole, part) in of_slices(&carried).iter().zip(of_slices(&later)) {
                    prop_assert!(part >= *whole && part <= now);
                }
                for stamps in [of_slices(&carried), of_slices(&later)] {
                    for (old, old_stamps) in &seen {
                        let differ = |k: usize| {
                            let range = k * SLICE as usize..((k + 1) * SLICE as usize).min(size as usize);
                            old[range.clone()] != content[range]
                        };
                        for k in (0..stamps.len()).filter(|k| differ(*k)) {
                            prop_assert!(stamps[k] > old_stamps[k]);
                        }
                    }
                    seen.push((content.clone(), stamps));
                }
            }
        }

        #[test]
        fn slices_cover_the_disk_and_have_their_names(size in 0u64..5_000_000, slice in 1u64..4000) {
            let cut = Cut { size, slice };
            let mut at = 0;
            let mut names = Vec::new();
            for directory in 0..cut.directories() {
                prop_assert_eq!(cut.directory_named(&cut.directory_name(directory)), Some(directory));
                // The first and the last of each are enough.
                let all = cut.in_directory(directory);
                for k in [all.start, all.end - 1] {
                    prop_assert_eq!(cut.directory_of(k), directory);
                    prop_assert_eq!(cut.slice_named(&cut.slice_name(k)), Some(k));
                    names.push(cut.directory_name(directory) + "/" + &cut.slice_name(k));
                }
                let (start, _) = cut.range(all.start).unwrap();
                prop_assert_eq!(start, at);
                let (start, length) = cut.range(all.end - 1).unwrap();
                at = start + length;
            }
            prop_assert_eq!(at, size);
            prop_assert_eq!(cut.range(cut.count()), None);
            prop_assert!(names.is_sorted(), "a shell lists them in order");
        }
    }

    #[test]
    fn names() {
        let cut = Cut {
            size: 16 << 40,
            slice: 8 << 20,
        };
        assert_eq!((cut.count(), cut.directories()), (2_097_152, 2098));
        assert_eq!(cut.slice_name(1234), "0001234");
        assert_eq!(cut.directory_name(cut.directory_of(1234)), "0001");
        for none in ["1234", "00001234", "+001234", "9999999", ""] {
            assert_eq!(cut.slice_named(none), None, "{none}");
        }
        let many = Cut {
            size: 16 << 40,
            slice: 1 << 16,
        };
        assert_eq!(many.slice_name(0).len(), 9);
    }
}
