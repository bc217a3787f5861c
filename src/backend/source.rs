//! What can be mounted, and how to get at it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::qemu::Qemu;
use super::{Backend, storage_daemon};
use crate::model::{Error, Kind, Result};

/// Something whose disks can be mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Images of a stopped domain, in the order of its disks.
    Images(Vec<PathBuf>),
    /// The QMP socket of a running QEMU.
    Qmp(PathBuf),
    /// A domain of libvirt, by name.
    Libvirt(String),
}

/// Where a backend may put things, and how long it waits.
#[derive(Debug, Clone)]
pub struct Places {
    /// Deadline of every wait for the domain.
    pub timeout: Duration,
    /// Directory for sockets; a private directory is made below it.
    pub runtime: PathBuf,
    /// Directory for scratch space, where what the guest overwrites is kept while a backup runs.
    pub scratch: PathBuf,
    /// Bytes of scratch space that one backup may take.
    pub scratch_limit: Option<u64>,
    /// Image format of [`Source::Images`], where it is not to be told from the file.
    pub format: Option<String>,
    /// Name of the domain, where the source has none; it also names the state directory.
    pub domain: Option<String>,
    /// Has the guest's file systems frozen while a backup begins.
    pub quiesce: bool,
    /// The guest agent's socket, for [`Source::Qmp`].
    pub guest_agent: Option<PathBuf>,
    /// Where libvirt is.
    pub uri: String,
    /// Keys of NBD clients from outside, for addresses that have TLS.
    pub tls_psk: Option<PathBuf>,
}

impl Default for Places {
    /// Those of the mount's options, for root.
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(30),
            runtime: "/run/fleecefs".into(),
            scratch: "/var/lib/fleecefs/scratch".into(),
            scratch_limit: None,
            format: None,
            domain: None,
            quiesce: false,
            guest_agent: None,
            uri: "qemu:///system".to_owned(),
            tls_psk: None,
        }
    }
}

impl Source {
    /// Reads the command line's words: `qmp:PATH`, `libvirt:NAME`, or one or more paths of images.
    pub fn parse(words: &[String]) -> Result<Self> {
        let invalid = |message: String| Err(Error::new(Kind::Invalid, message));
        match words {
            [] => invalid("no source given".to_owned()),
            [one] if one.starts_with("qmp:") => Ok(Self::Qmp(PathBuf::from(&one[4..]))),
            [one] if one.starts_with("libvirt:") => Ok(Self::Libvirt(one[8..].to_owned())),
            many => match many
                .iter()
                .find(|w| w.starts_with("qmp:") || w.starts_with("libvirt:"))
            {
                Some(word) => invalid(format!("{word} must be the only source")),
                None => Ok(Self::Images(many.iter().map(PathBuf::from).collect())),
            },
        }
    }

    /// What is said of the guest's agent must make sense for the source.
    fn can_quiesce(&self, places: &Places) -> Result<()> {
        let (message, hint) = match (self, places.quiesce, &places.guest_agent) {
            (Self::Images(_), true, _) => (
                "images have no guest whose file systems could be frozen",
                "leave quiesce off",
            ),
            (Self::Qmp(_), true, None) => (
                "quiesce needs the guest agent",
                "say where its socket is: -o guest-agent=PATH",
            ),
            (Self::Images(_) | Self::Libvirt(_), _, Some(_)) => (
                "guest-agent= is for the source qmp:PATH only",
                "leave it off; libvirt finds the agent by itself",
            ),
            (_, false, Some(_)) => (
                "guest-agent= says nothing without quiesce",
                "say -o quiesce as well",
            ),
            _ => return Ok(()),
        };
        Err(Error::new(Kind::Invalid, message).hint(hint))
    }

    /// Connects to the domain. Nothing of it is changed yet.
    pub fn open(&self, places: &Places) -> Result<Arc<dyn Backend>> {
        self.can_quiesce(places)?;
        Ok(Arc::new(match self {
            Self::Images(images) => storage_daemon::open(images, places)?,
            Self::Qmp(socket) => Qemu::connect(socket.clone(), places)?,
            #[cfg(feature = "libvirt")]
            Self::Libvirt(name) => return super::libvirt::open(name, places),
            #[cfg(not(feature = "libvirt"))]
            Self::Libvirt(name) => {
                return Err(Error::new(
                    Kind::Unsupported,
                    format!("this fleecefs was built without libvirt, so {name} cannot be found"),
                )
                .hint("build it with --features libvirt"));
            }
        }))
    }
}
