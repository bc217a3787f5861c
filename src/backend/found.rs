//! What can be mounted on this host: domains of libvirt, and QMP sockets where people put them.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::model::Result;

/// Directories in which QMP sockets are usually made; Proxmox VE's is the last.
const PLACES: [&str; 3] = ["/run", "/run/qemu", "/run/qemu-server"];

/// How their names end.
const ENDINGS: [&str; 3] = ["qmp", "fleece", "qmp.sock"];

/// Something that can be mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The word for `fleecefs mount`.
    pub source: String,
    /// How it stands, in a word.
    pub state: &'static str,
}

/// Domains of libvirt at `uri`.
pub fn domains(uri: &str, timeout: Duration) -> Result<Vec<Found>> {
    #[cfg(feature = "libvirt")]
    let found = super::libvirt::list(uri, timeout)?;
    #[cfg(not(feature = "libvirt"))]
    let found: Vec<(String, bool)> = {
        let _ = (uri, timeout);
        Vec::new()
    };
    let found = found.into_iter().map(|(name, active)| Found {
        source: format!("libvirt:{name}"),
        state: if active { "running" } else { "shut off" },
    });
    Ok(found.collect())
}

/// QMP sockets. None is connected to, since a monitor has one client at a time; so there may be nobody
/// at the other end. `more` is one more directory to look in.
pub fn sockets(more: Option<&Path>) -> Vec<Found> {
    let places = PLACES.map(PathBuf::from).into_iter();
    let mut paths: Vec<PathBuf> = places
        .chain(more.map(Path::to_owned))
        .flat_map(|dir| fs::read_dir(dir).into_iter().flatten().flatten())
        .filter(|entry| entry.file_type().is_ok_and(|t| t.is_socket()))
        .map(|entry| entry.path())
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            ENDINGS.iter().any(|ending| {
                let stem = name.strip_suffix(ending);
                stem.is_some_and(|stem| stem.is_empty() || stem.ends_with(['.', '-']))
            })
        })
        .collect();
    paths.sort();
    paths.dedup();
    let found = paths.into_iter().map(|path| Found {
        source: format!("qmp:{}", path.display()),
        state: "socket",
    });
    found.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn sockets_by_their_names() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let _listeners = ["vm.qmp", "vm.fleece", "vm-qmp.sock", "vm.sock", "xqmp"]
            .map(|name| UnixListener::bind(at(name)).unwrap());
        fs::write(at("file.qmp"), "").unwrap();
        let found = sockets(Some(dir.path()));
        let ours: Vec<&str> = found
            .iter()
            .filter_map(|f| {
                f.source
                    .strip_prefix(&format!("qmp:{}/", dir.path().display()))
            })
            .collect();
        assert_eq!(ours, ["vm-qmp.sock", "vm.fleece", "vm.qmp"]);
    }
}
