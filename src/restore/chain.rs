//! Images laid over each other, for qemu-img to read as one.
//!
//! Every image is looked at alone before it is used, and what lies below it is told to qemu-img in so
//! many words: a backing file's name comes from a copy's header and may be a name of anything, and in the
//! directories of a series it leads nowhere.
//!
//! An image whose end is missing is refused. QEMU itself takes what is behind the end of a file as zeros.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::files::{refuse, size};
use super::progress::Progress;
use super::qemu_img::run;
use super::{Content, Plan};
use crate::model::{Error, Format, Kind, Result};

/// One image.
pub(super) struct Layer {
    pub(super) path: PathBuf,
    pub(super) format: Format,
}

/// Images from the top down, all checked, and the size of the disk.
pub(super) struct Chain {
    layers: Vec<Layer>,
    pub(super) size: u64,
}

/// What an image says of itself.
struct Header {
    size: u64,
    backing: Option<(String, Option<String>)>,
}

/// The chain that an image is the top of, by the headers.
pub(super) fn plan(
    top: &Path,
    disk: Option<&str>,
    until: Option<&str>,
    progress: &Progress,
) -> Result<Plan> {
    if disk.is_some() {
        return Err(refuse(format!("{} is one disk", top.display())).hint("leave --disk out"));
    }
    if !is_qcow2(top)? {
        return Err(refuse(format!("{} is not a qcow2 image", top.display()))
            .hint("a raw image that is whole needs no restoring: copy it"));
    }
    let mut layers = vec![Layer {
        path: top.to_owned(),
        format: Format::Qcow2,
    }];
    while let Some(lower) = below(&layers, progress)? {
        layers.push(lower);
    }
    let first = match until {
        None => 0,
        Some(until) => {
            let named = |l: &Layer| l.path.file_stem().is_some_and(|stem| stem == until);
            layers.iter().position(named).ok_or_else(|| {
                let message = format!("no image below {} is named {until}", top.display());
                Error::new(Kind::NotFound, message)
            })?
        }
    };
    let layers = layers.split_off(first);
    let path = layers.first().map_or(top, |l| &l.path);
    let instant = path.file_stem().unwrap_or_default().to_string_lossy();
    Ok(Plan {
        what: path.display().to_string(),
        instant: instant.into_owned(),
        unix: None,
        content: Content::Chain(Chain::check(layers, progress)?),
    })
}

/// The image that the last one lies over.
fn below(layers: &[Layer], progress: &Progress) -> Result<Option<Layer>> {
    let Some(layer) = layers.last().filter(|l| l.format == Format::Qcow2) else {
        return Ok(None);
    };
    let Some((name, format)) = header(layer, progress)?.backing else {
        return Ok(None);
    };
    let format = match format.as_deref() {
        Some("qcow2") => Format::Qcow2,
        Some("raw") => Format::Raw,
        other => {
            let image = layer.path.display();
            let message = match other {
                Some(other) => format!("{image} lies over an image of the format {other}"),
                None => format!("{image} does not say of which format its backing file {name} is"),
            };
            let hint = "say qcow2 or raw with qemu-img rebase -u -b FILE -F FORMAT";
            return Err(refuse(message).hint(hint));
        }
    };
    let dir = layer.path.parent().unwrap_or(Path::new(""));
    let path = dir.join(&name);
    if !path.is_file() {
        return Err(refuse(format!(
            "there is a gap: {} is since {name}, and there is no such file beside it",
            layer.path.display()
        ))
        .hint("put it there, or name another with qemu-img rebase -u -b FILE -F FORMAT"));
    }
    if layers.len() > MOST {
        return Err(refuse(format!(
            "there are over {MOST} images below each other, or they go round in a circle"
        )));
    }
    Ok(Some(Layer { path, format }))
}

/// Images that may lie over each other. QEMU's own limit is of this order.
const MOST: usize = 200;

impl Chain {
    /// Checks images that lie over each other, the top one first.
    pub(super) fn check(layers: Vec<Layer>, progress: &Progress) -> Result<Self> {
        let mut disk = None;
        for layer in &layers {
            let size = match layer.format {
                Format::Raw => size(&layer.path)?.next_multiple_of(512),
                Format::Qcow2 => {
                    sound(layer, progress)?;
                    header(layer, progress)?.size
                }
            };
            match disk {
                Some(top) if top != size => {
                    return Err(refuse(format!(
                        "the disk has {size} bytes in {} and {top} in the images above it",
                        layer.path.display()
                    ))
                    .hint("a disk that was resized begins a new series with all of it"));
                }
                _ => disk = Some(size),
            }
        }
        Ok(Self {
            layers,
            size: disk.unwrap_or_default(),
        })
    }

    /// All of them as one image, in the words of qemu-img.
    pub(super) fn spec(&self) -> Result<String> {
        let mut below: Option<Value> = None;
        for layer in self.layers.iter().rev() {
            let mut node = node(layer)?;
            if layer.format == Format::Qcow2
                && let Some(map) = node.as_object_mut()
            {
                map.insert("backing".to_owned(), below.take().unwrap_or(Value::Null));
            }
            below = Some(node);
        }
        Ok(format!("json:{}", below.unwrap_or_default()))
    }
}

/// A single image in the words of qemu-img, with nothing below it.
fn alone(layer: &Layer) -> Result<String> {
    let mut node = node(layer)?;
    if let Some(map) = node.as_object_mut() {
        map.insert("backing".to_owned(), Value::Null);
    }
    Ok(format!("json:{node}"))
}

fn node(layer: &Layer) -> Result<Value> {
    let path = layer.path.to_str().ok_or_else(|| {
        refuse(format!(
            "qemu-img cannot be told of the name {}",
            layer.path.display()
        ))
    })?;
    let file = json!({ "driver": "file", "filename": path });
    Ok(json!({ "driver": layer.format.word(), "file": file }))
}

fn is_qcow2(path: &Path) -> Result<bool> {
    let failed = |e| super::files::failed("read", path, &e);
    let mut magic = Vec::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    std::io::Read::read_to_end(&mut std::io::Read::take(file, 4), &mut magic).map_err(failed)?;
    Ok(magic == *b"QFI\xfb")
}

fn header(layer: &Layer, progress: &Progress) -> Result<Header> {
    let tried = format!("read {}", layer.path.display());
    if !is_qcow2(&layer.path)? {
        return Err(refuse(format!(
            "{} is not a qcow2 image",
            layer.path.display()
        )));
    }
    let said = run(&["info", "--output=json", &alone(layer)?], progress)?.ok(&tried)?;
    let said: Value = serde_json::from_str(&said).unwrap_or_default();
    let word = |name: &str| said.get(name).and_then(Value::as_str).map(str::to_owned);
    if said.pointer("/format-specific/data/data-file").is_some() {
        return Err(refuse(format!(
            "{} keeps its data in another file",
            layer.path.display()
        )));
    }
    let size = said.get("virtual-size").and_then(Value::as_u64);
    let size = size.ok_or_else(|| refuse(format!("{tried}: qemu-img does not tell its size")))?;
    let backing = word("backing-filename").map(|name| (name, word("backing-filename-format")));
    Ok(Header { size, backing })
}

/// The image is in order, and all of it is there.
fn sound(layer: &Layer, progress: &Progress) -> Result<()> {
    let alone = alone(layer)?;
    let name = layer.path.display();
    let check = run(&["check", "-q", &alone], progress)?;
    match check.code {
        // 3: there is space that nothing uses.
        Some(0 | 3) => {}
        Some(2) => {
            return Err(
                refuse(format!("{name} is damaged: {}", first_line(&check.stderr)))
                    .hint("copy it again"),
            );
        }
        _ => return Err(check.failure(&format!("check {name}"))),
    }
    let map = run(&["map", "--output=json", &alone], progress)?.ok(&format!("read {name}"))?;
    let map: Vec<Value> = serde_json::from_str(&map).unwrap_or_default();
    let number = |e: &Value, key: &str| e.get(key).and_then(Value::as_u64);
    let end = |e: &Value| number(e, "offset")?.checked_add(number(e, "length")?);
    let end = map.iter().filter_map(end).max().unwrap_or_default();
    let size = size(&layer.path)?;
    if end > size {
        return Err(refuse(format!(
            "{name} is cut short: it has {size} bytes, and its data ends at {end}"
        ))
        .hint("copy it again"));
    }
    Ok(())
}

fn first_line(text: &str) -> &str {
    text.lines()
        .find(|l| !l.is_empty())
        .unwrap_or("qemu-img check fails")
}
