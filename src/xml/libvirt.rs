//! What libvirt answers: taken from its documents is what is needed here, and all else passes by,
//! since every release of libvirt adds to them.

use super::error::Error;
use super::tree::{self, Element};
use crate::model::Mode;

/// What is needed of a `<domain>` that libvirt describes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LiveDomain {
    /// The disks: no CD-ROM, no floppy, nothing read-only, no empty drive.
    pub disks: Vec<LiveDisk>,
    /// The user and group as whom QEMU runs, where libvirt says.
    pub owner: Option<(u32, u32)>,
    /// libvirt does not give files to them: whoever makes one does.
    pub keeps_owners: bool,
}

/// A disk of a [`LiveDomain`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveDisk {
    /// The disk target.
    pub target: String,
    /// The format of its image, in QEMU's words.
    pub format: String,
    /// The image, where it is a file or a block device.
    pub file: Option<String>,
    /// The files of the images below it, top first, as far as libvirt says.
    pub backing: Vec<String>,
}

impl LiveDomain {
    /// Reads a `<domain>`.
    pub fn read(bytes: &[u8]) -> Result<Self, Error> {
        let source = tree::source(bytes)?;
        Ok(Self::of(&tree::parse(&source)?))
    }

    /// The domain as it was when the checkpoint was made that a `<domaincheckpoint>` describes.
    pub fn of_checkpoint(bytes: &[u8]) -> Result<Self, Error> {
        let source = tree::source(bytes)?;
        let root = tree::parse(&source)?;
        Ok(child(&root, "domain").map(Self::of).unwrap_or_default())
    }

    fn of(root: &Element<'_>) -> Self {
        let devices = root.children.iter().filter(|c| c.name == "devices");
        let disks = devices.flat_map(|d| &d.children).filter_map(disk);
        let labels = root.children.iter().filter(|c| c.name == "seclabel");
        let dac: Vec<_> = labels
            .filter(|l| attribute(l, "model") == Some("dac"))
            .collect();
        let mut owners = dac.iter().filter_map(|l| child(l, "label"));
        Self {
            disks: disks.collect(),
            owner: owners.find_map(owner),
            keeps_owners: dac.iter().any(|l| attribute(l, "relabel") == Some("no")),
        }
    }
}

/// What a backup that runs in libvirt looks like from outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveBackup {
    /// Who copies.
    pub mode: Mode,
    /// The UNIX socket on which a pull backup is served, if that is what it is served on.
    pub socket: Option<String>,
    /// What a push backup is written to, in the order of the document.
    pub targets: Vec<String>,
    /// The disk targets that take part.
    pub disks: Vec<String>,
}

impl LiveBackup {
    /// Reads a `<domainbackup>`.
    pub fn read(bytes: &[u8]) -> Result<Self, Error> {
        let source = tree::source(bytes)?;
        let root = tree::parse(&source)?;
        let server = child(&root, "server");
        let disks = child(&root, "disks").map_or(&[][..], |d| &d.children);
        let targets = disks.iter().filter_map(|disk| child(disk, "target"));
        let path = |t| attribute(t, "file").or_else(|| attribute(t, "dev"));
        let taking_part = disks
            .iter()
            .filter(|d| attribute(d, "backup") != Some("no"));
        let taking_part = taking_part.filter_map(|d| attribute(d, "name"));
        Ok(Self {
            mode: match attribute(&root, "mode") {
                Some("pull") => Mode::Pull,
                _ => Mode::Push,
            },
            socket: server
                .and_then(|s| attribute(s, "socket"))
                .map(str::to_owned),
            targets: targets.filter_map(path).map(str::to_owned).collect(),
            disks: taking_part.map(str::to_owned).collect(),
        })
    }
}

fn disk(element: &Element<'_>) -> Option<LiveDisk> {
    let kind = attribute(element, "device").unwrap_or("disk");
    if element.name != "disk"
        || !matches!(kind, "disk" | "lun")
        || child(element, "readonly").is_some()
    {
        return None;
    }
    let file = file_of(child(element, "source")?);
    let driver = child(element, "driver").and_then(|d| attribute(d, "type"));
    Some(LiveDisk {
        target: attribute(child(element, "target")?, "dev")?.to_owned(),
        format: driver.unwrap_or("raw").to_owned(),
        file: file.map(str::to_owned),
        backing: backing(element),
    })
}

fn file_of<'a>(source: &'a Element<'_>) -> Option<&'a str> {
    attribute(source, "file").or_else(|| attribute(source, "dev"))
}

/// The images below, each inside the one above. One that is no file is passed over.
fn backing(disk: &Element<'_>) -> Vec<String> {
    let layers = std::iter::successors(child(disk, "backingStore"), |b| child(b, "backingStore"));
    let files = layers.filter_map(|b| file_of(child(b, "source")?));
    files.map(str::to_owned).collect()
}

/// `+64055:+108`, or without the plus signs; names are not looked up.
fn owner(label: &Element<'_>) -> Option<(u32, u32)> {
    let (user, group) = label.text.trim().split_once(':')?;
    let number = |text: &str| text.trim_start_matches('+').parse().ok();
    Some((number(user)?, number(group)?))
}

fn child<'a, 'b>(element: &'b Element<'a>, name: &str) -> Option<&'b Element<'a>> {
    element.children.iter().find(|c| c.name == name)
}

fn attribute<'a>(element: &'a Element<'_>, name: &str) -> Option<&'a str> {
    let mut all = element.attributes.iter();
    all.find(|a| a.name == name).map(|a| a.value.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_that_can_be_written() {
        let domain = LiveDomain::read(
            b"<domain type='kvm' id='3'><name>vm</name><novel x='1'/><devices>
              <disk type='file' device='disk'><driver name='qemu' type='qcow2'/>
                <source file='/i/a&amp;b' index='2'/><target dev='vda' bus='virtio'/>
                <backingStore type='file' index='3'><format type='qcow2'/><source file='/i/b'/>
                  <backingStore type='block'><source dev='/i/c'/><backingStore/></backingStore>
                </backingStore></disk>
              <disk type='block'><source dev='/dev/vg/x'/><target dev='sdb'/></disk>
              <disk type='file' device='cdrom'><source file='/x.iso'/><target dev='sda'/></disk>
              <disk type='file'><source file='/r'/><target dev='vdr'/><readonly/></disk>
              <disk type='file'><target dev='vdx'/></disk>
              </devices>
              <seclabel type='dynamic' model='apparmor'><label>libvirt-x</label></seclabel>
              <seclabel type='dynamic' model='dac' relabel='no'><label>+64055:+108</label>
              </seclabel></domain>",
        )
        .unwrap();
        let disk = |target: &str, format: &str, file: &str, backing: &[&str]| LiveDisk {
            target: target.into(),
            format: format.into(),
            file: Some(file.into()),
            backing: backing.iter().map(|b| (*b).to_owned()).collect(),
        };
        assert_eq!(
            domain.disks,
            [
                disk("vda", "qcow2", "/i/a&b", &["/i/b", "/i/c"]),
                disk("sdb", "raw", "/dev/vg/x", &[])
            ]
        );
        assert_eq!(domain.owner, Some((64055, 108)));
        assert!(domain.keeps_owners);
    }

    #[test]
    fn the_domain_of_a_checkpoint() {
        let read = |bytes: &[u8]| LiveDomain::of_checkpoint(bytes).unwrap().disks;
        let disks = read(
            b"<domaincheckpoint><name>mon</name><disks><disk name='vda'/></disks><domain><devices>
              <disk type='file'><source file='/i/a'/><target dev='vda'/></disk></devices></domain>
              </domaincheckpoint>",
        );
        assert_eq!(disks[0].file.as_deref(), Some("/i/a"));
        assert_eq!(read(b"<domaincheckpoint/>"), []);
    }

    #[test]
    fn a_running_backup() {
        let backup = LiveBackup::read(
            b"<domainbackup mode='pull'><server transport='unix' socket='/s'/>
              <disks><disk name='vda' index='5'/></disks></domainbackup>",
        )
        .unwrap();
        assert_eq!(backup.mode, Mode::Pull);
        assert_eq!(backup.socket.as_deref(), Some("/s"));
        let push = LiveBackup::read(
            b"<domainbackup><disks><disk name='vda' backup='yes' type='file'><driver type='raw'/>
              <target file='/t/a'/></disk><disk name='vdb' backup='no'/><disk name='vdc'
              type='block'><target dev='/dev/x'/></disk></disks></domainbackup>",
        )
        .unwrap();
        assert_eq!((push.mode, push.socket), (Mode::Push, None));
        assert_eq!(push.targets, ["/t/a", "/dev/x"]);
        assert_eq!(push.disks, ["vda", "vdc"]);
    }
}
