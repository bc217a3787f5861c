//! Tools that a test needs, and waiting with a deadline.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long anything in a test may take before it counts as hung.
pub const DEADLINE: Duration = Duration::from_secs(90);

/// Whether a missing tool is a failure: set by tests/run.
pub fn strict() -> bool {
    std::env::var("FLEECEFS_TESTS_STRICT").is_ok_and(|v| v == "1")
}

/// Says why a test does not run, or fails it where nothing may be skipped.
pub fn skip(why: &str) {
    assert!(!strict(), "{why}; run scripts/deps test");
    eprintln!("SKIPPED: {why}");
}

/// Where a tool is. `FLEECEFS_QEMU` stands for qemu-system-x86_64.
pub fn find(name: &str) -> Option<PathBuf> {
    if name == "qemu-system-x86_64"
        && let Some(path) = std::env::var_os("FLEECEFS_QEMU")
    {
        return Some(path.into());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

/// Where a tool is; when it is missing the test fails (strict) or is told to return.
pub fn tool(name: &str) -> Option<PathBuf> {
    let found = find(name);
    if found.is_none() {
        skip(&format!("{name} is not installed"));
    }
    found
}

/// Can this process mount a FUSE file system?
pub fn fuse() -> Option<()> {
    let usable = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .is_ok();
    if !usable {
        skip("/dev/fuse cannot be opened");
    }
    usable.then_some(())
}

/// Returns from the test, as skipped, unless all these tools are installed.
macro_rules! need {
    ($($tool:expr),+ $(,)?) => {
        $(if $crate::common::tool($tool).is_none() { return; })+
    };
}
pub(crate) use need;

/// Asks until there is an answer; panics at the deadline.
pub fn eventually<T>(what: &str, deadline: Duration, mut ask: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + deadline;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < end, "{what}: not within {deadline:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Runs a command to its end; panics unless it succeeds. Returns what it printed.
pub fn run(program: &str, args: &[&str]) -> String {
    let path = find(program).unwrap_or_else(|| panic!("{program} is not installed"));
    let output = std::process::Command::new(path)
        .args(args)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{program} {args:?}: {}\n{text}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

/// A path as text; test paths are plain.
pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A temporary directory with a short name: socket paths hold 107 bytes.
pub fn temp_dir() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("fl").tempdir().unwrap()
}

/// Is this root?
pub fn is_root() -> bool {
    // SAFETY: no pointers.
    unsafe { libc::geteuid() == 0 }
}
