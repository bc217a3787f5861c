//! Serving a mount: everything from the source up, and back down in reverse.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use crossbeam_channel::{Receiver, bounded, select};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::args::Mount;
use super::logging::Log;
use super::options::{Defaults, Options};
use crate::backend::{Backend, Places, Source, make_passable};
use crate::engine::{self, Domain, Store};
use crate::fuse::{self, MountOptions, Mounted};
use crate::model::{Error, Kind, Result};
use crate::vfs::{Facts, Vfs};

/// How far the kernel reads ahead: four reads of the largest size under way for one reader.
const READ_AHEAD_KIB: u32 = 4096;

/// `fleecefs mount -f`
pub(super) fn in_foreground(args: &Mount) -> Result<()> {
    let options = Options::parse(&args.options, &Defaults::of_process())?;
    let log = Log::start(false);
    let stop = signals()?;
    let session = begin(args, &options, |_| match &options.log {
        Some(path) => log_to(&log, path),
        None => Ok(()),
    })?;
    log::info!("mounted on {}", session.mounted.point().display());
    session.until_the_end(&stop)
}

/// The daemon's part of `fleecefs mount`: its stdout is the pipe to the one who waits.
pub(super) fn as_daemon(args: &Mount) -> Result<()> {
    let log = Log::start(true);
    let mut parent = Parent::take()?;
    // Out of reach of the terminal's ^C and of its end.
    let _ = rustix::process::setsid();
    let begun = Options::parse(&args.options, &Defaults::of_process())
        .and_then(|options| Ok((signals()?, options)))
        .and_then(|(stop, options)| {
            let session = begin(args, &options, |store| {
                let usual = store.dir().join("log");
                log_to(&log, options.log.as_deref().unwrap_or(&usual))
            })?;
            Ok((stop, session))
        });
    let (stop, session) = match begun {
        Ok(begun) => begun,
        Err(e) => {
            log.let_go();
            parent.tell(&format!("error {e}"));
            return Err(e);
        }
    };
    log::info!("mounted on {}", session.mounted.point().display());
    // Holds up the unmounting of no other file system.
    let _ = std::env::set_current_dir("/");
    match log.file() {
        Some(file) => drop(rustix::stdio::dup2_stderr(file)),
        None => drop(null().map(rustix::stdio::dup2_stderr)),
    }
    parent.tell("ready");
    drop(parent);
    let end = session.until_the_end(&stop);
    if let Err(e) = &end {
        log::error!("{e}");
    }
    end
}

/// The pipe to the parent, which nothing that we start may inherit: its end tells the parent that
/// we are gone.
struct Parent(File);

impl Parent {
    fn take() -> Result<Self> {
        let failed = |e: std::io::Error| Error::new(Kind::Io, format!("cannot start: {e}"));
        let pipe = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdout(), 3)
            .map_err(|e| failed(e.into()))?;
        let null = null().map_err(failed)?;
        rustix::stdio::dup2_stdout(&null).map_err(|e| failed(e.into()))?;
        Ok(Self(pipe.into()))
    }

    fn tell(&mut self, line: &str) {
        // Nobody may be there any more; the mount is none the worse.
        let _ = writeln!(self.0, "{}", line.replace('\n', " "));
    }
}

fn null() -> std::io::Result<File> {
    File::options().read(true).write(true).open("/dev/null")
}

fn log_to(log: &Log, path: &Path) -> Result<()> {
    log.to_file(path).map_err(|e| {
        Error::new(
            Kind::Io,
            format!("cannot write the log {}: {e}", path.display()),
        )
        .hint("choose another with -o log=FILE")
    })
}

/// A mounted domain.
struct Session {
    mounted: Mounted,
}

/// From the words of the command line to a mount that answers. What fails leaves nothing behind.
fn begin(
    args: &Mount,
    options: &Options,
    logs: impl FnOnce(&Store) -> Result<()>,
) -> Result<Session> {
    // clap has seen to it that there are two words at least.
    let (dir, words) = args
        .words
        .split_last()
        .ok_or_else(|| Error::new(Kind::Invalid, "no directory given"))?;
    let point = fuse::heal(Path::new(dir))?.into_path();
    for dir in [&options.state, &options.runtime, &options.scratch] {
        // QEMU may run as another user, who has to get through.
        make_passable(dir)
            .map_err(|e| Error::new(Kind::Io, format!("cannot make {}: {e}", dir.display())))?;
    }
    let backend = open(words, options)?;
    let served = serve(&backend, words, options, &point, logs);
    if served.is_err()
        && let Err(e) = backend.close()
    {
        log::error!("{e}");
    }
    served
}

fn serve(
    backend: &Arc<dyn Backend>,
    words: &[String],
    options: &Options,
    point: &Path,
    logs: impl FnOnce(&Store) -> Result<()>,
) -> Result<Session> {
    let store = Store::open(&options.state.join(backend.info().key))?;
    logs(&store)?;
    let engine_options = engine::Options {
        checkpoint: options.checkpoint,
        timeout: options.timeout,
        granularity: options.granularity,
        slice_size: options.slice_size,
    };
    let domain = Arc::new(Domain::open(Arc::clone(backend), store, engine_options)?);
    let source = words.join(" ");
    let facts = Facts {
        source: source.clone(),
        options: options.in_force(),
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
        backing: options.backing.clone(),
        allow_other: options.allow_other,
    };
    let vfs = Arc::new(Vfs::new(domain, facts));
    let mount_options = MountOptions {
        source,
        allow_other: options.allow_other,
        read_ahead_kib: READ_AHEAD_KIB,
    };
    let mounted = fuse::mount(vfs, point, &mount_options)?;
    Ok(Session { mounted })
}

/// The domain that the words name, with paths that hold wherever the daemon goes.
fn open(words: &[String], options: &Options) -> Result<Arc<dyn Backend>> {
    #[cfg(debug_assertions)]
    if let [word] = words
        && let Some(mib) = word.strip_prefix("sim:")
    {
        // For tests of this module, in debug builds only: one simulated disk.
        let mib: usize = mib.parse().unwrap_or(1);
        return Ok(Arc::new(crate::backend::sim::Sim::new(&[(
            "vda",
            mib << 20,
        )])));
    }
    let absolute = |path: PathBuf| std::path::absolute(&path).unwrap_or(path);
    let source = match Source::parse(words)? {
        Source::Images(paths) => Source::Images(paths.into_iter().map(absolute).collect()),
        Source::Qmp(path) => Source::Qmp(absolute(path)),
        Source::Libvirt(name) => Source::Libvirt(name),
    };
    source.open(&Places {
        timeout: options.timeout,
        runtime: options.runtime.clone(),
        scratch: options.scratch.clone(),
        scratch_limit: options.scratch_limit,
        format: options.format.clone(),
        domain: options.domain.clone(),
        quiesce: options.quiesce,
        guest_agent: options.guest_agent.clone(),
        uri: options.uri.clone(),
        tls_psk: options.tls_psk.clone(),
    })
}

/// Gets a message when the process is asked to end.
fn signals() -> Result<Receiver<i32>> {
    let failed = |e: std::io::Error| Error::new(Kind::Io, format!("cannot catch signals: {e}"));
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).map_err(failed)?;
    let (sender, receiver) = bounded(1);
    let wait = move || {
        for signal in signals.forever() {
            let _ = sender.try_send(signal);
        }
    };
    let thread = thread::Builder::new().name("signals".to_owned());
    thread.spawn(wait).map_err(failed)?;
    Ok(receiver)
}

impl Session {
    /// Waits for an unmount or a signal, and ends everything.
    fn until_the_end(self, stop: &Receiver<i32>) -> Result<()> {
        select! {
            recv(self.mounted.ended()) -> _ => log::info!("unmounted"),
            recv(stop) -> signal => log::info!("ending: got signal {}", signal.unwrap_or(0)),
        }
        let ended = self.mounted.shut_down();
        log::info!("ended");
        ended
    }
}
