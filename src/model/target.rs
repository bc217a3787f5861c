//! Where a push backup writes, and where a pull backup can be read besides in the mount.

/// Where an image is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Image {
    /// In a file of this path.
    File(String),
    /// On a block device of this path.
    Block(String),
}

impl Image {
    /// The path.
    pub fn path(&self) -> &str {
        match self {
            Self::File(path) | Self::Block(path) => path,
        }
    }
}

/// The format of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The bytes of the disk and nothing else.
    Raw,
    /// QEMU's own format.
    Qcow2,
}

impl Format {
    /// QEMU's word for it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// What one disk of a push backup is written to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Where it is.
    pub image: Image,
    /// Its format.
    pub format: Format,
    /// It is there already, made for this by somebody else: libvirt's REUSE_EXTERNAL. Otherwise it
    /// is made, and must not be there.
    pub existing: bool,
}

/// What an NBD server listens on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServerAddress {
    /// A UNIX socket of this path.
    Unix(String),
    /// A TCP port.
    Tcp {
        /// Name or address of the interface.
        host: String,
        /// The port.
        port: u16,
        /// With TLS only.
        tls: bool,
    },
}
