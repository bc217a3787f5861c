//! Slices of a domain of libvirt whose checkpoints others make and delete, many in one second: no slice
//! that changed keeps its time.
#![cfg(feature = "libvirt")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::os::unix::fs::MetadataExt;
use std::time::{Duration, SystemTime};

use common::libvirtd::{Libvirtd, libvirtd};
use common::tools::{fuse, need};
use common::{Fleecefs, Write};

const MIB: u64 = 1 << 20;
const SLICES: u64 = 8;

fn mounted(libvirtd: &Libvirtd) -> Fleecefs {
    libvirtd.domain(&[SLICES * MIB]);
    Fleecefs::libvirt(&libvirtd.uri())
        .option("slice-size=1048576")
        .mount()
}

fn fill(libvirtd: &Libvirtd, offset: u64, length: u64, pattern: u8) {
    let write = Write {
        offset,
        length,
        pattern,
    };
    libvirtd.write("vda", write);
}

/// Begins a backup, looks at the time of every slice, and ends it.
fn times(mount: &Fleecefs, backup: &str) -> Vec<i64> {
    mount.mkdir(&format!("backups/{backup}")).unwrap();
    let slice = |n: u64| format!("backups/{backup}/slices/vda/0000/{n:07}");
    let time = |n: u64| std::fs::metadata(mount.path(&slice(n))).unwrap().mtime();
    let times = (0..SLICES).map(time).collect();
    mount.rmdir(&format!("backups/{backup}")).unwrap();
    times
}

/// The beginning of a second, so that what follows is of the same.
fn at_a_second() {
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap();
    std::thread::sleep(Duration::from_millis(u64::from(1020 - now.subsec_millis())));
}

fn distinct(nights: &[Vec<i64>]) {
    for (n, night) in nights.iter().enumerate() {
        for earlier in &nights[..n] {
            let same = night.iter().zip(earlier).filter(|(a, b)| a == b).count();
            assert_eq!(same, 0, "{nights:?}: everything changed every night");
            assert!(night[0] > earlier[0], "{nights:?}: times went back");
        }
    }
}

#[test]
fn a_burst_of_checkpoints_of_others() {
    need!("qemu-img");
    let (Some(libvirtd), Some(())) = (libvirtd(), fuse()) else {
        return;
    };
    let mount = mounted(&libvirtd);
    fill(&libvirtd, 0, SLICES * MIB, 1);
    at_a_second();
    let all = |verb: &str| {
        let line = |n: u32| format!("checkpoint-{verb} vm v{n}");
        (0..6).map(line).collect::<Vec<_>>().join("; ")
    };
    libvirtd.virsh(&[&all("create-as")]);
    let mut nights = vec![times(&mount, "x0")];
    libvirtd.virsh(&[&format!("{}; checkpoint-delete vm x0", all("delete"))]);
    for night in 1..5 {
        fill(&libvirtd, 0, SLICES * MIB, night + 1);
        nights.push(times(&mount, &format!("x{night}")));
    }
    distinct(&nights);
    mount.umount();
}

/// One that others made in the second of ours takes its place when ours is deleted.
#[test]
fn a_checkpoint_of_the_same_second() {
    need!("qemu-img");
    let (Some(libvirtd), Some(())) = (libvirtd(), fuse()) else {
        return;
    };
    let mount = mounted(&libvirtd);
    for round in 0..3 {
        fill(&libvirtd, 0, SLICES * MIB, 1);
        at_a_second();
        let first = times(&mount, &format!("b{round}"));
        fill(&libvirtd, 0, SLICES * MIB, 2);
        let swap = format!("checkpoint-create-as vm v{round}; checkpoint-delete vm b{round}");
        libvirtd.virsh(&[&swap]);
        let second = times(&mount, &format!("c{round}"));
        distinct(&[first, second]);
    }
    mount.umount();
}
