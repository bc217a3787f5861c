//! Documents as requests, and what there is as documents.
//!
//! A document names disks by target or by image, and checkpoints by name. What it names is looked
//! up here, under the lock of the change that it asks for, so that every refusal can say the line.

use std::sync::Arc;

use super::backup::{Backup, BackupDisk};
use super::checkpoints::no_checkpoint;
use super::domain::{CheckpointEntry, Domain};
use super::job::{Job, Push, PushDisk};
use super::request::{
    BackupRequest, Base, BitmapRequest, CheckpointRequest, CopyRequest, OwnCheckpoint, PullDisk,
    Redefinition, Work,
};
use crate::model::{Disk, Format, Image, JobId, Mode, Name, Result, Target};
use crate::xml::{
    At, BackupDocument, BackupDocumentDisk, BackupMode, CheckpointDocument, Place, Server,
};

/// Flags of virDomainCheckpointCreateXML, for what a document cannot say itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CreateFlags {
    /// REDEFINE: the bitmaps are there.
    pub redefine: bool,
    /// REDEFINE_VALIDATE: and must be sound.
    pub validate: bool,
    /// QUIESCE: freeze the guest's file systems at the instant.
    pub quiesce: bool,
}

/// Flags of virDomainCheckpointGetXMLDesc.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DescribeFlags {
    /// NO_DOMAIN: leave the domain out.
    pub no_domain: bool,
    /// SIZE: say how much changed since, disk by disk. Asks the domain.
    pub size: bool,
}

impl Domain {
    /// virDomainCheckpointCreateXML. Without a name in the document, or with the same one, it is
    /// called `name`. EINVAL with the line where the document cannot be.
    pub fn create_checkpoint_xml(
        &self,
        name: &Name,
        document: &[u8],
        flags: CreateFlags,
    ) -> Result<()> {
        let document = CheckpointDocument::read(document)
            .map_err(|e| e.into_refusal())
            .and_then(|d| named(&d, name).map(|()| d))
            .map_err(|e| e.during(format!("create checkpoint {name}")))?;
        if flags.redefine {
            return self.redefine_with(name, |disks| {
                self.redefinition(name, &document, disks, flags.validate)
            });
        }
        self.create_with(name, |disks| {
            let request = checkpoint_request(name, &document, disks)?;
            Ok(CheckpointRequest {
                quiesce: flags.quiesce,
                ..request
            })
        })
    }

    /// The same for a file `checkpoints/NAME.xml`, which has no flags: a document that says when the
    /// checkpoint was made describes one that was there. It is redefined, and must be borne out.
    pub fn create_checkpoint_from(&self, name: &Name, document: &[u8]) -> Result<()> {
        let saved = CheckpointDocument::read(document).is_ok_and(|d| d.creation_time.is_some());
        let flags = CreateFlags {
            redefine: saved,
            validate: saved,
            quiesce: false,
        };
        self.create_checkpoint_xml(name, document, flags)
    }

    /// virDomainBackupBegin: the job id. EINVAL with the line where the document cannot be.
    pub fn begin_backup_from(&self, name: &Name, document: &[u8]) -> Result<JobId> {
        self.begin_backup_xml(name, document, None, false)
    }

    /// The same with the call's second document and its flag REUSE_EXTERNAL: the targets of a push
    /// backup are there already.
    pub fn begin_backup_xml(
        &self,
        name: &Name,
        document: &[u8],
        checkpoint: Option<&[u8]>,
        reuse_external: bool,
    ) -> Result<JobId> {
        let read = || {
            let mut document = BackupDocument::read(document)?;
            if let Some(checkpoint) = checkpoint {
                document.checkpoint = Some(CheckpointDocument::read(checkpoint)?);
            }
            Ok(document)
        };
        let document = read().map_err(|e: crate::xml::Error| {
            e.into_refusal().during(format!("begin backup {name}"))
        })?;
        let job = self.begin_with(name, |disks| {
            self.backup_request(name, &document, disks, reuse_external)
        })?;
        Ok(job.id())
    }

    /// virDomainCheckpointGetXMLDesc.
    pub fn checkpoint_xml(&self, name: &Name, flags: DescribeFlags) -> Result<String> {
        let entry = self.checkpoint(name.as_str());
        let entry = entry.ok_or_else(|| no_checkpoint(name))?;
        let info = self.info();
        let domain = (!flags.no_domain).then_some(&info);
        let mut document = CheckpointDocument::describe(&entry.checkpoint, domain);
        if flags.size {
            let status = self.checkpoint_status(entry.id)?;
            for disk in &mut document.disks {
                let mut standing = status.disks.iter();
                let size = standing.find_map(|s| s.changed_at_most(&disk.name));
                if let Some(bitmap) = &mut disk.bitmap {
                    bitmap.size = size;
                }
            }
        }
        Ok(document.write())
    }

    /// virDomainBackupGetXMLDesc; 0 means the only job there is.
    pub fn backup_xml(&self, id: JobId) -> Result<String> {
        Ok(self.known_job(id)?.xml())
    }

    fn redefinition(
        &self,
        name: &Name,
        document: &CheckpointDocument,
        disks: &[Disk],
        validate: bool,
    ) -> Result<Redefinition> {
        let Some(created) = document.created() else {
            let why = "to be redefined, a checkpoint needs <creationTime>";
            return Err(document.place.refuse(why).into_refusal());
        };
        if let (Some(domain), Some(uuid)) = (&document.domain, self.info().uuid)
            && let Some(other) = domain
                .uuid
                .as_ref()
                .filter(|u| !u.eq_ignore_ascii_case(&uuid))
        {
            let why = format!("the checkpoint is of domain {other}, and this is {uuid}");
            return Err(domain.place.refuse(why).into_refusal());
        }
        Ok(Redefinition {
            checkpoint: checkpoint_request(name, document, disks)?,
            created,
            parent: document.parent.as_ref().map(|p| p.value.clone()),
            validate,
        })
    }

    fn backup_request(
        &self,
        name: &Name,
        document: &BackupDocument,
        disks: &[Disk],
        reuse: bool,
    ) -> Result<BackupRequest> {
        if let Some(base) = &document.incremental {
            self.known_checkpoint(&base.value, base.place)?;
        }
        let mut wanted = Vec::new();
        for entry in &document.disks {
            let disk = known_disk(disks, &entry.name, entry.place)?;
            if let Some(base) = &entry.incremental {
                self.known_checkpoint(base, entry.place)?;
            }
            if entry.backup {
                wanted.push((disk, entry.clone()));
            }
        }
        once(wanted.iter().map(|(d, e)| (*d, e.place)))?;
        if document.disks.is_empty() {
            let all = disks.iter();
            wanted = all
                .map(|d| (d, BackupDocumentDisk::new(&d.target)))
                .collect();
        } else if wanted.is_empty() {
            let why = "no disk takes part";
            return Err(document.place.refuse(why).into_refusal());
        }
        let work = match document.mode {
            Mode::Pull => {
                let server = document.server.as_ref().map(|s| s.address.clone());
                let pull =
                    |(disk, entry): &(&Disk, BackupDocumentDisk)| pull_disk(disk, entry, document);
                let disks = wanted.iter().map(pull).collect::<Result<_>>()?;
                Work::Pull(disks, server)
            }
            Mode::Push => {
                let copy = |(disk, entry): &(&Disk, BackupDocumentDisk)| {
                    copy_request(name, disk, entry, document, reuse)
                };
                Work::Push(wanted.iter().map(copy).collect::<Result<_>>()?)
            }
        };
        Ok(BackupRequest {
            name: name.clone(),
            work,
            checkpoint: own_checkpoint(name, document, disks)?,
        })
    }

    fn known_checkpoint(&self, name: &Name, place: Place) -> Result<Arc<CheckpointEntry>> {
        self.checkpoint(name.as_str()).ok_or_else(|| {
            let why = format!("there is no checkpoint {name}");
            place.refuse(why).into_refusal()
        })
    }
}

impl Job {
    /// The `<domainbackup>` that describes it. Asks nobody.
    pub fn xml(&self) -> String {
        match self {
            Self::Pull(backup) => pull_document(backup).write(),
            Self::Push(push) => push_document(push).write(),
        }
    }
}

/// A document's own name must not contradict the file's.
fn named(document: &CheckpointDocument, name: &Name) -> Result<()> {
    match &document.name {
        Some(own) if own.value != *name => {
            let why = format!(
                "the document calls the checkpoint {}, not {name}",
                own.value
            );
            Err(own.place.refuse(why).into_refusal())
        }
        _ => Ok(()),
    }
}

fn checkpoint_request(
    name: &Name,
    document: &CheckpointDocument,
    disks: &[Disk],
) -> Result<CheckpointRequest> {
    let mut listed = Vec::new();
    for entry in &document.disks {
        let disk = known_disk(disks, &entry.name, entry.place)?;
        listed.push((disk, entry.place));
    }
    once(listed.into_iter())?;
    let taking_part = document.disks.iter().filter_map(|entry| {
        let bitmap = entry.bitmap.as_ref()?;
        let disk = known_disk(disks, &entry.name, entry.place).ok()?;
        Some(BitmapRequest {
            disk: disk.target.clone(),
            bitmap: bitmap.name.clone(),
        })
    });
    let wanted: Vec<BitmapRequest> = taking_part.collect();
    if wanted.is_empty() && !document.disks.is_empty() {
        let why = "no disk takes part";
        return Err(document.place.refuse(why).into_refusal());
    }
    Ok(CheckpointRequest {
        name: name.clone(),
        description: document.description.clone(),
        disks: (!document.disks.is_empty()).then_some(wanted),
        quiesce: false,
    })
}

/// The checkpoint that a backup's document asks for: none if no disk takes part in it.
fn own_checkpoint(name: &Name, document: &BackupDocument, disks: &[Disk]) -> Result<OwnCheckpoint> {
    let Some(own) = &document.checkpoint else {
        return Ok(OwnCheckpoint::Usual);
    };
    if own.creation_time.is_some() || own.parent.is_some() {
        let why = "a backup makes a new checkpoint: <creationTime> and <parent> cannot be chosen";
        return Err(own.place.refuse(why).into_refusal());
    }
    let listed = &own.disks;
    if !listed.is_empty() && listed.iter().all(|d| d.bitmap.is_none()) {
        for entry in listed {
            known_disk(disks, &entry.name, entry.place)?;
        }
        return Ok(OwnCheckpoint::No);
    }
    let name = own.name.as_ref().map_or(name, |own| &own.value);
    Ok(OwnCheckpoint::Make(checkpoint_request(name, own, disks)?))
}

/// The disk of this target, or of this image.
fn known_disk<'a>(disks: &'a [Disk], name: &str, place: Place) -> Result<&'a Disk> {
    let by_target = disks.iter().find(|d| d.target == name);
    let by_image = || disks.iter().find(|d| d.file.as_deref() == Some(name));
    by_target.or_else(by_image).ok_or_else(|| {
        let there: Vec<&str> = disks.iter().map(|d| d.target.as_str()).collect();
        let why = format!(
            "the domain has no disk {name:?}: there are {}",
            there.join(", ")
        );
        place.refuse(why).into_refusal()
    })
}

/// A disk by its target and again by its image is twice all the same.
fn once<'a>(disks: impl Iterator<Item = (&'a Disk, Place)>) -> Result<()> {
    let mut seen = std::collections::HashSet::new();
    for (disk, place) in disks {
        if !seen.insert(&disk.target) {
            let why = format!("disk {} is listed twice", disk.target);
            return Err(place.refuse(why).into_refusal());
        }
    }
    Ok(())
}

fn base(entry: &BackupDocumentDisk, document: &BackupDocument) -> Base {
    let own = entry.incremental.as_ref();
    let all = document.incremental.as_ref().map(|At { value, .. }| value);
    match (entry.backup_mode, own.or(all)) {
        (Some(BackupMode::Full), _) | (_, None) => Base::Full,
        (_, Some(name)) => Base::Since(name.clone()),
    }
}

fn pull_disk(
    disk: &Disk,
    entry: &BackupDocumentDisk,
    document: &BackupDocument,
) -> Result<PullDisk> {
    if document.server.is_none() && (entry.export_name.is_some() || entry.export_bitmap.is_some()) {
        let why = "exportname= and exportbitmap= are for other NBD clients: that needs <server>";
        return Err(entry.place.refuse(why).into_refusal());
    }
    let scratch = match &entry.image {
        None => None,
        Some(Image::File(path)) => Some(path.clone()),
        Some(Image::Block(_)) => {
            let why = "scratch space on a block device is not supported: name a file";
            return Err(entry.place.refuse(why).into_refusal());
        }
    };
    Ok(PullDisk {
        disk: disk.target.clone(),
        base: base(entry, document),
        export_name: entry.export_name.clone(),
        export_bitmap: entry.export_bitmap.clone(),
        scratch,
    })
}

/// What is not said is as in libvirt: a qcow2 image beside the disk's own, named after the backup.
fn copy_request(
    name: &Name,
    disk: &Disk,
    entry: &BackupDocumentDisk,
    document: &BackupDocument,
    reuse: bool,
) -> Result<CopyRequest> {
    let image = match (&entry.image, &disk.file) {
        (Some(image), _) => image.clone(),
        (None, Some(own)) if own.starts_with('/') => Image::File(format!("{own}.{name}")),
        (None, _) => {
            let why = format!(
                "disk {} is in no file: say where to with <target>",
                disk.target
            );
            return Err(entry.place.refuse(why).into_refusal());
        }
    };
    let format = entry.format.unwrap_or(Format::Qcow2);
    let base = base(entry, document);
    // A device is there. And changes alone, as raw, are of use only on top of an older copy.
    let device = matches!(image, Image::Block(_));
    let update = format == Format::Raw && matches!(base, Base::Since(_));
    Ok(CopyRequest {
        disk: disk.target.clone(),
        target: Target {
            image,
            format,
            existing: reuse || device || update,
        },
        base,
    })
}

fn pull_document(backup: &Backup) -> BackupDocument {
    let base = backup.base();
    let disk = |disk: &BackupDisk| {
        let known = disk.base().filter(|b| disk.knows_since(b.id));
        let export = disk.export();
        BackupDocumentDisk {
            export_name: export.map(|e| e.name.clone()),
            export_bitmap: export.and_then(|e| Some(e.bitmap.as_ref()?.0.clone())),
            // Said only where it is not what the document's <incremental> implies.
            backup_mode: match (base, known) {
                (Some(_), None) => Some(BackupMode::Full),
                (None, Some(_)) => Some(BackupMode::Incremental),
                _ => None,
            },
            incremental: known.filter(|_| base.is_none()).map(|b| b.name.clone()),
            ..BackupDocumentDisk::new(disk.target())
        }
    };
    BackupDocument {
        mode: Mode::Pull,
        incremental: base.map(|b| b.name.clone().into()),
        server: backup.server().map(|address| Server {
            place: Place::default(),
            address: address.clone(),
        }),
        disks: backup.disks().iter().map(disk).collect(),
        ..BackupDocument::default()
    }
}

fn push_document(push: &Push) -> BackupDocument {
    let base = push.base();
    let disk = |disk: &PushDisk| {
        // What differs from the document's <incremental> is said of the disk.
        let (backup_mode, incremental) = match &disk.base {
            own if own.as_ref() == base => (None, None),
            Some(own) => (Some(BackupMode::Incremental), Some(own.clone())),
            None => (Some(BackupMode::Full), None),
        };
        BackupDocumentDisk {
            backup_mode,
            incremental,
            image: Some(disk.target.image.clone()),
            format: Some(disk.target.format),
            ..BackupDocumentDisk::new(&disk.disk)
        }
    };
    BackupDocument {
        mode: Mode::Push,
        incremental: base.map(|b| b.clone().into()),
        disks: push.disks().iter().map(disk).collect(),
        ..BackupDocument::default()
    }
}
