//! What there is, and what there is not.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use crate::common::errno;
use crate::story::Story;
use crate::world::Since;

const SHAPE: &str = "\
d700 backups
d700 backups/tue
-400 backups/tue/backup.xml
-400 backups/tue/checkpoint.xml
-600 backups/tue/control
-400 backups/tue/dirty.map
-400 backups/tue/disk.raw
-400 backups/tue/domain.xml
d700 backups/tue/map
-400 backups/tue/map/vda.map
-400 backups/tue/map/vdb.map
d700 backups/tue/qcow2
-400 backups/tue/qcow2/vda.qcow2
-400 backups/tue/qcow2/vdb.qcow2
d700 backups/tue/raw
-400 backups/tue/raw/vda.raw
-400 backups/tue/raw/vdb.raw
d700 backups/tue/since
d700 backups/tue/since/mon
-400 backups/tue/since/mon/vda.bmap
-400 backups/tue/since/mon/vda.json
-400 backups/tue/since/mon/vda.map
-400 backups/tue/since/mon/vda.qcow2
-400 backups/tue/since/mon/vda.raw
-400 backups/tue/since/mon/vdb.bmap
-400 backups/tue/since/mon/vdb.json
-400 backups/tue/since/mon/vdb.map
-400 backups/tue/since/mon/vdb.qcow2
-400 backups/tue/since/mon/vdb.raw
d700 backups/tue/slices
SLICES backups/tue/slices
-400 backups/tue/status
d700 checkpoints
d700 checkpoints/mon
-400 checkpoints/mon/checkpoint.xml
d700 checkpoints/mon/children
l777 checkpoints/mon/children/tue -> ../../tue
-600 checkpoints/mon/control
-400 checkpoints/mon/status
d700 checkpoints/tue
-400 checkpoints/tue/checkpoint.xml
d700 checkpoints/tue/children
-600 checkpoints/tue/control
l777 checkpoints/tue/parent -> ../mon
-400 checkpoints/tue/status
d700 current
SLICES current
-400 domain.xml
-400 events
-400 last-error
-400 status
";

/// What `current/` and `slices/` hold.
const SLICES: &str = "\
-400 */checkpoint.xml
-400 */domain.xml
-400 */manifest
d700 */vda
d700 */vda/0000
-400 */vda/0000/0000000
-400 */vda/0000/0000001
-400 */vda/0000/0000002
-400 */vda/0000/0000003
d700 */vdb
d700 */vdb/0000
-400 */vdb/0000/0000000
-400 */vdb/0000/0000001
-400 */vdb/0000/0000002
";

fn walk(dir: &Path, below: &str, found: &mut Vec<String>) {
    let mut entries: Vec<_> = fs::read_dir(dir).unwrap().map(Result::unwrap).collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        let name = format!("{below}{}", entry.file_name().to_str().unwrap());
        let meta = fs::symlink_metadata(&path).unwrap();
        let mode = meta.permissions().mode() & 0o7777;
        if meta.is_symlink() {
            let to = fs::read_link(&path).unwrap();
            found.push(format!("l{mode:o} {name} -> {}", to.display()));
        } else if meta.is_dir() {
            found.push(format!("d{mode:o} {name}"));
            walk(&path, &format!("{name}/"), found);
        } else {
            found.push(format!("-{mode:o} {name}"));
        }
    }
}

/// The keys of a status that stand at the beginning of a line.
fn keys(status: &str) -> Vec<&str> {
    let top = status.lines().filter(|line| !line.starts_with(' '));
    top.map(|line| line.split(':').next().unwrap()).collect()
}

/// The same names and modes, whoever serves them; and the same keys in every status.
pub fn the_tree_has_one_shape(story: &mut Story) {
    story.scatter();
    story.checkpoint("mon");
    story.scatter();
    story.backup("tue");
    let mut expected = Vec::new();
    for line in SHAPE.lines() {
        match line.strip_prefix("SLICES ") {
            Some(dir) => expected.extend(SLICES.lines().map(|l| l.replace('*', dir))),
            None => expected.push(line.to_owned()),
        }
    }
    let mut found = Vec::new();
    walk(&story.tree.path(""), "", &mut found);
    assert_eq!(found, expected);

    let read = |name: &str| story.tree.read(name);
    assert_eq!(
        keys(&read("status")),
        [
            "state",
            "version",
            "pid",
            "domain",
            "uuid",
            "source",
            "mounted",
            "checkpoints",
            "backups",
            "options"
        ]
    );
    assert_eq!(
        keys(&read("checkpoints/tue/status")),
        ["checkpoint", "parent", "created", "created-unix", "disks"]
    );
    let mut expected = vec![
        "state",
        "mode",
        "job",
        "base",
        "checkpoint",
        "begun",
        "begun-unix",
        "bytes-pulled",
        "scratch-used",
        "scratch-limit",
        "current",
    ];
    if story.facts().since == Since::Base {
        expected.push("since-base-only-because");
    }
    expected.push("disks");
    assert_eq!(keys(&read("backups/tue/status")), expected);
    story.end("tue");
    assert_eq!(story.tree.list("backups"), [""; 0]);
    assert_eq!(story.tree.list("current"), [""; 0]);
}

/// Each operation that the tree does not have, and names that are none.
pub fn what_the_tree_does_not_have(story: &mut Story) {
    story.checkpoint("mon");
    story.backup("tue");
    let path = |name: &str| story.tree.path(name);
    let raw = path("backups/tue/disk.raw");
    assert_eq!(errno(File::options().write(true).open(&raw)), libc::EROFS);
    let mode = fs::set_permissions(&raw, Permissions::from_mode(0o600));
    story.refused(mode, libc::EROFS, "backups/tue");
    story.refused(File::create(path("backups/x")), libc::EPERM, "backups/x");
    story.refused(symlink("a", path("checkpoints/x")), libc::EPERM, "x");
    story.refused(fs::remove_file(&raw), libc::EPERM, "disk.raw");
    story.refused(fs::rename(&raw, path("backups/x")), libc::EPERM, "rename");
    for dir in ["x", "current/x", "backups/tue/raw/x"] {
        story.refused(story.tree.mkdir(dir), libc::EPERM, dir);
    }
    for dir in ["backups", "current", "backups/tue/raw"] {
        story.refused(story.tree.rmdir(dir), libc::EPERM, dir);
    }
    for parent in ["checkpoints", "backups"] {
        let mkdir = |name: &str| story.tree.mkdir(&format!("{parent}/{name}"));
        for name in ["a b", ".x", "x.xml"] {
            story.refused(mkdir(name), libc::EINVAL, name);
        }
        let long = "x".repeat(252);
        story.refused(mkdir(&long), libc::ENAMETOOLONG, "251");
        let missing = story.tree.rmdir(&format!("{parent}/missing"));
        assert_eq!(errno(missing), libc::ENOENT);
    }
    story.refused(
        story.tree.say("backups/tue/control", "nonsense"),
        libc::EINVAL,
        "abort",
    );
    story.end("tue");
}
