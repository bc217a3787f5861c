//! Push backups on a real QEMU: what is written is the instant, whatever becomes of the job.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::{Path, PathBuf};
use std::time::Duration;

use common::domain::{Fixture, content, fixture, fixture_with, name, open, places};
use common::qemu::Builder;
use common::tools::{self, DEADLINE, need, run, text};
use common::{Disk, Fault, QmpFault, Rng, Write, image};
use fleecefs::engine::Domain;
use fleecefs::model::{Control, Happening, JobState, Kind, Mode, Outcome};

const MIB: u64 = 1 << 20;

/// A `<domainbackup>` for these disks: target, format, path, attributes.
fn document(incremental: Option<&str>, disks: &[(&str, &str, &Path, &str)]) -> String {
    let base = incremental.map_or(String::new(), |c| format!("<incremental>{c}</incremental>"));
    let disks: String = disks
        .iter()
        .map(|(target, format, path, more)| {
            format!(
                "<disk name='{target}' {more}><driver type='{format}'/><target file='{}'/></disk>",
                path.display()
            )
        })
        .collect();
    format!("<domainbackup mode='push'>{base}<disks>{disks}</disks></domainbackup>")
}

fn push(domain: &Domain, backup: &str, document: &str) -> u32 {
    let begun = domain.begin_backup_from(&name(backup), document.as_bytes());
    begun.unwrap_or_else(|e| panic!("{backup}: {e}"))
}

fn state(domain: &Domain, job: u32) -> JobState {
    domain
        .job_by_id(job)
        .expect("the job is listed")
        .info()
        .state
}

/// Waits until the job is over, and ends it.
fn finish(domain: &Domain, job: u32) -> Outcome {
    tools::eventually("the push", DEADLINE, || match state(domain, job) {
        JobState::Running | JobState::Paused => None,
        over => Some(over),
    });
    domain.end(job, false).unwrap()
}

fn scatter(f: &Fixture, rng: &mut Rng, models: &mut [(&str, Disk)]) {
    for (target, model) in models {
        for _ in 0..12 {
            let write = rng.write(model.size());
            f.qemu.write(target, write);
            model.apply(write);
        }
    }
}

/// What a chain of images holds, by QEMU's own tool.
fn assert_holds(path: &Path, format: &str, model: &Disk, what: &str) {
    if format == "qcow2" {
        run("qemu-img", &["check", "-q", "-f", "qcow2", text(path)]);
    }
    model.assert_is(&image::bytes(path, format), what);
}

/// Full, then three times what changed: raw onto the same copy, qcow2 as a chain. Zeros that came
/// back are among the changes.
#[test]
fn incremental_onto_the_previous_full_reproduces_the_disk() {
    need!("qemu-system-x86_64", "qemu-img");
    let mut rng = Rng::from_env();
    let f = fixture(&[16 * MIB, 4 * MIB + 512]);
    let before = f.qemu.state();
    let path = |name: &str| f.dir.path().join(name);
    let events = f.domain.subscribe();
    let mut models = [
        ("vda", Disk::new(16 * MIB)),
        ("vdb", Disk::new(4 * MIB + 512)),
    ];
    scatter(&f, &mut rng, &mut models);
    let copy = path("vdb.raw");
    let full = document(
        None,
        &[("vda", "qcow2", &path("g0"), ""), ("vdb", "raw", &copy, "")],
    );
    let job = push(&f.domain, "g0", &full);
    let instant = models.clone();
    scatter(&f, &mut rng, &mut models);
    assert_eq!(finish(&f.domain, job), Outcome::Completed);
    assert_holds(&path("g0"), "qcow2", &instant[0].1, "full vda");
    assert_holds(&copy, "raw", &instant[1].1, "full vdb");
    let mut chain = vec![path("g0")];
    for generation in 1..4 {
        // All zeros somewhere where there was data.
        for target in ["vda", "vdb"] {
            let write = Write {
                offset: MIB,
                length: MIB,
                pattern: 0,
            };
            f.qemu.write(target, write);
            models
                .iter_mut()
                .find(|m| m.0 == target)
                .unwrap()
                .1
                .apply(write);
        }
        let base = format!("g{}", generation - 1);
        let own = format!("g{generation}");
        let next = path(&own);
        let document = document(
            Some(&base),
            &[("vda", "qcow2", &next, ""), ("vdb", "raw", &copy, "")],
        );
        let job = push(&f.domain, &own, &document);
        let instant = models.clone();
        scatter(&f, &mut rng, &mut models);
        assert_eq!(finish(&f.domain, job), Outcome::Completed);
        let below = chain.last().unwrap();
        run(
            "qemu-img",
            &[
                "rebase",
                "-q",
                "-u",
                "-f",
                "qcow2",
                "-F",
                "qcow2",
                "-b",
                text(below),
                text(&next),
            ],
        );
        chain.push(next.clone());
        assert_holds(&next, "qcow2", &instant[0].1, &own);
        assert_holds(&copy, "raw", &instant[1].1, &own);
    }
    let told: Vec<_> = events.try_iter().collect();
    assert_eq!(told.len(), 4, "{told:?}");
    for event in told {
        let Happening::JobCompleted { mode, outcome, .. } = event.what else {
            panic!("{event:?}");
        };
        assert_eq!((mode, outcome.unwrap()), (Mode::Push, Outcome::Completed));
    }
    assert_eq!(f.qemu.state().without_bitmaps(), before.without_bitmaps());
    f.domain.close().unwrap();
}

/// Slow enough to be looked at: it can be halted, goes on, cannot be ended by rmdir, and what an
/// aborted one wrote is gone.
#[test]
fn a_running_push_is_steered_and_aborted() {
    need!("qemu-system-x86_64", "qemu-img");
    let f = fixture_with(&[32 * MIB], Builder::slow);
    let before = f.qemu.state();
    f.qemu.guest_write("vda", 0, 32 * MIB, 7);
    let target = f.dir.path().join("copy.qcow2");
    let job = push(
        &f.domain,
        "slow",
        &document(None, &[("vda", "qcow2", &target, "")]),
    );
    f.domain.control(job, Control::Speed(1 << 16)).unwrap();
    assert_eq!(f.domain.end(job, false).unwrap_err().kind(), Kind::Busy);
    assert_eq!(
        f.domain.end_backup(&name("slow")).unwrap_err().kind(),
        Kind::Busy
    );
    f.domain.control(job, Control::Pause).unwrap();
    f.domain.control(job, Control::Pause).unwrap();
    assert!(matches!(state(&f.domain, job), JobState::Paused));
    f.domain.control(job, Control::Resume).unwrap();
    assert!(matches!(state(&f.domain, job), JobState::Running));
    // The guest is none the worse meanwhile.
    f.qemu.guest_write("vda", 31 * MIB, 4096, 8);
    assert!(target.exists());
    let events = f.domain.subscribe();
    f.domain.control(job, Control::Abort).unwrap();
    assert!(matches!(
        state(&f.domain, job),
        JobState::Ended(Outcome::Aborted)
    ));
    assert!(!target.exists(), "what was written is no backup");
    assert_eq!(
        f.domain.control(job, Control::Pause).unwrap_err().kind(),
        Kind::Invalid
    );
    assert_eq!(f.domain.end(job, false).unwrap(), Outcome::Aborted);
    let told: Vec<_> = events.try_iter().collect();
    assert!(
        matches!(&told[..], [e] if matches!(e.what, Happening::JobCompleted { outcome: Ok(Outcome::Aborted), .. })),
        "{told:?}"
    );
    // And without a word beforehand, as the RFC's flag ABORT.
    let job = push(
        &f.domain,
        "again",
        &document(None, &[("vda", "qcow2", &target, "")]),
    );
    f.domain.control(job, Control::Speed(1 << 16)).unwrap();
    assert_eq!(f.domain.end(job, true).unwrap(), Outcome::Aborted);
    assert!(!target.exists());
    for checkpoint in ["again", "slow"] {
        f.domain.delete_checkpoint(&name(checkpoint)).unwrap();
    }
    assert_eq!(f.qemu.state(), before);
    f.domain.close().unwrap();
}

/// REUSE_EXTERNAL: an image that knows what it is based on, and a raw file full of something else.
#[test]
fn prepared_targets_are_written_into() {
    need!("qemu-system-x86_64", "qemu-img");
    let mut rng = Rng::from_env();
    let f = fixture(&[8 * MIB, 4 * MIB]);
    let path = |name: &str| f.dir.path().join(name);
    let mut models = [("vda", Disk::new(8 * MIB)), ("vdb", Disk::new(4 * MIB))];
    scatter(&f, &mut rng, &mut models);
    let (full, next, copy) = (path("full"), path("next"), path("copy.raw"));
    let job = push(
        &f.domain,
        "full",
        &document(None, &[("vda", "qcow2", &full, "")]),
    );
    assert_eq!(finish(&f.domain, job), Outcome::Completed);
    f.qemu.guest_zero("vda", 0, 4 * MIB);
    models[0].1.apply(Write {
        offset: 0,
        length: 4 * MIB,
        pattern: 0,
    });
    scatter(&f, &mut rng, &mut models);
    run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "qcow2",
            "-b",
            text(&full),
            text(&next),
        ],
    );
    std::fs::write(&copy, vec![0xff; 4 << 20]).unwrap();
    let document = document(
        None,
        &[
            ("vda", "qcow2", &next, "incremental='full'"),
            ("vdb", "raw", &copy, ""),
        ],
    );
    let refused = f
        .domain
        .begin_backup_from(&name("next"), document.as_bytes());
    assert_eq!(refused.unwrap_err().kind(), Kind::Exists);
    let job = f
        .domain
        .begin_backup_xml(&name("next"), document.as_bytes(), None, true);
    let instant = models.clone();
    scatter(&f, &mut rng, &mut models);
    assert_eq!(finish(&f.domain, job.unwrap()), Outcome::Completed);
    assert_holds(&next, "qcow2", &instant[0].1, "onto its base");
    assert_holds(&copy, "raw", &instant[1].1, "over something else");
    f.domain.close().unwrap();
}

/// Whatever is refused leaves neither job nor node nor file nor checkpoint.
#[test]
fn refusals_leave_nothing() {
    need!("qemu-system-x86_64", "qemu-img");
    let f = fixture(&[4 * MIB, 4 * MIB]);
    f.domain.create_checkpoint(name("mon")).unwrap();
    let before = f.qemu.state();
    let path = |name: &str| f.dir.path().join(name);
    let there = path("there");
    std::fs::write(&there, "precious").unwrap();
    let small = path("small.raw");
    std::fs::File::create(&small).unwrap().set_len(MIB).unwrap();
    let good = path("good");
    let case = |base, format, path: PathBuf, kind| {
        let document = document(
            base,
            &[("vda", "qcow2", &good, ""), ("vdb", format, &path, "")],
        );
        let refused = f
            .domain
            .begin_backup_from(&name("tue"), document.as_bytes());
        let error = refused.err().unwrap_or_else(|| panic!("{document}"));
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains("vdb"), "{error}");
        assert_eq!(f.qemu.state(), before, "{error}");
        assert!(!good.exists(), "{error}");
        assert!(
            f.domain.checkpoint("tue").is_none() && f.domain.jobs().is_empty(),
            "{error}"
        );
    };
    case(None, "raw", there.clone(), Kind::Exists);
    case(None, "qcow2", path("no/such/directory"), Kind::NotFound);
    case(Some("mon"), "raw", path("no-older-copy"), Kind::NotFound);
    case(Some("mon"), "raw", small, Kind::Invalid);
    assert_eq!(std::fs::read(&there).unwrap(), b"precious");
    f.domain.close().unwrap();
}

/// A target that fills up costs the backup, not the guest: its write goes through.
#[test]
fn a_full_target_ends_the_backup_not_the_guest() {
    need!("qemu-system-x86_64", "qemu-img");
    if !tools::is_root() {
        return tools::skip("only root can mount a small file system for the target");
    }
    let f = fixture(&[32 * MIB]);
    let before = f.qemu.state();
    f.qemu.guest_write("vda", 0, 32 * MIB, 7);
    let small = f.dir.path().join("small");
    std::fs::create_dir(&small).unwrap();
    run(
        "mount",
        &["-t", "tmpfs", "-o", "size=8m", "none", text(&small)],
    );
    let target = small.join("copy.qcow2");
    let job = push(
        &f.domain,
        "big",
        &document(None, &[("vda", "qcow2", &target, "")]),
    );
    let failed = tools::eventually("the failure", DEADLINE, || match state(&f.domain, job) {
        JobState::Failed(why) => Some(why),
        _ => None,
    });
    assert_eq!(failed.kind(), Kind::NoSpace, "{failed}");
    assert!(!target.exists());
    f.qemu.guest_write("vda", 31 * MIB, 4096, 9);
    assert_eq!(f.domain.end(job, false).unwrap(), Outcome::Aborted);
    run("umount", &[text(&small)]);
    f.domain.delete_checkpoint(&name("big")).unwrap();
    assert_eq!(f.qemu.state(), before);
    f.domain.close().unwrap();
}

/// Whoever owns the target's directory can put something else there. It is not taken for the backup, not
/// removed, and nobody waits for it.
#[test]
fn a_target_that_is_replaced() {
    need!("qemu-system-x86_64", "qemu-img", "mkfifo");
    let f = fixture(&[8 * MIB]);
    f.qemu.guest_write("vda", 0, 8 * MIB, 7);
    let target = f.dir.path().join("copy.qcow2");
    let document = document(None, &[("vda", "qcow2", &target, "")]);
    let between = QmpFault::start(&f.qemu.socket());
    f.domain.close().unwrap();
    drop(f.domain);
    let domain = open(&between.path(), &places(f.dir.path()), f.dir.path());
    // What follows is quicker than the end of the job.
    between.arm_named("blockdev-del", Fault::Slow(Duration::from_secs(1)));
    let job = push(&domain, "mon", &document);
    std::fs::rename(&target, f.dir.path().join("away")).unwrap();
    run("mkfifo", &[text(&target)]);
    let failed = tools::eventually("the failure", DEADLINE, || match state(&domain, job) {
        JobState::Failed(why) => Some(why),
        _ => None,
    });
    assert!(failed.to_string().contains("replaced"), "{failed}");
    assert!(target.exists());
    domain.end(job, false).unwrap();
    domain.close().unwrap();
}

/// Two that are read and one that is written, of three instants, ended in all six orders.
#[test]
fn three_at_once_end_in_all_six_orders() {
    need!("qemu-system-x86_64", "qemu-img");
    let mut rng = Rng::from_env();
    let orders = [
        [0, 1, 2],
        [0, 2, 1],
        [1, 0, 2],
        [1, 2, 0],
        [2, 0, 1],
        [2, 1, 0],
    ];
    let size = 8 * MIB;
    let f = fixture(&[size]);
    let before = f.qemu.state();
    let mut models = [("vda", Disk::new(size))];
    for order in orders {
        let target = f.dir.path().join("copy.qcow2");
        scatter(&f, &mut rng, &mut models);
        let one = f.domain.begin_backup(name("one")).unwrap();
        let at_one = models[0].1.clone();
        scatter(&f, &mut rng, &mut models);
        let job = push(
            &f.domain,
            "written",
            &document(None, &[("vda", "qcow2", &target, "")]),
        );
        // It may be over already; most times it is not.
        let _ = f.domain.control(job, Control::Speed(4 * MIB));
        let at_push = models[0].1.clone();
        scatter(&f, &mut rng, &mut models);
        let two = f.domain.begin_backup(name("two")).unwrap();
        let at_two = models[0].1.clone();
        scatter(&f, &mut rng, &mut models);
        let ids: Vec<u32> = f.domain.jobs().iter().map(|job| job.id()).collect();
        assert!(ids.len() == 3 && !ids.contains(&0), "{ids:?}");
        assert_eq!(
            f.domain.backup_xml(0).unwrap_err().kind(),
            Kind::Invalid,
            "0 is no answer"
        );
        for which in order {
            match which {
                0 => {
                    at_one.assert_is(&content(&one, 0), "one");
                    assert_eq!(f.domain.end(one.id(), false).unwrap(), Outcome::Completed);
                }
                1 => {
                    f.domain
                        .control(job, Control::Speed(0))
                        .unwrap_or_else(|e| {
                            assert_eq!(e.kind(), Kind::Invalid, "over already: {e}");
                        });
                    assert_eq!(finish(&f.domain, job), Outcome::Completed);
                    assert_holds(&target, "qcow2", &at_push, "written");
                    std::fs::remove_file(&target).unwrap();
                }
                _ => {
                    at_two.assert_is(&content(&two, 0), "two");
                    assert_eq!(f.domain.end(two.id(), true).unwrap(), Outcome::Aborted);
                }
            }
            scatter(&f, &mut rng, &mut models);
        }
        for checkpoint in ["one", "written", "two"] {
            f.domain.delete_checkpoint(&name(checkpoint)).unwrap();
        }
        assert_eq!(f.qemu.state(), before, "{order:?}");
    }
    f.domain.close().unwrap();
}
