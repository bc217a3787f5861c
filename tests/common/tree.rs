//! A mounted tree as a program sees it, whoever serves it.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::IntoRawFd;
use std::path::{Path, PathBuf};

/// The tree below a mount point.
#[derive(Debug, Clone)]
pub struct Tree(PathBuf);

impl Tree {
    /// The one that is mounted there.
    pub fn at(mount: &Path) -> Self {
        Self(mount.to_owned())
    }

    /// A file or directory in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// `mkdir`.
    pub fn mkdir(&self, name: &str) -> io::Result<()> {
        std::fs::create_dir(self.path(name))
    }

    /// `rmdir`.
    pub fn rmdir(&self, name: &str) -> io::Result<()> {
        std::fs::remove_dir(self.path(name))
    }

    /// A file's text.
    pub fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// Names in a directory, sorted.
    pub fn list(&self, name: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        let mut names: Vec<_> = entries
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// Writes a word to a `control`.
    pub fn say(&self, control: &str, word: &str) -> io::Result<()> {
        std::fs::write(self.path(control), format!("{word}\n"))
    }

    /// Writes a document. What close(2) says is what became of it; std's files do not tell.
    pub fn put(&self, name: &str, document: &str) -> io::Result<()> {
        let mut file = File::create(self.path(name))?;
        file.write_all(document.as_bytes())?;
        // SAFETY: the descriptor is this function's own, and used no more.
        match unsafe { libc::close(file.into_raw_fd()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// The sentences about the last refusals.
    pub fn last_error(&self) -> String {
        self.read("last-error")
    }

    /// What changed on a disk since a checkpoint: `(offset, length)`.
    pub fn since(&self, backup: &str, checkpoint: &str, disk: &str) -> Vec<(u64, u64)> {
        let map = self.read(&format!("backups/{backup}/since/{checkpoint}/{disk}.map"));
        super::model::dirty_extents(&super::parse_map(&map))
    }

    /// What a line `key: value` of a status says; `None` if there is no such line.
    pub fn status(&self, name: &str, key: &str) -> Option<String> {
        let text = self.read(name);
        let prefix = format!("{key}: ");
        let line = text.lines().find_map(|line| line.strip_prefix(&prefix));
        line.map(str::to_owned)
    }
}

/// The errno of what must be refused.
pub fn errno<T>(result: io::Result<T>) -> i32 {
    match result {
        Ok(_) => panic!("it was not refused"),
        Err(error) => error.raw_os_error().unwrap(),
    }
}
