//! The front with a real QEMU behind it and real clients before it: libnbd's and QEMU's tools, both
//! of which do TLS with GnuTLS.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
mod front;

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use common::tools::{DEADLINE, need, run, text};
use common::upstream::{MIB, Upstream, VDA_SIZE};
use common::{eventually, process};
use fleecefs::nbd::{Front, FrontError};
use front::{KEY, LONG, port, tcp};

/// A client that must not hang; whether it succeeds is the caller's question.
fn client(program: &str, args: &[&str]) -> Output {
    let mut command = Command::new("timeout");
    let output = command.args(["60", program]).args(args).output().unwrap();
    assert_ne!(output.status.code(), Some(124), "{program} {args:?} hangs");
    output
}

fn refused(program: &str, args: &[&str]) -> String {
    let output = client(program, args);
    assert!(!output.status.success(), "{program} {args:?}: {output:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn unix_clients_see_public_names_only() {
    need!(
        "qemu-storage-daemon",
        "qemu-img",
        "qemu-io",
        "nbdinfo",
        "nbdcopy",
        "timeout"
    );
    let up = Upstream::start();
    let front = up.front(&up.unix("s"), None);
    let meta = std::fs::metadata(up.path("s")).unwrap();
    assert_eq!(meta.permissions().mode() & 0o777, 0o600);
    let socket = up.path("s");
    let uri = |name: &str| format!("nbd+unix:///{name}?socket={}", text(&socket));

    let list = run("nbdinfo", &["--list", "--json", &uri("")]);
    let list: serde_json::Value = serde_json::from_str(&list).unwrap();
    let exports = list["exports"].as_array().unwrap();
    let names: Vec<_> = exports.iter().map(|e| e["export-name"].as_str()).collect();
    assert_eq!(names, [Some("vda"), Some("vdb")]);
    let contexts = exports[0]["contexts"].to_string();
    assert!(contexts.contains("qemu:dirty-bitmap:since"), "{contexts}");
    assert!(!list.to_string().contains("fl-"), "{list}");

    // A structured protocol, with and without the newest form of it.
    assert_eq!(
        run("nbdinfo", &["--size", &uri("vda")]).trim(),
        VDA_SIZE.to_string()
    );
    let map = run("nbdinfo", &["--map=qemu:dirty-bitmap:since", &uri("vda")]);
    let map: Vec<Vec<&str>> = map
        .lines()
        .map(|l| l.split_whitespace().collect())
        .collect();
    let runs: Vec<_> = map.iter().map(|line| (line[0], line[1], line[2])).collect();
    let expected = [
        ("0", "3145728", "0"),
        ("3145728", "65536", "1"),
        ("3211264", "5177344", "0"),
    ];
    assert_eq!(runs, expected);

    let copy = up.path("copy");
    run("nbdcopy", &[&uri("vda"), text(&copy)]);
    up.check_copy(&copy);
    run(
        "qemu-img",
        &[
            "convert",
            "-f",
            "raw",
            "-O",
            "raw",
            &uri("vda"),
            text(&copy),
        ],
    );
    up.check_copy(&copy);
    let options = format!(
        "driver=nbd,export=vda,x-dirty-bitmap=qemu:dirty-bitmap:since,server.type=unix,server.path={}",
        text(&socket)
    );
    let map = run(
        "qemu-img",
        &["map", "--output=json", "--image-opts", &options],
    );
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    let dirty: Vec<_> = map
        .as_array()
        .unwrap()
        .iter()
        .filter(|e| e["data"] == false)
        .collect();
    assert_eq!(dirty.len(), 1, "{map}");
    assert_eq!(dirty[0]["start"], 3 * MIB);

    // Neither a private name, nor another backup's, nor the default among two.
    for name in ["fl-7-vda", "fl-8-vdb", "vd", ""] {
        let why = refused("nbdinfo", &["--size", &uri(name)]);
        assert!(!why.contains("fl-7-vdb"), "{why}");
        refused("nbdinfo", &["--map=base:allocation", &uri(name)]);
        refused("qemu-img", &["info", &uri(name)]);
    }
    assert_eq!(
        run("nbdinfo", &["--size", &uri("vdb")]).trim(),
        MIB.to_string()
    );
    front.close();
    assert!(!socket.exists());
}

#[test]
fn the_only_export_is_the_default_one() {
    need!(
        "qemu-storage-daemon",
        "qemu-img",
        "qemu-io",
        "nbdinfo",
        "timeout"
    );
    let up = Upstream::start();
    let address = up.unix("s");
    let _front = up
        .try_front(&address, &[("vda", "fl-7-vda")], None, LONG)
        .unwrap();
    let uri = format!("nbd+unix:///?socket={}", text(&up.path("s")));
    let said = run("nbdinfo", &["--json", &uri]);
    assert!(said.contains("\"export-size\": 8388608"), "{said}");
    assert!(!said.contains("fl-7"), "{said}");
}

#[test]
fn several_fronts_and_clients_at_once() {
    need!(
        "qemu-storage-daemon",
        "qemu-img",
        "qemu-io",
        "nbdinfo",
        "nbdcopy",
        "timeout"
    );
    let up = Upstream::start();
    let first = up.front(&tcp(false), None);
    let second = up
        .try_front(&up.unix("s"), &[("disk", "fl-8-vdb")], None, LONG)
        .unwrap();
    let uri = format!("nbd://127.0.0.1:{}/vda", port(&first));
    std::thread::scope(|scope| {
        for i in 0..4 {
            let (up, uri) = (&up, &uri);
            scope.spawn(move || {
                let copy = up.path(&format!("copy{i}"));
                run("nbdcopy", &["--connections=4", uri, text(&copy)]);
                up.check_copy(&copy);
            });
        }
    });
    // The first front's clients cannot have the second's export, nor the other way round.
    let other = format!("nbd://127.0.0.1:{}/disk", port(&first));
    refused("nbdinfo", &["--size", &other]);
    let other = format!("nbd+unix:///vda?socket={}", text(&up.path("s")));
    refused("nbdinfo", &["--size", &other]);
    first.close();
    let disk = format!("nbd+unix:///disk?socket={}", text(&up.path("s")));
    assert_eq!(run("nbdinfo", &["--size", &disk]).trim(), MIB.to_string());
    drop(second);
}

#[test]
fn tls_with_keys() {
    need!(
        "qemu-storage-daemon",
        "qemu-img",
        "qemu-io",
        "nbdinfo",
        "nbdcopy",
        "timeout"
    );
    let up = Upstream::start();
    let front = up.front(&tcp(true), Some(up.psk()));
    let port = port(&front);
    let good = up.path("good/keys.psk");
    let wrong = up.keys("wrong/keys.psk", "alice:ffffffffffffffffffffffffffffffff\n");
    let nobody = up.keys("nobody/keys.psk", &KEY.replace("alice", "nobody"));
    let uri = |user: &str, keys: &Path, name: &str| {
        let keys = text(keys);
        format!("nbds://{user}@127.0.0.1:{port}/{name}?tls-psk-file={keys}")
    };

    let said = run("nbdinfo", &[&uri("alice", &good, "vda")]);
    assert!(said.contains("protocol: newstyle-fixed with TLS"), "{said}");
    assert!(said.contains("qemu:dirty-bitmap:since"), "{said}");
    let copy = up.path("copy");
    run("nbdcopy", &[&uri("alice", &good, "vda"), text(&copy)]);
    up.check_copy(&copy);
    let list = run("nbdinfo", &["--list", &uri("alice", &good, "")]);
    assert!(list.contains("vdb") && !list.contains("fl-"), "{list}");

    // QEMU, with what it takes itself, TLS 1.3, and 1.2 with and without curves and AES.
    let opts = format!(
        "driver=nbd,server.type=inet,server.host=127.0.0.1,server.port={port},export=vda,tls-creds=t"
    );
    let qemu = |keys: &Path, priority: &str| {
        let dir = text(keys.parent().unwrap());
        let user = if keys == nobody { "nobody" } else { "alice" };
        let object = format!(
            "tls-creds-psk,id=t,endpoint=client,username={user},dir={dir}{}{priority}",
            if priority.is_empty() {
                ""
            } else {
                ",priority="
            }
        );
        let copy = text(&copy);
        let args = [
            "convert",
            "--object",
            &object,
            "--image-opts",
            &opts,
            "-O",
            "raw",
            copy,
        ];
        client("qemu-img", &args)
    };
    let kinds = [
        "",
        "NORMAL:-VERS-ALL:+VERS-TLS1.3",
        "NORMAL:-VERS-ALL:+VERS-TLS1.2",
        "NORMAL:-VERS-ALL:+VERS-TLS1.2:-GROUP-ALL:+GROUP-FFDHE3072",
        "NORMAL:-VERS-ALL:+VERS-TLS1.2:-CIPHER-ALL:+CHACHA20-POLY1305",
    ];
    for kind in kinds {
        let output = qemu(&good, kind);
        assert!(output.status.success(), "{kind}: {output:?}");
        up.check_copy(&copy);
    }

    // A wrong key, an unknown user, and no TLS at all.
    for (user, keys) in [("alice", &wrong), ("nobody", &nobody)] {
        refused("nbdinfo", &["--size", &uri(user, keys, "vda")]);
        for kind in kinds {
            assert!(!qemu(keys, kind).status.success(), "{user} {kind}");
        }
    }
    let plain = format!("nbd://127.0.0.1:{port}/vda");
    refused("nbdinfo", &["--size", &plain]);
    refused("nbdinfo", &["--list", &plain]);
    refused("qemu-img", &["info", &plain]);
    // With a key, but not for what is not there.
    refused("nbdinfo", &["--size", &uri("alice", &good, "fl-8-vdb")]);
    // All that has left it well.
    assert_eq!(
        run("nbdinfo", &["--size", &uri("alice", &good, "vdb")]).trim(),
        MIB.to_string()
    );
}

/// The other way round: a client that wants TLS where there is none, and that takes what it gets.
#[test]
fn tls_is_not_pretended() {
    need!(
        "qemu-storage-daemon",
        "qemu-img",
        "qemu-io",
        "nbdinfo",
        "timeout"
    );
    let up = Upstream::start();
    let front = up.front(&tcp(false), Some(up.psk()));
    let keys = up.path("good/keys.psk");
    let wanted = format!(
        "nbds://alice@127.0.0.1:{}/vda?tls-psk-file={}",
        port(&front),
        text(&keys)
    );
    refused("nbdinfo", &["--size", &wanted]);
    let error = up.try_front(&tcp(true), &[], None, LONG).unwrap_err();
    assert!(matches!(error, FrontError::NoKeys { .. }));
    assert!(error.to_string().contains("tls-psk="), "{error}");
}

/// nbdcopy keeps many requests under way, so that both directions of one TLS object are busy.
#[test]
fn tls_carries_bulk_in_both_directions() {
    need!(
        "qemu-storage-daemon",
        "qemu-img",
        "qemu-io",
        "nbdcopy",
        "timeout"
    );
    let up = Upstream::start();
    let raw = up.path("big");
    std::fs::write(&raw, vec![0; 64 * MIB as usize]).unwrap();
    let mut daemon = Command::new("qemu-storage-daemon")
        .current_dir(up.dir.path())
        .args(["--nbd-server", "addr.type=unix,addr.path=up2"])
        .args(["--blockdev", "driver=file,node-name=w,filename=big"])
        .args(["--export", "nbd,id=w,node-name=w,name=w,writable=on"])
        .spawn()
        .unwrap();
    eventually("the socket", DEADLINE, || {
        UnixStream::connect(up.path("up2")).ok()
    });
    let exports = vec![("w".to_owned(), "w".to_owned())];
    let psk = Some(up.psk());
    let front = Front::start(&tcp(true), up.path("up2"), exports, psk, LONG).unwrap();
    let source: Vec<u8> = (0..64 * MIB).map(|i| (i % 251) as u8).collect();
    std::fs::write(up.path("source"), &source).unwrap();
    let keys = up.path("good/keys.psk");
    let uri = format!(
        "nbds://alice@127.0.0.1:{}/w?tls-psk-file={}",
        port(&front),
        text(&keys)
    );
    run("nbdcopy", &[text(&up.path("source")), &uri]);
    run("nbdcopy", &[&uri, text(&up.path("back"))]);
    assert!(std::fs::read(up.path("back")).unwrap() == source);
    drop(front);
    process::end(&mut daemon, Duration::from_secs(5));
    assert!(std::fs::read(&raw).unwrap() == source);
}
