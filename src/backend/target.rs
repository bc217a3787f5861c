//! What one disk of a push backup is written to.
//!
//! It is held open from the start: its name may be another file's before long, or a pipe's, to open
//! which would take for ever. A file that was made here is noted in the runtime directory until it is
//! a backup, or removed; what was there before is never removed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use super::rundir::{self, RunDir};
use super::scratch;
use crate::model::{Error, Format, Image, Kind, Result, Target};

/// A target; nothing is there, or opened, before [`prepare`](Self::prepare).
pub(super) struct TargetFile {
    target: Target,
    /// Bytes of the disk.
    size: u64,
    file: Mutex<Option<File>>,
    /// It was made here, and is neither a backup nor removed yet.
    unfinished: AtomicBool,
}

impl TargetFile {
    pub(super) fn new(target: Target, size: u64) -> Self {
        Self {
            target,
            size,
            file: Mutex::new(None),
            unfinished: AtomicBool::new(false),
        }
    }

    pub(super) fn path(&self) -> &Path {
        Path::new(self.target.image.path())
    }

    #[cfg(feature = "libvirt")]
    pub(super) fn image(&self) -> &Image {
        &self.target.image
    }

    /// Bytes of the disk.
    #[cfg(feature = "libvirt")]
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn format(&self) -> Format {
        self.target.format
    }

    /// It is an image already, made for this by somebody else.
    pub(super) fn is_prepared(&self) -> bool {
        self.target.existing
    }

    /// Makes it, or finds it; what is made is given to QEMU's user, unless somebody else sees to that.
    /// The driver that QEMU opens it with.
    pub(super) fn prepare(
        &self,
        rundir: &RunDir,
        user: Option<(u32, u32)>,
    ) -> Result<&'static str> {
        match self.target.image {
            Image::Block(_) => {
                if !self.open()?.file_type().is_block_device() {
                    let why = format!("{} is no block device", self.path().display());
                    return Err(Error::new(Kind::Invalid, why));
                }
                return Ok("host_device");
            }
            Image::File(_) if self.target.existing => self.check_older()?,
            Image::File(_) => self.make(rundir, user)?,
        }
        Ok("file")
    }

    fn make(&self, rundir: &RunDir, user: Option<(u32, u32)>) -> Result<()> {
        let path = self.path();
        let file = OpenOptions::new()
            .create_new(true)
            .write(true)
            .mode(0o600)
            .open(path)
            .map_err(|e| self.unusable(&e))?;
        self.unfinished.store(true, Ordering::Release);
        let mut slot = self.file.lock();
        let file = slot.insert(file);
        rundir.note_target(path).map_err(|e| self.unusable(&e))?;
        if self.target.format == Format::Raw {
            file.set_len(self.size).map_err(|e| self.unusable(&e))?;
        }
        match user {
            Some((uid, gid)) => rundir::give_to(file, path, uid, gid).map(drop),
            None => Ok(()),
        }
    }

    fn check_older(&self) -> Result<()> {
        let meta = self.open().map_err(|e| match e.kind() {
            Kind::NotFound => e.hint(
                "the changes are written onto an older copy, which must be there; as qcow2 they \
                 can stand alone",
            ),
            _ => e,
        })?;
        if self.target.format == Format::Raw && meta.len() != self.size {
            return Err(Error::new(
                Kind::Invalid,
                format!(
                    "{} has {} bytes, and the disk {}: it is no copy of it",
                    self.path().display(),
                    meta.len(),
                    self.size
                ),
            ));
        }
        Ok(())
    }

    /// Opens what is there, whatever it is.
    fn open(&self) -> Result<fs::Metadata> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(self.path())
            .map_err(|e| self.unusable(&e))?;
        let meta = file.metadata().map_err(|e| self.unusable(&e))?;
        *self.file.lock() = Some(file);
        Ok(meta)
    }

    /// Whether it still has its name.
    fn is_in_place(&self) -> bool {
        let id = |m: fs::Metadata| (m.dev(), m.ino());
        let file = self.file.lock();
        let own = file.as_ref().and_then(|f| f.metadata().ok()).map(id);
        let named = fs::metadata(self.path()).ok().map(id);
        own.is_some() && own == named
    }

    /// Whether its file system has no room left.
    pub(super) fn is_full(&self) -> bool {
        let file = self.file.lock();
        file.as_ref().is_some_and(|f| scratch::free(f) == Some(0))
    }

    /// Waits until all that was written is on disk. That can take as long as writing it.
    pub(super) fn sync(&self) -> Result<()> {
        // A descriptor of its own: nobody waits for this who only wants a look.
        let file = self.file.lock().as_ref().map(File::try_clone);
        let synced = file.map_or(Ok(()), |file| file?.sync_all());
        synced.map_err(|e| self.unusable(&e))
    }

    /// It is written; an error if that is not what has its name.
    pub(super) fn check(&self) -> Result<()> {
        match self.is_in_place() {
            true => Ok(()),
            false => {
                let why = format!("target {} was replaced meanwhile", self.path().display());
                Err(Error::new(Kind::Io, why))
            }
        }
    }

    /// It is a backup.
    pub(super) fn keep(&self, rundir: &RunDir) {
        if self.unfinished.swap(false, Ordering::AcqRel) {
            rundir.forget_target(self.path());
        }
    }

    /// It is none: what was made here is removed, lest it be taken for one.
    pub(super) fn discard(&self, rundir: &RunDir) {
        if !self.unfinished.swap(false, Ordering::AcqRel) {
            return;
        }
        let path = self.path();
        if !self.is_in_place() {
            let path = path.display();
            log::warn!("{path} is not what was written there; it is left alone");
        } else if let Err(e) = fs::remove_file(path) {
            let path = path.display();
            log::warn!("cannot remove {path}, which is no backup: {e}");
        }
        rundir.forget_target(path);
    }

    fn unusable(&self, error: &io::Error) -> Error {
        let kind = match error.kind() {
            ErrorKind::AlreadyExists => Kind::Exists,
            ErrorKind::NotFound => Kind::NotFound,
            ErrorKind::PermissionDenied => Kind::NotPermitted,
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Kind::NoSpace,
            _ => Kind::Io,
        };
        let error = Error::new(kind, format!("target {}: {error}", self.path().display()));
        match kind {
            Kind::Exists => {
                error.hint("a backup is never written over something: choose another name")
            }
            _ => error,
        }
    }
}
