//! A QEMU, reached through its monitor: the backend for running domains and, with a private storage
//! daemon in QEMU's place, for images.
//!
//! ```text
//!   Qemu ── Shared ──┬── Link      the monitor; connected again when QEMU was restarted
//!                    ├── Server    the one NBD server of a QEMU process; counts its users
//!                    ├── RunDir    sockets
//!                    └── Session…  what each running backup has in QEMU (freeze.rs)
//!   guard.rs: a thread that ends a backup before the guest has to pay for it
//! ```
//!
//! The commands, their order and the texts of refusals were tried on QEMU 7.2 and 10.0.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use serde_json::{Value, json};

use self::disks::DiskNode;
pub(super) use self::disks::Roots;
use self::freeze::Session;
pub(super) use self::link::Link;
use self::monitor::Monitor;
use self::push::PushSession;
use self::quiesce::LateThaw;
use self::server::Server;
use super::rundir::{self, RunDir};
use super::source::Places;
use super::storage_daemon::Daemon;
use super::watch::Watcher;
use super::{Backend, Frozen, Listener, Notice, Pushing, names, scratch};
use crate::model::{
    BackupPlan, CheckpointRemoval, Disk, DomainInfo, Error, Kind, NewCheckpoint, PushPlan,
    RemoveBitmap, RenameBitmap, Result,
};
use crate::qmp;

mod disks;
mod freeze;
mod frozen;
mod guard;
mod link;
mod monitor;
mod push;
mod quiesce;
mod quirks;
mod server;

/// A domain behind a monitor.
pub struct Qemu {
    shared: Arc<Shared>,
    info: DomainInfo,
    guard: Mutex<Option<Watcher>>,
    daemon: Mutex<Option<Daemon>>,
}

/// How long a change of the block graph waits for our requests to be answered.
const SILENCE: Duration = Duration::from_secs(2);

/// What a mount's backups have in common.
struct Shared {
    link: Link,
    roots: Roots,
    places: Places,
    server: Server,
    rundir: RunDir,
    /// The disks as last seen; the engine looks before every change.
    seen: Mutex<Vec<DiskNode>>,
    /// Backups that have something in QEMU.
    sessions: Mutex<Vec<Arc<Session>>>,
    /// Push backups that have something in QEMU.
    pushes: Mutex<Vec<Arc<PushSession>>>,
    /// Held by each of our requests to the NBD server, and by what changes the block graph alone.
    traffic: RwLock<()>,
    late_thaw: LateThaw,
    /// Who is told of what happens by itself.
    listener: OnceLock<Listener>,
}

impl Qemu {
    /// Connects to a running QEMU. Nothing of it is changed yet.
    pub(super) fn connect(socket: PathBuf, places: &Places) -> Result<Self> {
        let path = socket.canonicalize().unwrap_or_else(|_| socket.clone());
        let link = Link::open(socket, places.timeout, qmp::GREETING_TIMEOUT)?;
        let rundir = RunDir::create(&places.runtime)?;
        let peer = link.peer()?;
        rundir.give_to(peer.uid, peer.gid)?;
        let monitor = link.monitor()?;
        let name = monitor.name()?;
        let uuid = Some(monitor.uuid()?).filter(|u| !u.trim_matches(['0', '-']).is_empty());
        let name = places.domain.clone().or(name);
        let info = DomainInfo {
            key: match (&places.domain, &uuid, &name) {
                (Some(word), _, _) | (None, Some(word), _) | (None, None, Some(word)) => {
                    file_name(word)
                }
                // Without any identity the socket's path is what stays the same.
                (None, None, None) => path_name(&path),
            },
            name: name.unwrap_or_else(|| "qemu".to_owned()),
            uuid,
        };
        Ok(Self::new(link, Roots::Drives, rundir, places, info, None))
    }

    /// Over a monitor that is connected; `daemon` is the process behind it where that is ours.
    pub(super) fn new(
        link: Link,
        roots: Roots,
        rundir: RunDir,
        places: &Places,
        info: DomainInfo,
        daemon: Option<Daemon>,
    ) -> Self {
        let shared = Arc::new(Shared {
            link,
            roots,
            places: places.clone(),
            server: Server::default(),
            rundir,
            seen: Mutex::default(),
            sessions: Mutex::default(),
            pushes: Mutex::default(),
            traffic: RwLock::new(()),
            late_thaw: LateThaw::default(),
            listener: OnceLock::new(),
        });
        let guard = guard::start(&shared);
        Self {
            shared,
            info,
            guard: Mutex::new(Some(guard)),
            daemon: Mutex::new(daemon),
        }
    }
}

impl Shared {
    /// Takes apart what is left of backups that are over: whose begin failed while QEMU did not
    /// answer, or whose end did.
    fn settle(&self) -> Result<()> {
        let sessions = self.sessions.lock().clone();
        let mut over = sessions.iter().filter(|s| s.fate.failure().is_some());
        over.try_for_each(|s| s.end(self))?;
        let pushes = self.pushes.lock().clone();
        pushes.iter().try_for_each(|p| p.settle(self))
    }

    /// Tells the listener, if there is one.
    fn notify(&self, notice: Notice) {
        if let Some(listener) = self.listener.get() {
            listener(notice);
        }
    }

    /// Changes the block graph while none of our requests is under way. The filters of backups lie over
    /// each other, so that ending one moves what others are read through; QEMU 10.0.2 was seen to hang,
    /// once in some thousand ends, when it was told to cancel a job while another backup was read. What
    /// takes longer than a moment is not waited for.
    fn in_silence<T>(&self, work: impl FnOnce() -> T) -> T {
        let _silence = self.traffic.try_write_for(SILENCE);
        work()
    }

    /// Sends requests to the NBD server; ETIMEDOUT if the graph is being changed for so long.
    fn in_traffic<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let late = || Error::new(Kind::TimedOut, "the domain does not finish a change");
        let timeout = self.places.timeout;
        let _traffic = self.traffic.try_read_for(timeout).ok_or_else(late)?;
        work()
    }

    /// EBUSY while the domain is being migrated. A storage daemon is not.
    fn not_migrating(&self, monitor: &Monitor) -> Result<()> {
        if matches!(self.roots, Roots::Drives) && monitor.migrating()? {
            return Err(Error::new(Kind::Busy, "the domain is being migrated")
                .hint("wait for the migration"));
        }
        Ok(())
    }

    /// EBUSY unless the disks are this QEMU's: until a migration has arrived, and once one has left,
    /// another QEMU writes to them. What that writes no bitmap here records, and a frozen disk does not
    /// keep. (Bitmaps can be made all the same, and seem sound afterwards: tried on 10.0.2.)
    fn has_them(&self, disks: &[DiskNode]) -> Result<()> {
        if !matches!(self.roots, Roots::Drives) {
            return Ok(());
        }
        let busy = |why: &str| Err(Error::new(Kind::Busy, why));
        match self.link.monitor()?.run_state()?.as_str() {
            "inmigrate" => busy("the domain waits for a migration, and does not run here yet")
                .map_err(|e| e.hint("try again when it has arrived")),
            "postmigrate" => busy("the domain was migrated away")
                .map_err(|e| e.hint("mount it where it runs now")),
            _ => match disks.iter().find(|d| d.inactive) {
                None => Ok(()),
                Some(disk) => {
                    busy(&format!("disk {} is inactive", disk.disk.target)).map_err(|e| {
                        e.hint("a domain that was restored or migrated here has to run first: cont")
                    })
                }
            },
        }
    }

    /// Looks at the block graph.
    fn look(&self) -> Result<Vec<DiskNode>> {
        let monitor = self.link.monitor()?;
        let nodes = monitor.nodes()?;
        let found = match &self.roots {
            Roots::Drives => disks::of_drives(&monitor.drives()?, &nodes, |node| {
                // While a backup runs, its filter is what the drive sees.
                let pulled = self.sessions.lock().iter().find_map(|s| s.below(node));
                pulled.or_else(|| self.pushes.lock().iter().find_map(|p| p.below(node)))
            }),
            Roots::Nodes(wanted) => disks::of_nodes(wanted, &nodes),
        };
        self.seen.lock().clone_from(&found);
        Ok(found)
    }

    /// The node of a disk as last seen.
    fn node(&self, target: &str) -> Result<DiskNode> {
        let seen = self.seen.lock();
        let node = seen.iter().find(|d| d.disk.target == target);
        node.cloned()
            .ok_or_else(|| Error::new(Kind::NotFound, format!("the domain has no disk {target}")))
    }

    /// Removes a checkpoint's bitmaps if they are there, as after a transaction whose answer was lost;
    /// what recorded before them does so again.
    fn undo_checkpoint(&self, new: &NewCheckpoint) -> Result<()> {
        let now = self.look()?;
        let mut removal = CheckpointRemoval {
            name: new.name.clone(),
            bitmaps: Vec::new(),
        };
        for bitmap in &new.bitmaps {
            let disk = now.iter().find(|d| d.disk.target == bitmap.target);
            let made = disk.is_some_and(|d| d.disk.bitmaps.iter().any(|b| b.name == bitmap.bitmap));
            if made {
                removal.bitmaps.push(RemoveBitmap {
                    target: bitmap.target.clone(),
                    bitmap: bitmap.bitmap.clone(),
                    resume: bitmap.stop.is_some(),
                    merge_into: bitmap.stop.clone(),
                });
            }
        }
        let actions = self.removal_actions(&removal)?;
        self.link.monitor()?.transaction(actions)
    }

    /// The part of a transaction that makes a checkpoint.
    fn checkpoint_actions(&self, new: &NewCheckpoint) -> Result<Vec<Value>> {
        let mut actions = Vec::new();
        for bitmap in &new.bitmaps {
            let node = self.node(&bitmap.target)?.node;
            let mut add = json!({"node": node, "name": bitmap.bitmap, "persistent": true});
            if let Some(granularity) = bitmap.granularity {
                add["granularity"] = json!(granularity);
            }
            actions.push(action("block-dirty-bitmap-add", add));
            if let Some(stop) = &bitmap.stop {
                let data = json!({"node": node, "name": stop});
                actions.push(action("block-dirty-bitmap-disable", data));
            }
        }
        Ok(actions)
    }

    /// The transaction that forgets a checkpoint: what records again does so before the merge, and
    /// nothing is removed before it was merged.
    fn removal_actions(&self, removal: &CheckpointRemoval) -> Result<Vec<Value>> {
        let mut actions = Vec::new();
        for bitmap in &removal.bitmaps {
            let node = self.node(&bitmap.target)?.node;
            if let Some(parent) = &bitmap.merge_into {
                if bitmap.resume {
                    let data = json!({"node": node, "name": parent});
                    actions.push(action("block-dirty-bitmap-enable", data));
                }
                actions.push(action(
                    "block-dirty-bitmap-merge",
                    json!({"node": node, "target": parent, "bitmaps": [bitmap.bitmap]}),
                ));
            }
            let data = json!({"node": node, "name": bitmap.bitmap});
            actions.push(action("block-dirty-bitmap-remove", data));
        }
        Ok(actions)
    }
}

impl Shared {
    /// The transaction that gives bitmaps other names. QEMU cannot rename one, so another one begins
    /// where it stands: it records from the same instant, takes over the content, and the old one
    /// goes.
    fn rename_actions(&self, renames: &[RenameBitmap]) -> Result<Vec<Value>> {
        let mut actions = Vec::new();
        for rename in renames {
            let node = self.node(&rename.target)?.node;
            actions.push(action(
                "block-dirty-bitmap-add",
                json!({"node": node, "name": rename.to, "persistent": true,
                       "granularity": rename.granularity, "disabled": !rename.recording}),
            ));
            actions.push(action(
                "block-dirty-bitmap-merge",
                json!({"node": node, "target": rename.to, "bitmaps": [rename.from]}),
            ));
            let data = json!({"node": node, "name": rename.from});
            actions.push(action("block-dirty-bitmap-remove", data));
        }
        Ok(actions)
    }
}

/// An action of a transaction.
fn action(kind: &str, data: Value) -> Value {
    json!({"type": kind, "data": data})
}

/// A name for a directory.
pub(super) fn file_name(text: &str) -> String {
    let clean = names::plain(text);
    match clean.trim_start_matches('.') {
        "" => "domain".to_owned(),
        name => name.chars().take(200).collect(),
    }
}

/// A name for a path's directory: the last part, for people, and a checksum of the whole, since other
/// paths have the same last part.
pub(super) fn path_name(path: &Path) -> String {
    // FNV-1a; the name must stay the same for ever, which the standard hashers do not promise.
    let mut sum: u64 = 0xcbf2_9ce4_8422_2325;
    for byte in path.as_os_str().as_encoded_bytes() {
        sum = (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    }
    let last = path.file_name().unwrap_or_default().to_string_lossy();
    format!("{}-{sum:016x}", file_name(&last))
}

impl Backend for Qemu {
    fn info(&self) -> DomainInfo {
        self.info.clone()
    }

    fn failure(&self) -> Option<Error> {
        self.shared.link.failure()
    }

    fn tidy(&self) -> Result<()> {
        let shared = &self.shared;
        let monitor = shared.link.monitor()?;
        let ours = |name: &str| names::mount_of(name).is_some();
        let (exports, jobs, nodes) = (monitor.exports()?, monitor.jobs()?, monitor.nodes()?);
        let all = exports
            .iter()
            .map(|e| &e.id)
            .chain(jobs.iter().map(|j| &j.id));
        let all = all.chain(nodes.iter().filter_map(|n| n.node_name.as_ref()));
        for mount in all.filter_map(|name| names::mount_of(name)) {
            if !rundir::is_dead_id(&shared.places.runtime, mount) {
                let other = shared.places.runtime.join(mount);
                return Err(Error::new(
                    Kind::Busy,
                    format!(
                        "another fleecefs has backups of this QEMU (its sockets are in {})",
                        other.display()
                    ),
                )
                .hint("use that mount, or unmount it first"));
            }
        }
        for export in exports.iter().filter(|e| ours(&e.id)) {
            log::warn!("removing export {}, left by a killed fleecefs", export.id);
            monitor.export_del(&export.id)?;
        }
        for job in jobs.iter().filter(|j| ours(&j.id)) {
            log::warn!("ending job {}, left by a killed fleecefs", job.id);
            match job.id.ends_with("new") {
                true => monitor.discard_create(&job.id)?,
                false => monitor.job_end(&job.id)?,
            }
        }
        let nodes = monitor.nodes()?;
        for (node, bitmap) in nodes.iter().flat_map(|n| n.bitmaps_of(ours)) {
            log::warn!("removing bitmap {bitmap} of {node}, left by a killed fleecefs");
            monitor.bitmap_remove(node, bitmap)?;
        }
        let left: Vec<String> = nodes
            .into_iter()
            .filter_map(|n| n.node_name.filter(|name| ours(name)))
            .collect();
        // What uses another node goes before it.
        for role in ["acc", "over", "file"] {
            for node in left.iter().filter(|n| n.ends_with(role)) {
                log::warn!("removing node {node}, left by a killed fleecefs");
                monitor.blockdev_del(node)?;
            }
        }
        scratch::sweep(&shared.places.scratch, &shared.places.runtime);
        let peer = shared.link.peer()?;
        for dir in rundir::dead(&shared.places.runtime) {
            match rundir::noted_pid(&dir, "nbd-server") {
                Some(pid) if pid == peer.pid => {
                    log::warn!("stopping the NBD server left by a killed fleecefs");
                    // It may have ended by itself, with a QEMU that was restarted.
                    if let Err(e) = monitor.nbd_server_stop() {
                        log::warn!("{e}");
                    }
                }
                // Another domain's QEMU, which its own next mount will look after.
                Some(pid) if rundir::is_running(pid) => continue,
                _ => {}
            }
            match rundir::noted_frozen(&dir) {
                Some(agent) if agent.starts_with('/') => {
                    shared.late_thaw.after_a_kill(shared, Path::new(&agent));
                }
                // libvirt's, who goes by another name.
                Some(_) => continue,
                None if rundir::noted_job(&dir).is_some() => continue,
                None => {}
            }
            rundir::remove_targets(&dir);
            let _ = std::fs::remove_dir_all(&dir);
        }
        Ok(())
    }

    fn disks(&self) -> Result<Vec<Disk>> {
        let found = self.shared.look()?;
        self.shared.has_them(&found)?;
        Ok(found.into_iter().map(|d| d.disk).collect())
    }

    fn create_checkpoint(&self, new: &NewCheckpoint) -> Result<()> {
        let actions = self.shared.checkpoint_actions(new)?;
        let monitor = self.shared.link.monitor()?;
        match (new.quiesce, &self.shared.places.guest_agent) {
            (false, _) => monitor.transaction(actions),
            (true, Some(agent)) => {
                quiesce::frozen_by(&self.shared, agent, || monitor.transaction(actions))
            }
            (true, None) => Err(Error::new(
                Kind::Unsupported,
                "the guest's file systems cannot be frozen: its agent is not known",
            )
            .hint("mount with -o quiesce,guest-agent=SOCKET")),
        }
    }

    fn delete_checkpoint(&self, removal: &CheckpointRemoval) -> Result<()> {
        let actions = self.shared.removal_actions(removal)?;
        self.shared.link.monitor()?.transaction(actions)
    }

    fn begin(&self, plan: &BackupPlan) -> Result<Box<dyn Frozen>> {
        Ok(Box::new(freeze::freeze(&self.shared, plan)?))
    }

    fn rename_checkpoint(&self, renames: &[RenameBitmap]) -> Result<()> {
        let actions = self.shared.rename_actions(renames)?;
        self.shared.link.monitor()?.transaction(actions)
    }

    fn push(&self, plan: &PushPlan) -> Result<Box<dyn Pushing>> {
        push::push(&self.shared, plan)
    }

    fn listen(&self, listener: Listener) {
        // Called once; a second listener would be nobody's.
        let _ = self.shared.listener.set(listener);
    }

    fn close(&self) -> Result<()> {
        drop(self.guard.lock().take());
        let mut result = Ok(());
        // Sessions that could not be ended before get one more chance.
        let left = self.shared.sessions.lock().clone();
        for session in left {
            result = result.and(session.end(&self.shared));
        }
        let left = self.shared.pushes.lock().clone();
        for push in left {
            result = result.and(push.abort(&self.shared));
        }
        if let Some(daemon) = self.daemon.lock().take() {
            result = result.and(daemon.quit(&self.shared.link, self.shared.places.timeout));
        }
        self.shared.late_thaw.close();
        self.shared.rundir.leave_what_is_frozen();
        self.shared.link.close();
        self.shared.rundir.remove();
        result
    }
}
