//! A change map as a bmap file, version 2.0, for `bmaptool copy`: the blocks to write onto an older
//! copy of the disk.
//!
//! ```text
//!   <bmap version="2.0">
//!     <ImageSize>, <BlockSize>, <BlocksCount>, <MappedBlocksCount>
//!     <ChecksumType> sha256, <BmapFileChecksum>
//!     <BlockMap>  <Range> first-last </Range> …
//! ```
//!
//! bmaptool's own files list what is allocated, and the rest may keep whatever the target holds.
//! That is just what an incremental copy wants: here what changed is listed, zeros too, and what
//! did not change is left as it is. A block with one changed byte is listed whole.
//!
//! The target must be a block device, such as a loop device over the older copy: bmaptool empties
//! a target that is a plain file before it writes.
//!
//! Ranges bear no checksums of their own: they would cost a read of all that changed. The file's
//! checksum is that of the file with zeros in the checksum's place.

use std::fmt::Write;

use sha2::{Digest, Sha256};

use super::coarse::coarse;
use crate::model::{Change, Extents};

/// Bytes in a block: what bmaptool itself uses on most file systems.
pub const BLOCK: u64 = 4096;

/// The text of the file.
pub fn text(map: &Extents<Change>) -> String {
    let unsigned = with_checksum(map, &"0".repeat(64));
    let mut checksum = String::new();
    for byte in Sha256::digest(unsigned) {
        // Writing to a String cannot fail, here and below.
        let _ = write!(checksum, "{byte:02x}");
    }
    with_checksum(map, &checksum)
}

fn with_checksum(map: &Extents<Change>, checksum: &str) -> String {
    let blocks = coarse(&map.map(|c| c != Change::Clean), BLOCK, |a, b| a || b);
    let mut out = format!(
        r#"<?xml version="1.0" ?>
<!-- The blocks of a disk that changed since a checkpoint; the others are not to be written. -->
<bmap version="2.0">
    <ImageSize> {} </ImageSize>
    <BlockSize> {BLOCK} </BlockSize>
    <BlocksCount> {} </BlocksCount>
    <MappedBlocksCount> {} </MappedBlocksCount>
    <ChecksumType> sha256 </ChecksumType>
    <!-- Of this file, with a 0 in place of each of the checksum's digits. -->
    <BmapFileChecksum> {checksum} </BmapFileChecksum>
    <BlockMap>
"#,
        map.size(),
        blocks.size(),
        blocks.bytes(|changed| changed),
    );
    for e in blocks.iter().filter(|e| e.kind) {
        let _ = match e.length {
            1 => writeln!(out, "        <Range> {} </Range>", e.offset),
            _ => writeln!(out, "        <Range> {}-{} </Range>", e.offset, e.end() - 1),
        };
    }
    out.push_str("    </BlockMap>\n</bmap>\n");
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The text between `<name>` and `</name>`, trimmed, every time.
    fn elements<'a>(text: &'a str, name: &str) -> Vec<&'a str> {
        let (open, close) = (format!("<{name}>"), format!("</{name}>"));
        text.split(&open)
            .skip(1)
            .map(|rest| rest.split(&close).next().unwrap().trim())
            .collect()
    }

    fn number(text: &str, name: &str) -> u64 {
        elements(text, name)[0].parse().unwrap()
    }

    proptest! {
        #[test]
        fn lists_the_blocks_that_changed(
            runs in proptest::collection::vec((1u64..20_000, 0usize..3), 0..20),
        ) {
            let mut map = Extents::new();
            for (length, kind) in runs {
                map.push(length, [Change::Clean, Change::Dirty, Change::DirtyZero][kind]);
            }
            let text = text(&map);
            let count = map.size().div_ceil(BLOCK);
            let expected: Vec<u64> = (0..count)
                .filter(|b| map.clip(b * BLOCK, BLOCK).any(|e| e.kind != Change::Clean))
                .collect();
            let found: Vec<u64> = elements(&text, "Range")
                .iter()
                .flat_map(|range| {
                    let (first, last) = range.split_once('-').unwrap_or((range, range));
                    first.parse().unwrap()..=last.parse().unwrap()
                })
                .collect();
            prop_assert_eq!(number(&text, "MappedBlocksCount"), found.len() as u64);
            prop_assert_eq!(found, expected);
            prop_assert_eq!(number(&text, "ImageSize"), map.size());
            prop_assert_eq!(number(&text, "BlocksCount"), count);
        }
    }

    /// The checksum as bmaptool checks it. The number itself comes from `sha256sum`.
    #[test]
    fn the_checksum_is_of_the_file_with_zeros_in_its_place() {
        let mut map = Extents::uniform(8192, Change::Clean);
        map.push(4097, Change::Dirty);
        let text = text(&map);
        let checksum = elements(&text, "BmapFileChecksum")[0];
        assert_eq!(
            checksum,
            "945d179a05e80b941c72234a94611eaa48eb76774f02c354c3edb8f8c84741ad"
        );
        let zeros = text.replacen(checksum, &"0".repeat(64), 1);
        let again: String = Sha256::digest(zeros)
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect();
        assert_eq!(again, checksum);
        assert_eq!(elements(&text, "Range"), ["2-3"]);
    }
}
