//! fleecefs mounts a QEMU/KVM domain as a directory: checkpoints and backups of a running guest,
//! as files.
//!
//! The modules are layers. Each one names only those below it in this list; `tests/layers.rs`
//! holds that, and that nothing but [`fuse`] names the `fuser` crate:
//!
//! | layer | what it is |
//! |---|---|
//! | [`cli`] | the command line, mounting and daemon life |
//! | [`restore`] | puts a disk together from what backups left: files, no mount |
//! | [`fuse`] | decodes kernel requests, calls [`vfs`], replies |
//! | [`vfs`] | names, inodes, open files, in types of its own |
//! | [`engine`] | life cycles of checkpoints and backups: a [`engine::Domain`] |
//! | [`view`] | what a file shows: extents in, bytes out; pure |
//! | [`backend`] | what a source of disks must be able to do, and the sources |
//! | [`qmp`], [`nbd`], [`xml`] | wire formats; none knows another |
//! | [`model`] | words: checkpoint, backup, disk, extent, name, error; no I/O |

//!
//! Without a mount, [`Domain`] is the API: [`backend::Source`] finds a domain, [`engine::Store`] keeps
//! what is known of its checkpoints, and the table at [`Domain`] says which call is which.
//!
//! ```no_run
//! use fleecefs::backend::{Places, Source};
//! use fleecefs::engine::{Options, Store};
//! use fleecefs::model::Name;
//! use fleecefs::Domain;
//!
//! # fn main() -> fleecefs::model::Result<()> {
//! let backend = Source::Qmp("/run/vm.qmp".into()).open(&Places::default())?;
//! let store = Store::open("/var/lib/fleecefs/vm".as_ref())?;
//! let domain = Domain::open(backend, store, Options::default())?;
//! let backup = domain.begin_backup(Name::new("tue")?)?;
//! let mut sector = [0; 512];
//! backup.read_at(0, 0, &mut sector)?;
//! domain.end_backup(backup.name())?;
//! domain.close()
//! # }
//! ```

pub mod backend;
pub mod cli;
pub mod engine;
pub mod fuse;
pub mod model;
pub mod nbd;
pub mod qmp;
pub mod restore;
pub mod vfs;
pub mod view;
pub mod xml;

pub use engine::Domain;
