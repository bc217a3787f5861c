//! A libvirtd of a test's own: a system daemon with a private root, as root, without systemd.
//!
//! libvirtd as root has fixed directories. A mount namespace puts the test's in their place, so that
//! nothing of the host's libvirt is seen or touched, and nothing stays behind. QEMU runs as `nobody`,
//! so directories and images must be passed to it as on a real host.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use super::model::Write;
use super::tools::{DEADLINE, eventually, find, is_root, skip, temp_dir, text};
use super::{Console, image, process};

/// Puts the test's directories in place and becomes libvirtd. A namespace has copies of all mounts, and a
/// copy would keep a test's file system alive after its end. No KVM, which libvirt's probes of QEMU may
/// open and QEMU as nobody may not: it would probe again for every domain, for seconds.
const START: &str = r#"set -e
awk '$3 ~ /^fuse/ { print $2 }' /proc/self/mounts | while read -r mount; do umount -l "$mount"; done
mount --bind "$1/run" /run
mkdir -p /run/libvirt
for place in etc/libvirt var/lib/libvirt var/cache/libvirt var/log/libvirt; do
    mkdir -p "$1/$place" "/$place"
done
mount --bind "$1/etc/libvirt" /etc/libvirt
mount --bind "$1/var/lib/libvirt" /var/lib/libvirt
mount --bind "$1/var/log/libvirt" /var/log/libvirt
mount --bind "$2" /var/cache/libvirt
if [ -e /dev/kvm ]; then
    install -m 0 /dev/null "$1/kvm"
    mount --bind "$1/kvm" /dev/kvm
fi
exec libvirtd -p "$1/libvirtd.pid""#;

const TARGETS: [&str; 3] = ["vda", "vdb", "vdc"];

/// A running libvirtd. Dropped, it is ended with all its domains.
pub struct Libvirtd {
    child: Child,
    dir: tempfile::TempDir,
}

/// The daemon, unless the test has to be skipped.
pub fn libvirtd() -> Option<Libvirtd> {
    libvirtd_after(|_| ())
}

/// The same; `prepare` does what the daemon is to find in its directory, such as a mount.
pub fn libvirtd_after(prepare: impl FnOnce(&Path)) -> Option<Libvirtd> {
    for tool in ["libvirtd", "virsh", "unshare", "qemu-system-x86_64"] {
        super::tool(tool)?;
    }
    if !is_root() {
        skip("libvirtd needs root here");
        return None;
    }
    let dir = temp_dir();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o711)).unwrap();
    let etc = dir.path().join("etc/libvirt");
    fs::create_dir_all(&etc).unwrap();
    fs::create_dir(dir.path().join("run")).unwrap();
    fs::write(
        etc.join("libvirtd.conf"),
        "auth_unix_ro = \"none\"\nauth_unix_rw = \"none\"\nunix_sock_group = \"root\"\n",
    )
    .unwrap();
    fs::write(
        etc.join("qemu.conf"),
        "user = \"nobody\"\ngroup = \"nogroup\"\nsecurity_driver = \"none\"\n\
         stdio_handler = \"file\"\ncgroup_controllers = []\nnamespaces = []\n",
    )
    .unwrap();
    prepare(dir.path());
    let child = start(dir.path());
    let daemon = Libvirtd { child, dir };
    daemon.answers();
    Some(daemon)
}

fn start(dir: &Path) -> Child {
    // What libvirt finds out about QEMU takes it ten seconds, and stays true.
    let cache = std::env::var_os("FLEECEFS_CACHE")
        .map_or_else(
            || Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/.cache"),
            PathBuf::from,
        )
        .join("libvirt");
    fs::create_dir_all(&cache).unwrap();
    let log = File::options()
        .append(true)
        .create(true)
        .open(dir.join("libvirtd.log"))
        .unwrap();
    // unshare and sh exec, so the child's id is libvirtd's.
    Command::new("unshare")
        .args(["--mount", "--propagation", "slave", "sh", "-c", START, "sh"])
        .args([dir, &cache])
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap()
}

impl Libvirtd {
    /// What to say as `-o uri=`.
    pub fn uri(&self) -> String {
        let socket = self.dir.path().join("run/libvirt/libvirt-sock");
        format!("qemu+unix:///system?socket={}", text(&socket))
    }

    /// A directory that QEMU can enter.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Runs virsh: what it printed, or what it complained about.
    pub fn try_virsh(&self, args: &[&str]) -> Result<String, String> {
        let Output {
            status,
            stdout,
            stderr,
        } = Command::new(find("virsh").unwrap())
            .args(["-q", "-c", &self.uri()])
            .args(args)
            .output()
            .unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        match status.success() {
            true => Ok(text(&stdout)),
            false => Err(text(&stderr)),
        }
    }

    /// Runs virsh; it must succeed.
    pub fn virsh(&self, args: &[&str]) -> String {
        self.try_virsh(args)
            .unwrap_or_else(|e| panic!("virsh {args:?}: {e}"))
    }

    /// Defines domain `vm` with qcow2 disks of these sizes, `vda` and so on, and starts it, paused.
    pub fn domain(&self, sizes: &[u64]) {
        self.domain_with(sizes, "");
    }

    /// The same, with more devices.
    pub fn domain_with(&self, sizes: &[u64], devices: &str) {
        let images = TARGETS.iter().zip(sizes).map(|(target, size)| {
            let path = self.image(target);
            image::create(&path, "qcow2", *size, "");
            (*target, path)
        });
        let cdrom =
            "<disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/></disk>";
        self.define(images.collect(), 16, "", &format!("{cdrom}{devices}"));
        self.virsh(&["start", "--paused", "vm"]);
    }

    /// Defines domain `vm`, which boots Linux on so many disks with an empty ext4 of this size, and has a
    /// channel for the guest agent. Starts it: its console. `files` and `append` as for QEMU's builder.
    pub fn linux(&self, files: &Path, append: &str, disks: usize, size: u64) -> Console {
        let images = TARGETS.iter().take(disks).map(|target| {
            let path = self.image(target);
            image::ext4(&path, size);
            (*target, path)
        });
        // Copies, since QEMU as nobody may not get to where they are, and libvirt gives them away.
        let boot = ["vmlinuz", "initrd"].map(|name| {
            let copy = self.dir.path().join(name);
            fs::copy(files.join(name), &copy).unwrap();
            copy
        });
        let socket = self.dir.path().join("console.sock");
        let system = format!(
            "<kernel>{}</kernel><initrd>{}</initrd>\
             <cmdline>console=ttyS0 quiet panic=-1 {append}</cmdline>",
            text(&boot[0]),
            text(&boot[1])
        );
        let devices = format!(
            "<serial type='unix'><source mode='bind' path='{}'/></serial>\
             <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>",
            text(&socket)
        );
        self.define(images.collect(), 192, &system, &devices);
        self.virsh(&["start", "vm"]);
        Console::connect(&socket)
    }

    fn define(&self, images: Vec<(&str, PathBuf)>, mib: u32, system: &str, devices: &str) {
        let disks: String = images
            .iter()
            .map(|(target, path)| {
                format!(
                    "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>\
                     <source file='{}'/><target dev='{target}' bus='virtio'/>\
                     <alias name='ua-{target}'/></disk>",
                    text(path)
                )
            })
            .collect();
        let qemu = find("qemu-system-x86_64").unwrap();
        let document = format!(
            "<domain type='qemu'><name>vm</name><memory unit='MiB'>{mib}</memory><vcpu>1</vcpu>\
             <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>\
             <os><type arch='x86_64' machine='pc'>hvm</type>{system}</os>\
             <features><acpi/></features><cpu mode='maximum'/><on_reboot>destroy</on_reboot><devices>\
             <emulator>{}</emulator>{disks}{devices}\
             <controller type='usb' model='none'/><memballoon model='none'/>\
             </devices></domain>",
            text(&qemu)
        );
        let xml = self.dir.path().join("vm.xml");
        fs::write(&xml, document).unwrap();
        self.virsh(&["define", text(&xml)]);
    }

    /// The image of a disk of `vm`.
    pub fn image(&self, target: &str) -> PathBuf {
        self.dir.path().join(format!("{target}.qcow2"))
    }

    /// A guest's write.
    pub fn write(&self, target: &str, write: Write) {
        self.writes(&[(target, write)]);
    }

    /// A guest's writes, by one virsh: starting it takes longer than they do.
    pub fn writes(&self, writes: &[(&str, Write)]) {
        let mut lines = Vec::new();
        for (target, write) in writes {
            let how = match write.pattern {
                0 => "-z -u".to_owned(),
                pattern => format!("-P {pattern}"),
            };
            lines.push(format!(
                "qemu-monitor-command vm --hmp 'qemu-io -d \
                 /machine/peripheral/ua-{target}/virtio-backend \
                 \"write {how} {} {}\"'",
                write.offset, write.length
            ));
        }
        assert_eq!(self.virsh(&[&lines.join("; ")]).trim(), "", "{writes:?}");
    }

    /// A guest's write of a cluster at so many MiB: its offset and length.
    pub fn cluster(&self, target: &str, at: u64, pattern: u8) -> (u64, u64) {
        let (offset, length) = (at << 20, 65536);
        let write = Write {
            offset,
            length,
            pattern,
        };
        self.write(target, write);
        (offset, length)
    }

    /// New images on top of those that the disks have.
    pub fn snapshot(&self, name: &str) {
        let how = ["--disk-only", "--no-metadata"];
        self.virsh(&[&["snapshot-create-as", "vm", name], &how[..]].concat());
    }

    /// Asks the domain's QEMU.
    pub fn qmp(&self, execute: &str, arguments: Value) -> Value {
        self.qmp_all(&[(execute, arguments)]).remove(0)
    }

    /// Asks it several things, by one virsh.
    pub fn qmp_all(&self, commands: &[(&str, Value)]) -> Vec<Value> {
        let line = |(execute, arguments): &(&str, Value)| {
            let command = json!({"execute": execute, "arguments": arguments});
            format!("qemu-monitor-command vm '{command}'")
        };
        let lines: Vec<String> = commands.iter().map(line).collect();
        let said = self.virsh(&[&lines.join("; ")]);
        let answers = serde_json::Deserializer::from_str(&said).into_iter::<Value>();
        let answer = |answer: serde_json::Result<Value>| {
            let mut answer = answer.unwrap();
            assert!(answer.get("error").is_none(), "{lines:?}: {answer}");
            answer["return"].take()
        };
        answers.map(answer).collect()
    }

    /// Lets a disk be read at 32 MiB a second, so that what copies it is still at it when a test looks.
    /// The guest's writes are not held up.
    pub fn slow(&self, target: &str) {
        let nodes = self.qmp("query-named-block-nodes", json!({"flat": true}));
        let image = self.image(target);
        let named = |driver: &str| {
            let is = |n: &&Value| n["drv"] == driver && n["file"] == text(&image);
            nodes.as_array().unwrap().iter().find(is).unwrap()["node-name"].clone()
        };
        let group = json!({"qom-type": "throttle-group", "id": "slow", "x-bps-read": 32 << 20});
        self.qmp("object-add", group);
        let filter = json!({
            "driver": "throttle", "node-name": "slow", "throttle-group": "slow", "file": named("file"),
        });
        self.qmp("blockdev-add", filter);
        // As libvirt opened it, but for the file.
        let disk = json!({
            "driver": "qcow2", "node-name": named("qcow2"), "file": "slow", "backing": null,
            "read-only": false,
        });
        self.qmp("blockdev-reopen", json!({"options": [disk]}));
    }

    /// Takes that back.
    pub fn fast_again(&self) {
        let limits = json!({"bps-read": 0});
        let what = json!({"path": "/objects/slow", "property": "limits", "value": limits});
        self.qmp("qom-set", what);
    }

    /// The process id of the domain's QEMU.
    pub fn qemu(&self) -> u32 {
        let path = self.dir.path().join("run/libvirt/qemu/vm.pid");
        fs::read_to_string(path).unwrap().trim().parse().unwrap()
    }

    /// Ends the daemon and starts it again; its domains run on.
    pub fn restart(&mut self) {
        process::end(&mut self.child, DEADLINE);
        self.child = start(self.dir.path());
        self.answers();
    }

    fn answers(&self) {
        eventually("libvirtd", DEADLINE, || {
            self.try_virsh(&["version"]).is_ok().then_some(())
        });
    }
}

impl Drop for Libvirtd {
    fn drop(&mut self) {
        process::end(&mut self.child, Duration::from_secs(5));
        // QEMU outlives libvirtd; its process ids are in files, and they name this directory.
        let pids = fs::read_dir(self.dir.path().join("run/libvirt/qemu"));
        for entry in pids.into_iter().flatten().flatten() {
            let is_pid = entry.path().extension().is_some_and(|e| e == "pid");
            let pid = fs::read_to_string(entry.path()).ok();
            if let Some(pid) = pid.filter(|_| is_pid).and_then(|p| p.trim().parse().ok())
                && process::naming(self.dir.path()).iter().any(|p| p.0 == pid)
            {
                process::signal(pid, libc::SIGKILL);
                let gone = || !process::alive(pid);
                let end = std::time::Instant::now() + Duration::from_secs(5);
                while !gone() && std::time::Instant::now() < end {
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
        }
        if std::thread::panicking() {
            let log = fs::read_to_string(self.dir.path().join("libvirtd.log"));
            eprintln!("libvirtd said: {}", log.unwrap_or_default());
        }
    }
}
