//! Words of the command line.

use clap::{Parser, Subcommand};

use super::options;

#[derive(Debug, Parser)]
#[command(name = "fleecefs", version, about, max_term_width = 100, after_help = EXAMPLES)]
pub(super) struct Args {
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Mount a domain on a directory
    ///
    /// Returns when the mount can be used; a daemon serves it until it is unmounted.
    #[command(
        override_usage = "fleecefs mount [-f] [-o OPT[,OPT...]]... SOURCE... DIR",
        after_help = options::help(),
    )]
    Mount(Mount),
    /// Unmount, ending all running backups
    ///
    /// Returns when nothing is left behind in the domain.
    Umount(Umount),
    /// List what can be mounted: libvirt's domains, and QMP sockets in the usual places
    ///
    /// The places are /run, /run/qemu, /run/qemu-server and $XDG_RUNTIME_DIR, the names those that end
    /// in qmp, fleece or qmp.sock.
    #[command(after_help = "\
Example:
  fleecefs list")]
    List(Sources),
    /// List, delete and describe checkpoints
    ///
    /// They are made with mkdir, deleted with rmdir and renamed with mv; these do what that cannot.
    #[command(subcommand)]
    Checkpoint(Checkpoint),
    /// List the backups that run
    #[command(after_help = "\
Of a push backup it asks QEMU how far it is.

Example:
  fleecefs jobs /mnt/vm")]
    Jobs(Jobs),
    /// Follow what happens to backups and checkpoints, one JSON object a line
    ///
    /// Ends when the mount does.
    #[command(after_help = "\
Example, waiting for the end of a push backup:
  fleecefs events /mnt/vm | grep -m1 job-completed")]
    Events(Events),
    /// Put a disk together from what its backups left behind
    ///
    /// Needs no mount. Refuses a series with a gap, and files that are not of one domain and one
    /// instant. The output gets its name when it is whole and was read back.
    #[command(
        override_usage = "fleecefs restore [--disk TARGET] [--until NAME] [--format raw|qcow2] \
                          [--force] SOURCE... OUTPUT",
        after_help = RESTORES,
    )]
    Restore(Restore),
}

#[derive(Debug, Subcommand)]
pub(super) enum Checkpoint {
    /// List checkpoints: name, creation time, bytes changed since at most
    #[command(after_help = "\
Examples:
  fleecefs checkpoint list /mnt/vm
  fleecefs checkpoint list --tree /mnt/vm
  fleecefs checkpoint list --from mon --descendants --no-size /mnt/vm")]
    List(List),
    /// Delete a checkpoint, or those that followed it
    ///
    /// The newest goes first. What a deleted one recorded goes to the one before it.
    #[command(after_help = "\
Examples:
  fleecefs checkpoint delete mon /mnt/vm          the same as rmdir /mnt/vm/checkpoints/mon
  fleecefs checkpoint delete --children mon /mnt/vm")]
    Delete(Delete),
    /// Print the document that describes a checkpoint
    #[command(after_help = "\
Example, to have a checkpoint again where its record was lost:
  fleecefs checkpoint dump mon /mnt/vm > mon.xml
  cp mon.xml /mnt/vm/checkpoints/")]
    Dump(Dump),
}

#[derive(Debug, Default, clap::Args)]
pub(super) struct List {
    /// As a tree
    #[arg(long, conflicts_with_all = ["roots", "leaves", "no_leaves", "topological", "parent"])]
    pub(super) tree: bool,
    /// Only those without a parent
    #[arg(long, conflicts_with = "from")]
    pub(super) roots: bool,
    /// Only those without children
    #[arg(long, conflicts_with = "no_leaves")]
    pub(super) leaves: bool,
    /// Only those with children
    #[arg(long)]
    pub(super) no_leaves: bool,
    /// Each one after its parent, not by name
    #[arg(long)]
    pub(super) topological: bool,
    /// Only the children of this one
    #[arg(long, value_name = "NAME")]
    pub(super) from: Option<String>,
    /// And their children, and so on
    #[arg(long, requires = "from")]
    pub(super) descendants: bool,
    /// Also the parent of each
    #[arg(long)]
    pub(super) parent: bool,
    /// Without what changed since, for which the domain is asked once a checkpoint
    #[arg(long)]
    pub(super) no_size: bool,
    /// The mount point
    pub(super) dir: std::path::PathBuf,
}

#[derive(Debug, clap::Args)]
pub(super) struct Sources {
    /// Where libvirt is [default: qemu:///system, if there is one]
    #[arg(long)]
    pub(super) uri: Option<String>,
}

#[derive(Debug, clap::Args)]
pub(super) struct Delete {
    /// Also all that followed it
    #[arg(long)]
    pub(super) children: bool,
    /// All that followed it, and not itself
    #[arg(long, conflicts_with = "children")]
    pub(super) children_only: bool,
    /// Only what fleecefs remembers; the bitmaps stay in the images
    #[arg(long)]
    pub(super) metadata: bool,
    /// The checkpoint
    pub(super) name: String,
    /// The mount point
    pub(super) dir: std::path::PathBuf,
}

#[derive(Debug, clap::Args)]
pub(super) struct Dump {
    /// Without the domain
    #[arg(long)]
    pub(super) no_domain: bool,
    /// With what changed since at most, in bytes a disk
    #[arg(long)]
    pub(super) size: bool,
    /// The checkpoint
    pub(super) name: String,
    /// The mount point
    pub(super) dir: std::path::PathBuf,
}

#[derive(Debug, clap::Args)]
pub(super) struct Jobs {
    /// The mount point
    pub(super) dir: std::path::PathBuf,
}

#[derive(Debug, clap::Args)]
pub(super) struct Events {
    /// Also what happened before, as far as the mount remembers
    #[arg(long)]
    pub(super) all: bool,
    /// The mount point
    pub(super) dir: std::path::PathBuf,
}

#[derive(Debug, clap::Args)]
pub(super) struct Mount {
    /// Stay in the foreground and log to stderr
    #[arg(short, long)]
    pub(super) foreground: bool,
    /// Options, see below
    #[arg(short, value_name = "OPT[,OPT...]")]
    pub(super) options: Vec<String>,
    /// What to mount, and where: disk images of a stopped domain,
    /// qmp:SOCKET of a running one, or libvirt:NAME
    #[arg(required = true, num_args = 2.., value_names = ["SOURCE", "DIR"])]
    pub(super) words: Vec<String>,
    /// Be the daemon: tell on stdout when the mount can be used, or why not.
    #[arg(long, hide = true)]
    pub(super) ready: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct Umount {
    /// Even if files are open: who reads them gets errors
    #[arg(short, long)]
    pub(super) lazy: bool,
    /// The mount point
    pub(super) dir: std::path::PathBuf,
}

#[derive(Debug, clap::Args)]
pub(super) struct Restore {
    /// The disk to restore, where there are several
    #[arg(long, value_name = "TARGET")]
    pub(super) disk: Option<String>,
    /// The generation to stop at, by the name of its backup or checkpoint (the newest)
    #[arg(long, value_name = "NAME")]
    pub(super) until: Option<String>,
    /// Format of the output
    #[arg(long, value_enum, default_value = "raw")]
    pub(super) format: ImageFormat,
    /// Replace the output if it is there
    #[arg(long)]
    pub(super) force: bool,
    /// What to restore from, see below; the last word is what to make: a new file or a block device
    // Counted later: clap would count each stretch between options for itself.
    #[arg(required = true, value_name = "SOURCE")]
    pub(super) words: Vec<std::path::PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum ImageFormat {
    /// The bytes of the disk, with holes for zeros
    Raw,
    /// QEMU's format, by way of qemu-img
    Qcow2,
}

const RESTORES: &str = "\
A source is one of:
  a copy of current/, or of the slices/ of a backup
  copies of backups (whole ones, and since/ of later ones), or a directory that holds such copies
  a qcow2 image and those that it names as its backing files

Examples:
  fleecefs restore /backup/current vda.raw
  fleecefs restore --until wed /backup/vm1 vda.raw
  fleecefs restore --format qcow2 /backup/mon /backup/tue vda.qcow2";

const EXAMPLES: &str = "\
Examples:
  A running QEMU that was started with -qmp unix:/run/vm.fleece,server=on,wait=off:
    fleecefs mount qmp:/run/vm.fleece /mnt/vm
  A domain of libvirt, running or not:
    fleecefs mount libvirt:vm /mnt/vm
  A stopped domain, by its images:
    fleecefs mount vda.qcow2 vdb.qcow2 /mnt/vm
  A checkpoint, a backup, a copy of it, what has changed since the checkpoint, and the end:
    mkdir /mnt/vm/checkpoints/mon
    mkdir /mnt/vm/backups/tue
    cp --sparse=always /mnt/vm/backups/tue/disk.raw /backup/
    cat /mnt/vm/backups/tue/dirty.map
    rmdir /mnt/vm/backups/tue
    fleecefs umount /mnt/vm
  The checkpoints as a tree, and the backups that run:
    fleecefs checkpoint list --tree /mnt/vm
    fleecefs jobs /mnt/vm
  Why something was refused:
    cat /mnt/vm/last-error";

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn sources_and_directory() {
        let args = Args::try_parse_from([
            "fleecefs", "mount", "-o", "a=b,c", "-f", "x", "y", "d", "-o", "e",
        ]);
        let Command::Mount(mount) = args.unwrap().command else {
            panic!("not mount");
        };
        assert_eq!(mount.words, ["x", "y", "d"]);
        assert_eq!(mount.options, ["a=b,c", "e"]);
        assert!(mount.foreground && !mount.ready);
        assert!(Args::try_parse_from(["fleecefs", "mount", "d"]).is_err());
    }

    #[test]
    fn options_of_restore_may_stand_anywhere() {
        let args = Args::try_parse_from([
            "fleecefs",
            "restore",
            "a",
            "--format",
            "qcow2",
            "b",
            "--until=tue",
            "out",
        ]);
        let Command::Restore(restore) = args.unwrap().command else {
            panic!("not restore");
        };
        assert_eq!(
            restore.words,
            ["a", "b", "out"].map(std::path::PathBuf::from)
        );
        assert_eq!(restore.format, ImageFormat::Qcow2);
        assert_eq!(restore.until.as_deref(), Some("tue"));
        assert!(Args::try_parse_from(["fleecefs", "restore"]).is_err());
    }
}
