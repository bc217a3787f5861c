//! Which checkpoints can be trusted, on which disk. Pure: checkpoints and bitmaps in, verdicts out.
//!
//! On one disk, the checkpoints that cover it form a chain. What changed since checkpoint `c` is
//! the union of the bitmaps from `c` to the newest, so `c` can be trusted only if every link from
//! `c` on can:
//!
//! ```text
//!   checkpoint   sun     mon      tue     wed
//!   bitmap       sound   MISSING  sound   sound, records
//!   trusted      no      no       yes     yes          ("since mon" would miss changes)
//! ```
//!
//! A link is sound if its bitmap is on the disk's top node, was saved cleanly and is as large as
//! the disk, if the disk is still the same image or that is below it, and if it is not already known to be broken; the
//! newest must also be recording.

use crate::model::{
    Broken, Checkpoint, CheckpointDisk, CheckpointRemoval, Disk, NewBitmap, RemoveBitmap,
};

/// One disk's part in a chain of checkpoints, from the oldest trusted to the newest.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Chain {
    /// For each trusted checkpoint, oldest first: its place in the list and its bitmap. The last
    /// one records.
    pub(super) links: Vec<(usize, String)>,
    /// Why the checkpoint before the first link, and all before it, cannot be trusted.
    pub(super) broken: Option<Broken>,
}

impl Chain {
    /// The chain of `disk` over `checkpoints`, which are ordered oldest first: from the newest one to
    /// its parent, and so on. What changed since a checkpoint that is not on this way is not known.
    pub(super) fn of(disk: &Disk, checkpoints: &[&Checkpoint]) -> Self {
        let mut chain = Self::default();
        let mut newest = true;
        let mut next = checkpoints.len().checked_sub(1);
        while let Some(place) = next {
            let checkpoint = checkpoints[place];
            next = parent(checkpoints, place);
            let Some(entry) = checkpoint.disk(&disk.target) else {
                continue;
            };
            if let Some(why) = flaw(disk, entry, newest) {
                chain.broken = Some(match &entry.broken {
                    // Written down when it was found out, with the name of the one at fault.
                    Some(known) => known.clone(),
                    None => format!("checkpoint {}: {why}", checkpoint.name),
                });
                break;
            }
            newest = false;
            chain.links.push((place, entry.bitmap.clone()));
        }
        chain.links.reverse();
        chain
    }

    /// Where `place` stands among the links, if it can be trusted.
    fn link(&self, place: usize) -> Option<usize> {
        self.links.iter().position(|&(p, _)| p == place)
    }
}

/// Where the parent of the checkpoint at `place` stands; it is older.
fn parent(checkpoints: &[&Checkpoint], place: usize) -> Option<usize> {
    let name = checkpoints[place].parent.as_ref()?;
    checkpoints[..place].iter().rposition(|c| c.name == *name)
}

/// What is wrong with one link, if anything is.
fn flaw(disk: &Disk, entry: &CheckpointDisk, newest: bool) -> Option<Broken> {
    if let Some(why) = &entry.broken {
        return Some(why.clone());
    }
    let Some(bitmap) = disk.bitmaps.iter().find(|b| b.name == entry.bitmap) else {
        return Some(format!(
            "bitmap {} is not on the disk's active image (was the image replaced, or a snapshot \
             taken by someone else?)",
            entry.bitmap
        ));
    };
    // Before what follows from it: libvirt cannot use a bitmap of another size than the disk's.
    if entry.size != disk.size {
        return Some(format!(
            "the disk had {} bytes then and has {} now",
            entry.size, disk.size
        ));
    }
    if bitmap.inconsistent {
        return Some(format!(
            "bitmap {} is inconsistent: the domain was not stopped cleanly",
            entry.bitmap
        ));
    }
    if let (Some(then), Some(now)) = (entry.image.as_deref(), disk.path())
        && then != now
        && !disk.backing.iter().any(|below| below == then)
    {
        return Some(format!("the disk was {then} then and is {now} now"));
    }
    if newest && !bitmap.recording {
        return Some(format!(
            "bitmap {} is not recording: somebody switched it off",
            entry.bitmap
        ));
    }
    None
}

/// Writes down in `checkpoints` what is found broken now, before a change of the chain destroys
/// the evidence: a successor that does not record is no longer the newest after the next
/// checkpoint, and a missing one is no longer missed after its checkpoint was deleted.
pub(super) fn record_broken(checkpoints: &mut [Checkpoint], disks: &[Disk]) {
    for disk in disks {
        let chain = Chain::of(disk, &checkpoints.iter().collect::<Vec<_>>());
        let Some(why) = chain.broken else { continue };
        let first_sound = chain.links.first().map_or(usize::MAX, |l| l.0);
        for checkpoint in checkpoints.iter_mut().take(first_sound) {
            for entry in &mut checkpoint.disks {
                if entry.target == disk.target && entry.broken.is_none() {
                    entry.broken = Some(why.clone());
                }
            }
        }
    }
}

/// The bitmap on `disk` that must stop recording when a new checkpoint begins: that of the newest
/// checkpoint that covers the disk, sound or not.
pub(super) fn recording(disk: &Disk, checkpoints: &[&Checkpoint]) -> Option<String> {
    let entry = checkpoints
        .iter()
        .rev()
        .find_map(|c| c.disk(&disk.target))?;
    disk.bitmaps
        .iter()
        .find(|b| b.name == entry.bitmap && b.recording && !b.inconsistent)
        .map(|b| b.name.clone())
}

/// The bitmaps of a new checkpoint, on the disks that it covers.
pub(super) fn new_bitmaps(
    new: &Checkpoint,
    disks: &[Disk],
    checkpoints: &[&Checkpoint],
    granularity: Option<u64>,
) -> Vec<NewBitmap> {
    let entry = |disk: &Disk| {
        Some(NewBitmap {
            target: disk.target.clone(),
            bitmap: new.disk(&disk.target)?.bitmap.clone(),
            stop: recording(disk, checkpoints),
            granularity,
        })
    };
    disks.iter().filter_map(entry).collect()
}

/// How to forget the checkpoint at `place` without losing a change: its bitmap's content goes to
/// its predecessor's, which resumes recording if the newest goes. Where the predecessor cannot be
/// trusted anyway, nothing is kept.
pub(super) fn removal(
    checkpoints: &[&Checkpoint],
    place: usize,
    disks: &[Disk],
) -> CheckpointRemoval {
    let checkpoint = checkpoints[place];
    let mut bitmaps = Vec::new();
    for disk in disks {
        let Some(entry) = checkpoint.disk(&disk.target) else {
            continue;
        };
        let Some(bitmap) = disk.bitmaps.iter().find(|b| b.name == entry.bitmap) else {
            continue;
        };
        let chain = Chain::of(disk, checkpoints);
        let own = chain.link(place);
        let parent = own
            .and_then(|link| link.checked_sub(1))
            .map(|link| chain.links[link].1.clone());
        bitmaps.push(RemoveBitmap {
            target: disk.target.clone(),
            bitmap: entry.bitmap.clone(),
            resume: parent.is_some() && bitmap.recording,
            merge_into: parent,
        });
    }
    CheckpointRemoval {
        name: checkpoint.name.clone(),
        bitmaps,
    }
}
