//! One look at a domain: its disks, and libvirt's checkpoints of them.
//!
//! libvirt's bitmaps all record all the time, and libvirt itself judges them: asked for sizes, it
//! leaves out that of a bitmap that is missing or was not saved cleanly. So the bitmaps that are told
//! to the engine are made up from that, and it trusts just what libvirt trusts.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::time::{Duration, SystemTime};

use virt_sys as sys;

use super::ffi::{self, Domain};
use super::guard::State;
use super::job;
use super::link::Link;
use crate::model::{Bitmap, Checkpoint, CheckpointDisk, Disk, Error, Kind, Result};
use crate::xml::{CheckpointDocument, LiveDisk, LiveDomain};

/// What a qcow2 image begins with, ahead of its version.
const QCOW2_MAGIC: &[u8] = b"QFI\xfb";

/// What libvirt's bitmaps have, since it does not say: QEMU's choice for a qcow2 image.
const GRANULARITY: u64 = 65536;

/// How long a list that was refused is waited for.
const AGAIN: Duration = Duration::from_millis(200);

/// What one look finds.
pub(super) struct Look {
    pub(super) domain: LiveDomain,
    pub(super) disks: Vec<Disk>,
    pub(super) checkpoints: Vec<Checkpoint>,
}

/// libvirt's answers.
struct Answers {
    xml: String,
    /// Of each disk its size, or why QEMU does not know it.
    sizes: HashMap<String, std::result::Result<u64, String>>,
    checkpoints: Vec<String>,
}

/// Looks. With `bitmaps` the domain must be running; each checkpoint's are then asked of QEMU.
pub(super) fn look(link: &Link, bitmaps: bool) -> Result<Look> {
    let answers = link.call("look at the domain", move |domain| {
        let xml = domain.xml()?;
        if bitmaps && let Some(why) = no_bitmaps_now(domain)? {
            return Ok(Err(why));
        }
        let active = domain.is_active()?;
        // What cannot be read here is refused below.
        let disks = LiveDomain::read(xml.as_bytes()).unwrap_or_default().disks;
        let mut sizes = HashMap::new();
        for disk in disks {
            let size = match domain.capacity(&disk.target) {
                // A vhost-user disk is another process'; and of a stopped domain libvirt itself would
                // have to find the image, which it can where that is a file.
                Err(fault) if !active || fault.code == sys::VIR_ERR_OPERATION_UNSUPPORTED => {
                    Err(fault.message)
                }
                size => Ok(size?),
            };
            sizes.insert(disk.target, size);
        }
        Ok(Ok(Answers {
            xml,
            sizes,
            checkpoints: checkpoints(domain, bitmaps)?,
        }))
    })??;
    let domain = LiveDomain::read(answers.xml.as_bytes()).map_err(|e| odd("domain", &e))?;
    let documents = answers
        .checkpoints
        .iter()
        .map(|xml| CheckpointDocument::read(xml.as_bytes()).map_err(|e| odd("checkpoint", &e)))
        .collect::<Result<Vec<_>>>()?;
    let then = answers
        .checkpoints
        .iter()
        .map(|xml| LiveDomain::of_checkpoint(xml.as_bytes()).map_err(|e| odd("checkpoint", &e)))
        .collect::<Result<Vec<_>>>()?;
    let known = |target: &str| answers.sizes.get(target);
    let size = |target: &str| known(target).and_then(|s| s.clone().ok()).unwrap_or(0);
    let disks = domain.disks.iter().map(|disk| Disk {
        target: disk.target.clone(),
        size: size(&disk.target),
        format: disk.format.clone(),
        file: disk.file.clone(),
        backing: disk.backing.clone(),
        no_backup: known(&disk.target).and_then(|s| s.clone().err()),
        no_checkpoint: no_checkpoint(disk),
        bitmaps: if bitmaps {
            bitmaps_of(&disk.target, &documents)
        } else {
            Vec::new()
        },
    });
    Ok(Look {
        disks: disks.collect(),
        checkpoints: documents
            .iter()
            .zip(&then)
            .filter_map(|(document, then)| checkpoint(document, then, size))
            .collect(),
        domain,
    })
}

/// Why QEMU cannot be asked for bitmaps, if it cannot. libvirt would let us wait for 30 s.
fn no_bitmaps_now(domain: &Domain) -> ffi::Result<Option<Error>> {
    if State::of(domain)?.is_elsewhere() {
        let why = "the domain is being migrated, or was restored and has not run since";
        return Ok(Some(Error::new(Kind::Busy, why).hint(
            "wait for the migration; virsh resume lets a restored domain run",
        )));
    }
    Ok(job::other_than_a_backup(domain)?.map(job::held))
}

fn checkpoints(domain: &Domain, sizes: bool) -> ffi::Result<Vec<String>> {
    // While somebody makes one, libvirt 11.3 may list it without a name, and its own client refuses that.
    let all = domain.checkpoints().or_else(|_| {
        std::thread::sleep(AGAIN);
        domain.checkpoints()
    })?;
    let described = all.iter().map(|c| described(c, sizes));
    // One that was deleted meanwhile is none any more.
    let gone = |fault: &ffi::Fault| fault.code == sys::VIR_ERR_NO_DOMAIN_CHECKPOINT;
    described
        .filter(|described| !described.as_ref().is_err_and(gone))
        .collect()
}

/// A checkpoint's document. One of which QEMU cannot tell the sizes, as after a snapshot and a resize of a
/// disk, is described without: it is not to be trusted, and the others are none the worse.
fn described(checkpoint: &ffi::Checkpoint, sizes: bool) -> ffi::Result<String> {
    match checkpoint.xml(sizes) {
        Err(fault) if sizes && fault.code == sys::VIR_ERR_INTERNAL_ERROR => {
            log::debug!("checkpoint {}: {}", checkpoint.name(), fault.message);
            checkpoint.xml(false)
        }
        document => document,
    }
}

fn odd(what: &str, error: &crate::xml::Error) -> Error {
    Error::new(
        Kind::Io,
        format!("libvirt describes the {what} in a way that is not understood: {error}"),
    )
}

/// A checkpoint as libvirt describes it. One whose name would not do as a name of a file here, such as
/// `x.xml`, is left out: others can still be used.
fn checkpoint(
    document: &CheckpointDocument,
    then: &LiveDomain,
    size: impl Fn(&str) -> u64,
) -> Option<Checkpoint> {
    let name = document.name.as_ref()?.value.clone();
    let disks = document.disks.iter().filter_map(|disk| {
        let bitmap = disk.bitmap.as_ref()?;
        Some(CheckpointDisk {
            target: disk.name.clone(),
            bitmap: bitmap.name.clone().unwrap_or_else(|| name.to_string()),
            // libvirt says nothing of the size at the time; the engine remembers it.
            size: size(&disk.name),
            // libvirt goes by the target, and would take another disk's bitmap of that name.
            image: then
                .disks
                .iter()
                .find(|d| d.target == disk.name)
                .and_then(|d| d.file.clone()),
            broken: None,
        })
    });
    Some(Checkpoint {
        created: SystemTime::UNIX_EPOCH + Duration::from_secs(document.creation_time?),
        parent: document.parent.as_ref().map(|p| p.value.clone()),
        description: document.description.clone(),
        disks: disks.collect(),
        name,
    })
}

fn bitmaps_of(target: &str, checkpoints: &[CheckpointDocument]) -> Vec<Bitmap> {
    let of_disk = checkpoints.iter().filter_map(|c| {
        let disk = c.disks.iter().find(|d| d.name == target)?;
        let bitmap = disk.bitmap.as_ref()?;
        let name = bitmap.name.clone();
        Some(Bitmap {
            name: name.or_else(|| Some(c.name.as_ref()?.value.to_string()))?,
            recording: true,
            inconsistent: bitmap.size.is_none(),
            persistent: true,
            granularity: GRANULARITY,
            dirty_bytes: bitmap.size.unwrap_or(0),
        })
    });
    of_disk.collect()
}

/// Why libvirt would refuse a checkpoint of the disk. The version of a qcow2 image is not in the
/// domain's document; where the image cannot be read here, libvirt says it when it comes to that.
fn no_checkpoint(disk: &LiveDisk) -> Option<String> {
    if disk.format != "qcow2" {
        return Some(format!("format {} cannot keep dirty bitmaps", disk.format));
    }
    let mut head = [0; 8];
    let mut file = File::open(disk.file.as_ref()?).ok()?;
    file.read_exact(&mut head).ok()?;
    let old = head.starts_with(QCOW2_MAGIC) && head.ends_with(&[0, 0, 0, 2]);
    old.then(|| "qcow2 version 2 cannot keep dirty bitmaps".to_owned())
}
