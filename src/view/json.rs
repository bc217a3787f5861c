//! Maps as JSON, as `nbdinfo --map --json` prints them, for programs that would rather not split
//! columns. Types and descriptions are those of the text ([`super::map`]).
//!
//! ```text
//! [
//! { "offset": 0, "length": 65536, "type": 1, "description": "dirty"},
//! { "offset": 65536, "length": 131072, "type": 0, "description": "clean"}
//! ]
//! ```
//!
//! Blanks and line ends are nbdinfo's too, so that a script that was written for it with `sed` works
//! here.

use super::map::{allocation_word, change_word};
use crate::model::{Allocation, Change, Extent, Extents};

/// An allocation map.
pub fn allocation(map: &Extents<Allocation>) -> String {
    array(map, allocation_word)
}

/// A change map.
pub fn changes(map: &Extents<Change>) -> String {
    array(map, change_word)
}

fn array<K: Copy + PartialEq>(map: &Extents<K>, word: impl Fn(K) -> (u32, &'static str)) -> String {
    let object = |e: Extent<K>| {
        let (number, word) = word(e.kind);
        // No description needs an escape.
        format!(
            r#"{{ "offset": {}, "length": {}, "type": {number}, "description": "{word}"}}"#,
            e.offset, e.length
        )
    };
    let objects: Vec<String> = map.iter().map(object).collect();
    format!("[\n{}\n]\n", objects.join(",\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::Value;

    const CHANGES: [Change; 3] = [Change::Clean, Change::Dirty, Change::DirtyZero];
    const ALLOCATIONS: [Allocation; 4] = [
        Allocation::DATA,
        Allocation::HOLE,
        Allocation::ZERO,
        Allocation {
            hole: true,
            zero: false,
        },
    ];

    fn map_of<K: Copy + PartialEq>(runs: &[(u64, usize)], kinds: &[K]) -> Extents<K> {
        let mut map = Extents::new();
        for &(length, kind) in runs {
            map.push(length, kinds[kind % kinds.len()]);
        }
        map
    }

    /// Reads a map back; `word` is how a kind is to be told.
    fn parse<K: Copy + PartialEq>(
        text: &str,
        kinds: &[K],
        word: impl Fn(K) -> (u32, &'static str),
    ) -> Extents<K> {
        let mut map = Extents::new();
        for object in serde_json::from_str::<Vec<Value>>(text).unwrap() {
            assert_eq!(object.as_object().unwrap().len(), 4);
            assert_eq!(object["offset"], map.size());
            let told = |k: &&K| {
                let (number, word) = word(**k);
                object["type"] == number && object["description"] == word
            };
            map.push(
                object["length"].as_u64().unwrap(),
                *kinds.iter().find(told).unwrap(),
            );
        }
        map
    }

    proptest! {
        #[test]
        fn what_is_written_can_be_read(
            runs in proptest::collection::vec((1u64..1 << 50, 0usize..4), 0..20),
        ) {
            let map = map_of(&runs, &CHANGES);
            prop_assert_eq!(parse(&changes(&map), &CHANGES, change_word), map);
            let map = map_of(&runs, &ALLOCATIONS);
            prop_assert_eq!(parse(&allocation(&map), &ALLOCATIONS, allocation_word), map);
        }
    }

    /// Copied from nbdinfo 1.14: `nbdinfo --map --json`, of 1 MiB and of nothing.
    #[test]
    fn nbdinfos_shape() {
        let map = map_of(&[(65536, 0), (983_040, 1)], &ALLOCATIONS);
        assert_eq!(
            allocation(&map),
            "[\n\
             { \"offset\": 0, \"length\": 65536, \"type\": 0, \"description\": \"data\"},\n\
             { \"offset\": 65536, \"length\": 983040, \"type\": 3, \
             \"description\": \"hole,zero\"}\n\
             ]\n"
        );
        assert_eq!(allocation(&Extents::new()), "[\n\n]\n");
    }
}
