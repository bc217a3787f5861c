//! A running backup as the engine sees it: reads and maps over NBD.

use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;
use serde_json::json;

use super::Shared;
use super::freeze::{Part, Session, endpoint};
use super::quirks::{self, Access};
use crate::backend::names::{TAIL, UNION};
use crate::backend::over_nbd::{CONNECTIONS, allocation, error, surely};
use crate::backend::{Frozen, FrozenDisk};
use crate::model::{Allocation, Error, Extents, Kind, Result};
use crate::nbd;

pub(super) struct QemuFrozen {
    shared: Arc<Shared>,
    session: Arc<Session>,
    disks: Vec<Box<dyn FrozenDisk>>,
}

impl QemuFrozen {
    pub(super) fn new(
        shared: Arc<Shared>,
        session: Arc<Session>,
        disks: Vec<Box<dyn FrozenDisk>>,
    ) -> Self {
        Self {
            shared,
            session,
            disks,
        }
    }
}

impl Frozen for QemuFrozen {
    fn disks(&self) -> &[Box<dyn FrozenDisk>] {
        &self.disks
    }

    fn failure(&self) -> Option<Error> {
        self.session.fate.failure()
    }

    fn scratch_used(&self) -> u64 {
        self.session.scratch_used()
    }

    fn scratch_limit(&self) -> Option<u64> {
        self.shared.places.scratch_limit
    }

    fn end(&self) -> Result<()> {
        self.session.end(&self.shared)
    }
}

/// One frozen disk.
pub(super) struct QemuDisk {
    shared: Arc<Shared>,
    session: Arc<Session>,
    index: usize,
    pool: Arc<nbd::Pool>,
    access: Access,
    /// One union is made at a time: its bitmap has one name.
    union: Mutex<()>,
    /// One passing export is there at a time: it has one name.
    exporting: Mutex<()>,
}

impl QemuDisk {
    /// Connects to the export, which must be as large as the disk.
    pub(super) fn open(shared: &Arc<Shared>, session: &Arc<Session>, index: usize) -> Result<Self> {
        let part = &session.parts[index];
        let endpoint = endpoint(shared, &part.names.export());
        let timeout = shared.places.timeout;
        let size = nbd::Connection::open(&endpoint, timeout)
            .map_err(|e| error(e).during(format!("disk {}", part.target)))?
            .size();
        if size != part.live.disk.size {
            return Err(Error::new(
                Kind::Io,
                format!(
                    "disk {}: the export has {size} bytes, the disk {}",
                    part.target, part.live.disk.size
                ),
            ));
        }
        let pool = Arc::new(nbd::Pool::new(endpoint, CONNECTIONS, timeout));
        session.fate.closes(&pool);
        Ok(Self {
            shared: Arc::clone(shared),
            session: Arc::clone(session),
            index,
            pool,
            access: Access::of(shared.link.monitor()?.client().version()),
            union: Mutex::new(()),
            exporting: Mutex::new(()),
        })
    }

    fn part(&self) -> &Part {
        &self.session.parts[self.index]
    }

    /// The reason why the backup is over, if it is; that says more than a connection that broke.
    fn explain(&self, error: Error) -> Error {
        self.session.fate.failure().unwrap_or(error)
    }

    /// Exports a node while `work` uses it.
    fn with_export<T>(
        &self,
        node: &str,
        bitmaps: &[(&str, &str)],
        work: impl FnOnce(&str) -> Result<T>,
    ) -> Result<T> {
        let _one = self.exporting.lock();
        let monitor = self.shared.link.monitor()?;
        let export = self.part().names.map_export();
        self.session
            .unless_over(|| monitor.export_add(&export, node, &export, bitmaps))?;
        let outcome = work(&export);
        let removed = monitor.export_del(&export);
        let value = outcome?;
        removed.map_err(|e| self.explain(e))?;
        Ok(value)
    }

    fn status(&self, export: &str, context: &str, part: Range<u64>) -> Result<Extents<u32>> {
        let endpoint = endpoint(&self.shared, export);
        let timeout = self.shared.places.timeout;
        let ask = || nbd::block_status(&endpoint, &[context], part, timeout).map_err(error);
        let mut maps = self.shared.in_traffic(ask).map_err(|e| self.explain(e))?;
        maps.pop()
            .ok_or_else(|| Error::new(Kind::Io, format!("no map {context} came")))
    }
}

impl FrozenDisk for QemuDisk {
    fn size(&self) -> u64 {
        self.part().live.disk.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let read = |at, piece: &mut [u8]| {
            let answer = self
                .shared
                .in_traffic(|| self.pool.read_at(at, piece).map_err(error));
            answer.map_err(|e| self.explain(e))
        };
        match self.access {
            Access::Sound => read(offset, buf),
            Access::Clusterwise => {
                let mut rest = buf;
                quirks::clusters(offset, rest.len() as u64).try_for_each(|(at, length)| {
                    let (piece, tail) = std::mem::take(&mut rest).split_at_mut(length);
                    rest = tail;
                    read(at, piece)
                })
            }
        }
    }

    fn allocation(&self, part: Range<u64>) -> Result<Extents<Allocation>> {
        let names = &self.part().names;
        let ask = |export: &str| {
            let map = self.status(export, nbd::BASE_ALLOCATION, part.clone())?;
            Ok(map.map(allocation))
        };
        match self.access {
            Access::Sound => ask(&names.export()),
            Access::Clusterwise => self.with_export(&names.overlay(), &[], |export| {
                let first = ask(export)?;
                Ok(first.zip(&ask(export)?, surely))
            }),
        }
    }

    fn changed(&self, bitmaps: &[String]) -> Result<Extents<bool>> {
        let _one = self.union.lock();
        let part = self.part();
        let Some((_, granularity)) = &part.recorded else {
            return Err(Error::new(
                Kind::Stale,
                "no bitmap was recording when the backup began",
            ));
        };
        let monitor = self.shared.link.monitor()?;
        let overlay = part.names.overlay();
        let mut sources: Vec<_> = bitmaps
            .iter()
            .flat_map(|name| part.live.sources(name))
            .collect();
        sources.push(json!({"node": overlay, "name": TAIL}));
        // An export only shows a bitmap that nobody else uses, so the union is one of its own.
        let made = monitor
            .bitmap_add(&overlay, UNION, *granularity)
            .and_then(|()| monitor.bitmap_merge(&overlay, UNION, sources))
            .and_then(|()| {
                let bitmap = [(overlay.as_str(), UNION)];
                self.with_export(&part.names.access(), &bitmap, |export| {
                    self.status(
                        export,
                        &nbd::dirty_bitmap_context(UNION),
                        0..part.live.disk.size,
                    )
                })
            });
        let removed = monitor.bitmap_remove(&overlay, UNION);
        let map = made.map_err(|e| self.explain(e))?;
        removed.map_err(|e| self.explain(e))?;
        Ok(map.map(|flags| flags & nbd::STATE_DIRTY != 0))
    }

    fn bytes_pulled(&self) -> u64 {
        self.pool.bytes_read()
    }
}
