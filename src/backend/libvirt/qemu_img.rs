//! qemu-img, for the one thing that libvirt is not asked to do: an empty image to push to.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::model::{Error, Kind, Result};

/// How often it is looked whether the program ended.
const POLL: Duration = Duration::from_millis(5);

/// Makes an empty qcow2 image of `size` bytes of an empty file that is there.
pub(super) fn create_qcow2(path: &Path, size: u64, timeout: Duration) -> Result<()> {
    let failed = |kind, why: &str| {
        let what = format!("cannot make the image {}: {why}", path.display());
        Error::new(kind, what)
    };
    let cannot = |e: std::io::Error| {
        failed(Kind::Io, &format!("qemu-img: {e}")).hint("install it (Debian: qemu-utils)")
    };
    let mut child = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(path)
        .arg(size.to_string())
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(cannot)?;
    let deadline = Instant::now() + timeout;
    // What it may say is short, and fits into the pipe.
    while child.try_wait().map_err(cannot)?.is_none() {
        if Instant::now() >= deadline {
            // It may have ended this moment.
            let _ = child.kill();
            let _ = child.wait();
            return Err(failed(Kind::TimedOut, "it took too long"));
        }
        std::thread::sleep(POLL);
    }
    let output = child.wait_with_output().map_err(cannot)?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let why = said.trim().trim_start_matches("qemu-img: ");
    let kind = match why.contains("No space left") {
        true => Kind::NoSpace,
        false => Kind::Io,
    };
    Err(failed(kind, why))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("missing/x.qcow2");
        let error = create_qcow2(&path, 1 << 20, Duration::from_secs(20)).unwrap_err();
        assert!(error.to_string().contains("x.qcow2"), "{error}");
    }
}
