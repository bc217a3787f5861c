//! The waiting side of `fleecefs mount`: starts the daemon and returns when the mount can be used,
//! or with the reason why not. It forks nothing, because threads do not survive that: the daemon is
//! this program again.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;

use super::args::Mount;
use super::options::{Defaults, Options};
use crate::fuse;
use crate::model::{Error, Kind, Result};

pub(super) fn start(args: &Mount) -> Result<()> {
    // What is wrong with the words is said before anything is started.
    let options = Options::parse(&args.options, &Defaults::of_process())?;
    let failed = |e: std::io::Error| Error::new(Kind::Io, format!("cannot start the daemon: {e}"));
    let mut child = Command::new(std::env::current_exe().map_err(failed)?)
        .args(["mount", "--ready"])
        .args(args.options.iter().flat_map(|o| ["-o", o]))
        .arg("--")
        .args(&args.words)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        // Its log is a file; what it says here is said before it is ready.
        .stderr(Stdio::inherit())
        .spawn()
        .map_err(failed)?;
    // Several waits for the domain may follow each other on the way.
    let deadline = Instant::now() + options.timeout * 4 + Duration::from_secs(30);
    match first_line(&mut child, deadline) {
        Some(line) if line == "ready" => {}
        Some(line) => {
            let _ = child.wait();
            let why = line.strip_prefix("error ").unwrap_or(&line).to_owned();
            return Err(Error::new(Kind::Io, why));
        }
        None => return Err(gave_up(&mut child)),
    }
    let dir = args.words.last().map_or("", |dir| dir);
    match fuse::answers(Path::new(dir)) {
        Some(Ok(())) => Ok(()),
        Some(Err(e)) => Err(Error::new(
            Kind::Io,
            format!("mounted, but {dir} cannot be used: {e}"),
        )),
        None => Err(Error::new(
            Kind::TimedOut,
            format!("mounted, but {dir} does not answer"),
        )),
    }
}

/// What the daemon says first; `None` if it is gone, or the deadline passed, before it does.
fn first_line(child: &mut Child, deadline: Instant) -> Option<String> {
    let stdout = child.stdout.take()?;
    let (sender, receiver) = bounded(1);
    let read = move || {
        let line = BufReader::new(stdout).lines().next();
        let _ = sender.send(line.and_then(std::io::Result::ok));
    };
    thread::Builder::new()
        .name("ready".to_owned())
        .spawn(read)
        .ok()?;
    receiver.recv_deadline(deadline).unwrap_or_default()
}

fn gave_up(child: &mut Child) -> Error {
    // The pipe may end a moment before the process does.
    for _ in 0..50 {
        if let Ok(Some(status)) = child.try_wait() {
            return Error::new(
                Kind::Io,
                format!("the daemon ended before it was ready: {status}"),
            );
        }
        thread::sleep(Duration::from_millis(10));
    }
    let pid = child.id();
    if let Some(pid) = i32::try_from(pid)
        .ok()
        .and_then(rustix::process::Pid::from_raw)
    {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
    Error::new(
        Kind::TimedOut,
        format!("the daemon (process {pid}) was not ready in time and was told to end"),
    )
}
