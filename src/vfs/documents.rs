//! Checkpoints and backups as libvirt's documents describe them.

use crate::engine::{Backup, BackupDisk, Job, Push, PushDisk};
use crate::model::{Checkpoint, DomainInfo, Mode};
use crate::xml::{BackupDocument, BackupDocumentDisk, BackupMode, CheckpointDocument};

/// `<domaincheckpoint>`
pub(super) fn checkpoint(checkpoint: &Checkpoint, domain: &DomainInfo) -> String {
    CheckpointDocument::describe(checkpoint, Some(domain)).write()
}

/// `<domainbackup>`
pub(super) fn backup(job: &Job) -> String {
    match job {
        Job::Pull(backup) => pull(backup),
        Job::Push(push) => self::push(push),
    }
    .write()
}

/// `<server>` and `exportname` are left out: the disks are read as files of the mount, and the socket
/// behind them is nobody else's.
fn pull(backup: &Backup) -> BackupDocument {
    let base = backup.base();
    let disk = |disk: &BackupDisk| {
        let known = base.is_some_and(|b| disk.knows_since(b.id));
        BackupDocumentDisk {
            // Said only where it is not what the document's <incremental> implies.
            backup_mode: (base.is_some() && !known).then_some(BackupMode::Full),
            ..BackupDocumentDisk::new(disk.target())
        }
    };
    BackupDocument {
        mode: Mode::Pull,
        incremental: base.map(|b| b.name.clone().into()),
        disks: backup.disks().iter().map(disk).collect(),
        ..BackupDocument::default()
    }
}

fn push(push: &Push) -> BackupDocument {
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
