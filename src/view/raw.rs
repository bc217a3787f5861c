//! A frozen disk as a plain file: zeros are answered from the map, only data is fetched.

use crate::model::{Allocation, Extents};

/// Zeros up to this many bytes between two stretches of data are fetched with them: one request
/// costs more than so many bytes do.
const BRIDGE: u64 = 32 * 1024;

/// Fills `buf` from `offset`, which must lie within the map; `fetch(offset, part)` reads data.
pub fn read<E>(
    map: &Extents<Allocation>,
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
fn stretches(map: &Extents<Allocation>, offset: u64, length: u64) -> Vec<(u64, u64)> {
    let mut out: Vec<(u64, u64)> = Vec::new();
    for e in map.clip(offset, length).filter(|e| !e.kind.zero) {
        match out.last_mut() {
            Some(last) if e.offset - last.1 <= BRIDGE => last.1 = e.end(),
            _ => out.push((e.offset, e.end())),
        }
    }
    out
}

/// Whether there are only zeros in `offset..offset + length`, as far as that lies within the map.
pub fn is_zero(map: &Extents<Allocation>, offset: u64, length: u64) -> bool {
    map.clip(offset, length).all(|e| e.kind.zero)
}

/// `st_blocks` of the file, in units of 512 bytes: what is not known to be zeros.
///
/// Tools such as `tar -S` and `cp` look for holes only where this is less than the size.
pub fn blocks(map: &Extents<Allocation>) -> u64 {
    map.bytes(|a| !a.zero).div_ceil(512)
}

/// SEEK_DATA: the first byte at or after `offset` that is data; `None` if only zeros are left.
pub fn seek_data(map: &Extents<Allocation>, offset: u64) -> Option<u64> {
    map.seek(offset, |a| !a.zero)
}

/// SEEK_HOLE: the first byte at or after `offset` that is a hole; the end of the file counts as one.
pub fn seek_hole(map: &Extents<Allocation>, offset: u64) -> u64 {
    map.seek(offset, |a| a.zero).unwrap_or(map.size())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Runs of kilobytes: lengths on both sides of `BRIDGE`.
    fn disk() -> impl Strategy<Value = Extents<Allocation>> {
        let run = (1u64..80, 0..3).prop_map(|(k, kind)| {
            let kind = [Allocation::DATA, Allocation::HOLE, Allocation::ZERO][kind as usize];
            (k * 1024, kind)
        });
        proptest::collection::vec(run, 1..20).prop_map(|runs| {
            let mut map = Extents::new();
            for (length, kind) in runs {
                map.push(length, kind);
            }
            map
        })
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
    }

    #[test]
    fn an_error_is_passed_on() {
        let map = Extents::uniform(4096, Allocation::DATA);
        assert_eq!(read(&map, 0, &mut [0; 512], |_, _| Err("no")), Err("no"));
    }
}
