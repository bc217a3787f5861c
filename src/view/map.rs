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

use crate::model::{Allocation, Change, Error, Extents, Kind, Result};

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

/// Reads the text of a change map: all of it or nothing, since a line that is passed over would be a
/// change that is missed.
pub fn read_changes(text: &str) -> Result<Extents<Change>> {
    let mut map = Extents::new();
    for (at, line) in text.lines().enumerate() {
        let refuse = |why: &str| {
            let message = format!("line {} of the map {why}: {line:?}", at + 1);
            Error::new(Kind::Invalid, message)
        };
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let [offset, length, number, word] = words[..] else {
            return Err(refuse("does not have four columns"));
        };
        let kind = number.parse::<u32>().map(|number| (number, word));
        let change = [Change::Clean, Change::Dirty, Change::DirtyZero]
            .into_iter()
            .find(|c| kind == Ok(change_word(*c)))
            .ok_or_else(|| refuse("has a type that changes do not have"))?;
        let length = length.parse().ok().filter(|l| *l > 0);
        let (Some(length), Ok(offset)) = (length, offset.parse::<u64>()) else {
            return Err(refuse("has no extent"));
        };
        if offset != map.size() {
            return Err(refuse("does not go on where the one before ended"));
        }
        if offset.checked_add(length).is_none() {
            return Err(refuse("ends beyond all disks"));
        }
        map.push(length, change);
    }
    if !text.is_empty() && !text.ends_with('\n') {
        return Err(Error::new(
            Kind::Invalid,
            "the map's last line is cut short",
        ));
    }
    Ok(map)
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
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_written_can_be_read(
            runs in proptest::collection::vec((1u64..1 << 50, 0usize..3), 0..20),
        ) {
            let mut map = Extents::new();
            for (length, kind) in runs {
                map.push(length, [Change::Clean, Change::Dirty, Change::DirtyZero][kind]);
            }
            prop_assert_eq!(read_changes(&change_text(&map)).unwrap(), map);
        }

        #[test]
        fn no_text_makes_the_reader_fall_over(text in "([0-9 a-z,\n]{0,20}){0,9}|\\PC*") {
            let _ = read_changes(&text);
        }
    }

    #[test]
    fn a_damaged_map_is_refused() {
        for (text, why) in [
            ("0 1 1 dirty", "cut short"),
            ("0 1 1 clean\n", "a type that"),
            ("0 1 2 zero\n", "a type that"),
            ("0 1 1\n", "four columns"),
            ("\n", "four columns"),
            ("0 0 1 dirty\n", "no extent"),
            ("0 -1 1 dirty\n", "no extent"),
            ("1 1 1 dirty\n", "does not go on"),
            ("0 2 1 dirty\n1 1 0 clean\n", "does not go on"),
            (
                "0 1 1 dirty\n1 18446744073709551615 0 clean\n",
                "beyond all disks",
            ),
        ] {
            let said = read_changes(text).unwrap_err();
            assert!(said.message().contains(why), "{text:?}: {said}");
        }
    }

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
