//! Life cycles: what it takes to make, use and end checkpoints and backups of one domain.
//!
//! ```text
//!   Domain ──┬── Store      what is remembered of checkpoints, on disk
//!            ├── history    which checkpoints can be trusted, on which disk; pure
//!            ├── Backup     frozen disks and their maps, made once
//!            └── Backend    the domain itself
//! ```
//!
//! Where somebody else keeps the checkpoints, `kept` mirrors them and the store only remembers.
//!
//! Changes go one at a time, under one lock; looking and reading take no part in it, so a slow
//! domain never holds up `ls` or a read of another backup.

mod backup;
mod backups;
mod checkpoints;
mod disk_map;
mod documents;
mod domain;
mod history;
mod hub;
mod job;
mod kept;
mod listing;
mod once;
mod recovery;
mod redefine;
mod request;
mod stamps;
mod status;
mod store;

pub use backup::{Backup, BackupDisk, Since};
pub use documents::{CreateFlags, DescribeFlags};
pub use domain::{CheckpointEntry, Domain, Options};
pub use job::{Head, Job, Push, PushDisk};
pub use listing::ListFilter;
pub use request::{
    BackupRequest, Base, BitmapRequest, CheckpointRequest, CopyRequest, OwnCheckpoint, PullDisk,
    Redefinition, Work,
};
pub use status::{CheckpointStatus, DiskStatus};
pub use store::Store;
