//! What each part of a frozen disk is, data or zeros: asked of the domain once, and no more than is
//! needed.
//!
//! To tell, QEMU reads the tables of the image, and a disk of 16 TiB in 10 000 pieces has 10 000 of
//! them: that takes seconds. Whoever lists or seeks wants the whole map. Whoever reads wants to know of
//! the surroundings, and on a large disk gets those first:
//!
//! ```text
//!   disk     |----------------|----------------|----------------|-------|
//!                                  ^ a read
//!   asked                     |----------------|                            64 GiB
//! ```
//!
//! And whoever only looks at the file's attributes does not wait for long: the answer is made meanwhile.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crossbeam_channel::bounded;
use parking_lot::Mutex;

use super::once::Once;
use crate::model::{Allocation, Error, Extents, Kind, Result};

/// Bytes that are asked about at once for a read.
const PIECE: u64 = 64 << 30;

type Map = Extents<Allocation>;

/// How long a look at attributes waits for the whole map.
const PATIENCE: Duration = Duration::from_millis(500);

/// The map of one disk.
pub(super) struct DiskMap {
    size: u64,
    piece: u64,
    /// Somebody makes the whole map for those who do not wait.
    making: Arc<AtomicBool>,
    whole: Once<Map>,
    /// By where they begin.
    pieces: Mutex<HashMap<u64, Arc<Once<Map>>>>,
}

/// A piece of a map.
pub(super) struct Piece {
    /// Where it begins on the disk; its extents count from there.
    pub(super) start: u64,
    pub(super) map: Arc<Map>,
}

impl Piece {
    pub(super) fn end(&self) -> u64 {
        self.start + self.map.size()
    }
}

impl DiskMap {
    pub(super) fn new(size: u64) -> Self {
        Self::in_pieces(size, PIECE)
    }

    fn in_pieces(size: u64, piece: u64) -> Self {
        Self {
            size,
            piece,
            making: Arc::default(),
            whole: Once::new(),
            pieces: Mutex::default(),
        }
    }

    /// All of it; `ask` tells of a range, in extents that count from its beginning.
    pub(super) fn whole(&self, ask: impl FnOnce(Range<u64>) -> Result<Map>) -> Result<Arc<Map>> {
        self.whole.get(|| ask(0..self.size))
    }

    /// All of it, if that was asked. Never waits.
    pub(super) fn known(&self) -> Option<Arc<Map>> {
        self.whole.known()
    }

    /// Whether a range lies within what is asked about at once for a read.
    pub(super) fn is_in_one_piece(&self, offset: u64, length: u64) -> bool {
        self.size <= self.piece
            || length == 0
            || self.start_of(offset) == self.start_of(offset + length - 1)
    }

    /// All of it if that takes no time worth mentioning; otherwise `make`, which makes it, goes on in a
    /// thread of its own, and there is nothing yet.
    pub(super) fn soon(
        &self,
        make: impl FnOnce() -> Result<Arc<Map>> + Send + 'static,
    ) -> Result<Option<Arc<Map>>> {
        if let Some(map) = self.known() {
            return Ok(Some(map));
        }
        if self.making.swap(true, Ordering::AcqRel) {
            return Ok(None);
        }
        let (tell, told) = bounded(1);
        let making = Arc::clone(&self.making);
        let thread = std::thread::Builder::new().name("map".to_owned());
        let spawned = thread.spawn(move || {
            let made = make();
            making.store(false, Ordering::Release);
            // Nobody may wait any more.
            let _ = tell.send(made);
        });
        if let Err(e) = spawned {
            self.making.store(false, Ordering::Release);
            return Err(Error::new(
                Kind::Io,
                format!("no thread to make a map: {e}"),
            ));
        }
        match told.recv_timeout(PATIENCE) {
            Ok(made) => made.map(Some),
            Err(_) => Ok(None),
        }
    }

    /// What surrounds `offset`, which lies on the disk.
    pub(super) fn around(
        &self,
        offset: u64,
        ask: impl FnOnce(Range<u64>) -> Result<Map>,
    ) -> Result<Piece> {
        if let Some(known) = self.known_around(offset) {
            return Ok(known);
        }
        if self.size <= self.piece {
            let map = self.whole(ask)?;
            return Ok(Piece { start: 0, map });
        }
        let start = self.start_of(offset);
        let cell = Arc::clone(
            self.pieces
                .lock()
                .entry(start)
                .or_insert_with(|| Arc::new(Once::new())),
        );
        let map = cell.get(|| ask(start..self.size.min(start + self.piece)))?;
        Ok(Piece { start, map })
    }

    /// The same, if that was asked. Never waits.
    pub(super) fn known_around(&self, offset: u64) -> Option<Piece> {
        if let Some(map) = self.known() {
            return Some(Piece { start: 0, map });
        }
        if self.size <= self.piece {
            return None;
        }
        let start = self.start_of(offset);
        let cell = self.pieces.lock().get(&start).cloned();
        let map = cell?.known()?;
        Some(Piece { start, map })
    }

    fn start_of(&self, offset: u64) -> u64 {
        offset - offset % self.piece
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    fn data(range: &Range<u64>) -> Map {
        Extents::uniform(range.end - range.start, Allocation::DATA)
    }

    #[test]
    fn a_large_disk_is_asked_about_piece_by_piece_and_each_once() {
        let map = DiskMap::in_pieces(25, 10);
        let asked = RefCell::new(Vec::new());
        let ask = |range: Range<u64>| {
            asked.borrow_mut().push(range.clone());
            Ok(data(&range))
        };
        assert!(map.known_around(3).is_none());
        for (offset, start, end) in [(3, 0, 10), (9, 0, 10), (24, 20, 25), (20, 20, 25)] {
            let piece = map.around(offset, ask).unwrap();
            assert_eq!((piece.start, piece.end()), (start, end));
            assert_eq!(map.known_around(offset).unwrap().start, start);
        }
        assert!(map.known_around(10).is_none() && map.known().is_none());
        map.whole(ask).unwrap();
        // From now on nothing more is asked.
        let all = map.around(12, ask).unwrap();
        assert_eq!((all.start, all.end()), (0, 25));
        assert_eq!(*asked.borrow(), [0..10, 20..25, 0..25]);
    }

    #[test]
    fn a_look_does_not_wait_for_long_and_the_map_is_made_all_the_same() {
        let map = Arc::new(DiskMap::in_pieces(25, 10));
        assert!(map.is_in_one_piece(10, 10) && !map.is_in_one_piece(9, 2));
        let (go, gone) = bounded::<()>(0);
        let look = || {
            let maker = Arc::clone(&map);
            let gone = gone.clone();
            let make = move || {
                // An error once the other end is closed.
                let _ = gone.recv();
                maker.whole(|range| Ok(data(&range)))
            };
            map.soon(make).unwrap()
        };
        assert!(look().is_none());
        assert!(look().is_none(), "one makes it");
        go.send(()).unwrap();
        while map.known().is_none() {
            std::thread::yield_now();
        }
        assert_eq!(look().unwrap().size(), 25);
    }

    #[test]
    fn a_small_one_is_asked_about_as_a_whole() {
        let map = DiskMap::in_pieces(10, 10);
        map.around(3, |range| Ok(data(&range))).unwrap();
        assert_eq!(map.known().unwrap().size(), 10);
    }
}
