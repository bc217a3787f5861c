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
}

#[derive(Debug, clap::Args)]
pub(super) struct Mount {
    /// Stay in the foreground and log to stderr
    #[arg(short, long)]
    pub(super) foreground: bool,
    /// Options, see below
    #[arg(short, value_name = "OPT[,OPT...]")]
    pub(super) options: Vec<String>,
    /// What to mount, and where: disk images of a stopped domain, or qmp:SOCKET of a running one
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

const EXAMPLES: &str = "\
Examples:
  A running QEMU that was started with -qmp unix:/run/vm.fleece,server=on,wait=off:
    fleecefs mount qmp:/run/vm.fleece /mnt/vm
  A stopped domain, by its images:
    fleecefs mount vda.qcow2 vdb.qcow2 /mnt/vm
  A checkpoint, a backup, a copy of it, what has changed since the checkpoint, and the end:
    mkdir /mnt/vm/checkpoints/mon
    mkdir /mnt/vm/backups/tue
    cp --sparse=always /mnt/vm/backups/tue/disk.raw /backup/
    cat /mnt/vm/backups/tue/dirty.map
    rmdir /mnt/vm/backups/tue
    fleecefs umount /mnt/vm
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
}
