//! How jobs of a domain come out, told by libvirt when it happens.
//!
//! libvirt keeps what became of the last job only, and does not say which that was: another one may have
//! followed ours at once, from a client that waited for its turn. Events come in order and miss none. They
//! need libvirt's event loop in this process, which is one thread for all domains, and a connection that
//! nobody else uses.

use std::collections::VecDeque;
use std::ffi::{c_int, c_void};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use virt_sys as sys;

use super::ffi::{self, Connection, JobResult};

#[derive(Default)]
struct Told {
    results: Mutex<VecDeque<JobResult>>,
    bell: Condvar,
}

/// Hears of the backups of one domain that come to their end.
pub(super) struct Outcomes {
    connection: Connection,
    callback: c_int,
    told: Arc<Told>,
}

impl Outcomes {
    pub(super) fn listen(uri: &str, uuid: &str) -> ffi::Result<Self> {
        run_events()?;
        let connection = Connection::open(uri)?;
        let domain = connection.domain_by_uuid(uuid)?;
        let told = Arc::<Told>::default();
        let callback =
            connection.when_a_job_ends(&domain, tell, Arc::into_raw(Arc::clone(&told)).cast())?;
        Ok(Self {
            connection,
            callback,
            told,
        })
    }

    /// Whether it still hears: a libvirtd that was restarted tells nobody from before.
    pub(super) fn is_alive(&self) -> bool {
        self.connection.is_alive()
    }

    /// What was told so far is of others.
    pub(super) fn forget(&self) {
        self.told.results.lock().clear();
    }

    /// The next one that is told, or was.
    pub(super) fn next(&self, patience: Duration) -> Option<JobResult> {
        let deadline = Instant::now() + patience;
        let mut results = self.told.results.lock();
        while results.is_empty() {
            if self
                .told
                .bell
                .wait_until(&mut results, deadline)
                .timed_out()
            {
                break;
            }
        }
        results.pop_front()
    }
}

impl Drop for Outcomes {
    fn drop(&mut self) {
        self.connection.forget_callback(self.callback);
    }
}

/// libvirt's event loop, from the first time on.
fn run_events() -> ffi::Result<()> {
    static LOOP: OnceLock<ffi::Result<()>> = OnceLock::new();
    LOOP.get_or_init(|| {
        ffi::register_events()?;
        let thread = std::thread::Builder::new().name("libvirt events".to_owned());
        let spawned = thread.spawn(|| {
            loop {
                if ffi::run_events().is_err() {
                    // It says no more than that; not to be asked again at once.
                    std::thread::sleep(Duration::from_secs(1));
                }
            }
        });
        let failed = |e| ffi::Fault::new(sys::VIR_ERR_INTERNAL_ERROR, format!("no thread: {e}"));
        spawned.map(drop).map_err(failed)
    })
    .clone()
}

/// Called by libvirt's event loop.
extern "C" fn tell(
    _: sys::virConnectPtr,
    _: sys::virDomainPtr,
    params: sys::virTypedParameterPtr,
    length: c_int,
    told: *mut c_void,
) {
    // SAFETY: `told` is what was registered, and lives until the callback is forgotten; the list is
    // libvirt's, for as long as this takes.
    let (told, result) = unsafe {
        (
            &*told.cast_const().cast::<Told>(),
            JobResult::of(params, length),
        )
    };
    if result.operation == sys::VIR_DOMAIN_JOB_OPERATION_BACKUP as c_int {
        told.results.lock().push_back(result);
        told.bell.notify_all();
    }
}

/// Called by libvirt's event loop when the callback is forgotten.
pub(super) extern "C" fn release(told: *mut c_void) {
    // SAFETY: the reference that was given to libvirt, which gives it back once.
    drop(unsafe { Arc::from_raw(told.cast_const().cast::<Told>()) });
}
