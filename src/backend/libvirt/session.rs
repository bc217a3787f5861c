//! A running backup: libvirt's one job, and reads of what it exports.
//!
//! libvirt exports the scratch overlays themselves, each with one bitmap: the changes since the
//! incremental's checkpoint, merged by libvirt. When a job is ended, libvirt first cancels the copying
//! and then stops the NBD server, and a read in between may see newer data. So an end that is ours
//! closes our connections first. Where somebody else ends the job (virsh domjobabort) nothing can be
//! done about that moment; the backup is then failed, and what was copied is none.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use super::guard::State;
use super::job::{self, Mark, Running};
use super::{Shared, guard};
use crate::backend::names::Names;
use crate::backend::over_nbd::{CONNECTIONS, allocation, error, surely};
use crate::backend::watch::Fate;
use crate::backend::{Frozen, FrozenDisk, Notice, front, rundir, scratch};
use crate::model::{
    Allocation, BackupPlan, Error, Extents, Format, FreezeDisk, Image, JobId, Kind, Mode,
    PublicExport, Result, ServerAddress,
};
use crate::nbd;
use crate::xml::{BackupDocument, BackupDocumentDisk, BackupMode, Place, Server};

/// The bitmap of changes in an export, unless other clients are to have it by another name.
const CHANGES: &str = "fleece-changes";

/// A running backup.
pub(super) struct Session {
    id: JobId,
    /// What tells the job apart from others': the socket it is served on.
    socket: PathBuf,
    /// libvirt's number of the running domain.
    domain: Option<u32>,
    parts: Vec<Part>,
    /// The guest was stopped by an error already when it began, which is no fault of the backup's.
    stopped_before: AtomicBool,
    /// Whether it is over.
    fate: Fate,
    /// The door for NBD clients from outside.
    front: Mutex<Option<nbd::Front>>,
    /// libvirt has nothing of it any more. The lock is held while it is taken apart.
    gone: Mutex<bool>,
}

/// One disk of a backup.
struct Part {
    target: String,
    size: u64,
    /// The bitmap of changes since the base that is exported with it.
    changes: Option<String>,
    scratch: PathBuf,
    /// How other NBD clients find it.
    export: Option<PublicExport>,
}

/// Begins the backup of the plan.
pub(super) fn begin(shared: &Arc<Shared>, plan: &BackupPlan) -> Result<LibvirtFrozen> {
    job::is_free(shared)?;
    let dir = &shared.places.scratch;
    rundir::make_passable(dir).map_err(|e| {
        Error::new(Kind::Io, format!("cannot make {}: {e}", dir.display()))
            .hint("choose another directory with -o scratch=DIR")
    })?;
    let parts = plan.disks.iter().enumerate();
    let parts = parts.map(|(index, disk)| part(shared, plan.id, index, disk));
    let parts = parts.collect::<Result<Vec<_>>>()?;
    let dirs = parts.iter().filter_map(|part| part.scratch.parent());
    dirs.into_iter().try_for_each(scratch::check_room)?;
    let socket = shared.rundir.socket();
    // libvirt removes it at the end of a job, and QEMU would refuse one that is there.
    let _ = std::fs::remove_file(&socket);
    let state = shared.link.call("look at the domain", State::of)?;
    let mark = Mark::Socket(socket.clone());
    let document = document(&socket, plan, &parts);
    let domain = job::begin(shared, &mark, &document, plan.checkpoint.as_ref())?;
    let session = Arc::new(Session {
        id: plan.id,
        socket,
        domain,
        parts,
        stopped_before: AtomicBool::new(state.is_stopped_by_an_error()),
        fate: Fate::default(),
        front: Mutex::default(),
        gone: Mutex::new(false),
    });
    shared.put(Arc::clone(&session) as Arc<dyn Running>);
    match session.open(shared, plan.server.as_ref()) {
        Ok(disks) => Ok(LibvirtFrozen {
            shared: Arc::clone(shared),
            session,
            disks,
        }),
        Err(error) => {
            // Each whatever became of the other: that somebody else ended it is no reason to leave its
            // checkpoint.
            let ended = session.end(shared);
            let undone = job::undo(&shared.link, mark, plan.checkpoint.as_ref());
            for e in [ended, undone].into_iter().filter_map(Result::err) {
                log::error!("undoing a backup that could not begin: {e}");
            }
            Err(error)
        }
    }
}

fn part(shared: &Shared, job: u32, index: usize, disk: &FreezeDisk) -> Result<Part> {
    let name = Names::new(shared.rundir.id(), job, index).file();
    Ok(Part {
        target: disk.target.clone(),
        size: shared.size_of(&disk.target)?,
        changes: disk.base.as_ref().map(|_| {
            let public = disk.export.as_ref().and_then(|e| e.bitmap.as_ref());
            public.map_or_else(|| CHANGES.to_owned(), |(name, _)| name.clone())
        }),
        scratch: match &disk.scratch {
            Some(path) => PathBuf::from(path),
            None => shared.places.scratch.join(name),
        },
        export: disk.export.clone(),
    })
}

/// What virDomainBackupBegin is told. Disks that are not named take no part.
fn document(socket: &std::path::Path, plan: &BackupPlan, parts: &[Part]) -> BackupDocument {
    let disk = |(disk, part): (&FreezeDisk, &Part)| BackupDocumentDisk {
        backup_mode: Some(match disk.base {
            Some(_) => BackupMode::Incremental,
            None => BackupMode::Full,
        }),
        incremental: disk.base.clone(),
        export_name: Some(part.target.clone()),
        export_bitmap: part.changes.clone(),
        image: Some(Image::File(part.scratch.display().to_string())),
        format: Some(Format::Qcow2),
        ..BackupDocumentDisk::new(&part.target)
    };
    BackupDocument {
        mode: Mode::Pull,
        server: Some(Server {
            place: Place::default(),
            address: ServerAddress::Unix(socket.display().to_string()),
        }),
        disks: plan.disks.iter().zip(parts).map(disk).collect(),
        ..BackupDocument::default()
    }
}

impl Session {
    /// Opens the disks, for us and, at `address`, for others.
    fn open(
        self: &Arc<Self>,
        shared: &Shared,
        address: Option<&ServerAddress>,
    ) -> Result<Vec<Box<dyn FrozenDisk>>> {
        let indices = 0..self.parts.len();
        let disks = indices.map(|index| {
            let disk = LibvirtDisk::open(shared, self, index)?;
            Ok(Box::new(disk) as Box<dyn FrozenDisk>)
        });
        let disks = disks.collect::<Result<Vec<_>>>()?;
        if let Some(address) = address {
            let public = self.parts.iter().filter_map(|part| {
                let export = part.export.as_ref()?;
                Some((export.name.clone(), part.target.clone()))
            });
            let upstream = self.socket.clone();
            let front = front::open(address, upstream, public.collect(), &shared.places)?;
            *self.front.lock() = Some(front);
        }
        // The guard may have ended it by now.
        self.fate.failure().map_or(Ok(disks), Err)
    }

    /// From now on every read fails, and other clients are hung up on; whether this made it so.
    fn close(&self, why: Error) -> bool {
        let first = self.fate.fail(why);
        drop(self.front.lock().take());
        first
    }

    /// Bytes that the scratch files take. libvirt makes them, and removes them at the end.
    fn scratch_used(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        let used = |part: &Part| std::fs::metadata(&part.scratch).map_or(0, |m| m.blocks() * 512);
        self.parts.iter().map(used).sum()
    }

    /// Bytes that are free where the scratch files are.
    fn room(&self) -> Option<u64> {
        let dirs = self.parts.iter().filter_map(|part| part.scratch.parent());
        dirs.filter_map(scratch::room).min()
    }
}

impl Running for Session {
    fn id(&self) -> JobId {
        self.id
    }

    fn mark(&self) -> Mark {
        Mark::Socket(self.socket.clone())
    }

    fn domain(&self) -> Option<u32> {
        self.domain
    }

    fn is_over(&self) -> bool {
        self.fate.failure().is_some()
    }

    fn fail(&self, shared: &Shared, why: Error) {
        if self.close(why.clone()) {
            shared.notify(Notice::Over(self.id, Err(why)));
        }
    }

    fn end(&self, shared: &Shared) -> Result<()> {
        let first = self.close(Error::new(Kind::NotConnected, "the backup was ended"));
        let mut gone = self.gone.lock();
        if *gone {
            return Ok(());
        }
        let ended = job::end(&shared.link, self.mark(), self.domain, first)?;
        for part in &self.parts {
            // libvirt did, unless its domain died.
            let _ = std::fs::remove_file(&part.scratch);
        }
        let _ = std::fs::remove_file(&self.socket);
        *gone = true;
        shared.take(self.id);
        drop(gone);
        if ended.is_stopped && !self.stopped_before.load(Ordering::Acquire) {
            shared.resume();
        }
        if !(ended.was_gone && first) {
            return Ok(());
        }
        // Nobody had noticed yet, and what was read last may be newer than the instant.
        let why = Error::new(
            Kind::Io,
            "someone else has aborted libvirt's job (virsh domjobabort) before this end: what was \
             copied is to be thrown away",
        )
        .hint("do it again to remove the backup");
        self.fate.turns_out(why.clone());
        shared.notify(Notice::Over(self.id, Err(why.clone())));
        Err(why)
    }

    /// Ends the backup before the guest has to pay for it. Scratch space that is full stops the guest;
    /// once the backup is ended, its write is made again.
    fn watch(&self, shared: &Shared, state: State) {
        let used = self.scratch_used();
        let limit = shared.places.scratch_limit;
        let room = self.room();
        let most = match (limit, room.map(|room| room.saturating_add(used))) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        if let Some(most) = most.filter(|m| used.saturating_mul(4) >= m.saturating_mul(3))
            && used > 0
            && self.fate.warn_once()
        {
            shared.notify(Notice::ScratchThreshold(self.id, used, most));
        }
        let stopped = state.is_stopped_by_an_error();
        let before = &self.stopped_before;
        before.fetch_and(stopped, Ordering::AcqRel);
        let stopped = stopped && !before.load(Ordering::Acquire);
        let (why, hint) = if let Some(limit) = limit.filter(|limit| used > *limit) {
            (
                format!("the backup took {used} bytes of scratch space, {limit} allowed"),
                "raise -o scratch-limit=",
            )
        } else if room == Some(0) || stopped {
            let why = match stopped {
                true => "a write of the guest failed, as when the scratch space is full",
                false => "the scratch directory is nearly full",
            };
            (
                why.to_owned(),
                "use a larger -o scratch=DIR, or read faster",
            )
        } else {
            return;
        };
        let why = format!("{why}; the backup was ended so that the guest can go on");
        log::error!("{why} ({hint})");
        self.fail(shared, Error::new(Kind::NoSpace, why).hint(hint));
        if let Err(e) = self.end(shared) {
            log::error!("ending it: {e}");
        }
    }

    fn vanished(self: Arc<Self>, shared: &Arc<Shared>) {
        let why = "libvirt's job is gone: it was aborted by someone else (virsh domjobabort), or \
                   failed";
        self.fail(shared, guard::gone(why));
        if let Err(e) = self.end(shared) {
            log::debug!("ending a backup that is over: {e}");
        }
    }
}

pub(super) struct LibvirtFrozen {
    shared: Arc<Shared>,
    session: Arc<Session>,
    disks: Vec<Box<dyn FrozenDisk>>,
}

impl Frozen for LibvirtFrozen {
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
struct LibvirtDisk {
    session: Arc<Session>,
    index: usize,
    endpoint: nbd::Endpoint,
    pool: Arc<nbd::Pool>,
    timeout: Duration,
}

impl LibvirtDisk {
    /// Connects to the export, which must be as large as the disk.
    fn open(shared: &Shared, session: &Arc<Session>, index: usize) -> Result<Self> {
        let part = &session.parts[index];
        let during = |e: Error| e.during(format!("disk {}", part.target));
        let endpoint = nbd::Endpoint {
            socket: session.socket.clone(),
            export: part.target.clone(),
        };
        let timeout = shared.places.timeout;
        let size = nbd::Connection::open(&endpoint, timeout)
            .map_err(|e| during(error(e)))?
            .size();
        if size != part.size {
            let what = format!("the export has {size} bytes, the disk {}", part.size);
            return Err(during(Error::new(Kind::Io, what)));
        }
        let pool = Arc::new(nbd::Pool::new(endpoint.clone(), CONNECTIONS, timeout));
        session.fate.closes(&pool);
        Ok(Self {
            session: Arc::clone(session),
            index,
            endpoint,
            pool,
            timeout,
        })
    }

    /// The reason why the backup is over, if it is; that says more than a connection that broke.
    fn explain(&self, error: Error) -> Error {
        self.session.fate.failure().unwrap_or(error)
    }

    fn status(&self, context: &str, part: Range<u64>) -> Result<Extents<u32>> {
        if let Some(why) = self.session.fate.failure() {
            return Err(why);
        }
        let mut maps = nbd::block_status(&self.endpoint, &[context], part, self.timeout)
            .map_err(|e| self.explain(error(e)))?;
        maps.pop()
            .ok_or_else(|| Error::new(Kind::Io, format!("no map {context} came")))
    }
}

impl FrozenDisk for LibvirtDisk {
    fn size(&self) -> u64 {
        self.session.parts[self.index].size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let read = self.pool.read_at(offset, buf);
        read.map_err(|e| self.explain(error(e)))?;
        // A job that was ended meanwhile may have let newer data through.
        self.session.fate.failure().map_or(Ok(()), Err)
    }

    fn allocation(&self, part: Range<u64>) -> Result<Extents<Allocation>> {
        let ask = || {
            let map = self.status(nbd::BASE_ALLOCATION, part.clone())?;
            Ok(map.map(allocation))
        };
        let first = ask()?;
        Ok(first.zip(&ask()?, surely))
    }

    /// libvirt has merged what changed since the base, and nothing else is to be had.
    fn changed(&self, bitmaps: &[String]) -> Result<Extents<bool>> {
        let part = &self.session.parts[self.index];
        let Some(changes) = part.changes.as_ref().filter(|_| bitmaps.is_empty()) else {
            return Err(Error::new(
                Kind::Stale,
                "libvirt lists what changed since the backup's base and nothing else",
            ));
        };
        let map = self.status(&nbd::dirty_bitmap_context(changes), 0..part.size)?;
        Ok(map.map(|flags| flags & nbd::STATE_DIRTY != 0))
    }

    fn bytes_pulled(&self) -> u64 {
        self.pool.bytes_read()
    }
}
