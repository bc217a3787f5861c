//! A disk in memory that the tests write to in step with the guest, and what they write.

use std::fmt::Write as _;
use std::ops::Range;
use std::path::Path;

/// Random numbers that can be had again: xorshift64*. The seed is printed, `FLEECEFS_SEED` sets it.
pub struct Rng(u64);

impl Rng {
    /// A new sequence every time, unless `FLEECEFS_SEED` says otherwise.
    pub fn from_env() -> Self {
        let seed = match std::env::var("FLEECEFS_SEED") {
            Ok(text) => text.parse().expect("FLEECEFS_SEED is a number"),
            Err(_) => {
                let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap();
                u64::from(now.subsec_nanos()) ^ (now.as_secs() << 30)
            }
        };
        println!("FLEECEFS_SEED={seed}");
        Self::new(seed)
    }

    /// The sequence of that seed.
    pub fn new(seed: u64) -> Self {
        // 0 is the one state that xorshift never leaves.
        Self((seed ^ 0x9e37_79b9_7f4a_7c15).max(1))
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number of the range, which must not be empty.
    pub fn within(&mut self, range: Range<u64>) -> u64 {
        range.start + self.number() % (range.end - range.start)
    }

    /// True once in `n` times.
    pub fn once_in(&mut self, n: u64) -> bool {
        self.number().is_multiple_of(n)
    }

    /// A write somewhere on a disk, in sectors of 512 bytes: mostly small, now and then large, one
    /// in six of zeros.
    pub fn write(&mut self, size: u64) -> Write {
        let sectors = size / 512;
        let most = if self.once_in(8) { 4096 } else { 256 };
        let length = self.within(1..most.min(sectors) + 1);
        Write {
            offset: self.within(0..sectors - length + 1) * 512,
            length: length * 512,
            pattern: if self.once_in(6) {
                0
            } else {
                self.within(1..256) as u8
            },
        }
    }
}

/// A write of one byte over and over; of 0 it is a write of zeros (which unmaps).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Write {
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
    /// The byte.
    pub pattern: u8,
}

/// What a disk holds.
#[derive(Clone, PartialEq, Eq)]
pub struct Disk(Vec<u8>);

impl Disk {
    /// All zeros.
    pub fn new(size: u64) -> Self {
        Self(vec![0; usize::try_from(size).unwrap()])
    }

    /// No two places alike: the period is prime, so that data from a wrong offset shows.
    pub fn patterned(size: u64) -> Self {
        Self((0..size).map(|at| (at % 1021 % 251) as u8 + 1).collect())
    }

    /// What is there already.
    pub fn holding(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    /// The whole content.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.0.len() as u64
    }

    /// Does to the model what the guest did to the disk.
    pub fn apply(&mut self, write: Write) {
        self.0[write.offset as usize..(write.offset + write.length) as usize].fill(write.pattern);
    }

    /// Fails with the first wrong offset unless `found` is just this.
    pub fn assert_is(&self, found: &[u8], what: &str) {
        assert_eq!(found.len(), self.0.len(), "{what}: size");
        if found != self.0 {
            let at = (0..found.len()).find(|&i| found[i] != self.0[i]).unwrap();
            let wrong = (0..found.len()).filter(|&i| found[i] != self.0[i]).count();
            panic!(
                "{what}: {wrong} wrong bytes, the first at {at}: {:#04x} instead of {:#04x}",
                found[at], self.0[at]
            );
        }
    }

    /// The same with a file.
    pub fn assert_file(&self, path: &Path) {
        let found = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        self.assert_is(&found, &path.display().to_string());
    }
}

/// Which granules of a disk were written: what a dirty bitmap has to say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Marks {
    granularity: u64,
    size: u64,
    dirty: Vec<bool>,
}

impl Marks {
    /// Nothing written yet. QEMU's default granularity for qcow2 is its cluster size, 64 KiB.
    pub fn new(size: u64, granularity: u64) -> Self {
        Self {
            granularity,
            size,
            dirty: vec![false; usize::try_from(size.div_ceil(granularity)).unwrap()],
        }
    }

    /// Notes a write.
    pub fn mark(&mut self, write: Write) {
        let first = write.offset / self.granularity;
        let end = (write.offset + write.length).div_ceil(self.granularity);
        self.dirty[first as usize..end as usize].fill(true);
    }

    /// Adds what another one says.
    pub fn merge(&mut self, other: &Self) {
        assert_eq!(self.granularity, other.granularity);
        for (mine, theirs) in self.dirty.iter_mut().zip(&other.dirty) {
            *mine |= theirs;
        }
    }

    /// Dirty extents: `(offset, length)`, joined, in order.
    pub fn extents(&self) -> Vec<(u64, u64)> {
        let mut found: Vec<(u64, u64)> = Vec::new();
        for (i, _) in self.dirty.iter().enumerate().filter(|(_, d)| **d) {
            let start = i as u64 * self.granularity;
            let length = self.granularity.min(self.size - start);
            match found.last_mut() {
                Some((s, l)) if *s + *l == start => *l += length,
                _ => found.push((start, length)),
            }
        }
        found
    }
}

/// A line of a map as `nbdinfo --map` prints it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MapLine {
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
    /// The type's number.
    pub kind: u32,
    /// The type in words.
    pub description: String,
}

/// Reads a map; panics unless it is one and covers the disk without gaps.
pub fn parse_map(text: &str) -> Vec<MapLine> {
    let mut lines = Vec::new();
    let mut next = 0;
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let mut number = || words.next().and_then(|w| w.parse::<u64>().ok());
        let (Some(offset), Some(length), Some(kind)) = (number(), number(), number()) else {
            panic!("not a line of a map: {line:?}");
        };
        assert_eq!(offset, next, "a gap or an overlap before {line:?}");
        next = offset + length;
        lines.push(MapLine {
            offset,
            length,
            kind: u32::try_from(kind).unwrap(),
            description: words.collect::<Vec<_>>().join(" "),
        });
    }
    lines
}

/// The dirty extents of a map, joined whether or not they are zeros: `(offset, length)`.
pub fn dirty_extents(map: &[MapLine]) -> Vec<(u64, u64)> {
    let mut found: Vec<(u64, u64)> = Vec::new();
    for line in map.iter().filter(|l| l.kind & 1 == 1) {
        match found.last_mut() {
            Some((start, length)) if *start + *length == line.offset => *length += line.length,
            _ => found.push((line.offset, line.length)),
        }
    }
    found
}

/// Extents as text, for messages.
pub fn show(extents: &[(u64, u64)]) -> String {
    let mut text = String::new();
    for (offset, length) in extents {
        let _ = write!(text, "{offset}+{length} ");
    }
    text
}
