//! Where the disk goes: a file that has its name only once it is whole, or a block device.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::Advice;
use serde_json::{Value, json};
use tempfile::NamedTempFile;

use super::chain::Chain;
use super::files::{failed, refuse};
use super::pieces::Pieces;
use super::progress::Progress;
use super::qemu_img::run;
use crate::model::{Error, Format, Kind, Result};

/// Where the disk goes.
pub(super) enum Output {
    /// A file, written under another name beside it.
    File {
        path: PathBuf,
        dir: PathBuf,
        format: Format,
        /// What has the name is replaced.
        force: bool,
    },
    /// A block device, which nobody else uses.
    Device { path: PathBuf, file: File },
}

impl Output {
    /// Looks at what is there.
    pub(super) fn new(path: &Path, format: Format, force: bool) -> Result<Self> {
        let there = match std::fs::metadata(path) {
            Ok(meta) => Some(meta.file_type()),
            // Also a link that leads nowhere is there.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let link = std::fs::symlink_metadata(path);
                link.ok().map(|meta| meta.file_type())
            }
            Err(e) => return Err(failed("look at", path, &e)),
        };
        let shown = path.display();
        if there.is_some_and(|kind| kind.is_block_device()) {
            return Self::device(path, format);
        }
        if let Some(kind) = there {
            if !force {
                let message = format!("{shown} exists");
                return Err(Error::new(Kind::Exists, message)
                    .hint("choose another name, or --force to replace it"));
            }
            if !kind.is_file() {
                return Err(refuse(format!(
                    "{shown} is neither a file nor a block device"
                )));
            }
        }
        // What a link leads to is replaced, not the link.
        let path = match there {
            Some(_) => std::fs::canonicalize(path).map_err(|e| failed("find", path, &e))?,
            None => std::path::absolute(path).map_err(|e| failed("find", path, &e))?,
        };
        match (path.file_name(), path.parent()) {
            (Some(_), Some(dir)) if dir.is_dir() => Ok(Self::File {
                dir: dir.to_owned(),
                path,
                format,
                force,
            }),
            _ => Err(Error::new(
                Kind::NotFound,
                format!("{shown} is in no directory that exists"),
            )),
        }
    }

    fn device(path: &Path, format: Format) -> Result<Self> {
        if format != Format::Raw {
            return Err(
                refuse(format!("{} takes a raw image", path.display())).hint("leave --format out")
            );
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            // Mounted, or a part of something that is, it cannot be opened so.
            .custom_flags(libc::O_EXCL)
            .open(path)
            .map_err(|e| failed("open", path, &e))?;
        Ok(Self::Device {
            path: path.to_owned(),
            file,
        })
    }

    /// Writes and verifies a disk that is in pieces.
    pub(super) fn write_pieces(&self, pieces: &Pieces, progress: &Progress) -> Result<()> {
        match self {
            Self::Device { path, file } => {
                fits(file, path, pieces.size)?;
                pieces.write(file, path, false, progress)?;
                settle(file, path)?;
                pieces.verify(file, path, progress)
            }
            Self::File {
                path, dir, format, ..
            } => {
                let raw = temporary(dir, path)?;
                pieces.write(raw.as_file(), raw.path(), true, progress)?;
                settle(raw.as_file(), raw.path())?;
                pieces.verify(raw.as_file(), raw.path(), progress)?;
                match format {
                    Format::Raw => self.name(raw),
                    Format::Qcow2 => {
                        let spec = spec("raw", "file", raw.path(), None)?;
                        self.convert(&spec, pieces.size, progress)
                    }
                }
            }
        }
    }

    /// Writes and verifies a disk that is a chain of images.
    pub(super) fn write_chain(&self, chain: &Chain, progress: &Progress) -> Result<()> {
        self.convert(&chain.spec()?, chain.size, progress)
    }

    /// Has qemu-img write an image, and compare it.
    fn convert(&self, from: &str, size: u64, progress: &Progress) -> Result<()> {
        match self {
            Self::Device { path, file } => {
                fits(file, path, size)?;
                // No more of it than the disk has: what comes after is not ours.
                let to = spec("raw", "host_device", path, Some(size))?;
                let words = ["convert", "-p", "-n", "-O", "raw", from];
                qemu_img("writing", &words, &to, size, progress)?;
                settle(file, path)?;
                qemu_img("verifying", &["compare", "-p", from], &to, size, progress)
            }
            Self::File {
                path, dir, format, ..
            } => {
                let temporary = temporary(dir, path)?;
                let to = spec(format.word(), "file", temporary.path(), None)?;
                // It takes a new file by its path alone; it has no `:` before its first `/`.
                let name = plain(temporary.path())?;
                let words = ["convert", "-p", "-O", format.word(), from];
                qemu_img("writing", &words, name, size, progress)?;
                settle(temporary.as_file(), path)?;
                let words = ["compare", "-p", from];
                qemu_img("verifying", &words, &to, size, progress)?;
                self.name(temporary)
            }
        }
    }

    /// Gives the finished file its name, for good.
    fn name(&self, file: NamedTempFile) -> Result<()> {
        let Self::File {
            path, dir, force, ..
        } = self
        else {
            return Ok(());
        };
        let named = match force {
            true => file.persist(path),
            // Somebody may have made one meanwhile.
            false => file.persist_noclobber(path),
        };
        named.map_err(|e| failed("make", path, &e.error))?;
        let synced = File::open(dir).and_then(|dir| dir.sync_all());
        synced.map_err(|e| failed("sync", dir, &e))
    }
}

/// A file beside another one, gone unless it gets that one's name. Like the disk itself it is for its
/// owner only.
fn temporary(dir: &Path, path: &Path) -> Result<NamedTempFile> {
    let mut prefix = std::ffi::OsString::from(".");
    prefix.push(path.file_name().unwrap_or_default());
    prefix.push(".");
    tempfile::Builder::new()
        .prefix(&prefix)
        .suffix(".part")
        .tempfile_in(dir)
        .map_err(|e| failed("make a file in", dir, &e))
}

/// What was written is on the storage, and is read from there the next time.
fn settle(file: &File, path: &Path) -> Result<()> {
    file.sync_all().map_err(|e| failed("sync", path, &e))?;
    // Only a wish.
    let _ = rustix::fs::fadvise(file, 0, None, Advice::DontNeed);
    Ok(())
}

fn fits(mut device: &File, path: &Path, size: u64) -> Result<()> {
    let end = device.seek(SeekFrom::End(0));
    let end = end.map_err(|e| failed("measure", path, &e))?;
    if end < size {
        let message = format!(
            "{} has {end} bytes, and the disk has {size}",
            path.display()
        );
        return Err(Error::new(Kind::NoSpace, message));
    }
    Ok(())
}

fn qemu_img(
    doing: &'static str,
    words: &[&str],
    to: &str,
    size: u64,
    progress: &Progress,
) -> Result<()> {
    progress.begin(doing, size);
    let said = run(&[words, &[to]].concat(), progress)?;
    // Sizes that differ are fine with it, as long as the rest is zeros.
    let other = said.code == Some(1) || said.stdout.contains("size mismatch");
    if doing == "verifying" && other {
        let message = format!("what was written differs: {}", last_line(&said.stdout));
        return Err(Error::new(Kind::Io, message).hint("do not trust the storage"));
    }
    said.ok(doing).map(drop)
}

/// The last line, without what moved the bar.
fn last_line(text: &str) -> &str {
    let mut lines = text.trim_end().rsplit(['\n', '\r']);
    lines.next().unwrap_or_default().trim()
}

fn plain(path: &Path) -> Result<&str> {
    path.to_str()
        .ok_or_else(|| refuse(format!("qemu-img cannot be told of {}", path.display())))
}

fn spec(format: &str, driver: &str, path: &Path, size: Option<u64>) -> Result<String> {
    let mut node = json!({
        "driver": format,
        "file": { "driver": driver, "filename": plain(path)? },
    });
    if let (Some(size), Some(map)) = (size, node.as_object_mut()) {
        map.insert("size".to_owned(), Value::from(size));
    }
    Ok(format!("json:{node}"))
}
