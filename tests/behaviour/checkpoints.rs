//! Checkpoints: made, deleted, renamed, forgotten, and every list of changes still right.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use crate::common::mount::FLEECEFS;
use crate::common::tools::{DEADLINE, eventually};
use crate::common::{Marks, errno, model, parse_map};
use crate::story::Story;
use crate::world::DISKS;

pub fn checkpoints_lead_to_each_other(story: &mut Story) {
    for name in ["mon", "tue", "wed"] {
        story.checkpoint(name);
    }
    let look = |story: &Story| {
        let tree = &story.tree;
        assert_eq!(tree.list("checkpoints"), ["mon", "tue", "wed"]);
        assert!(fs::symlink_metadata(tree.path("checkpoints/mon/parent")).is_err());
        let parent = |name: &str| fs::read_link(tree.path(&format!("checkpoints/{name}/parent")));
        assert_eq!(parent("tue").unwrap(), Path::new("../mon"));
        assert_eq!(parent("wed").unwrap(), Path::new("../tue"));
        assert_eq!(tree.list("checkpoints/mon/children"), ["tue"]);
        assert_eq!(tree.list("checkpoints/tue/children"), ["wed"]);
        assert_eq!(tree.list("checkpoints/wed/children"), [""; 0]);
        // Through the links.
        assert!(
            tree.read("checkpoints/mon/children/tue/status")
                .contains("parent: mon\n")
        );
        let time = |name: &str| {
            let meta = fs::metadata(tree.path(&format!("checkpoints/{name}"))).unwrap();
            let status = tree.status(&format!("checkpoints/{name}/status"), "created-unix");
            assert_eq!(status.unwrap(), meta.mtime().to_string());
            meta.mtime()
        };
        assert!(time("mon") < time("tue") && time("tue") < time("wed"));
        let xml = tree.read("checkpoints/tue/checkpoint.xml");
        assert!(
            xml.contains("<name>tue</name>") && xml.contains("<name>mon</name>"),
            "{xml}"
        );
        for (target, _) in DISKS {
            let status = tree.read("checkpoints/mon/status");
            assert!(
                status.contains(&format!("  {target}:\n    state: trusted\n")),
                "{status}"
            );
        }
    };
    look(story);
    // The kernel knows the name, and asks nobody.
    assert_eq!(errno(story.tree.mkdir("checkpoints/tue")), libc::EEXIST);
    story.remount(&[]);
    look(story);
    assert_eq!(errno(story.tree.mkdir("checkpoints/tue")), libc::EEXIST);
}

/// The oldest, the newest, one in the middle: what a deleted one had recorded goes to the one before.
pub fn whatever_is_deleted_no_change_is_lost(story: &mut Story) {
    for name in ["c0", "c1", "c2", "c3"] {
        story.checkpoint(name);
        story.scatter();
    }
    story.look();
    story.delete("c0");
    story.scatter();
    story.look();
    story.delete("c2");
    story.scatter();
    story.look();
    story.delete("c3");
    story.scatter();
    assert_eq!(story.tree.list("checkpoints"), ["c1"]);
    let orphan = fs::symlink_metadata(story.tree.path("checkpoints/c1/parent"));
    assert_eq!(errno(orphan), libc::ENOENT);
    story.remount(&[]);
    story.look();
    story.delete("c1");
    let bare = story.world.state();
    assert!(
        !bare.iter().any(|line| line.starts_with("bitmap ")),
        "{bare:?}"
    );
}

pub fn renaming(story: &mut Story) {
    for name in ["mon", "tue", "wed"] {
        story.checkpoint(name);
        story.scatter();
    }
    let path = |name: &str| story.tree.path(&format!("checkpoints/{name}"));
    let mv = |from: &str, to: &str| fs::rename(path(from), path(to));
    let inode = fs::metadata(path("tue")).unwrap().ino();
    story.refused(mv("tue", "wed"), libc::EEXIST, "wed");
    story.refused(mv("tue", "a b"), libc::EINVAL, "a b");
    assert_eq!(errno(mv("missing", "thu")), libc::ENOENT);
    let before = story.world.state();
    if story.facts().rename {
        mv("tue", "second").unwrap();
        story.marks[1].name = "second".into();
        assert_eq!(fs::metadata(path("second")).unwrap().ino(), inode);
        let parent = fs::read_link(path("wed/parent")).unwrap();
        assert_eq!(parent, Path::new("../second"));
        assert_eq!(story.tree.list("checkpoints"), ["mon", "second", "wed"]);
    } else {
        story.refused(mv("tue", "second"), libc::EOPNOTSUPP, "another name");
        assert_eq!(story.tree.list("checkpoints"), ["mon", "tue", "wed"]);
        assert_eq!(story.world.state(), before);
    }
    story.scatter();
    story.look();
}

/// Forgotten by the command and by a word; the bitmaps stay, and the saved document brings one back.
pub fn forgotten_and_taken_up_again(story: &mut Story) {
    for name in ["mon", "tue", "wed"] {
        story.checkpoint(name);
        story.scatter();
    }
    let saved = story.tree.read("checkpoints/tue/checkpoint.xml");
    story.tree.say("checkpoints/wed/control", "forget").unwrap();
    let forgotten = Command::new(FLEECEFS)
        .args(["checkpoint", "delete", "--metadata", "tue"])
        .arg(story.tree.path(""))
        .status()
        .unwrap();
    assert!(forgotten.success(), "{}", story.tree.last_error());
    assert_eq!(story.tree.list("checkpoints"), ["mon"]);
    let state = story.world.state();
    for name in ["tue", "wed"] {
        let has =
            |line: &String| line.starts_with("bitmap ") && line.contains(&format!("/{name} "));
        assert_eq!(state.iter().filter(|line| has(line)).count(), DISKS.len());
    }
    // A bitmap that belongs to no checkpoint.
    story.refused(story.tree.mkdir("checkpoints/tue"), libc::EEXIST, "tue");
    assert_eq!(story.world.state(), state);

    story.tree.put("checkpoints/tue.xml", &saved).unwrap();
    eventually("the redefined one", DEADLINE, || {
        (story.tree.list("checkpoints") == ["mon", "tue"]).then_some(())
    });
    assert_eq!(story.tree.read("checkpoints/tue/checkpoint.xml"), saved);
    // wed, whose bitmap recorded last in a chain, is still forgotten.
    let lost: &[&str] = match story.facts().chained_bitmaps {
        true => &["mon", "tue", "wed"],
        false => &["wed"],
    };
    story
        .marks
        .retain(|mark| !lost.contains(&mark.name.as_str()));
    for name in ["mon", "tue"] {
        let status = story.tree.read(&format!("checkpoints/{name}/status"));
        let expected = match lost.contains(&name) {
            true => "state: broken",
            false => "state: trusted",
        };
        assert!(status.contains(expected), "{name}: {status}");
    }
    story.tree.mkdir("backups/thu").unwrap();
    let listed = story.tree.list("backups/thu/since");
    if story.facts().chained_bitmaps {
        assert_eq!(listed, [""; 0]);
        let map = fs::read(story.tree.path("backups/thu/dirty.map"));
        story.refused(map, libc::ESTALE, "thu");
    } else {
        assert_eq!(listed, ["tue"]);
        story.holds(&story.instant("thu"));
    }
    story.end("thu");
}

/// What a document can say of a checkpoint that mkdir cannot.
pub fn documents_of_checkpoints(story: &mut Story) {
    let one = "<domaincheckpoint><description>before the upgrade</description>\
               <disks><disk name='vda'/><disk name='vdb' checkpoint='no'/></disks>\
               </domaincheckpoint>";
    story.tree.put("checkpoints/mon.xml", one).unwrap();
    let xml = story.tree.read("checkpoints/mon/checkpoint.xml");
    assert!(xml.contains("before the upgrade"), "{xml}");
    let status = story.tree.read("checkpoints/mon/status");
    assert!(
        status.contains("vda:") && !status.contains("vdb:"),
        "{status}"
    );

    let before = story.world.state();
    let own_bitmap = "<domaincheckpoint><disks><disk name='vda' checkpoint='bitmap' \
                      bitmap='special'/></disks></domaincheckpoint>";
    let put = |document: &str| story.tree.put("checkpoints/tue.xml", document);
    // By the image's path, which is the same disk.
    let domain = story.tree.read("domain.xml");
    let image = domain.split("file=\"").nth(1).unwrap().split('"').next();
    let twice = format!(
        "<domaincheckpoint><disks><disk name='vda'/>\n<disk name='{}'/></disks></domaincheckpoint>",
        image.unwrap()
    );
    for (document, words) in [
        (twice.as_str(), "vda is listed twice"),
        ("<domaincheckpoint>", "line 1"),
        (
            "<domaincheckpoint><disks>\n<disk name='vda'/>\n<disk name='vda'/></disks>\
             </domaincheckpoint>",
            "line 3",
        ),
        (
            "<domaincheckpoint><disks>\n<disk name='vda' snapshot='no'/></disks></domaincheckpoint>",
            "snapshot=",
        ),
        ("<domainsnapshot/>", "<domaincheckpoint> is needed"),
        (
            "<domaincheckpoint><disks><disk name='vda' checkpoint='no'/></disks></domaincheckpoint>",
            "no disk",
        ),
        (
            "<domaincheckpoint>\n<disks><disk name='vdx'/></disks></domaincheckpoint>",
            "line 2",
        ),
        (
            "<domaincheckpoint><name>other</name></domaincheckpoint>",
            "other",
        ),
    ] {
        story.refused(put(document), libc::EINVAL, words);
    }
    let taken = story.tree.put("checkpoints/mon.xml", one);
    story.refused(taken, libc::EEXIST, "mon");
    assert_eq!(story.world.state(), before);
    if story.facts().bitmap_names {
        put(own_bitmap).unwrap();
        let state = story.world.state();
        assert!(
            state.iter().any(|line| line.contains("special")),
            "{state:?}"
        );
        story.tree.rmdir("checkpoints/tue").unwrap();
    } else {
        story.refused(put(own_bitmap), libc::EOPNOTSUPP, "special");
    }
    assert_eq!(story.world.state(), before);

    // Known on one disk, and not on the other.
    story.mark("mon");
    story.scatter();
    story.tree.mkdir("backups/tue").unwrap();
    let since = story.tree.list("backups/tue/since/mon");
    assert_eq!(
        since,
        ["vda.bmap", "vda.json", "vda.map", "vda.qcow2", "vda.raw"]
    );
    let map = parse_map(&story.tree.read("backups/tue/since/mon/vda.map"));
    assert_eq!(
        model::dirty_extents(&map),
        story.marks[0].written[0].extents()
    );
    story.end("tue");

    // The base does not cover the first disk: all of it counts as changed.
    let other = "<domaincheckpoint><disks><disk name='vda' checkpoint='no'/><disk name='vdb'/></disks>\
                 </domaincheckpoint>";
    story.tree.put("checkpoints/wed.xml", other).unwrap();
    story.tree.mkdir("backups/thu").unwrap();
    assert_eq!(
        story.tree.status("backups/thu/status", "base").unwrap(),
        "wed"
    );
    let whole = parse_map(&story.tree.read("backups/thu/dirty.map"));
    assert!(whole.iter().all(|line| line.kind & 1 == 1), "{whole:?}");
    story.end("thu");
}

pub fn coarser_bitmaps(story: &mut Story) {
    const COARSE: u64 = 1 << 20;
    story.remount(&[&format!("granularity={COARSE}")]);
    if !story.facts().granularity {
        let before = story.world.state();
        let refused = story.tree.mkdir("checkpoints/mon");
        story.refused(refused, libc::EOPNOTSUPP, "checkpoint mon");
        story.refused(
            story.tree.mkdir("backups/mon"),
            libc::EOPNOTSUPP,
            "backup mon",
        );
        assert_eq!(story.tree.list("checkpoints"), [""; 0]);
        assert_eq!(story.tree.list("backups"), [""; 0]);
        assert_eq!(story.world.state(), before);
        return;
    }
    story.checkpoint("mon");
    let coarse = DISKS.map(|(_, size)| Marks::new(size, COARSE));
    story.marks[0].written = coarse.to_vec();
    story.scatter();
    let tue = story.backup("tue");
    story.holds(&tue);
    story.end("tue");
}
