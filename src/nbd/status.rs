//! Block status: what an export's bytes are, without reading them, in one or more metadata
//! contexts at once.
//!
//! A request covers less than 4 GiB and a server may answer for less than was asked, so the map of
//! a disk is a walk. Contexts may be answered for different lengths; each map simply keeps what it
//! was told, and the walk goes on from the end of the shortest:
//!
//! ```text
//!   asked      |----------------------|
//!   context 0  |..data..|..hole..|              shortest: the next request begins at its end
//!   context 1  |.........dirty............|     may exceed what was asked, in its last extent
//! ```
//!
//! A connection of its own serves each walk: it needs structured replies, which data connections
//! do better without, and it is over in milliseconds.

use std::ops::Range;
use std::time::Duration;

use super::socket::{Deadline, Socket};
use super::{Endpoint, Error, Fault, Operation, handshake, wire};
use crate::model::Extents;

/// Asked for at once: the largest 32-bit length that is a multiple of 64 KiB, the largest minimum
/// block size that a server may have ("Block size constraints").
const MAX_LENGTH: u64 = (1 << 32) - (1 << 16);

/// The longest chunk that is read: 2 Mi extents. QEMU sends at most 128 Ki in one.
const MAX_CHUNK: u32 = 16 << 20;

/// A map with more extents than this (1 GiB of memory) is not a disk but an attack.
const MAX_EXTENTS: usize = 1 << 26;

/// The status flags of a part of the export, one map for each of `contexts` in their order, such as
/// [`BASE_ALLOCATION`](super::BASE_ALLOCATION); a map counts from the beginning of the part. `timeout`
/// bounds the handshake and each request;
/// a server that does not have one of the contexts is a [`Fault::Refused`].
pub fn block_status(
    endpoint: &Endpoint,
    contexts: &[&str],
    part: Range<u64>,
    timeout: Duration,
) -> Result<Vec<Extents<u32>>, Error> {
    let deadline = Deadline::after(timeout);
    let mut socket = Socket::connect(&endpoint.socket, deadline, || true)
        .map_err(|fault| fault.at(&endpoint.export, Operation::Connect))?;
    let granted = handshake::negotiate(&mut socket, &endpoint.export, contexts, deadline)
        .map_err(|fault| fault.at(&endpoint.export, Operation::Handshake))?;

    let mut walk = Walk {
        socket,
        start: part.start,
        end: part.end.min(granted.size),
        maps: vec![Extents::new(); contexts.len()],
        ids: granted.contexts,
        cookie: 0,
        payload: Vec::new(),
    };
    while let Some(offset) = walk.position() {
        walk.step(offset, Deadline::after(timeout))
            .map_err(|fault| fault.at(&endpoint.export, Operation::BlockStatus { offset }))?;
    }
    let goodbye = wire::request(wire::CMD_DISC, walk.cookie + 1, 0, 0);
    walk.socket.try_send(&goodbye);
    Ok(walk.maps)
}

struct Walk {
    socket: Socket,
    /// Of the part, on the export.
    start: u64,
    end: u64,
    /// Context ids, and for each the map so far.
    ids: Vec<u32>,
    maps: Vec<Extents<u32>>,
    cookie: u64,
    /// Of the chunk at hand; kept for its memory.
    payload: Vec<u8>,
}

impl Walk {
    /// Where on the export the shortest map ends, or none if all are complete.
    fn position(&self) -> Option<u64> {
        let shortest = self.start + self.maps.iter().map(Extents::size).min()?;
        (shortest < self.end).then_some(shortest)
    }

    /// One request and all chunks of its reply. Each map then ends after `offset`.
    fn step(&mut self, offset: u64, deadline: Deadline) -> Result<(), Fault> {
        self.cookie += 1;
        let length = (self.end - offset).min(MAX_LENGTH);
        let request = wire::request(
            wire::CMD_BLOCK_STATUS,
            self.cookie,
            offset,
            length as u32, // at most MAX_LENGTH
        );
        self.socket.send(&request, deadline)?;

        let mut answered = vec![false; self.ids.len()];
        let mut error = None;
        loop {
            let (kind, done) = self.chunk(deadline)?;
            match kind {
                wire::CHUNK_NONE if done && self.payload.is_empty() => {}
                wire::CHUNK_BLOCK_STATUS => {
                    let mut at = wire::Cursor(&self.payload);
                    let id = at.u32()?;
                    let context = self.ids.iter().position(|&known| known == id);
                    let slot =
                        context.and_then(|i| Some((self.maps.get_mut(i)?, answered.get_mut(i)?)));
                    match slot {
                        Some((map, seen)) if !*seen => {
                            append(map, offset..offset + length, self.start..self.end, at.0)?;
                            *seen = true;
                        }
                        Some(_) => return Err(Fault::protocol(format!("context {id} twice"))),
                        None => return Err(Fault::protocol(format!("unknown context {id}"))),
                    }
                }
                kind if kind & wire::CHUNK_ERROR != 0 => {
                    error.get_or_insert(wire::error_chunk(&self.payload)?);
                }
                other => return Err(Fault::protocol(format!("an odd chunk of type {other}"))),
            }
            if done {
                break;
            }
        }
        match error {
            Some(error) => Err(error),
            None if answered.contains(&false) => Err(Fault::protocol("a context without status")),
            None => Ok(()),
        }
    }

    /// Receives a chunk into `payload`: its type, and whether it is the reply's last.
    fn chunk(&mut self, deadline: Deadline) -> Result<(u16, bool), Fault> {
        let mut header = [0; wire::REPLY_LENGTH];
        self.socket.receive(&mut header, deadline)?;
        match wire::reply(&header, self.cookie)? {
            wire::Reply::Chunk { kind, done } => {
                let mut length = [0; 4];
                self.socket.receive(&mut length, deadline)?;
                let length = u32::from_be_bytes(length);
                if length > MAX_CHUNK {
                    return Err(Fault::protocol(format!("a chunk of {length} bytes")));
                }
                self.payload.resize(length as usize, 0);
                self.socket.receive(&mut self.payload, deadline)?;
                Ok((kind, done))
            }
            // "Structured reply chunk message" leaves servers free to fail in the simple form.
            wire::Reply::Simple { errno } if errno != 0 => Err(Fault::Server {
                errno,
                message: String::new(),
            }),
            wire::Reply::Simple { .. } => Err(Fault::protocol("block status in a simple reply")),
        }
    }
}

/// Adds one context's answer for `asked` to its map of `part`, which may know the beginning already.
/// `descriptors` are pairs of a 32-bit length and flags ("NBD_REPLY_TYPE_BLOCK_STATUS").
fn append(
    map: &mut Extents<u32>,
    asked: Range<u64>,
    part: Range<u64>,
    descriptors: &[u8],
) -> Result<(), Fault> {
    if descriptors.is_empty() || !descriptors.len().is_multiple_of(8) {
        let length = descriptors.len();
        return Err(Fault::protocol(format!("{length} bytes of extents")));
    }
    let mut at = wire::Cursor(descriptors);
    let mut end = asked.start;
    while !at.0.is_empty() {
        if end >= asked.end {
            return Err(Fault::protocol("an extent past what was asked"));
        }
        let (length, flags) = (at.u32()?, at.u32()?);
        if length == 0 {
            return Err(Fault::protocol("an extent of no bytes"));
        }
        end += u64::from(length);
        let known = part.start + map.size();
        map.push(end.min(part.end).saturating_sub(known), flags);
    }
    if map.count() > MAX_EXTENTS {
        return Err(Fault::protocol("too many extents"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn descriptors(extents: &[(u32, u32)]) -> Vec<u8> {
        extents
            .iter()
            .flat_map(|(length, flags)| [length.to_be_bytes(), flags.to_be_bytes()])
            .flatten()
            .collect()
    }

    fn flags_of(map: &Extents<u32>) -> Vec<u32> {
        map.iter()
            .flat_map(|e| std::iter::repeat_n(e.kind, e.length as usize))
            .collect()
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let bad: [&[(u32, u32)]; 4] = [&[], &[(0, 1)], &[(5, 1), (0, 1)], &[(10, 1), (1, 0)]];
        for extents in bad {
            let result = append(&mut Extents::new(), 0..10, 0..100, &descriptors(extents));
            assert!(matches!(result, Err(Fault::Protocol(_))), "{extents:?}");
        }
        for bytes in 1..8 {
            let result = append(&mut Extents::new(), 0..10, 0..100, &vec![1; bytes]);
            assert!(matches!(result, Err(Fault::Protocol(_))), "{bytes}");
        }
    }

    #[test]
    fn the_last_extent_may_exceed_what_was_asked_but_not_the_disk() {
        let mut map = Extents::new();
        append(&mut map, 0..10, 0..100, &descriptors(&[(4, 1), (50, 2)])).unwrap();
        assert_eq!(map.size(), 54);
        append(&mut map, 54..64, 0..100, &descriptors(&[(u32::MAX, 3)])).unwrap();
        assert_eq!((map.size(), map.count()), (100, 3));
    }

    proptest! {
        /// A server that answers for random lengths, cut at random places: the map says of every
        /// byte of a part what the server holds there, however the answers overlap.
        #[test]
        fn answers_add_up(
            disk in proptest::collection::vec(0u32..3, 1..60),
            asked in 1u64..40,
            (start, length) in (0u64..60, 1u64..60),
            cuts in proptest::collection::vec((1usize..30, 0u64..8), 1..20),
        ) {
            let size = disk.len() as u64;
            let start = start.min(size - 1);
            let part = start..size.min(start + length);
            let mut map = Extents::new();
            let mut turns = cuts.iter().cycle();
            let mut turn = 0;
            while start + map.size() < part.end {
                let &(cover, back) = turns.next().unwrap();
                // Another context may have been answered for less; but some turns make progress.
                turn += 1;
                let back = if turn % 2 == 0 { back } else { 0 };
                let from = start + map.size().saturating_sub(back);
                let to = (from + asked).min(part.end);
                // The lengths of what it answers: single bytes up to `cover`, and beyond the end
                // of the request only within the last extent.
                let mut answer: Vec<(u32, u32)> = Vec::new();
                for (i, &flags) in disk.iter().enumerate().skip(from as usize).take(cover) {
                    match answer.last_mut() {
                        Some(last) if last.1 == flags && cover % 3 > 0 => last.0 += 1,
                        _ if i as u64 >= to => break,
                        _ => answer.push((1, flags)),
                    }
                }
                append(&mut map, from..to, part.clone(), &descriptors(&answer)).unwrap();
                let known = start as usize..(start + map.size()) as usize;
                prop_assert_eq!(&flags_of(&map)[..], &disk[known]);
            }
        }

        #[test]
        fn no_descriptors_make_it_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..64),
            known in 0u64..20,
        ) {
            let mut map = Extents::uniform(known, 0);
            let _ = append(&mut map, known.min(7)..1 << 32, 0..1 << 40, &bytes);
            prop_assert!(map.size() >= known && map.size() <= 1 << 40);
        }
    }
}
