//! A disk in pieces: for each byte the file that has it, or that it is zero.
//!
//! ```text
//!   disk     |  mon      | tue | 0 0 0 |   mon    | wed | …       a series
//!            | 0000000   | 0000001  | 0000002  | …               slices
//! ```
//!
//! Every byte is read and written once, however many generations there are, and verifying is the same
//! walk again with another question.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::FallocateFlags;

use super::files::{failed, refuse, size, stretch};
use super::progress::Progress;
use crate::model::{Change, Error, Extents, Kind, Result};
use crate::view::slices::Cut;

/// What is read at once.
const CHUNK: usize = 1 << 20;
/// What becomes a hole if it is zeros.
const BLOCK: usize = 4096;
/// Files that are open at once.
const OPEN: usize = 64;
static ZEROS: [u8; CHUNK] = [0; CHUNK];

/// A disk and where it is; see the module's comment.
pub(super) struct Pieces {
    pub(super) size: u64,
    pub(super) owner: Extents<Option<usize>>,
    pub(super) files: Files,
}

/// The files, by number.
pub(super) enum Files {
    /// As large as the disk, each with some of it in place.
    Images(Vec<PathBuf>),
    /// A slice each.
    Slices {
        /// The disk's directory.
        dir: PathBuf,
        cut: Cut,
    },
}

/// A part of the disk.
enum Part<'a> {
    Zeros(u64),
    Data(&'a [u8]),
}

impl Files {
    fn path(&self, number: usize) -> PathBuf {
        match self {
            Self::Images(paths) => paths.get(number).cloned().unwrap_or_default(),
            Self::Slices { dir, cut } => {
                let directory = cut.directory_name(cut.directory_of(number as u64));
                dir.join(directory).join(cut.slice_name(number as u64))
            }
        }
    }

    /// Where on the disk the file begins, and how long it is.
    fn range(&self, number: usize, disk: u64) -> (u64, u64) {
        match self {
            Self::Images(_) => (0, disk),
            Self::Slices { cut, .. } => cut.range(number as u64).unwrap_or_default(),
        }
    }
}

impl Pieces {
    /// Writes the disk. A fresh file is full of holes, and what is zeros stays one; anything else may
    /// hold whatever it does.
    pub(super) fn write(
        &self,
        out: &File,
        path: &Path,
        fresh: bool,
        progress: &Progress,
    ) -> Result<()> {
        let tried = |e: std::io::Error| failed("write", path, &e);
        if fresh {
            out.set_len(self.size).map_err(tried)?;
        }
        progress.begin("writing", self.size);
        self.walk(progress, |at, part| match part {
            Part::Data(data) if fresh => write_sparse(out, at, data).map_err(tried),
            Part::Data(data) => out.write_all_at(data, at).map_err(tried),
            Part::Zeros(_) if fresh => Ok(()),
            Part::Zeros(length) => write_zeros(out, at, length).map_err(tried),
        })
    }

    /// Reads the disk back, and the files again; they are the same to the last byte.
    pub(super) fn verify(&self, out: &File, path: &Path, progress: &Progress) -> Result<()> {
        let mut buf = vec![0; CHUNK];
        let differs = |at: u64| {
            let message = format!(
                "{} was written and reads back differently near byte {at}",
                path.display()
            );
            Error::new(Kind::Io, message).hint("do not trust the storage")
        };
        progress.begin("verifying", self.size);
        self.walk(progress, |at, part| match part {
            Part::Data(data) => {
                let back = buf.get_mut(..data.len()).unwrap_or_default();
                out.read_exact_at(back, at)
                    .map_err(|e| failed("read back", path, &e))?;
                match back == data {
                    true => Ok(()),
                    false => Err(differs(at)),
                }
            }
            Part::Zeros(length) => match zeros(out, path, at, length, progress)? {
                None => Ok(()),
                Some(at) => Err(differs(at)),
            },
        })
    }

    /// Goes over the whole disk.
    fn walk(
        &self,
        progress: &Progress,
        mut visit: impl FnMut(u64, Part<'_>) -> Result<()>,
    ) -> Result<()> {
        let mut open: HashMap<usize, File> = HashMap::new();
        let mut buf = vec![0; CHUNK];
        for extent in self.owner.iter() {
            let Some(number) = extent.kind else {
                visit(extent.offset, Part::Zeros(extent.length))?;
                progress.advance(extent.length)?;
                continue;
            };
            if open.len() >= OPEN && !open.contains_key(&number) {
                open.clear();
            }
            let path = self.files.path(number);
            let (start, length) = self.files.range(number, self.size);
            let file = match open.entry(number) {
                std::collections::hash_map::Entry::Occupied(open) => open.into_mut(),
                std::collections::hash_map::Entry::Vacant(place) => {
                    place.insert(self::open(&path, length)?)
                }
            };
            let mut at = extent.offset;
            while at < extent.end() {
                let (data, end) = stretch(file, at - start, extent.end() - start);
                let end = end + start;
                if data {
                    let chunk = (end - at).min(CHUNK as u64);
                    let part = buf.get_mut(..chunk as usize).unwrap_or_default();
                    file.read_exact_at(part, at - start)
                        .map_err(|e| failed("read", &path, &e))?;
                    visit(at, Part::Data(part))?;
                    progress.advance(chunk)?;
                    at += chunk;
                } else {
                    visit(at, Part::Zeros(end - at))?;
                    progress.advance(end - at)?;
                    at = end;
                }
            }
        }
        Ok(())
    }
}

/// A file of changes has nothing but zeros where its map says that nothing changed, or that there are
/// zeros now. Otherwise the two are not of one backup, or damaged.
pub(super) fn check_changes(path: &Path, map: &Extents<Change>, progress: &Progress) -> Result<()> {
    let file = open(path, map.size())?;
    progress.begin("checking", map.size());
    for e in map.iter() {
        if e.kind != Change::Dirty
            && let Some(at) = zeros(&file, path, e.offset, e.length, progress)?
        {
            return Err(refuse(format!(
                "{} has data near byte {at}, where its map says that there is none",
                path.display()
            ))
            .hint(
                "map and file are not of one backup, or one of them is damaged: copy both again",
            ));
        }
        progress.advance(e.length)?;
    }
    Ok(())
}

/// Opens a file that has to have this size: past its end a file has nothing but holes.
fn open(path: &Path, length: u64) -> Result<File> {
    let found = size(path)?;
    if found != length {
        return Err(refuse(format!(
            "{} has {found} bytes and should have {length}",
            path.display()
        )));
    }
    File::open(path).map_err(|e| failed("open", path, &e))
}

/// About where a part of a file that should be zeros is not.
fn zeros(
    file: &File,
    path: &Path,
    mut at: u64,
    length: u64,
    progress: &Progress,
) -> Result<Option<u64>> {
    let end = at + length;
    let mut buf = vec![0; 64 * 1024];
    while at < end {
        let (data, next) = stretch(file, at, end);
        if !data {
            at = next;
            continue;
        }
        let length = (next - at).min(buf.len() as u64);
        let part = buf.get_mut(..length as usize).unwrap_or_default();
        file.read_exact_at(part, at)
            .map_err(|e| failed("read", path, &e))?;
        if !is_zero(part) {
            return Ok(Some(at));
        }
        progress.go_on()?;
        at += length;
    }
    Ok(None)
}

/// Writes the blocks that are not zeros, neighbours at once.
fn write_sparse(out: &File, at: u64, data: &[u8]) -> std::io::Result<()> {
    let mut offset = at;
    for run in data
        .chunks(BLOCK)
        .collect::<Vec<_>>()
        .chunk_by(|a, b| is_zero(a) == is_zero(b))
    {
        let length: usize = run.iter().map(|b| b.len()).sum();
        if run.first().is_some_and(|block| !is_zero(block)) {
            let from = (offset - at) as usize;
            out.write_all_at(data.get(from..from + length).unwrap_or_default(), offset)?;
        }
        offset += length as u64;
    }
    Ok(())
}

/// For blocks of up to a chunk; a comparison of memory is the fastest way.
fn is_zero(block: &[u8]) -> bool {
    ZEROS.starts_with(block)
}

/// Writes zeros onto what may hold anything; a device that can does so at once.
fn write_zeros(out: &File, mut at: u64, length: u64) -> std::io::Result<()> {
    if rustix::fs::fallocate(out, FallocateFlags::ZERO_RANGE, at, length).is_ok() {
        return Ok(());
    }
    let end = at + length;
    while at < end {
        let length = (end - at).min(CHUNK as u64);
        out.write_all_at(ZEROS.get(..length as usize).unwrap_or_default(), at)?;
        at += length;
    }
    Ok(())
}
