//! What the words of the command line are.

use std::path::{Path, PathBuf};

use super::files::{failed, names, refuse};
use crate::model::Result;

/// What is restored from.
pub(super) enum Found {
    /// A tree of slices.
    Slices(PathBuf),
    /// Copies of backups, in no order.
    Generations(Vec<PathBuf>),
    /// An image, perhaps over others.
    Image(PathBuf),
}

/// What a directory is.
enum Directory {
    Slices(PathBuf),
    Generation,
    /// None of these: it may hold generations.
    Other,
}

/// What marks the copy of a backup, besides its documents.
const CONTENT: [&str; 4] = ["raw", "since", "qcow2", "disk.raw"];

/// Finds out what the sources are.
pub(super) fn look(sources: &[PathBuf]) -> Result<Found> {
    let mut generations = Vec::new();
    for path in sources {
        let meta = std::fs::metadata(path).map_err(|e| failed("find", path, &e))?;
        let alone = |found| match sources.len() {
            1 => Ok(found),
            _ => Err(
                refuse(format!("{} must be the only source", path.display()))
                    .hint("several sources are the directories of a series"),
            ),
        };
        if !meta.is_dir() {
            return alone(Found::Image(path.clone()));
        }
        match directory(path)? {
            Directory::Slices(dir) => return alone(Found::Slices(dir)),
            Directory::Generation => generations.push(path.clone()),
            Directory::Other => generations.extend(inside(path)?),
        }
    }
    Ok(Found::Generations(generations))
}

/// A file that is to be replaced is none of those that are read.
pub(super) fn apart(sources: &[PathBuf], output: &Path) -> Result<()> {
    // What does not exist yet cannot be read.
    let Ok(place) = output.canonicalize() else {
        return Ok(());
    };
    let holds = |source: &&PathBuf| source.canonicalize().is_ok_and(|s| place.starts_with(s));
    match sources.iter().find(holds) {
        None => Ok(()),
        Some(source) => Err(refuse(format!(
            "{} is a part of the source {}",
            output.display(),
            source.display()
        ))
        .hint("choose another output")),
    }
}

/// The generations that a directory holds.
fn inside(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for name in names(dir)? {
        let path = dir.join(name);
        if path.is_dir() && matches!(directory(&path)?, Directory::Generation) {
            found.push(path);
        }
    }
    match found.is_empty() {
        false => Ok(found),
        true => Err(
            refuse(format!("{} holds nothing to restore from", dir.display())).hint(
                "give a copy of current/ or of a backup's slices/, copies of backups, or a qcow2 \
                 image",
            ),
        ),
    }
}

fn directory(dir: &Path) -> Result<Directory> {
    let has = |name: &&str| dir.join(name).exists();
    let content = CONTENT.iter().find(|name| has(name));
    Ok(match (has(&"manifest"), has(&"backup.xml"), content) {
        // A copy of a backup in which slices/ is all there is of its disks.
        (_, _, None) if has(&"slices/manifest") => Directory::Slices(dir.join("slices")),
        (true, _, None) => Directory::Slices(dir.to_owned()),
        (false, false, None) => Directory::Other,
        // Leaving it out could mean that an older instant is restored.
        (false, false, Some(content)) => {
            return Err(refuse(format!(
                "{} has {content} and neither backup.xml nor manifest, so that nobody knows of which \
                 instant it is",
                dir.display()
            ))
            .hint("copy the documents of a backup with its images"));
        }
        _ => Directory::Generation,
    })
}
