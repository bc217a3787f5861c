//! A frozen disk as a plain file: zeros are answered from the map, only data is fetched.
//!
//! Two files are made this way: the disk, and what changed of it. What their reads return and what
//! is shown as data are two questions to a map ([`Stretch`]), because the answers differ:
//!
//! ```text
//!                     raw/vda.raw: the disk           since/mon/vda.raw: what changed
//!                     data   zeros   hole             dirty   dirty, zero   clean
//!   reads return      disk   zeros   zeros            disk    zeros         zeros, whatever is there
//!   SEEK_DATA finds   yes    no      no               yes     yes           no
//! ```
//!
//! Whoever copies the data of the second file onto an older copy of the disk must write the new
//! zeros too; in the first, zeros are what a new file is full of.

use crate::model::{Allocation, Change, Extents};

/// What a file knows of a stretch of its map.
pub trait Stretch: Copy + PartialEq {
    /// What a read returns.
    fn content(self) -> Content;

    /// It is shown as a hole: no data for SEEK_DATA, no space in `st_blocks`. A hole is zeros.
    fn hole(self) -> bool;
}

/// What a read of a stretch returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// What the disk holds.
    Disk,
    /// Zeros, which the disk holds too: it does no harm to fetch them.
    Zeros,
    /// Zeros, whatever the disk holds.
    Hidden,
}

impl Stretch for Allocation {
    fn content(self) -> Content {
        if self.zero {
            Content::Zeros
        } else {
            Content::Disk
        }
    }

    // Also where space is allocated: a reader of the whole disk need not know.
    fn hole(self) -> bool {
        self.content() == Content::Zeros
    }
}

impl Stretch for Change {
    fn content(self) -> Content {
        match self {
            Self::Clean => Content::Hidden,
            Self::Dirty => Content::Disk,
            Self::DirtyZero => Content::Zeros,
        }
    }

    fn hole(self) -> bool {
        self == Self::Clean
    }
}

/// Zeros up to this many bytes between two stretches of data are fetched with them: one request
/// costs more than so many bytes do.
const BRIDGE: u64 = 32 * 1024;

/// Fills `buf` from `offset`, which must lie within the map; `fetch(offset, part)` reads data.
pub fn read<K: Stretch, E>(
    map: &Extents<K>,
    offset: u64,
    buf: &mut [u8],
    mut fetch: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
) -> Result<(), E> {
    let mut rest = buf;
    let mut at = offset;
    for (start, end) in stretches(map, offset, rest.len() as u64) {
        let (gap, tail) = rest.split_at_mut((start - at) as usize);
        gap.fill(0);
        let (data, tail) = tail.split_at_mut((end - start) as usize);
        fetch(start, data)?;
        rest = tail;
        at = end;
    }
    rest.fill(0);
    Ok(())
}

/// The stretches of `offset..offset + length` to fetch, as (start, end).
fn stretches<K: Stretch>(map: &Extents<K>, offset: u64, length: u64) -> Vec<(u64, u64)> {
    let mut out: Vec<(u64, u64)> = Vec::new();
    // Whether all behind the last stretch may be fetched with it.
    let mut bridged = false;
    for e in map.clip(offset, length) {
        match (e.kind.content(), out.last_mut()) {
            (Content::Disk, Some(last)) if bridged && e.offset - last.1 <= BRIDGE => {
                last.1 = e.end();
            }
            (Content::Disk, _) => {
                out.push((e.offset, e.end()));
                bridged = true;
            }
            (Content::Zeros, _) => {}
            (Content::Hidden, _) => bridged = false,
        }
    }
    out
}

/// Whether there are only zeros in `offset..offset + length`, as far as that lies within the map.
pub fn is_zero<K: Stretch>(map: &Extents<K>, offset: u64, length: u64) -> bool {
    map.clip(offset, length)
        .all(|e| e.kind.content() != Content::Disk)
}

/// `st_blocks` of the file, in units of 512 bytes: what is no hole.
///
/// Tools such as `tar -S` and `cp` look for holes only where this is less than the size.
pub fn blocks<K: Stretch>(map: &Extents<K>) -> u64 {
    map.bytes(|k| !k.hole()).div_ceil(512)
}

/// SEEK_DATA: the first byte at or after `offset` that is data; `None` if only holes are left.
pub fn seek_data<K: Stretch>(map: &Extents<K>, offset: u64) -> Option<u64> {
    map.seek(offset, |k| !k.hole())
}

/// SEEK_HOLE: the first byte at or after `offset` that is a hole; the end of the file counts as one.
pub fn seek_hole<K: Stretch>(map: &Extents<K>, offset: u64) -> u64 {
    map.seek(offset, K::hole).unwrap_or(map.size())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Runs of kilobytes: lengths on both sides of `BRIDGE`.
    fn map_of<K: Stretch + std::fmt::Debug>(
        kinds: &'static [K],
    ) -> impl Strategy<Value = Extents<K>> {
        let run = (1u64..80, 0..kinds.len()).prop_map(|(k, kind)| (k * 1024, kinds[kind]));
        proptest::collection::vec(run, 1..20).prop_map(|runs| {
            let mut map = Extents::new();
            for (length, kind) in runs {
                map.push(length, kind);
            }
            map
        })
    }

    fn disk() -> impl Strategy<Value = Extents<Allocation>> {
        map_of(&[Allocation::DATA, Allocation::HOLE, Allocation::ZERO])
    }

    /// The disk's true bytes: data is never 0, the rest always.
    fn byte(map: &Extents<Allocation>, at: u64) -> u8 {
        let data = map.clip(at, 1).any(|e| !e.kind.zero);
        if data { (at % 251) as u8 + 1 } else { 0 }
    }

    proptest! {
        #[test]
        fn reads_the_true_bytes(map in disk(), from in 0.0..1.0f64, length in 0u64..200_000) {
            let offset = (map.size() as f64 * from) as u64;
            let length = length.min(map.size() - offset);
            let mut buf = vec![0xee; length as usize];
            let mut fetched = Vec::new();
            read(&map, offset, &mut buf, |at, part| {
                fetched.push((at, part.len() as u64));
                for (i, b) in part.iter_mut().enumerate() {
                    *b = byte(&map, at + i as u64);
                }
                Ok::<(), ()>(())
            }).unwrap();
            for (i, &b) in buf.iter().enumerate() {
                prop_assert_eq!(b, byte(&map, offset + i as u64));
            }
            // Nothing is fetched that is a long stretch of zeros, and stretches lie apart.
            for &(at, n) in &fetched {
                prop_assert!(map.clip(at, n).all(|e| !e.kind.zero || e.length <= BRIDGE * 2));
                prop_assert!(map.clip(at, 1).all(|e| !e.kind.zero));
            }
            prop_assert_eq!(is_zero(&map, offset, length), buf.iter().all(|b| *b == 0));
            prop_assert!(fetched.windows(2).all(|w| w[0].0 + w[0].1 + BRIDGE < w[1].0));
        }

        #[test]
        fn seeks_agree_with_the_bytes(map in disk(), from in 0.0..1.0f64) {
            let offset = (map.size() as f64 * from) as u64;
            let data = (offset..map.size()).step_by(512).find(|&i| byte(&map, i) != 0);
            let hole = (offset..map.size()).step_by(512).find(|&i| byte(&map, i) == 0);
            let near = |a: Option<u64>, b: Option<u64>| match (a, b) {
                (Some(a), Some(b)) => a <= b && b - a < 512,
                (None, None) => true,
                _ => false,
            };
            prop_assert!(near(seek_data(&map, offset), data));
            prop_assert!(near(Some(seek_hole(&map, offset)), hole.or(Some(map.size()))));
            prop_assert_eq!(blocks(&map) * 512, map.bytes(|a| !a.zero));
        }

        /// Any old copy of a disk becomes the new disk when the data of the file of changes is
        /// copied onto it.
        #[test]
        fn changes_bring_an_old_copy_up_to_date(changes in changes()) {
            let (mut copy, new) = disks(&changes);
            let (mut at, mut copied) = (0, 0);
            while let Some(start) = seek_data(&changes, at) {
                at = seek_hole(&changes, start);
                copied += at - start;
                let part = read_of(&changes, &new, start, at - start);
                copy[start as usize..at as usize].copy_from_slice(&part);
            }
            prop_assert!(copy == new);
            prop_assert_eq!(copied, changes.bytes(|c| c != Change::Clean));
            prop_assert_eq!(blocks(&changes) * 512, copied);
        }

        /// What did not change reads as zeros, though the disk, which is asked, holds something.
        #[test]
        fn nothing_shows_through_holes(
            changes in changes(),
            from in 0.0..1.0f64,
            length in 0u64..200_000,
        ) {
            let offset = (changes.size() as f64 * from) as u64;
            let length = length.min(changes.size() - offset);
            let (_, new) = disks(&changes);
            let mut expected = new.clone();
            for e in changes.iter().filter(|e| e.kind == Change::Clean) {
                expected[e.offset as usize..e.end() as usize].fill(0);
            }
            let part = read_of(&changes, &new, offset, length);
            prop_assert!(part == expected[offset as usize..][..length as usize]);
            prop_assert_eq!(is_zero(&changes, offset, length), part.iter().all(|b| *b == 0));
        }
    }

    fn changes() -> impl Strategy<Value = Extents<Change>> {
        map_of(&[Change::Clean, Change::Dirty, Change::DirtyZero])
    }

    /// The disk before and after; it holds no zeros but the new ones.
    fn disks(changes: &Extents<Change>) -> (Vec<u8>, Vec<u8>) {
        let before: Vec<u8> = (0..changes.size()).map(|at| (at % 251) as u8 + 1).collect();
        let mut after = before.clone();
        for e in changes.iter() {
            let part = &mut after[e.offset as usize..e.end() as usize];
            match e.kind {
                Change::Clean => {}
                Change::Dirty => part.iter_mut().for_each(|b| *b += 1),
                Change::DirtyZero => part.fill(0),
            }
        }
        (before, after)
    }

    fn read_of(changes: &Extents<Change>, disk: &[u8], offset: u64, length: u64) -> Vec<u8> {
        let mut buf = vec![0xee; length as usize];
        read(changes, offset, &mut buf, |at, part| {
            part.copy_from_slice(&disk[at as usize..][..part.len()]);
            Ok::<(), ()>(())
        })
        .unwrap();
        buf
    }

    #[test]
    fn an_error_is_passed_on() {
        let map = Extents::uniform(4096, Allocation::DATA);
        assert_eq!(read(&map, 0, &mut [0; 512], |_, _| Err("no")), Err("no"));
    }
}
