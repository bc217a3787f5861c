//! `<domaincheckpoint>`: what virDomainCheckpointCreateXML is told, and what
//! virDomainCheckpointGetXMLDesc answers.

use std::time::{Duration, SystemTime};

use super::error::{At, Error, Place};
use super::fields::{Fields, Value};
use super::tree::{self, Element};
use super::{Out, attributes, document, seconds, text};
use crate::model::{Checkpoint, DomainInfo, Name};

/// The latest creation time: the last second of the year 9999. Time can still be added to it.
const LATEST: u64 = 253_402_300_799;
/// What QEMU takes as the name of a bitmap, in bytes.
pub(super) const LONGEST_BITMAP: usize = 1023;
/// As long as a path: a disk may be named by its file.
pub(super) const LONGEST_PATH: usize = 4095;

/// What a `<domaincheckpoint>` document says.
///
/// To create a checkpoint only `name`, `description` and `disks` count; `creation_time`, `parent`
/// and `domain` are what a checkpoint is redefined from.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CheckpointDocument {
    /// Where the element stands.
    pub place: Place,
    /// The checkpoint's name.
    pub name: Option<At<Name>>,
    /// Words for people.
    pub description: Option<String>,
    /// When the checkpoint was made, in seconds since 1970.
    pub creation_time: Option<u64>,
    /// The checkpoint before.
    pub parent: Option<At<Name>>,
    /// What is done with each disk. None listed: every disk that can takes part. Otherwise those
    /// listed do, unless with `bitmap: None`.
    pub disks: Vec<CheckpointDocumentDisk>,
    /// The domain that the checkpoint is of.
    pub domain: Option<DomainReference>,
}

/// One disk of a [`CheckpointDocument`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointDocumentDisk {
    /// Where the element stands.
    pub place: Place,
    /// The disk target, or the path of the disk's image.
    pub name: String,
    /// How the disk takes part; `None` if it does not: `checkpoint='no'`.
    pub bitmap: Option<DocumentBitmap>,
}

/// The bitmap of a disk in a [`CheckpointDocument`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DocumentBitmap {
    /// Its name; the checkpoint's where nothing is said.
    pub name: Option<String>,
    /// How many bytes changed since the checkpoint, at the time of writing. Never an input.
    pub size: Option<u64>,
}

/// What is kept of a `<domain>` inside a [`CheckpointDocument`]; the rest is skipped.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DomainReference {
    /// Where the element stands.
    pub place: Place,
    /// The domain's name.
    pub name: Option<String>,
    /// The domain's UUID, as it was written.
    pub uuid: Option<String>,
}

impl CheckpointDocument {
    /// Reads a document. What needs the domain to be judged (is there such a disk?) is left to
    /// the caller, who finds the line in the places.
    pub fn read(bytes: &[u8]) -> Result<Self, Error> {
        let source = tree::source(bytes)?;
        let root = tree::parse(&source)?;
        Self::of(Fields::of_root(root, "domaincheckpoint")?)
    }

    pub(super) fn of(mut fields: Fields<'_>) -> Result<Self, Error> {
        let place = fields.place();
        let name = fields.child_text("name")?.map(Value::name).transpose()?;
        let description = fields.child_text("description")?.map(|d| d.text);
        let creation_time = match fields.child_text("creationTime")? {
            Some(time) => Some(time.number(0..=LATEST)?),
            None => None,
        };
        let parent = match fields.child("parent")? {
            Some(parent) => Some(read_parent(parent)?),
            None => None,
        };
        let disks = match fields.child("disks")? {
            Some(disks) => read_disks(disks, read_disk, |d| (&d.name, d.place))?,
            None => Vec::new(),
        };
        let domain = fields.child("domain")?.map(read_domain).transpose()?;
        fields.finish()?;
        Ok(Self {
            place,
            name,
            description,
            creation_time,
            parent,
            disks,
            domain,
        })
    }

    /// The document that describes a checkpoint of a domain. With no domain it is what the flag
    /// NO_DOMAIN asks for; for the flag SIZE, set the bitmaps' sizes.
    pub fn describe(checkpoint: &Checkpoint, domain: Option<&DomainInfo>) -> Self {
        let disk = |d: &crate::model::CheckpointDisk| CheckpointDocumentDisk {
            place: Place::default(),
            name: d.target.clone(),
            bitmap: Some(DocumentBitmap {
                name: Some(d.bitmap.clone()),
                size: None,
            }),
        };
        Self {
            place: Place::default(),
            name: Some(checkpoint.name.clone().into()),
            description: checkpoint.description.clone(),
            creation_time: Some(seconds(checkpoint.created)),
            parent: checkpoint.parent.clone().map(At::from),
            disks: checkpoint.disks.iter().map(disk).collect(),
            domain: domain.map(|info| DomainReference {
                place: Place::default(),
                name: Some(info.name.clone()),
                uuid: info.uuid.clone(),
            }),
        }
    }

    /// When the checkpoint was made.
    pub fn created(&self) -> Option<SystemTime> {
        let since = Duration::from_secs(self.creation_time?);
        SystemTime::UNIX_EPOCH.checked_add(since)
    }

    /// The document as text, ending in a newline.
    pub fn write(&self) -> String {
        document(|out| self.write_to(out))
    }

    pub(super) fn write_to(&self, out: &mut Out) -> std::io::Result<()> {
        out.create_element("domaincheckpoint")
            .write_inner_content(|out| {
                if let Some(name) = &self.name {
                    text(out, "name", name.value.as_str())?;
                }
                if let Some(description) = &self.description {
                    text(out, "description", description)?;
                }
                if let Some(parent) = &self.parent {
                    out.create_element("parent")
                        .write_inner_content(|out| text(out, "name", parent.value.as_str()))?;
                }
                if let Some(time) = self.creation_time {
                    text(out, "creationTime", &time.to_string())?;
                }
                if !self.disks.is_empty() {
                    out.create_element("disks").write_inner_content(|out| {
                        self.disks.iter().try_for_each(|d| d.write_to(out))
                    })?;
                }
                if let Some(domain) = &self.domain {
                    out.create_element("domain").write_inner_content(|out| {
                        if let Some(name) = &domain.name {
                            text(out, "name", name)?;
                        }
                        match &domain.uuid {
                            Some(uuid) => text(out, "uuid", uuid),
                            None => Ok(()),
                        }
                    })?;
                }
                Ok(())
            })?;
        Ok(())
    }
}

impl DomainReference {
    /// Reads a `<domain>` document, of which name and UUID are kept.
    pub fn read(bytes: &[u8]) -> Result<Self, Error> {
        let source = tree::source(bytes)?;
        let root = tree::parse(&source)?;
        if root.name != "domain" {
            return Err(root.place.refuse(format!(
                "<{}> stands where <domain> is needed",
                super::error::Clipped(root.name)
            )));
        }
        read_domain(root)
    }
}

impl CheckpointDocumentDisk {
    fn write_to(&self, out: &mut Out) -> std::io::Result<()> {
        let taking_part = self.bitmap.as_ref();
        let size = taking_part.and_then(|b| b.size).map(|s| s.to_string());
        out.create_element("disk")
            .with_attributes(attributes([
                ("name", Some(self.name.as_str())),
                ("checkpoint", Some(taking_part.map_or("no", |_| "bitmap"))),
                ("bitmap", taking_part.and_then(|b| b.name.as_deref())),
                ("size", size.as_deref()),
            ]))
            .write_empty()
            .map(drop)
    }
}

fn read_parent(element: Element<'_>) -> Result<At<Name>, Error> {
    let mut fields = Fields::of(element);
    let place = fields.place();
    let name = fields.child_text("name")?;
    fields.finish()?;
    name.ok_or_else(|| place.refuse("<parent> needs <name>"))?
        .name()
}

/// The `<disk>` elements of `<disks>`, none of which may be there twice.
pub(super) fn read_disks<T>(
    disks: Element<'_>,
    read: impl Fn(Element<'_>) -> Result<T, Error>,
    who: impl Fn(&T) -> (&str, Place),
) -> Result<Vec<T>, Error> {
    let mut fields = Fields::of(disks);
    let elements = fields.children("disk")?;
    fields.finish()?;
    let disks = elements
        .into_iter()
        .map(read)
        .collect::<Result<Vec<T>, Error>>()?;
    let mut seen = std::collections::HashMap::new();
    for disk in &disks {
        let (name, place) = who(disk);
        if let Some(first) = seen.insert(name, place) {
            return Err(place.refuse(format!(
                "the disk {} is listed twice, first on line {}",
                super::error::Shown(name),
                first.line
            )));
        }
    }
    Ok(disks)
}

fn read_disk(element: Element<'_>) -> Result<CheckpointDocumentDisk, Error> {
    let mut fields = Fields::of(element);
    let place = fields.place();
    let name = fields.required("name")?.label(LONGEST_PATH)?;
    let takes_part = match fields.attribute("checkpoint") {
        Some(word) => word.word(&[("no", false), ("bitmap", true)])?,
        None => true,
    };
    let bitmap = if takes_part {
        let name = fields.attribute("bitmap");
        let size = fields.attribute("size");
        Some(DocumentBitmap {
            name: name.map(|n| n.label(LONGEST_BITMAP)).transpose()?,
            size: size.map(|s| s.number(0..=u64::MAX)).transpose()?,
        })
    } else {
        let why = "contradicts checkpoint=\"no\"";
        fields.no_attribute("bitmap", why)?;
        fields.no_attribute("size", why)?;
        None
    };
    fields.finish()?;
    Ok(CheckpointDocumentDisk {
        place,
        name,
        bitmap,
    })
}

/// Name and UUID from among whatever a domain may hold.
fn read_domain(element: Element<'_>) -> Result<DomainReference, Error> {
    let mut attributes = element.attributes.iter();
    if let Some(other) = attributes.find(|a| a.name == "xmlns" && !a.is_idle()) {
        let why = "<domain> of a namespace of its own is not supported";
        return Err(other.place.refuse(why));
    }
    let text = |name: &str| {
        let mut all = element.children.iter();
        all.find(|c| c.name == name).map(|c| c.text.clone())
    };
    Ok(DomainReference {
        place: element.place,
        name: text("name"),
        uuid: text("uuid"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::CheckpointDisk;

    #[test]
    fn a_domains_name_and_uuid() {
        let info = DomainInfo {
            name: "a<b".into(),
            uuid: Some("u".into()),
            key: "k".into(),
        };
        let text = crate::xml::domain(&info, &[]);
        let read = DomainReference::read(text.as_bytes()).unwrap();
        assert_eq!((read.name, read.uuid), (Some(info.name), info.uuid));
        let said = DomainReference::read(b"<domainbackup/>").unwrap_err();
        assert!(said.to_string().contains("<domain> is needed"), "{said}");
    }

    #[test]
    fn libvirts_form() {
        let info = DomainInfo {
            name: "vm".into(),
            uuid: Some("u".into()),
            key: "k".into(),
        };
        let tue = Checkpoint {
            name: Name::new("tue").unwrap(),
            created: SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_473_812),
            parent: Some(Name::new("mon").unwrap()),
            description: None,
            disks: vec![CheckpointDisk {
                target: "vda".into(),
                bitmap: "tue".into(),
                size: 4096,
                image: None,
                broken: None,
            }],
        };
        let mut document = CheckpointDocument::describe(&tue, Some(&info));
        assert_eq!(document.created(), Some(tue.created));
        assert_eq!(
            document.write(),
            "<domaincheckpoint>\n  <name>tue</name>\n  <parent>\n    <name>mon</name>\n  \
             </parent>\n  <creationTime>1795473812</creationTime>\n  <disks>\n    \
             <disk name=\"vda\" checkpoint=\"bitmap\" bitmap=\"tue\"/>\n  </disks>\n  \
             <domain>\n    <name>vm</name>\n    <uuid>u</uuid>\n  </domain>\n\
             </domaincheckpoint>\n"
        );
        if let Some(bitmap) = &mut document.disks[0].bitmap {
            bitmap.size = Some(65536);
        }
        let without_domain = CheckpointDocument {
            domain: None,
            ..document
        };
        let text = without_domain.write();
        assert!(text.contains("size=\"65536\"") && !text.contains("<domain>"));
    }
}
