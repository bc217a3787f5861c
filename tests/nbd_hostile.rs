//! Servers that lie, stall, drip and die: every one of them ends in a typed error, never in a
//! panic, a hang or wrong bytes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use fleecefs::model::Extents;
use fleecefs::nbd::{BASE_ALLOCATION, Connection, Endpoint, Fault, Pool, block_status};
use proptest::prelude::*;

/// For servers that answer: never reached.
const LONG: Duration = Duration::from_secs(60);
/// For servers that do not.
const SHORT: Duration = Duration::from_millis(100);

const ERROR: u32 = 1 << 31;
const GO: u32 = 7;

struct Server {
    dir: tempfile::TempDir,
    connections: Arc<AtomicUsize>,
}

impl Server {
    /// Runs `script` for each connection in a thread of its own, with the connection's number.
    fn new(script: impl Fn(usize, UnixStream) + Send + Sync + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let (counter, script) = (connections.clone(), Arc::new(script));
        std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                let (number, script) = (counter.fetch_add(1, Ordering::SeqCst), script.clone());
                std::thread::spawn(move || script(number, stream));
            }
        });
        Self { dir, connections }
    }

    /// Sends fixed bytes, then ends its side if `hangs_up`, and listens on.
    fn raw(bytes: Vec<u8>, hangs_up: bool) -> Self {
        Self::new(move |_, mut stream| send_raw(&mut stream, &bytes, hangs_up))
    }

    /// Opens an export of `size` bytes and answers each request with `answer`'s bytes; hangs up
    /// after an empty answer.
    fn data(size: u64, answer: impl Fn(usize, Request) -> Vec<u8> + Send + Sync + 'static) -> Self {
        Self::new(move |number, mut stream| {
            if stream.write_all(&greeting()).is_ok() && stream.write_all(&go(size)).is_ok() {
                skip(&mut stream, 4);
                skip_option(&mut stream);
                answer_requests(&mut stream, |request| answer(number, request));
            }
        })
    }

    /// The same with structured replies and the contexts 100, 101, … named as wanted.
    fn status(
        size: u64,
        contexts: &'static [&'static str],
        answer: impl Fn(Request) -> Vec<u8> + Send + Sync + 'static,
    ) -> Self {
        Self::new(move |_, mut stream| {
            if stream.write_all(&status_handshake(size, contexts)).is_ok() {
                skip(&mut stream, 4);
                (0..3).for_each(|_| skip_option(&mut stream));
                answer_requests(&mut stream, &answer);
            }
        })
    }

    fn endpoint(&self) -> Endpoint {
        Endpoint {
            socket: self.dir.path().join("s"),
            export: "disk".into(),
        }
    }

    fn connect(&self) -> Connection {
        Connection::open(&self.endpoint(), LONG).unwrap()
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

#[derive(Clone, Copy)]
struct Request {
    cookie: u64,
    offset: u64,
    length: u32,
}

fn send_raw(stream: &mut UnixStream, bytes: &[u8], hangs_up: bool) {
    let _ = stream.write_all(bytes);
    if hangs_up {
        let _ = stream.shutdown(Shutdown::Write);
    }
    // Not closed before the client does: it might still be sending.
    let _ = std::io::copy(stream, &mut std::io::sink());
}

fn answer_requests(stream: &mut UnixStream, answer: impl Fn(Request) -> Vec<u8>) {
    let mut header = [0; 28];
    while stream.read_exact(&mut header).is_ok() {
        assert_eq!(header[..4], 0x2560_9513u32.to_be_bytes());
        if header[7] == 2 {
            return;
        }
        let bytes = answer(Request {
            cookie: u64::from_be_bytes(header[8..16].try_into().unwrap()),
            offset: u64::from_be_bytes(header[16..24].try_into().unwrap()),
            length: u32::from_be_bytes(header[24..28].try_into().unwrap()),
        });
        if bytes.is_empty() || stream.write_all(&bytes).is_err() {
            return;
        }
    }
}

fn skip(stream: &mut UnixStream, length: usize) {
    let _ = stream.read_exact(&mut vec![0; length]);
}

fn skip_option(stream: &mut UnixStream) {
    let mut header = [0; 16];
    if stream.read_exact(&mut header).is_ok() {
        let length = u32::from_be_bytes(header[12..].try_into().unwrap());
        skip(stream, length as usize);
    }
}

fn greeting() -> Vec<u8> {
    b"NBDMAGICIHAVEOPT\0\x03".to_vec()
}

fn option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut out = 0x0003_e889_0455_65a9u64.to_be_bytes().to_vec();
    out.extend(option.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(data);
    out
}

fn export_info(size: u64) -> Vec<u8> {
    let mut info = vec![0, 0];
    info.extend(size.to_be_bytes());
    info.extend([0, 3]);
    option_reply(GO, 3, &info)
}

fn block_size_info(maximum: u32) -> Vec<u8> {
    let mut info = vec![0, 3];
    for n in [1, 4096, maximum] {
        info.extend(n.to_be_bytes());
    }
    option_reply(GO, 3, &info)
}

fn go(size: u64) -> Vec<u8> {
    [export_info(size), option_reply(GO, 1, b"")].concat()
}

fn status_handshake(size: u64, contexts: &[&str]) -> Vec<u8> {
    let mut out = greeting();
    out.extend(option_reply(8, 1, b""));
    for (id, name) in (100u32..).zip(contexts) {
        let data = [&id.to_be_bytes()[..], name.as_bytes()].concat();
        out.extend(option_reply(10, 4, &data));
    }
    out.extend(option_reply(10, 1, b""));
    out.extend(go(size));
    out
}

fn simple(errno: u32, cookie: u64, payload: &[u8]) -> Vec<u8> {
    let mut out = 0x6744_6698u32.to_be_bytes().to_vec();
    out.extend(errno.to_be_bytes());
    out.extend(cookie.to_be_bytes());
    out.extend(payload);
    out
}

fn chunk(done: bool, kind: u16, cookie: u64, payload: &[u8]) -> Vec<u8> {
    let mut out = 0x668e_33efu32.to_be_bytes().to_vec();
    out.extend(u16::from(done).to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend(cookie.to_be_bytes());
    out.extend((payload.len() as u32).to_be_bytes());
    out.extend(payload);
    out
}

fn extents(id: u32, extents: &[(u32, u32)]) -> Vec<u8> {
    let mut out = id.to_be_bytes().to_vec();
    for (length, flags) in extents {
        out.extend(length.to_be_bytes());
        out.extend(flags.to_be_bytes());
    }
    out
}

/// The disk's bytes; the period is prime, so a wrong offset shows.
fn pattern(offset: u64, length: usize) -> Vec<u8> {
    (offset..).take(length).map(|i| (i % 251) as u8).collect()
}

fn serve(request: Request) -> Vec<u8> {
    simple(
        0,
        request.cookie,
        &pattern(request.offset, request.length as usize),
    )
}

// ---- handshake

fn open_fault(bytes: Vec<u8>, hangs_up: bool, timeout: Duration) -> Fault {
    let server = Server::raw(bytes, hangs_up);
    Connection::open(&server.endpoint(), timeout)
        .unwrap_err()
        .fault
}

#[test]
fn a_handshake_that_breaks_off() {
    let whole = [greeting(), go(4096)].concat();
    for length in 0..whole.len() {
        let fault = open_fault(whole[..length].to_vec(), true, LONG);
        assert!(matches!(fault, Fault::Io(_)), "{length}: {fault}");
    }
}

#[test]
fn a_handshake_that_stalls() {
    for length in [0, 10, 18, 30] {
        let whole = [greeting(), go(4096)].concat();
        let fault = open_fault(whole[..length].to_vec(), false, SHORT);
        assert!(matches!(fault, Fault::Timeout), "{length}: {fault}");
    }
}

#[test]
fn a_handshake_that_lies() {
    let mut long_reply = option_reply(GO, 3, b"");
    let end = long_reply.len();
    long_reply[end - 4..].copy_from_slice(&u32::MAX.to_be_bytes());
    let cases = [
        ("no NBD", b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()),
        (
            "oldstyle",
            b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53\0\0".to_vec(),
        ),
        ("not fixed", b"NBDMAGICIHAVEOPT\0\x02".to_vec()),
        ("no option reply", [greeting(), vec![0; 20]].concat()),
        (
            "other option",
            [greeting(), option_reply(3, 1, b"")].concat(),
        ),
        ("long reply", [greeting(), long_reply].concat()),
        (
            "long text",
            [greeting(), option_reply(GO, ERROR | 6, &[b'x'; 4097])].concat(),
        ),
        ("no size", [greeting(), option_reply(GO, 1, b"")].concat()),
        (
            "short info",
            [greeting(), option_reply(GO, 3, &[0, 0, 1])].concat(),
        ),
        (
            "odd reply",
            [greeting(), option_reply(GO, 77, b"")].concat(),
        ),
        (
            "no block size",
            [greeting(), block_size_info(0), go(1)].concat(),
        ),
        ("huge", [greeting(), go(1 << 63)].concat()),
    ];
    for (name, bytes) in cases {
        let fault = open_fault(bytes, false, LONG);
        assert!(matches!(fault, Fault::Protocol(_)), "{name}: {fault}");
    }
}

#[test]
fn an_unknown_export_is_refused_in_the_servers_words() {
    let bytes = [greeting(), option_reply(GO, ERROR | 6, b"no such disk")].concat();
    match open_fault(bytes, false, LONG) {
        Fault::Refused {
            option,
            reply,
            message,
        } => {
            assert_eq!((option, reply, &*message), (GO, ERROR | 6, "no such disk"));
        }
        other => panic!("{other}"),
    }
}

#[test]
fn a_server_that_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let endpoint = Endpoint {
        socket: dir.path().join("s"),
        export: "disk".into(),
    };
    let error = Connection::open(&endpoint, LONG).unwrap_err();
    assert!(matches!(&error.fault, Fault::Io(e) if e.kind() == std::io::ErrorKind::NotFound));
    drop(UnixListener::bind(&endpoint.socket).unwrap());
    let error = Connection::open(&endpoint, LONG).unwrap_err();
    assert!(
        matches!(&error.fault, Fault::Io(e) if e.kind() == std::io::ErrorKind::ConnectionRefused)
    );
    assert!(error.is_connection_lost());
    assert!(
        error
            .to_string()
            .starts_with("NBD export \"disk\": connect: ")
    );
}

// ---- reads

#[test]
fn replies_that_lie() {
    type Answer = fn(usize, Request) -> Vec<u8>;
    let cases: [(&str, Answer); 5] = [
        ("cookie", |_, r| simple(0, r.cookie ^ 1, &[0; 8])),
        ("magic", |_, _| vec![0x55; 24]),
        ("request echoed", |_, r| {
            [
                &0x2560_9513u32.to_be_bytes()[..],
                &[0; 4],
                &r.cookie.to_be_bytes(),
            ]
            .concat()
        }),
        ("payload after an error", |_, r| {
            simple(5, r.cookie, &[0; 8])
        }),
        ("structured", |_, r| chunk(true, 1, r.cookie, &[0; 16])),
    ];
    for (name, answer) in cases {
        let server = Server::data(4096, answer);
        let mut connection = server.connect();
        let fault = connection.read_at(0, &mut [0; 8]).unwrap_err().fault;
        assert!(matches!(fault, Fault::Protocol(_)), "{name}: {fault}");
        assert!(!connection.is_usable());
        let fault = connection.read_at(0, &mut [0; 8]).unwrap_err().fault;
        assert!(matches!(fault, Fault::Closed), "{name}: {fault}");
    }
}

#[test]
fn an_error_answer_leaves_the_connection_usable() {
    let server = Server::data(4096, |_, r| match r.offset {
        0 => simple(28, r.cookie, b""),
        _ => serve(r),
    });
    let mut connection = server.connect();
    let mut buffer = [0; 100];
    let fault = connection.read_at(0, &mut buffer).unwrap_err().fault;
    assert!(matches!(fault, Fault::Server { errno: 28, .. }), "{fault}");
    let fault = connection.read_at(4000, &mut buffer).unwrap_err().fault;
    assert!(matches!(fault, Fault::PastEnd { size: 4096 }), "{fault}");
    connection.read_at(3996, &mut buffer).unwrap();
    assert_eq!(buffer[..], pattern(3996, 100));
    connection.read_at(4096, &mut []).unwrap();
}

#[test]
fn death_in_the_middle_of_a_payload() {
    for kept in [1, 15, 16, 17, 4111] {
        let server = Server::new(move |_, mut stream| {
            let _ = stream.write_all(&[greeting(), go(4096)].concat());
            skip(&mut stream, 4);
            skip_option(&mut stream);
            skip(&mut stream, 28);
            send_raw(&mut stream, &simple(0, 1, &[7; 4096])[..kept], true);
        });
        let error = server.connect().read_at(0, &mut [0; 4096]).unwrap_err();
        assert!(error.is_connection_lost(), "{kept}: {error}");
    }
}

#[test]
fn a_server_that_stops_answering_or_drips() {
    for drips in [false, true] {
        let server = Server::new(move |_, mut stream| {
            let _ = stream.write_all(&[greeting(), go(1 << 20)].concat());
            let mut reply = simple(0, 1, &[7; 1 << 20]).into_iter();
            while drips && stream.write_all(&[reply.next().unwrap()]).is_ok() {
                std::thread::sleep(Duration::from_millis(5));
            }
            send_raw(&mut stream, b"", false);
        });
        let mut connection = Connection::open(&server.endpoint(), SHORT).unwrap();
        let fault = connection
            .read_at(0, &mut vec![0; 1 << 20])
            .unwrap_err()
            .fault;
        assert!(matches!(fault, Fault::Timeout), "{drips}: {fault}");
    }
}

#[test]
fn requests_keep_to_the_servers_maximum() {
    let (sender, lengths) = mpsc::channel();
    let server = Server::new(move |_, mut stream| {
        let _ = stream.write_all(&[greeting(), block_size_info(4096), go(20_000)].concat());
        skip(&mut stream, 4);
        skip_option(&mut stream);
        answer_requests(&mut stream, |request| {
            sender.send(request.length).unwrap();
            serve(request)
        });
    });
    let mut connection = server.connect();
    let mut buffer = vec![0; 10_000];
    connection.read_at(9_999, &mut buffer).unwrap();
    assert_eq!(buffer, pattern(9_999, 10_000));
    drop(connection);
    assert_eq!(lengths.try_iter().collect::<Vec<_>>(), [4096, 4096, 1808]);
}

// ---- pool

#[test]
fn a_lost_connection_is_replaced_once() {
    // The first two connections answer one request each, the third none.
    let server = Server::data(4096, |number, r| match (number, r.offset) {
        (0, 100) | (2.., _) => Vec::new(),
        _ => serve(r),
    });
    let pool = Pool::new(server.endpoint(), 4, LONG);
    let mut buffer = [0; 100];
    for offset in [0, 100, 200] {
        pool.read_at(offset, &mut buffer).unwrap();
        assert_eq!(buffer[..], pattern(offset, 100));
    }
    assert_eq!((pool.bytes_read(), server.connections()), (300, 2));
}

#[test]
fn a_second_loss_is_reported() {
    let server = Server::data(4096, |_, _| Vec::new());
    let pool = Pool::new(server.endpoint(), 1, LONG);
    for tried in [2, 4] {
        assert!(
            pool.read_at(0, &mut [0; 8])
                .unwrap_err()
                .is_connection_lost()
        );
        assert_eq!(server.connections(), tried);
    }
    assert_eq!(pool.bytes_read(), 0);
}

#[test]
fn an_error_answer_keeps_the_pools_connection() {
    let server = Server::data(4096, |_, r| match r.offset {
        0 => simple(5, r.cookie, b""),
        _ => serve(r),
    });
    let pool = Pool::new(server.endpoint(), 1, LONG);
    let fault = pool.read_at(0, &mut [0; 8]).unwrap_err().fault;
    assert!(matches!(fault, Fault::Server { errno: 5, .. }), "{fault}");
    pool.read_at(8, &mut [0; 8]).unwrap();
    assert_eq!(server.connections(), 1);
}

#[test]
fn many_threads_share_few_connections() {
    let server = Server::data(1 << 20, |_, r| serve(r));
    let pool = Pool::new(server.endpoint(), 3, LONG);
    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            let pool = &pool;
            scope.spawn(move || {
                let mut buffer = vec![0; 1000];
                for i in 0..100 {
                    let offset = (thread * 131_071 + i * 997) % ((1 << 20) - 1000);
                    pool.read_at(offset, &mut buffer).unwrap();
                    assert_eq!(buffer, pattern(offset, 1000));
                }
            });
        }
    });
    assert_eq!(pool.bytes_read(), 800_000);
    assert!(server.connections() <= 3);
}

#[test]
fn another_disk_under_the_same_name_is_noticed() {
    let server = Server::new(|number, mut stream| {
        let _ = stream.write_all(&[greeting(), go(4096 << number)].concat());
        skip(&mut stream, 4);
        skip_option(&mut stream); // and hang up
    });
    let pool = Pool::new(server.endpoint(), 1, LONG);
    let fault = pool.read_at(0, &mut [0; 8]).unwrap_err().fault;
    assert!(matches!(fault, Fault::Protocol(_)), "{fault}");
}

/// A pool of one connection to a server that opens the export and then says nothing; and a thread
/// that is known to be blocked in a read.
fn with_blocked_reader(timeout: Duration, then: impl FnOnce(&Pool)) -> Fault {
    let (sender, asked) = mpsc::channel();
    let server = Server::data(4096, move |_, _| {
        sender.send(()).unwrap();
        std::thread::sleep(LONG);
        Vec::new()
    });
    let pool = Pool::new(server.endpoint(), 1, timeout);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| pool.read_at(0, &mut [0; 8]).unwrap_err().fault);
        asked.recv().unwrap();
        then(&pool);
        reader.join().unwrap()
    })
}

#[test]
fn close_wakes_readers_up() {
    let fault = with_blocked_reader(LONG, |pool| {
        std::thread::scope(|scope| {
            // One more waits for the connection.
            let waiter = scope.spawn(|| pool.read_at(0, &mut [0; 8]).unwrap_err().fault);
            pool.close();
            assert!(matches!(waiter.join().unwrap(), Fault::Closed));
        });
        let fault = pool.read_at(0, &mut [0; 8]).unwrap_err().fault;
        assert!(matches!(fault, Fault::Closed), "{fault}");
    });
    assert!(matches!(fault, Fault::Closed), "{fault}");
}

#[test]
fn waiting_for_a_connection_has_a_deadline() {
    let fault = with_blocked_reader(SHORT, |pool| {
        let fault = pool.read_at(0, &mut [0; 8]).unwrap_err().fault;
        assert!(matches!(fault, Fault::Timeout), "{fault}");
    });
    assert!(matches!(fault, Fault::Timeout), "{fault}");
}

#[test]
fn close_interrupts_a_handshake() {
    let (sender, connected) = mpsc::channel();
    let server = Server::new(move |_, mut stream| {
        sender.send(()).unwrap();
        send_raw(&mut stream, b"NBD", false);
    });
    let pool = Pool::new(server.endpoint(), 1, LONG);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| pool.read_at(0, &mut [0; 8]).unwrap_err().fault);
        connected.recv().unwrap();
        pool.close();
        let fault = reader.join().unwrap();
        assert!(matches!(fault, Fault::Closed), "{fault}");
    });
}

// ---- block status

fn status_fault(answer: impl Fn(Request) -> Vec<u8> + Send + Sync + 'static) -> Fault {
    let server = Server::status(65_536, &[BASE_ALLOCATION], answer);
    block_status(&server.endpoint(), &[BASE_ALLOCATION], 0..u64::MAX, LONG)
        .unwrap_err()
        .fault
}

#[test]
fn status_that_lies() {
    type Answer = fn(u64) -> Vec<u8>;
    let cases: [(&str, Answer); 15] = [
        ("cookie", |c| {
            chunk(true, 5, c ^ 1, &extents(100, &[(9, 0)]))
        }),
        ("empty extent", |c| {
            chunk(true, 5, c, &extents(100, &[(9, 0), (0, 1), (9, 1)]))
        }),
        ("no extents", |c| chunk(true, 5, c, &extents(100, &[]))),
        ("no id", |c| chunk(true, 5, c, &[0, 0])),
        ("odd length", |c| {
            chunk(
                true,
                5,
                c,
                &[&extents(100, &[(9, 0)])[..], &[0; 3]].concat(),
            )
        }),
        ("past the request", |c| {
            chunk(true, 5, c, &extents(100, &[(65_536, 0), (1, 1)]))
        }),
        ("context", |c| chunk(true, 5, c, &extents(7, &[(9, 0)]))),
        ("context twice", |c| {
            let status = extents(100, &[(9, 0)]);
            [chunk(false, 5, c, &status), chunk(true, 5, c, &status)].concat()
        }),
        ("none", |c| chunk(true, 0, c, b"")),
        ("none, not the last", |c| chunk(false, 0, c, b"")),
        ("none, with payload", |c| chunk(true, 0, c, b"x")),
        ("data", |c| chunk(true, 1, c, &[0; 16])),
        ("unknown type", |c| chunk(true, 99, c, b"")),
        ("huge", |c| {
            let mut header = chunk(true, 5, c, b"");
            header[16..].copy_from_slice(&u32::MAX.to_be_bytes());
            header
        }),
        ("simple success", |c| simple(0, c, b"")),
    ];
    for (name, answer) in cases {
        let fault = status_fault(move |r| answer(r.cookie));
        assert!(matches!(fault, Fault::Protocol(_)), "{name}: {fault}");
    }
}

#[test]
fn errors_for_block_status() {
    // A plain error chunk; one with an offset, before other chunks; an unknown type; a simple one.
    type Answer = fn(u64) -> Vec<u8>;
    let cases: [(Answer, &str); 4] = [
        (|c| chunk(true, 0x8001, c, b"\0\0\0\x05\0\x03bad"), "bad"),
        (
            |c| {
                let error = b"\0\0\0\x05\0\x03bad\0\0\0\0\0\0\0\0";
                [chunk(false, 0x8002, c, error), chunk(true, 0, c, b"")].concat()
            },
            "bad",
        ),
        (|c| chunk(true, 0xfffe, c, b"\0\0\0\x05\0\0"), ""),
        (|c| simple(5, c, b""), ""),
    ];
    for (answer, words) in cases {
        match status_fault(move |r| answer(r.cookie)) {
            Fault::Server { errno, message } => assert_eq!((errno, &*message), (5, words)),
            other => panic!("{other}"),
        }
    }
    for bad in [&b"\0\0\0\x05\0\x09bad"[..], b"\0\0\0\x05", b"\0\0\0\0\0\0"] {
        let fault = status_fault(move |r| chunk(true, 0x8001, r.cookie, bad));
        assert!(matches!(fault, Fault::Protocol(_)), "{fault}");
    }
}

#[test]
fn a_context_that_is_not_granted() {
    let server = Server::raw(status_handshake(4096, &["base:other"]), false);
    let fault = block_status(&server.endpoint(), &[BASE_ALLOCATION], 0..u64::MAX, LONG)
        .unwrap_err()
        .fault;
    assert!(
        matches!(fault, Fault::Refused { option: 10, .. }),
        "{fault}"
    );

    let unsupported = [greeting(), option_reply(8, ERROR | 1, b"")].concat();
    let server = Server::raw(unsupported, false);
    let fault = block_status(&server.endpoint(), &[BASE_ALLOCATION], 0..u64::MAX, LONG)
        .unwrap_err()
        .fault;
    assert!(matches!(fault, Fault::Refused { option: 8, .. }), "{fault}");
}

#[test]
fn a_large_disk_takes_few_requests() {
    const TIB: u64 = 1 << 40;
    let requests = Arc::new(AtomicUsize::new(0));
    let counter = requests.clone();
    // 10 000 extents over 16 TiB from a server that keeps to the request.
    let extent = 16 * TIB / 10_000 / 4096 * 4096;
    let server = Server::status(16 * TIB, &[BASE_ALLOCATION], move |r| {
        counter.fetch_add(1, Ordering::SeqCst);
        let (mut at, end) = (r.offset, r.offset + u64::from(r.length));
        let mut list = Vec::new();
        while at < end {
            let next = ((at / extent + 1) * extent).min(end);
            list.push(((next - at) as u32, (at / extent % 2) as u32));
            at = next;
        }
        chunk(true, 5, r.cookie, &extents(100, &list))
    });
    let maps = block_status(&server.endpoint(), &[BASE_ALLOCATION], 0..u64::MAX, LONG).unwrap();
    assert_eq!((maps[0].size(), maps[0].count()), (16 * TIB, 10_001));
    // 4 GiB less 64 KiB each.
    assert_eq!(requests.load(Ordering::SeqCst), 4097);
}

fn bytes_of(map: &Extents<u32>) -> Vec<u32> {
    map.iter()
        .flat_map(|e| std::iter::repeat_n(e.kind, e.length as usize))
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Two contexts, answered for different lengths, against one flag per byte.
    #[test]
    fn contexts_are_fetched_in_one_walk(
        disk in proptest::collection::vec((0u32..3, 0u32..2), 1..200),
        covers in proptest::collection::vec((1usize..50, 1usize..50), 1..8),
    ) {
        let model = disk.clone();
        let server = Server::status(disk.len() as u64, &["base:allocation", "x:y"], move |r| {
            let (a, b) = covers[r.cookie as usize % covers.len()];
            let runs = |id, cover: usize, flags: Vec<u32>| {
                let runs: Vec<(u32, u32)> = flags[r.offset as usize..]
                    .chunk_by(|a, b| a == b)
                    .map(|run| (run.len() as u32, run[0]))
                    .take(cover)
                    .collect();
                extents(id, &runs)
            };
            let (first, second): (Vec<u32>, Vec<u32>) = disk.iter().copied().unzip();
            [
                chunk(false, 5, r.cookie, &runs(101, b, second)),
                chunk(false, 5, r.cookie, &runs(100, a, first)),
                chunk(true, 0, r.cookie, b""),
            ]
            .concat()
        });
        let contexts = ["base:allocation", "x:y"];
        let maps = block_status(&server.endpoint(), &contexts, 0..u64::MAX, LONG).unwrap();
        let (first, second): (Vec<u32>, Vec<u32>) = model.into_iter().unzip();
        prop_assert_eq!(bytes_of(&maps[0]), first);
        prop_assert_eq!(bytes_of(&maps[1]), second);
    }

    /// Noise after any beginning of a handshake, or after all of it.
    #[test]
    fn noise_is_an_error(
        kept in 0usize..200,
        noise in proptest::collection::vec(any::<u8>(), 0..200),
        status: bool,
    ) {
        let mut bytes = if status {
            status_handshake(1 << 30, &[BASE_ALLOCATION])
        } else {
            [greeting(), go(1 << 30)].concat()
        };
        bytes.truncate(kept);
        bytes.extend(noise);
        let server = Server::raw(bytes, true);
        if status {
            prop_assert!(block_status(&server.endpoint(), &[BASE_ALLOCATION], 0..u64::MAX, LONG).is_err());
        } else {
            let pool = Pool::new(server.endpoint(), 1, LONG);
            prop_assert!(pool.read_at(0, &mut [0; 4096]).is_err());
        }
    }
}
