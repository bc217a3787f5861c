//! Files that do not fit together: `fleecefs restore` refuses each case by name, and leaves nothing.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs::{self, File, FileTimes};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use common::copies::{UUID, nights};
use common::restoring::SLICE;
use common::tools::need;
use common::{Place, Rng, image};
use fleecefs::model::{Change, Extents};

const SIZE: u64 = (3 << 20) + 1536;

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
