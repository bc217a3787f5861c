//! What the tests against real programs share: a QEMU, a mount, a model of a disk, and a QMP peer
//! that misbehaves on demand. Only `domain` and `copies` use the crate under test.

#![allow(
    dead_code,
    unused_imports,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic
)]

pub mod console;
pub mod copies;
pub mod domain;
pub mod fault;
pub mod image;
pub mod libvirtd;
pub mod model;
pub mod mount;
pub mod process;
pub mod qemu;
pub mod qmp;
pub mod restoring;
pub mod tools;
pub mod tree;
pub mod upstream;

pub use console::Console;
pub use copies::Night;
pub use fault::{Fault, QmpFault};
pub use model::{Disk, MapLine, Marks, Rng, Write, parse_map};
pub use mount::Fleecefs;
pub use qemu::{Qemu, State};
pub use qmp::Qmp;
pub use restoring::Place;
pub use tools::{eventually, tool};
pub use tree::{Tree, errno};
