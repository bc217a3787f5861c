//! The words of the domain, as libvirt and QEMU use them. No I/O, no threads, no clocks.

mod backup;
mod checkpoint;
mod disk;
mod error;
mod extents;
mod job;
mod name;
mod size;
mod target;

pub use backup::{BackupPlan, CopyDisk, FreezeDisk, JobId, PublicExport, PushPlan};
pub use checkpoint::{
    Broken, Checkpoint, CheckpointDisk, CheckpointRemoval, NewBitmap, NewCheckpoint, RemoveBitmap,
    RenameBitmap,
};
pub use disk::{Allocation, Bitmap, Change, Disk, DomainInfo};
pub use error::{Error, Kind, Result};
pub use extents::{Extent, Extents};
pub use job::{Control, Event, Happening, JobInfo, JobState, Mode, Outcome};
pub use name::Name;
pub use size::{SIZES, parse_size, show_size};
pub use target::{Format, Image, ServerAddress, Target};
