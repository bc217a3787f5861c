//! Chains of checkpoints on a real QEMU: deleted, renamed, redefined, restarted, and every list of
//! changes still right.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::domain::{Fixture, fixture, name, open, places, since, start};
use common::tools::need;
use common::{Disk, Marks, Rng};
use fleecefs::engine::{CreateFlags, DescribeFlags, DiskStatus, Domain, ListFilter};
use fleecefs::model::{Happening, Kind};

const MIB: u64 = 1 << 20;
const GRANULE: u64 = 65536;
const SIZE: u64 = 24 * MIB;

/// A chain and what is to be listed since each of its checkpoints.
struct Chain {
    f: Fixture,
    rng: Rng,
    disk: Disk,
    marks: Vec<(String, Marks)>,
}

impl Chain {
    fn of(count: usize) -> Self {
        let mut chain = Self {
            f: fixture(&[SIZE]),
            rng: Rng::from_env(),
            disk: Disk::new(SIZE),
            marks: Vec::new(),
        };
        for i in 0..count {
            let checkpoint = format!("c{i}");
            chain.f.domain.create_checkpoint(name(&checkpoint)).unwrap();
            chain.marks.push((checkpoint, Marks::new(SIZE, GRANULE)));
            chain.writes();
        }
        chain
    }

    fn writes(&mut self) {
        for _ in 0..3 {
            let write = self.rng.write(SIZE);
            self.f.qemu.write("vda", write);
            self.disk.apply(write);
            self.marks.iter_mut().for_each(|(_, m)| m.mark(write));
        }
    }

    fn names(&self) -> Vec<String> {
        self.marks.iter().map(|m| m.0.clone()).collect()
    }

    /// Every list of changes is just what the model says.
    fn check(&self, when: &str) {
        let backup = self.f.domain.begin_backup(name("look")).unwrap();
        let listed: Vec<_> = backup.since().iter().map(|s| s.name.to_string()).collect();
        assert_eq!(listed, self.names(), "{when}");
        for (checkpoint, marks) in &self.marks {
            let found = since(&backup, 0, checkpoint);
            assert_eq!(found, marks.extents(), "{when}: since {checkpoint}");
        }
        self.f.domain.end_backup(&name("look")).unwrap();
        self.f.domain.delete_checkpoint(&name("look")).unwrap();
    }

    fn restart(self) -> Self {
        let Fixture { dir, qemu, domain } = self.f;
        domain.close().unwrap();
        drop(domain);
        qemu.quit();
        let qemu = start(dir.path(), 1);
        let domain = open(&qemu.socket(), &places(dir.path()), dir.path());
        Self {
            f: Fixture { dir, qemu, domain },
            ..self
        }
    }

    /// The documents of all checkpoints, oldest first.
    fn documents(&self) -> Vec<(String, String)> {
        let xml = |n: &String| {
            let xml = self
                .f
                .domain
                .checkpoint_xml(&name(n), DescribeFlags::default());
            (n.clone(), xml.unwrap())
        };
        self.names().iter().map(xml).collect()
    }

    /// fleecefs forgets all that it knew.
    fn lose_state(self) -> Self {
        let Fixture { dir, qemu, domain } = self.f;
        domain.close().unwrap();
        drop(domain);
        std::fs::remove_dir_all(dir.path().join("state")).unwrap();
        let domain = open(&qemu.socket(), &places(dir.path()), dir.path());
        Self {
            f: Fixture { dir, qemu, domain },
            ..self
        }
    }
}

#[test]
fn twenty_checkpoints_deleted_renamed_restarted_and_redefined() {
    need!("qemu-system-x86_64", "qemu-img");
    let mut chain = Chain::of(20);
    chain.check("as made");
    for i in (0..20).step_by(2) {
        chain
            .f
            .domain
            .delete_checkpoint(&name(&format!("c{i}")))
            .unwrap();
    }
    chain
        .marks
        .retain(|(n, _)| n[1..].parse::<u32>().unwrap() % 2 == 1);
    chain.check("every second one deleted");
    chain.writes();
    chain.check("and written to");
    for (own, _) in &mut chain.marks {
        let other = format!("renamed-{own}");
        chain
            .f
            .domain
            .rename_checkpoint(&name(own), &name(&other))
            .unwrap();
        *own = other;
    }
    chain.check("renamed");
    chain.writes();
    let mut chain = chain.restart();
    chain.check("restarted");
    chain.writes();
    let documents = chain.documents();
    let mut chain = chain.lose_state();
    assert!(chain.f.domain.checkpoints().is_empty());
    for (checkpoint, document) in &documents {
        let again = chain
            .f
            .domain
            .create_checkpoint_from(&name(checkpoint), document.as_bytes());
        again.unwrap_or_else(|e| panic!("{checkpoint}: {e}"));
    }
    chain.check("redefined");
    assert_eq!(chain.documents(), documents);
    chain.writes();
    // The newest goes: its parent records again.
    let newest = chain.marks.pop().unwrap().0;
    chain.f.domain.delete_checkpoint(&name(&newest)).unwrap();
    chain.writes();
    chain.check("without the newest");
    let chain = chain.restart();
    chain.check("in the end");
    let all = chain.names();
    chain
        .f
        .domain
        .delete_checkpoints(&name(&all[0]), false)
        .unwrap();
    assert!(chain.f.domain.checkpoints().is_empty());
    assert_eq!(chain.f.qemu.state(), chain.f.qemu.state().without_bitmaps());
    chain.f.domain.close().unwrap();
}

/// Each of the RFC's ways to ask which checkpoints there are.
#[test]
fn lists_children_and_the_current_one() {
    need!("qemu-system-x86_64", "qemu-img");
    let chain = Chain::of(4);
    let domain = &chain.f.domain;
    let list = |filter: ListFilter| -> Vec<String> {
        let found = domain.list_checkpoints(&filter).unwrap();
        found
            .iter()
            .map(|e| e.checkpoint.name.to_string())
            .collect()
    };
    let all = ListFilter::default;
    assert_eq!(list(all()), ["c0", "c1", "c2", "c3"]);
    assert_eq!(
        list(ListFilter {
            roots: true,
            ..all()
        }),
        ["c0"]
    );
    assert_eq!(
        list(ListFilter {
            leaves: true,
            ..all()
        }),
        ["c3"]
    );
    assert_eq!(
        list(ListFilter {
            no_leaves: true,
            ..all()
        }),
        ["c0", "c1", "c2"]
    );
    let from = Some(name("c1"));
    assert_eq!(
        list(ListFilter {
            from: from.clone(),
            ..all()
        }),
        ["c2"]
    );
    assert_eq!(
        list(ListFilter {
            from,
            descendants: true,
            ..all()
        }),
        ["c2", "c3"]
    );
    let missing = ListFilter {
        from: Some(name("nosuch")),
        ..all()
    };
    assert_eq!(
        domain.list_checkpoints(&missing).unwrap_err().kind(),
        Kind::NotFound
    );
    assert_eq!(
        domain.current_checkpoint().unwrap().checkpoint.name,
        name("c3")
    );
    let parent = domain.parent(&name("c2")).unwrap().unwrap();
    assert_eq!(parent.checkpoint.name, name("c1"));
    assert_eq!(domain.parent(&name("c0")).unwrap(), None);

    let xml = |flags| domain.checkpoint_xml(&name("c2"), flags).unwrap();
    let plain = xml(DescribeFlags::default());
    assert!(
        plain.contains("<domain>") && !plain.contains("size="),
        "{plain}"
    );
    let lean = xml(DescribeFlags {
        no_domain: true,
        size: true,
    });
    assert!(!lean.contains("<domain>"), "{lean}");
    let dirty = chain.marks[2].1.extents().iter().map(|e| e.1).sum::<u64>();
    let size: u64 = lean
        .split("size=\"")
        .nth(1)
        .unwrap()
        .split('"')
        .next()
        .unwrap()
        .parse()
        .unwrap();
    assert!(
        size >= dirty,
        "overlapping bitmaps count twice: {size}, {dirty}"
    );

    domain.delete_checkpoints(&name("c1"), true).unwrap();
    assert_eq!(list(all()), ["c0", "c1"]);
    domain.close().unwrap();
}

/// What is known only from documents is believed as far as the bitmaps bear it out.
#[test]
fn redefining_what_is_not_so_is_refused() {
    need!("qemu-system-x86_64", "qemu-img");
    let chain = Chain::of(3);
    let documents = chain.documents();
    let chain = chain.lose_state();
    let domain = &chain.f.domain;
    let redefine = |domain: &Domain, which: &str, document: &str| {
        domain.create_checkpoint_from(&name(which), document.as_bytes())
    };
    let refused = |which: &str, document: &str, kind: Kind, why: &str| {
        let error = redefine(domain, which, document).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(why), "{error}");
    };
    let [(_, first), (_, second), (_, third)] = &documents[..] else {
        panic!("three");
    };
    refused("c1", second, Kind::Invalid, "parent c0 is not the newest");
    redefine(domain, "c0", first).unwrap();
    redefine(domain, "c0", first).unwrap(); // the same again is no change
    refused(
        "c0",
        &first.replace("<creationTime>1", "<creationTime>2"),
        Kind::Exists,
        "another",
    );
    refused("c2", third, Kind::Invalid, "parent c1");
    // A document that skips the middle one would hide its changes. It was changed by hand, and
    // nothing can tell; but the middle one cannot be slipped in afterwards, as if all were known.
    let skipping = third.replace("<name>c1</name>", "<name>c0</name>");
    redefine(domain, "c2", &skipping).unwrap();
    refused("c1", second, Kind::Invalid, "not the newest");
    domain.forget_checkpoint(&name("c2")).unwrap();
    redefine(domain, "c1", second).unwrap();
    redefine(domain, "c2", third).unwrap();
    // What came before the forgotten one stays suspect.
    let backup = domain.begin_backup(name("look")).unwrap();
    let listed: Vec<_> = backup.since().iter().map(|s| s.name.to_string()).collect();
    assert_eq!(listed, ["c1", "c2"]);
    domain.end_backup(&name("look")).unwrap();
    domain.delete_checkpoint(&name("look")).unwrap();

    let child = third
        .replace("<name>c1</name>", "<name>c2</name>")
        .replace("<creationTime>1", "<creationTime>2");
    let gone = child.replace(
        "<name>c2</name>\n  <parent>",
        "<name>gone</name>\n  <parent>",
    );
    refused("gone", &gone, Kind::Busy, "belongs to checkpoint c2");
    let gone = gone.replace("bitmap=\"c2\"", "bitmap=\"gone\"");
    refused("gone", &gone, Kind::Stale, "no dirty bitmap gone");
    let unchecked = CreateFlags {
        redefine: true,
        ..CreateFlags::default()
    };
    domain
        .create_checkpoint_xml(&name("gone"), gone.as_bytes(), unchecked)
        .unwrap();
    let id = domain.checkpoint("gone").unwrap().id;
    let status = domain.checkpoint_status(id).unwrap();
    assert!(
        matches!(&status.disks[..], [DiskStatus::Broken { .. }]),
        "{status:?}"
    );
    domain.close().unwrap();
}

/// Forgotten checkpoints leave their bitmaps, and nobody believes what came before them.
#[test]
fn forgetting_keeps_the_bitmaps_and_the_doubt() {
    need!("qemu-system-x86_64", "qemu-img");
    let chain = Chain::of(3);
    let domain = &chain.f.domain;
    let events = domain.subscribe();
    let dirty = chain.f.qemu.dirty_bytes("vda", "c1");
    assert!(dirty.is_some());
    domain.forget_checkpoint(&name("c1")).unwrap();
    assert_eq!(chain.f.qemu.dirty_bytes("vda", "c1"), dirty);
    let backup = domain.begin_backup(name("look")).unwrap();
    let listed: Vec<_> = backup.since().iter().map(|s| s.name.to_string()).collect();
    assert_eq!(listed, ["c2"]);
    let told: Vec<_> = events.try_iter().collect();
    assert!(
        matches!(&told[..], [e] if matches!(&e.what,
            Happening::CheckpointBroken { name: n, why, .. } if *n == name("c0") && why.contains("c1"))),
        "{told:?}"
    );
    // In use: its list of changes is promised.
    for refused in [
        domain.forget_checkpoint(&name("c2")),
        domain.rename_checkpoint(&name("c2"), &name("x")),
        domain.delete_checkpoint(&name("c2")),
    ] {
        assert_eq!(refused.unwrap_err().kind(), Kind::Busy);
    }
    assert_eq!(since(&backup, 0, "c2"), chain.marks[2].1.extents());
    domain.end_backup(&name("look")).unwrap();
    assert_eq!(
        domain
            .rename_checkpoint(&name("c2"), &name("look"))
            .unwrap_err()
            .kind(),
        Kind::Exists
    );
    assert_eq!(
        domain
            .rename_checkpoint(&name("c2"), &name("c1"))
            .unwrap_err()
            .kind(),
        Kind::Exists,
        "a bitmap of nobody's"
    );
    domain.close().unwrap();
}
