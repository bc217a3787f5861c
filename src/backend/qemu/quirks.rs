//! What a QEMU gets wrong and has to be spared.
//!
//! **Before 8.0, snapshot-access shows new data.** `hbitmap_status()` says "clean" of a range that
//! begins dirty and has a clean bit further on, and copy-before-write asks it which clusters were
//! already copied. So a read that begins in a copied cluster and ends beyond the last copied one is
//! served from the live disk, and block status describes the live disk there. (Fixed by "hbitmap: fix
//! hbitmap_status() return value for first dirty bit case"; seen in Debian's 7.2.22.) A request
//! within one cluster is answered right, whatever its state; `tests/live.rs` shows both.
//!
//! So such a QEMU is asked to read within one cluster at a time, and where zeros are is asked of the
//! overlay, twice: see [`surely`](crate::backend::over_nbd::surely).

use crate::qmp::Version;

/// How to read from a QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// As it comes.
    Sound,
    /// Within one cluster of the overlay at a time.
    Clusterwise,
}

/// Cluster size of the overlay, and so of what copy-before-write copies: QEMU's default.
pub(super) const CLUSTER: u64 = 65536;

impl Access {
    pub(super) fn of(version: Version) -> Self {
        match version.major {
            0..8 => Self::Clusterwise,
            _ => Self::Sound,
        }
    }

    /// Whether the overlay must answer for what lies beneath it, too.
    pub(super) fn asks_the_overlay(self) -> bool {
        self == Self::Clusterwise
    }
}

/// Pieces of `offset..offset + length` that lie within one cluster each: (offset, length).
pub(super) fn clusters(offset: u64, length: u64) -> impl Iterator<Item = (u64, usize)> {
    let end = offset + length;
    let mut at = offset;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let start = at;
        at = ((start / CLUSTER + 1) * CLUSTER).min(end);
        Some((start, (at - start) as usize))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn pieces_cover_the_range_and_cross_no_border(offset in 0u64..300_000, length in 0u64..300_000) {
            let mut at = offset;
            for (start, n) in clusters(offset, length) {
                prop_assert_eq!(start, at);
                prop_assert!(n > 0);
                prop_assert_eq!(start / CLUSTER, (start + n as u64 - 1) / CLUSTER);
                at += n as u64;
            }
            prop_assert_eq!(at, offset + length);
        }
    }
}
