//! The first cluster of the file: what the file is, and the name of its backing file.
//!
//! ```text
//!   0     magic "QFI\xfb", version 3, backing name (where, how long), cluster bits, guest size
//!   32    no encryption; L1 table (entries, where); refcount table (where, clusters)
//!   60    no snapshots; no feature bits; refcounts of 2^4 bits; length of the header
//!   104   extensions: format of the backing file, padded to 8 bytes; end
//!         name of the backing file
//! ```

use super::layout::{Layout, Part};

/// The file that whatever is absent is read from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backing {
    /// Its name as QEMU is to find it: relative to the overlay, unless absolute. A name with a colon
    /// in its first part is a URL to QEMU.
    pub name: String,
    /// Its format, so that QEMU need not guess from what a guest can write.
    pub format: Format,
}

/// A format of a backing file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// A plain image.
    Raw,
    /// A qcow2 image.
    Qcow2,
}

const LENGTH: u32 = 104;
const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Of the refcounts: log2 of their bits.
const REFCOUNT_ORDER: u32 = 4;

/// The header's bytes; zeros follow them to the end of the cluster.
pub(super) fn header(layout: &Layout, guest: u64, backing: Option<&Backing>) -> Vec<u8> {
    let extensions = backing.map_or_else(Vec::new, |b| extension(b.format));
    let name = backing.map_or("", |b| &b.name);
    // The end of extensions is one more, of type 0 and length 0.
    let name_at = u64::from(LENGTH) + extensions.len() as u64 + 8;
    let table = layout.range(Part::RefcountTable);
    let l1 = layout.range(Part::L1);

    let mut out = Vec::new();
    out.extend(b"QFI\xfb");
    out.extend(3u32.to_be_bytes());
    out.extend(if name.is_empty() { 0 } else { name_at }.to_be_bytes());
    out.extend((name.len() as u32).to_be_bytes());
    out.extend(layout.bits().to_be_bytes());
    out.extend(guest.to_be_bytes());
    out.extend(0u32.to_be_bytes()); // encryption
    out.extend((layout.l1_entries() as u32).to_be_bytes());
    out.extend(if l1.is_empty() { 0 } else { l1.start }.to_be_bytes());
    out.extend(table.start.to_be_bytes());
    out.extend((((table.end - table.start) >> layout.bits()) as u32).to_be_bytes());
    out.extend([0; 4 + 8]); // snapshots: how many, where
    out.extend([0; 3 * 8]); // features: incompatible, compatible, auto-clear
    out.extend(REFCOUNT_ORDER.to_be_bytes());
    out.extend(LENGTH.to_be_bytes());
    out.extend(extensions);
    out.extend([0; 8]);
    out.extend(name.as_bytes());
    out
}

fn extension(format: Format) -> Vec<u8> {
    let name = match format {
        Format::Raw => "raw",
        Format::Qcow2 => "qcow2",
    };
    let mut out = Vec::new();
    out.extend(BACKING_FORMAT.to_be_bytes());
    out.extend((name.len() as u32).to_be_bytes());
    out.extend(name.as_bytes());
    out.resize(16, 0);
    out
}
