//! What the three kinds of `status` file say.

use std::time::SystemTime;

use super::Facts;
use super::attr::instant;
use crate::engine::{Backup, BackupDisk, CheckpointStatus, DiskStatus, Domain};
use crate::model::Checkpoint;
use crate::view::yaml::Yaml;

/// `status` of the mount.
pub(super) fn mount(domain: &Domain, facts: &Facts, mounted: SystemTime) -> String {
    let info = domain.info();
    let failure = domain.failure();
    let mut y = Yaml::new();
    y.string(
        "state",
        if failure.is_some() {
            "lost"
        } else {
            "connected"
        },
    );
    if let Some(why) = failure {
        y.string("why", &why.to_string());
    }
    y.plain("version", env!("CARGO_PKG_VERSION"))
        .plain("pid", std::process::id())
        .string("domain", &info.name)
        .string_or_none("uuid", info.uuid.as_deref())
        .string("source", &facts.source)
        .plain("mounted", instant(mounted).0)
        .plain("checkpoints", domain.checkpoints().len())
        .plain("backups", domain.backups().len())
        .nested("options", |y| {
            for (name, value) in &facts.options {
                y.string(name, value);
            }
        });
    y.finish()
}

/// `status` of a checkpoint.
pub(super) fn checkpoint(checkpoint: &Checkpoint, standing: &CheckpointStatus) -> String {
    let (created, created_unix) = instant(checkpoint.created);
    let mut y = Yaml::new();
    y.string("checkpoint", checkpoint.name.as_str())
        .string_or_none("parent", checkpoint.parent.as_ref().map(|p| p.as_str()))
        .plain("created", created)
        .plain("created-unix", created_unix)
        .nested("disks", |y| {
            for disk in &standing.disks {
                checkpoint_disk(y, disk);
            }
        });
    y.finish()
}

fn checkpoint_disk(y: &mut Yaml, disk: &DiskStatus) {
    match disk {
        DiskStatus::Trusted {
            target,
            recording,
            changed_at_most,
        } => y.nested(target, |y| {
            y.string("state", "trusted")
                .truth("recording", *recording)
                .plain("changed-at-most", changed_at_most);
        }),
        DiskStatus::Broken { target, why } => y.nested(target, |y| {
            y.string("state", "broken").string("why", why);
        }),
        DiskStatus::Absent { target } => y.nested(target, |y| {
            y.string("state", "absent");
        }),
    };
}

/// `status` of a backup.
pub(super) fn backup(backup: &Backup) -> String {
    let failure = backup.failure();
    let (begun, begun_unix) = instant(backup.begun());
    let mut y = Yaml::new();
    y.string(
        "state",
        if failure.is_some() {
            "failed"
        } else {
            "running"
        },
    );
    if let Some(why) = failure {
        y.string("why", &why.to_string());
    }
    y.string("mode", "pull")
        .plain("job", backup.id())
        .string_or_none("base", backup.base().map(|b| b.name.as_str()))
        .string_or_none("checkpoint", backup.checkpoint().map(|c| c.as_str()))
        .plain("begun", begun)
        .plain("begun-unix", begun_unix)
        .plain("bytes-pulled", backup.bytes_pulled())
        .plain("scratch-used", backup.scratch_used())
        .number_or_none("scratch-limit", backup.scratch_limit())
        .truth("current", false)
        .nested("disks", |y| {
            for disk in backup.disks() {
                y.nested(disk.target(), |y| backup_disk(y, backup, disk));
            }
        });
    y.finish()
}

fn backup_disk(y: &mut Yaml, backup: &Backup, disk: &BackupDisk) {
    let covered = backup
        .checkpoint_record()
        .is_some_and(|c| c.disk(disk.target()).is_some());
    y.plain("size", disk.size())
        .string("format", disk.format())
        .truth("checkpoint", covered);
    if let (false, Some(why)) = (covered, disk.note()) {
        y.string("no-checkpoint-because", why);
    }
    let oldest = backup.since().iter().find(|s| disk.knows_since(s.id));
    y.string_or_none("trusted-since", oldest.map(|s| s.name.as_str()));
    if let Some(why) = disk.broken() {
        y.string("broken-before", why);
    }
}
