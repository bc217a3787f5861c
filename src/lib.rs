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
