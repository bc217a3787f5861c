//! A world and what must be true of it: what its disks hold, and what was written since each checkpoint.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::common::{Disk, MapLine, Marks, Rng, Tree, Write, errno, model, parse_map};
use crate::world::{DISKS, Facts, Since, World};

/// A checkpoint, and what was written since, disk by disk.
#[derive(Clone)]
pub struct Mark {
    pub name: String,
    pub written: Vec<Marks>,
}

/// A frozen instant: what its backup has to show.
pub struct Instant {
    pub name: String,
    /// What each disk held.
    pub disks: Vec<Disk>,
    /// The checkpoints that could be trusted, oldest first.
    pub marks: Vec<Mark>,
    /// The one that `dirty.map` is since.
    pub base: Option<String>,
}

/// A world that is mounted.
pub struct Story {
    pub world: Box<dyn World>,
    pub tree: Tree,
    pub rng: Rng,
    pub disks: Vec<Disk>,
    /// The checkpoints that can be trusted, oldest first.
    pub marks: Vec<Mark>,
}

/// Tells the story from the beginning. In the end nothing of it is left but checkpoints and their
/// bitmaps.
pub fn tell(world: Option<Box<dyn World>>, behaviour: fn(&mut Story)) {
    let Some(mut world) = world else { return };
    let before = world.state();
    world.mount(&[]);
    let mut story = Story {
        tree: world.tree(),
        world,
        rng: Rng::from_env(),
        disks: DISKS.iter().map(|(_, size)| Disk::new(*size)).collect(),
        marks: Vec::new(),
    };
    behaviour(&mut story);
    story.world.unmount();
    assert_eq!(
        without_checkpoints(story.world.state()),
        without_checkpoints(before),
        "left in the domain"
    );
}

pub fn without_checkpoints(mut state: Vec<String>) -> Vec<String> {
    state.retain(|line| !line.starts_with("bitmap ") && !line.starts_with("checkpoint "));
    state
}

impl Story {
    pub fn facts(&self) -> Facts {
        self.world.facts()
    }

    /// The guest writes, on disks by their number.
    pub fn write(&mut self, writes: &[(usize, Write)]) {
        let named: Vec<_> = writes
            .iter()
            .map(|(disk, w)| (DISKS[*disk].0, *w))
            .collect();
        self.world.guest_writes(&named);
        for (disk, write) in writes {
            self.disks[*disk].apply(*write);
            for mark in &mut self.marks {
                mark.written[*disk].mark(*write);
            }
        }
    }

    /// The same byte over a range.
    pub fn fill(&mut self, disk: usize, offset: u64, length: u64, pattern: u8) {
        let write = Write {
            offset,
            length,
            pattern,
        };
        self.write(&[(disk, write)]);
    }

    /// The guest writes here and there on all disks.
    pub fn scatter(&mut self) {
        let mut writes = Vec::new();
        for (disk, (_, size)) in DISKS.iter().enumerate() {
            writes.extend([(); 4].map(|()| (disk, self.rng.write(*size))));
        }
        self.write(&writes);
    }

    /// `mkdir checkpoints/NAME`.
    pub fn checkpoint(&mut self, name: &str) {
        let made = self.tree.mkdir(&format!("checkpoints/{name}"));
        made.unwrap_or_else(|e| panic!("{name}: {e}: {}", self.tree.last_error()));
        self.mark(name);
    }

    /// A checkpoint was made just now.
    pub fn mark(&mut self, name: &str) {
        let granule = self.facts().granule;
        self.marks.push(Mark {
            name: name.to_owned(),
            written: DISKS.map(|(_, size)| Marks::new(size, granule)).to_vec(),
        });
    }

    /// `rmdir checkpoints/NAME`.
    pub fn delete(&mut self, name: &str) {
        let gone = self.tree.rmdir(&format!("checkpoints/{name}"));
        gone.unwrap_or_else(|e| panic!("{name}: {e}: {}", self.tree.last_error()));
        self.marks.retain(|mark| mark.name != name);
    }

    /// `mkdir backups/NAME`, which makes the checkpoint as well.
    pub fn backup(&mut self, name: &str) -> Instant {
        let begun = self.tree.mkdir(&format!("backups/{name}"));
        begun.unwrap_or_else(|e| panic!("{name}: {e}: {}", self.tree.last_error()));
        let instant = self.instant(name);
        self.mark(name);
        instant
    }

    /// What a backup of this name has to show that began just now.
    pub fn instant(&self, name: &str) -> Instant {
        Instant {
            name: name.to_owned(),
            disks: self.disks.clone(),
            marks: self.marks.clone(),
            base: self.marks.last().map(|mark| mark.name.clone()),
        }
    }

    /// `rmdir backups/NAME`.
    pub fn end(&mut self, name: &str) {
        let ended = self.tree.rmdir(&format!("backups/{name}"));
        ended.unwrap_or_else(|e| panic!("{name}: {e}: {}", self.tree.last_error()));
    }

    /// A backup that makes no checkpoint: every list of changes is what the model says.
    pub fn look(&mut self) {
        let look = self.instant("look");
        let since = look.base.as_ref();
        let since = since.map(|base| format!("<incremental>{base}</incremental>"));
        let document = format!(
            "<domainbackup mode='pull'>{}<domaincheckpoint><disks>\
             <disk name='vda' checkpoint='no'/></disks></domaincheckpoint></domainbackup>",
            since.unwrap_or_default()
        );
        let begun = self.tree.put("backups/look.xml", &document);
        begun.unwrap_or_else(|e| panic!("{e}: {}", self.tree.last_error()));
        self.holds(&look);
        self.end("look");
    }

    /// Unmounts and mounts again.
    pub fn remount(&mut self, options: &[&str]) {
        self.world.unmount();
        self.mount(options);
    }

    /// Mounts again what was unmounted or killed.
    pub fn mount(&mut self, options: &[&str]) {
        self.world.mount(options);
        self.tree = self.world.tree();
    }

    /// What was refused, and the sentence about it.
    pub fn refused<T>(&self, result: std::io::Result<T>, expected: i32, words: &str) {
        assert_eq!(errno(result), expected, "{}", self.tree.last_error());
        let last = self.tree.last_error();
        let last = last.lines().last().unwrap_or_default();
        assert!(last.contains(words), "{words:?} is not in {last:?}");
    }

    /// A running backup shows its instant, in every form.
    pub fn holds(&self, instant: &Instant) {
        let at = |name: &str| format!("backups/{}/{name}", instant.name);
        let path = |name: &str| self.tree.path(&at(name));
        for (model, (target, _)) in instant.disks.iter().zip(DISKS) {
            model.assert_file(&path(&format!("raw/{target}.raw")));
            self.maps_agree(&path(&format!("map/{target}.map")), model);
        }
        let inode = |name: &str| std::fs::metadata(path(name)).unwrap().ino();
        assert_eq!(inode("disk.raw"), inode("raw/vda.raw"));

        let base = instant.base.as_ref();
        let base = base.map(|base| instant.marks.iter().find(|m| m.name == *base).unwrap());
        let dirty = parse_map(&self.tree.read(&at("dirty.map")));
        match base {
            Some(base) => {
                let since = self.tree.read(&at(&format!("since/{}/vda.map", base.name)));
                assert_eq!(dirty, parse_map(&since));
            }
            None => assert!(dirty.iter().all(|line| line.kind & 1 == 1), "{dirty:?}"),
        }
        let listed: Vec<&Mark> = match self.facts().since {
            Since::All => instant.marks.iter().collect(),
            Since::Base => base.into_iter().collect(),
        };
        let mut names: Vec<_> = listed.iter().map(|mark| mark.name.clone()).collect();
        names.sort();
        assert_eq!(self.tree.list(&at("since")), names);
        for mark in listed {
            for (disk, (target, _)) in DISKS.iter().enumerate() {
                let form = |form: &str| at(&format!("since/{}/{target}.{form}", mark.name));
                let map = parse_map(&self.tree.read(&form("map")));
                let found = model::dirty_extents(&map);
                let expected = mark.written[disk].extents();
                assert_eq!(
                    model::show(&found),
                    model::show(&expected),
                    "{target} since {}, of backup {}",
                    mark.name,
                    instant.name
                );
                let model = &instant.disks[disk];
                zeros_are_zeros(&map, model);
                assert_eq!(json_lines(&self.tree.read(&form("json"))), numbers(&map));
                let blocks = bmap_blocks(&self.tree.read(&form("bmap")));
                assert_eq!(blocks, blocks_of(&expected));
                let changed = std::fs::read(self.tree.path(&form("raw"))).unwrap();
                only(model, &expected).assert_is(&changed, &form("raw"));
            }
        }
    }

    /// Of what is called zeros nothing else is read.
    fn maps_agree(&self, path: &Path, model: &Disk) {
        let map = parse_map(&std::fs::read_to_string(path).unwrap());
        assert_eq!(map.iter().map(|l| l.length).sum::<u64>(), model.size());
        let zero = |line: &&MapLine| line.description.contains("zero");
        for line in map.iter().filter(zero) {
            let range = line.offset as usize..(line.offset + line.length) as usize;
            assert!(model.bytes()[range].iter().all(|b| *b == 0), "{line:?}");
        }
    }
}

fn zeros_are_zeros(map: &[MapLine], model: &Disk) {
    for line in map.iter().filter(|line| line.kind == 3) {
        let range = line.offset as usize..(line.offset + line.length) as usize;
        assert!(model.bytes()[range].iter().all(|b| *b == 0), "{line:?}");
    }
}

/// The disk where it changed, and zeros elsewhere.
fn only(model: &Disk, extents: &[(u64, u64)]) -> Disk {
    let mut bytes = vec![0; model.bytes().len()];
    for (offset, length) in extents {
        let range = *offset as usize..(offset + length) as usize;
        bytes[range.clone()].copy_from_slice(&model.bytes()[range]);
    }
    Disk::holding(bytes)
}

type Numbers = (u64, u64, u32);

fn numbers(map: &[MapLine]) -> Vec<Numbers> {
    map.iter().map(|l| (l.offset, l.length, l.kind)).collect()
}

fn json_lines(text: &str) -> Vec<Numbers> {
    let json: Vec<BTreeMap<String, serde_json::Value>> = serde_json::from_str(text).unwrap();
    let number = |line: &BTreeMap<String, serde_json::Value>, key: &str| line[key].as_u64();
    let line = |line: &BTreeMap<String, serde_json::Value>| {
        let kind = u32::try_from(number(line, "type")?).ok()?;
        Some((number(line, "offset")?, number(line, "length")?, kind))
    };
    json.iter().map(|l| line(l).unwrap()).collect()
}

/// First and last blocks of a bmap's ranges.
fn bmap_blocks(text: &str) -> Vec<(u64, u64)> {
    let ranges = text.lines().filter(|line| line.contains("<Range"));
    let range = |line: &str| {
        let inner = line.split('>').nth(1)?.split('<').next()?.trim();
        let (first, last) = inner.split_once('-').unwrap_or((inner, inner));
        Some((first.parse().ok()?, last.parse().ok()?))
    };
    ranges.map(|line| range(line).unwrap()).collect()
}

fn blocks_of(extents: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let blocks =
        |(offset, length): &(u64, u64)| (offset / 4096, (offset + length).div_ceil(4096) - 1);
    extents.iter().map(blocks).collect()
}
