//! Every shell block of docs/restore.md, run in a directory that has what the document says a user has.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::copies::nights;
use common::tools::{find, is_root, need, skip, temp_dir};
use common::{Night, Rng};
use fleecefs::model::Change;

const SIZE: u64 = (5 << 20) + 512;

/// The fenced shell blocks, each with the heading that it stands under.
fn blocks(text: &str) -> Vec<(String, String)> {
    let mut found: Vec<(String, String)> = Vec::new();
    let (mut heading, mut inside, mut fenced) = (String::new(), false, false);
    for line in text.lines() {
        if let Some(tag) = line.strip_prefix("```") {
            fenced = !fenced;
            inside = fenced && tag == "sh";
            if inside {
                found.push((heading.clone(), String::new()));
            }
        } else if inside {
            let block = &mut found.last_mut().unwrap().1;
            block.push_str(line);
            block.push('\n');
        } else if let Some(words) = line.strip_prefix("## ") {
            heading = words.to_owned();
        }
    }
    found
}

/// What the document's table lists, of mon, tue and wed.
fn prepare(dir: &Path, nights: &[Night]) {
    let last = nights.last().unwrap();
    last.slices(&dir.join("current"), 65536);
    let image = |night: &Night| dir.join(format!("chain/{}.qcow2", night.name));
    nights[0].documents(&dir.join("series/mon"), None);
    nights[0].whole_raw(&dir.join("series/mon"));
    nights[0].whole_qcow2(&image(&nights[0]));
    for pair in nights.windows(2) {
        let (base, night) = (&pair[0], &pair[1]);
        let changes = night.changes(&[]);
        let copy = dir.join("series").join(&night.name);
        night.documents(&copy, Some(base));
        night.changes_raw(&copy, &base.name, &changes);
        night.changes_qcow2(&image(night), &base.name, &changes);
    }
}

#[test]
fn every_line_of_the_document_restores() {
    need!("qemu-img", "bmaptool", "losetup", "bash");
    let document = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/restore.md");
    let blocks = blocks(&fs::read_to_string(document).unwrap());
    assert!(blocks.len() >= 9, "where are the blocks? {blocks:?}");
    let mut rng = Rng::from_env();
    let nights = loop {
        let nights = nights(&mut rng, SIZE, 3);
        let changes = |at: usize, kind| nights[at].changes(&[]).bytes(|c| c == kind);
        if changes(1, Change::Dirty) > 0 && changes(2, Change::DirtyZero) > 0 {
            break nights;
        }
    };
    let bin = Path::new(env!("CARGO_BIN_EXE_fleecefs")).parent().unwrap();
    let path = std::env::var("PATH").unwrap();
    let path = format!("{}:{path}:/usr/sbin:/sbin", bin.display());
    for (heading, block) in &blocks {
        if block.contains("losetup") && !is_root() {
            skip("loop devices need root");
            continue;
        }
        let dir = temp_dir();
        prepare(dir.path(), &nights);
        let output = Command::new(find("bash").unwrap())
            .args(["-euo", "pipefail", "-c", block])
            .current_dir(dir.path())
            .env("PATH", &path)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{heading}:\n{block}\n{said}");
        nights[2].disk.assert_file(&dir.path().join("vda.raw"));
        if block.contains("tue.raw") {
            nights[1].disk.assert_file(&dir.path().join("tue.raw"));
        }
        println!("{heading}: {} lines", block.lines().count());
    }
}

/// The warning is true: bmaptool empties a plain file.
#[test]
fn bmaptool_empties_a_plain_file() {
    need!("bmaptool");
    let nights = loop {
        let nights = nights(&mut Rng::from_env(), SIZE, 2);
        let map = nights[1].changes(&[]);
        if map.bytes(|c| c == Change::Dirty) > 0 && map.bytes(|c| c == Change::Clean) > 0 {
            break nights;
        }
    };
    let dir = temp_dir();
    let path = |name: &str| dir.path().join(name);
    nights[1].changes_raw(dir.path(), "mon", &nights[1].changes(&[]));
    fs::write(path("copy"), nights[0].disk.bytes()).unwrap();
    let output = Command::new(find("bmaptool").unwrap())
        .args([
            "copy",
            "--bmap",
            "since/mon/vda.bmap",
            "since/mon/vda.raw",
            "copy",
        ])
        .current_dir(dir.path())
        .output()
        .unwrap();
    assert!(output.status.success());
    assert!(fs::read(path("copy")).unwrap() != nights[1].disk.bytes());
}
