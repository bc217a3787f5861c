//! Backups as jobs: who copies, how they end, what is told of them while they run.

use std::time::SystemTime;

use super::{Error, JobId, Name};

/// Who copies the disks of a backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Mode {
    /// QEMU, into files or devices: what libvirt takes a document to mean that does not say.
    #[default]
    Push,
    /// Whoever reads the frozen disks.
    Pull,
}

impl Mode {
    /// libvirt's word for it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Pull => "pull",
            Self::Push => "push",
        }
    }
}

/// How a backup ended. The third of the RFC's three states is an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// Every disk could be read, or was written, in full.
    Completed,
    /// It was broken off: what was copied is no backup.
    Aborted,
}

impl Outcome {
    /// The word for it in `status` and in events.
    pub fn word(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Aborted => "aborted",
        }
    }
}

/// How a job stands.
#[derive(Debug, Clone)]
pub enum JobState {
    /// A pull backup can be read; a push backup is being written.
    Running,
    /// A push backup that was told to wait.
    Paused,
    /// It is over; the targets of a push backup are closed.
    Ended(Outcome),
    /// It is over, and not as it should be.
    Failed(Error),
}

impl JobState {
    /// The word for it in `status` and in lists.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Ended(outcome) => outcome.word(),
            Self::Failed(_) => "failed",
        }
    }
}

/// What is told of a job: virDomainGetJobStats for one of several.
#[derive(Debug, Clone)]
pub struct JobInfo {
    /// The job id.
    pub id: JobId,
    /// The backup's name.
    pub name: Name,
    /// Who copies.
    pub mode: Mode,
    /// How it stands.
    pub state: JobState,
    /// The frozen instant.
    pub begun: SystemTime,
    /// Bytes there are to copy. Of a pull backup: the size of the disks.
    pub total: u64,
    /// Bytes copied so far. Of a pull backup: bytes fetched from the domain.
    pub done: u64,
    /// Bytes of scratch space taken so far.
    pub scratch_used: u64,
    /// Bytes of scratch space it may take, where that is limited.
    pub scratch_limit: Option<u64>,
}

/// What a running job can be told, besides to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Control {
    /// Break it off; what was copied is no backup.
    Abort,
    /// Copy no further for now.
    Pause,
    /// Go on copying.
    Resume,
    /// Copy so many bytes a second at most; 0 is no limit.
    Speed(u64),
}

/// Something that happened to a domain's jobs or checkpoints.
#[derive(Debug, Clone)]
pub struct Event {
    /// When.
    pub time: SystemTime,
    /// What.
    pub what: Happening,
}

/// What an [`Event`] tells.
#[derive(Debug, Clone)]
pub enum Happening {
    /// A job is over: completed, aborted, or failed for a reason.
    JobCompleted {
        /// The job id.
        id: JobId,
        /// The backup's name.
        name: Name,
        /// Who copied.
        mode: Mode,
        /// How it ended, or why it failed.
        outcome: Result<Outcome, Error>,
    },
    /// Scratch space gets short: the backup is ended when it is used up. Told once a job.
    ScratchThreshold {
        /// The job id.
        id: JobId,
        /// The backup's name.
        name: Name,
        /// Bytes taken.
        used: u64,
        /// Bytes that may be taken, as far as that is known.
        limit: u64,
    },
    /// A checkpoint can no longer be trusted on a disk. Told once.
    CheckpointBroken {
        /// The checkpoint's name.
        name: Name,
        /// The disk target.
        disk: String,
        /// Why not.
        why: String,
    },
}
