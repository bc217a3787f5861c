//! `fleecefs list`: what can be mounted here, as a table.

use std::path::PathBuf;
use std::time::Duration;

use super::args::Sources;
use super::mounted::say;
use super::table::table;
use crate::backend::{Places, found};
use crate::model::Result;

/// How long libvirt may take to answer.
const TIMEOUT: Duration = Duration::from_secs(10);

pub(super) fn run(args: &Sources) -> Result<()> {
    let mut all = Vec::new();
    let uri = args.uri.as_deref();
    let mut missing = Ok(());
    match found::domains(uri.unwrap_or(&Places::default().uri), TIMEOUT) {
        Ok(domains) => all.extend(domains),
        // Whoever names a place wants to know of it.
        Err(e) if uri.is_some() => missing = Err(e.during("no domains of libvirt")),
        // A host without libvirt has QMP sockets all the same.
        Err(e) => eprintln!("fleecefs: no domains of libvirt: {e}"),
    }
    let own = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    all.extend(found::sockets(own.as_deref()));
    let mut rows = vec![["Source", "State"].map(str::to_owned).to_vec()];
    let found = all.into_iter();
    rows.extend(found.map(|f| vec![f.source, f.state.to_owned()]));
    say(&table(&rows))?;
    missing
}
