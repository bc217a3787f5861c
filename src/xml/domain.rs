//! `<domain>`: who the domain is and which disks are backed up.

use super::{clean, document, text};
use crate::model::{Disk, DomainInfo};

/// A `<domain>` document with name, uuid and disks. It names no hypervisor type and no machine:
/// it describes a backup's content and cannot define a domain.
pub fn domain(info: &DomainInfo, disks: &[Disk]) -> String {
    document(|out| {
        out.create_element("domain").write_inner_content(|out| {
            text(out, "name", &info.name)?;
            if let Some(uuid) = &info.uuid {
                text(out, "uuid", uuid)?;
            }
            out.create_element("devices").write_inner_content(|out| {
                disks.iter().try_for_each(|disk| write_disk(out, disk))
            })?;
            Ok(())
        })?;
        Ok(())
    })
}

fn write_disk(out: &mut super::Out, disk: &Disk) -> std::io::Result<()> {
    out.create_element("disk")
        .with_attribute(("type", "file"))
        .with_attribute(("device", "disk"))
        .write_inner_content(|out| {
            out.create_element("driver")
                .with_attribute(("name", "qemu"))
                .with_attribute(("type", clean(&disk.format).as_ref()))
                .write_empty()?;
            if let Some(file) = &disk.file {
                out.create_element("source")
                    .with_attribute(("file", clean(file).as_ref()))
                    .write_empty()?;
            }
            out.create_element("target")
                .with_attribute(("dev", clean(&disk.target).as_ref()))
                .write_empty()?;
            Ok(())
        })
        .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_escaped() {
        let info = DomainInfo {
            name: "a<b>&c".into(),
            uuid: None,
            key: "k".into(),
        };
        let disk = Disk {
            target: "vda".into(),
            size: 1,
            format: "qcow2".into(),
            file: Some("/images/it's \"x\" & <y>.qcow2".into()),
            backing: Vec::new(),
            no_backup: None,
            no_checkpoint: None,
            bitmaps: Vec::new(),
        };
        assert_eq!(
            domain(&info, &[disk]),
            "<domain>\n  <name>a&lt;b&gt;&amp;c</name>\n  <devices>\n    \
             <disk type=\"file\" device=\"disk\">\n      \
             <driver name=\"qemu\" type=\"qcow2\"/>\n      \
             <source file=\"/images/it&apos;s &quot;x&quot; &amp; &lt;y&gt;.qcow2\"/>\n      \
             <target dev=\"vda\"/>\n    </disk>\n  </devices>\n</domain>\n"
        );
    }
}
