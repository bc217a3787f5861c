//! One generation of a series: the copy of a backup, or of a part of it, and what its documents say.
//!
//! ```text
//!   tue/
//!   ├── backup.xml  checkpoint.xml  domain.xml  manifest     who, when, since when
//!   ├── raw/vda.raw   disk.raw   qcow2/vda.qcow2             all of a disk
//!   └── since/mon/vda.raw + vda.map   vda.qcow2              what changed of it since mon
//! ```
//!
//! The documents overlap, and where they do they have to agree: a directory that was copied over another
//! one is found out here.

use std::path::{Path, PathBuf};

use super::files::{names, refuse, text_if_there};
use super::slices::manifest;
use crate::model::{Name, Result};
use crate::xml::{self, BackupDocument, CheckpointDocument, DomainReference};

/// The forms in which the content of disks is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    Raw,
    Qcow2,
}

/// A checkpoint as a generation knows it; its time only if it knows that.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mark {
    pub(super) name: Name,
    pub(super) unix: Option<u64>,
}

/// A generation; see the module's comment.
#[derive(Debug, Default)]
pub(super) struct Generation {
    pub(super) dir: PathBuf,
    pub(super) backup: Option<Name>,
    /// The checkpoint that later generations' changes are since.
    pub(super) checkpoint: Option<Mark>,
    /// The checkpoint that this one's changes are since, if nobody chose another.
    pub(super) base: Option<Mark>,
    pub(super) domain: Option<String>,
    pub(super) uuid: Option<String>,
    pub(super) begun: Option<u64>,
    /// The disks in the domain's order, with their sizes where those are known.
    pub(super) disks: Vec<(String, Option<u64>)>,
}

impl Generation {
    /// Reads the documents of a directory.
    pub(super) fn read(dir: &Path) -> Result<Self> {
        let mut found = Self {
            dir: dir.to_owned(),
            ..Self::default()
        };
        if let Some(manifest) = manifest(&dir.join("manifest"))? {
            let mark = |p: crate::view::manifest::Point| Mark {
                name: p.name,
                unix: Some(p.unix),
            };
            found.backup = Some(manifest.backup);
            found.checkpoint = manifest.checkpoint.map(mark);
            found.base = manifest.base.map(mark);
            found.domain = Some(manifest.domain);
            found.uuid = manifest.uuid;
            found.begun = Some(manifest.begun);
            let disks = manifest.disks.into_iter();
            found.disks = disks.map(|d| (d.target, Some(d.size))).collect();
        }
        if let Some(document) = document(dir, "backup.xml", BackupDocument::read)? {
            found.add_backup(document)?;
        }
        if let Some(document) = document(dir, "checkpoint.xml", CheckpointDocument::read)? {
            let of = document.domain.unwrap_or_default();
            let mark = document.name.map(|name| Mark {
                name: name.value,
                unix: document.creation_time,
            });
            found.checkpoint = found.agree("its checkpoint", found.checkpoint.clone(), mark)?;
            found.add_domain(of)?;
        }
        if let Some(of) = document(dir, "domain.xml", DomainReference::read)? {
            found.add_domain(of)?;
        }
        Ok(found)
    }

    fn add_backup(&mut self, document: BackupDocument) -> Result<()> {
        let mut disks = document.disks.iter();
        let base = document.incremental.map(|at| at.value);
        let base = base.or_else(|| disks.find_map(|d| d.incremental.clone()));
        let base = base.map(|name| Mark { name, unix: None });
        self.base = self.agree("its base", self.base.clone(), base)?;
        if self.disks.is_empty() {
            let disks = document.disks.into_iter().filter(|d| d.backup);
            self.disks = disks.map(|d| (d.name, None)).collect();
        }
        Ok(())
    }

    fn add_domain(&mut self, of: DomainReference) -> Result<()> {
        if let (Some(one), Some(other)) = (&self.uuid, &of.uuid)
            && !one.eq_ignore_ascii_case(other)
        {
            return Err(self.mixed("its domain", one, other));
        }
        self.uuid = self.uuid.take().or(of.uuid);
        self.domain = self.domain.take().or(of.name);
        Ok(())
    }

    /// What two documents say, if it does not contradict.
    fn agree(&self, what: &str, one: Option<Mark>, other: Option<Mark>) -> Result<Option<Mark>> {
        let (Some(one), Some(other)) = (&one, &other) else {
            return Ok(one.or(other));
        };
        if one.name != other.name {
            return Err(self.mixed(what, &one.name, &other.name));
        }
        match (one.unix, other.unix) {
            (Some(a), Some(b)) if a != b => Err(self.mixed(&format!("{what}'s time"), &a, &b)),
            (a, b) => Ok(Some(Mark {
                name: one.name.clone(),
                unix: a.or(b),
            })),
        }
    }

    fn mixed(
        &self,
        what: &str,
        one: &dyn std::fmt::Display,
        other: &dyn std::fmt::Display,
    ) -> crate::model::Error {
        refuse(format!(
            "the documents in {} are not of one backup: {what} is {one} and {other}",
            self.dir.display()
        ))
    }

    /// What it is called: after its backup, its checkpoint, or its directory.
    pub(super) fn name(&self) -> String {
        let checkpoint = self.checkpoint.as_ref().map(|c| &c.name);
        match self.backup.as_ref().or(checkpoint) {
            Some(name) => name.to_string(),
            None => match self.dir.file_name() {
                Some(name) => name.to_string_lossy().into_owned(),
                None => self.dir.display().to_string(),
            },
        }
    }

    /// Whether somebody may mean it by this name.
    pub(super) fn is_called(&self, name: &str) -> bool {
        let checkpoint = self.checkpoint.as_ref().map(|c| &c.name);
        let mut names = [self.backup.as_ref(), checkpoint].into_iter().flatten();
        names.any(|n| n.as_str() == name) || self.name() == name
    }

    /// Its instant, as well as it is known.
    pub(super) fn unix(&self) -> Option<u64> {
        self.begun.or(self.checkpoint.as_ref().and_then(|c| c.unix))
    }

    /// The size of a disk, where a document tells it.
    pub(super) fn size(&self, disk: &str) -> Option<u64> {
        let mut disks = self.disks.iter();
        disks.find(|(target, _)| target == disk)?.1
    }

    /// The file that holds all of a disk.
    pub(super) fn whole(&self, disk: &str, form: Form) -> Option<PathBuf> {
        let first = self.disks.first().is_some_and(|(first, _)| first == disk);
        let mut places = match form {
            Form::Raw => vec![self.dir.join("raw").join(format!("{disk}.raw"))],
            Form::Qcow2 => vec![self.dir.join("qcow2").join(format!("{disk}.qcow2"))],
        };
        if first && form == Form::Raw {
            places.push(self.dir.join("disk.raw"));
        }
        places.into_iter().find(|path| path.exists())
    }

    /// The file that holds what changed of a disk since a checkpoint.
    pub(super) fn changes(&self, base: &Name, disk: &str, form: Form) -> PathBuf {
        let extension = match form {
            Form::Raw => "raw",
            Form::Qcow2 => "qcow2",
        };
        self.changes_file(base, disk, extension)
    }

    /// The map of the same.
    pub(super) fn map(&self, base: &Name, disk: &str) -> PathBuf {
        self.changes_file(base, disk, "map")
    }

    fn changes_file(&self, base: &Name, disk: &str, extension: &str) -> PathBuf {
        let dir = self.dir.join("since").join(base.as_str());
        dir.join(format!("{disk}.{extension}"))
    }

    /// The checkpoints since which it has the changes of a disk.
    pub(super) fn bases(&self, disk: &str, form: Form) -> Result<Vec<Name>> {
        let own = self.checkpoint.as_ref().map(|c| c.name.as_str());
        let mut bases: Vec<Name> = names(&self.dir.join("since"))?
            .iter()
            // A backup of a checkpoint that was there before it lists what changed since that, too.
            .filter(|name| Some(name.as_str()) != own)
            .filter_map(|name| Name::new(name).ok())
            .filter(|base| self.changes(base, disk, form).exists())
            .collect();
        // The one that was meant comes first.
        bases.sort_by_key(|name| self.base.as_ref().is_none_or(|base| base.name != *name));
        Ok(bases)
    }

    /// The disks that there is something of, in the domain's order.
    pub(super) fn held(&self) -> Result<Vec<String>> {
        let mut files = names(&self.dir.join("raw"))?;
        files.extend(names(&self.dir.join("qcow2"))?);
        for base in names(&self.dir.join("since"))? {
            files.extend(names(&self.dir.join("since").join(base))?);
        }
        if self.dir.join("disk.raw").exists() {
            files.extend(self.disks.first().map(|(first, _)| format!("{first}.raw")));
        }
        let disk = |file: &String| {
            let (disk, extension) = file.rsplit_once('.')?;
            matches!(extension, "raw" | "qcow2").then(|| disk.to_owned())
        };
        let mut held: Vec<String> = files.iter().filter_map(disk).collect();
        let place = |disk: &String| self.disks.iter().position(|(d, _)| d == disk);
        held.sort_by_key(|disk| (place(disk).unwrap_or(usize::MAX), disk.clone()));
        held.dedup();
        Ok(held)
    }
}

/// Reads a document, if it is there.
fn document<T>(
    dir: &Path,
    name: &str,
    read: impl Fn(&[u8]) -> std::result::Result<T, xml::Error>,
) -> Result<Option<T>> {
    let path = dir.join(name);
    let Some(bytes) = text_if_there(&path)? else {
        return Ok(None);
    };
    match read(&bytes) {
        Ok(document) => Ok(Some(document)),
        Err(e) => Err(e.into_refusal().during(path.display())),
    }
}
