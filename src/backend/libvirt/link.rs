//! The way to a domain: a connection that is opened again when libvirt was restarted, and calls that
//! end when their time is up.
//!
//! libvirt's calls block, without a deadline of their own: a state lock that someone else holds is
//! waited for 30 s, a QEMU that hangs for ever. So each call has a thread, which is left behind when
//! the deadline passes; what it then still achieves is undone. While one is left behind all others
//! are refused at once: they would only queue up behind it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use crossbeam_channel::bounded;
use parking_lot::Mutex;
use virt_sys as sys;

use super::ffi::{self, Connection, Domain, Fault};
use super::outcome::Outcomes;
use crate::model::{Error, Kind, Result};

/// A way to a domain.
#[derive(Clone)]
pub(super) struct Link {
    shared: Arc<Shared>,
    timeout: Duration,
    /// What to look at when nothing is answered.
    hint: &'static str,
}

struct Shared {
    uri: String,
    /// How the domain is found: its name first, its UUID from then on.
    id: Id,
    connection: Mutex<Option<Arc<Connection>>>,
    /// libvirt answers, and has no such domain.
    undefined: AtomicBool,
    /// Calls whose deadline has passed.
    overdue: AtomicUsize,
}

enum Id {
    Name(String),
    Uuid(String),
}

impl Link {
    pub(super) fn by_name(uri: &str, name: &str, timeout: Duration) -> Self {
        Self::new(uri, Id::Name(name.to_owned()), timeout)
    }

    pub(super) fn by_uuid(uri: &str, uuid: &str, timeout: Duration) -> Self {
        Self::new(uri, Id::Uuid(uuid.to_owned()), timeout)
    }

    fn new(uri: &str, id: Id, timeout: Duration) -> Self {
        Self {
            shared: Arc::new(Shared {
                uri: uri.to_owned(),
                id,
                connection: Mutex::default(),
                undefined: AtomicBool::new(false),
                overdue: AtomicUsize::new(0),
            }),
            timeout,
            hint: "is libvirtd well, and the domain? virsh domjobinfo shows who holds it",
        }
    }

    /// One for calls that wait for somebody else, over a connection of its own: while one of those
    /// hangs, only others of its kind are refused.
    pub(super) fn aside(&self, timeout: Duration, hint: &'static str) -> Self {
        let id = match &self.shared.id {
            Id::Name(name) => Id::Name(name.clone()),
            Id::Uuid(uuid) => Id::Uuid(uuid.clone()),
        };
        let timeout = timeout.min(self.timeout);
        Self {
            hint,
            ..Self::new(&self.shared.uri, id, timeout)
        }
    }

    /// The same, with a deadline that is no later than this.
    pub(super) fn within(&self, most: Duration) -> Self {
        Self {
            timeout: self.timeout.min(most),
            ..self.clone()
        }
    }

    pub(super) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// A connection that hears of the ends of the domain's backups.
    pub(super) fn listen(&self, uuid: &str) -> Result<Outcomes> {
        let (uri, uuid) = (self.shared.uri.clone(), uuid.to_owned());
        self.call("listen for the end of a backup", move |_| {
            Outcomes::listen(&uri, &uuid)
        })
    }

    /// Whether libvirt, when last asked, had no such domain.
    pub(super) fn is_undefined(&self) -> bool {
        self.shared.undefined.load(Ordering::Acquire)
    }

    /// Does `work` with the domain. `what` goes into the sentence about a failure.
    pub(super) fn call<T: Send + 'static>(
        &self,
        what: &'static str,
        work: impl FnOnce(&Domain) -> ffi::Result<T> + Send + 'static,
    ) -> Result<T> {
        self.call_or_undo(what, work, |_, _| ())
    }

    /// The same; `undo` is what happens when `work` succeeds after its time was up.
    pub(super) fn call_or_undo<T: Send + 'static>(
        &self,
        what: &'static str,
        work: impl FnOnce(&Domain) -> ffi::Result<T> + Send + 'static,
        undo: impl FnOnce(&Domain, T) + Send + 'static,
    ) -> Result<T> {
        let late = || {
            Error::new(
                Kind::TimedOut,
                format!(
                    "{what}: libvirt did not answer within {} s",
                    self.timeout.as_secs()
                ),
            )
            .hint(self.hint)
        };
        if self.shared.overdue.load(Ordering::Acquire) > 0 {
            return Err(late());
        }
        let (answer, answered) = bounded(1);
        // Who comes first: the answer, or the end of the waiting.
        let decided = Arc::new(AtomicBool::new(false));
        let shared = Arc::clone(&self.shared);
        let first = Arc::clone(&decided);
        let thread = move || {
            let domain = shared.domain();
            let outcome = match &domain {
                Ok(domain) => work(domain).map_err(|fault| match is_off(domain, &fault) {
                    true => not_running(&fault),
                    false => shared.explain(&fault),
                }),
                Err(fault) => Err(shared.explain(fault)),
            };
            if !first.swap(true, Ordering::AcqRel) {
                // Somebody waits; a channel of one holds the answer.
                let _ = answer.send(outcome);
                return;
            }
            if let (Ok(domain), Ok(value)) = (&domain, outcome) {
                log::warn!("{what}: libvirt answered too late; it is undone");
                undo(domain, value);
            }
            shared.overdue.fetch_sub(1, Ordering::AcqRel);
        };
        let spawned = std::thread::Builder::new()
            .name("libvirt".to_owned())
            .spawn(thread);
        spawned.map_err(|e| Error::new(Kind::Io, format!("{what}: no thread for it: {e}")))?;
        match answered.recv_timeout(self.timeout) {
            Ok(outcome) => outcome.map_err(|e| e.during(what)),
            Err(_) => {
                // Counted first: the thread takes it back only if it finds itself late.
                self.shared.overdue.fetch_add(1, Ordering::AcqRel);
                if !decided.swap(true, Ordering::AcqRel) {
                    return Err(late());
                }
                self.shared.overdue.fetch_sub(1, Ordering::AcqRel);
                let outcome = answered.recv().unwrap_or_else(|_| Err(late()));
                outcome.map_err(|e| e.during(what))
            }
        }
    }
}

impl Shared {
    /// The domain, over a connection that works: one that broke is opened again.
    fn domain(&self) -> ffi::Result<Domain> {
        let connection = self.connect()?;
        let found = match self.look_up(&connection) {
            Err(_) if !connection.is_alive() => {
                self.drop_broken();
                self.look_up(&*self.connect()?)
            }
            found => found,
        };
        let undefined = matches!(&found, Err(fault) if fault.code == sys::VIR_ERR_NO_DOMAIN);
        self.undefined.store(undefined, Ordering::Release);
        found
    }

    fn connect(&self) -> ffi::Result<Arc<Connection>> {
        let mut slot = self.connection.lock();
        if let Some(connection) = &*slot {
            return Ok(Arc::clone(connection));
        }
        let connection = Arc::new(Connection::open(&self.uri).map_err(|fault| {
            let message = format!("cannot connect to {}: {}", self.uri, fault.message);
            Fault::new(unreachable(fault.code), message)
        })?);
        *slot = Some(Arc::clone(&connection));
        Ok(connection)
    }

    fn look_up(&self, connection: &Connection) -> ffi::Result<Domain> {
        match &self.id {
            Id::Name(name) => connection.domain_by_name(name),
            Id::Uuid(uuid) => connection.domain_by_uuid(uuid),
        }
    }

    fn drop_broken(&self) {
        let mut slot = self.connection.lock();
        if slot.as_ref().is_some_and(|c| !c.is_alive()) {
            *slot = None;
        }
    }

    /// A refusal in our terms.
    fn explain(&self, fault: &Fault) -> Error {
        let broken = {
            let slot = self.connection.lock();
            slot.as_ref().is_some_and(|c| !c.is_alive())
        };
        if broken {
            self.drop_broken();
            return Error::new(
                Kind::NotConnected,
                format!("the connection to libvirt broke: {}", fault.message),
            )
            .hint("if libvirtd was restarted, try again");
        }
        explain(fault)
    }
}

/// The code of a connection that could not be made, where that is not a matter of rights.
fn unreachable(code: sys::virErrorNumber) -> sys::virErrorNumber {
    match code {
        sys::VIR_ERR_AUTH_FAILED
        | sys::VIR_ERR_AUTH_CANCELLED
        | sys::VIR_ERR_AUTH_UNAVAILABLE
        | sys::VIR_ERR_ACCESS_DENIED => code,
        _ => sys::VIR_ERR_NO_CONNECT,
    }
}

/// Whether the refusal is for want of a domain that runs. libvirt's words are in its own language.
fn is_off(domain: &Domain, fault: &Fault) -> bool {
    fault.code == sys::VIR_ERR_OPERATION_INVALID && matches!(domain.is_active(), Ok(false))
}

fn not_running(fault: &Fault) -> Error {
    Error::new(Kind::NotConnected, fault.message.clone())
        .hint("start or resume it: virsh start, virsh resume")
}

/// What libvirt said, as a refusal. Its codes tell more than its words, which are kept.
pub(super) fn explain(fault: &Fault) -> Error {
    let message = fault.message.clone();
    let error = |kind| Error::new(kind, message.clone());
    match fault.code {
        sys::VIR_ERR_NO_CONNECT => {
            error(Kind::NotConnected).hint("is libvirtd running, and -o uri= right?")
        }
        sys::VIR_ERR_NO_DOMAIN => error(Kind::NotConnected).hint("virsh list --all shows domains"),
        _ if message.contains("inactive domain")
            || message.contains("Unable to read from monitor")
            || message.contains("End of file from qemu monitor") =>
        {
            error(Kind::NotConnected).hint("it is about to stop: begin again when it runs")
        }
        _ if message.contains("job data missing") => error(Kind::Busy).hint(
            "libvirtd was killed while it began a backup, and has lost track of it: restart the domain",
        ),
        // What needs a guest that runs is refused in these words of one that is paused, too.
        sys::VIR_ERR_OPERATION_INVALID if message.contains("not running") => not_running(fault),
        sys::VIR_ERR_OPERATION_INVALID | sys::VIR_ERR_RESOURCE_BUSY => error(Kind::Busy),
        sys::VIR_ERR_OPERATION_TIMEOUT if message.contains("state change lock") => {
            error(Kind::Busy).hint("wait for the other job; virsh domjobinfo shows it")
        }
        _ if message.contains("frozen state") || message.contains("has been disabled") => {
            error(Kind::Busy).hint(
                "wait until whoever froze the guest's file systems has thawed them; if nobody will: \
                 virsh domfsthaw. Or is the agent configured not to freeze?",
            )
        }
        _ if message.contains("blockjob assigned") => {
            error(Kind::Busy).hint("wait for the disk's block job; virsh blockjob shows it")
        }
        sys::VIR_ERR_AGENT_UNRESPONSIVE => {
            error(Kind::TimedOut).hint("does qemu-guest-agent run in the guest?")
        }
        sys::VIR_ERR_OPERATION_TIMEOUT => error(Kind::TimedOut),
        sys::VIR_ERR_NO_SUPPORT
        | sys::VIR_ERR_CONFIG_UNSUPPORTED
        | sys::VIR_ERR_ARGUMENT_UNSUPPORTED
        | sys::VIR_ERR_OPERATION_UNSUPPORTED => error(Kind::Unsupported),
        sys::VIR_ERR_NO_DOMAIN_CHECKPOINT | sys::VIR_ERR_NO_DOMAIN_BACKUP => error(Kind::NotFound),
        sys::VIR_ERR_CHECKPOINT_INCONSISTENT => {
            error(Kind::Stale).hint("delete the checkpoint, and take a full backup")
        }
        sys::VIR_ERR_AUTH_FAILED
        | sys::VIR_ERR_AUTH_CANCELLED
        | sys::VIR_ERR_AUTH_UNAVAILABLE
        | sys::VIR_ERR_ACCESS_DENIED => {
            error(Kind::NotPermitted).hint("run fleecefs as root, or as a user of group libvirt")
        }
        sys::VIR_ERR_INVALID_ARG
        | sys::VIR_ERR_XML_ERROR
        | sys::VIR_ERR_XML_DETAIL
        | sys::VIR_ERR_XML_INVALID_SCHEMA => error(Kind::Invalid),
        // Of QEMU's two steps, to remove what is there and to bind, either may be forbidden.
        _ if message.contains("nbd-server-start") && message.contains("Permission denied") => {
            error(Kind::NotPermitted).hint(
                "can QEMU's user enter the directory, and do AppArmor or SELinux let QEMU make a socket \
                 there? docs/semantics.md, \"Who may do what\"; or choose another -o runtime=DIR",
            )
        }
        _ if message.contains("Could not open") && message.contains("Permission denied") => {
            error(Kind::NotPermitted).hint(
                "QEMU's user must be able to enter the directory, and AppArmor or SELinux must let it: \
                 choose another place",
            )
        }
        _ if message.contains("Bitmap already exists") => error(Kind::Exists).hint(
            "a bitmap of that name is in an image, and libvirt has no record of it: redefine its \
             checkpoint, remove it (qemu-img bitmap --remove), or choose another name",
        ),
        _ if message.contains("have different sizes") => error(Kind::Invalid)
            .hint("libvirt copies onto a target of just the disk's size"),
        _ if message.contains("NBD server already running") => {
            error(Kind::Busy).hint("somebody runs an NBD server in this QEMU; stop it first")
        }
        _ => error(Kind::Io),
    }
}
