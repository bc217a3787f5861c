//! Fronts for a test's storage daemon.

#![allow(dead_code, clippy::unwrap_used)]

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use fleecefs::model::ServerAddress;
use fleecefs::nbd::{Front, FrontError, Psk};

use crate::common::tools::text;
use crate::common::upstream::Upstream;

/// For clients that behave.
pub const LONG: Duration = Duration::from_secs(60);
pub const KEY: &str = "alice:00112233445566778899aabbccddeeff";

impl Upstream {
    pub fn unix(&self, name: &str) -> ServerAddress {
        ServerAddress::Unix(text(&self.path(name)).to_owned())
    }

    pub fn keys(&self, name: &str, content: &str) -> PathBuf {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        path
    }

    pub fn psk(&self) -> Psk {
        Psk::load(&self.keys("good/keys.psk", &format!("{KEY}\n"))).unwrap()
    }

    pub fn try_front(
        &self,
        address: &ServerAddress,
        exports: &[(&str, &str)],
        psk: Option<Psk>,
        timeout: Duration,
    ) -> Result<Front, FrontError> {
        let owned = exports.iter();
        let owned = owned.map(|&(public, private)| (public.to_owned(), private.to_owned()));
        Front::start(address, self.path("up"), owned.collect(), psk, timeout)
    }

    pub fn front(&self, address: &ServerAddress, psk: Option<Psk>) -> Front {
        let exports = [("vda", "fl-7-vda"), ("vdb", "fl-7-vdb")];
        self.try_front(address, &exports, psk, LONG).unwrap()
    }
}

pub fn tcp(tls: bool) -> ServerAddress {
    ServerAddress::Tcp {
        host: "127.0.0.1".to_owned(),
        port: 0,
        tls,
    }
}

pub fn port(front: &Front) -> u16 {
    front.tcp_addresses()[0].port()
}
