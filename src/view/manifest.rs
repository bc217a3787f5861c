//! The manifest of a tree of slices: which instant of which domain it is, and how its disks are cut.
//!
//! ```text
//! fleecefs-manifest: 1
//! domain: vm1
//! uuid: "6ba7b810-9dad-11d1-80b4-00c04fd430c8"
//! backup: tue
//! begun: 2026-11-24T22:00:00Z
//! begun-unix: 1795557600
//! checkpoint: tue
//! checkpoint-unix: 1795557600
//! base: mon
//! base-unix: 1795471200
//! slice-size: 8388608
//! disks:
//!   vda:
//!     size: 21474836480
//!     slices: 2560
//! ```
//!
//! Whoever holds a copy has no mount to ask, so all that a restore must know to refuse the wrong files
//! is here. Names alone would not do: a checkpoint's time tells it from another of its name.
//!
//! The reader takes what the writer writes, in any order and with more keys than it knows, and
//! nothing that contradicts itself. It is no YAML parser: a quoted string of [`yaml`](super::yaml)
//! is one of JSON too, and the rest is lines.

use std::collections::HashMap;
use std::str::FromStr;

use super::slices::Cut;
use super::yaml::Yaml;
use crate::model::{Error, Kind, Name, Result};

/// The form that is written and read here.
const VERSION: u64 = 1;

/// What a manifest says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// The domain's name.
    pub domain: String,
    /// The domain's UUID, where it has one.
    pub uuid: Option<String>,
    /// The backup's name.
    pub backup: Name,
    /// The frozen instant, in seconds since 1970.
    pub begun: u64,
    /// The checkpoint that goes with the backup.
    pub checkpoint: Option<Point>,
    /// The checkpoint that its changes are listed since by default.
    pub base: Option<Point>,
    /// Bytes in a slice.
    pub slice_size: u64,
    /// The disks, in the domain's order.
    pub disks: Vec<ManifestDisk>,
}

/// A checkpoint, such that no other can be taken for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Point {
    /// Its name.
    pub name: Name,
    /// When it was made, in seconds since 1970.
    pub unix: u64,
}

/// A disk of a [`Manifest`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestDisk {
    /// The disk target.
    pub target: String,
    /// Its size in bytes.
    pub size: u64,
}

impl Manifest {
    /// How a disk is cut.
    pub fn cut(&self, disk: &ManifestDisk) -> Cut {
        Cut {
            size: disk.size,
            slice: self.slice_size,
        }
    }

    /// The disk of this target.
    pub fn disk(&self, target: &str) -> Option<&ManifestDisk> {
        self.disks.iter().find(|d| d.target == target)
    }

    /// The text of the file.
    pub fn write(&self) -> String {
        let mut y = Yaml::new();
        y.plain("fleecefs-manifest", VERSION)
            .string("domain", &self.domain);
        match &self.uuid {
            Some(uuid) => y.string("uuid", uuid),
            None => y.plain("uuid", "null"),
        }
        .string("backup", self.backup.as_str())
        .plain("begun", date(self.begun))
        .plain("begun-unix", self.begun);
        for (key, point) in [("checkpoint", &self.checkpoint), ("base", &self.base)] {
            let unix = format!("{key}-unix");
            match point {
                Some(point) => y.string(key, point.name.as_str()).plain(&unix, point.unix),
                None => y.plain(key, "null").plain(&unix, "null"),
            };
        }
        y.plain("slice-size", self.slice_size).nested("disks", |y| {
            for disk in &self.disks {
                y.nested(&disk.target, |y| {
                    y.plain("size", disk.size)
                        .plain("slices", self.cut(disk).count());
                });
            }
        });
        y.finish()
    }

    /// Reads the text of a file.
    pub fn read(text: &str) -> Result<Self> {
        let lines = Lines::of(text)?;
        let version = lines.number("", "fleecefs-manifest")?;
        if version != VERSION {
            return Err(refuse(format!("form {version} is not known"))
                .hint("use a fleecefs at least as new as the one that wrote it"));
        }
        let slice_size = lines.number("", "slice-size")?;
        if slice_size == 0 {
            return Err(refuse("slice-size is 0"));
        }
        let manifest = Self {
            domain: lines.string("", "domain")?.to_owned(),
            uuid: lines.string_or_null("", "uuid")?.map(str::to_owned),
            backup: Name::new(lines.string("", "backup")?)?,
            begun: lines.number("", "begun-unix")?,
            checkpoint: lines.point("checkpoint")?,
            base: lines.point("base")?,
            slice_size,
            disks: lines.disks()?,
        };
        if lines.string("", "begun")? != date(manifest.begun) {
            return Err(refuse("begun and begun-unix are two different times"));
        }
        for disk in &manifest.disks {
            let slices = lines.number(&disk.target, "slices")?;
            if slices != manifest.cut(disk).count() {
                return Err(refuse(format!(
                    "{} bytes of {} are not {slices} slices of {slice_size}",
                    disk.size, disk.target
                )));
            }
        }
        Ok(manifest)
    }
}

/// A time in UTC, in words; whatever a clock can say, in numbers.
pub fn date(unix: u64) -> String {
    let time = i64::try_from(unix).ok();
    match time.and_then(|t| jiff::Timestamp::from_second(t).ok()) {
        Some(time) => time.to_string(),
        None => unix.to_string(),
    }
}

/// The values of a text by the disk they are below (or none) and their key.
struct Lines {
    values: HashMap<(String, String), Scalar>,
    disks: Vec<String>,
}

/// What stands behind a key.
enum Scalar {
    Plain(String),
    Quoted(String),
}

impl Lines {
    fn of(text: &str) -> Result<Self> {
        let mut lines = Self {
            values: HashMap::new(),
            disks: Vec::new(),
        };
        if !text.ends_with('\n') {
            return Err(refuse("its last line is cut short"));
        }
        // Where we are: below `disks:`, and below which of them.
        let (mut in_disks, mut disk) = (false, String::new());
        for (at, line) in text.lines().enumerate() {
            let bad = || refuse(format!("line {} cannot be read: {line:?}", at + 1));
            if line.trim_start().is_empty() || line.trim_start().starts_with('#') {
                continue;
            }
            let inner = line.trim_start_matches(' ');
            let (key, rest) = key(inner).ok_or_else(bad)?;
            match (line.len() - inner.len(), rest) {
                (0, "") => {
                    in_disks = key == "disks";
                    disk.clear();
                    continue;
                }
                (2, "") if in_disks => {
                    if lines.disks.contains(&key) {
                        return Err(refuse(format!("the disk {key} is there twice")));
                    }
                    disk.clone_from(&key);
                    lines.disks.push(key);
                    continue;
                }
                (0, _) => {
                    in_disks = false;
                    disk.clear();
                }
                (4, _) if !disk.is_empty() => {}
                // Of some later form.
                (1.., _) if !in_disks => continue,
                _ => return Err(bad()),
            }
            let value = scalar(rest).ok_or_else(bad)?;
            let place = (disk.clone(), key);
            if lines.values.contains_key(&place) {
                return Err(refuse(format!("{} is there twice", place.1)));
            }
            lines.values.insert(place, value);
        }
        Ok(lines)
    }

    fn value(&self, disk: &str, key: &str) -> Result<&Scalar> {
        let found = self.values.get(&(disk.to_owned(), key.to_owned()));
        found.ok_or_else(|| match disk {
            "" => refuse(format!("it has no {key}")),
            disk => refuse(format!("the disk {disk} has no {key}")),
        })
    }

    fn string_or_null(&self, disk: &str, key: &str) -> Result<Option<&str>> {
        Ok(match self.value(disk, key)? {
            Scalar::Plain(text) if text == "null" => None,
            Scalar::Plain(text) | Scalar::Quoted(text) => Some(text),
        })
    }

    fn string(&self, disk: &str, key: &str) -> Result<&str> {
        let found = self.string_or_null(disk, key)?;
        found.ok_or_else(|| refuse(format!("{key} is null")))
    }

    fn number(&self, disk: &str, key: &str) -> Result<u64> {
        let text = self.string(disk, key)?;
        // parse() alone would take a plus sign.
        let digits = text.bytes().all(|b| b.is_ascii_digit());
        match u64::from_str(text) {
            Ok(number) if digits => Ok(number),
            _ => Err(refuse(format!("{key} is {text:?}, which is no number"))),
        }
    }

    fn point(&self, key: &str) -> Result<Option<Point>> {
        let unix = format!("{key}-unix");
        match (
            self.string_or_null("", key)?,
            self.string_or_null("", &unix)?,
        ) {
            (None, None) => Ok(None),
            (Some(name), Some(_)) => Ok(Some(Point {
                name: Name::new(name)?,
                unix: self.number("", &unix)?,
            })),
            _ => Err(refuse(format!("one of {key} and {unix} is null"))),
        }
    }

    fn disks(&self) -> Result<Vec<ManifestDisk>> {
        let disk = |target: &String| {
            Ok(ManifestDisk {
                target: target.clone(),
                size: self.number(target, "size")?,
            })
        };
        self.disks.iter().map(disk).collect()
    }
}

/// The key that a line begins with, and what stands behind its colon.
fn key(line: &str) -> Option<(String, &str)> {
    let (key, rest) = if line.starts_with('"') {
        let end = quote_end(line)?;
        let (quoted, rest) = line.split_at_checked(end)?;
        (serde_json::from_str(quoted).ok()?, rest.strip_prefix(':')?)
    } else {
        let (key, rest) = line.split_once(':')?;
        (key.to_owned(), rest)
    };
    let rest = match rest {
        "" => "",
        // An empty mapping: as good as one without lines.
        " {}" => "",
        rest => rest.strip_prefix(' ')?,
    };
    (!key.is_empty()).then_some((key, rest))
}

/// Behind the quote that closes the string which the text begins with.
fn quote_end(text: &str) -> Option<usize> {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return Some(at + 1),
            _ => {}
        }
    }
    None
}

fn scalar(text: &str) -> Option<Scalar> {
    if text.starts_with('"') {
        return serde_json::from_str(text).ok().map(Scalar::Quoted);
    }
    let plain = !text.is_empty() && !text.contains(['"', ' ', '#']);
    plain.then(|| Scalar::Plain(text.to_owned()))
}

fn refuse(why: impl std::fmt::Display) -> Error {
    Error::new(Kind::Invalid, format!("the manifest is not usable: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn name(text: &str) -> Name {
        Name::new(text).unwrap()
    }

    fn tuesday() -> Manifest {
        Manifest {
            domain: "vm1".into(),
            uuid: Some("6ba7b810-9dad-11d1-80b4-00c04fd430c8".into()),
            backup: name("tue"),
            begun: 1_795_557_600,
            checkpoint: Some(Point {
                name: name("tue"),
                unix: 1_795_557_600,
            }),
            base: None,
            slice_size: 8 << 20,
            disks: vec![
                ManifestDisk {
                    target: "vda".into(),
                    size: 20 << 30,
                },
                ManifestDisk {
                    target: "no".into(),
                    size: 1,
                },
            ],
        }
    }

    #[test]
    fn its_form() {
        assert_eq!(
            tuesday().write(),
            "fleecefs-manifest: 1\ndomain: vm1\n\
             uuid: \"6ba7b810-9dad-11d1-80b4-00c04fd430c8\"\nbackup: tue\n\
             begun: 2026-11-24T22:00:00Z\nbegun-unix: 1795557600\ncheckpoint: tue\n\
             checkpoint-unix: 1795557600\nbase: null\nbase-unix: null\nslice-size: 8388608\n\
             disks:\n  vda:\n    size: 21474836480\n    slices: 2560\n  \"no\":\n    size: 1\n    \
             slices: 1\n"
        );
    }

    proptest! {
        #[test]
        fn what_is_written_can_be_read(
            domain in "\\PC*|[\"\\\\\n\t: #a]*",
            uuid in proptest::option::of("null|[0-9a-f-]{1,36}"),
            backup in "null|[a-z0-9_-]{1,9}",
            begun in prop_oneof![0..u64::MAX, 0..2_000_000_000u64],
            base in proptest::option::of(("[a-z0-9_-]{1,9}", any::<u64>())),
            slice in 1..u64::MAX,
            disks in proptest::collection::btree_map(
                "[a-z0-9]{1,4}|[\"\\\\: #\n]{1,4}|\\PC{1,4}", 0..1u64 << 50, 0..4,
            ),
        ) {
            let manifest = Manifest {
                domain,
                uuid,
                backup: name(&backup),
                begun,
                checkpoint: None,
                base: base.map(|(text, unix)| Point { name: name(&text), unix }),
                slice_size: slice,
                disks: disks
                    .into_iter()
                    .map(|(target, size)| ManifestDisk { target, size })
                    .collect(),
            };
            prop_assert_eq!(Manifest::read(&manifest.write()).unwrap(), manifest);
        }

        #[test]
        fn no_text_makes_it_fall_over(
            cut in 0usize..300, more in "\\PC{0,3}", lines in "(\\PC{0,9}[:\" \n]{1,3}){0,9}",
        ) {
            let mut text = tuesday().write();
            text.truncate(cut);
            let _ = Manifest::read(&(text + &more));
            let _ = Manifest::read(&lines);
        }
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        let text = tuesday().write();
        for (old, new, why) in [
            ("manifest: 1", "manifest: 2", "form 2 is not known"),
            ("slices: 2560", "slices: 2559", "are not 2559 slices"),
            ("T22", "T23", "two different times"),
            ("base: null", "base: mon", "one of base and base-unix"),
            ("domain: vm1\n", "", "it has no domain"),
            ("    size: 1\n", "", "the disk no has no size"),
            ("uuid", "domain", "domain is there twice"),
            ("\"no\"", "vda", "the disk vda is there twice"),
            ("size: 8388608", "size: 0", "slice-size is 0"),
            ("size: 8388608", "size: +8", "no number"),
            ("vda:\n", "vda\n", "line 13 cannot be read"),
            ("backup: tue", "backup: a/b", "cannot be a name"),
            ("slices: 1\n", "slices: 1", "cut short"),
        ] {
            assert!(text.contains(old), "{old}");
            let said = Manifest::read(&text.replacen(old, new, 1)).unwrap_err();
            assert!(said.message().contains(why), "{said}");
        }
        let later = text.replace("disks:", "# more\nlater: \"x\"\nother:\n  a: b\ndisks:");
        assert_eq!(Manifest::read(&later).unwrap(), tuesday());
    }
}
