//! Files and what goes wrong with them, in sentences; and where a file has data.

use std::fmt::Display;
use std::fs::File;
use std::io;
use std::path::Path;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::model::{Error, Kind, Result};

/// What was tried with a file, and why it failed.
pub(super) fn failed(tried: impl Display, path: &Path, why: &io::Error) -> Error {
    let kind = match why.kind() {
        io::ErrorKind::NotFound => Kind::NotFound,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Kind::NoSpace,
        io::ErrorKind::ResourceBusy => Kind::Busy,
        io::ErrorKind::PermissionDenied => Kind::NotPermitted,
        _ => Kind::Io,
    };
    Error::new(kind, format!("cannot {tried} {}: {why}", path.display()))
}

/// A refusal of what was given.
pub(super) fn refuse(why: impl Into<String>) -> Error {
    Error::new(Kind::Invalid, why)
}

/// The text of a file; `None` if there is no such file.
pub(super) fn text_if_there(path: &Path) -> Result<Option<Vec<u8>>> {
    match std::fs::read(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(failed("read", path, &e)),
    }
}

/// The names in a directory, sorted; none if there is no such directory. Hidden ones are left out, as
/// a shell's `*` does: copy programs keep their unfinished files under such names.
pub(super) fn names(dir: &Path) -> Result<Vec<String>> {
    let listed = match std::fs::read_dir(dir) {
        Ok(listed) => listed,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(failed("list", dir, &e)),
    };
    let mut names = Vec::new();
    for entry in listed {
        let entry = entry.map_err(|e| failed("list", dir, &e))?;
        // A name that is no text is none of ours.
        names.extend(entry.file_name().into_string());
    }
    names.retain(|n| !n.starts_with('.'));
    names.sort();
    Ok(names)
}

/// The size of a file, which must be there and be a plain file.
pub(super) fn size(path: &Path) -> Result<u64> {
    let meta = std::fs::metadata(path).map_err(|e| failed("find", path, &e))?;
    match meta.is_file() {
        true => Ok(meta.len()),
        false => Err(refuse(format!("{} is not a file", path.display()))),
    }
}

/// Whether there is data at `at` (which is no more than can be known: a file system that keeps no
/// holes has data everywhere), and up to where that is so, at most `end`.
pub(super) fn stretch(file: &File, at: u64, end: u64) -> (bool, u64) {
    match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(data) if data > at => (false, data.min(end)),
        Ok(_) => match rustix::fs::seek(file, SeekFrom::Hole(at)) {
            Ok(hole) if hole > at => (true, hole.min(end)),
            _ => (true, end),
        },
        Err(Errno::NXIO) => (false, end),
        Err(_) => (true, end),
    }
}
