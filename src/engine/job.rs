//! Running backups of either mode, under one roof: a pull backup is read, a push backup is written
//! by QEMU and only watched here.

use std::ops::Deref;
use std::sync::Arc;
use std::time::SystemTime;

use super::backup::Backup;
use crate::backend::{Progress, Pushing};
use crate::model::{
    Checkpoint, Disk, Error, JobId, JobInfo, JobState, Kind, Mode, Name, Outcome, Result, Target,
};

/// A backup that was begun and not yet removed.
#[derive(Clone)]
pub enum Job {
    /// Its disks can be read.
    Pull(Arc<Backup>),
    /// Its disks are written to targets.
    Push(Arc<Push>),
}

/// What every running backup has, whoever copies.
pub struct Head {
    pub(super) id: JobId,
    pub(super) name: Name,
    pub(super) begun: SystemTime,
    /// The backup's checkpoint as it was at the instant: it may be renamed or deleted later.
    pub(super) checkpoint: Option<Checkpoint>,
    /// The domain's disks as they were at the instant.
    pub(super) domain_disks: Vec<Disk>,
}

impl Head {
    /// The job id.
    pub fn id(&self) -> JobId {
        self.id
    }

    /// The backup's name.
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// The frozen instant; equals its checkpoint's creation time if it made one.
    pub fn begun(&self) -> SystemTime {
        self.begun
    }

    /// The backup's own checkpoint.
    pub fn checkpoint(&self) -> Option<&Name> {
        self.checkpoint.as_ref().map(|c| &c.name)
    }

    /// The backup's own checkpoint as it was at the instant.
    pub fn checkpoint_record(&self) -> Option<&Checkpoint> {
        self.checkpoint.as_ref()
    }

    /// The domain's disks as they were at the instant.
    pub fn domain_disks(&self) -> &[Disk] {
        &self.domain_disks
    }
}

/// A backup that QEMU writes into targets by itself.
pub struct Push {
    pub(super) head: Head,
    /// The checkpoint since which changes are copied, by name, if that is the same for all disks.
    pub(super) base: Option<Name>,
    pub(super) disks: Vec<PushDisk>,
    pub(super) pushing: Box<dyn Pushing>,
}

impl Deref for Push {
    type Target = Head;

    fn deref(&self) -> &Head {
        &self.head
    }
}

/// One disk of a push backup.
#[derive(Debug, Clone)]
pub struct PushDisk {
    /// The disk target.
    pub disk: String,
    /// Size of the disk in bytes.
    pub size: u64,
    /// What is written.
    pub target: Target,
    /// The checkpoint since which changes are copied; none: all of it.
    pub base: Option<Name>,
    /// Why the disk is not part of the backup's checkpoint, if it is not.
    pub note: Option<String>,
}

impl Deref for Job {
    type Target = Head;

    fn deref(&self) -> &Head {
        match self {
            Self::Pull(backup) => backup,
            Self::Push(push) => push,
        }
    }
}

impl Job {
    /// The backup, if its disks can be read.
    pub fn pull(&self) -> Option<&Arc<Backup>> {
        match self {
            Self::Pull(backup) => Some(backup),
            Self::Push(_) => None,
        }
    }

    /// Who copies.
    pub fn mode(&self) -> Mode {
        match self {
            Self::Pull(_) => Mode::Pull,
            Self::Push(_) => Mode::Push,
        }
    }

    /// How it stands. Of a push backup this may ask the domain.
    pub fn info(&self) -> JobInfo {
        match self {
            Self::Pull(backup) => JobInfo {
                id: backup.id(),
                name: backup.name().clone(),
                mode: Mode::Pull,
                state: backup.state(),
                begun: backup.begun(),
                total: backup.disks().iter().map(|d| d.size()).sum(),
                done: backup.bytes_pulled(),
                scratch_used: backup.scratch_used(),
                scratch_limit: backup.scratch_limit(),
            },
            Self::Push(push) => push.info(),
        }
    }
}

impl Push {
    /// The checkpoint since which changes are copied, if it is the same on every disk.
    pub fn base(&self) -> Option<&Name> {
        self.base.as_ref()
    }

    /// The disks, in the domain's order.
    pub fn disks(&self) -> &[PushDisk] {
        &self.disks
    }

    /// How each disk stands, in the order of [`disks`](Self::disks): asks the domain while it runs;
    /// the last answer if there is none now.
    pub fn progress(&self) -> Vec<Progress> {
        self.pushing.progress()
    }

    /// How the whole stands. Asks nobody.
    pub fn state(&self) -> JobState {
        self.pushing.state()
    }

    fn info(&self) -> JobInfo {
        let progress = self.progress();
        JobInfo {
            id: self.id,
            name: self.name.clone(),
            mode: Mode::Push,
            state: self.state(),
            begun: self.begun,
            total: progress.iter().map(|p| p.total).sum(),
            done: progress.iter().map(|p| p.done).sum(),
            scratch_used: 0,
            scratch_limit: None,
        }
    }

    /// Ends it, once it is over or `abort` is given.
    pub(super) fn end(&self, abort: bool) -> Result<Outcome> {
        match self.state() {
            JobState::Running | JobState::Paused if !abort => Err(still_running(&self.name)),
            _ => {
                self.pushing.end()?;
                match self.state() {
                    JobState::Ended(outcome) => Ok(outcome),
                    _ => Ok(Outcome::Aborted),
                }
            }
        }
    }
}

fn still_running(name: &Name) -> Error {
    Error::new(Kind::Busy, format!("backup {name} is still being written")).hint(format!(
        "wait until backups/{name}/status says completed, or break it off: echo abort > \
         backups/{name}/control"
    ))
}
