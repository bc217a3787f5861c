//! Checkpoint and backup documents: the corpus in tests/xml, which the schemas in docs/ and the
//! reader must judge alike; documents that are written and read again; and documents damaged at
//! random, which may be refused but must not do harm.
//!
//! `tests/xml/good` is what both accept, `bad` what both refuse, `reader-only` what no schema can
//! say. Every refusal's sentence stands in `tests/xml/refusals.txt`; `FLEECEFS_BLESS=1` rewrites it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use fleecefs::model::Mode;
use fleecefs::xml::{BackupDocument, CheckpointDocument, Error, MAX_BYTES};

#[path = "xml/damage.rs"]
mod damage;
#[path = "xml/written.rs"]
mod written;

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The files of a part of the corpus.
fn corpus(part: &str) -> Vec<PathBuf> {
    let dir = repository().join("tests/xml").join(part);
    let mut files: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    assert!(files.len() > 5, "{part} has files");
    files
}

/// Which document a file is meant to be: the first word of its name.
fn kind(file: &Path) -> &'static str {
    let name = file.file_name().unwrap().to_str().unwrap();
    if name.starts_with("backup-") {
        "domainbackup"
    } else {
        assert!(name.starts_with("checkpoint-"), "{name}");
        "domaincheckpoint"
    }
}

/// Reads, writes and reads again what a file holds.
fn read(kind: &str, bytes: &[u8]) -> Result<(), Error> {
    if kind == "domainbackup" {
        let document = BackupDocument::read(bytes)?;
        let again = BackupDocument::read(document.write().as_bytes());
        assert_eq!(again, Ok(document), "what was written says the same");
    } else {
        let document = CheckpointDocument::read(bytes)?;
        let again = CheckpointDocument::read(document.write().as_bytes());
        assert_eq!(again, Ok(document), "what was written says the same");
    }
    Ok(())
}

fn reason(file: &Path) -> Option<String> {
    let bytes = std::fs::read(file).unwrap();
    read(kind(file), &bytes).err().map(|e| e.to_string())
}

#[test]
fn the_reader_accepts_what_is_good() {
    for file in corpus("good") {
        assert_eq!(reason(&file), None, "{}", file.display());
    }
}

#[test]
fn every_refusal_is_a_sentence_with_a_line() {
    let mut text = String::new();
    for file in corpus("bad").into_iter().chain(corpus("reader-only")) {
        let name = file.file_name().unwrap().to_str().unwrap();
        let reason = reason(&file).unwrap_or_else(|| panic!("{name} was accepted"));
        assert!(reason.len() < 400, "{name}: {reason}");
        assert!(!reason.contains(char::is_control), "{name}: {reason:?}");
        text.push_str(&format!("{name}\n    {reason}\n"));
    }
    let expected = repository().join("tests/xml/refusals.txt");
    if std::env::var_os("FLEECEFS_BLESS").is_some() {
        std::fs::write(&expected, &text).unwrap();
    }
    let expected = std::fs::read_to_string(expected).unwrap();
    for (now, before) in text.lines().zip(expected.lines()) {
        assert_eq!(now, before);
    }
    assert_eq!(text.len(), expected.len());
}

/// Is xmllint there? Where nothing may be skipped it has to be.
fn xmllint() -> bool {
    let found = Command::new("xmllint").arg("--version").output().is_ok();
    if !found {
        let strict = std::env::var("FLEECEFS_TESTS_STRICT").is_ok_and(|v| v == "1");
        assert!(!strict, "xmllint is not installed; run scripts/deps test");
        eprintln!("SKIPPED: xmllint is not installed");
    }
    found
}

/// What xmllint says of files: does the schema accept them?
fn validated(kind: &str, files: &[PathBuf]) -> BTreeMap<PathBuf, bool> {
    let output = Command::new("xmllint")
        .args(["--noout", "--nonet", "--relaxng"])
        .arg(repository().join(format!("docs/{kind}.rng")))
        .args(files)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> = text.lines().collect();
    files
        .iter()
        .map(|file| {
            // A file that is not even well formed gets neither line.
            let verdict = lines.contains(&format!("{} validates", file.display()).as_str());
            (file.clone(), verdict)
        })
        .collect()
}

#[test]
fn the_schemas_agree_with_the_reader() {
    if !xmllint() {
        return;
    }
    for (part, accepted) in [("good", true), ("bad", false), ("reader-only", true)] {
        for wanted in ["domaincheckpoint", "domainbackup"] {
            let mut files = corpus(part);
            files.retain(|file| kind(file) == wanted);
            for (file, verdict) in validated(wanted, &files) {
                assert_eq!(verdict, accepted, "{}", file.display());
            }
        }
    }
}

#[test]
fn what_the_engine_asks_a_document_for() {
    let text = b"<domainbackup mode='pull'>\n\n  <incremental>mon</incremental>\n  <disks>\n    \
        <disk name='vda'/>\n    <disk\n      name='vdb' incremental='sun'/></disks>\n\
        <domaincheckpoint><name>tue</name></domaincheckpoint></domainbackup>";
    let document = BackupDocument::read(text).unwrap();
    let base = document.incremental.unwrap();
    assert_eq!((base.value.as_str(), base.place.line), ("mon", 3));
    let lines: Vec<_> = document.disks.iter().map(|d| d.place.line).collect();
    assert_eq!(lines, [5, 6]);
    let checkpoint = document.checkpoint.unwrap();
    let place = checkpoint.name.unwrap().place;
    assert_eq!((place.line, place.column), (8, 19));
    let refusal = place
        .refuse("there is no checkpoint \"tue\"")
        .into_refusal();
    assert_eq!(refusal.kind(), fleecefs::model::Kind::Invalid);
    assert_eq!(
        refusal.to_string(),
        "line 8: there is no checkpoint \"tue\""
    );

    // Nothing said: push, everything in full.
    let empty = BackupDocument::read(b"<domainbackup/>").unwrap();
    assert_eq!(empty, BackupDocument::default());
    assert_eq!(empty.mode, Mode::Push);
    // No checkpoint at all is not the same as nothing said about it.
    let none = b"<domainbackup><domaincheckpoint><disks><disk name='a' checkpoint='no'/></disks>\
        </domaincheckpoint></domainbackup>";
    let checkpoint = BackupDocument::read(none).unwrap().checkpoint.unwrap();
    assert!(checkpoint.disks.iter().all(|d| d.bitmap.is_none()));
}

#[test]
fn hostile_documents_cost_little() {
    let begun = Instant::now();
    let refused = |text: String, why: &str| {
        for read in [
            |b: &[u8]| CheckpointDocument::read(b).err(),
            |b: &[u8]| BackupDocument::read(b).err(),
        ] {
            let error = read(text.as_bytes()).expect(why).to_string();
            assert!(error.contains(why), "{error}");
            assert!(error.len() < 500, "{} bytes of message", error.len());
        }
    };
    let fill = |unit: &str| unit.repeat((MAX_BYTES - 1000) / unit.len());
    refused(" ".repeat(MAX_BYTES + 1), "longer than 1024 KiB");
    refused(fill("<a>"), "deeper than 64");
    refused(format!("<a {}/>", fill("b='' ")), "given twice");
    let many = |i: usize| format!("b{i}='' ");
    let many: String = (0..90_000).map(many).collect();
    refused(format!("<a {many}/>"), "more than 64 attributes");
    refused(format!("<{}/>", fill("a")), "is needed here");
    refused(format!("<a b='{}'/>", fill("&amp;")), "is needed here");
    refused(format!("<a>{}</a>", fill("&#65;")), "is needed here");
    refused(format!("<a>{}</a>", fill("<b/>")), "is needed here");
    refused(format!("{}<a/>", fill("<!-- -->")), "is needed here");
    refused(format!("<a>{}</a>", fill("<![CDATA[]]>")), "is needed here");
    let mut disks = String::from("<domaincheckpoint><disks>");
    let mut i = 0;
    while disks.len() < MAX_BYTES - 1000 {
        i += 1;
        disks.push_str(&format!("<disk name='{i}'/>"));
    }
    let last = format!("{disks}<disk name='1'/></disks></domaincheckpoint>");
    let error = CheckpointDocument::read(last.as_bytes()).unwrap_err();
    assert!(error.reason.contains("twice"), "{error}");
    disks.push_str("</disks></domaincheckpoint>");
    let document = CheckpointDocument::read(disks.as_bytes()).unwrap();
    assert_eq!(document.disks.len(), i);
    // Far above what it takes, and far below anything quadratic.
    assert!(begun.elapsed() < Duration::from_secs(20));
}
