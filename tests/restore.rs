//! `fleecefs restore`, the built command, on files that users hold: random series against a model of
//! the disk, in all forms; and whatever does not fit together, which it must refuse by name.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs::{self, File, FileTimes};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, UNIX_EPOCH};

use common::copies::{UUID, nights};
use common::tools::{find, is_root, need, run, skip, temp_dir, text};
use common::{Night, Rng, image};
use fleecefs::model::{Change, Extents};

const SIZE: u64 = (3 << 20) + 1536;
const SLICE: u64 = 65536;

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let dir = temp_dir();
        fs::create_dir(dir.path().join("out")).unwrap();
        Self(dir)
    }

    fn path(&self, below: &str) -> PathBuf {
        self.0.path().join(below)
    }

    fn restore(&self, words: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_fleecefs"))
            .arg("restore")
            .args(words)
            .current_dir(self.0.path())
            .output()
            .unwrap()
    }

    /// It succeeds, with one line, which is returned.
    #[track_caller]
    fn restores(&self, words: &[&str]) -> String {
        let output = self.restore(words);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{words:?}: {stderr}");
        assert_eq!(stderr, "", "no bar where there is no terminal");
        let said = String::from_utf8(output.stdout).unwrap();
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(said.ends_with(", verified\n"), "{said}");
        said
    }

    /// It refuses with one sentence, and leaves nothing.
    #[track_caller]
    fn refuses(&self, words: &[&str], why: &str) {
        let before = self.left();
        let output = self.restore(words);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success(), "{words:?} should fail: {why}");
        assert!(stderr.contains(why), "{words:?}: {stderr}, not {why}");
        assert_eq!(stderr.lines().count(), 1, "one sentence: {stderr}");
        assert_eq!(self.left(), before, "{words:?}");
    }

    fn left(&self) -> Vec<String> {
        let entries = fs::read_dir(self.path("out")).unwrap();
        let name = |e: std::io::Result<fs::DirEntry>| e.unwrap().file_name().into_string().unwrap();
        let mut names: Vec<String> = entries.map(name).collect();
        names.sort();
        names
    }

    /// mon/ with the whole disk, tue/ and so on each since the one before, with manifests.
    fn series(&self, nights: &[Night]) {
        for (at, night) in nights.iter().enumerate() {
            let dir = self.path(&night.name);
            let base = at.checked_sub(1).map(|i| &nights[i]);
            night.documents(&dir, base);
            let manifest = night.manifest(base, SLICE).write();
            fs::write(dir.join("manifest"), manifest).unwrap();
            match base {
                None => night.whole_raw(&dir),
                Some(base) => night.changes_raw(&dir, &base.name, &night.changes(&[])),
            }
        }
    }

    fn edit(&self, file: &str, old: &str, new: &str) {
        let text = fs::read_to_string(self.path(file)).unwrap();
        assert!(text.contains(old), "{file} has no {old:?}: {text}");
        fs::write(self.path(file), text.replacen(old, new, 1)).unwrap();
    }
}

/// A series in which each generation is since any earlier one, given in any order.
#[test]
fn random_series() {
    need!("qemu-img");
    let mut rng = Rng::from_env();
    for round in 0..12 {
        let place = Place::new();
        let size = [0, 1, SIZE, SIZE + 77, 1 << 20][round % 5];
        let count = rng.within(1..8) as usize;
        let nights = nights(&mut rng, size, count);
        let mut dirs = Vec::new();
        for (at, night) in nights.iter().enumerate() {
            let dir = format!("copies/{}", rng.within(0..1 << 40));
            let base = at.checked_sub(1).map(|last| {
                let base = if rng.once_in(3) {
                    rng.within(0..at as u64) as usize
                } else {
                    last
                };
                (base, &nights[base])
            });
            let (path, of) = (place.path(&dir), base.map(|b| b.1));
            night.documents(&path, of);
            // The other documents are enough.
            if !rng.once_in(3) {
                fs::write(path.join("manifest"), night.manifest(of, SLICE).write()).unwrap();
            }
            match base {
                Some((base, of)) if !rng.once_in(5) => {
                    let changes = night.changes(&nights[base + 1..at]);
                    night.changes_raw(&path, &of.name, &changes);
                }
                _ => night.whole_raw(&path),
            }
            dirs.push(dir);
        }
        let until = rng.within(0..nights.len() as u64) as usize;
        let night = &nights[until];
        let mut words = vec!["--until", &night.name];
        if until == nights.len() - 1 && rng.once_in(2) {
            words.clear();
        }
        // A reader of order would be lucky.
        if rng.once_in(2) {
            dirs.sort();
            words.extend(dirs.iter().map(String::as_str));
        } else {
            words.push("copies");
        }
        let said = place.restores(&[&words[..], &["out/vda.raw"]].concat());
        night.disk.assert_file(&place.path("out/vda.raw"));
        let line = format!("restored vda of vm 1 as of {} of 2026-1", night.name);
        assert!(said.starts_with(&line), "{said}");
        if size.is_multiple_of(512) {
            let words = [&words[..], &["--format", "qcow2", "out/vda.qcow2"]].concat();
            place.restores(&words);
            night.disk.assert_is(
                &image::bytes(&place.path("out/vda.qcow2"), "qcow2"),
                "qcow2",
            );
        }
        assert!(place.left().iter().all(|name| !name.starts_with('.')));
    }
}

#[test]
fn random_slices() {
    let mut rng = Rng::from_env();
    for size in [0, 1, SLICE, SIZE, SIZE + 77] {
        let place = Place::new();
        let night = nights(&mut rng, size, 3).pop().unwrap();
        night.slices(&place.path("current"), SLICE);
        let said = place.restores(&["current", "out/vda.raw"]);
        night.disk.assert_file(&place.path("out/vda.raw"));
        assert!(
            said.starts_with("restored vda of vm 1 as of wed of 2026-11-25T22:00:00Z: "),
            "{said}"
        );
        // The same by name.
        let words = ["--disk", "vda", "--until", "wed", "current", "out/again"];
        place.restores(&words);
        night.disk.assert_file(&place.path("out/again"));
        // The same in what was copied of a backup.
        night.documents(&place.path("wed"), None);
        night.slices(&place.path("wed/slices"), SLICE);
        place.restores(&["wed", "out/third"]);
        night.disk.assert_file(&place.path("out/third"));
    }
}

/// Copies of the overlays side by side under the names that their headers expect; and the same in the
/// directories of a series.
#[test]
fn random_chains() {
    need!("qemu-img");
    let mut rng = Rng::from_env();
    for round in 0..4 {
        let place = Place::new();
        let count = rng.within(2..7) as usize;
        let nights = nights(&mut rng, [SIZE, 1 << 20][round % 2], count);
        for (at, night) in nights.iter().enumerate() {
            let beside = place.path(&format!("ch:a,in/{}.qcow2", night.name));
            let dir = place.path(&format!("series/{}", night.name));
            match at.checked_sub(1).map(|i| &nights[i]) {
                None => {
                    night.documents(&dir, None);
                    night.whole_qcow2(&beside);
                    night.whole_qcow2(&dir.join("qcow2/vda.qcow2"));
                }
                Some(base) => {
                    night.documents(&dir, Some(base));
                    let changes = night.changes(&[]);
                    night.changes_qcow2(&beside, &base.name, &changes);
                    let path = dir.join("since").join(&base.name).join("vda.qcow2");
                    night.changes_qcow2(&path, &base.name, &changes);
                }
            }
        }
        let (last, some) = (
            nights.last().unwrap(),
            &nights[rng.within(0..count as u64) as usize],
        );
        let top = format!("ch:a,in/{}.qcow2", last.name);
        for source in [top.as_str(), "series"] {
            place.restores(&[source, "out/vda.raw", "--force"]);
            last.disk.assert_file(&place.path("out/vda.raw"));
            place.restores(&["--until", &some.name, source, "out/some.raw", "--force"]);
            some.disk.assert_file(&place.path("out/some.raw"));
            place.restores(&["--format=qcow2", source, "out/vda.qcow2", "--force"]);
            last.disk
                .assert_is(&image::bytes(&place.path("out/vda.qcow2"), "qcow2"), source);
            let info = run("qemu-img", &["info", text(&place.path("out/vda.qcow2"))]);
            assert!(!info.contains("backing file"), "it stands alone: {info}");
        }
    }
}

/// Three nights, and something is wrong with them.
#[test]
fn a_series_that_does_not_fit_is_refused_by_name() {
    let mut rng = Rng::new(1);
    let nights = loop {
        let nights = nights(&mut rng, SIZE, 3);
        // The last one changed something, and not everything; in tue there are zeros too.
        let dirty = |at: usize, kind| nights[at].changes(&[]).bytes(|c| c == kind) > 0;
        if dirty(2, Change::Dirty) && dirty(2, Change::Clean) && dirty(1, Change::DirtyZero) {
            break nights;
        }
    };
    let wrong = |why: &str, with: &dyn Fn(&Place)| {
        let place = Place::new();
        place.series(&nights);
        with(&place);
        place.refuses(&["mon", "tue", "wed", "out/vda.raw"], why);
    };
    let remove = |place: &Place, path: &str| fs::remove_file(place.path(path)).unwrap();
    let cut = |place: &Place, path: &str, by: u64| {
        let file = File::options().write(true).open(place.path(path)).unwrap();
        file.set_len(file.metadata().unwrap().len() - by).unwrap();
    };

    let place = Place::new();
    place.series(&nights);
    place.restores(&["wed", "mon", "tue", "out/vda.raw"]);
    nights[2].disk.assert_file(&place.path("out/vda.raw"));
    place.refuses(
        &["mon", "wed", "out/x"],
        "there is a gap: wed has the changes of vda since tue of 2026-11-24T22:00:00Z, and no \
         generation with the checkpoint tue was given",
    );
    place.refuses(
        &["tue", "wed", "out/x"],
        "tue has the changes of vda since mon",
    );
    place.refuses(
        &["--until", "thu", "mon", "tue", "out/x"],
        "no generation thu",
    );
    place.refuses(
        &["--disk", "vdb", "mon", "tue", "out/x"],
        "tue has no disk vdb",
    );
    place.refuses(
        &["mon", "tue", "mon", "out/x"],
        "mon and mon both claim to be mon",
    );
    place.refuses(&["mon", "none", "out/x"], "cannot find none");
    place.refuses(
        &["mon/raw", "out/x"],
        "mon/raw holds nothing to restore from",
    );
    place.refuses(
        &["mon", "mon/raw/vda.raw", "out/x"],
        "must be the only source",
    );
    // What comes after the gap is not asked for.
    place.restores(&["--until", "mon", "mon", "wed", "out/mon"]);
    nights[0].disk.assert_file(&place.path("out/mon"));

    let other = "6ba7b810-9dad-11d1-80b4-00c04fd430c9";
    wrong("mon and wed are of two domains", &|place| {
        for file in ["manifest", "domain.xml", "checkpoint.xml"] {
            place.edit(&format!("wed/{file}"), UUID, other);
        }
    });
    wrong("not of one backup: its domain is", &|place| {
        place.edit("wed/domain.xml", UUID, other);
    });
    wrong(
        "not of one backup: its checkpoint is wed and tue",
        &|place| {
            fs::copy(
                place.path("tue/checkpoint.xml"),
                place.path("wed/checkpoint.xml"),
            )
            .unwrap();
        },
    );
    wrong("not of one backup: its base is tue and mon", &|place| {
        fs::copy(place.path("tue/backup.xml"), place.path("wed/backup.xml")).unwrap();
    });
    wrong("mon made another mon, at 2026-11-23T21:59:59Z", &|place| {
        let (right, wrong) = ("<creationTime>1795471200", "<creationTime>1795471199");
        place.edit("mon/checkpoint.xml", right, wrong);
        remove(place, "mon/manifest");
    });
    wrong("tue and wed both claim to be tue", &|place| {
        for (from, to) in [("tue", "wed")] {
            for file in ["manifest", "backup.xml", "checkpoint.xml"] {
                fs::copy(place.path(from).join(file), place.path(to).join(file)).unwrap();
            }
        }
    });
    wrong("a gap: wed has neither all of vda nor changes", &|place| {
        // Swapped: the changes of each in the directory of the other.
        fs::rename(place.path("tue/since"), place.path("s")).unwrap();
        fs::rename(place.path("wed/since"), place.path("tue/since")).unwrap();
        fs::rename(place.path("s"), place.path("wed/since")).unwrap();
        fs::rename(place.path("wed/since/mon"), place.path("wed/since/wed")).unwrap();
    });
    wrong("tue has neither all of vda nor changes of it", &|place| {
        fs::rename(place.path("tue/since"), place.path("s")).unwrap();
        fs::rename(place.path("wed/since"), place.path("tue/since")).unwrap();
        fs::rename(place.path("s"), place.path("wed/since")).unwrap();
        fs::create_dir(place.path("wed/since/tue")).unwrap();
        fs::rename(
            place.path("wed/since/mon/vda.raw"),
            place.path("wed/since/tue/vda.raw"),
        )
        .unwrap();
        fs::rename(
            place.path("wed/since/mon/vda.map"),
            place.path("wed/since/tue/vda.map"),
        )
        .unwrap();
    });
    wrong("tue/since/mon/vda.map: line 2 of the map", &|place| {
        let map = fs::read_to_string(place.path("tue/since/mon/vda.map")).unwrap();
        let lines: Vec<&str> = map.split_inclusive('\n').collect();
        let less = [&lines[..1], &lines[2..]].concat().concat();
        fs::write(place.path("tue/since/mon/vda.map"), less).unwrap();
    });
    wrong("the map's last line is cut short", &|place| {
        cut(place, "wed/since/tue/vda.map", 1)
    });
    wrong("in the generation before", &|place| {
        let map = fs::read_to_string(place.path("wed/since/tue/vda.map")).unwrap();
        let (less, _) = map.trim_end().rsplit_once('\n').unwrap();
        fs::write(place.path("wed/since/tue/vda.map"), format!("{less}\n")).unwrap();
    });
    wrong("where its map says that there is none", &|place| {
        place.edit("wed/since/tue/vda.map", "1  dirty", "0  clean");
    });
    wrong("where its map says that there is none", &|place| {
        fs::copy(
            place.path("tue/since/mon/vda.raw"),
            place.path("wed/since/tue/vda.raw"),
        )
        .unwrap();
    });
    wrong("cannot read wed/since/tue/vda.map", &|place| {
        remove(place, "wed/since/tue/vda.map")
    });
    wrong(
        "vda.raw has 3147263 bytes and should have 3147264",
        &|place| {
            cut(place, "wed/since/tue/vda.raw", 1);
        },
    );
    wrong("vda has 3147264 bytes in mon and 3146752", &|place| {
        cut(place, "mon/raw/vda.raw", 512)
    });
    wrong("vda has 3147264 bytes in tue and 3146752", &|place| {
        cut(place, "mon/raw/vda.raw", 512);
        remove(place, "mon/manifest");
    });
    wrong(
        "tue has since and neither backup.xml nor manifest",
        &|place| {
            remove(place, "tue/backup.xml");
            remove(place, "tue/manifest");
        },
    );
    wrong("wed/manifest: the manifest is not usable", &|place| {
        cut(place, "wed/manifest", 1)
    });
    wrong("wed/backup.xml: line", &|place| {
        cut(place, "wed/backup.xml", 3)
    });
    wrong("a circle", &|place| {
        let since = |n: &str| place.path(&format!("mon/since/{n}"));
        fs::create_dir(place.path("mon/since")).unwrap();
        fs::rename(place.path("mon/raw"), since("wed")).unwrap();
        for night in ["mon", "tue", "wed"] {
            remove(place, &format!("{night}/manifest"));
            place.edit(
                &format!("{night}/checkpoint.xml"),
                "<creationTime>",
                "<!-- ",
            );
            place.edit(
                &format!("{night}/checkpoint.xml"),
                "</creationTime>",
                " -->",
            );
        }
    });
    wrong("wed is since tue, and is older than it", &|place| {
        place.edit("wed/checkpoint.xml", "<creationTime>17", "<creationTime>16");
        remove(place, "wed/manifest");
        // Not the newest any more, by its time; but nothing is since it.
    });
}

#[test]
fn the_newest_of_several_ends() {
    let mut rng = Rng::new(2);
    let nights = nights(&mut rng, 1 << 20, 4);
    let place = Place::new();
    place.series(&nights[..2]);
    // A new series, begun before the old one was thrown away.
    nights[2].documents(&place.path("wed"), Some(&nights[1]));
    nights[2].whole_raw(&place.path("wed"));
    nights[3].documents(&place.path("thu"), Some(&nights[1]));
    let changes = nights[3].changes(&nights[2..3]);
    nights[3].changes_raw(&place.path("thu"), "tue", &changes);
    place.restores(&["thu", "mon", "wed", "tue", "out/vda.raw"]);
    nights[3].disk.assert_file(&place.path("out/vda.raw"));
    // Nothing tells which of the two is later.
    for night in ["wed", "thu"] {
        fs::remove_file(place.path(night).join("checkpoint.xml")).unwrap();
    }
    let words = ["thu", "mon", "wed", "tue", "out/x"];
    place.refuses(&words, "which generation is the newest cannot be told");
    place.restores(&[&["--until", "wed"], &words[..]].concat());
    nights[2].disk.assert_file(&place.path("out/x"));
}

/// A copy of disk.raw is one of the first disk.
#[test]
fn several_disks() {
    let mut rng = Rng::new(3);
    let night = nights(&mut rng, 1 << 20, 1).remove(0);
    let place = Place::new();
    night.documents(&place.path("mon"), None);
    night.whole_raw(&place.path("mon"));
    fs::rename(place.path("mon/raw/vda.raw"), place.path("mon/disk.raw")).unwrap();
    place.restores(&["mon", "out/one"]);
    night.disk.assert_file(&place.path("out/one"));
    fs::write(place.path("mon/raw/vdb.raw"), "other").unwrap();
    place.refuses(
        &["mon", "out/x"],
        "mon has several disks (choose one with --disk: vda, vdb)",
    );
    place.restores(&["--disk=vdb", "mon", "out/two"]);
    assert_eq!(fs::read(place.path("out/two")).unwrap(), b"other");
}

#[test]
fn slices_that_do_not_fit_are_refused() {
    let mut rng = Rng::new(4);
    let night = nights(&mut rng, SIZE, 1).remove(0);
    let wrong = |why: &str, with: &dyn Fn(&Place, &Path)| {
        let place = Place::new();
        night.slices(&place.path("current"), SLICE);
        with(&place, &place.path("current/vda/0000"));
        place.refuses(&["current", "out/vda.raw"], why);
    };
    wrong("0000017 is missing", &|_, dir| {
        fs::remove_file(dir.join("0000017")).unwrap()
    });
    wrong("0000048 is missing", &|_, dir| {
        fs::remove_file(dir.join("0000048")).unwrap()
    });
    wrong(
        "0000003 has 9 bytes, and by the manifest 65536",
        &|_, dir| {
            fs::write(dir.join("0000003"), "truncated").unwrap();
        },
    );
    wrong("0000049 is no slice by the manifest", &|_, dir| {
        fs::write(dir.join("0000049"), "").unwrap();
    });
    wrong("0000003~ is no slice", &|_, dir| {
        fs::write(dir.join("0000003~"), "").unwrap()
    });
    wrong("current/vda/0001 is no slice", &|place, _| {
        fs::create_dir(place.path("current/vda/0001")).unwrap();
    });
    wrong("0000000 is not a file", &|_, dir| {
        // A directory has bytes too.
        fs::remove_file(dir.join("0000000")).unwrap();
        fs::create_dir(dir.join("0000000")).unwrap();
    });
    wrong(
        "vda/0000/0000048 has 1536 bytes, and by the manifest 2048",
        &|place, _| {
            place.edit("current/manifest", "size: 3147264", "size: 3147776");
        },
    );
    wrong("are not 49 slices of 131072", &|place, _| {
        place.edit(
            "current/manifest",
            "slice-size: 65536",
            "slice-size: 131072",
        );
    });
    wrong("current holds nothing", &|place, _| {
        fs::remove_file(place.path("current/manifest")).unwrap();
    });
    wrong(
        "not of one backup: its checkpoint is mon and tue",
        &|place, _| {
            place.edit("current/checkpoint.xml", "<name>mon", "<name>tue");
        },
    );
    // Of two backups: times were copied, and one slice is newer than the manifest.
    let touch = |path: PathBuf, time: u64| {
        let time = UNIX_EPOCH + Duration::from_secs(time);
        let file = File::options().write(true).open(path).unwrap();
        file.set_times(FileTimes::new().set_modified(time)).unwrap();
    };
    wrong("0000005 is not older than the manifest", &|place, dir| {
        touch(place.path("current/manifest"), night.unix + 1);
        touch(dir.join("0000004"), night.unix);
        touch(dir.join("0000005"), night.unix + 86400);
    });
    // An unfinished file of rsync's is none of the tree.
    let place = Place::new();
    night.slices(&place.path("current"), SLICE);
    fs::write(place.path("current/vda/0000/.0000004.Xq2"), "x").unwrap();
    place.restores(&["current", "out/vda.raw"]);
    place.refuses(
        &["--until=tue", "current", "out/x"],
        "of one instant, mon, and not of tue",
    );
    place.refuses(&["current", "current", "out/x"], "must be the only source");
}

#[test]
fn chains_that_do_not_fit_are_refused() {
    need!("qemu-img");
    let mut rng = Rng::new(5);
    let nights = nights(&mut rng, SIZE, 3);
    let wrong = |why: &str, with: &dyn Fn(&Place)| {
        let place = Place::new();
        nights[0].whole_qcow2(&place.path("ch:a,in/mon.qcow2"));
        for pair in nights.windows(2) {
            let path = place.path(&format!("ch:a,in/{}.qcow2", pair[1].name));
            // All of it, so that there is something to damage.
            let all = Extents::uniform(SIZE, Change::Dirty);
            pair[1].changes_qcow2(&path, &pair[0].name, &all);
        }
        with(&place);
        place.refuses(&["ch:a,in/wed.qcow2", "out/vda.raw"], why);
    };
    let cut = |place: &Place, path: &str, by: u64| {
        let file = File::options().write(true).open(place.path(path)).unwrap();
        file.set_len(file.metadata().unwrap().len() - by).unwrap();
    };
    wrong(
        "a gap: ch:a,in/tue.qcow2 is since mon.qcow2, and there is no such",
        &|place| {
            fs::remove_file(place.path("ch:a,in/mon.qcow2")).unwrap();
        },
    );
    wrong("ch:a,in/wed.qcow2 is cut short", &|place| {
        cut(place, "ch:a,in/wed.qcow2", 65000)
    });
    wrong("ch:a,in/mon.qcow2 is damaged", &|place| {
        cut(place, "ch:a,in/mon.qcow2", 1 << 20)
    });
    wrong("ch:a,in/tue.qcow2 is damaged", &|place| {
        let file = File::options()
            .write(true)
            .open(place.path("ch:a,in/tue.qcow2"))
            .unwrap();
        // The first L2 table comes behind header, refcounts and L1.
        file.write_all_at(&[0x80, 0, 0, 0, 0, 1, 0, 0], 4 * 65536 + 8)
            .unwrap();
    });
    wrong("ch:a,in/mon.qcow2 is not a qcow2 image", &|place| {
        fs::write(place.path("ch:a,in/mon.qcow2"), nights[0].disk.bytes()).unwrap();
    });
    wrong(
        "the disk has 1048576 bytes in ch:a,in/mon.qcow2 and 3147264 in",
        &|place| {
            fs::remove_file(place.path("ch:a,in/mon.qcow2")).unwrap();
            image::create(&place.path("ch:a,in/mon.qcow2"), "qcow2", 1 << 20, "");
        },
    );
    wrong("circle", &|place| {
        let path = place.path("ch:a,in/tue.qcow2");
        let all = Extents::uniform(SIZE, Change::Dirty);
        nights[1].changes_qcow2(&path, "wed", &all);
    });
    let place = Place::new();
    nights[0].whole_qcow2(&place.path("mon.qcow2"));
    place.refuses(
        &["--disk=vda", "mon.qcow2", "out/x"],
        "mon.qcow2 is one disk",
    );
    place.refuses(&["--until=tue", "mon.qcow2", "out/x"], "is named tue");
    fs::write(place.path("raw"), "QFI").unwrap();
    place.refuses(&["raw", "out/x"], "raw is not a qcow2 image");
}

#[test]
fn the_output() {
    let mut rng = Rng::new(6);
    let mut night = nights(&mut rng, SIZE, 1).remove(0);
    // Long zeros, as data.
    let write = common::Write {
        offset: 65536,
        length: 2 << 20,
        pattern: 0,
    };
    night.disk.apply(write);
    let place = Place::new();
    night.slices(&place.path("current"), SLICE);
    place.restores(&["current", "out/vda.raw"]);
    let meta = fs::metadata(place.path("out/vda.raw")).unwrap();
    assert!(
        meta.blocks() * 512 <= SIZE - (2 << 20) + 65536,
        "it has holes"
    );
    assert_eq!(meta.mode() & 0o777, 0o600, "for its owner only");

    place.refuses(&["current", "out/vda.raw"], "out/vda.raw exists");
    place.refuses(&["current", "out"], "out exists");
    place.refuses(
        &["--force", "current", "out"],
        "neither a file nor a block device",
    );
    place.refuses(
        &["current", "none/vda.raw"],
        "none/vda.raw is in no directory that exists",
    );
    fs::write(place.path("out/old"), "old").unwrap();
    std::os::unix::fs::symlink("old", place.path("out/link")).unwrap();
    std::os::unix::fs::symlink("nowhere", place.path("out/dangling")).unwrap();
    place.refuses(&["current", "out/dangling"], "out/dangling exists");
    place.restores(&["--force", "current", "out/link"]);
    night.disk.assert_file(&place.path("out/old"));
    assert!(
        fs::symlink_metadata(place.path("out/link"))
            .unwrap()
            .is_symlink()
    );
    // A source is not replaced by what is made of it.
    let inside = "current/vda/0000/0000001";
    place.refuses(
        &["--force", "current", inside],
        "is a part of the source current",
    );
    // What is refused leaves what is there.
    fs::remove_file(place.path("current/vda/0000/0000004")).unwrap();
    place.refuses(&["--force", "current", "out/old"], "0000004 is missing");
    night.disk.assert_file(&place.path("out/old"));
}

#[test]
fn who_interrupts_it_finds_nothing() {
    let mut rng = Rng::new(7);
    let night = nights(&mut rng, SIZE, 1).remove(0);
    let place = Place::new();
    night.slices(&place.path("current"), SLICE);
    let request = fleecefs::restore::Request {
        sources: vec![place.path("current")],
        output: place.path("out/vda.raw"),
        format: fleecefs::model::Format::Raw,
        disk: None,
        until: None,
        force: false,
    };
    let said = fleecefs::restore::run(&request, &true.into()).unwrap_err();
    assert!(said.message().contains("interrupted"), "{said}");
    assert_eq!(place.left(), [""; 0]);
}

/// A device or file system, taken away in the end.
struct Undo(&'static str, String);

impl Drop for Undo {
    fn drop(&mut self) {
        let args: &[&str] = if self.0 == "losetup" { &["-d"] } else { &[] };
        let program = find(self.0).unwrap();
        let _ = Command::new(program).args(args).arg(&self.1).status();
    }
}

#[test]
fn a_device() {
    need!("losetup", "qemu-img");
    if !is_root() {
        return skip("loop devices need root");
    }
    let mut rng = Rng::new(8);
    let nights = nights(&mut rng, SIZE, 2);
    let place = Place::new();
    place.series(&nights);
    nights[1].whole_qcow2(&place.path("tue.qcow2"));
    let larger = SIZE + 4096;
    fs::write(place.path("device"), vec![0xaa; larger as usize]).unwrap();
    let said = run("losetup", &["-f", "--show", text(&place.path("device"))]);
    let device = Undo("losetup", said.trim().to_owned());
    for source in [&["mon", "tue"][..], &["tue.qcow2"]] {
        fs::write(place.path("device"), vec![0xaa; larger as usize]).unwrap();
        place.restores(&[source, &[&device.1]].concat());
        let mut found = fs::read(place.path("device")).unwrap();
        let rest = found.split_off(SIZE as usize);
        nights[1].disk.assert_is(&found, "device");
        assert!(
            rest.iter().all(|b| *b == 0xaa),
            "what comes after is not touched"
        );
    }
    place.refuses(
        &["--format=qcow2", "tue.qcow2", &device.1],
        "takes a raw image",
    );
    drop(device);
    fs::write(place.path("device"), vec![0xaa; 4096]).unwrap();
    let said = run("losetup", &["-f", "--show", text(&place.path("device"))]);
    let device = Undo("losetup", said.trim().to_owned());
    place.refuses(
        &["tue.qcow2", &device.1],
        "has 4096 bytes, and the disk has",
    );
    place.refuses(
        &["mon", "tue", &device.1],
        "has 4096 bytes, and the disk has",
    );
    assert_eq!(fs::read(place.path("device")).unwrap(), vec![0xaa; 4096]);
}

#[test]
fn a_full_disk() {
    need!("mount", "umount", "qemu-img");
    if !is_root() {
        return skip("mounting needs root");
    }
    let mut rng = Rng::new(9);
    let nights = nights(&mut rng, SIZE, 2);
    let place = Place::new();
    place.series(&nights);
    nights[1].whole_qcow2(&place.path("tue.qcow2"));
    let out = place.path("out");
    run(
        "mount",
        &["-t", "tmpfs", "-o", "size=1M", "none", text(&out)],
    );
    let _undo = Undo("umount", text(&out).to_owned());
    place.refuses(&["mon", "tue", "out/vda.raw"], "No space left");
    place.refuses(&["tue.qcow2", "out/vda.raw"], "cannot");
}
