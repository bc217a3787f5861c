//! Putting a disk together again from what its backups left behind: `fleecefs restore`.
//!
//! ```text
//!   sources ── look, read the documents ──▶ slices | generations | an image over others
//!                                              │         │              │
//!           refuse what does not fit      one instant   links    headers or links
//!                                              └────┬────┘              │
//!           for each byte, the file that has it   Pieces              Chain  for qemu-img
//!                                                   │                   │
//!           a file without a name yet             write              convert
//!           read back                             verify             compare
//!           and only then                         ───────  rename  ──────
//! ```
//!
//! All that can be refused is refused before anything is written: gaps, files of another domain or of
//! another instant, sizes that disagree. A disk that was resized has no history across that, so all
//! sizes in a series are one and the same.
//!
//! No mount is needed, and none of the engine: files that somebody holds are all there is.

mod chain;
mod files;
mod generation;
mod output;
mod pieces;
mod progress;
mod qemu_img;
mod series;
mod slices;
mod source;

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use self::chain::Chain;
use self::output::Output;
use self::pieces::Pieces;
use self::progress::Progress;
use self::source::Found;
use crate::model::{Format, Result};
use crate::view::manifest::date;

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Request {
    /// What there is: a tree of slices, an image, or the directories of a series.
    pub sources: Vec<PathBuf>,
    /// What is to be made.
    pub output: PathBuf,
    /// Its format.
    pub format: Format,
    /// The disk, where there are several.
    pub disk: Option<String>,
    /// The generation to stop at; the newest, where nothing is said.
    pub until: Option<String>,
    /// Replace a file that is there.
    pub force: bool,
}

/// What is going to be restored, from what.
struct Plan {
    /// The disk of the domain, in words.
    what: String,
    /// The name of the instant.
    instant: String,
    /// The instant in seconds since 1970.
    unix: Option<u64>,
    content: Content,
}

enum Content {
    Pieces(Pieces),
    Chain(Chain),
}

/// Restores, and says what was restored. Gives up, leaving nothing, soon after `stop` is set.
pub fn run(request: &Request, stop: &AtomicBool) -> Result<String> {
    let progress = Progress::new(stop);
    let output = Output::new(&request.output, request.format, request.force)?;
    let (disk, until) = (request.disk.as_deref(), request.until.as_deref());
    source::apart(&request.sources, &request.output)?;
    let plan = match source::look(&request.sources)? {
        Found::Slices(dir) => slices::plan(&dir, disk, until)?,
        Found::Generations(dirs) => series::plan(&dirs, disk, until, &progress)?,
        Found::Image(path) => chain::plan(&path, disk, until, &progress)?,
    };
    let size = match &plan.content {
        Content::Pieces(pieces) => {
            output.write_pieces(pieces, &progress)?;
            pieces.size
        }
        Content::Chain(chain) => {
            output.write_chain(chain, &progress)?;
            chain.size
        }
    };
    let time = match plan.unix {
        Some(unix) => format!(" of {}", date(unix)),
        None => String::new(),
    };
    Ok(format!(
        "restored {} as of {}{time}: {size} bytes in {}, verified",
        plan.what,
        plan.instant,
        request.output.display()
    ))
}
