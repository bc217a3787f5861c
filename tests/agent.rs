//! Freezing the file systems of a Linux guest by the real qemu-guest-agent, seen from inside: what the
//! guest was told, in which order, and what the frozen disks look like. The same for a QEMU and for a
//! domain of libvirt; each test's body is written once.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use common::mount::Home;
use common::tools::{eventually, need, run, text};
use common::{Console, Fleecefs, Qemu, State, image, tools};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 96 * MIB;
const TARGETS: [&str; 2] = ["vda", "vdb"];

/// For whatever a guest under emulation does on a busy machine.
const LONG: Duration = Duration::from_secs(120);

/// A guest that boots with the writer at work, and is mounted one way or the other.
trait Guest {
    fn console(&mut self) -> &mut Console;

    /// Mounts it with these options.
    fn mount(&self, options: &[&str]) -> Fleecefs {
        self.mount_in(Home::new(), options)
    }

    /// The same in the directories of an earlier mount.
    fn mount_in(&self, home: Home, options: &[&str]) -> Fleecefs;

    /// Somebody else tells the agent to `freeze` or to `thaw`.
    fn others(&self, word: &str);

    /// What is left of backups and checkpoints, in words.
    fn left(&self) -> Vec<String>;

    /// What the agent was told so far: `freeze` and `thaw`.
    fn told(&mut self) -> Vec<String> {
        let mut said = self.console().tell("sh cat /tmp/agent 2>/dev/null; true");
        said.retain(|line| line == "freeze" || line == "thaw");
        said
    }

    /// The writer is at work.
    fn goes_on(&mut self) {
        self.console().rounds_more(3, LONG);
    }
}

/// A QEMU.
struct Direct {
    qemu: Qemu,
    agent: PathBuf,
    before: State,
    _dir: tempfile::TempDir,
}

fn direct() -> Option<Direct> {
    tools::fuse()?;
    let files = common::qemu::linux()?;
    let dir = tools::temp_dir();
    let agent = dir.path().join("agent.sock");
    let channel = format!(
        "-device virtio-serial-pci -chardev socket,id=agent,path={},server=on,wait=off \
         -device virtserialport,chardev=agent,name=org.qemu.guest_agent.0",
        text(&agent)
    );
    let mut build = Qemu::build().linux(&files, "fleece=writer");
    for target in TARGETS {
        let path = dir.path().join(format!("{target}.qcow2"));
        image::ext4(&path, SIZE);
        build = build.disk(target, &path, "qcow2");
    }
    let words: Vec<&str> = channel.split(' ').collect();
    let mut qemu = build.args(&words).start();
    qemu.console().ready();
    Some(Direct {
        before: qemu.state(),
        qemu,
        agent,
        _dir: dir,
    })
}

impl Guest for Direct {
    fn console(&mut self) -> &mut Console {
        self.qemu.console()
    }

    fn mount_in(&self, home: Home, options: &[&str]) -> Fleecefs {
        let mut mount = Fleecefs::qmp(&self.qemu.socket()).home(home);
        if options.contains(&"quiesce") {
            mount = mount.option(&format!("guest-agent={}", text(&self.agent)));
        }
        options.iter().fold(mount, |m, o| m.option(o)).mount()
    }

    fn others(&self, word: &str) {
        let mut agent = UnixStream::connect(&self.agent).unwrap();
        agent.set_read_timeout(Some(LONG)).unwrap();
        writeln!(agent, "{{\"execute\": \"guest-fsfreeze-{word}\"}}").unwrap();
        let mut answer = String::new();
        BufReader::new(agent).read_line(&mut answer).unwrap();
        assert!(answer.contains("\"return\": 2"), "{answer}");
    }

    fn left(&self) -> Vec<String> {
        let now = self.qemu.state();
        let new = now.0.into_iter().filter(|l| !self.before.0.contains(l));
        new.collect()
    }
}

/// A domain of libvirt.
#[cfg(feature = "libvirt")]
struct Managed {
    console: Console,
    libvirtd: common::libvirtd::Libvirtd,
}

#[cfg(feature = "libvirt")]
fn managed() -> Option<Managed> {
    tools::fuse()?;
    let files = common::qemu::linux()?;
    let libvirtd = common::libvirtd::libvirtd()?;
    let mut console = libvirtd.linux(&files, "fleece=writer", TARGETS.len(), SIZE);
    console.ready();
    Some(Managed { console, libvirtd })
}

#[cfg(feature = "libvirt")]
impl Guest for Managed {
    fn console(&mut self) -> &mut Console {
        &mut self.console
    }

    fn mount_in(&self, home: Home, options: &[&str]) -> Fleecefs {
        let mount = Fleecefs::libvirt(&self.libvirtd.uri()).home(home);
        options.iter().fold(mount, |m, o| m.option(o)).mount()
    }

    fn others(&self, word: &str) {
        self.libvirtd.virsh(&[&format!("domfs{word}"), "vm"]);
    }

    fn left(&self) -> Vec<String> {
        let listed = self.libvirtd.virsh(&["checkpoint-list", "--name", "vm"]);
        let mut left: Vec<_> = listed.split_whitespace().map(str::to_owned).collect();
        left.extend(self.libvirtd.try_virsh(&["backup-dumpxml", "vm"]).ok());
        left
    }
}

/// A frozen ext4 has written out its journal, and one that is in use is marked as one that has not.
fn needs_recovery(raw: &Path) -> bool {
    let features = run("dumpe2fs", &["-h", text(raw)]);
    features
        .lines()
        .find(|l| l.starts_with("Filesystem features:"))
        .unwrap()
        .contains("needs_recovery")
}

/// Nothing is wrong with it as it is. Returns the round that it holds.
fn check_without_replay(raw: &Path) -> u64 {
    let check = Command::new("e2fsck").arg("-fn").arg(raw).output().unwrap();
    assert!(
        check.status.success(),
        "{}",
        String::from_utf8_lossy(&check.stdout)
    );
    let round = run("debugfs", &["-R", "cat /round", text(raw)]);
    round.trim().parse().unwrap()
}

fn raws(mount: &Fleecefs, backup: &str) -> [PathBuf; 2] {
    TARGETS.map(|t| mount.path(&format!("backups/{backup}/raw/{t}.raw")))
}

/// A backup is of file systems as after a sync if they were frozen, and not otherwise; and the guest
/// was frozen once, and then thawed.
fn a_quiesced_backup_is_clean(guest: &mut dyn Guest) {
    let mount = guest.mount(&["quiesce"]);
    guest.goes_on();
    let seen = guest.console().round();
    mount.mkdir("backups/clean").unwrap();
    assert_eq!(guest.told(), ["freeze", "thaw"]);
    guest.goes_on();
    let raws_of_clean = raws(&mount, "clean");
    for raw in &raws_of_clean {
        assert!(!needs_recovery(raw), "{raw:?}");
    }
    let rounds = raws_of_clean.map(|raw| check_without_replay(&raw));
    assert!(rounds[0] >= seen, "{rounds:?}, {seen} were flushed before");
    assert!(
        rounds[0] == rounds[1] || rounds[0] == rounds[1] + 1,
        "{rounds:?}"
    );
    mount.rmdir("backups/clean").unwrap();
    mount.umount().assert_clean();

    let mount = guest.mount(&[]);
    mount.mkdir("backups/torn").unwrap();
    for raw in raws(&mount, "torn") {
        assert!(needs_recovery(&raw), "{raw:?}");
    }
    mount.umount().assert_clean();
    assert_eq!(guest.told(), ["freeze", "thaw"]);
    guest.goes_on();
}

/// The guest refuses: so does `mkdir`, and everything is as it was.
fn a_freeze_that_the_guest_refuses(guest: &mut dyn Guest) {
    let mount = guest.mount(&["quiesce"]);
    guest.console().tell("sh touch /tmp/refuse");
    let refused = mount.mkdir("backups/b").unwrap_err();
    let why = mount.last_error();
    assert_eq!(refused.raw_os_error(), Some(libc::EIO), "{why}");
    assert!(why.contains("freeze"), "{why}");
    assert!(why.contains("fsfreeze hook has failed"), "{why}");
    assert_eq!(mount.list("backups"), [] as [&str; 0]);
    assert_eq!(mount.list("checkpoints"), [] as [&str; 0]);
    assert_eq!(guest.left(), [] as [&str; 0]);
    guest.goes_on();
    guest.console().tell("sh rm /tmp/refuse");
    mount.mkdir("backups/b").unwrap();
    // The hook is told of a thaw also where the freeze failed: it may have done a part.
    assert_eq!(guest.told(), ["freeze", "thaw", "freeze", "thaw"]);
    mount.umount().assert_clean();
}

/// Whoever froze the guest relies on it, and thaws it.
fn what_others_froze_stays_frozen(guest: &mut dyn Guest) {
    let mount = guest.mount(&["quiesce"]);
    guest.others("freeze");
    let refused = mount.mkdir("backups/b").unwrap_err();
    let why = mount.last_error();
    assert_eq!(refused.raw_os_error(), Some(libc::EBUSY), "{why}");
    assert_eq!(guest.told(), ["freeze"]);
    assert_eq!(guest.left(), [] as [&str; 0]);
    guest.others("thaw");
    guest.goes_on();
    mount.mkdir("backups/b").unwrap();
    assert_eq!(guest.told(), ["freeze", "thaw", "freeze", "thaw"]);
    mount.umount().assert_clean();
}

/// The guest hangs in the freeze for longer than anyone waits. When it comes to itself, it is thawed.
/// `meanwhile` is what else the mount has to do while it hangs.
fn a_freeze_that_hangs(guest: &mut dyn Guest, mount: Fleecefs, meanwhile: impl FnOnce(&Fleecefs)) {
    guest.console().tell("sh touch /tmp/hang; rm -f /tmp/agent");
    std::thread::scope(|scope| {
        let hung = scope.spawn(|| mount.mkdir("backups/hung"));
        guest.console().wait("fleece: agent freeze", LONG);
        meanwhile(&mount);
        assert!(!hung.is_finished(), "it was to hang all the while");
        let late = hung.join().unwrap().unwrap_err();
        let why = mount.last_error();
        assert_eq!(late.raw_os_error(), Some(libc::ETIMEDOUT), "{why}");
        assert!(why.contains("freeze") || why.contains("agent"), "{why}");
    });
    // It still hangs, which is nothing to those who want no freeze.
    eventually("a checkpoint", LONG, || mount.mkdir("checkpoints/y").ok());
    assert_eq!(guest.told(), ["freeze"]);
    mount.rmdir("checkpoints/y").unwrap();

    guest.console().tell("sh rm /tmp/hang");
    guest.console().wait("fleece: agent thaw", LONG);
    guest.goes_on();
    let told = guest.told();
    assert_eq!(told[..2], ["freeze", "thaw"], "{told:?}");
    assert!(told[2..].iter().all(|t| t == "thaw"), "{told:?}");
    eventually("a backup", LONG, || mount.mkdir("backups/next").ok());
    for raw in raws(&mount, "next") {
        assert!(!needs_recovery(&raw), "{raw:?}");
    }
    guest.goes_on();
    mount.umount().assert_clean();
    let left = guest.left();
    assert!(!left.iter().any(|l| l.contains("hung")), "{left:?}");
}

/// How a fleecefs ends that has asked the guest to freeze.
#[derive(Clone, Copy)]
enum End {
    Killed,
    Told,
    /// By its user, who has waited for the freeze long enough.
    Unmounted,
}

/// A fleecefs that ends between freeze and thaw leaves a guest that hangs, or will. The next one thaws it,
/// also one that has no wish to freeze anything.
fn the_next_mount_thaws(guest: &mut dyn Guest, end: End) {
    let mount = guest.mount(&["quiesce"]);
    guest.console().tell("sh touch /tmp/hang");
    let begun = mount.path("backups/b");
    let home = std::thread::scope(|scope| {
        let begin = scope.spawn(move || std::fs::create_dir(begun));
        guest.console().wait("fleece: agent freeze", LONG);
        let refused = || begin.join().unwrap().unwrap_err();
        match end {
            End::Killed => {
                let home = mount.sigkill();
                refused();
                home
            }
            End::Told => {
                let home = mount.sigterm();
                refused();
                home
            }
            End::Unmounted => {
                assert_eq!(refused().raw_os_error(), Some(libc::ETIMEDOUT));
                mount.umount()
            }
        }
    });
    guest.console().tell("sh rm /tmp/hang");
    let mount = guest.mount_in(home, &[]);
    guest.console().wait("fleece: agent thaw", LONG);
    guest.goes_on();
    let told = guest.told();
    assert_eq!(told[..2], ["freeze", "thaw"], "{told:?}");
    mount.umount().assert_clean();
    assert_eq!(guest.left(), [] as [&str; 0]);
}

#[test]
fn qemu_thawed_after_a_kill() {
    need!("qemu-system-x86_64", "qemu-img", "mkfs.ext4", "dumpe2fs");
    let Some(mut guest) = direct() else { return };
    the_next_mount_thaws(&mut guest, End::Killed);
}

#[cfg(feature = "libvirt")]
#[test]
fn libvirt_thawed_after_a_kill() {
    need!("mkfs.ext4", "dumpe2fs");
    let Some(mut guest) = managed() else { return };
    the_next_mount_thaws(&mut guest, End::Killed);
}

#[test]
fn qemu_thawed_after_a_signal() {
    need!("qemu-system-x86_64", "qemu-img", "mkfs.ext4", "dumpe2fs");
    let Some(mut guest) = direct() else { return };
    the_next_mount_thaws(&mut guest, End::Told);
}

#[cfg(feature = "libvirt")]
#[test]
fn libvirt_thawed_after_a_signal() {
    need!("mkfs.ext4", "dumpe2fs");
    let Some(mut guest) = managed() else { return };
    the_next_mount_thaws(&mut guest, End::Told);
}

#[test]
fn qemu_thawed_after_an_unmount() {
    need!("qemu-system-x86_64", "qemu-img", "mkfs.ext4", "dumpe2fs");
    let Some(mut guest) = direct() else { return };
    the_next_mount_thaws(&mut guest, End::Unmounted);
}

#[cfg(feature = "libvirt")]
#[test]
fn libvirt_thawed_after_an_unmount() {
    need!("mkfs.ext4", "dumpe2fs");
    let Some(mut guest) = managed() else { return };
    the_next_mount_thaws(&mut guest, End::Unmounted);
}

#[test]
fn qemu_a_quiesced_backup_is_clean() {
    need!("qemu-system-x86_64", "qemu-img", "mkfs.ext4", "dumpe2fs");
    let Some(mut guest) = direct() else { return };
    a_quiesced_backup_is_clean(&mut guest);
}

#[test]
fn qemu_a_freeze_that_the_guest_refuses() {
    need!("qemu-system-x86_64", "qemu-img", "mkfs.ext4", "dumpe2fs");
    let Some(mut guest) = direct() else { return };
    a_freeze_that_the_guest_refuses(&mut guest);
}

#[test]
fn qemu_what_others_froze_stays_frozen() {
    need!("qemu-system-x86_64", "qemu-img", "mkfs.ext4", "dumpe2fs");
    let Some(mut guest) = direct() else { return };
    what_others_froze_stays_frozen(&mut guest);
}

#[test]
fn qemu_a_freeze_that_hangs() {
    need!("qemu-system-x86_64", "qemu-img", "mkfs.ext4", "dumpe2fs");
    let Some(mut guest) = direct() else { return };
    let mount = guest.mount(&["quiesce"]);
    mount.mkdir("backups/before").unwrap();
    // Who reads another backup is not held up.
    a_freeze_that_hangs(&mut guest, mount, |mount| {
        let read = std::fs::read(&raws(mount, "before")[0]).unwrap();
        assert_eq!(read.len() as u64, SIZE);
    });
}

#[cfg(feature = "libvirt")]
#[test]
fn libvirt_a_quiesced_backup_is_clean() {
    need!("mkfs.ext4", "dumpe2fs");
    let Some(mut guest) = managed() else { return };
    a_quiesced_backup_is_clean(&mut guest);
}

#[cfg(feature = "libvirt")]
#[test]
fn libvirt_a_freeze_that_the_guest_refuses() {
    need!("mkfs.ext4", "dumpe2fs");
    let Some(mut guest) = managed() else { return };
    a_freeze_that_the_guest_refuses(&mut guest);
}

#[cfg(feature = "libvirt")]
#[test]
fn libvirt_what_others_froze_stays_frozen() {
    need!("mkfs.ext4", "dumpe2fs");
    let Some(mut guest) = managed() else { return };
    what_others_froze_stays_frozen(&mut guest);
}

#[cfg(feature = "libvirt")]
#[test]
fn libvirt_a_freeze_that_hangs() {
    need!("mkfs.ext4", "dumpe2fs");
    let Some(mut guest) = managed() else { return };
    let mount = guest.mount(&["quiesce"]);
    a_freeze_that_hangs(&mut guest, mount, |_| ());
}
