//! Reading `<domainbackup>`.

use std::collections::HashMap;

use super::backup::{
    BACKUP_MODES, BackupDocument, BackupDocumentDisk, BackupMode, FORMATS, MODES, Server, YES_NO,
};
use super::checkpoint::{CheckpointDocument, LONGEST_BITMAP, LONGEST_PATH, read_disks};
use super::error::{Error, Shown};
use super::fields::{Fields, Value};
use super::tree::{self, Element};
use crate::model::{Format, Image, Mode, ServerAddress};

/// What a UNIX socket's address holds, in bytes.
const LONGEST_SOCKET: usize = 107;
/// What NBD takes as the name of an export, in bytes.
const LONGEST_EXPORT: usize = 4096;
/// The longest name of a host, in bytes.
const LONGEST_HOST: usize = 255;

impl BackupDocument {
    /// Reads a document. What needs the domain to be judged (is there such a disk, or such a
    /// checkpoint?) is left to the caller, who finds the line in the places.
    pub fn read(bytes: &[u8]) -> Result<Self, Error> {
        let source = tree::source(bytes)?;
        let mut fields = Fields::of_root(tree::parse(&source)?, "domainbackup")?;
        let mode = match fields.attribute("mode") {
            Some(word) => word.word(&MODES)?,
            None => Mode::default(),
        };
        let incremental = fields.child_text("incremental")?;
        let incremental = incremental.map(Value::name).transpose()?;
        if mode == Mode::Push {
            fields.no_child(
                "server",
                "is for mode=\"pull\" only, and push is the default",
            )?;
        }
        let server = fields.child("server")?.map(read_server).transpose()?;
        let disks = match fields.child("disks")? {
            Some(disks) => read_disks(disks, |d| read_disk(d, mode), |d| (&d.name, d.place))?,
            None => Vec::new(),
        };
        let checkpoint = match fields.child("domaincheckpoint")? {
            Some(checkpoint) => Some(CheckpointDocument::of(Fields::of(checkpoint))?),
            None => None,
        };
        let place = fields.place();
        fields.finish()?;
        let document = Self {
            place,
            mode,
            incremental,
            server,
            disks,
            checkpoint,
        };
        document.check_incremental()?;
        document.check_exports()?;
        Ok(document)
    }

    /// Since what, when a disk asks for changes only?
    fn check_incremental(&self) -> Result<(), Error> {
        let lost = |d: &&BackupDocumentDisk| {
            d.backup_mode == Some(BackupMode::Incremental) && d.incremental.is_none()
        };
        match self.disks.iter().find(lost) {
            Some(disk) if self.incremental.is_none() => Err(disk.place.refuse(format!(
                "the disk {} has backupmode=\"incremental\", and neither it nor the document says \
                 since which checkpoint: add incremental= or <incremental>",
                Shown(&disk.name)
            ))),
            _ => Ok(()),
        }
    }

    /// Two disks cannot be exported under one name.
    fn check_exports(&self) -> Result<(), Error> {
        let mut seen = HashMap::new();
        for disk in self.disks.iter().filter(|d| d.backup) {
            let export = disk.export_name.as_deref().unwrap_or(&disk.name);
            if let Some(first) = seen.insert(export, disk.place) {
                return Err(disk.place.refuse(format!(
                    "two disks are exported as {}, the first on line {}",
                    Shown(export),
                    first.line
                )));
            }
        }
        Ok(())
    }
}

fn read_server(element: Element<'_>) -> Result<Server, Error> {
    #[derive(Clone, Copy)]
    enum Transport {
        Tcp,
        Unix,
    }
    let mut fields = Fields::of(element);
    let place = fields.place();
    let transport = match fields.attribute("transport") {
        Some(word) => word.word(&[("tcp", Transport::Tcp), ("unix", Transport::Unix)])?,
        None => Transport::Tcp,
    };
    let tls = fields.attribute("tls");
    let wants_tls = match &tls {
        Some(word) => word.word(&YES_NO)?,
        None => false,
    };
    let address = match transport {
        Transport::Unix => {
            let why = "is for transport=\"tcp\"";
            fields.no_attribute("name", why)?;
            fields.no_attribute("port", why)?;
            if let Some(tls) = tls.filter(|_| wants_tls) {
                return Err(tls.refuse("TLS is for transport=\"tcp\""));
            }
            ServerAddress::Unix(fields.required("socket")?.path(LONGEST_SOCKET)?)
        }
        Transport::Tcp => {
            fields.no_attribute(
                "socket",
                "is for transport=\"unix\", and tcp is the default",
            )?;
            let host = fields.required("name")?;
            let odd = |c: char| !(c.is_ascii_alphanumeric() || ".:%_-".contains(c));
            if host.text.contains(odd) {
                return Err(host.refuse("the name or the address of a host is needed"));
            }
            let port = fields.required("port")?;
            ServerAddress::Tcp {
                host: host.label(LONGEST_HOST)?,
                port: u16::try_from(port.number(1..=65535)?).unwrap_or_default(),
                tls: wants_tls,
            }
        }
    };
    fields.finish()?;
    Ok(Server { place, address })
}

fn read_disk(element: Element<'_>, mode: Mode) -> Result<BackupDocumentDisk, Error> {
    let mut fields = Fields::of(element);
    let mut disk = BackupDocumentDisk::new(fields.required("name")?.label(LONGEST_PATH)?);
    disk.place = fields.place();
    if let Some(word) = fields.attribute("backup") {
        disk.backup = word.word(&YES_NO)?;
    }
    if let Some(word) = fields.attribute("backupmode") {
        disk.backup_mode = Some(word.word(&BACKUP_MODES)?);
    }
    if disk.backup_mode == Some(BackupMode::Full) {
        fields.no_attribute("incremental", "contradicts backupmode=\"full\"")?;
    }
    if let Some(base) = fields.attribute("incremental") {
        disk.incremental = Some(base.name()?.value);
    }
    if mode == Mode::Push {
        let why = "is for mode=\"pull\" only, and push is the default";
        fields.no_attribute("exportname", why)?;
        fields.no_attribute("exportbitmap", why)?;
        fields.no_child("scratch", why)?;
    } else {
        let exportname = fields.attribute("exportname");
        disk.export_name = exportname.map(|n| n.label(LONGEST_EXPORT)).transpose()?;
        let exportbitmap = fields.attribute("exportbitmap");
        disk.export_bitmap = exportbitmap.map(|n| n.label(LONGEST_BITMAP)).transpose()?;
        fields.no_child(
            "target",
            "is for mode=\"push\": a pull backup has <scratch>",
        )?;
    }
    if disk.backup {
        (disk.image, disk.format) = read_image(&mut fields, mode)?;
    } else {
        let why = "contradicts backup=\"no\"";
        fields.no_attribute("type", why)?;
        for child in ["driver", "target", "scratch"] {
            fields.no_child(child, why)?;
        }
    }
    fields.finish()?;
    Ok(disk)
}

/// What stands in `type=`, `<driver>` and `<target>` or `<scratch>`.
fn read_image(
    fields: &mut Fields<'_>,
    mode: Mode,
) -> Result<(Option<Image>, Option<Format>), Error> {
    let block = match fields.attribute("type") {
        Some(word) => word.word(&[("file", false), ("block", true)])?,
        None => false,
    };
    let format = match fields.child("driver")? {
        Some(driver) => {
            let mut fields = Fields::of(driver);
            let format = fields.required("type")?;
            let meaning = match mode {
                Mode::Push => format.word(&FORMATS)?,
                Mode::Pull => format.word(&[("qcow2", Format::Qcow2)])?,
            };
            fields.finish()?;
            Some(meaning)
        }
        None => None,
    };
    let name = match mode {
        Mode::Push => "target",
        Mode::Pull => "scratch",
    };
    let place = fields.place();
    let image = match fields.child(name)? {
        Some(image) => {
            let mut fields = Fields::of(image);
            let image = if block {
                fields.no_attribute("file", "is for type=\"file\": a block device has dev=")?;
                Image::Block(fields.required("dev")?.path(LONGEST_PATH)?)
            } else {
                fields.no_attribute("dev", "is for type=\"block\": a file has file=")?;
                Image::File(fields.required("file")?.path(LONGEST_PATH)?)
            };
            fields.finish()?;
            Some(image)
        }
        None if block => {
            return Err(place.refuse(format!("type=\"block\" needs <{name} dev=…>")));
        }
        None => None,
    };
    Ok((image, format))
}
