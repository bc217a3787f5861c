//! Generations put in order by their links, and the way from the one that is wanted back to a whole disk.
//!
//! ```text
//!   given     wed(since tue)   mon(whole)   tue(since mon)   sun(whole)        in any order
//!   the way   wed ──▶ tue ──▶ mon                                              sun is not on it
//! ```
//!
//! A link is a checkpoint: the changes of `tue` are since the checkpoint that `mon` made. Its name is the
//! name of the directory below `since/`, and where a manifest tells its time too, that is compared: a
//! checkpoint may have been deleted and another one made of its name.
//!
//! What is not on the way is not looked at, so that a series can be restored from what a rotation left
//! behind. But two generations of one name are refused, and so are two domains.

use std::path::PathBuf;

use super::chain::{self, Layer};
use super::files::{failed, refuse};
use super::generation::{Form, Generation};
use super::pieces::{self, Files, Pieces};
use super::progress::Progress;
use super::slices::choose;
use super::{Content, Plan};
use crate::model::{Change, Error, Extents, Format, Kind, Name, Result};
use crate::view::manifest::date;
use crate::view::map::read_changes;

/// A generation on the way, and what its changes are since; the last one has the whole disk.
struct Step<'a> {
    generation: &'a Generation,
    since: Option<Name>,
}

pub(super) fn plan(
    dirs: &[PathBuf],
    disk: Option<&str>,
    until: Option<&str>,
    progress: &Progress,
) -> Result<Plan> {
    let all: Vec<Generation> = dirs
        .iter()
        .map(|dir| Generation::read(dir))
        .collect::<Result<_>>()?;
    one_domain(&all)?;
    all_different(&all)?;
    let last = match until {
        Some(name) => named(&all, name)?,
        None => newest(&all)?,
    };
    let held = last.held()?;
    let held: Vec<&str> = held.iter().map(String::as_str).collect();
    let disk = choose(&held, disk, &last.dir)?;
    let content = match way(&all, last, disk, Form::Raw) {
        Ok(way) => Content::Pieces(images(&way, disk, progress)?),
        // If there is no qcow2 of it at all, what is missing is said of the raw files.
        Err(raw) => match way(&all, last, disk, Form::Qcow2) {
            Ok(way) => Content::Chain(layers(&way, disk, progress)?),
            Err(qcow2) => {
                return Err(if has(last, disk, Form::Raw)? {
                    raw
                } else {
                    qcow2
                });
            }
        },
    };
    let of = last.domain.as_ref().map(|d| format!(" of {d}"));
    Ok(Plan {
        what: format!("{disk}{}", of.unwrap_or_default()),
        instant: last.name(),
        unix: last.unix(),
        content,
    })
}

/// All are of one domain: one UUID, or one name where there is none.
fn one_domain(all: &[Generation]) -> Result<()> {
    for (at, one) in all.iter().enumerate() {
        for other in all.iter().skip(at + 1) {
            let uuids = (one.uuid.as_ref(), other.uuid.as_ref());
            let (a, b, same) = match uuids {
                (Some(a), Some(b)) => (Some(a), Some(b), a.eq_ignore_ascii_case(b)),
                _ => {
                    let (a, b) = (one.domain.as_ref(), other.domain.as_ref());
                    (a, b, a == b)
                }
            };
            if let (Some(a), Some(b), false) = (a, b, same) {
                return Err(refuse(format!(
                    "{} and {} are of two domains, {a} and {b}",
                    one.dir.display(),
                    other.dir.display()
                ))
                .hint("give the generations of one domain"));
            }
        }
    }
    Ok(())
}

/// No two claim to be the same.
fn all_different(all: &[Generation]) -> Result<()> {
    for (at, one) in all.iter().enumerate() {
        for other in all.iter().skip(at + 1) {
            let checkpoint = |g: &Generation| g.checkpoint.as_ref().map(|c| c.name.clone());
            let twice = |a: Option<Name>, b: Option<Name>| a.filter(|a| Some(a) == b.as_ref());
            let same = twice(checkpoint(one), checkpoint(other))
                .or_else(|| twice(one.backup.clone(), other.backup.clone()));
            if let Some(name) = same {
                return Err(refuse(format!(
                    "{} and {} both claim to be {name}",
                    one.dir.display(),
                    other.dir.display()
                ))
                .hint("give each generation once"));
            }
        }
    }
    Ok(())
}

/// The generation of this name.
fn named<'a>(all: &'a [Generation], name: &str) -> Result<&'a Generation> {
    let found: Vec<&Generation> = all.iter().filter(|g| g.is_called(name)).collect();
    match found[..] {
        [one] => Ok(one),
        [] => {
            let names: Vec<String> = all.iter().map(Generation::name).collect();
            let message = format!("there is no generation {name}");
            Err(Error::new(Kind::NotFound, message)
                .hint(format!("those that are there: {}", names.join(", "))))
        }
        _ => Err(refuse(format!(
            "several generations can be meant by {name}"
        ))),
    }
}

/// The generation that no other is based on; the latest of them, if they are several.
fn newest(all: &[Generation]) -> Result<&Generation> {
    let is_base = |one: &&Generation| {
        let mark = one.checkpoint.as_ref();
        let name = mark.map(|c| &c.name);
        name.is_some_and(|name| {
            let mut bases = all.iter().filter_map(|g| g.base.as_ref());
            bases.any(|base| base.name == *name)
        })
    };
    let mut ends: Vec<&Generation> = all.iter().filter(|g| !is_base(g)).collect();
    ends.sort_by_key(|g| g.unix());
    match ends[..] {
        [one] => Ok(one),
        [] => Err(
            refuse("each generation is since another: there is no newest")
                .hint("say at which to stop with --until"),
        ),
        [first, .., before, last] | [first @ before, last] => {
            // One without a time may be anything; those come first.
            if first.unix().is_some() && before.unix() < last.unix() {
                return Ok(last);
            }
            let names: Vec<String> = ends.iter().map(|g| g.name()).collect();
            Err(
                refuse("which generation is the newest cannot be told").hint(format!(
                    "say with --until at which to stop: {}",
                    names.join(", ")
                )),
            )
        }
    }
}

fn has(generation: &Generation, disk: &str, form: Form) -> Result<bool> {
    let whole = generation.whole(disk, form).is_some();
    Ok(whole || !generation.bases(disk, form)?.is_empty())
}

/// From a generation back to one that has the whole disk, all in one form.
fn way<'a>(
    all: &'a [Generation],
    last: &'a Generation,
    disk: &str,
    form: Form,
) -> Result<Vec<Step<'a>>> {
    let mut way: Vec<Step> = Vec::new();
    let mut at = last;
    while at.whole(disk, form).is_none() {
        let (since, next) = base_of(all, at, disk, form)?;
        way.push(Step {
            generation: at,
            since: Some(since),
        });
        if way.iter().any(|step| std::ptr::eq(step.generation, next)) {
            return Err(refuse(format!(
                "the generations go round in a circle: {} is since {}, which comes after it",
                at.name(),
                next.name()
            )));
        }
        at = next;
    }
    way.push(Step {
        generation: at,
        since: None,
    });
    Ok(way)
}

/// What a generation's changes are since: the checkpoint, and the generation that made it.
fn base_of<'a>(
    all: &'a [Generation],
    one: &Generation,
    disk: &str,
    form: Form,
) -> Result<(Name, &'a Generation)> {
    let bases = one.bases(disk, form)?;
    for base in &bases {
        let of = |g: &&Generation| g.checkpoint.as_ref().is_some_and(|c| c.name == *base);
        let Some(found) = all.iter().find(of) else {
            continue;
        };
        let meant = one.base.as_ref().filter(|b| b.name == *base);
        let (meant, is) = (
            meant.and_then(|b| b.unix),
            found.checkpoint.as_ref().and_then(|c| c.unix),
        );
        if let (Some(meant), Some(is)) = (meant, is)
            && meant != is
        {
            return Err(refuse(format!(
                "there is a gap: {} is since the checkpoint {base} of {}, and {} made another {base}, \
                 at {}",
                one.name(),
                date(meant),
                found.dir.display(),
                date(is)
            )));
        }
        if let (Some(now), Some(before)) = (one.unix(), is)
            && now < before
        {
            return Err(refuse(format!(
                "{} is since {base}, and is older than it: {} and {}",
                one.name(),
                date(now),
                date(before)
            ))
            .hint("their directories hold each other's files, or the clock was set back"));
        }
        return Ok((base.clone(), found));
    }
    let name = one.name();
    let form = match form {
        Form::Raw => "raw",
        Form::Qcow2 => "qcow2",
    };
    Err(match bases.first() {
        Some(base) => {
            let time = one.base.as_ref().filter(|b| b.name == *base);
            let time = time.and_then(|b| b.unix);
            let time = time.map(|t| format!(" of {}", date(t)));
            refuse(format!(
                "there is a gap: {name} has the changes of {disk} since {base}{}, and no generation \
                 with the checkpoint {base} was given",
                time.unwrap_or_default()
            ))
            .hint(format!("give the directory of {base}, too"))
        }
        None => refuse(format!(
            "there is a gap: {} has neither all of {disk} nor changes of it, as {form}",
            one.dir.display()
        )),
    })
}

/// For each byte of the disk the file on the way that wrote it last.
fn images(way: &[Step], disk: &str, progress: &Progress) -> Result<Pieces> {
    let mut paths = Vec::new();
    let mut owner: Extents<Option<usize>> = Extents::new();
    for step in way.iter().rev() {
        let number = paths.len();
        let path = match &step.since {
            None => {
                let path = step.generation.whole(disk, Form::Raw);
                let path = path.ok_or_else(|| refuse(format!("all of {disk} is gone")))?;
                owner = Extents::uniform(super::files::size(&path)?, Some(number));
                path
            }
            Some(base) => {
                let path = step.generation.changes(base, disk, Form::Raw);
                let map = map(&step.generation.map(base, disk))?;
                same_size(step.generation, disk, map.size(), owner.size())?;
                pieces::check_changes(&path, &map, progress)?;
                owner = owner.zip(&map, |before, change| match change {
                    Change::Clean => before,
                    Change::Dirty => Some(number),
                    Change::DirtyZero => None,
                });
                path
            }
        };
        if let Some(size) = step.generation.size(disk) {
            same_size(step.generation, disk, size, owner.size())?;
        }
        paths.push(path);
    }
    Ok(Pieces {
        size: owner.size(),
        owner,
        files: Files::Images(paths),
    })
}

/// The images on the way, to be laid over each other.
fn layers(way: &[Step], disk: &str, progress: &Progress) -> Result<chain::Chain> {
    let layer = |step: &Step| {
        let path = match &step.since {
            Some(base) => step.generation.changes(base, disk, Form::Qcow2),
            None => {
                let path = step.generation.whole(disk, Form::Qcow2);
                path.ok_or_else(|| refuse(format!("all of {disk} is gone")))?
            }
        };
        Ok(Layer {
            path,
            format: Format::Qcow2,
        })
    };
    let layers = way.iter().map(layer).collect::<Result<Vec<Layer>>>()?;
    let chain = chain::Chain::check(layers, progress)?;
    for step in way {
        if let Some(size) = step.generation.size(disk) {
            // qcow2 counts in sectors.
            let whole = size.next_multiple_of(512);
            same_size(step.generation, disk, whole, chain.size)?;
        }
    }
    Ok(chain)
}

fn map(path: &std::path::Path) -> Result<Extents<Change>> {
    let text = std::fs::read(path).map_err(|e| failed("read", path, &e))?;
    read_changes(&String::from_utf8_lossy(&text)).map_err(|e| e.during(path.display()))
}

fn same_size(generation: &Generation, disk: &str, size: u64, before: u64) -> Result<()> {
    if size == before {
        return Ok(());
    }
    Err(refuse(format!(
        "{disk} has {size} bytes in {} and {before} in the generation before",
        generation.name()
    ))
    .hint(
        "a disk that was resized begins a new series with all of it; else a file or a map is cut \
         short",
    ))
}
