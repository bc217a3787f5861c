//! Ending processes by their id, and finding those that belong to a test's directory.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

/// Sends a signal. A process that is gone already is fine.
pub fn signal(pid: u32, signal: libc::c_int) {
    // SAFETY: kill has no memory to get wrong.
    unsafe { libc::kill(libc::pid_t::try_from(pid).unwrap(), signal) };
}

/// Waits for a child, for so long.
pub fn wait(child: &mut Child, deadline: Duration) -> Option<ExitStatus> {
    let end = Instant::now() + deadline;
    loop {
        match child.try_wait().unwrap() {
            Some(status) => return Some(status),
            None if Instant::now() >= end => return None,
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// SIGTERM, time to obey, SIGKILL.
pub fn end(child: &mut Child, grace: Duration) -> ExitStatus {
    if let Ok(Some(status)) = child.try_wait() {
        return status;
    }
    signal(child.id(), libc::SIGTERM);
    wait(child, grace).unwrap_or_else(|| {
        let _ = child.kill();
        child.wait().unwrap_or_else(|_| ExitStatus::from_raw(9))
    })
}

/// Is there a live (not zombie) process of that id?
pub fn alive(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        // The state follows the name, which is in brackets and may hold anything.
        stat.rsplit_once(") ")
            .is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
    })
}

/// Processes, other than this one, that have a path on their command line: `(pid, command line)`.
pub fn naming(path: &Path) -> Vec<(u32, String)> {
    let path = path.to_str().unwrap();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        let Ok(line) = std::fs::read(entry.path().join("cmdline")) else {
            continue;
        };
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if pid != std::process::id() && line.contains(path) {
            found.push((pid, line));
        }
    }
    found
}
