//! The command line: what is asked for, mounting, daemon life, unmounting, looking.
//!
//! ```text
//!   fleecefs mount ── daemon ──▶ starts itself again with --ready, waits for "ready", looks, returns
//!                 └── serve  ──▶ source, state, domain, mount; waits for the end; ends everything
//!   fleecefs umount ─▶ umount(2), waits until the daemon is gone
//!   fleecefs list ───▶ what there is to mount
//!   fleecefs checkpoint, jobs, events ─▶ read the mounted tree, as any program does
//!   fleecefs restore ─▶ files in, one file out; no mount, no daemon
//! ```

mod args;
mod checkpoint;
mod daemon;
mod events;
mod jobs;
mod list;
mod logging;
mod mounted;
mod options;
mod restore;
mod serve;
mod status;
mod table;
mod umount;

use std::process::ExitCode;

use clap::Parser;

use args::{Args, Command};

/// Runs the command line.
pub fn main() -> ExitCode {
    let result = match Args::parse().command {
        // Whoever started it says what went wrong, or its log does.
        Command::Mount(mount) if mount.ready => {
            return match serve::as_daemon(&mount) {
                Ok(()) => ExitCode::SUCCESS,
                Err(_) => ExitCode::FAILURE,
            };
        }
        Command::Mount(mount) if mount.foreground => serve::in_foreground(&mount),
        Command::Mount(mount) => daemon::start(&mount),
        Command::Umount(umount) => umount::run(&umount),
        Command::Checkpoint(command) => checkpoint::run(&command),
        Command::List(sources) => list::run(&sources),
        Command::Jobs(jobs) => jobs::run(&jobs),
        Command::Events(events) => events::run(&events),
        Command::Restore(restore) => restore::run(&restore),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("fleecefs: {e}");
            ExitCode::FAILURE
        }
    }
}
