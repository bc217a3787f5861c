//! A domain of libvirt that is not running: its images, read through a storage daemon of our own, with
//! libvirt's checkpoints beside them.
//!
//! The images are opened read-only, so libvirt's bitmaps stay as they are whatever happens here; for
//! the same reason no checkpoint can be made or deleted, which libvirt cannot do either without a
//! running QEMU. All of libvirt's bitmaps recorded all the time, so that their union from a checkpoint
//! on, which is what the storage daemon is asked for, is that checkpoint's own. (In the image of a
//! snapshot libvirt begins each bitmap anew, and leaves on the one below what it had recorded until then.
//! So those below count too: `qemu/disks.rs`.) Every since/ is there.
//!
//! QEMU's lock on the images keeps the domain from being started meanwhile.

use super::link::Link;
use super::look::{Look, look};
use super::{forget, no_rename};
use crate::backend::qemu::Qemu;
use crate::backend::source::Places;
use crate::backend::storage_daemon::{self, Wanted};
use crate::backend::{Backend, Frozen, Listener, Pushing};
use crate::model::{
    BackupPlan, Checkpoint, CheckpointRemoval, Disk, DomainInfo, Error, Kind, Name, NewCheckpoint,
    PushPlan, RenameBitmap, Result,
};

/// Why nothing can be changed.
const STOPPED: &str = "the domain was not running when it was mounted";

pub(super) struct Stopped {
    images: Qemu,
    link: Link,
    /// The images' paths, which the storage daemon has without symbolic links, in libvirt's words.
    files: Vec<(String, Option<String>)>,
}

/// Opens the images of the domain's disks.
pub(super) fn open(link: Link, look: &Look, info: DomainInfo, places: &Places) -> Result<Stopped> {
    let wanted = look.disks.iter().map(|disk| {
        let path = disk.file.as_ref().ok_or_else(|| {
            Error::new(
                Kind::Unsupported,
                format!(
                    "disk {} of the stopped domain {} is neither a file nor a block device",
                    disk.target, info.name
                ),
            )
            .hint("start the domain: virsh start")
        })?;
        Ok(Wanted {
            target: disk.target.clone(),
            path: path.into(),
            format: Some(disk.format.clone()),
            read_only: true,
        })
    });
    let wanted = wanted.collect::<Result<Vec<_>>>()?;
    if wanted.is_empty() {
        return Err(Error::new(
            Kind::Unsupported,
            format!("domain {} has no writable disk", info.name),
        ));
    }
    let images = storage_daemon::open_images(&wanted, info, places)?;
    let named = |d: &Disk| (d.target.clone(), d.file.clone());
    Ok(Stopped {
        images,
        link,
        files: look.disks.iter().map(named).collect(),
    })
}

fn read_only() -> Error {
    Error::new(
        Kind::ReadOnly,
        format!("{STOPPED}, and checkpoints of a stopped domain cannot be changed"),
    )
    .hint("unmount, start it with virsh start, and mount it again")
}

impl Backend for Stopped {
    fn info(&self) -> DomainInfo {
        self.images.info()
    }

    fn failure(&self) -> Option<Error> {
        self.images.failure()
    }

    fn tidy(&self) -> Result<()> {
        self.images.tidy()
    }

    fn disks(&self) -> Result<Vec<Disk>> {
        let mut disks = self.images.disks()?;
        for disk in &mut disks {
            disk.no_checkpoint = Some(STOPPED.to_owned());
            if let Some((_, file)) = self.files.iter().find(|(t, _)| *t == disk.target) {
                disk.file.clone_from(file);
            }
        }
        Ok(disks)
    }

    fn own_checkpoints(&self) -> Result<Option<Vec<Checkpoint>>> {
        Ok(Some(look(&self.link, false)?.checkpoints))
    }

    fn create_checkpoint(&self, _: &NewCheckpoint) -> Result<()> {
        Err(read_only())
    }

    fn delete_checkpoint(&self, _: &CheckpointRemoval) -> Result<()> {
        Err(read_only())
    }

    fn forget_checkpoint(&self, name: &Name) -> Result<()> {
        forget(&self.link, name)
    }

    fn redefine_checkpoint(&self, _: &Checkpoint, _: bool) -> Result<()> {
        Err(read_only())
    }

    fn rename_checkpoint(&self, _: &[RenameBitmap]) -> Result<()> {
        Err(no_rename())
    }

    fn begin(&self, plan: &BackupPlan) -> Result<Box<dyn Frozen>> {
        self.images.begin(plan)
    }

    fn push(&self, plan: &PushPlan) -> Result<Box<dyn Pushing>> {
        self.images.push(plan)
    }

    fn listen(&self, listener: Listener) {
        self.images.listen(listener);
    }

    fn close(&self) -> Result<()> {
        self.images.close()
    }
}
