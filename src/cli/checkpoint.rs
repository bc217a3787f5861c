//! `fleecefs checkpoint`: what virsh has commands for and a directory has no word for.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::time::SystemTime;

use super::args::{Checkpoint, Delete, Dump, List};
use super::mounted::{MountPoint, say};
use super::status::Status;
use super::table::{table, tree};
use crate::model::{Error, Kind, Result, show_size};
use crate::xml::CheckpointDocument;

pub(super) fn run(command: &Checkpoint) -> Result<()> {
    match command {
        Checkpoint::List(list) => self::list(list),
        Checkpoint::Delete(delete) => self::delete(delete),
        Checkpoint::Dump(dump) => self::dump(dump),
    }
}

/// A checkpoint as its directory shows it.
struct Entry {
    name: String,
    created: SystemTime,
    parent: Option<String>,
}

/// All checkpoints, each after its parent, children in the order of their creation.
struct Forest {
    entries: Vec<Entry>,
    places: HashMap<String, usize>,
}

impl Forest {
    fn of(mount: &MountPoint) -> Result<Self> {
        let mut entries = Vec::new();
        for name in mount.directories("checkpoints")? {
            let dir = mount.path("checkpoints").join(&name);
            let created = match fs::metadata(&dir).and_then(|m| m.modified()) {
                Ok(created) => created,
                // Deleted meanwhile.
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(mount.refusal(&format!("stat checkpoints/{name}"), &e)),
            };
            let parent = fs::read_link(dir.join("parent")).ok();
            let parent = parent.and_then(|to| Some(to.file_name()?.to_str()?.to_owned()));
            entries.push(Entry {
                name,
                created,
                parent,
            });
        }
        Ok(Self::sorted(entries))
    }

    fn sorted(mut left: Vec<Entry>) -> Self {
        left.sort_by(|a, b| (b.created, &b.name).cmp(&(a.created, &a.name)));
        let mut children: HashMap<Option<String>, Vec<Entry>> = HashMap::new();
        let names: Vec<String> = left.iter().map(|e| e.name.clone()).collect();
        for entry in left {
            let parent = entry.parent.clone().filter(|p| names.contains(p));
            children.entry(parent).or_default().push(entry);
        }
        // From the roots down: what is not reached that way is in no tree.
        let mut entries: Vec<Entry> = Vec::new();
        let mut next = children.remove(&None).unwrap_or_default();
        while let Some(entry) = next.pop() {
            next.extend(
                children
                    .remove(&Some(entry.name.clone()))
                    .unwrap_or_default(),
            );
            entries.push(entry);
        }
        let places = entries.iter().enumerate();
        let places = places.map(|(i, e)| (e.name.clone(), i)).collect();
        Self { entries, places }
    }

    fn find(&self, name: &str) -> Result<usize> {
        let none = || Error::new(Kind::NotFound, format!("there is no checkpoint {name}"));
        self.places.get(name).copied().ok_or_else(none)
    }

    fn parent(&self, place: usize) -> Option<usize> {
        let parent = self.entries.get(place)?.parent.as_ref()?;
        self.places.get(parent).copied()
    }

    fn has_children(&self, place: usize) -> bool {
        (place + 1..self.entries.len()).any(|i| self.parent(i) == Some(place))
    }

    /// Whether one is below the other, at any depth.
    fn is_below(&self, place: usize, top: usize) -> bool {
        let mut at = self.parent(place);
        while at.is_some_and(|at| at > top) {
            at = at.and_then(|at| self.parent(at));
        }
        at == Some(top)
    }
}

fn list(args: &List) -> Result<()> {
    let mount = MountPoint::at(&args.dir)?;
    let forest = Forest::of(&mount)?;
    let chosen = choose(&forest, args)?;
    let mut sizes = Vec::new();
    for &i in &chosen {
        let name = &forest.entries[i].name;
        sizes.push(match args.no_size {
            true => String::new(),
            false => size(&mount, name)?,
        });
    }
    let text = if args.tree {
        let label = |(&i, size): (&usize, &String)| {
            let name = &forest.entries[i].name;
            format!("{name}  {size}").trim_end().to_owned()
        };
        let labels: Vec<String> = chosen.iter().zip(&sizes).map(label).collect();
        let place = |i| chosen.iter().position(|&c| c == i);
        let parents: Vec<_> = chosen
            .iter()
            .map(|&i| forest.parent(i).and_then(place))
            .collect();
        tree(&labels, &parents)
    } else {
        let mut rows = vec![row("Name", "Creation Time", "Parent", "Size", args)];
        for (&i, size) in chosen.iter().zip(&sizes) {
            let entry = &forest.entries[i];
            let parent = entry.parent.as_deref().unwrap_or("");
            rows.push(row(&entry.name, &time(entry.created), parent, size, args));
        }
        table(&rows)
    };
    say(&text).map(drop)
}

fn row(name: &str, time: &str, parent: &str, size: &str, args: &List) -> Vec<String> {
    let mut row = vec![name.to_owned(), time.to_owned()];
    row.extend(args.parent.then(|| parent.to_owned()));
    row.extend((!args.no_size).then(|| size.to_owned()));
    row
}

/// Which are listed, and in which order.
fn choose(forest: &Forest, args: &List) -> Result<Vec<usize>> {
    let from = args
        .from
        .as_deref()
        .map(|name| forest.find(name))
        .transpose()?;
    let wanted = |&i: &usize| {
        let in_range = match from {
            None => true,
            // A tree shows what it starts from.
            Some(from) if args.tree => i == from || forest.is_below(i, from),
            Some(from) if args.descendants => forest.is_below(i, from),
            Some(from) => forest.parent(i) == Some(from),
        };
        in_range
            && (!args.roots || forest.parent(i).is_none())
            && (!args.leaves || !forest.has_children(i))
            && (!args.no_leaves || forest.has_children(i))
    };
    let mut chosen: Vec<usize> = (0..forest.entries.len()).filter(wanted).collect();
    if !args.topological && !args.tree {
        chosen.sort_by(|&a, &b| forest.entries[a].name.cmp(&forest.entries[b].name));
    }
    Ok(chosen)
}

/// What changed since at most, on all disks. Asks the domain.
fn size(mount: &MountPoint, name: &str) -> Result<String> {
    let Some(text) = mount.read(&format!("checkpoints/{name}/status"))? else {
        return Ok(String::new());
    };
    let disks = Status::read(&text).disks;
    if disks
        .iter()
        .any(|(_, disk)| disk.get("state") == Some("broken"))
    {
        return Ok("broken".to_owned());
    }
    let changed = disks
        .iter()
        .filter_map(|(_, disk)| disk.number("changed-at-most"));
    Ok(show_size(changed.sum()))
}

fn time(time: SystemTime) -> String {
    let time = jiff::Timestamp::try_from(time).unwrap_or_default();
    time.strftime("%Y-%m-%d %H:%M:%S +0000").to_string()
}

/// The newest first, so that each one's record goes to a checkpoint that is going too, or stays.
fn delete(args: &Delete) -> Result<()> {
    let mount = MountPoint::at(&args.dir)?;
    let forest = Forest::of(&mount)?;
    let top = forest.find(&args.name)?;
    let mut doomed = Vec::new();
    if args.children || args.children_only {
        doomed.extend((0..forest.entries.len()).filter(|&i| forest.is_below(i, top)));
    }
    doomed.extend((!args.children_only).then_some(top));
    // Each one comes after its parent in the forest.
    doomed.sort_unstable_by(|a, b| b.cmp(a));
    let mut gone: Vec<&str> = Vec::new();
    for i in doomed {
        let name = &forest.entries[i].name;
        let removed = match args.metadata {
            true => forget(&mount, name),
            false => remove(&mount, name),
        };
        removed.map_err(|e| match gone.is_empty() {
            true => e,
            false => e.during(format!("deleted {}, but then", gone.join(", "))),
        })?;
        gone.push(name);
    }
    Ok(())
}

fn remove(mount: &MountPoint, name: &str) -> Result<()> {
    let path = format!("checkpoints/{name}");
    let removed = fs::remove_dir(mount.path(&path));
    removed.map_err(|e| mount.refusal(&format!("rmdir {path}"), &e))
}

fn forget(mount: &MountPoint, name: &str) -> Result<()> {
    let path = format!("checkpoints/{name}/control");
    let forgotten = fs::write(mount.path(&path), "forget\n");
    forgotten.map_err(|e| mount.refusal(&format!("write {path}"), &e))
}

fn dump(args: &Dump) -> Result<()> {
    let mount = MountPoint::at(&args.dir)?;
    let gone = || {
        Error::new(
            Kind::NotFound,
            format!("there is no checkpoint {}", args.name),
        )
    };
    // Not any path that the name could be: a name of the list.
    let forest = Forest::of(&mount)?;
    let name = &forest.entries[forest.find(&args.name)?].name;
    let file = format!("checkpoints/{name}/checkpoint.xml");
    let text = mount.read(&file)?.ok_or_else(gone)?;
    if !args.no_domain && !args.size {
        return say(&text).map(drop);
    }
    let document = CheckpointDocument::read(text.as_bytes());
    let mut document = document.map_err(|e| Error::new(Kind::Io, format!("{file}: {e}")))?;
    if args.no_domain {
        document.domain = None;
    }
    if args.size {
        let status = mount
            .read(&format!("checkpoints/{name}/status"))?
            .ok_or_else(gone)?;
        let status = Status::read(&status);
        for disk in &mut document.disks {
            let known = status.disks.iter().find(|(target, _)| *target == disk.name);
            if let (Some(bitmap), Some((_, known))) = (&mut disk.bitmap, known) {
                bitmap.size = known.number("changed-at-most");
            }
        }
    }
    say(&document.write()).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn forest() -> Forest {
        let entry = |(name, second, parent): (&str, u64, &str)| Entry {
            name: name.into(),
            created: SystemTime::UNIX_EPOCH + Duration::from_secs(second),
            parent: (!parent.is_empty()).then(|| parent.into()),
        };
        let all = [
            ("tue", 3, "mon"),
            ("alone", 9, "deleted"),
            ("mon", 2, "sun"),
            ("sun", 1, ""),
            ("side", 4, "sun"),
            // Nobody made these this way, and nobody is to hang on them.
            ("a", 5, "b"),
            ("b", 6, "a"),
        ];
        Forest::sorted(all.map(entry).into())
    }

    fn chosen(set: impl FnOnce(&mut List)) -> String {
        let mut args = List::default();
        set(&mut args);
        let forest = forest();
        let names: Vec<&str> = choose(&forest, &args)
            .unwrap()
            .into_iter()
            .map(|i| &*forest.entries[i].name)
            .collect();
        names.join(" ")
    }

    #[test]
    fn which_are_listed() {
        assert_eq!(chosen(|_| ()), "alone mon side sun tue");
        assert_eq!(chosen(|l| l.topological = true), "sun mon tue side alone");
        assert_eq!(chosen(|l| l.roots = true), "alone sun");
        assert_eq!(chosen(|l| l.leaves = true), "alone side tue");
        assert_eq!(chosen(|l| l.no_leaves = true), "mon sun");
        let from = |l: &mut List| l.from = Some("sun".into());
        assert_eq!(chosen(from), "mon side");
        assert_eq!(
            chosen(|l| {
                from(l);
                l.descendants = true;
            }),
            "mon side tue"
        );
        assert_eq!(
            chosen(|l| {
                from(l);
                l.tree = true;
            }),
            "sun mon tue side"
        );
    }
}
