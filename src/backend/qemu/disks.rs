//! Finding a domain's disks and bitmaps in what QEMU tells of its block graph.
//!
//! The structs here hold only what is used and let everything else pass: QEMU adds fields, drivers
//! and states in every release, and a node that is not ours must never fail to parse.

use serde::Deserialize;
use serde_json::{Value, json};

use crate::backend::names;
use crate::model::{Bitmap, Disk};

/// An entry of `query-block`: a drive of the guest.
#[derive(Debug, Deserialize)]
pub(super) struct Drive {
    #[serde(default)]
    device: String,
    #[serde(default)]
    qdev: Option<String>,
    #[serde(default)]
    removable: bool,
    #[serde(default)]
    inserted: Option<Inserted>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Inserted {
    node_name: Option<String>,
    ro: bool,
}

/// An entry of `query-named-block-nodes`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Node {
    pub(super) node_name: Option<String>,
    #[serde(default)]
    drv: String,
    #[serde(default)]
    ro: bool,
    /// Not said before QEMU 10.0.
    active: Option<bool>,
    #[serde(default)]
    file: Option<String>,
    /// The file of the image below, where there is one.
    #[serde(default, rename = "backing_file")]
    backing_file: Option<String>,
    image: Image,
    #[serde(default)]
    dirty_bitmaps: Vec<DirtyBitmap>,
}

impl Node {
    /// The bitmaps with a name that satisfies `wanted`: (node, bitmap).
    pub(super) fn bitmaps_of(
        &self,
        wanted: impl Fn(&str) -> bool,
    ) -> impl Iterator<Item = (&str, &str)> {
        let node = self.node_name.as_deref();
        let names = self.dirty_bitmaps.iter().filter_map(|b| b.name.as_deref());
        names
            .filter(move |n| wanted(n))
            .filter_map(move |n| Some((node?, n)))
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Image {
    virtual_size: u64,
    #[serde(default)]
    format_specific: Option<FormatSpecific>,
}

#[derive(Debug, Deserialize)]
struct FormatSpecific {
    #[serde(default)]
    data: FormatData,
}

#[derive(Debug, Default, Deserialize)]
struct FormatData {
    compat: Option<String>,
}

#[derive(Debug, Deserialize)]
struct DirtyBitmap {
    /// Filters carry bitmaps without one.
    name: Option<String>,
    #[serde(default)]
    recording: bool,
    #[serde(default)]
    inconsistent: bool,
    #[serde(default)]
    persistent: bool,
    granularity: u64,
    count: u64,
}

/// A disk and the block node that holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DiskNode {
    pub(super) node: String,
    pub(super) disk: Disk,
    /// What images further down hold of its bitmaps: (node, bitmap). Only of a disk that is opened
    /// read-only: elsewhere each bitmap is on the disk's own image, or is not trusted.
    pub(super) older: Vec<(String, String)>,
    /// The image is not this QEMU's to write, as before a migration has arrived and after one has left:
    /// another one may write to it, and what that writes is in no bitmap here.
    pub(super) inactive: bool,
}

impl DiskNode {
    /// Where a bitmap's content is, as block-dirty-bitmap-merge wants to be told.
    pub(super) fn sources(&self, bitmap: &str) -> Vec<Value> {
        let older = self.older.iter().filter(|(_, name)| name == bitmap);
        let nodes = std::iter::once(&self.node).chain(older.map(|(node, _)| node));
        nodes
            .map(|node| json!({"node": node, "name": bitmap}))
            .collect()
    }
}

/// Where the list of disks comes from.
#[derive(Debug, Clone)]
pub(in crate::backend) enum Roots {
    /// The guest's own drives, as `query-block` tells them.
    Drives,
    /// These, as (target, node): a storage daemon has no drives.
    Nodes(Vec<(String, String)>),
}

/// The disks of the guest's writable drives. `below` names the node under one of our filters.
pub(super) fn of_drives(
    drives: &[Drive],
    nodes: &[Node],
    below: impl Fn(&str) -> Option<String>,
) -> Vec<DiskNode> {
    let mut found: Vec<DiskNode> = Vec::new();
    for drive in drives {
        // An empty drive has nothing inserted; a CD-ROM or floppy is removable and not a disk.
        let Some(inserted) = drive
            .inserted
            .as_ref()
            .filter(|i| !i.ro && !drive.removable)
        else {
            continue;
        };
        let Some(top) = &inserted.node_name else {
            continue;
        };
        let name = below(top).unwrap_or_else(|| top.clone());
        let Some(node) = nodes.iter().find(|n| n.node_name.as_ref() == Some(&name)) else {
            continue;
        };
        let mut target = target_of(drive, &name);
        // Two drives of one name would be one file: number the later ones.
        let same = |t: &String| found.iter().any(|d| d.disk.target == *t);
        let mut number = 2;
        while same(&target) {
            target = format!("{}-{number}", target_of(drive, &name));
            number += 1;
        }
        found.push(disk_of(target, name, node));
    }
    found
}

/// The disks that were opened under known node names.
pub(super) fn of_nodes(wanted: &[(String, String)], nodes: &[Node]) -> Vec<DiskNode> {
    wanted
        .iter()
        .filter_map(|(target, name)| {
            let node = nodes.iter().find(|n| n.node_name.as_ref() == Some(name))?;
            let mut found = disk_of(target.clone(), name.clone(), node);
            if node.ro {
                found.add_older(node, nodes);
            }
            Some(found)
        })
        .collect()
}

/// The nodes below `top`, as far down as there are any. `None` if one is not found.
fn below<'a>(top: &'a Node, nodes: &'a [Node]) -> Option<Vec<&'a Node>> {
    let mut chain = Vec::new();
    let mut next = top.backing_file.as_ref();
    while let Some(file) = next {
        // The file itself is a node of that name, too, and has neither.
        let named = nodes.iter().filter(|n| n.file.as_ref() == Some(file));
        let node = named.max_by_key(|n| (n.backing_file.is_some(), !n.dirty_bitmaps.is_empty()))?;
        chain.push(node);
        next = node.backing_file.as_ref();
        if chain.len() > nodes.len() {
            return None;
        }
    }
    Some(chain)
}

impl DiskNode {
    /// libvirt begins a bitmap anew in each snapshot's image, and leaves the content it has on the one
    /// below: what a bitmap says is said by all of its name. Where one of them cannot be used, none can.
    fn add_older(&mut self, top: &Node, nodes: &[Node]) {
        let chain = below(top, nodes);
        let files = chain.iter().flatten().filter_map(|n| n.file.clone());
        self.disk.backing = files.collect();
        for bitmap in &mut self.disk.bitmaps {
            let Some(chain) = &chain else {
                bitmap.inconsistent = true;
                continue;
            };
            let mut ended = false;
            for node in chain {
                let named = |b: &&DirtyBitmap| b.name.as_ref() == Some(&bitmap.name);
                let Some(same) = node.dirty_bitmaps.iter().find(named) else {
                    ended = true;
                    continue;
                };
                match &node.node_name {
                    // In an image between that has none, what was written is in none.
                    Some(name)
                        if !ended
                            && !same.inconsistent
                            && node.image.virtual_size == self.disk.size =>
                    {
                        self.older.push((name.clone(), bitmap.name.clone()));
                        bitmap.dirty_bytes = bitmap.dirty_bytes.max(same.count);
                    }
                    _ => bitmap.inconsistent = true,
                }
            }
        }
    }
}

/// The name of a drive in the domain: its device's id, else the id of a `-drive`, else the node's
/// name. `/machine/peripheral/vda/virtio-backend` is the device `vda`; a device without an id has
/// a path through `peripheral-anon` or `unattached`, whose numbers may differ after a restart.
fn target_of(drive: &Drive, node: &str) -> String {
    let id =
        drive
            .qdev
            .as_deref()
            .and_then(|qdev| match qdev.strip_prefix("/machine/peripheral/") {
                Some(rest) => rest.split('/').next(),
                None => (!qdev.starts_with('/')).then_some(qdev),
            });
    let raw = id
        .filter(|id| !id.is_empty())
        .or(Some(drive.device.as_str()).filter(|d| !d.is_empty()))
        .unwrap_or(node);
    let clean = names::plain(raw);
    match clean.strip_prefix('.') {
        Some(rest) => format!("_{rest}"),
        None => clean,
    }
}

fn disk_of(target: String, name: String, node: &Node) -> DiskNode {
    let format = node.image.format_specific.as_ref();
    let compat = format.and_then(|f| f.data.compat.as_deref());
    let no_checkpoint = if node.ro {
        Some("it is read-only".to_owned())
    } else if node.drv != "qcow2" {
        Some(format!("format {} cannot keep dirty bitmaps", node.drv))
    } else if compat == Some("0.10") {
        Some("qcow2 version 2 cannot keep dirty bitmaps".to_owned())
    } else {
        None
    };
    let bitmaps = node.dirty_bitmaps.iter().filter_map(|b| {
        Some(Bitmap {
            name: b.name.clone()?,
            recording: b.recording,
            inconsistent: b.inconsistent,
            persistent: b.persistent,
            granularity: b.granularity,
            dirty_bytes: b.count,
        })
    });
    DiskNode {
        node: name,
        inactive: node.active == Some(false),
        older: Vec::new(),
        disk: Disk {
            target,
            size: node.image.virtual_size,
            format: node.drv.clone(),
            file: node.file.clone(),
            backing: Vec::new(),
            no_backup: None,
            no_checkpoint,
            bitmaps: bitmaps.collect(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn node(name: &str, drv: &str, compat: Option<&str>) -> serde_json::Value {
        json!({
            "node-name": name, "drv": drv, "ro": false, "file": format!("/i/{name}"),
            "from-the-future": {"x": [1]},
            "image": {"virtual-size": 65536, "format-specific":
                {"type": "martian", "data": {"compat": compat, "x": true}}},
            "dirty-bitmaps": [
                {"granularity": 65536, "count": 0, "busy": true, "novel": 1},
                {"name": "mon", "granularity": 65536, "count": 131072, "recording": true},
            ],
        })
    }

    fn drive(device: &str, qdev: Option<&str>, node: &str) -> serde_json::Value {
        json!({"device": device, "qdev": qdev, "removable": false, "type": "unknown",
               "inserted": {"node-name": node, "ro": false}})
    }

    fn find(drives: serde_json::Value, nodes: serde_json::Value) -> Vec<DiskNode> {
        let drives: Vec<Drive> = serde_json::from_value(drives).unwrap();
        let nodes: Vec<Node> = serde_json::from_value(nodes).unwrap();
        of_drives(&drives, &nodes, |name| {
            name.strip_prefix("filter-over-").map(str::to_owned)
        })
    }

    #[test]
    fn disks_are_named_by_their_device() {
        let disks = find(
            json!([
                drive(
                    "drv1",
                    Some("/machine/peripheral-anon/device[0]/virtio-backend"),
                    "#block1"
                ),
                drive("ide0-hd0", Some("/machine/unattached/device[13]"), "n2"),
                drive(
                    "",
                    Some("/machine/peripheral/vda/virtio-backend"),
                    "filter-over-n3"
                ),
                drive("", Some("scsi0-0"), "n4"),
                drive("drv1", None, "n5"),
                drive("", None, "n6/.x"),
            ]),
            json!([
                node("#block1", "qcow2", Some("1.1")),
                node("n2", "raw", None),
                node("n3", "qcow2", Some("0.10")),
                node("n4", "throttle", None),
                node("n5", "qcow2", Some("1.1")),
                node("n6/.x", "qcow2", Some("1.1")),
            ]),
        );
        let names: Vec<&str> = disks.iter().map(|d| d.disk.target.as_str()).collect();
        assert_eq!(
            names,
            ["drv1", "ide0-hd0", "vda", "scsi0-0", "drv1-2", "n6_.x"]
        );
        assert_eq!(disks[2].node, "n3", "the node below our filter");
        let able: Vec<bool> = disks
            .iter()
            .map(|d| d.disk.no_checkpoint.is_none())
            .collect();
        assert_eq!(able, [true, false, false, false, true, true]);
        let bitmaps = &disks[0].disk.bitmaps;
        assert_eq!(bitmaps.len(), 1, "bitmaps without a name belong to filters");
        assert!(bitmaps[0].recording && !bitmaps[0].inconsistent);
    }

    #[test]
    fn a_read_only_disks_bitmaps_go_on_below() {
        let image = |name: &str, below: Option<&str>| {
            let mut all = [
                node(name, "qcow2", Some("1.1")),
                node(&format!("{name}-file"), "file", None),
            ];
            for one in &mut all {
                one["file"] = json!(format!("/i/{name}"));
                one["ro"] = json!(true);
            }
            all[1]["dirty-bitmaps"] = json!([]);
            all[0]["backing_file"] = json!(below.map(|b| format!("/i/{b}")));
            all
        };
        let look = |nodes: Vec<serde_json::Value>| {
            let nodes: Vec<Node> = serde_json::from_value(json!(nodes)).unwrap();
            of_nodes(&[("vda".to_owned(), "top".to_owned())], &nodes).remove(0)
        };
        let chain = || {
            let all = [("base", None), ("mid", Some("base")), ("top", Some("mid"))];
            all.map(|(name, below)| image(name, below)).concat()
        };
        let at = |node: &str| json!({"node": node, "name": "mon"});
        let whole = look(chain());
        assert_eq!(whole.sources("mon"), [at("top"), at("mid"), at("base")]);
        assert!(!whole.disk.bitmaps[0].inconsistent);

        let spoiled = |place: usize, what: &str, value: serde_json::Value| {
            let mut nodes = chain();
            *nodes[place].pointer_mut(what).unwrap() = value;
            look(nodes).disk.bitmaps[0].inconsistent
        };
        assert!(spoiled(2, "/backing_file", json!("/i/lost")), "not found");
        assert!(spoiled(0, "/image/virtual-size", json!(1)), "another size");
        assert!(spoiled(2, "/dirty-bitmaps", json!([])), "a gap");
        assert!(!spoiled(0, "/dirty-bitmaps", json!([])), "younger than it");
        let bad = json!({"name": "mon", "granularity": 1, "count": 0, "inconsistent": true});
        assert!(spoiled(2, "/dirty-bitmaps/1", bad));
        // A disk that is written to: whoever keeps its checkpoints knows the top one only.
        let mut nodes = chain();
        nodes[4]["ro"] = json!(false);
        assert_eq!(look(nodes).sources("mon"), [at("top")]);
    }

    #[test]
    fn drives_that_are_no_disks_are_left_out() {
        let disks = find(
            json!([
                {"device": "cd0", "removable": true, "inserted": {"node-name": "iso", "ro": false}},
                {"device": "cd1", "removable": true},
                {"device": "empty"},
                {"device": "ro", "inserted": {"node-name": "iso", "ro": true}},
            ]),
            json!([node("iso", "raw", None)]),
        );
        assert_eq!(disks, []);
    }
}
