//! A set of numbers that are stored one after the other: where is a member, and which is the nth?
//!
//! ```text
//!   members       . . 2 3 4 . . . 8 9 .
//!   places            0 1 2       3 4
//!   runs              (2..5, 0)   (8..10, 3)
//! ```
//!
//! A run remembers how many members lie before it, so both questions are one binary search, and a
//! set costs as much as it has runs.

use std::ops::Range;

use crate::model::Extents;

/// The set; see the module's comment.
#[derive(Debug, Clone)]
pub(super) struct Ranks {
    runs: Vec<(Range<u64>, u64)>,
    count: u64,
}

impl Ranks {
    /// The offsets where a map says true.
    pub fn of(set: &Extents<bool>) -> Self {
        let (mut runs, mut count) = (Vec::new(), 0);
        for e in set.iter().filter(|e| e.kind) {
            runs.push((e.offset..e.end(), count));
            count += e.length;
        }
        Self { runs, count }
    }

    /// How many members there are.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// How many members lie before `number`, which need not be one itself.
    pub fn before(&self, number: u64) -> u64 {
        let at = self.runs.partition_point(|(run, _)| run.start < number);
        let last = at.checked_sub(1).and_then(|at| self.runs.get(at));
        last.map_or(0, |(run, before)| before + number.min(run.end) - run.start)
    }

    /// Where `number` is stored, if it is a member.
    pub fn place(&self, number: u64) -> Option<u64> {
        let place = self.before(number);
        (self.before(number.saturating_add(1)) > place).then_some(place)
    }

    /// The member at a place, with those behind it up to the end of its run.
    pub fn nth(&self, place: u64) -> Option<Range<u64>> {
        let at = self.runs.partition_point(|(_, before)| *before <= place);
        let (run, before) = self.runs.get(at.checked_sub(1)?)?;
        let member = run.start + (place - before);
        (member < run.end).then_some(member..run.end)
    }

    /// How many runs there are: what the set costs.
    #[cfg(test)]
    pub fn runs(&self) -> usize {
        self.runs.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn places_are_counted(set in proptest::collection::vec(any::<bool>(), 0..60)) {
            let mut map = Extents::new();
            for &member in &set {
                map.push(1, member);
            }
            let ranks = Ranks::of(&map);
            let members: Vec<u64> = (0u64..).zip(&set).filter(|m| *m.1).map(|m| m.0).collect();
            prop_assert_eq!(ranks.count(), members.len() as u64);
            for number in 0..70 {
                let place = members.iter().position(|&m| m == number).map(|p| p as u64);
                prop_assert_eq!(ranks.place(number), place);
                let before = members.iter().filter(|&&m| m < number).count() as u64;
                prop_assert_eq!(ranks.before(number), before);
                let member = members.get(number as usize).copied();
                let run = ranks.nth(number);
                prop_assert_eq!(run.as_ref().map(|r| r.start), member);
                if let Some(run) = run {
                    prop_assert!(run.clone().all(|m| members.contains(&m)));
                    prop_assert!(!members.contains(&run.end));
                }
            }
        }
    }
}
