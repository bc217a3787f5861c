//! Freezing the guest's file systems around the instant of a backup, with an agent of the test's own:
//! the order of freeze, instant and thaw, and that the guest is thawed in every outcome.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::domain::{Fixture, fixture, name, places};
use common::tools::need;
use fleecefs::backend::Source;
use fleecefs::engine::{CreateFlags, Domain, Options, Store};
use fleecefs::model::Kind;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// What the agent does when it is told to freeze.
#[derive(Clone, Copy, PartialEq)]
enum Agent {
    Freezes,
    Refuses,
    /// Its answer comes when it is told to thaw.
    Hangs,
    /// Hangs up.
    Dies,
    /// Thaws, and complains: of a script that it runs after that, or since it had to by itself.
    Grumbles,
    /// Has nothing left to thaw.
    IsThawed,
    /// Does not answer when it is told to thaw.
    StaysFrozen,
    /// Says that somebody else has frozen the guest.
    IsFrozen,
}

/// Runs `work` with a domain whose agent behaves so: what the agent was told, each with whether the
/// bitmap of checkpoint `b` was there by then.
fn with_agent(f: &Fixture, agent: Agent, work: impl FnOnce(&Domain)) -> Vec<(String, bool)> {
    let path = f.dir.path().join("agent.sock");
    let listener = UnixListener::bind(&path).unwrap();
    listener.set_nonblocking(true).unwrap();
    let told = Mutex::new(Vec::new());
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Acquire) {
                let Ok((stream, _)) = listener.accept() else {
                    std::thread::sleep(Duration::from_millis(5));
                    continue;
                };
                stream.set_nonblocking(false).unwrap();
                let mut out = stream.try_clone().unwrap();
                for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
                    let text = line.strip_prefix(b"\xff").unwrap_or(&line);
                    let command: Value = serde_json::from_slice(text).unwrap();
                    let word = command["execute"].as_str().unwrap().to_owned();
                    let answer = match word.as_str() {
                        "guest-sync-delimited" => {
                            // An answer to somebody else, and its remains.
                            out.write_all(b"{\"return\": 7}\n\xff{\"return\": 1}\n\xff")
                                .unwrap();
                            json!({"return": command["arguments"]["id"]})
                        }
                        "guest-fsfreeze-status" => match agent {
                            Agent::IsFrozen => json!({"return": "frozen"}),
                            _ => json!({"return": "thawed"}),
                        },
                        _ => {
                            let there = f.qemu.dirty_bytes("vda", "b").is_some();
                            told.lock().unwrap().push((word.clone(), there));
                            match (word.as_str(), agent) {
                                ("guest-fsfreeze-freeze", Agent::Hangs) => continue,
                                ("guest-fsfreeze-freeze", Agent::Dies) => break,
                                ("guest-fsfreeze-thaw", Agent::StaysFrozen) => continue,
                                ("guest-fsfreeze-thaw", Agent::IsThawed) => json!({"return": 0}),
                                ("guest-fsfreeze-thaw", Agent::Grumbles) => {
                                    json!({"error": {"class": "GenericError", "desc": "hook"}})
                                }
                                ("guest-fsfreeze-thaw", Agent::Hangs) => {
                                    writeln!(out, "{}", json!({"return": 2})).unwrap();
                                    json!({"return": 2})
                                }
                                ("guest-fsfreeze-freeze", Agent::Refuses) => {
                                    json!({"error": {"class": "GenericError", "desc": "no fs"}})
                                }
                                _ => json!({"return": 2}),
                            }
                        }
                    };
                    writeln!(out, "{answer}").unwrap();
                }
            }
        });
        let mut places = places(f.dir.path());
        places.quiesce = true;
        places.guest_agent = Some(path.clone());
        places.timeout = Duration::from_secs(2);
        let backend = Source::Qmp(f.qemu.socket()).open(&places).unwrap();
        let store = Store::open(&f.dir.path().join("quiesced")).unwrap();
        let domain = Domain::open(backend, store, Options::default()).unwrap();
        work(&domain);
        domain.close().unwrap();
        over.store(true, Ordering::Release);
    });
    told.into_inner().unwrap()
}

fn freeze(there: bool) -> (String, bool) {
    ("guest-fsfreeze-freeze".into(), there)
}

fn thaw(there: bool) -> (String, bool) {
    ("guest-fsfreeze-thaw".into(), there)
}

#[test]
fn frozen_at_the_instant_and_not_longer() {
    need!("qemu-system-x86_64", "qemu-img");
    let f = fixture(&[4 * MIB]);
    f.domain.close().unwrap();
    let told = with_agent(&f, Agent::Freezes, |domain| {
        domain.begin_backup(name("b")).unwrap();
        domain.end_backup(&name("b")).unwrap();
    });
    assert_eq!(told, [freeze(false), thaw(true)]);
}

/// libvirt's flag QUIESCE: a checkpoint alone.
#[test]
fn a_checkpoint_is_quiesced_if_that_is_asked_for() {
    need!("qemu-system-x86_64", "qemu-img");
    let f = fixture(&[4 * MIB]);
    let quiesce = CreateFlags {
        quiesce: true,
        ..CreateFlags::default()
    };
    let create = |domain: &Domain, flags| {
        domain.create_checkpoint_xml(&name("b"), b"<domaincheckpoint/>", flags)
    };
    let refused = create(&f.domain, quiesce).unwrap_err();
    assert_eq!(refused.kind(), Kind::Unsupported, "{refused}");
    f.domain.close().unwrap();
    let told = with_agent(&f, Agent::Freezes, |domain| {
        create(domain, quiesce).unwrap();
        domain.delete_checkpoint(&name("b")).unwrap();
        create(domain, CreateFlags::default()).unwrap();
    });
    assert_eq!(told, [freeze(false), thaw(true)]);
}

#[test]
fn a_freeze_that_fails_refuses_the_backup_and_thaws() {
    need!("qemu-system-x86_64", "qemu-img");
    for (agent, kind) in [
        (Agent::Refuses, Kind::Io),
        (Agent::Hangs, Kind::TimedOut),
        (Agent::Dies, Kind::NotConnected),
    ] {
        let f = fixture(&[4 * MIB]);
        f.domain.close().unwrap();
        let before = f.qemu.state();
        let told = with_agent(&f, agent, |domain| {
            let began = Instant::now();
            let Err(refused) = domain.begin_backup(name("b")) else {
                panic!("it began");
            };
            assert_eq!(refused.kind(), kind, "{refused}");
            assert!(
                refused.to_string().contains("freeze file systems"),
                "{refused}"
            );
            assert!(began.elapsed() < Duration::from_secs(8));
            assert!(domain.checkpoints().is_empty() && domain.jobs().is_empty());
        });
        assert_eq!(told, [freeze(false), thaw(false)]);
        assert_eq!(f.qemu.state(), before);
    }
}

/// Whoever asked for the backup gets to know. A guest that may still be frozen is told once more at the end.
#[test]
fn a_thaw_that_goes_wrong_refuses_the_backup() {
    need!("qemu-system-x86_64", "qemu-img");
    for (agent, kind, says, tries) in [
        (Agent::Grumbles, Kind::Io, "refused guest-fsfreeze-thaw", 1),
        (Agent::IsThawed, Kind::Io, "did not stay frozen", 1),
        (Agent::StaysFrozen, Kind::TimedOut, "may still be frozen", 2),
    ] {
        let f = fixture(&[4 * MIB]);
        f.domain.close().unwrap();
        let before = f.qemu.state();
        let told = with_agent(&f, agent, |domain| {
            let Err(refused) = domain.begin_backup(name("b")) else {
                panic!("it began");
            };
            assert_eq!(refused.kind(), kind, "{refused}");
            assert!(refused.to_string().contains(says), "{refused}");
            assert!(domain.checkpoints().is_empty() && domain.jobs().is_empty());
            assert_eq!(f.qemu.state(), before);
        });
        let all = [freeze(false), thaw(true), thaw(false)];
        assert_eq!(told, all[..=tries]);
    }
}

/// Somebody else relies on it, and has to thaw.
#[test]
fn what_others_froze_is_not_thawed() {
    need!("qemu-system-x86_64", "qemu-img");
    let f = fixture(&[4 * MIB]);
    f.domain.close().unwrap();
    let told = with_agent(&f, Agent::IsFrozen, |domain| {
        let Err(refused) = domain.begin_backup(name("b")) else {
            panic!("it began");
        };
        assert_eq!(refused.kind(), Kind::Busy, "{refused}");
        assert!(refused.to_string().contains("frozen already"), "{refused}");
    });
    assert_eq!(told, []);
}

#[test]
fn what_is_said_of_the_agent_must_make_sense() {
    let dir = common::tools::temp_dir();
    let agent = Some(dir.path().join("agent.sock"));
    let images = Source::Images(vec![dir.path().join("x.qcow2")]);
    let qmp = Source::Qmp(dir.path().join("x.sock"));
    for (source, quiesce, agent, says) in [
        (&images, true, &None, "no guest"),
        (&images, false, &agent, "for the source qmp:PATH only"),
        (&qmp, true, &None, "needs the guest agent"),
        (&qmp, false, &agent, "nothing without quiesce"),
    ] {
        let mut places = places(dir.path());
        places.quiesce = quiesce;
        places.guest_agent.clone_from(agent);
        let Err(refused) = source.open(&places) else {
            panic!("{says}");
        };
        assert_eq!(refused.kind(), Kind::Invalid);
        assert!(refused.to_string().contains(says), "{refused}");
    }
}
