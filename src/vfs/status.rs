//! What the kinds of `status` file say.

use std::time::SystemTime;

use super::Facts;
use super::attr::instant;
use crate::backend::Progress;
use crate::engine::{Backup, BackupDisk, CheckpointStatus, DiskStatus, Domain, Push, PushDisk};
use crate::model::{Checkpoint, JobState, Mode, Name};
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
        .plain("backups", domain.jobs().len())
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

/// `status` of a pull backup.
pub(super) fn pull(backup: &Backup) -> String {
    let (begun, begun_unix) = instant(backup.begun());
    let mut y = Yaml::new();
    state(&mut y, &backup.state());
    y.string("mode", Mode::Pull.word())
        .plain("job", backup.id())
        .string_or_none("base", backup.base().map(|b| b.name.as_str()))
        .string_or_none("checkpoint", backup.checkpoint().map(|c| c.as_str()))
        .plain("begun", begun)
        .plain("begun-unix", begun_unix)
        .plain("bytes-pulled", backup.bytes_pulled())
        .plain("scratch-used", backup.scratch_used())
        .number_or_none("scratch-limit", backup.scratch_limit())
        .truth("current", backup.holds_current());
    if let Some(why) = backup.only_base() {
        y.string("since-base-only-because", why);
    }
    y.nested("disks", |y| {
        for disk in backup.disks() {
            y.nested(disk.target(), |y| pull_disk(y, backup, disk));
        }
    });
    y.finish()
}

fn pull_disk(y: &mut Yaml, backup: &Backup, disk: &BackupDisk) {
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

/// `status` of a push backup. Asks the domain.
pub(super) fn push(push: &Push) -> String {
    // In this order: what ends in between is not shown as running with all of it done.
    let progress = push.progress();
    let (begun, begun_unix) = instant(push.begun());
    let mut y = Yaml::new();
    state(&mut y, &push.state());
    y.string("mode", Mode::Push.word())
        .plain("job", push.id())
        .string_or_none("base", push.base().map(|b| b.as_str()))
        .string_or_none("checkpoint", push.checkpoint().map(Name::as_str))
        .plain("begun", begun)
        .plain("begun-unix", begun_unix)
        .plain("total", progress.iter().map(|p| p.total).sum::<u64>())
        .plain("done", progress.iter().map(|p| p.done).sum::<u64>())
        .nested("disks", |y| {
            for (disk, progress) in push.disks().iter().zip(&progress) {
                y.nested(&disk.disk, |y| push_disk(y, disk, progress));
            }
        });
    y.finish()
}

fn push_disk(y: &mut Yaml, disk: &PushDisk, progress: &Progress) {
    state(y, &progress.state);
    y.plain("total", progress.total)
        .plain("done", progress.done)
        .string("target", disk.target.image.path())
        .string("format", disk.target.format.word())
        .string_or_none("base", disk.base.as_ref().map(|b| b.as_str()));
    if let Some(why) = &disk.note {
        y.string("no-checkpoint-because", why);
    }
}

/// How a job or a part of it stands, and why if it failed.
fn state(y: &mut Yaml, state: &JobState) {
    y.string("state", state.word());
    if let JobState::Failed(why) = state {
        y.string("why", &why.to_string());
    }
}
