//! A domain and its mount, whichever backend is behind them; and in one place what the backends cannot
//! help doing differently.

use std::path::PathBuf;

use crate::common::{Tree, Write};

/// The disks of every world. The second one ends in the middle of a granule, and of a page.
pub const DISKS: [(&str, u64); 2] = [("vda", 4 << 20), ("vdb", (2 << 20) + 512)];

/// What every world is mounted with, as `-o slice-size=`.
pub const SLICE: u64 = 1 << 20;

/// Which checkpoints a running backup lists the changes since.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Since {
    /// Every one that can be trusted.
    All,
    /// Its base only.
    Base,
}

/// Where the backends differ. All else is the same, and whatever is refused is refused with an errno
/// and a sentence that the suite looks at.
#[derive(Clone, Copy)]
pub struct Facts {
    /// Bytes that a bit of a dirty bitmap stands for.
    pub granule: u64,
    /// Several backups at once; otherwise EBUSY.
    pub several_backups: bool,
    pub since: Since,
    /// Checkpoints can be renamed; otherwise EOPNOTSUPP.
    pub rename: bool,
    /// `-o granularity=` is obeyed; otherwise EOPNOTSUPP.
    pub granularity: bool,
    /// A document may choose a bitmap's name; otherwise EOPNOTSUPP.
    pub bitmap_names: bool,
    /// A pull backup may have a `<server>`; otherwise EOPNOTSUPP. QEMU before 8.0 would show others newer
    /// data.
    pub server: bool,
    /// The targets of push backups are written; otherwise they live as any other and write nothing.
    pub push_writes: bool,
    /// A push backup can be paused, resumed and slowed down; otherwise EOPNOTSUPP.
    pub push_control: bool,
    /// A checkpoint's bitmap holds what changed up to the next one, so that one which is forgotten takes
    /// the trust in those before it along. Otherwise each holds all that changed since.
    pub chained_bitmaps: bool,
    /// What is said of somebody else who has what a backup needs.
    pub intruder: &'static str,
}

/// The simulated domain.
pub const SIM: Facts = Facts {
    granule: 4096,
    several_backups: true,
    since: Since::All,
    rename: true,
    granularity: false,
    bitmap_names: true,
    server: false,
    push_writes: false,
    push_control: true,
    chained_bitmaps: true,
    intruder: "begin fails as asked",
};

/// A QEMU behind QMP.
pub const QMP: Facts = Facts {
    granule: 65536,
    several_backups: true,
    since: Since::All,
    rename: true,
    granularity: true,
    bitmap_names: true,
    server: true,
    push_writes: true,
    push_control: true,
    chained_bitmaps: true,
    intruder: "NBD server",
};

/// A domain of libvirt.
#[cfg(feature = "libvirt")]
pub const LIBVIRT: Facts = Facts {
    granule: 65536,
    several_backups: false,
    since: Since::Base,
    rename: false,
    granularity: false,
    bitmap_names: false,
    server: true,
    push_writes: true,
    push_control: false,
    chained_bitmaps: false,
    intruder: "a pull backup that someone else",
};

/// A domain with [`DISKS`], all zeros, and its mount.
pub trait World {
    /// In what it differs from the others.
    fn facts(&self) -> Facts;

    /// The mounted tree.
    fn tree(&self) -> Tree;

    /// Mounts it, with more options: `KEY=VALUE`, or `checkpoint=no`.
    fn mount(&mut self, options: &[&str]);

    /// Unmounts it, and fails if a file or process is left.
    fn unmount(&mut self);

    /// Kills what serves the mount with SIGKILL, and unmounts what is left. Not called where that would
    /// end the test as well.
    fn kill(&mut self);

    /// The guest writes, on disks by their target.
    fn guest_writes(&self, writes: &[(&str, Write)]);

    /// All there is in the domain that is of a checkpoint or a backup: sorted lines, those of
    /// checkpoints beginning with `bitmap` or `checkpoint`.
    fn state(&self) -> Vec<String>;

    /// Ends the domain: properly, or with SIGKILL.
    fn end_domain(&mut self, killed: bool);

    /// Starts it again.
    fn start_domain(&mut self);

    /// The domain answers nothing, or answers again.
    fn hang(&self, hung: bool);

    /// Somebody makes a disk larger.
    fn resize(&self, target: &str, size: u64);

    /// Somebody else has what a backup needs, or has it no more.
    fn intrude(&mut self, there: bool);

    /// A directory that the domain may write to.
    fn dir(&self) -> PathBuf;

    /// Lets push backups that run come to their end, where they would not by themselves.
    fn let_pushes_end(&self) {}
}
