//! What the file system answers with, in types that know no kernel interface.

use std::ffi::OsString;
use std::time::{Duration, SystemTime};

use super::node::{FileKind, Ino};

/// How long the kernel may keep what can never change. (The name of it goes with its directory.)
pub(super) const FOREVER: Duration = Duration::from_secs(24 * 3600);

/// How long the kernel may keep names that only operations through it change.
pub(super) const SHORTLY: Duration = Duration::from_secs(1);

/// The attributes of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attr {
    /// Inode number.
    pub ino: Ino,
    /// Size in bytes.
    pub size: u64,
    /// Allocated blocks of 512 bytes.
    pub blocks: u64,
    /// When the content last changed.
    pub mtime: SystemTime,
    /// What sort of file it is.
    pub kind: FileKind,
    /// Permission bits.
    pub perm: u16,
    /// Number of names; for a directory 2 and one for each directory in it.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// A file that was found under a name, and how long that may be believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// The file's attributes.
    pub attr: Attr,
    /// How long the attributes hold.
    pub attr_ttl: Duration,
    /// How long the name means this file.
    pub name_ttl: Duration,
    /// Tells apart what had the same inode number at different times: nothing that the kernel keeps
    /// of another generation is of any use.
    pub generation: u64,
}

/// What a file that was opened is read with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Handle(pub u64);

/// An opened file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Opened {
    /// Stands for it in reads, until it is released.
    pub handle: Handle,
    /// How its content may be cached.
    pub caching: Caching,
}

/// A file that was created and opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Created {
    /// What is known of it.
    pub found: Found,
    /// The opened file.
    pub opened: Opened,
}

/// How the content of an opened file may be cached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caching {
    /// It never changes: pages may be kept from one opening to the next.
    Keep,
    /// Every opening may show something else: no page of it is kept or shared.
    Bypass,
}

/// A name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry {
    /// The name.
    pub name: OsString,
    /// The file's inode number.
    pub ino: Ino,
    /// What sort of file it is.
    pub kind: FileKind,
}

/// Where lseek(2) is to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seek {
    /// SEEK_DATA
    Data,
    /// SEEK_HOLE
    Hole,
}

/// What an operation that would change a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// chmod, chown, truncate, utimens
    Attributes,
    /// open for writing
    Content,
    /// mknod
    Create,
    /// symlink
    Symlink,
    /// link
    Link,
    /// unlink
    Unlink,
    /// rename that exchanges two names, or leaves something in place of one
    Exchange,
    /// setxattr, removexattr
    ExtendedAttributes,
}

/// Something whose answer may have to come from the domain, and so may take up to its deadline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    /// [`getattr`](super::Vfs::getattr)
    Attributes,
    /// [`open`](super::Vfs::open)
    Open,
    /// [`lseek`](super::Vfs::lseek)
    Seek,
    /// [`write`](super::Vfs::write), [`setattr`](super::Vfs::setattr)
    Write,
    /// [`flush`](super::Vfs::flush)
    Flush,
}
