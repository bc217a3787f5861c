//! The only user of fuser: decodes what the kernel asks, calls [`crate::vfs`], replies; mounts and
//! unmounts.
//!
//! ```text
//!   /dev/fuse ── 2 event loops ─┬─ names, attributes, texts: answered at once
//!                               ├─ reads of disks ──────────▶ 8 readers
//!                               └─ what asks the domain ────▶ 8 askers
//! ```
//!
//! The event loops never wait for the domain. So a domain that hangs, or a slow mkdir, holds up
//! neither `ls` nor reads of another backup; only what needs the same answer waits, with a
//! deadline.
//!
//! Mounting and unmounting are done here rather than by fuser: its own teardown (0.18.0) may unmount
//! a stranger's mount on the same path after ours was unmounted from outside.

mod adapter;
mod convert;
mod errno;
mod mount;
mod mountinfo;
mod session;
mod workers;

pub use mount::{Heal, answers, heal, unmount};
pub use mountinfo::{MountEntry, TYPE, at as mount_at, canonical};
pub use session::{MountOptions, Mounted, Unmounted, mount};
