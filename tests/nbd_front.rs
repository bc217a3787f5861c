//! The front with a real QEMU behind it and real clients before it: libnbd's and QEMU's tools, both
//! of which do TLS with GnuTLS, and clients that mean no good.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::tools::{DEADLINE, need, run, temp_dir, text};
use common::{eventually, image, process};
use fleecefs::model::ServerAddress;
use fleecefs::nbd::{Connection, Endpoint, Front, FrontError, Psk};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 8 * MIB;
/// For clients that behave.
const LONG: Duration = Duration::from_secs(60);
const KEY: &str = "alice:00112233445566778899aabbccddeeff";

/// A storage daemon with two exports for clients, and one that is nobody's business.
struct Upstream {
    dir: tempfile::TempDir,
    daemon: Child,
}

impl Upstream {
    fn start() -> Self {
        let dir = temp_dir();
        let disk = dir.path().join("vda.qcow2");
        image::create(&disk, "qcow2", SIZE, "");
        image::write(&disk, MIB, 65_536, 0xaa);
        run("qemu-img", &["bitmap", "--add", text(&disk), "since"]);
        image::write(&disk, 3 * MIB, 65_536, 0xbb);
        run("qemu-img", &["bitmap", "--disable", text(&disk), "since"]);
        let other = dir.path().join("vdb.qcow2");
        image::create(&other, "qcow2", MIB, "");
        let daemon = Command::new("qemu-storage-daemon")
            .current_dir(dir.path())
            .args([
                "--nbd-server",
                "addr.type=unix,addr.path=up,max-connections=0",
                "--blockdev",
                "driver=qcow2,node-name=a,file.driver=file,file.filename=vda.qcow2",
                "--blockdev",
                "driver=qcow2,node-name=b,file.driver=file,file.filename=vdb.qcow2",
                "--export",
                "nbd,id=a,node-name=a,name=fl-7-vda,bitmaps.0=since",
                "--export",
                "nbd,id=b,node-name=b,name=fl-7-vdb",
                "--export",
                "nbd,id=c,node-name=b,name=fl-8-vdb",
            ])
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let up = Self { dir, daemon };
        eventually("the storage daemon's socket", DEADLINE, || {
            UnixStream::connect(up.path("up")).ok()
        });
        up
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn unix(&self, name: &str) -> ServerAddress {
        ServerAddress::Unix(text(&self.path(name)).to_owned())
    }

    fn keys(&self, name: &str, content: &str) -> PathBuf {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        path
    }

    fn psk(&self) -> Psk {
        Psk::load(&self.keys("good/keys.psk", &format!("{KEY}\n"))).unwrap()
    }

    fn try_front(
        &self,
        address: &ServerAddress,
        exports: &[(&str, &str)],
        psk: Option<Psk>,
        timeout: Duration,
    ) -> Result<Front, FrontError> {
        let owned = exports.iter();
        let owned = owned.map(|&(public, private)| (public.to_owned(), private.to_owned()));
        Front::start(address, self.path("up"), owned.collect(), psk, timeout)
    }

    fn front(&self, address: &ServerAddress, psk: Option<Psk>) -> Front {
        let exports = [("vda", "fl-7-vda"), ("vdb", "fl-7-vdb")];
        self.try_front(address, &exports, psk, LONG).unwrap()
    }

    /// The bytes of vda, as a client fetched them.
    fn check_copy(&self, copy: &Path) {
        let bytes = std::fs::read(copy).unwrap();
        assert_eq!(bytes.len() as u64, SIZE);
        let mut expected = vec![0; SIZE as usize];
        expected[MIB as usize..][..65_536].fill(0xaa);
        expected[3 * MIB as usize..][..65_536].fill(0xbb);
        assert!(bytes == expected);
        std::fs::remove_file(copy).unwrap();
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        process::end(&mut self.daemon, Duration::from_secs(5));
    }
}

fn tcp(tls: bool) -> ServerAddress {
    ServerAddress::Tcp {
        host: "127.0.0.1".to_owned(),
        port: 0,
        tls,
    }
}

fn port(front: &Front) -> u16 {
    front.tcp_addresses()[0].port()
}

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
        SIZE.to_string()
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

/// `NBD_OPT_EXPORT_NAME`, which has no error reply: our own client falls back to it only with old
/// servers, so the bytes are spelt out.
#[test]
fn the_old_way_in() {
    need!("qemu-storage-daemon", "qemu-img", "qemu-io");
    let up = Upstream::start();
    let _front = up.front(&up.unix("s"), None);
    let ask = |name: &str, flags: u32, length: usize| {
        let mut stream = greeted(&up.path("s"), flags);
        stream.write_all(&option(1, name.as_bytes())).unwrap();
        let mut answer = vec![0; length];
        stream.read_exact(&mut answer).map(|()| answer)
    };
    for (flags, length) in [(3, 10), (1, 134), (0, 134)] {
        let answer = ask("vda", flags, length).unwrap();
        assert_eq!(answer[..8], SIZE.to_be_bytes());
    }
    assert!(ask("fl-8-vdb", 3, 10).is_err());
    assert!(ask("", 3, 10).is_err());
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

/// A user and key where QEMU is the client that keeps many requests under way, both directions busy.
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

#[test]
fn closing_ends_clients() {
    need!("qemu-storage-daemon", "qemu-img", "qemu-io", "timeout");
    let up = Upstream::start();
    let front = up.front(&up.unix("s"), None);
    let endpoint = Endpoint {
        socket: up.path("s"),
        export: "vda".to_owned(),
    };
    let mut idle = Connection::open(&endpoint, LONG).unwrap();
    let mut buffer = vec![0; 65_536];
    idle.read_at(MIB, &mut buffer).unwrap();
    assert!(buffer.iter().all(|&b| b == 0xaa));
    // One that reads all the time, one in the middle of the handshake, one that says nothing.
    let mut busy = Connection::open(&endpoint, LONG).unwrap();
    let busy = std::thread::spawn(move || {
        let mut buffer = vec![0; MIB as usize];
        while busy.read_at(0, &mut buffer).is_ok() {}
    });
    let mut talks = greeted(&up.path("s"), 3);
    let mut silent = UnixStream::connect(up.path("s")).unwrap();
    // One that asks and does not take the answers.
    let mut stuck = greeted(&up.path("s"), 3);
    stuck.write_all(&go("vda")).unwrap();
    let mut request = vec![0x25, 0x60, 0x95, 0x13];
    request.resize(26, 0);
    request.splice(24..26, (8 * MIB as u32).to_be_bytes());
    for _ in 0..4 {
        stuck.write_all(&request).unwrap();
    }
    std::thread::sleep(Duration::from_millis(200));

    let since = Instant::now();
    front.close();
    assert!(
        since.elapsed() < Duration::from_secs(2),
        "{:?}",
        since.elapsed()
    );
    idle.read_at(0, &mut buffer).unwrap_err();
    busy.join().unwrap();
    let mut rest = Vec::new();
    talks.read_to_end(&mut rest).unwrap();
    silent.read_to_end(&mut rest).unwrap();
    stuck.read_to_end(&mut rest).unwrap();
    assert!(UnixStream::connect(up.path("s")).is_err());
    // The address is free again, and QEMU serves on.
    let _front = up.front(&up.unix("s"), None);
    Connection::open(&endpoint, LONG).unwrap();
}

#[test]
fn what_is_at_the_address_already_stays() {
    need!("qemu-storage-daemon", "qemu-img", "qemu-io");
    let up = Upstream::start();
    let path = up.path("s");
    std::fs::write(&path, "precious").unwrap();
    let address = up.unix("s");
    let error = up.try_front(&address, &[], None, LONG).unwrap_err();
    assert!(matches!(error, FrontError::InUse { .. }), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    std::fs::remove_file(&path).unwrap();

    // A live front's own address, and a dangling link.
    let front = up.front(&address, None);
    let error = up.try_front(&address, &[], None, LONG).unwrap_err();
    assert!(matches!(error, FrontError::InUse { .. }), "{error}");
    assert!(std::fs::metadata(&path).unwrap().file_type().is_socket());
    // Somebody puts something else there: it is not ours to remove.
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "theirs").unwrap();
    front.close();
    assert_eq!(std::fs::read(&path).unwrap(), b"theirs");

    let front = up.front(&tcp(false), None);
    let taken = ServerAddress::Tcp {
        host: "127.0.0.1".to_owned(),
        port: port(&front),
        tls: false,
    };
    let error = up.try_front(&taken, &[], None, LONG).unwrap_err();
    assert!(matches!(error, FrontError::InUse { .. }), "{error}");
    // SO_REUSEADDR: a port whose connections have just ended can be had at once.
    let client = TcpStream::connect(front.tcp_addresses()[0]).unwrap();
    front.close();
    up.try_front(&taken, &[], None, LONG).unwrap();
    drop(client);

    let long = ServerAddress::Unix("x".repeat(200));
    let error = up.try_front(&long, &[], None, LONG).unwrap_err();
    assert!(matches!(error, FrontError::Listen { .. }), "{error}");
}

fn option(option: u32, data: &[u8]) -> Vec<u8> {
    let mut out = b"IHAVEOPT".to_vec();
    out.extend(option.to_be_bytes());
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(data);
    out
}

fn go(name: &str) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend(name.as_bytes());
    data.extend([0, 0]);
    option(7, &data)
}

/// A connection after the greeting.
fn greeted(socket: &Path, flags: u32) -> UnixStream {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting, b"NBDMAGICIHAVEOPT\0\x03");
    stream.write_all(&flags.to_be_bytes()).unwrap();
    stream
}

/// The type of the next reply.
fn reply(stream: &mut UnixStream) -> u32 {
    let mut header = [0; 20];
    stream.read_exact(&mut header).unwrap();
    let length = u32::from_be_bytes(header[16..].try_into().unwrap());
    stream.read_exact(&mut vec![0; length as usize]).unwrap();
    u32::from_be_bytes(header[12..16].try_into().unwrap())
}

#[test]
fn hostile_clients_end_only_themselves() {
    need!("qemu-storage-daemon", "qemu-img", "qemu-io");
    let up = Upstream::start();
    let address = up.unix("s");
    let exports = [("vda", "fl-7-vda")];
    let short = Duration::from_millis(500);
    let _front = up.try_front(&address, &exports, None, short).unwrap();
    let socket = up.path("s");

    // Errors that leave the conversation going.
    let mut stream = greeted(&socket, 3);
    let error = |n: u32| 1 << 31 | n;
    for (bytes, expected) in [
        (option(7, b""), error(3)),
        (option(7, b"\0\0\xff\xffvda\0\0"), error(3)),
        (option(10, b"\xff\xff\xff\xff"), error(3)),
        (option(7, b"\0\0\0\x03vda"), error(3)), // QEMU's own answer: no number of requests
        (go("fl-8-vdb"), error(6)),
        (option(3, b"x"), error(3)),
        (option(5, b""), error(2)),
        (option(4, b""), error(1)), // NBD_OPT_PEEK_EXPORT was withdrawn
        (option(0xffff_ffff, &[7; 60_000]), error(1)),
    ] {
        stream.write_all(&bytes).unwrap();
        assert_eq!(reply(&mut stream), expected, "{:?}", &bytes[..12]);
    }
    stream.write_all(&option(2, b"")).unwrap();
    assert_eq!(reply(&mut stream), 1);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);

    // What ends it: flags, magic, sizes, and stopping half-way.
    let mut huge = option(7, b"");
    huge[12..16].fill(0xff);
    let cases: [(u32, &[u8]); 7] = [
        (4, b""),
        (u32::MAX, b""),
        (
            3,
            b"IHAVEOPTIHAVEOPTIHAVEOPT"[8..].strip_prefix(b"I").unwrap(),
        ),
        (3, &huge),
        (3, b"IHAVE"),
        (3, &option(7, b"\0\0\0\x03vda\0\0")[..20]),
        (3, &[0; 4096]),
    ];
    for (flags, bytes) in cases {
        let mut stream = greeted(&socket, flags);
        let _ = stream.write_all(bytes);
        let mut rest = Vec::new();
        // Closed with what we sent unread, a Unix socket says ECONNRESET.
        let _ = stream.read_to_end(&mut rest);
        assert_eq!(rest, b"", "{flags} {bytes:?}");
    }
    // Silence, and a drip that never comes to an end of its own.
    let since = Instant::now();
    let mut stream = UnixStream::connect(&socket).unwrap();
    stream.read_to_end(&mut Vec::new()).unwrap();
    let mut stream = greeted(&socket, 3);
    while stream.write_all(&option(3, b"")).is_ok() {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(since.elapsed() < Duration::from_secs(20));

    // More clients than there are places; and when they have gone, there are places again.
    let crowd: Vec<_> = (0..100).map(|_| UnixStream::connect(&socket)).collect();
    drop(crowd);
    let endpoint = Endpoint {
        socket,
        export: "vda".to_owned(),
    };
    eventually("a place", DEADLINE, || {
        Connection::open(&endpoint, LONG).ok()
    });
}

/// Before TLS nothing is told, and noise in its place is an end, not a crash.
#[test]
fn hostile_clients_of_tls() {
    need!(
        "qemu-storage-daemon",
        "qemu-img",
        "qemu-io",
        "nbdinfo",
        "timeout"
    );
    let up = Upstream::start();
    let exports = [("vda", "fl-7-vda")];
    let short = Duration::from_secs(2);
    let front = up
        .try_front(&tcp(true), &exports, Some(up.psk()), short)
        .unwrap();
    let address = front.tcp_addresses()[0];
    let connect = || {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream.read_exact(&mut [0; 18]).unwrap();
        stream.write_all(&3u32.to_be_bytes()).unwrap();
        stream
    };
    let kind = |stream: &mut TcpStream| {
        let mut header = [0; 20];
        stream.read_exact(&mut header).unwrap();
        assert_eq!(header[16..], [0; 4]);
        u32::from_be_bytes(header[12..16].try_into().unwrap())
    };
    let mut stream = connect();
    for (bytes, expected) in [
        (go("vda"), 5),
        (option(3, b""), 5),
        (option(8, b""), 5),
        (option(99, b""), 5),
        (option(5, b"x"), 3),
    ] {
        stream.write_all(&bytes).unwrap();
        assert_eq!(kind(&mut stream), 1 << 31 | expected);
    }
    // What is sent in the clear along with STARTTLS is not taken for what TLS says.
    let mut both = option(5, b"");
    both.extend(go("vda"));
    stream.write_all(&both).unwrap();
    assert_eq!(kind(&mut stream), 1);
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest); // at most an alert
    assert!(rest.len() < 16, "{rest:?}");

    let mut stream = connect();
    stream.write_all(&option(1, b"vda")).unwrap();
    let _ = stream.read_to_end(&mut rest);
    // Silence after STARTTLS has the handshake's deadline too.
    let mut stream = connect();
    stream.write_all(&option(5, b"")).unwrap();
    assert_eq!(kind(&mut stream), 1);
    let since = Instant::now();
    stream.read_to_end(&mut rest).unwrap();
    assert!(since.elapsed() < Duration::from_secs(20));

    let keys = up.path("good/keys.psk");
    let uri = format!(
        "nbds://alice@127.0.0.1:{}/vda?tls-psk-file={}",
        address.port(),
        text(&keys)
    );
    assert_eq!(run("nbdinfo", &["--size", &uri]).trim(), SIZE.to_string());
}
