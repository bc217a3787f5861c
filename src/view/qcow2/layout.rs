//! Where everything is in the file. A few counts decide it: of the guest's clusters, of the L2
//! tables in use, of the clusters with data. With clusters of C bytes:
//!
//! ```text
//!   header | refcount table | refcount blocks | L1 table       | L2 tables | data
//!   1      | what counts every cluster of the | an entry for   | those     | those
//!          | file, these ones too             | C/8 clusters   | in use    | in use
//! ```

use std::ops::Range;

use crate::model::{Error, Kind, Result};

/// Bytes of an entry of the L1, L2 and refcount tables.
pub(super) const ENTRY: u64 = 8;
/// Bytes of a refcount.
pub(super) const REFCOUNT: u64 = 2;
/// What QEMU reads at most of an L1 table and of a refcount table.
const LARGEST_L1: u64 = 32 << 20;
const LARGEST_REFCOUNT_TABLE: u64 = 8 << 20;

/// The parts of the file, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Header,
    RefcountTable,
    RefcountBlocks,
    L1,
    L2,
    Data,
}

/// See the module's comment.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    bits: u32,
    l1_entries: u64,
    /// Clusters of each part.
    parts: [(Part, u64); 6],
}

impl Layout {
    /// The layout for clusters of 2^`bits` bytes, the guest's clusters and how much is in use.
    pub fn new(bits: u32, guest: u64, tables: u64, data: u64) -> Result<Self> {
        let cluster = 1 << bits;
        let l1_entries = guest.div_ceil(cluster / ENTRY);
        let l1 = (l1_entries * ENTRY).div_ceil(cluster);
        // This bounds all the other numbers, too.
        if l1_entries * ENTRY > LARGEST_L1 {
            return Err(too_large(cluster));
        }
        let counted = 1 + l1 + tables + data;
        // What is counted makes the refcounts grow, and they are counted.
        let (mut table, mut blocks) = (0, 0);
        loop {
            let needed = (counted + table + blocks).div_ceil(cluster / REFCOUNT);
            if needed == blocks {
                break;
            }
            blocks = needed;
            table = (blocks * ENTRY).div_ceil(cluster);
        }
        if blocks * ENTRY > LARGEST_REFCOUNT_TABLE {
            return Err(too_large(cluster));
        }
        Ok(Self {
            bits,
            l1_entries,
            parts: [
                (Part::Header, 1),
                (Part::RefcountTable, table),
                (Part::RefcountBlocks, blocks),
                (Part::L1, l1),
                (Part::L2, tables),
                (Part::Data, data),
            ],
        })
    }

    /// Bytes of a cluster.
    pub fn cluster(&self) -> u64 {
        1 << self.bits
    }

    /// log2 of that.
    pub fn bits(&self) -> u32 {
        self.bits
    }

    /// Entries of the L1 table.
    pub fn l1_entries(&self) -> u64 {
        self.l1_entries
    }

    /// Bytes of the file.
    pub fn size(&self) -> u64 {
        self.parts().last().map_or(0, |(_, range)| range.end)
    }

    /// The bytes of a part.
    pub fn range(&self, part: Part) -> Range<u64> {
        self.parts()
            .find(|(p, _)| *p == part)
            .map_or(0..0, |(_, range)| range)
    }

    /// The part that holds an offset of the file, and its bytes.
    pub fn at(&self, offset: u64) -> Option<(Part, Range<u64>)> {
        self.parts().find(|(_, range)| range.contains(&offset))
    }

    fn parts(&self) -> impl Iterator<Item = (Part, Range<u64>)> + '_ {
        self.parts.iter().scan(0, |end, (part, clusters)| {
            let start = *end;
            *end += clusters << self.bits;
            Some((*part, start..*end))
        })
    }
}

fn too_large(cluster: u64) -> Error {
    Error::new(
        Kind::Unsupported,
        format!("the disk is too large for a qcow2 image with clusters of {cluster} bytes"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clusters(layout: &Layout) -> Vec<u64> {
        layout.parts.iter().map(|(_, clusters)| *clusters).collect()
    }

    #[test]
    fn the_refcounts_count_themselves() {
        // 512 bytes: a block counts 256 clusters, a table 64 blocks.
        let of = |data| clusters(&Layout::new(9, 64, 1, data).unwrap());
        assert_eq!(of(0), [1, 1, 1, 1, 1, 0]);
        assert_eq!(of(251), [1, 1, 1, 1, 1, 251]);
        assert_eq!(of(252), [1, 1, 2, 1, 1, 252]);
        assert_eq!(of(64 * 256 - 68), [1, 1, 64, 1, 1, 64 * 256 - 68]);
        assert_eq!(of(64 * 256 - 67), [1, 2, 65, 1, 1, 64 * 256 - 67]);
    }

    #[test]
    fn a_disk_without_bytes_has_no_tables() {
        let layout = Layout::new(16, 0, 0, 0).unwrap();
        assert_eq!(clusters(&layout), [1, 1, 1, 0, 0, 0]);
        assert_eq!(layout.size(), 3 << 16);
        assert_eq!(layout.at(3 << 16), None);
    }

    #[test]
    fn what_qemu_would_not_open_is_refused() {
        let most = 1 << (51 - 16);
        assert!(Layout::new(16, most, 0, 0).is_ok());
        assert!(Layout::new(16, most + 1, 0, 0).is_err());
        // The tables of so large a disk leave no room for all of its data.
        assert!(Layout::new(16, most, 1 << 22, most - (1 << 23)).is_ok());
        assert!(Layout::new(16, most, 1 << 22, most).is_err());
        assert!(Layout::new(9, u64::MAX >> 9, 0, 0).is_err());
    }
}
