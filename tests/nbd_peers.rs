//! Reads and maps from NBD servers that are not ours: the `nbd` crate's, and QEMU's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::Cursor;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use fleecefs::nbd::{
    BASE_ALLOCATION, Connection, Endpoint, Fault, Pool, STATE_DIRTY, STATE_HOLE, STATE_ZERO,
    block_status, dirty_bitmap_context,
};

const TIMEOUT: Duration = Duration::from_secs(60);
const KIB: u64 = 1024;

/// The period is prime, so a wrong offset shows.
fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i % 251) as u8).collect()
}

fn endpoint(dir: &Path) -> Endpoint {
    Endpoint {
        socket: dir.join("s"),
        export: "disk".into(),
    }
}

#[test]
fn the_nbd_crates_server() {
    let dir = tempfile::tempdir().unwrap();
    let disk = pattern(1_000_003);
    let listener = UnixListener::bind(dir.path().join("s")).unwrap();
    let served = disk.clone();
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            let served = served.clone();
            std::thread::spawn(move || {
                let size = served.len() as u64;
                // It does not know NBD_OPT_GO: this is the way through NBD_OPT_EXPORT_NAME.
                nbd::server::handshake(&mut stream, |name| {
                    assert_eq!(name, "disk");
                    Ok(nbd::Export {
                        size,
                        readonly: true,
                        ..nbd::Export::<()>::default()
                    })
                })?;
                nbd::server::transmission(&mut stream, Cursor::new(served))
            });
        }
    });
    let pool = Pool::new(endpoint(dir.path()), 2, TIMEOUT);
    for (offset, length) in [
        (0, 1),
        (1, 4096),
        (65_535, 300_000),
        (999_999, 4),
        (0, 1_000_003),
    ] {
        let mut buffer = vec![0; length];
        pool.read_at(offset as u64, &mut buffer).unwrap();
        assert!(buffer == disk[offset..offset + length], "{offset} {length}");
    }
    let mut connection = Connection::open(&endpoint(dir.path()), TIMEOUT).unwrap();
    assert_eq!(connection.size(), 1_000_003);
    let fault = connection
        .read_at(1_000_000, &mut [0; 4])
        .unwrap_err()
        .fault;
    assert!(matches!(fault, Fault::PastEnd { .. }), "{fault}");
}

/// Whether QEMU's tools are here; without them a test passes, unless it must not.
fn have_qemu() -> bool {
    let found = ["qemu-nbd", "qemu-img", "qemu-io"].iter().all(|tool| {
        let mut command = Command::new(tool);
        command
            .arg("--version")
            .stdout(Stdio::null())
            .status()
            .is_ok()
    });
    if !found {
        assert!(
            std::env::var_os("FLEECEFS_TESTS_STRICT").is_none(),
            "qemu-utils is missing"
        );
        eprintln!("skipped: qemu-utils is missing");
    }
    found
}

fn run(dir: &Path, command: &str) -> String {
    let mut words = command.split('|');
    let output = Command::new(words.next().unwrap())
        .args(words)
        .current_dir(dir)
        .output()
        .unwrap();
    assert!(output.status.success(), "{command}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

struct QemuNbd(Child);

impl QemuNbd {
    fn start(dir: &Path, arguments: &[&str]) -> Self {
        let child = Command::new("qemu-nbd")
            .args(["-k", dir.join("s").to_str().unwrap(), "-r", "-x", "disk"])
            .args(["-t", "-e", "4"])
            .args(arguments)
            .current_dir(dir)
            .spawn()
            .unwrap();
        let server = Self(child);
        let since = Instant::now();
        while !dir.join("s").exists() {
            assert!(since.elapsed() < TIMEOUT, "qemu-nbd does not start");
            std::thread::sleep(Duration::from_millis(5));
        }
        server
    }
}

impl Drop for QemuNbd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn qemus_maps_and_bytes() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    // 64 KiB clusters; the size is a multiple of 512, but not of 4096.
    let size = 1024 * KIB + 1536;
    std::fs::write(dir.join("pattern"), pattern(size as usize)).unwrap();
    let steps = [
        format!("qemu-img|create|-q|-f|qcow2|d.qcow2|{size}"),
        "qemu-io|-f|qcow2|-c|write -q -s pattern 0 64k|d.qcow2".into(),
        "qemu-img|bitmap|--add|d.qcow2|since".into(),
        "qemu-io|-f|qcow2|-c|write -q -z 192k 64k|d.qcow2".into(),
        format!(
            "qemu-io|-f|qcow2|-c|write -q -s pattern 1024k {}|d.qcow2",
            size - 1024 * KIB
        ),
        "qemu-img|bitmap|--disable|d.qcow2|since".into(),
    ];
    for step in &steps {
        run(dir, step);
    }
    let _server = QemuNbd::start(dir, &["-f", "qcow2", "-B", "since", "d.qcow2"]);

    let dirty = dirty_bitmap_context("since");
    let maps = block_status(
        &endpoint(dir),
        &[&dirty, BASE_ALLOCATION],
        0..u64::MAX,
        TIMEOUT,
    )
    .unwrap();
    let runs = |i: usize| -> Vec<(u64, u64, u32)> {
        maps[i]
            .iter()
            .map(|e| (e.offset, e.end(), e.kind))
            .collect()
    };
    let expected = [
        (0, 192 * KIB, 0),
        (192 * KIB, 256 * KIB, STATE_DIRTY),
        (256 * KIB, 1024 * KIB, 0),
        (1024 * KIB, size, STATE_DIRTY),
    ];
    assert_eq!(runs(0), expected);
    let expected = [
        (0, 64 * KIB, 0),
        // QEMU tells qcow2's zero clusters and unallocated ones alike.
        (64 * KIB, 1024 * KIB, STATE_HOLE | STATE_ZERO),
        (1024 * KIB, size, 0),
    ];
    assert_eq!(runs(1), expected);

    let json = run(dir, "qemu-img|map|-U|--output=json|-f|qcow2|d.qcow2");
    let truth: Vec<serde_json::Value> = serde_json::from_str(&json).unwrap();
    for entry in &truth {
        let number = |key: &str| entry[key].as_u64().unwrap();
        for extent in maps[1].clip(number("start"), number("length")) {
            assert_eq!(entry["zero"], extent.kind & STATE_ZERO != 0, "{entry}");
            assert_eq!(entry["data"], extent.kind & STATE_HOLE == 0, "{entry}");
        }
    }

    let mut disk = vec![0; size as usize];
    disk[..65_536].copy_from_slice(&pattern(65_536));
    disk[1_048_576..].copy_from_slice(&pattern(1536));
    let pool = Pool::new(endpoint(dir), 2, TIMEOUT);
    for (offset, length) in [
        (0, size),
        (size - 1, 1),
        (1_048_575, 1537),
        (65_535, 2),
        (1_049_600, 512),
    ] {
        let mut buffer = vec![1; length as usize];
        pool.read_at(offset, &mut buffer).unwrap();
        assert!(
            buffer == disk[offset as usize..][..length as usize],
            "{offset} {length}"
        );
    }
    assert_eq!(pool.bytes_read(), size + 1 + 1537 + 2 + 512);

    let other = Endpoint {
        export: "other".into(),
        ..endpoint(dir)
    };
    let fault = Connection::open(&other, TIMEOUT).unwrap_err().fault;
    assert!(matches!(fault, Fault::Refused { .. }), "{fault}");
}
