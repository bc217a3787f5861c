//! The door for NBD clients from outside: what a backup's `<server>` asks for, and the refusals.

use std::path::PathBuf;

use super::source::Places;
use crate::model::{Error, Kind, Result, ServerAddress};
use crate::nbd;

/// Opens it: `exports` are pairs of the public and the private name, of the server at `upstream`.
pub(super) fn open(
    address: &ServerAddress,
    upstream: PathBuf,
    exports: Vec<(String, String)>,
    places: &Places,
) -> Result<nbd::Front> {
    let keys = match (address, &places.tls_psk) {
        (ServerAddress::Tcp { tls: true, .. }, Some(path)) => {
            Some(nbd::Psk::load(path).map_err(refused)?)
        }
        _ => None,
    };
    nbd::Front::start(address, upstream, exports, keys, places.timeout).map_err(refused)
}

/// One that did not open, for users.
fn refused(error: nbd::FrontError) -> Error {
    let text = error.to_string();
    match error {
        nbd::FrontError::InUse { .. } => Error::new(Kind::Busy, text)
            .hint("choose another address, or remove what is there if nobody uses it"),
        nbd::FrontError::NoKeys { .. } | nbd::FrontError::Keys { .. } => {
            Error::new(Kind::Invalid, text).hint("psktool -u NAME -p FILE makes a key file")
        }
        nbd::FrontError::Listen { .. } => Error::new(Kind::Io, text),
    }
}
