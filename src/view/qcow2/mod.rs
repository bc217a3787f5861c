//! A disk as a qcow2 file that nobody stores: every byte of it is worked out when it is read.
//!
//! ```text
//!   guest     | A  B | . . . . | z | C | . . |      Data, Absent, Zero: in whole clusters
//!   file      | header | refcounts | L1 | L2 … | A B C |
//! ```
//!
//! Because all guest clusters with data lie behind the tables, in the guest's order, the place of
//! anything follows from counts: what an L2 table says of a cluster is how many with data are before
//! it. So an image costs as much as the map has extents, be the disk 16 TiB; its size is known at
//! once; and data that lies together in the guest does so in the file, and is fetched together.
//!
//! There are two forms. An image that stands alone holds all the data; what is not in it is zeros.
//! An overlay holds what changed; what is not in it is in its backing file, the same disk at an
//! earlier instant. Its tables tell zeros without allocating anything for them, but only where a
//! whole cluster is known to be zeros *now*: one that is partly zeros and partly unchanged is data,
//! as is any with a single changed byte, and is read from the frozen disk, which has all of it.
//!
//! The guest's size is that of the disk, rounded up to the 512 bytes that qcow2 counts in. What lies
//! behind the end of the disk reads as zeros.

mod header;
mod layout;
mod ranks;
mod tables;

pub use header::{Backing, Format};

use self::layout::{ENTRY, Layout, Part};
use self::ranks::Ranks;
use super::coarse::coarse;
use crate::model::{self, Allocation, Change, Error, Extents};

/// log2 of the bytes of a cluster: 64 KiB, as QEMU makes them.
pub const CLUSTER_BITS: u32 = 16;

/// Longest name of a backing file that QEMU takes.
const LONGEST_NAME: usize = 1023;

/// What the file says of a stretch of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Nothing: the backing file has it, and without one it is zeros.
    Absent,
    /// That it is zeros.
    Zero,
    /// What it holds.
    Data,
}

/// An image; see the module's comment.
#[derive(Debug, Clone)]
pub struct Image {
    disk: u64,
    /// In clusters.
    guest: Extents<Kind>,
    /// Guest clusters with data, in the order of the file's data clusters.
    data: Ranks,
    /// L1 entries with an L2 table, in the order of the file's L2 tables.
    tables: Ranks,
    layout: Layout,
    header: Vec<u8>,
}

impl Image {
    /// An image that stands alone, of a disk with this map.
    pub fn full(map: &Extents<Allocation>) -> model::Result<Self> {
        let kind = |a: Allocation| if a.zero { Kind::Absent } else { Kind::Data };
        Self::new(&map.map(kind), CLUSTER_BITS, None)
    }

    /// An overlay over the disk as it was when `map` was clean. Without a name of its backing file,
    /// whoever opens it has to say one.
    pub fn overlay(map: &Extents<Change>, backing: Option<&Backing>) -> model::Result<Self> {
        let kind = |c| match c {
            Change::Clean => Kind::Absent,
            Change::Dirty => Kind::Data,
            Change::DirtyZero => Kind::Zero,
        };
        Self::new(&map.map(kind), CLUSTER_BITS, backing)
    }

    /// An image with clusters of 2^`bits` bytes, of which qcow2 has those from 9 to 21.
    pub fn new(map: &Extents<Kind>, bits: u32, backing: Option<&Backing>) -> model::Result<Self> {
        if !(9..=21).contains(&bits) {
            return Err(invalid(format!("qcow2 has no clusters of 2^{bits} bytes")));
        }
        let cluster = 1 << bits;
        let guest = coarse(map, cluster, |a, b| if a == b { a } else { Kind::Data });
        let used = coarse(
            &guest.map(|k| k != Kind::Absent),
            cluster / ENTRY,
            |a, b| a || b,
        );
        let data = Ranks::of(&guest.map(|k| k == Kind::Data));
        let tables = Ranks::of(&used);
        let layout = Layout::new(bits, guest.size(), tables.count(), data.count())?;
        let size = map.size().next_multiple_of(512);
        let header = header::header(&layout, size, backing);
        let name = backing.map_or(0, |b| b.name.len());
        if name > LONGEST_NAME || header.len() as u64 > cluster {
            return Err(invalid(format!(
                "a backing file's name of {name} bytes is too long"
            )));
        }
        Ok(Self {
            disk: map.size(),
            guest,
            data,
            tables,
            layout,
            header,
        })
    }

    /// Bytes of the file.
    pub fn size(&self) -> u64 {
        self.layout.size()
    }

    /// Fills `buf` from `offset` of the file, both of which must lie within it; `fetch(offset, part)`
    /// reads from the disk, never behind its end.
    pub fn read<E>(
        &self,
        offset: u64,
        buf: &mut [u8],
        mut fetch: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let (mut at, mut rest) = (offset, buf);
        while let Some((part, range)) = self.layout.at(at).filter(|_| !rest.is_empty()) {
            let inner = at - range.start;
            let length = match part {
                // The next table may be of another place in the guest, and so may the next data.
                Part::L2 => self.layout.cluster() - inner % self.layout.cluster(),
                Part::Data => self.data_at(inner).1,
                _ => range.end - at,
            };
            let (now, later) = rest.split_at_mut(length.min(rest.len() as u64) as usize);
            match part {
                Part::Data => {
                    let from = self.data_at(inner).0;
                    let on_disk = self.disk.saturating_sub(from).min(now.len() as u64);
                    let (data, behind) = now.split_at_mut(on_disk as usize);
                    if !data.is_empty() {
                        fetch(from, data)?;
                    }
                    behind.fill(0);
                }
                _ => self.fill(part, inner, now),
            }
            at += now.len() as u64;
            rest = later;
        }
        rest.fill(0);
        Ok(())
    }

    /// Where in the guest the data is that lies `inner` bytes into the file's data, and how much of
    /// it follows in both.
    fn data_at(&self, inner: u64) -> (u64, u64) {
        let cluster = self.layout.cluster();
        let run = self.data.nth(inner / cluster);
        // There is one: the file has as many data clusters as `data` has members.
        let run = run.unwrap_or(self.guest.size()..self.guest.size() + 1);
        let from = run.start * cluster + inner % cluster;
        (from, run.end * cluster - from)
    }
}

fn invalid(message: String) -> Error {
    Error::new(model::Kind::Invalid, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Small clusters, so that a small disk has many L2 tables (32 KiB each) and refcount blocks
    /// (of a file of 128 KiB each).
    const BITS: u32 = 9;
    const CLUSTER: usize = 1 << BITS;

    /// Runs around the size of a cluster, and a few that skip whole L2 tables.
    fn runs() -> impl Strategy<Value = Vec<(u64, usize)>> {
        let length = prop_oneof![8 => 1u64..1500, 1 => 20_000u64..80_000];
        proptest::collection::vec((length, 0usize..3), 0..20)
    }

    fn map_of<K: Copy + PartialEq>(runs: &[(u64, usize)], kinds: [K; 3]) -> Extents<K> {
        let mut map = Extents::new();
        for &(length, kind) in runs {
            map.push(length, kinds[kind]);
        }
        map
    }

    const KINDS: [Kind; 3] = [Kind::Absent, Kind::Zero, Kind::Data];

    /// The disk before and now: it did not change where it is absent.
    fn disks(map: &Extents<Kind>) -> (Vec<u8>, Vec<u8>) {
        let before: Vec<u8> = (0..map.size()).map(|at| (at % 251) as u8 + 1).collect();
        let mut now = before.clone();
        for e in map.iter() {
            let part = &mut now[e.offset as usize..e.end() as usize];
            match e.kind {
                Kind::Absent => {}
                Kind::Zero => part.fill(0),
                Kind::Data => part.iter_mut().for_each(|b| *b += 1),
            }
        }
        (before, now)
    }

    /// Reads, and holds what `fetch` is promised.
    fn read(image: &Image, disk: &[u8], offset: usize, length: usize) -> Vec<u8> {
        let mut buf = vec![0xee; length];
        let mut last = None;
        image
            .read(offset as u64, &mut buf, |at, part| {
                let at = at as usize;
                assert!(!part.is_empty() && at + part.len() <= disk.len());
                assert!(last < Some(at), "what lies together is fetched together");
                last = Some(at + part.len());
                part.copy_from_slice(&disk[at..at + part.len()]);
                Ok::<(), ()>(())
            })
            .unwrap();
        buf
    }

    fn u32_at(file: &[u8], at: usize) -> usize {
        u32::from_be_bytes(file[at..at + 4].try_into().unwrap()) as usize
    }

    fn u64_at(file: &[u8], at: usize) -> u64 {
        u64::from_be_bytes(file[at..at + 8].try_into().unwrap())
    }

    /// Reads a qcow2 file the plain way, over what its backing file holds. Checks that every cluster
    /// of the file is in use just once, and that the refcounts say so.
    fn parse(file: &[u8], backing: &[u8]) -> Vec<u8> {
        assert_eq!(file[..8], *b"QFI\xfb\0\0\0\x03");
        let bits = u32_at(file, 20);
        let cluster = 1 << bits;
        assert_eq!(file.len() % cluster, 0);
        let mut uses = vec![0; file.len() / cluster];
        uses[0] += 1;
        let mut guest = backing.to_vec();
        guest.resize(u64_at(file, 24) as usize, 0);
        let mut pointer = |entry: u64| {
            assert_eq!(entry >> 63, 1, "copied");
            let at = (entry & !(1 << 63)) as usize;
            assert_eq!(at % cluster, 0);
            uses[at / cluster] += 1;
            at
        };
        let per_table = cluster / 8;
        let (l1_entries, l1) = (u32_at(file, 36), u64_at(file, 40) as usize);
        assert_eq!(l1_entries, guest.len().div_ceil(cluster * per_table));
        for i in 0..l1_entries {
            let entry = u64_at(file, l1 + i * 8);
            if entry == 0 {
                continue;
            }
            let l2 = pointer(entry);
            for j in 0..per_table {
                let start = (i * per_table + j) * cluster;
                let end = guest.len().min(start + cluster);
                match u64_at(file, l2 + j * 8) {
                    0 => {}
                    1 => guest[start..end].fill(0),
                    entry => {
                        let at = pointer(entry);
                        guest[start..end].copy_from_slice(&file[at..at + end - start]);
                    }
                }
            }
        }
        for i in 0..(l1_entries * 8).div_ceil(cluster) {
            uses[l1 / cluster + i] += 1;
        }
        let (table, clusters) = (u64_at(file, 48) as usize, u32_at(file, 56));
        let mut counts = Vec::new();
        for i in 0..clusters {
            uses[table / cluster + i] += 1;
        }
        for i in 0..clusters * per_table {
            let block = u64_at(file, table + i * 8) as usize;
            if block > 0 {
                uses[block / cluster] += 1;
                let block = &file[block..block + cluster];
                counts.extend(block.chunks(2).map(|c| u16::from_be_bytes([c[0], c[1]])));
            }
        }
        assert!(uses.iter().all(|&n| n == 1));
        assert!(counts[..uses.len()].iter().all(|&n| n == 1));
        assert!(counts[uses.len()..].iter().all(|&n| n == 0));
        assert_eq!((u32_at(file, 96), u32_at(file, 100)), (4, 104));
        guest
    }

    proptest! {
        #[test]
        fn an_overlay_over_the_old_disk_is_the_new_disk(runs in runs()) {
            let map = map_of(&runs, KINDS);
            let (before, mut now) = disks(&map);
            let image = Image::new(&map, BITS, None).unwrap();
            let file = read(&image, &now, 0, image.size() as usize);
            now.resize(now.len().next_multiple_of(512), 0);
            prop_assert!(parse(&file, &before) == now);
        }

        #[test]
        fn an_image_alone_is_the_disk(runs in runs()) {
            let map = map_of(&runs, [Kind::Absent, Kind::Absent, Kind::Data]);
            let zero = map.map(|k| if k == Kind::Absent { Kind::Zero } else { k });
            let (_, mut disk) = disks(&zero);
            let image = Image::new(&map, BITS, None).unwrap();
            let file = read(&image, &disk, 0, image.size() as usize);
            disk.resize(disk.len().next_multiple_of(512), 0);
            prop_assert!(parse(&file, &[]) == disk);
            // No more than the clusters that hold data.
            let clusters = (0..disk.len() / CLUSTER)
                .filter(|c| disk[c * CLUSTER..][..CLUSTER].iter().any(|b| *b > 0))
                .count();
            prop_assert_eq!(image.data.count(), clusters as u64);
        }

        #[test]
        fn any_part_is_that_part_of_the_whole(
            runs in runs(),
            reads in proptest::collection::vec((0.0..1.0f64, 0usize..5000), 1..20),
        ) {
            let map = map_of(&runs, KINDS);
            let (_, now) = disks(&map);
            let image = Image::new(&map, BITS, None).unwrap();
            let file = read(&image, &now, 0, image.size() as usize);
            for (from, length) in reads {
                let offset = (file.len() as f64 * from) as usize;
                let length = length.min(file.len() - offset);
                prop_assert!(read(&image, &now, offset, length) == file[offset..offset + length]);
            }
        }
    }

    /// More than 64 refcount blocks, which is what a table of one cluster lists.
    #[test]
    fn refcount_tables_grow() {
        let map = Extents::uniform(9 << 20, Kind::Data);
        let (before, now) = disks(&map);
        let image = Image::new(&map, BITS, None).unwrap();
        let file = read(&image, &now, 0, image.size() as usize);
        assert_eq!(u32_at(&file, 56), 2);
        assert!(parse(&file, &before) == now);
    }

    #[test]
    fn what_changes_and_allocations_become() {
        let mut changes = Extents::new();
        let cluster = 1 << CLUSTER_BITS;
        for (length, change) in [
            (cluster, Change::DirtyZero),
            (cluster, Change::Clean),
            (cluster - 1, Change::DirtyZero),
            (1, Change::Clean),
            (cluster, Change::Dirty),
            (cluster + 1, Change::Clean),
            (1, Change::Dirty),
            (cluster, Change::DirtyZero),
        ] {
            changes.push(length, change);
        }
        let image = Image::overlay(&changes, None).unwrap();
        let kinds = image.guest.iter().map(|e| (e.length, e.kind));
        assert_eq!(
            kinds.collect::<Vec<_>>(),
            [
                (1, Kind::Zero),
                (1, Kind::Absent),
                (2, Kind::Data),
                (1, Kind::Absent),
                (1, Kind::Data),
                (1, Kind::Zero)
            ]
        );
        let mut map = Extents::uniform(2 * cluster + 1, Allocation::HOLE);
        map.push(1, Allocation::DATA);
        map.push(2 * cluster, Allocation::ZERO);
        let image = Image::full(&map).unwrap();
        let kinds = image.guest.iter().map(|e| (e.length, e.kind));
        let data = [(2, Kind::Absent), (1, Kind::Data), (2, Kind::Absent)];
        assert_eq!(kinds.collect::<Vec<_>>(), data);
    }

    #[test]
    fn the_header_names_the_backing_file() {
        let named = |length| Backing {
            name: "m".repeat(length),
            format: Format::Qcow2,
        };
        let map = Extents::uniform(1000, Change::Clean);
        let image = Image::overlay(&map, Some(&named(7))).unwrap();
        let file = read(&image, &[], 0, 256);
        assert_eq!(u64_at(&file, 24), 1024);
        assert_eq!(file[104..112], [0xe2, 0x79, 0x2a, 0xca, 0, 0, 0, 5]);
        assert_eq!(file[112..128], *b"qcow2\0\0\0\0\0\0\0\0\0\0\0");
        let (at, length) = (u64_at(&file, 8) as usize, u32_at(&file, 16));
        assert_eq!(file[at..at + length], *b"mmmmmmm");
        assert!(Image::overlay(&map, Some(&named(1023))).is_ok());
        assert!(Image::overlay(&map, Some(&named(1024))).is_err());
        let small = map.map(|_| Kind::Absent);
        assert!(Image::new(&small, 9, Some(&named(400))).is_err());
        assert!(Image::new(&small, 8, None).is_err());
        assert!(Image::new(&small, 22, None).is_err());
    }

    /// What is kept is a matter of the extents, and any byte of the tables is there at once.
    #[test]
    fn a_large_disk_with_many_extents() {
        let (size, count) = (16u64 << 40, 10_000);
        let mut map = Extents::new();
        for n in 0..count {
            let start = (n * (size / count)) >> 16 << 16;
            map.push(start + 4096 - map.size(), Allocation::HOLE);
            map.push(8192, Allocation::DATA);
        }
        map.push(size - map.size(), Allocation::HOLE);
        let image = Image::full(&map).unwrap();
        assert!(image.guest.count() as u64 <= 2 * count + 1);
        assert!(image.data.runs() as u64 <= count);
        assert!(image.tables.runs() as u64 <= count);
        assert_eq!(image.header.len(), 112);
        assert_eq!(image.data.count(), count);
        assert_eq!(image.layout.range(Part::L1), 3 << 16..7 << 16);

        // The last data cluster, by the tables.
        let word = |at: u64| {
            let mut word = [0; 8];
            image.read(at, &mut word, |_, _| Err(())).unwrap();
            u64::from_be_bytes(word) & !tables::COPIED
        };
        let cluster = ((count - 1) * (size / count)) >> 16;
        let l2 = word((3 << 16) + cluster / 8192 * 8);
        assert_eq!(word(l2 + cluster % 8192 * 8), image.size() - (1 << 16));
        let mut fetched = Vec::new();
        let mut buf = [0; 4096];
        let read = image.read(image.size() - 4096, &mut buf, |at, part| {
            fetched.push((at, part.len()));
            Ok::<(), ()>(())
        });
        assert_eq!(read, Ok(()));
        assert_eq!(fetched, [((cluster << 16) + 61440, 4096)]);
    }

    #[test]
    fn an_error_is_passed_on() {
        let image = Image::full(&Extents::uniform(4096, Allocation::DATA)).unwrap();
        let mut buf = vec![0; image.size() as usize];
        assert_eq!(image.read(0, &mut buf, |_, _| Err("no")), Err("no"));
    }
}
