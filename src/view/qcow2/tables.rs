//! The bytes of the tables, worked out from any offset on.
//!
//! ```text
//!   refcount table   where each block is                    blocks lie together
//!   refcount block   1 for every cluster of the file        nothing is shared, nothing unused
//!   L1               where each L2 table is, or 0           by its place among those in use
//!   L2               where each cluster is, 1 for zeros, 0  by its place among those with data
//! ```

use std::iter;

use super::layout::{ENTRY, Part};
use super::{Image, Kind};

/// Of an L1 or L2 entry: what it points to is used here only.
pub(super) const COPIED: u64 = 1 << 63;
/// Of an L2 entry: the cluster reads as zeros.
const ZERO: u64 = 1;

impl Image {
    /// Fills `out` from `inner` bytes into a part that is not data. Of L2 tables, one at most.
    pub(super) fn fill(&self, part: Part, inner: u64, out: &mut [u8]) {
        let cluster = self.layout.cluster();
        match part {
            Part::Header => copy(inner, out, |first| {
                self.header.iter().skip(first as usize).map(|byte| [*byte])
            }),
            Part::RefcountTable => copy(inner, out, |first| {
                let blocks = self.layout.range(Part::RefcountBlocks);
                let blocks = blocks.step_by(cluster as usize).skip(first as usize);
                blocks.map(u64::to_be_bytes)
            }),
            Part::RefcountBlocks => copy(inner, out, |first| {
                (first..self.size() / cluster).map(|_| 1u16.to_be_bytes())
            }),
            Part::L1 => copy(inner, out, |first| {
                let entries = first..self.layout.l1_entries();
                entries.map(|index| self.l1_entry(index).to_be_bytes())
            }),
            Part::L2 => {
                let table = self.tables.nth(inner / cluster).map_or(0, |run| run.start);
                copy(inner % cluster, out, |first| {
                    let first = table * (cluster / ENTRY) + first;
                    self.l2_entries(first).map(u64::to_be_bytes)
                });
            }
            Part::Data => {}
        }
    }

    fn l1_entry(&self, index: u64) -> u64 {
        let tables = self.layout.range(Part::L2).start;
        let entry = |place| COPIED | (tables + place * self.layout.cluster());
        self.tables.place(index).map_or(0, entry)
    }

    /// What L2 tables say of the guest's clusters from `first` on.
    fn l2_entries(&self, first: u64) -> impl Iterator<Item = u64> {
        let cluster = self.layout.cluster();
        let data = self.layout.range(Part::Data).start;
        self.guest.clip(first, u64::MAX).flat_map(move |e| {
            let at = data + self.data.before(e.offset) * cluster;
            (0..e.length).map(move |n| match e.kind {
                Kind::Absent => 0,
                Kind::Zero => ZERO,
                Kind::Data => COPIED | (at + n * cluster),
            })
        })
    }
}

/// Fills `out` from `skip` bytes into a table; `from` yields the table's entries from one on. Zeros
/// follow the last.
fn copy<const N: usize, I: Iterator<Item = [u8; N]>>(
    skip: u64,
    out: &mut [u8],
    from: impl FnOnce(u64) -> I,
) {
    let entries = from(skip / N as u64).flatten();
    let bytes = entries.skip((skip % N as u64) as usize);
    for (to, byte) in out.iter_mut().zip(bytes.chain(iter::repeat(0))) {
        *to = byte;
    }
}
