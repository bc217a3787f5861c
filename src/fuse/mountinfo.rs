//! What is mounted where, from `/proc/self/mountinfo`: never from stat(2), which a mount that hangs
//! does not answer.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// The file system type of our mounts.
pub const TYPE: &str = "fuse.fleecefs";

/// A mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry {
    /// The device number as `major:minor`, unique while the file system lives.
    pub device: String,
    /// Where it is mounted.
    pub point: PathBuf,
    /// The type, such as `ext4` or `fuse.fleecefs`.
    pub kind: String,
}

/// The mount on `point`, which must be canonical: the topmost, if there are several.
pub fn at(point: &Path) -> Option<MountEntry> {
    let text = fs::read("/proc/self/mountinfo").ok()?;
    let mut found = text.split(|b| *b == b'\n').filter_map(parse);
    found.rfind(|entry| entry.point == point)
}

/// `36 35 98:0 /root /point rw,noatime master:1 - type source options`
fn parse(line: &[u8]) -> Option<MountEntry> {
    let fields: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
    let dash = fields.iter().position(|f| *f == b"-")?;
    let text = |field: &[u8]| String::from_utf8_lossy(field).into_owned();
    Some(MountEntry {
        device: text(fields.get(2)?),
        point: PathBuf::from(unescape(fields.get(4)?)),
        kind: text(fields.get(dash + 1)?),
    })
}

/// Blank, tab, newline and backslash are written as three octal digits.
fn unescape(field: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = (first == b'\\')
            .then(|| tail.get(..3))
            .flatten()
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match octal {
            Some(byte) => {
                out.push(byte);
                rest = &tail[3..];
            }
            None => {
                out.push(first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(out)
}

/// The path of `dir` as mountinfo has it, found without touching what is mounted there.
pub fn canonical(dir: &Path) -> std::io::Result<PathBuf> {
    let bytes = dir.as_os_str().as_bytes();
    match (dir.file_name(), bytes.ends_with(b"/.")) {
        (Some(name), false) => {
            let parent = match dir.parent() {
                Some(p) if !p.as_os_str().is_empty() => p,
                _ => Path::new("."),
            };
            let joined = parent.canonicalize()?.join(name);
            // A link has to be followed; a mount point that is not one must not be looked into.
            match fs::read_link(&joined) {
                Ok(_) => joined.canonicalize(),
                Err(_) => Ok(joined),
            }
        }
        _ => dir.canonicalize(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_it() {
        let line = b"36 35 0:52 / /mnt/a\\040b\\134c rw,nosuid shared:1 master:2 - fuse.fleecefs \
                     qmp:/x rw,user_id=0";
        assert_eq!(
            parse(line),
            Some(MountEntry {
                device: "0:52".into(),
                point: "/mnt/a b\\c".into(),
                kind: "fuse.fleecefs".into(),
            })
        );
        assert_eq!(parse(b""), None);
        assert_eq!(unescape(b"a\\04"), "a\\04");
    }

    #[test]
    fn the_root_is_mounted() {
        assert!(at(Path::new("/")).is_some());
        assert!(at(Path::new("/no/such")).is_none());
    }

    #[test]
    fn canonical_paths() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().canonicalize().unwrap();
        std::fs::create_dir(real.join("d")).unwrap();
        std::os::unix::fs::symlink("d", real.join("link")).unwrap();
        for path in ["d", "d/", "link", "d/.", "d/../d"] {
            assert_eq!(
                canonical(&real.join(path)).unwrap(),
                real.join("d"),
                "{path}"
            );
        }
    }
}
