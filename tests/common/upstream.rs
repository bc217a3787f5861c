//! A storage daemon that serves two disks over NBD on a private socket, under private names.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use std::os::unix::net::UnixStream;

use super::tools::{DEADLINE, eventually, run, temp_dir, text};
use super::{image, process};

pub const MIB: u64 = 1 << 20;
/// Of vda; that of vdb is 1 MiB.
pub const VDA_SIZE: u64 = 8 * MIB;

/// A storage daemon with two exports for clients, and one that is nobody's business.
pub struct Upstream {
    pub dir: tempfile::TempDir,
    daemon: Child,
}

impl Upstream {
    pub fn start() -> Self {
        let dir = temp_dir();
        let disk = dir.path().join("vda.qcow2");
        image::create(&disk, "qcow2", VDA_SIZE, "");
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

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The bytes of vda, as a client fetched them.
    pub fn check_copy(&self, copy: &Path) {
        let bytes = std::fs::read(copy).unwrap();
        assert_eq!(bytes.len() as u64, VDA_SIZE);
        let mut expected = vec![0; VDA_SIZE as usize];
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
