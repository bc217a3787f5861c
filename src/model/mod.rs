//! The words of the domain, as libvirt and QEMU use them. No I/O, no threads, no clocks.

mod backup;
mod checkpoint;
mod disk;
mod error;
mod extents;
mod name;

pub use backup::{BackupPlan, FreezeDisk, JobId};
pub use checkpoint::{
    Broken, Checkpoint, CheckpointDisk, CheckpointRemoval, NewBitmap, NewCheckpoint, RemoveBitmap,
};
pub use disk::{Allocation, Bitmap, Change, Disk, DomainInfo};
pub use error::{Error, Kind, Result};
pub use extents::{Extent, Extents};
pub use name::Name;
