//! `current/`: what tools that go by times read.

use std::fs;
use std::os::unix::fs::MetadataExt;

use crate::story::Story;
use crate::world::{DISKS, SLICE};

/// Time and inode number of each slice, disk by disk.
fn stamps(story: &Story) -> Vec<Vec<(i64, u64)>> {
    let of_disk = |(target, _)| {
        let dir = format!("current/{target}/0000");
        let stamp = |name: String| {
            let meta = fs::metadata(story.tree.path(&format!("{dir}/{name}"))).unwrap();
            assert_eq!(meta.mtime(), meta.ctime());
            (meta.mtime(), meta.ino())
        };
        story.tree.list(&dir).into_iter().map(stamp).collect()
    };
    DISKS.into_iter().map(of_disk).collect()
}

/// Put together the slices are the disk, and one has another time if and only if it was written to.
pub fn unchanged_slices_keep_their_times(story: &mut Story) {
    let mut known: Option<Vec<Vec<(i64, u64)>>> = None;
    story.scatter();
    let mut written = Vec::new();
    for name in ["n0", "n1", "n2", "n3"] {
        let night = story.backup(name);
        let manifest = story.tree.read("current/manifest");
        assert!(
            manifest.contains(&format!("\nbackup: {name}\n")),
            "{manifest}"
        );
        let next = stamps(story);
        for (disk, (target, _)) in DISKS.iter().enumerate() {
            let mut whole = Vec::new();
            for slice in story.tree.list(&format!("current/{target}/0000")) {
                let path = format!("current/{target}/0000/{slice}");
                whole.extend(fs::read(story.tree.path(&path)).unwrap());
            }
            night.disks[disk].assert_is(&whole, &format!("{target} of {name}"));
            for (k, stamp) in next[disk].iter().enumerate() {
                let Some(known) = &known else { break };
                let before = known[disk][k];
                assert_eq!(stamp.1, before.1, "the same file every night");
                if written.contains(&(disk, k)) {
                    assert!(stamp.0 > before.0, "{target} {k} of {name} was written to");
                } else {
                    assert_eq!(
                        stamp.0, before.0,
                        "{target} {k} of {name} was not written to"
                    );
                }
            }
        }
        let newest = next.iter().flatten().map(|stamp| stamp.0).max().unwrap();
        let of_manifest = fs::metadata(story.tree.path("current/manifest")).unwrap();
        assert_eq!(of_manifest.mtime(), newest.max(of_manifest.mtime() - 1) + 1);
        known = Some(next);
        // What the guest writes now is of the next night.
        written.clear();
        for (disk, (_, size)) in DISKS.iter().enumerate() {
            let slices = size.div_ceil(SLICE);
            let k = story.rng.within(0..slices);
            let offset = k * SLICE;
            let room = SLICE.min(size - offset);
            let mut write = story.rng.write(room);
            write.offset += offset;
            story.write(&[(disk, write)]);
            written.push((disk, usize::try_from(k).unwrap()));
        }
        story.end(name);
        if name == "n1" {
            story.remount(&[]);
        }
    }
}
