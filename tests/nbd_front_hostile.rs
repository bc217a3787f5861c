//! What a front does with clients that mean no good, with its address, and when it ends.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
mod front;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use common::eventually;
use common::tools::{DEADLINE, need, run, text};
use common::upstream::{MIB, Upstream, VDA_SIZE};
use fleecefs::model::ServerAddress;
use fleecefs::nbd::{Connection, Endpoint, FrontError};
use front::{LONG, port, tcp};

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
        assert_eq!(answer[..8], VDA_SIZE.to_be_bytes());
    }
    assert!(ask("fl-8-vdb", 3, 10).is_err());
    assert!(ask("", 3, 10).is_err());
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
        (3, b"NBDMAGIC\0\0\0\x03\0\0\0\0"),
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
    let crowd = (0..100).map(|_| UnixStream::connect(&socket).unwrap());
    let crowd: Vec<_> = crowd.collect();
    let greeted = |mut stream: &UnixStream| stream.read_exact(&mut [0; 18]).is_ok();
    let served = crowd.iter().filter(|stream| greeted(stream)).count();
    assert!((32..=64).contains(&served), "{served}");
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
    assert_eq!(
        run("nbdinfo", &["--size", &uri]).trim(),
        VDA_SIZE.to_string()
    );
}
