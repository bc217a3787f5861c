//! A private directory for sockets, and what killed processes left beside it.
//!
//! Each mount makes `RUNTIME/<id>`, which is its own, and in it `nbd/`, mode 0700, which is QEMU's
//! user's: so QEMU and root can enter and nobody else, and QEMU gives its NBD socket mode 0777 minus
//! its umask. The rest is not QEMU's to write: a guest that has broken out of it finds no file there
//! whose place a symbolic link could take, and no list of files to be removed. The directory's lock is
//! held as long as the process lives; a directory whose lock is free belongs to a dead one.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::hash::{BuildHasher, Hasher};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::model::{Error, Kind, Result};

/// `sun_path` holds 108 bytes with the final zero.
const SOCKET_PATH_MAX: usize = 107;

/// The part of it that is QEMU's.
const SOCKETS: &str = "nbd";

/// Names the files that push backups were writing.
const TARGETS: &str = "push-targets";

/// Names what libvirt's push job writes to.
const JOB: &str = "push-job";

/// Names the guest whose file systems are being frozen.
const FROZEN: &str = "frozen";

/// A file that was being written.
#[derive(Debug, Serialize, Deserialize)]
struct Note {
    dev: u64,
    ino: u64,
    path: PathBuf,
}

/// A live process' directory; removed when dropped.
#[derive(Debug)]
pub(crate) struct RunDir {
    path: PathBuf,
    id: String,
    targets: Mutex<Vec<Note>>,
    /// Something is left to do that it tells of.
    stays: AtomicBool,
    _lock: File,
}

impl RunDir {
    /// Makes a new one below `parent`.
    pub(crate) fn create(parent: &Path) -> Result<Self> {
        let failed = |e: io::Error| {
            Error::new(
                Kind::Io,
                format!(
                    "cannot make a directory for sockets in {}: {e}",
                    parent.display()
                ),
            )
            .hint("choose another with -o runtime=DIR")
        };
        make_passable(parent).map_err(failed)?;
        let id = random_id();
        let path = parent.join(&id);
        let private = |path: &Path| DirBuilder::new().mode(0o700).create(path);
        private(&path).map_err(failed)?;
        private(&path.join(SOCKETS)).map_err(failed)?;
        let lock = OpenOptions::new()
            .create_new(true)
            .write(true)
            .mode(0o600)
            .open(path.join("lock"))
            .and_then(|lock| match lock.try_lock() {
                Ok(()) => Ok(lock),
                Err(e) => Err(e.into()),
            })
            .map_err(failed)?;
        let dir = Self {
            path,
            id,
            targets: Mutex::default(),
            stays: AtomicBool::new(false),
            _lock: lock,
        };
        // The longest name of a socket in it.
        let socket = dir.socket();
        if socket.as_os_str().len() > SOCKET_PATH_MAX {
            return Err(Error::new(
                Kind::Invalid,
                format!(
                    "{} is too long for a socket: {SOCKET_PATH_MAX} bytes at most",
                    socket.display()
                ),
            )
            .hint("choose a shorter directory with -o runtime=DIR"));
        }
        Ok(dir)
    }

    /// Six hexadecimal digits, unlike those of any other live mount.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Where QEMU's NBD server is to listen.
    pub(crate) fn socket(&self) -> PathBuf {
        self.path.join(SOCKETS).join("sock")
    }

    /// Gives the sockets' directory to QEMU's user, whose group may pass through to it.
    pub(crate) fn give_to(&self, uid: u32, gid: u32) -> Result<()> {
        let sockets = self.path.join(SOCKETS);
        let open = |path: &Path| File::open(path).map_err(|e| cannot_give(path, uid, &e));
        let own = open(&self.path)?;
        if give_to(&open(&sockets)?, &sockets, uid, gid)? {
            fchown(&own, None, Some(gid))
                .and_then(|()| own.set_permissions(fs::Permissions::from_mode(0o710)))
                .map_err(|e| cannot_give(&self.path, uid, &e))?;
        }
        Ok(())
    }

    /// Notes that the NBD server of the QEMU with this process id is ours to stop.
    pub(crate) fn note_server(&self, pid: i32) {
        // Without the note a killed fleecefs leaves a server behind; no reason to fail now.
        if let Err(e) = fs::write(self.path.join("nbd-server"), pid.to_string()) {
            log::warn!("cannot note the NBD server in {}: {e}", self.path.display());
        }
    }

    pub(crate) fn forget_server(&self) {
        let _ = fs::remove_file(self.path.join("nbd-server"));
        let _ = fs::remove_file(self.socket());
    }

    /// Notes that a file was made for a push backup, and is none yet.
    pub(crate) fn note_target(&self, target: &Path) -> io::Result<()> {
        let meta = fs::metadata(target)?;
        let note = Note {
            dev: meta.dev(),
            ino: meta.ino(),
            path: target.to_owned(),
        };
        let mut targets = self.targets.lock();
        targets.push(note);
        self.write_targets(&targets)
    }

    /// The file became a backup, or was removed.
    pub(crate) fn forget_target(&self, target: &Path) {
        let mut targets = self.targets.lock();
        targets.retain(|t| t.path != target);
        if let Err(e) = self.write_targets(&targets) {
            log::warn!("{}: {e}", self.path.display());
        }
    }

    /// Notes that the file systems of a guest are being frozen, and by whom they can be thawed. A guest
    /// that stays frozen hangs.
    pub(crate) fn note_frozen(&self, by: &str) -> Result<()> {
        let path = self.frozen_note();
        fs::write(&path, by)
            .map_err(|e| Error::new(Kind::Io, format!("cannot write {}: {e}", path.display())))
    }

    /// What to remove when they are thawed.
    pub(crate) fn frozen_note(&self) -> PathBuf {
        self.path.join(FROZEN)
    }

    /// Notes what a job writes to that libvirt knows by nothing else.
    #[cfg(feature = "libvirt")]
    pub(crate) fn note_job(&self, domain: &str, targets: &[PathBuf]) {
        // Without the note a killed fleecefs leaves a job behind, which comes to its end by itself.
        let noted = serde_json::to_vec(&(domain, targets)).map_err(io::Error::from);
        if let Err(e) = noted.and_then(|note| fs::write(self.path.join(JOB), note)) {
            log::warn!("cannot note a job in {}: {e}", self.path.display());
        }
    }

    #[cfg(feature = "libvirt")]
    pub(crate) fn forget_job(&self) {
        let _ = fs::remove_file(self.path.join(JOB));
    }

    fn write_targets(&self, targets: &[Note]) -> io::Result<()> {
        fs::write(self.path.join(TARGETS), serde_json::to_vec(targets)?)
    }

    /// It stays, with a guest's name in it that may be frozen, for the next fleecefs to thaw: nobody of
    /// this one can any more. Nothing if none is.
    pub(crate) fn leave_what_is_frozen(&self) {
        if self.frozen_note().exists() {
            log::error!(
                "the guest's file systems may still be frozen, or will be when its agent comes to it: \
                 mount the domain again, which thaws it"
            );
            self.stays.store(true, Ordering::Release);
        }
    }

    /// Removes it with all that is in it, unless it is to stay. Does nothing the second time.
    pub(crate) fn remove(&self) {
        if self.stays.load(Ordering::Acquire) {
            return;
        }
        if let Err(e) = fs::remove_dir_all(&self.path)
            && e.kind() != ErrorKind::NotFound
        {
            log::warn!("cannot remove {}: {e}", self.path.display());
        }
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        self.remove();
    }
}

/// The directories of dead processes below `parent`.
pub(crate) fn dead(parent: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    let paths = entries.map(|e| e.path());
    paths.filter(|p| is_ours(p) && is_dead(p)).collect()
}

/// Whether the process with this id is dead, as far as `parent` tells.
pub(crate) fn is_dead_id(parent: &Path, id: &str) -> bool {
    let path = parent.join(id);
    !is_ours(&path) || is_dead(&path)
}

/// Whether it is such a directory, made by this user. There may be anything beside it, if `runtime=` is
/// a place that others use too, and what is dead is removed with all that it names.
fn is_ours(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().as_encoded_bytes();
    let user = rustix::process::geteuid().as_raw();
    name.len() == 6
        && name.iter().all(u8::is_ascii_hexdigit)
        && fs::symlink_metadata(path).is_ok_and(|m| m.is_dir() && m.uid() == user)
}

fn is_dead(path: &Path) -> bool {
    // No lock file: made this moment.
    let lock = OpenOptions::new().write(true).open(path.join("lock"));
    lock.is_ok_and(|lock| lock.try_lock().is_ok())
}

/// The process id in a note such as `nbd-server`.
pub(crate) fn noted_pid(dir: &Path, name: &str) -> Option<i32> {
    fs::read_to_string(dir.join(name)).ok()?.trim().parse().ok()
}

/// By whom a guest can be thawed that a dead process may have left frozen.
pub(crate) fn noted_frozen(dir: &Path) -> Option<String> {
    fs::read_to_string(dir.join(FROZEN)).ok()
}

/// The domain of a dead process' job in libvirt, and what that writes to.
pub(crate) fn noted_job(dir: &Path) -> Option<(String, Vec<PathBuf>)> {
    serde_json::from_slice(&fs::read(dir.join(JOB)).ok()?).ok()
}

/// Removes what a dead process' push backups had written so far, lest it be taken for a backup. A file
/// that is another one by now is left alone.
pub(crate) fn remove_targets(dir: &Path) {
    let notes = fs::read(dir.join(TARGETS)).unwrap_or_default();
    let notes: Vec<Note> = serde_json::from_slice(&notes).unwrap_or_default();
    for note in notes {
        let same = |m: fs::Metadata| (m.dev(), m.ino()) == (note.dev, note.ino);
        if fs::metadata(&note.path).is_ok_and(same) {
            let path = note.path.display();
            log::warn!("removing {path}, a backup that a killed fleecefs left unfinished");
            let _ = fs::remove_file(&note.path);
        }
    }
}

/// Whether a process is there and not over. One that ended stays in /proc as a zombie until its parent
/// takes note, and the parent of what a killed fleecefs started is whoever adopts orphans here, in its
/// own time.
pub(crate) fn is_running(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The state follows the command's name, which may hold anything, in parentheses.
    let state = stat
        .rsplit_once(") ")
        .and_then(|(_, rest)| rest.chars().next());
    state.is_some_and(|state| !matches!(state, 'Z' | 'X'))
}

/// Makes a directory, and its parents, that all may pass through and only its owner may list; one that
/// is there already stays as it is.
pub fn make_passable(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        make_passable(parent)?;
    }
    match DirBuilder::new().mode(0o711).create(path) {
        Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(()),
        // The umask may have taken the others' right to pass.
        Ok(()) => fs::set_permissions(path, fs::Permissions::from_mode(0o711)),
        Err(e) => Err(e),
    }
}

/// Makes the file at `path` QEMU's own, unless it is; whether that was to be done. Only root can give
/// things away. By its descriptor: another user's directory may hold something else under the name by
/// now.
pub(crate) fn give_to(file: &File, path: &Path, uid: u32, gid: u32) -> Result<bool> {
    let failed = |e| cannot_give(path, uid, &e);
    if file.metadata().map_err(failed)?.uid() == uid {
        return Ok(false);
    }
    fchown(file, Some(uid), Some(gid)).map_err(failed)?;
    Ok(true)
}

fn cannot_give(path: &Path, uid: u32, error: &io::Error) -> Error {
    Error::new(
        Kind::NotPermitted,
        format!(
            "QEMU runs as user {uid}, and {} cannot be given to it: {error}",
            path.display()
        ),
    )
    .hint("run fleecefs as root, or as QEMU's user")
}

fn random_id() -> String {
    // The standard library seeds this from the system's random numbers.
    let random = std::hash::RandomState::new().build_hasher().finish();
    format!("{:06x}", random & 0xff_ffff)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dead_are_told_from_the_living() {
        let parent = tempfile::tempdir().unwrap();
        let alive = RunDir::create(parent.path()).unwrap();
        let killed = RunDir::create(parent.path()).unwrap();
        let path = killed.path.clone();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
        drop(File::open(path.join("lock")).unwrap());
        let RunDir { _lock, .. } = &killed;
        _lock.unlock().unwrap(); // what the kernel does for a killed process
        // What only looks like one: of another name, by a link, of another user.
        let [named, link, owned] = ["foreign", "abcdef", "fedcba"].map(|n| parent.path().join(n));
        for path in [&named, &owned] {
            fs::create_dir(path).unwrap();
            fs::write(path.join("lock"), "").unwrap();
        }
        std::os::unix::fs::symlink(&named, &link).unwrap();
        if std::os::unix::fs::chown(&owned, Some(65534), None).is_err() {
            fs::remove_dir_all(&owned).unwrap(); // Only root can give things away.
        }
        assert_eq!(dead(parent.path()), [path]);
        assert!(!is_dead_id(parent.path(), alive.id()));
        let path = alive.path.clone();
        drop(alive);
        assert!(!path.exists());
    }

    #[test]
    fn a_process_that_ended_is_not_running_though_its_parent_did_not_look() {
        assert!(is_running(std::process::id() as i32));
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id() as i32;
        let end = std::time::Instant::now() + std::time::Duration::from_secs(30);
        while is_running(pid) && std::time::Instant::now() < end {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert!(Path::new(&format!("/proc/{pid}")).exists(), "a zombie");
        assert!(!is_running(pid));
        child.wait().unwrap();
        assert!(!is_running(pid));
    }

    #[test]
    fn what_is_given_away_is_the_file_that_was_made() {
        let dir = tempfile::tempdir().unwrap();
        let [made, other] = ["made", "other"].map(|name| dir.path().join(name));
        let file = File::create(&made).unwrap();
        fs::write(&other, "").unwrap();
        let own = file.metadata().unwrap().uid();
        if own != 0 {
            return; // Only root can give things away.
        }
        fs::remove_file(&made).unwrap();
        std::os::unix::fs::symlink(&other, &made).unwrap();
        assert!(give_to(&file, &made, 65534, 65534).unwrap());
        assert_eq!(file.metadata().unwrap().uid(), 65534);
        assert_eq!(fs::metadata(&other).unwrap().uid(), own);
        assert!(!give_to(&file, &made, 65534, 65534).unwrap(), "it is");
    }

    #[test]
    fn a_path_too_long_for_a_socket_is_refused() {
        let parent = tempfile::tempdir().unwrap();
        let long = parent.path().join("x".repeat(100));
        let error = RunDir::create(&long).unwrap_err();
        assert_eq!(error.kind(), Kind::Invalid);
        assert_eq!(fs::read_dir(&long).unwrap().count(), 0);
    }
}
