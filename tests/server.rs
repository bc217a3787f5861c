//! `<server>`: other NBD clients have a backup's disks and changes, at its own address, as long as it
//! runs. Real QEMU, real clients.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::Path;

use common::domain::{Fixture, content, fixture, name, open, places};
use common::tools::{need, run, text};
use common::{Disk, Write};
use fleecefs::model::Kind;

const MIB: u64 = 1 << 20;
const GRANULE: u64 = 65536;

fn nbd_copy(uri: &str, to: &Path) -> Vec<u8> {
    run("nbdcopy", &[uri, text(to)]);
    let bytes = std::fs::read(to).unwrap();
    std::fs::remove_file(to).unwrap();
    bytes
}

/// It would show clients newer data, and cannot be helped.
fn refused_by_an_old_qemu(f: &Fixture) {
    let before = f.qemu.state();
    let document = format!(
        "<domainbackup mode='pull'><server transport='unix' socket='{}'/></domainbackup>",
        f.dir.path().join("old.sock").display()
    );
    let refused = f.domain.begin_backup_from(&name("x"), document.as_bytes());
    assert_eq!(refused.unwrap_err().kind(), Kind::Unsupported);
    assert_eq!(f.qemu.state(), before);
}

#[test]
fn each_backup_is_served_at_its_own_address() {
    need!("qemu-system-x86_64", "qemu-img", "nbdinfo", "nbdcopy");
    let f = fixture(&[8 * MIB, 4 * MIB]);
    if common::qemu::is_before_8() {
        return refused_by_an_old_qemu(&f);
    }
    let before = f.qemu.state();
    let path = |name: &str| f.dir.path().join(name);
    let mut model = Disk::new(8 * MIB);
    let write = |model: &mut Disk, offset, pattern| {
        let write = Write {
            offset,
            length: 4096,
            pattern,
        };
        f.qemu.write("vda", write);
        model.apply(write);
    };
    write(&mut model, 0, 1);
    f.domain.create_checkpoint(name("mon")).unwrap();
    write(&mut model, MIB, 2);
    let begin = |backup: &str, more: &str, disk: &str| {
        let document = format!(
            "<domainbackup mode='pull'>{more}\
             <server transport='unix' socket='{}'/>\
             <disks><disk name='vda' {disk}/></disks></domainbackup>",
            path(backup).with_extension("sock").display()
        );
        f.domain
            .begin_backup_from(&name(backup), document.as_bytes())
    };
    let since = "<incremental>mon</incremental>";
    let one = begin("one", since, "exportname='root' exportbitmap='changes'").unwrap();
    let at_one = model.clone();
    write(&mut model, 2 * MIB, 3);
    // The same names again, at another address.
    begin("two", since, "exportname='root'").unwrap();
    let at_two = model.clone();
    write(&mut model, 3 * MIB, 4);

    let uri = |backup: &str| {
        format!(
            "nbd+unix:///root?socket={}",
            text(&path(backup).with_extension("sock"))
        )
    };
    let copy = path("copy");
    at_one.assert_is(&nbd_copy(&uri("one"), &copy), "one");
    at_two.assert_is(&nbd_copy(&uri("two"), &copy), "two");
    let map = |backup: &str, bitmap: &str| {
        let context = format!("--map=qemu:dirty-bitmap:{bitmap}");
        let text = run("nbdinfo", &[&context, &uri(backup)]);
        common::model::dirty_extents(&common::model::parse_map(&text))
    };
    assert_eq!(map("one", "changes"), [(MIB, GRANULE)]);
    assert_eq!(
        map("two", "backup-vda"),
        [MIB, 2 * MIB].map(|at| (at, GRANULE))
    );
    let list = run("nbdinfo", &["--list", &uri("one").replace("/root", "/")]);
    assert!(
        list.contains("export=\"root\"") && !list.contains("fleece-"),
        "{list}"
    );
    let xml = f.domain.backup_xml(one).unwrap();
    assert!(
        xml.contains("exportname=\"root\" exportbitmap=\"changes\""),
        "{xml}"
    );

    // The files show the same, and the clients go with the backup.
    at_one.assert_is(&content(&f.domain.backup("one").unwrap(), 0), "the file");
    f.domain.end_backup(&name("one")).unwrap();
    assert!(!path("one.sock").exists());
    at_two.assert_is(&nbd_copy(&uri("two"), &copy), "two is none the worse");

    // What is there already is left alone, and the address in use is no other backup's either.
    std::fs::write(path("three.sock"), "precious").unwrap();
    assert_eq!(begin("three", "", "").unwrap_err().kind(), Kind::Busy);
    assert_eq!(std::fs::read(path("three.sock")).unwrap(), b"precious");
    let bitmap = begin("four", "", "exportbitmap='x'").unwrap_err();
    assert_eq!(bitmap.kind(), Kind::Invalid, "{bitmap}");
    f.domain.end_backup(&name("two")).unwrap();
    let left: Vec<_> = f
        .domain
        .checkpoints()
        .iter()
        .map(|c| c.checkpoint.name.clone())
        .collect();
    assert_eq!(left, [name("mon"), name("one"), name("two")]);
    for checkpoint in left {
        f.domain.delete_checkpoint(&checkpoint).unwrap();
    }
    assert_eq!(f.qemu.state(), before);
    f.domain.close().unwrap();
}

#[test]
fn tcp_with_keys_and_not_without() {
    need!("qemu-system-x86_64", "qemu-img", "nbdinfo", "nbdcopy");
    let f = fixture(&[4 * MIB]);
    if common::qemu::is_before_8() {
        return refused_by_an_old_qemu(&f);
    }
    f.qemu.guest_write("vda", 0, MIB, 9);
    let keys = f.dir.path().join("keys.psk");
    std::fs::write(&keys, format!("admin:{}\n", "5a".repeat(32))).unwrap();
    std::os::unix::fs::chown(&keys, None, None).unwrap();
    run("chmod", &["600", text(&keys)]);
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let document = format!(
        "<domainbackup mode='pull'><server transport='tcp' name='localhost' port='{port}' tls='yes'/>\
         </domainbackup>"
    );
    let refused = f
        .domain
        .begin_backup_from(&name("x"), document.as_bytes())
        .unwrap_err();
    assert!(refused.to_string().contains("tls-psk"), "{refused}");
    f.domain.close().unwrap();
    let Fixture { dir, qemu, domain } = f;
    drop(domain);
    let mut places = places(dir.path());
    places.tls_psk = Some(keys.clone());
    let domain = open(&qemu.socket(), &places, dir.path());
    domain
        .begin_backup_from(&name("x"), document.as_bytes())
        .unwrap();
    let uri = format!(
        "nbds://admin@localhost:{port}/vda?tls-psk-file={}",
        text(&keys)
    );
    let bytes = nbd_copy(&uri, &dir.path().join("copy"));
    assert!(bytes[..MIB as usize].iter().all(|b| *b == 9) && bytes.len() as u64 == 4 * MIB);
    let plain = format!("nbd://localhost:{port}/vda");
    let out = std::process::Command::new("nbdinfo")
        .arg(plain)
        .output()
        .unwrap();
    assert!(!out.status.success(), "without a key");
    domain.close().unwrap();
}
