//! A mount as any program sees it: what the commands that list and delete go by. They know nothing
//! that `ls`, `cat` and `rmdir` could not do, so they work wherever the mount can be reached.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::fuse;
use crate::model::{Error, Kind, Result};

/// A mounted fleecefs.
pub(super) struct MountPoint(PathBuf);

impl MountPoint {
    /// The mount on `dir`; EINVAL if there is none.
    pub(super) fn at(dir: &Path) -> Result<Self> {
        let point = fuse::canonical(dir).map_err(|e| failed(dir.display(), &e))?;
        match fuse::mount_at(&point) {
            Some(mount) if mount.kind == fuse::TYPE => Ok(Self(point)),
            _ => Err(Error::new(
                Kind::Invalid,
                format!("{} is not a mounted fleecefs", dir.display()),
            )),
        }
    }

    /// The path of a file in it.
    pub(super) fn path(&self, below: &str) -> PathBuf {
        self.0.join(below)
    }

    /// Names of the directories in a directory.
    pub(super) fn directories(&self, dir: &str) -> Result<Vec<String>> {
        let mut names = Vec::new();
        let entries = fs::read_dir(self.path(dir)).map_err(|e| failed(dir, &e))?;
        for entry in entries {
            let entry = entry.map_err(|e| failed(dir, &e))?;
            // A document that is being written is none of them.
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                names.push(entry.file_name().to_string_lossy().into_owned());
            }
        }
        Ok(names)
    }

    /// The text of a file; `None` if its directory went away in the meantime.
    pub(super) fn read(&self, file: &str) -> Result<Option<String>> {
        match fs::read_to_string(self.path(file)) {
            Ok(text) => Ok(Some(text)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(self.refusal(&format!("open {file}"), &e)),
        }
    }

    /// Why an operation was refused: what `last-error` says of it, if that is the last it says.
    /// The operation is named as it is there.
    pub(super) fn refusal(&self, operation: &str, error: &io::Error) -> Error {
        let last = fs::read_to_string(self.path("last-error")).unwrap_or_default();
        let sentence = last.lines().last().and_then(|line| {
            let (_time, refusal) = line.split_once(' ')?;
            refusal.strip_prefix(operation)?.strip_prefix(": ")
        });
        match sentence {
            Some(sentence) => Error::new(Kind::Io, sentence),
            None => failed(operation, error),
        }
    }
}

fn failed(what: impl std::fmt::Display, error: &io::Error) -> Error {
    Error::new(Kind::Io, format!("{what}: {error}"))
}

/// Writes to standard output at once; whether anybody reads it still.
pub(super) fn say(text: &str) -> Result<bool> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(e) => Err(failed("cannot write", &e)),
    }
}
