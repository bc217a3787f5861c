//! Scratch files: where the old content of what the guest overwrites is kept while a backup runs.
//!
//! The file is unlinked as soon as QEMU has opened it, so a crash leaves nothing; what it takes is
//! then asked of our own descriptor.

use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::{names, rundir};
use crate::model::{Error, Kind, Result};

/// Space that is left alone on the scratch directory's file system: this much, or a twentieth of
/// the file system if that is less. Below it, backups are ended, the one that takes most first.
const RESERVE: u64 = 1 << 30;

/// One disk's scratch file.
#[derive(Debug)]
pub(super) struct Scratch {
    path: PathBuf,
    file: File,
}

impl Scratch {
    /// Makes an empty file that QEMU's user can write.
    pub(super) fn create(dir: &Path, name: &str, uid: u32, gid: u32) -> Result<Self> {
        rundir::make_passable(dir).map_err(|e| unusable(dir, &e))?;
        Self::create_at(&dir.join(name), uid, gid)
    }

    /// Makes it under this path, where nothing may be.
    pub(super) fn create_at(path: &Path, uid: u32, gid: u32) -> Result<Self> {
        let file = OpenOptions::new()
            .create_new(true)
            .write(true)
            .mode(0o600)
            .open(path)
            .map_err(|e| unusable(path, &e))?;
        let scratch = Self {
            path: path.to_owned(),
            file,
        };
        rundir::give_to(&scratch.file, &scratch.path, uid, gid)?;
        Ok(scratch)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the name away; QEMU keeps the file.
    pub(super) fn unlink(&self) {
        if let Err(e) = fs::remove_file(&self.path)
            && e.kind() != ErrorKind::NotFound
        {
            log::warn!("cannot remove {}: {e}", self.path.display());
        }
    }

    /// Bytes that the file takes.
    pub(super) fn used(&self) -> u64 {
        self.file.metadata().map_or(0, |m| m.blocks() * 512)
    }

    /// As [`room`], where the file is.
    pub(super) fn room(&self) -> Option<u64> {
        space(&self.file).map(|(free, reserve)| free.saturating_sub(reserve))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        self.unlink();
    }
}

fn unusable(path: &Path, error: &std::io::Error) -> Error {
    let kind = match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Kind::NoSpace,
        ErrorKind::AlreadyExists => Kind::Exists,
        _ => Kind::Io,
    };
    let what = format!("cannot make scratch space {}: {error}", path.display());
    Error::new(kind, what).hint("choose another directory with -o scratch=DIR")
}

/// ENOSPC unless there is room above the reserve.
pub(super) fn check_room(dir: &Path) -> Result<()> {
    match room(dir) {
        Some(0) => Err(Error::new(
            Kind::NoSpace,
            format!("the scratch directory {} is full", dir.display()),
        )
        .hint("make room there, or choose another directory with -o scratch=DIR")),
        _ => Ok(()),
    }
}

/// Bytes above the reserve that are free; `None` if that cannot be told.
pub(super) fn room(dir: &Path) -> Option<u64> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(dir.as_os_str().as_bytes()).ok()?;
    // SAFETY: a C string and a place for the answer, both alive for the call.
    let space = ask(|stat| unsafe { libc::statvfs(path.as_ptr(), stat) });
    space.map(|(free, reserve)| free.saturating_sub(reserve))
}

/// Bytes that are free where a file is; `None` if that cannot be told.
pub(super) fn free(file: &File) -> Option<u64> {
    space(file).map(|(free, _)| free)
}

fn space(file: &File) -> Option<(u64, u64)> {
    // SAFETY: a descriptor that is open, and a place for the answer.
    ask(|stat| unsafe { libc::fstatvfs(file.as_raw_fd(), stat) })
}

/// Bytes that are free, and those of them that are the reserve.
fn ask(ask: impl FnOnce(*mut libc::statvfs) -> libc::c_int) -> Option<(u64, u64)> {
    // SAFETY: all-zero bytes are a valid statvfs.
    let mut stat: libc::statvfs = unsafe { std::mem::zeroed() };
    if ask(&raw mut stat) != 0 {
        return None;
    }
    let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
    Some((bytes(stat.f_bavail), RESERVE.min(bytes(stat.f_blocks) / 20)))
}

/// Removes the files of dead processes: one that was killed between making a file and unlinking it.
pub(super) fn sweep(dir: &Path, runtime: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let id = name.to_str().and_then(names::mount_of);
        if id.is_some_and(|id| rundir::is_dead_id(runtime, id)) {
            log::warn!(
                "removing {}, left by a killed fleecefs",
                entry.path().display()
            );
            let _ = fs::remove_file(entry.path());
        }
    }
}
