//! libvirt's C library, made safe: what is asked of it here, and nothing of policy.
//!
//! Over `virt-sys` and not the `virt` crate: that one has none of the checkpoint and backup calls,
//! and hands out pointers for them anyway. Each call blocks for as long as libvirt likes;
//! [`Link`](super::link::Link) bounds that.
//!
//! The handles are counted references of libvirt's own, which any thread may use
//! (<https://libvirt.org/api.html>, "virConnectPtr … thread safe"). The last error is kept by
//! libvirt per thread, so it is read in the thread of the call.

use std::ffi::{CStr, CString, c_char, c_int, c_uint};
use std::ptr;

use virt_sys as sys;

/// What libvirt answered instead: `VIR_ERR_*` and its words.
#[derive(Debug, Clone)]
pub(super) struct Fault {
    pub(super) code: sys::virErrorNumber,
    pub(super) message: String,
}

impl Fault {
    pub(super) fn new(code: sys::virErrorNumber, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }

    /// Of the call that just failed in this thread.
    fn last() -> Self {
        // SAFETY: libvirt keeps the error until this thread's next call; both are looked at at once.
        unsafe {
            match sys::virGetLastError().as_ref() {
                Some(error) if !error.message.is_null() => Self {
                    code: error.code as sys::virErrorNumber,
                    message: CStr::from_ptr(error.message).to_string_lossy().into(),
                },
                _ => Self::new(sys::VIR_ERR_INTERNAL_ERROR, "libvirt did not say why"),
            }
        }
    }
}

pub(super) type Result<T> = std::result::Result<T, Fault>;

/// A text for C.
fn c(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Fault::new(sys::VIR_ERR_INVALID_ARG, "a zero byte in a text"))
}

/// A text that the caller of libvirt has to free.
fn owned(text: *mut c_char) -> Result<String> {
    if text.is_null() {
        return Err(Fault::last());
    }
    // SAFETY: libvirt returned a C string that is ours; it is freed once, with the C library's free.
    unsafe {
        let copy = CStr::from_ptr(text).to_string_lossy().into_owned();
        libc::free(text.cast());
        Ok(copy)
    }
}

/// -1 is an error.
fn count(answer: c_int) -> Result<c_int> {
    match answer {
        0.. => Ok(answer),
        _ => Err(Fault::last()),
    }
}

/// A list of handles that libvirt allocated, taken over one by one.
fn list<P: Copy, T>(array: *mut P, length: c_int, wrap: impl Fn(P) -> T) -> Vec<T> {
    if array.is_null() {
        return Vec::new();
    }
    // SAFETY: `array` holds `length` handles that are ours; the array itself is ours to free.
    unsafe {
        let handles = std::slice::from_raw_parts(array, usize::try_from(length).unwrap_or(0));
        let all = handles.iter().map(|&handle| wrap(handle)).collect();
        libc::free(array.cast());
        all
    }
}

/// A connection to libvirt.
pub(super) struct Connection(sys::virConnectPtr);

// SAFETY: see the module's comment.
unsafe impl Send for Connection {}
unsafe impl Sync for Connection {}

/// What is called when a job ends: connection, domain, a list of parameters and its length, `opaque`.
pub(super) type JobEnded = extern "C" fn(
    sys::virConnectPtr,
    sys::virDomainPtr,
    sys::virTypedParameterPtr,
    c_int,
    *mut libc::c_void,
);

/// libvirt's type for what is called for any event.
type DomainEvent = unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *mut libc::c_void);

/// Before any connection that is to hear of events.
pub(super) fn register_events() -> Result<()> {
    // SAFETY: no arguments.
    count(unsafe { sys::virEventRegisterDefaultImpl() }).map(drop)
}

/// Waits for what comes next, and calls back.
pub(super) fn run_events() -> Result<()> {
    // SAFETY: the loop is registered.
    count(unsafe { sys::virEventRunDefaultImpl() }).map(drop)
}

extern "C" fn silent(_: *mut libc::c_void, _: sys::virErrorPtr) {}

impl Connection {
    pub(super) fn open(uri: &str) -> Result<Self> {
        let uri = c(uri)?;
        // SAFETY: a C string that outlives the call. The handler does nothing: libvirt's own would
        // print every error to stderr.
        let connection = unsafe {
            sys::virSetErrorFunc(ptr::null_mut(), Some(silent));
            sys::virConnectOpen(uri.as_ptr())
        };
        match connection.is_null() {
            true => Err(Fault::last()),
            false => Ok(Self(connection)),
        }
    }

    /// Whether the other end was still there when it was last used.
    pub(super) fn is_alive(&self) -> bool {
        // SAFETY: the connection is open.
        unsafe { sys::virConnectIsAlive(self.0) == 1 }
    }

    pub(super) fn domain_by_name(&self, name: &str) -> Result<Domain> {
        let name = c(name)?;
        // SAFETY: the connection is open, the string outlives the call.
        Domain::of(unsafe { sys::virDomainLookupByName(self.0, name.as_ptr()) })
    }

    pub(super) fn domain_by_uuid(&self, uuid: &str) -> Result<Domain> {
        let uuid = c(uuid)?;
        // SAFETY: the connection is open, the string outlives the call.
        Domain::of(unsafe { sys::virDomainLookupByUUIDString(self.0, uuid.as_ptr()) })
    }

    /// Has `tell` called with `opaque` when a job of the domain ends; the callback's number.
    pub(super) fn when_a_job_ends(
        &self,
        domain: &Domain,
        tell: JobEnded,
        opaque: *const libc::c_void,
    ) -> Result<c_int> {
        let event = sys::VIR_DOMAIN_EVENT_ID_JOB_COMPLETED as c_int;
        // SAFETY: libvirt calls it back with the arguments of this event, whatever its declared type;
        // `opaque` is given back with `release`.
        let answer = unsafe {
            let tell = std::mem::transmute::<JobEnded, DomainEvent>(tell);
            let release = Some(super::outcome::release as _);
            let (opaque, tell) = (opaque.cast_mut(), Some(tell));
            sys::virConnectDomainEventRegisterAny(self.0, domain.0, event, tell, opaque, release)
        };
        if answer < 0 {
            // It was not taken.
            super::outcome::release(opaque.cast_mut());
        }
        count(answer)
    }

    pub(super) fn forget_callback(&self, callback: c_int) {
        // SAFETY: the connection is open. A callback that is unknown, as after a restart, is an error
        // that changes nothing.
        unsafe { sys::virConnectDomainEventDeregisterAny(self.0, callback) };
    }

    pub(super) fn domains(&self) -> Result<Vec<Domain>> {
        let mut array = ptr::null_mut();
        // SAFETY: the connection is open; libvirt writes a pointer to an array.
        let n = count(unsafe { sys::virConnectListAllDomains(self.0, &raw mut array, 0) })?;
        Ok(list(array, n, Domain))
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // SAFETY: ours, and closed once.
        unsafe { sys::virConnectClose(self.0) };
    }
}

/// A domain.
pub(super) struct Domain(sys::virDomainPtr);

// SAFETY: see the module's comment.
unsafe impl Send for Domain {}

impl Domain {
    fn of(domain: sys::virDomainPtr) -> Result<Self> {
        match domain.is_null() {
            true => Err(Fault::last()),
            false => Ok(Self(domain)),
        }
    }

    pub(super) fn name(&self) -> String {
        // SAFETY: a C string that lives as long as the domain; never null for a domain.
        let name = unsafe { sys::virDomainGetName(self.0).as_ref() };
        // SAFETY: as before.
        name.map_or_else(String::new, |name| unsafe {
            CStr::from_ptr(name).to_string_lossy().into_owned()
        })
    }

    /// Of the running QEMU, as of the lookup: another one after a restart, none when shut off.
    pub(super) fn id(&self) -> Option<c_uint> {
        // SAFETY: the domain is ours. It is kept in the handle; nobody is asked.
        let id = unsafe { sys::virDomainGetID(self.0) };
        (id != c_uint::MAX).then_some(id)
    }

    pub(super) fn uuid(&self) -> Result<String> {
        let mut buffer: [c_char; sys::VIR_UUID_STRING_BUFLEN as usize] =
            [0; sys::VIR_UUID_STRING_BUFLEN as usize];
        // SAFETY: libvirt writes 36 characters and a zero.
        count(unsafe { sys::virDomainGetUUIDString(self.0, buffer.as_mut_ptr()) })?;
        // SAFETY: a C string in `buffer`.
        Ok(unsafe { CStr::from_ptr(buffer.as_ptr()) }
            .to_string_lossy()
            .into())
    }

    /// `VIR_DOMAIN_*` and the reason for it.
    pub(super) fn state(&self) -> Result<(c_int, c_int)> {
        let (mut state, mut reason) = (0, 0);
        // SAFETY: two places for numbers.
        let answer = unsafe { sys::virDomainGetState(self.0, &raw mut state, &raw mut reason, 0) };
        count(answer).map(|_| (state, reason))
    }

    pub(super) fn is_active(&self) -> Result<bool> {
        // SAFETY: the domain is ours.
        count(unsafe { sys::virDomainIsActive(self.0) }).map(|n| n == 1)
    }

    pub(super) fn xml(&self) -> Result<String> {
        // SAFETY: the domain is ours.
        owned(unsafe { sys::virDomainGetXMLDesc(self.0, 0) })
    }

    /// As it can be defined from; with its secrets, which stay on this host.
    pub(super) fn definition(&self) -> Result<String> {
        let flags = sys::VIR_DOMAIN_XML_INACTIVE | sys::VIR_DOMAIN_XML_SECURE;
        // SAFETY: the domain is ours.
        owned(unsafe { sys::virDomainGetXMLDesc(self.0, flags) })
    }

    /// The size of a disk as the guest has it.
    pub(super) fn capacity(&self, disk: &str) -> Result<u64> {
        let disk = c(disk)?;
        let mut info = sys::_virDomainBlockInfo {
            capacity: 0,
            allocation: 0,
            physical: 0,
        };
        // SAFETY: the string outlives the call; a place for the answer.
        let answer = unsafe { sys::virDomainGetBlockInfo(self.0, disk.as_ptr(), &raw mut info, 0) };
        count(answer).map(|_| info.capacity)
    }

    pub(super) fn resume(&self) -> Result<()> {
        // SAFETY: the domain is ours.
        count(unsafe { sys::virDomainResume(self.0) }).map(drop)
    }

    /// Each after its parent.
    pub(super) fn checkpoints(&self) -> Result<Vec<Checkpoint>> {
        let mut array = ptr::null_mut();
        let flags = sys::VIR_DOMAIN_CHECKPOINT_LIST_TOPOLOGICAL;
        // SAFETY: libvirt writes a pointer to an array.
        let answer = unsafe { sys::virDomainListAllCheckpoints(self.0, &raw mut array, flags) };
        Ok(list(array, count(answer)?, Checkpoint))
    }

    pub(super) fn checkpoint(&self, name: &str) -> Result<Checkpoint> {
        let name = c(name)?;
        // SAFETY: the string outlives the call.
        Checkpoint::of(unsafe { sys::virDomainCheckpointLookupByName(self.0, name.as_ptr(), 0) })
    }

    pub(super) fn create_checkpoint(&self, xml: &str, flags: c_uint) -> Result<Checkpoint> {
        let xml = c(xml)?;
        // SAFETY: the string outlives the call.
        Checkpoint::of(unsafe { sys::virDomainCheckpointCreateXML(self.0, xml.as_ptr(), flags) })
    }

    pub(super) fn begin_backup(
        &self,
        xml: &str,
        checkpoint: Option<&str>,
        flags: c_uint,
    ) -> Result<()> {
        let xml = c(xml)?;
        let checkpoint = checkpoint.map(c).transpose()?;
        let checkpoint = checkpoint.as_ref().map_or(ptr::null(), |c| c.as_ptr());
        // SAFETY: strings that outlive the call; null stands for no checkpoint.
        count(unsafe { sys::virDomainBackupBegin(self.0, xml.as_ptr(), checkpoint, flags) })
            .map(drop)
    }

    pub(super) fn backup_xml(&self) -> Result<String> {
        // SAFETY: the domain is ours.
        owned(unsafe { sys::virDomainBackupGetXMLDesc(self.0, 0) })
    }

    /// Ends the block job of a disk, whatever libvirt knows of it.
    pub(super) fn abort_block_job(&self, disk: &str) -> Result<()> {
        let disk = c(disk)?;
        // SAFETY: the string outlives the call.
        count(unsafe { sys::virDomainBlockJobAbort(self.0, disk.as_ptr(), 0) }).map(drop)
    }

    pub(super) fn abort_job(&self) -> Result<()> {
        // SAFETY: the domain is ours.
        count(unsafe { sys::virDomainAbortJob(self.0) }).map(drop)
    }

    /// `VIR_DOMAIN_JOB_OPERATION_*` of the job that holds the domain, if one does.
    pub(super) fn job(&self) -> Result<Option<c_int>> {
        let job = self.job_stats(0)?;
        Ok((job.kind != sys::VIR_DOMAIN_JOB_NONE as c_int).then_some(job.operation))
    }

    /// What became of the job that ended last, if libvirt still knows.
    pub(super) fn last_job(&self) -> Result<Option<JobResult>> {
        let flags = sys::VIR_DOMAIN_JOB_STATS_COMPLETED | sys::VIR_DOMAIN_JOB_STATS_KEEP_COMPLETED;
        let job = self.job_stats(flags)?;
        Ok((job.kind != sys::VIR_DOMAIN_JOB_NONE as c_int).then_some(job))
    }

    fn job_stats(&self, flags: c_uint) -> Result<JobResult> {
        let (mut kind, mut length) = (0, 0);
        let mut params = ptr::null_mut();
        // SAFETY: places for the answers; libvirt allocates the list, which is freed once.
        unsafe {
            count(sys::virDomainGetJobStats(
                self.0,
                &raw mut kind,
                &raw mut params,
                &raw mut length,
                flags,
            ))?;
            let result = JobResult::of(params, length);
            sys::virTypedParamsFree(params, length);
            Ok(JobResult { kind, ..result })
        }
    }

    /// How far the block job of a disk is: bytes done, and bytes there are to do. None if it has none.
    pub(super) fn block_job(&self, disk: &str) -> Result<Option<(u64, u64)>> {
        let disk = c(disk)?;
        let mut info = sys::_virDomainBlockJobInfo {
            type_: 0,
            bandwidth: 0,
            cur: 0,
            end: 0,
        };
        // SAFETY: the string outlives the call; a place for the answer.
        let found = count(unsafe {
            sys::virDomainGetBlockJobInfo(self.0, disk.as_ptr(), &raw mut info, 0)
        });
        Ok((found? == 1).then_some((info.cur, info.end)))
    }

    /// Has the guest's agent freeze its file systems; how many.
    pub(super) fn freeze(&self) -> Result<u32> {
        // SAFETY: no list means all file systems.
        let answer = unsafe { sys::virDomainFSFreeze(self.0, ptr::null_mut(), 0, 0) };
        count(answer).map(c_int::unsigned_abs)
    }

    /// Has it thaw them; how many were frozen.
    pub(super) fn thaw(&self) -> Result<u32> {
        // SAFETY: no list means all file systems.
        let answer = unsafe { sys::virDomainFSThaw(self.0, ptr::null_mut(), 0, 0) };
        count(answer).map(c_int::unsigned_abs)
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // SAFETY: ours, and freed once.
        unsafe { sys::virDomainFree(self.0) };
    }
}

/// How a job stands, or came out.
#[derive(Debug, Clone)]
pub(super) struct JobResult {
    /// `VIR_DOMAIN_JOB_*`; of an event only whether it was completed.
    pub(super) kind: c_int,
    /// `VIR_DOMAIN_JOB_OPERATION_*`.
    pub(super) operation: c_int,
    /// Bytes there were to copy, all disks.
    pub(super) total: u64,
    /// Why it failed.
    pub(super) message: Option<String>,
}

impl JobResult {
    /// # Safety
    ///
    /// `params` is a list of libvirt's of this length, alive for the call.
    pub(super) unsafe fn of(params: sys::virTypedParameterPtr, length: c_int) -> Self {
        let (mut operation, mut total, mut success) = (0, 0, 0);
        let mut words = ptr::null();
        // SAFETY: the list is alive, as is the string in it until it is copied. A parameter that is not
        // there leaves its place as it is.
        let message = unsafe {
            let name = sys::VIR_DOMAIN_JOB_OPERATION.as_ptr();
            sys::virTypedParamsGetInt(params, length, name, &raw mut operation);
            let name = sys::VIR_DOMAIN_JOB_DISK_TOTAL.as_ptr();
            sys::virTypedParamsGetULLong(params, length, name, &raw mut total);
            let name = sys::VIR_DOMAIN_JOB_SUCCESS.as_ptr();
            sys::virTypedParamsGetBoolean(params, length, name, &raw mut success);
            let name = sys::VIR_DOMAIN_JOB_ERRMSG.as_ptr();
            sys::virTypedParamsGetString(params, length, name, &raw mut words);
            words
                .as_ref()
                .map(|words| CStr::from_ptr(words).to_string_lossy().into_owned())
        };
        let kind = match success {
            0 => sys::VIR_DOMAIN_JOB_FAILED,
            _ => sys::VIR_DOMAIN_JOB_COMPLETED,
        };
        Self {
            kind: kind as c_int,
            operation,
            total,
            message,
        }
    }
}

/// A checkpoint of a domain.
pub(super) struct Checkpoint(sys::virDomainCheckpointPtr);

// SAFETY: see the module's comment.
unsafe impl Send for Checkpoint {}

impl Checkpoint {
    fn of(checkpoint: sys::virDomainCheckpointPtr) -> Result<Self> {
        match checkpoint.is_null() {
            true => Err(Fault::last()),
            false => Ok(Self(checkpoint)),
        }
    }

    pub(super) fn name(&self) -> String {
        // SAFETY: kept in the handle; nobody is asked.
        let name = unsafe { sys::virDomainCheckpointGetName(self.0).as_ref() };
        // SAFETY: a C string that lives as long as the checkpoint.
        name.map_or_else(String::new, |name| unsafe {
            CStr::from_ptr(name).to_string_lossy().into_owned()
        })
    }

    /// With the domain as it was; with what changed since, which only a running QEMU can tell.
    pub(super) fn xml(&self, size: bool) -> Result<String> {
        let flags = match size {
            true => sys::VIR_DOMAIN_CHECKPOINT_XML_SIZE,
            false => 0,
        };
        // SAFETY: the checkpoint is ours.
        owned(unsafe { sys::virDomainCheckpointGetXMLDesc(self.0, flags) })
    }

    pub(super) fn delete(&self, flags: c_uint) -> Result<()> {
        // SAFETY: the checkpoint is ours.
        count(unsafe { sys::virDomainCheckpointDelete(self.0, flags) }).map(drop)
    }
}

impl Drop for Checkpoint {
    fn drop(&mut self) {
        // SAFETY: ours, and freed once.
        unsafe { sys::virDomainCheckpointFree(self.0) };
    }
}
