//! Maps as text, in the columns of `nbdinfo --map`: offset, length, type, description.
//!
//! ```text
//!          0       65536    1  dirty
//!      65536      131072    0  clean
//!     196608       65536    3  dirty,zero
//! ```
//!
//! Types of an allocation map are NBD's `base:allocation` flags (1 hole, 2 zero) with nbdinfo's
//! words. Types of a change map are NBD's dirty flag (1) and, where what was written reads as zeros,
//! the zero flag (2) with it: a tool that knows only "dirty" sees an odd number either way.

use std::fmt::Write;

use crate::model::{Allocation, Change, Extents};

/// What became of a disk, given what was written and what it holds: dirty and zero told apart.
pub fn changes(dirty: &Extents<bool>, allocation: &Extents<Allocation>) -> Extents<Change> {
    dirty.zip(allocation, |dirty, now| match (dirty, now.zero) {
        (false, _) => Change::Clean,
        (true, false) => Change::Dirty,
        (true, true) => Change::DirtyZero,
    })
}

/// The text of an allocation map.
pub fn allocation_text(map: &Extents<Allocation>) -> String {
    text(map, allocation_word)
}

/// The text of a change map.
pub fn change_text(map: &Extents<Change>) -> String {
    text(map, change_word)
}

/// An allocation's type and description.
pub(super) fn allocation_word(a: Allocation) -> (u32, &'static str) {
    match (a.zero, a.hole) {
        (false, false) => (0, "data"),
        (false, true) => (1, "hole"),
        (true, false) => (2, "zero"),
        (true, true) => (3, "hole,zero"),
    }
}

/// A change's type and description.
pub(super) fn change_word(c: Change) -> (u32, &'static str) {
    match c {
        Change::Clean => (0, "clean"),
        Change::Dirty => (1, "dirty"),
        Change::DirtyZero => (3, "dirty,zero"),
    }
}

fn text<K: Copy + PartialEq>(map: &Extents<K>, word: impl Fn(K) -> (u32, &'static str)) -> String {
    let mut out = String::new();
    for e in map.iter() {
        let (number, word) = word(e.kind);
        // Writing to a String cannot fail.
        let _ = writeln!(
            out,
            "{:>10}  {:>10}  {number:>3}  {word}",
            e.offset, e.length
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dirty_and_zero_are_told_apart() {
        let mut dirty = Extents::new();
        dirty.push(65536, true);
        dirty.push(65536, false);
        dirty.push(131072, true);
        let mut now = Extents::new();
        now.push(131072, Allocation::DATA);
        now.push(65536, Allocation::DATA);
        now.push(65536, Allocation::HOLE);
        assert_eq!(
            change_text(&changes(&dirty, &now)),
            "         0       65536    1  dirty\n     \
             65536       65536    0  clean\n    \
             131072       65536    1  dirty\n    \
             196608       65536    3  dirty,zero\n"
        );
    }

    #[test]
    fn nbdinfos_words() {
        let mut map = Extents::new();
        map.push(65536, Allocation::DATA);
        map.push(196608, Allocation::HOLE);
        map.push(4096, Allocation::ZERO);
        map.push(
            4096,
            Allocation {
                hole: true,
                zero: false,
            },
        );
        assert_eq!(
            allocation_text(&map),
            "         0       65536    0  data\n     \
             65536      196608    3  hole,zero\n    \
             262144        4096    2  zero\n    \
             266240        4096    1  hole\n"
        );
    }
}
