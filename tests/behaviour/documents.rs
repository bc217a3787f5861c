//! Backups that documents ask for.

use std::os::unix::net::UnixStream;

use crate::common::tools::{need, run, text};
use crate::common::{model, parse_map};
use crate::story::Story;
use crate::world::Since;

fn pull(inner: &str) -> String {
    format!("<domainbackup mode='pull'>{inner}</domainbackup>")
}

/// One disk, since a checkpoint that is not the newest, and under another checkpoint's name.
pub fn some_disks_since_an_older_checkpoint(story: &mut Story) {
    for name in ["mon", "tue"] {
        story.checkpoint(name);
        story.scatter();
    }
    let scratch = story.world.dir().join("own-scratch");
    let document = pull(&format!(
        "<incremental>mon</incremental><disks><disk name='vda' type='file'>\
         <driver type='qcow2'/><scratch file='{}'/></disk><disk name='vdb' backup='no'/>\
         </disks><domaincheckpoint><name>night</name></domaincheckpoint>",
        text(&scratch)
    ));
    story.tree.put("backups/wed.xml", &document).unwrap();
    let marks = story.marks.clone();
    let disk = story.disks[0].clone();
    story.mark("night");
    story.scatter();
    let read = |name: &str| story.tree.read(&format!("backups/wed/{name}"));
    assert_eq!(story.tree.list("backups/wed/raw"), ["vda.raw"]);
    disk.assert_file(&story.tree.path("backups/wed/disk.raw"));
    let since = story.tree.list("backups/wed/since");
    match story.facts().since {
        Since::All => assert_eq!(since, ["mon", "tue"]),
        Since::Base => assert_eq!(since, ["mon"]),
    }
    for name in since {
        let map = parse_map(&read(&format!("since/{name}/vda.map")));
        let mark = marks.iter().find(|mark| mark.name == name).unwrap();
        assert_eq!(model::dirty_extents(&map), mark.written[0].extents());
    }
    assert_eq!(read("dirty.map"), read("since/mon/vda.map"));
    assert_eq!(
        story.tree.status("backups/wed/status", "base").unwrap(),
        "mon"
    );
    assert!(read("backup.xml").contains("<incremental>mon</incremental>"));
    assert_eq!(story.tree.list("checkpoints"), ["mon", "night", "tue"]);
    story.end("wed");
    assert!(!scratch.exists());
    // All of it again since the checkpoint that was made with it.
    story.look();
}

pub fn a_backup_that_makes_no_checkpoint(story: &mut Story) {
    story.checkpoint("mon");
    story.scatter();
    let before = story.world.state();
    let document = pull(
        "<domaincheckpoint><disks><disk name='vda' checkpoint='no'/></disks></domaincheckpoint>",
    );
    story.tree.put("backups/tue.xml", &document).unwrap();
    let mut tue = story.instant("tue");
    // A document that names no checkpoint to start from asks for all of it.
    tue.marks.clear();
    story.scatter();
    let dirty = parse_map(&story.tree.read("backups/tue/dirty.map"));
    assert!(dirty.iter().all(|line| line.kind & 1 == 1), "{dirty:?}");
    tue.disks[0].assert_file(&story.tree.path("backups/tue/raw/vda.raw"));
    tue.disks[1].assert_file(&story.tree.path("backups/tue/raw/vdb.raw"));
    assert_eq!(story.tree.list("checkpoints"), ["mon"]);
    story.end("tue");
    assert_eq!(story.world.state(), before);
    // Nothing was taken from the history either.
    story.look();
}

pub fn documents_that_cannot_be(story: &mut Story) {
    story.checkpoint("mon");
    story.scatter();
    let before = story.world.state();
    let disks = |inner: &str| pull(&format!("<disks>{inner}</disks>"));
    for (document, errno, words) in [
        (
            pull("<incremental>sun</incremental>"),
            libc::EINVAL,
            "no checkpoint sun",
        ),
        (
            disks("<disk name='vda' incremental='sun'/>"),
            libc::EINVAL,
            "no checkpoint sun",
        ),
        (disks("\n<disk name='vdz'/>"), libc::EINVAL, "line 2"),
        (
            disks("<disk name='vda'/><disk name='vda'/>"),
            libc::EINVAL,
            "twice",
        ),
        (
            disks("<disk name='vda' backup='no'/>"),
            libc::EINVAL,
            "no disk takes part",
        ),
        (
            disks("<disk name='vda' exportname='x'/>"),
            libc::EINVAL,
            "needs <server>",
        ),
        (
            pull("<domaincheckpoint><name>mon</name></domaincheckpoint>"),
            libc::EEXIST,
            "checkpoint mon",
        ),
        (
            pull("<domaincheckpoint><creationTime>5</creationTime></domaincheckpoint>"),
            libc::EINVAL,
            "creationTime",
        ),
        (
            disks("<disk name='vda' type='block'><scratch dev='/dev/null'/></disk>"),
            libc::EINVAL,
            "not supported",
        ),
        (
            "<domainbackup><disks><disk name='vda'><target file='relative'/></disk></disks>\
             </domainbackup>"
                .to_owned(),
            libc::EINVAL,
            "absolute path",
        ),
        ("<domainbackup>".to_owned(), libc::EINVAL, "line 1"),
    ] {
        let refused = story.tree.put("backups/tue.xml", &document);
        story.refused(refused, errno, words);
    }
    assert_eq!(story.world.state(), before);
    assert_eq!(story.tree.list("backups"), [""; 0]);
    assert_eq!(story.tree.list("checkpoints"), ["mon"]);
    story.look();
}

/// Other NBD clients have the frozen disk and what changed, under the names that were asked for.
pub fn a_server_for_others(story: &mut Story) {
    need!("nbdcopy", "nbdinfo");
    story.scatter();
    story.checkpoint("sun");
    story.scatter();
    let socket = story.world.dir().join("server.sock");
    let document = pull(&format!(
        "<incremental>sun</incremental><server transport='unix' socket='{}'/><disks>\
         <disk name='vda' exportname='root' exportbitmap='new'/></disks>",
        text(&socket)
    ));
    let before = story.world.state();
    let put = story.tree.put("backups/mon.xml", &document);
    if story.facts().server {
        put.unwrap();
        let mon = story.instant("mon");
        story.scatter();
        let uri = format!("nbd+unix:///root?socket={}", text(&socket));
        let copy = story.world.dir().join("copy");
        run("nbdcopy", &[&uri, text(&copy)]);
        mon.disks[0].assert_file(&copy);
        let map = run("nbdinfo", &["--map=qemu:dirty-bitmap:new", &uri]);
        let dirty = model::dirty_extents(&parse_map(&map));
        assert_eq!(dirty, mon.marks[0].written[0].extents());
        // In the tree it is all the same.
        mon.disks[0].assert_file(&story.tree.path("backups/mon/disk.raw"));
        let map = story.tree.read("backups/mon/dirty.map");
        assert_eq!(model::dirty_extents(&parse_map(&map)), dirty);
        story.end("mon");
        assert!(UnixStream::connect(&socket).is_err());
    } else {
        story.refused(put, libc::EOPNOTSUPP, "NBD");
        assert_eq!(story.tree.list("backups"), [""; 0]);
        assert_eq!(story.world.state(), before);
    }
}
