//! A running backup: libvirt's one job, and reads of what it exports.
//!
//! libvirt exports the scratch overlays themselves, each with one bitmap: the changes since the
//! incremental's checkpoint, merged by libvirt. When a job is ended, libvirt first cancels the copying
//! and then stops the NBD server, and a read in between may see newer data. So an end that is ours
//! closes our connections first. Where somebody else ends the job (virsh domjobabort) nothing can be
//! done about that moment; the backup is then failed, and what was copied is none.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use virt_sys as sys;

use super::Shared;
use super::ffi::{self, Domain};
use super::link::Link;
use crate::backend::names::Names;
use crate::backend::over_nbd::{CONNECTIONS, allocation, error, surely};
use crate::backend::watch::Fate;
use crate::backend::{Frozen, FrozenDisk, rundir, scratch};
use crate::model::{
    Allocation, BackupPlan, Error, Extents, Format, FreezeDisk, Image, JobId, Kind, Mode, Result,
    ServerAddress,
};
use crate::nbd;
use crate::xml::{BackupDocument, BackupDocumentDisk, BackupMode, LiveBackup, Place, Server};

/// The bitmap of changes in an export.
const CHANGES: &str = "fleece-changes";

/// How often it is looked whether a job that was aborted is gone.
const POLL: Duration = Duration::from_millis(20);

/// A running backup.
pub(super) struct Session {
    pub(super) id: JobId,
    /// What tells the job apart from others': the socket it is served on.
    socket: PathBuf,
    /// libvirt's number of the running domain.
    domain: Option<u32>,
    parts: Vec<Part>,
    /// Whether it is over.
    pub(super) fate: Fate,
    /// libvirt has nothing of it any more. The lock is held while it is taken apart.
    gone: Mutex<bool>,
}

/// One disk of a backup.
struct Part {
    target: String,
    size: u64,
    /// Changes since the base are exported with it.
    changes: bool,
    scratch: PathBuf,
}

/// Begins the backup of the plan.
pub(super) fn begin(shared: &Arc<Shared>, plan: &BackupPlan) -> Result<LibvirtFrozen> {
    if plan.server.is_some() {
        return Err(Error::new(
            Kind::Unsupported,
            "a backup of a libvirt domain has no NBD server for others",
        )
        .hint("leave <server> out and read the files, or use virsh backup-begin"));
    }
    shared.is_free()?;
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
    let xml = document(&socket, plan, &parts).write();
    let checkpoint = plan
        .checkpoint
        .as_ref()
        .map(|new| shared.checkpoint_xml(new));
    let quiesce = shared.places.quiesce;
    let name = plan.checkpoint.as_ref().map(|c| c.name.to_string());
    let undo = {
        let (socket, name) = (socket.clone(), name.clone());
        move |domain: &Domain, _| undo(domain, &socket, name.as_deref())
    };
    let domain = shared.link.call_or_undo(
        "begin a backup",
        move |domain| {
            let begin = || domain.begin_backup(&xml, checkpoint.as_deref());
            match quiesce {
                true => quiesced(domain, begin),
                false => begin(),
            }?;
            Ok(domain.id())
        },
        undo,
    )?;
    let session = Arc::new(Session {
        id: plan.id,
        socket,
        domain,
        parts,
        fate: Fate::default(),
        gone: Mutex::new(false),
    });
    *shared.session.lock() = Some(Arc::clone(&session));
    let opened = (0..session.parts.len()).map(|index| {
        let disk = LibvirtDisk::open(shared, &session, index)?;
        Ok(Box::new(disk) as Box<dyn FrozenDisk>)
    });
    match opened.collect::<Result<Vec<_>>>() {
        Ok(disks) => Ok(LibvirtFrozen {
            shared: Arc::clone(shared),
            session,
            disks,
        }),
        Err(error) => {
            let ended = session.end(shared);
            let undone = ended.and_then(|()| match name {
                None => Ok(()),
                Some(name) => shared.link.call("undo a checkpoint", move |domain| {
                    domain.checkpoint(&name)?.delete(0)
                }),
            });
            if let Err(e) = undone {
                log::error!("undoing a backup that could not begin: {e}");
            }
            Err(error)
        }
    }
}

/// Does `work` while the guest's file systems are frozen. They are thawed whatever comes of it, in
/// the same thread: also when nobody waits any more.
fn quiesced<T>(domain: &Domain, work: impl FnOnce() -> ffi::Result<T>) -> ffi::Result<T> {
    let frozen = domain.freeze().map_err(|fault| {
        let message = format!("freeze the guest's file systems: {}", fault.message);
        ffi::Fault::new(fault.code, message)
    });
    let outcome = frozen.and_then(|()| work());
    // Also after a freeze that failed: part of them may be frozen.
    if let Err(fault) = domain.thaw()
        && outcome.is_ok()
    {
        log::error!(
            "the guest's file systems could not be thawed: {}",
            fault.message
        );
    }
    outcome
}

/// After a begin that came too late for whoever waited for it.
fn undo(domain: &Domain, socket: &std::path::Path, checkpoint: Option<&str>) {
    let gone = abort(domain, socket, Instant::now() + Duration::from_secs(10));
    let deleted = gone.and_then(|_| match checkpoint {
        Some(name) => domain.checkpoint(name)?.delete(0),
        None => Ok(()),
    });
    if let Err(fault) = deleted {
        log::error!("undoing a late backup: {}", fault.message);
    }
}

fn part(shared: &Shared, job: u32, index: usize, disk: &FreezeDisk) -> Result<Part> {
    let name = Names::new(shared.rundir.id(), job, index).file();
    Ok(Part {
        target: disk.target.clone(),
        size: shared.size_of(&disk.target)?,
        changes: disk.base.is_some(),
        scratch: match &disk.scratch {
            Some(path) => PathBuf::from(path),
            None => shared.places.scratch.join(name),
        },
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
        export_bitmap: disk.base.as_ref().map(|_| CHANGES.to_owned()),
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

/// Whether the backup that runs, if one does, is the one on this socket.
pub(super) fn is_ours(domain: &Domain, socket: &std::path::Path) -> ffi::Result<bool> {
    Ok(match running(domain)? {
        Some(backup) => backup.socket.as_deref() == socket.to_str(),
        None => false,
    })
}

/// The backup that runs.
pub(super) fn running(domain: &Domain) -> ffi::Result<Option<LiveBackup>> {
    if !domain.is_active()? {
        return Ok(None);
    }
    match domain.backup_xml() {
        Ok(xml) => Ok(LiveBackup::read(xml.as_bytes()).ok()),
        Err(fault) if fault.code == sys::VIR_ERR_NO_DOMAIN_BACKUP => Ok(None),
        Err(fault) => Err(fault),
    }
}

/// Ends the backup on this socket and waits until libvirt has nothing of it; whether there was one.
pub(super) fn abort(
    domain: &Domain,
    socket: &std::path::Path,
    deadline: Instant,
) -> ffi::Result<bool> {
    if !is_ours(domain, socket)? {
        return Ok(false);
    }
    if let Err(fault) = domain.abort_job() {
        // It may have ended in between.
        return match is_ours(domain, socket)? {
            true => Err(fault),
            false => Ok(true),
        };
    }
    while is_ours(domain, socket)? {
        if Instant::now() >= deadline {
            return Err(ffi::Fault::new(
                sys::VIR_ERR_OPERATION_TIMEOUT,
                "the job was aborted, and is still there",
            ));
        }
        std::thread::sleep(POLL);
    }
    Ok(true)
}

impl Session {
    pub(super) fn socket(&self) -> &std::path::Path {
        &self.socket
    }

    /// Whether this is still the run of the domain in which it was begun.
    pub(super) fn is_of(&self, domain: Option<u32>) -> bool {
        self.domain == domain
    }

    /// Bytes that the scratch files take. libvirt makes them, and removes them at the end.
    pub(super) fn scratch_used(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        let used = |part: &Part| std::fs::metadata(&part.scratch).map_or(0, |m| m.blocks() * 512);
        self.parts.iter().map(used).sum()
    }

    /// Bytes that are free where the scratch files are.
    pub(super) fn room(&self) -> Option<u64> {
        let dirs = self.parts.iter().filter_map(|part| part.scratch.parent());
        dirs.filter_map(scratch::room).min()
    }

    /// Ends libvirt's job; nothing is left to do after it succeeded once.
    pub(super) fn end(&self, shared: &Shared) -> Result<()> {
        self.fate
            .fail(Error::new(Kind::NotConnected, "the backup was ended"));
        let mut gone = self.gone.lock();
        if *gone {
            return Ok(());
        }
        let ended = end_on(&shared.link, self.socket.clone());
        if !(ended.is_err() && shared.link.is_undefined()) {
            ended?;
        }
        for part in &self.parts {
            // libvirt did, unless its domain died.
            let _ = std::fs::remove_file(&part.scratch);
        }
        let _ = std::fs::remove_file(&self.socket);
        *gone = true;
        let mut slot = shared.session.lock();
        if slot.as_ref().is_some_and(|s| std::ptr::eq(&**s, self)) {
            *slot = None;
        }
        Ok(())
    }
}

/// Ends the backup on a socket.
pub(super) fn end_on(link: &Link, socket: PathBuf) -> Result<()> {
    let deadline = Instant::now() + link.timeout();
    link.call("end a backup", move |domain| {
        abort(domain, &socket, deadline).map(drop)
    })
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

    fn status(&self, context: &str) -> Result<Extents<u32>> {
        if let Some(why) = self.session.fate.failure() {
            return Err(why);
        }
        let mut maps = nbd::block_status(&self.endpoint, &[context], self.timeout)
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

    fn allocation(&self) -> Result<Extents<Allocation>> {
        let ask = || Ok(self.status(nbd::BASE_ALLOCATION)?.map(allocation));
        let first = ask()?;
        Ok(first.zip(&ask()?, surely))
    }

    /// libvirt has merged what changed since the base, and nothing else is to be had.
    fn changed(&self, bitmaps: &[String]) -> Result<Extents<bool>> {
        let part = &self.session.parts[self.index];
        if !part.changes || !bitmaps.is_empty() {
            return Err(Error::new(
                Kind::Stale,
                "libvirt lists what changed since the backup's base and nothing else",
            ));
        }
        let map = self.status(&nbd::dirty_bitmap_context(CHANGES))?;
        Ok(map.map(|flags| flags & nbd::STATE_DIRTY != 0))
    }

    fn bytes_pulled(&self) -> u64 {
        self.pool.bytes_read()
    }
}
