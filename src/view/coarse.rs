//! A map in whole blocks, for formats that know nothing smaller: qcow2's clusters, bmap's blocks.
//!
//! ```text
//!   bytes    |  a a a a a | b b b b b b b b b b b |  a a a |     10 a, 22 b, 5 a
//!   blocks   |   a   |  join(a,b)  |   b   |  join(b,a) |        of 8: the last one is cut short
//! ```
//!
//! The result is counted in blocks: what is at offset 3 is the fourth block. Its size is one walk
//! over the runs, however large the disk is.

use crate::model::Extents;

/// The map in blocks of `block` bytes (not 0). A block that holds several kinds is of the kind that
/// `join` makes of them, one after the other; one that the end cuts short counts as whole.
pub fn coarse<K: Copy + PartialEq>(
    map: &Extents<K>,
    block: u64,
    join: impl Fn(K, K) -> K,
) -> Extents<K> {
    let mut out = Extents::new();
    // What the block at the end of `out` holds so far, if it has begun.
    let mut begun: Option<K> = None;
    for e in map.iter() {
        let kind = begun.map_or(e.kind, |before| join(before, e.kind));
        let ended = e.end() / block;
        if ended > out.size() {
            out.push(1, kind);
            out.push(ended - out.size(), e.kind);
            begun = (e.end() % block > 0).then_some(e.kind);
        } else {
            begun = Some(kind);
        }
    }
    if let Some(kind) = begun {
        out.push(1, kind);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_block_holds_what_its_bytes_say(
            runs in proptest::collection::vec((1u64..20, 0u8..3), 0..20),
            block in 1u64..9,
        ) {
            let mut map = Extents::new();
            for (length, kind) in runs {
                map.push(length, 1 << kind);
            }
            let bytes: Vec<u8> = (0..map.size())
                .flat_map(|at| map.clip(at, 1).map(|e| e.kind).collect::<Vec<_>>())
                .collect();
            let expected: Vec<u8> = bytes
                .chunks(block as usize)
                .map(|c| c.iter().fold(0, |a, b| a | b))
                .collect();
            let coarse = coarse(&map, block, |a, b| a | b);
            let found: Vec<u8> = coarse
                .iter()
                .flat_map(|e| std::iter::repeat_n(e.kind, e.length as usize))
                .collect();
            prop_assert_eq!(found, expected);
        }
    }
}
