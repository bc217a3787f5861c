//! Deleting a checkpoint of which something is broken.
//!
//! Where the bitmap of one disk is missing, libvirt removes none of the others either. They would go on
//! recording for ever, and be in the way of a checkpoint of that name. So the checkpoint is redefined to be
//! of some of its disks, and deleted with what those have.

use virt_sys as sys;

use super::ffi::{self, Domain};
use crate::xml::{CheckpointDocument, CheckpointDocumentDisk};

/// Deletes a checkpoint and what there is of its bitmaps.
pub(super) fn delete(domain: &Domain, name: &str) -> ffi::Result<()> {
    let checkpoint = domain.checkpoint(name)?;
    let Err(fault) = checkpoint.delete(0) else {
        return Ok(());
    };
    // It has no code of its own for a bitmap that is missing, and its words are in its own language; but
    // then it knows no size.
    if fault.code != sys::VIR_ERR_INTERNAL_ERROR {
        return Err(fault);
    }
    let Ok(text) = checkpoint.xml(true) else {
        return Err(fault);
    };
    let Ok(document) = CheckpointDocument::read(text.as_bytes()) else {
        return Err(fault);
    };
    let disks = document.disks.iter().filter(|d| d.bitmap.is_some());
    let has_size =
        |d: &&CheckpointDocumentDisk| d.bitmap.as_ref().is_some_and(|b| b.size.is_some());
    let (sound, doubtful): (Vec<_>, Vec<_>) = disks.partition(has_size);
    if doubtful.is_empty() {
        return Err(fault);
    }
    log::warn!(
        "checkpoint {name}: {}; what is left of it is removed",
        fault.message
    );
    for disk in doubtful {
        // It may be there, and inconsistent. If it is not, there is nothing to delete.
        if let Err(fault) = delete_some(domain, &document, &[disk]) {
            log::debug!("checkpoint {name}, disk {}: {}", disk.name, fault.message);
        }
    }
    if !sound.is_empty()
        && let Err(fault) = delete_some(domain, &document, &sound)
    {
        let left: Vec<&str> = sound.iter().map(|d| d.name.as_str()).collect();
        log::error!(
            "checkpoint {name}: {}; a bitmap of its name stays on {}",
            fault.message,
            left.join(", ")
        );
    }
    match domain.checkpoint(name) {
        Ok(record) => record.delete(sys::VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY),
        Err(gone) if gone.code == sys::VIR_ERR_NO_DOMAIN_CHECKPOINT => Ok(()),
        Err(fault) => Err(fault),
    }
}

/// Makes the checkpoint one of these disks, and deletes it.
fn delete_some(
    domain: &Domain,
    document: &CheckpointDocument,
    disks: &[&CheckpointDocumentDisk],
) -> ffi::Result<()> {
    let mut some = document.clone();
    some.disks = disks.iter().map(|d| (*d).clone()).collect();
    for bitmap in some.disks.iter_mut().filter_map(|d| d.bitmap.as_mut()) {
        bitmap.size = None;
    }
    some.domain = None;
    let again = sys::VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE;
    let checkpoint = domain.create_checkpoint(&whole(domain, &some)?, again)?;
    checkpoint.delete(0)
}

/// The document with the whole domain in it, as libvirt wants it of a checkpoint that is redefined. What
/// the domain was at the checkpoint is not in our documents.
pub(super) fn whole(domain: &Domain, document: &CheckpointDocument) -> ffi::Result<String> {
    const END: &str = "</domaincheckpoint>";
    let definition = domain.definition()?;
    Ok(document.write().replace(END, &format!("{definition}{END}")))
}
