//! `fleecefs restore`: the words, the signals, the last line.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;

use super::args::{ImageFormat, Restore};
use crate::model::{Error, Format, Kind, Result};
use crate::restore::{self, Request};

pub(super) fn run(args: &Restore) -> Result<()> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        // The second one is meant seriously.
        flag::register_conditional_shutdown(signal, 1, Arc::clone(&stop))
            .and_then(|_| flag::register(signal, Arc::clone(&stop)))
            .map_err(|e| Error::new(Kind::Io, format!("cannot wait for signals: {e}")))?;
    }
    let (output, sources) = match args.words.split_last() {
        Some((output, sources)) if !sources.is_empty() => (output, sources),
        _ => {
            let message = "a source and an output are needed";
            let hint = "fleecefs restore --help shows examples";
            return Err(Error::new(Kind::Invalid, message).hint(hint));
        }
    };
    let request = Request {
        sources: sources.to_vec(),
        output: output.clone(),
        format: match args.format {
            ImageFormat::Raw => Format::Raw,
            ImageFormat::Qcow2 => Format::Qcow2,
        },
        disk: args.disk.clone(),
        until: args.until.clone(),
        force: args.force,
    };
    let said = restore::run(&request, &stop)?;
    // It is restored, whether or not anybody listens.
    let _ = writeln!(std::io::stdout(), "{said}");
    Ok(())
}
