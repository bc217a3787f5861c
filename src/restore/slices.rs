//! A tree of slices: checked against its manifest, name by name and size by size.
//!
//! Copies of a tree are brought up to date slice by slice. If the copying was broken off, slices of two
//! instants may lie side by side; where times were copied too, a slice that is not older than the
//! manifest tells. (fleecefs stamps whole seconds, and the manifest one later than all slices. A time
//! with a fraction is that of the copying and tells nothing.)

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::files::{failed, names, refuse, text_if_there};
use super::generation::Generation;
use super::pieces::{Files, Pieces};
use super::{Content, Plan};
use crate::model::{Error, Extents, Kind, Result};
use crate::view::manifest::{Manifest, ManifestDisk};
use crate::view::slices::Cut;

pub(super) fn plan(dir: &Path, disk: Option<&str>, until: Option<&str>) -> Result<Plan> {
    let path = dir.join("manifest");
    let manifest = manifest(&path)?
        .ok_or_else(|| Error::new(Kind::NotFound, format!("{} does not exist", path.display())))?;
    // The documents beside it have to be of the same backup.
    Generation::read(dir)?;
    if let Some(until) = until.filter(|u| *u != manifest.backup.as_str()) {
        return Err(refuse(format!(
            "{} is of one instant, {}, and not of {until}",
            dir.display(),
            manifest.backup
        )));
    }
    let targets: Vec<&str> = manifest.disks.iter().map(|d| d.target.as_str()).collect();
    let target = choose(&targets, disk, dir)?;
    let disk = manifest.disk(target);
    let disk = disk.ok_or_else(|| refuse(format!("there is no disk {target}")))?;
    let cut = check(dir, &manifest, disk, stamp(&path)?)?;
    let mut owner = Extents::new();
    let slices = (0..).map_while(|k| cut.range(k));
    for (k, (_, length)) in slices.enumerate() {
        owner.push(length, Some(k));
    }
    Ok(Plan {
        what: format!("{target} of {}", manifest.domain),
        instant: manifest.backup.to_string(),
        unix: Some(manifest.begun),
        content: Content::Pieces(Pieces {
            size: disk.size,
            owner,
            files: Files::Slices {
                dir: dir.join(target),
                cut,
            },
        }),
    })
}

/// Reads a manifest, if it is there.
pub(super) fn manifest(path: &Path) -> Result<Option<Manifest>> {
    let Some(bytes) = text_if_there(path)? else {
        return Ok(None);
    };
    Manifest::read(&String::from_utf8_lossy(&bytes))
        .map(Some)
        .map_err(|e| e.during(path.display()))
}

/// The disk that is meant: the one asked for, or the only one.
pub(super) fn choose<'a>(all: &[&'a str], asked: Option<&str>, dir: &Path) -> Result<&'a str> {
    let listed = match all {
        [] => "none".to_owned(),
        all => all.join(", "),
    };
    let found = match asked {
        Some(asked) => {
            let found = all.iter().find(|t| **t == asked);
            found.ok_or_else(|| {
                Error::new(
                    Kind::NotFound,
                    format!("{} has no disk {asked}", dir.display()),
                )
                .hint(format!("disks that are there: {listed}"))
            })?
        }
        None => match all {
            [one] => one,
            [] => return Err(refuse(format!("{} has no disk", dir.display()))),
            _ => {
                return Err(refuse(format!("{} has several disks", dir.display()))
                    .hint(format!("choose one with --disk: {listed}")));
            }
        },
    };
    // The name is a part of paths, and comes from a file.
    match *found {
        "" | "." | ".." => Err(refuse(format!("{found:?} cannot be a disk"))),
        name if name.contains('/') => Err(refuse(format!("{name:?} cannot be a disk"))),
        name => Ok(name),
    }
}

/// Every slice is there and of its size, and no other file; the way the disk is cut.
fn check(dir: &Path, manifest: &Manifest, disk: &ManifestDisk, newest: Option<i64>) -> Result<Cut> {
    let cut = manifest.cut(disk);
    let top = dir.join(&disk.target);
    expect(&top, (0..cut.directories()).map(|d| cut.directory_name(d)))?;
    for directory in 0..cut.directories() {
        let sub = top.join(cut.directory_name(directory));
        let slices = cut.in_directory(directory);
        expect(&sub, slices.clone().map(|k| cut.slice_name(k)))?;
        for k in slices {
            let path = sub.join(cut.slice_name(k));
            let meta = std::fs::metadata(&path).map_err(|e| failed("find", &path, &e))?;
            let length = cut.range(k).map_or(0, |(_, length)| length);
            if !meta.is_file() {
                return Err(mixed(format!("{} is not a file", path.display())));
            }
            if meta.len() != length {
                return Err(mixed(format!(
                    "{} has {} bytes, and by the manifest {length}",
                    path.display(),
                    meta.len()
                )));
            }
            if let (Some(newest), Some(stamp)) = (newest, whole_second(&meta))
                && stamp >= newest
            {
                return Err(mixed(format!(
                    "{} is not older than the manifest: it is of a later backup",
                    path.display()
                )));
            }
        }
    }
    Ok(cut)
}

/// A directory holds just these names.
fn expect(dir: &Path, expected: impl Iterator<Item = String>) -> Result<()> {
    let mut found = names(dir)?.into_iter().peekable();
    for name in expected {
        // Both are sorted.
        match found.next_if_eq(&name) {
            Some(_) => {}
            None => match found.next_if(|other| *other < name) {
                Some(other) => return Err(too_many(dir, &other)),
                None => {
                    return Err(mixed(format!("{} is missing", dir.join(name).display())));
                }
            },
        }
    }
    match found.next() {
        Some(other) => Err(too_many(dir, &other)),
        None => Ok(()),
    }
}

fn too_many(dir: &Path, name: &str) -> Error {
    mixed(format!(
        "{} is no slice by the manifest",
        dir.join(name).display()
    ))
}

fn mixed(why: String) -> Error {
    refuse(why).hint("copy the tree again: files and manifest are not of one backup")
}

/// The manifest's stamp, if it is fleecefs' own.
fn stamp(manifest: &Path) -> Result<Option<i64>> {
    let meta = std::fs::metadata(manifest).map_err(|e| failed("find", manifest, &e))?;
    Ok(whole_second(&meta))
}

fn whole_second(meta: &Metadata) -> Option<i64> {
    (meta.mtime_nsec() == 0).then(|| meta.mtime())
}
