//! Why a front cannot be opened, told apart by what the caller can do about it.

use std::io;
use std::path::PathBuf;

/// A front that did not start. The texts are complete in themselves, as [`super::super::Error`]'s.
#[derive(Debug, thiserror::Error)]
pub enum FrontError {
    /// Something is there already: a file of any kind, or a listener on the port.
    #[error("NBD server: {address} is in use")]
    InUse {
        /// The path, or host and port.
        address: String,
    },
    /// The address cannot be listened on.
    #[error("NBD server: cannot listen on {address}: {error}")]
    Listen {
        /// The path, or host and port.
        address: String,
        /// What the system said.
        error: io::Error,
    },
    /// TLS is asked for, and there are no keys.
    #[error("NBD server: tls='yes' for {address} needs the option tls-psk=FILE")]
    NoKeys {
        /// Host and port.
        address: String,
    },
    /// The key file cannot be used.
    #[error("the key file {}: {why}", path.display())]
    Keys {
        /// The file.
        path: PathBuf,
        /// What is wrong with it; never a key.
        why: String,
    },
}

impl FrontError {
    pub(super) fn listen(address: &str, error: io::Error) -> Self {
        let address = address.to_owned();
        match error.kind() {
            io::ErrorKind::AddrInUse => Self::InUse { address },
            _ => Self::Listen { address, error },
        }
    }
}
