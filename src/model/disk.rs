//! A domain's disks and what their maps are made of.

/// Who the domain is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainInfo {
    /// Its name.
    pub name: String,
    /// Its UUID in the usual text form, where it has one.
    pub uuid: Option<String>,
    /// What identifies it across restarts, usable as a file name: the state directory's key.
    pub key: String,
}

/// A disk of the domain as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// The disk target: libvirt's word for the disk's name in the domain, such as `vda`.
    pub target: String,
    /// Guest-visible size in bytes.
    pub size: u64,
    /// Format driver, in QEMU's words: `qcow2`, `raw`.
    pub format: String,
    /// The image, where it is a file or a device.
    pub file: Option<String>,
    /// The files of the images below it, top first, as far as they are known and of use: where bitmaps
    /// are handed on to the image of a snapshot, the disk is the same whose image is now among these.
    pub backing: Vec<String>,
    /// Why the disk cannot be frozen, if it cannot: QEMU does not read and write it itself.
    pub no_backup: Option<String>,
    /// Why the disk cannot carry a persistent dirty bitmap, if it cannot.
    pub no_checkpoint: Option<String>,
    /// The dirty bitmaps on the disk's top node, whoever made them.
    pub bitmaps: Vec<Bitmap>,
}

impl Disk {
    /// The image's path, where it has one that means the same file tomorrow: not one that is relative,
    /// QEMU's JSON for what a path cannot say, or a number of a set of open files.
    pub fn path(&self) -> Option<&str> {
        let path = self.file.as_deref();
        path.filter(|p| p.starts_with('/') && !p.starts_with("/dev/fdset/"))
    }
}

/// A dirty bitmap as the domain reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bitmap {
    /// Its name: for fleecefs' own the checkpoint's name, as with libvirt.
    pub name: String,
    /// Guest writes are being recorded.
    pub recording: bool,
    /// It was not saved cleanly and can only be removed.
    pub inconsistent: bool,
    /// It is kept in the image when the domain stops.
    pub persistent: bool,
    /// Bytes a bit stands for.
    pub granularity: u64,
    /// Bytes marked dirty.
    pub dirty_bytes: u64,
}

/// What a disk holds at an offset, as NBD's `base:allocation` says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Allocation {
    /// The image has no space allocated here.
    pub hole: bool,
    /// It reads as zeros.
    pub zero: bool,
}

impl Allocation {
    /// Allocated, and with content that must be read to be known.
    pub const DATA: Self = Self {
        hole: false,
        zero: false,
    };
    /// Nothing allocated; reads as zeros.
    pub const HOLE: Self = Self {
        hole: true,
        zero: true,
    };
    /// Allocated; known to read as zeros.
    pub const ZERO: Self = Self {
        hole: false,
        zero: true,
    };
}

/// What became of an offset since a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Change {
    /// Not written since.
    Clean,
    /// Written since; the content must be read.
    Dirty,
    /// Written since, and now reads as zeros.
    DirtyZero,
}
