//! `<domainbackup>`: what virDomainBackupBegin is told, and what virDomainBackupGetXMLDesc answers.

use super::checkpoint::CheckpointDocument;
use super::error::{At, Place};
use super::{Out, attributes, document, text};
use crate::model::{Format, Image, Mode, Name, ServerAddress};

/// What a `<domainbackup>` document says. Read by [`BackupDocument::read`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BackupDocument {
    /// Where the element stands.
    pub place: Place,
    /// Who copies. As in libvirt, a document that does not say means push.
    pub mode: Mode,
    /// The checkpoint that changes are listed or copied since; `None` for a full backup.
    pub incremental: Option<At<Name>>,
    /// Where the disks of a pull backup can be read over NBD, besides in the mount.
    pub server: Option<Server>,
    /// What is done with each disk. None listed: every disk takes part. Otherwise those listed do,
    /// unless with `backup: false`.
    pub disks: Vec<BackupDocumentDisk>,
    /// The checkpoint to make at the same instant: fleecefs' own extension, the second document of
    /// the call as a child of the first. `None` means whatever is usual; a checkpoint in which no
    /// disk takes part means none.
    pub checkpoint: Option<CheckpointDocument>,
}

/// A `<server>`: an NBD server for other clients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    /// Where the element stands.
    pub place: Place,
    /// What it listens on.
    pub address: ServerAddress,
}

/// One disk of a [`BackupDocument`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupDocumentDisk {
    /// Where the element stands.
    pub place: Place,
    /// The disk target.
    pub name: String,
    /// The disk takes part.
    pub backup: bool,
    /// In full, or changes only; where nothing is said, what the whole document says.
    pub backup_mode: Option<BackupMode>,
    /// The checkpoint that this disk's changes are since, if not the whole document's.
    pub incremental: Option<Name>,
    /// Name of the disk's NBD export; the target where nothing is said. Pull only.
    pub export_name: Option<String>,
    /// Name of the bitmap of changes in that export. Pull only.
    pub export_bitmap: Option<String>,
    /// Push: what is written. Pull: the scratch space.
    pub image: Option<Image>,
    /// The format of that.
    pub format: Option<Format>,
}

/// Whether a disk is backed up in full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackupMode {
    /// All of it.
    Full,
    /// What changed since a checkpoint.
    Incremental,
}

/// libvirt's words, for the reader and the writer.
pub(super) const MODES: [(&str, Mode); 2] = [("push", Mode::Push), ("pull", Mode::Pull)];
pub(super) const YES_NO: [(&str, bool); 2] = [("yes", true), ("no", false)];
pub(super) const BACKUP_MODES: [(&str, BackupMode); 2] = [
    ("full", BackupMode::Full),
    ("incremental", BackupMode::Incremental),
];
pub(super) const FORMATS: [(&str, Format); 2] = [("raw", Format::Raw), ("qcow2", Format::Qcow2)];

/// The word for a meaning.
fn word<T: PartialEq>(words: &[(&'static str, T)], meaning: &T) -> &'static str {
    let mut all = words.iter();
    all.find(|(_, m)| m == meaning).map_or("", |(word, _)| word)
}

impl BackupDocumentDisk {
    /// A disk that takes part, about which nothing else is said.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            place: Place::default(),
            name: name.into(),
            backup: true,
            backup_mode: None,
            incremental: None,
            export_name: None,
            export_bitmap: None,
            image: None,
            format: None,
        }
    }

    fn write_to(&self, out: &mut Out, mode: Mode) -> std::io::Result<()> {
        let (kind, path_of, path) = match &self.image {
            Some(Image::File(path)) => (Some("file"), "file", Some(path.as_str())),
            Some(Image::Block(path)) => (Some("block"), "dev", Some(path.as_str())),
            None => (self.backup.then_some("file"), "file", None),
        };
        let element = out.create_element("disk").with_attributes(attributes([
            ("name", Some(self.name.as_str())),
            ("backup", Some(word(&YES_NO, &self.backup))),
            ("type", kind),
            ("exportname", self.export_name.as_deref()),
            ("exportbitmap", self.export_bitmap.as_deref()),
            (
                "backupmode",
                self.backup_mode.map(|m| word(&BACKUP_MODES, &m)),
            ),
            ("incremental", self.incremental.as_ref().map(Name::as_str)),
        ]));
        if self.format.is_none() && path.is_none() {
            return element.write_empty().map(drop);
        }
        element
            .write_inner_content(|out| {
                if let Some(format) = &self.format {
                    out.create_element("driver")
                        .with_attribute(("type", word(&FORMATS, format)))
                        .write_empty()?;
                }
                if path.is_some() {
                    let name = match mode {
                        Mode::Push => "target",
                        Mode::Pull => "scratch",
                    };
                    out.create_element(name)
                        .with_attributes(attributes([(path_of, path)]))
                        .write_empty()?;
                }
                Ok(())
            })
            .map(drop)
    }
}

impl BackupDocument {
    /// The document as text, ending in a newline.
    pub fn write(&self) -> String {
        document(|out| {
            out.create_element("domainbackup")
                .with_attribute(("mode", word(&MODES, &self.mode)))
                .write_inner_content(|out| {
                    if let Some(base) = &self.incremental {
                        text(out, "incremental", base.value.as_str())?;
                    }
                    if let Some(server) = &self.server {
                        server.write_to(out)?;
                    }
                    if !self.disks.is_empty() {
                        out.create_element("disks").write_inner_content(|out| {
                            let mut disks = self.disks.iter();
                            disks.try_for_each(|disk| disk.write_to(out, self.mode))
                        })?;
                    }
                    match &self.checkpoint {
                        Some(checkpoint) => checkpoint.write_to(out),
                        None => Ok(()),
                    }
                })?;
            Ok(())
        })
    }
}

impl Server {
    fn write_to(&self, out: &mut Out) -> std::io::Result<()> {
        let element = out.create_element("server");
        let number;
        match &self.address {
            ServerAddress::Unix(path) => element.with_attributes(attributes([
                ("transport", Some("unix")),
                ("socket", Some(path.as_str())),
            ])),
            ServerAddress::Tcp { host, port, tls } => {
                number = port.to_string();
                element.with_attributes(attributes([
                    ("transport", Some("tcp")),
                    ("tls", Some(word(&YES_NO, tls))),
                    ("name", Some(host.as_str())),
                    ("port", Some(number.as_str())),
                ]))
            }
        }
        .write_empty()
        .map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_where_the_base_does_not_reach() {
        let disk = |target: &str, mode| BackupDocumentDisk {
            export_name: Some(target.to_owned()),
            backup_mode: mode,
            ..BackupDocumentDisk::new(target)
        };
        let mut document = BackupDocument {
            mode: Mode::Pull,
            incremental: Some(Name::new("mon").unwrap().into()),
            disks: vec![disk("vda", None), disk("v\"b", Some(BackupMode::Full))],
            ..BackupDocument::default()
        };
        assert_eq!(
            document.write(),
            "<domainbackup mode=\"pull\">\n  <incremental>mon</incremental>\n  <disks>\n    \
             <disk name=\"vda\" backup=\"yes\" type=\"file\" exportname=\"vda\"/>\n    \
             <disk name=\"v&quot;b\" backup=\"yes\" type=\"file\" exportname=\"v&quot;b\" \
             backupmode=\"full\"/>\n  </disks>\n</domainbackup>\n"
        );
        document.disks.clear();
        assert!(!document.write().contains("disks"), "no disks listed: all");
    }
}
