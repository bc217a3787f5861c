//! `-o`: one table of what there is; everything else is refused by name.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::model::{Error, Kind, Result, SIZES, parse_size, show_size};

struct Spec {
    name: &'static str,
    /// What to put after the `=`; nothing for a plain word.
    value: &'static str,
    help: &'static str,
}

const TABLE: [Spec; 17] = [
    Spec {
        name: "state",
        value: "DIR",
        help: "where checkpoints are remembered (/var/lib/fleecefs; without root \
               $XDG_STATE_HOME/fleecefs)",
    },
    Spec {
        name: "runtime",
        value: "DIR",
        help: "where sockets are made (/run/fleecefs; without root $XDG_RUNTIME_DIR/fleecefs)",
    },
    Spec {
        name: "scratch",
        value: "DIR",
        help: "where what the guest overwrites during a backup is kept (STATE/scratch)",
    },
    Spec {
        name: "scratch-limit",
        value: "SIZE",
        help: "most that one backup may take there, such as 10G (no limit); a backup that needs \
               more fails, the guest goes on",
    },
    Spec {
        name: "timeout",
        value: "SECONDS",
        help: "longest wait for an answer of the domain (30)",
    },
    Spec {
        name: "checkpoint",
        value: "yes|no",
        help: "whether a backup also makes a checkpoint of its name (yes)",
    },
    Spec {
        name: "granularity",
        value: "SIZE",
        help: "bytes that a bit of a new dirty bitmap stands for, a power of two from 512 to 2G \
               (QEMU's choice: the image's cluster size, but from 4K to 64K)",
    },
    Spec {
        name: "slice-size",
        value: "SIZE",
        help: "size of the slices in current/ and slices/, a power of two, 64K at least (8M)",
    },
    Spec {
        name: "backing",
        value: "PATTERN",
        help: "name of the image that a since/C/D.qcow2 is on top of, where {checkpoint} and {disk} \
               stand for C and D ({checkpoint}.qcow2); one that ends in .raw or .img is raw",
    },
    Spec {
        name: "format",
        value: "FORMAT",
        help: "image format, such as raw or qcow2 (told from the image)",
    },
    Spec {
        name: "domain",
        value: "NAME",
        help: "name of the domain, where the source has none; it finds its checkpoints again",
    },
    Spec {
        name: "uri",
        value: "URI",
        help: "where libvirt is, for libvirt:NAME (qemu:///system)",
    },
    Spec {
        name: "quiesce",
        value: "",
        help: "has the guest's agent freeze the guest's file systems while a backup begins; a freeze \
               that fails refuses the backup",
    },
    Spec {
        name: "guest-agent",
        value: "SOCKET",
        help: "where that agent is, for qmp:PATH",
    },
    Spec {
        name: "tls-psk",
        value: "FILE",
        help: "keys of the NBD clients of a backup whose <server> has tls='yes', in lines of \
               user:hexkey as psktool makes them (none: such a backup is refused)",
    },
    Spec {
        name: "allow_other",
        value: "",
        help: "lets all users read, not the mounting user only",
    },
    Spec {
        name: "log",
        value: "FILE",
        help: "where the log goes (daemon: STATE/DOMAIN/log; foreground: stderr)",
    },
];

/// What mount(8) and fstab may say to any file system and that is true here anyway.
const HARMLESS: [&str; 18] = [
    "rw", "nosuid", "nodev", "noexec", "auto", "noauto", "defaults", "_netdev", "nofail", "user",
    "users", "nouser", "owner", "group", "noatime", "relatime", "async", "silent",
];

/// The options in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Options {
    pub(super) state: PathBuf,
    pub(super) runtime: PathBuf,
    pub(super) scratch: PathBuf,
    pub(super) scratch_limit: Option<u64>,
    pub(super) timeout: Duration,
    pub(super) checkpoint: bool,
    pub(super) granularity: Option<u64>,
    pub(super) slice_size: u64,
    pub(super) backing: String,
    pub(super) format: Option<String>,
    pub(super) domain: Option<String>,
    pub(super) uri: String,
    pub(super) quiesce: bool,
    pub(super) guest_agent: Option<PathBuf>,
    pub(super) tls_psk: Option<PathBuf>,
    pub(super) allow_other: bool,
    pub(super) log: Option<PathBuf>,
}

impl Options {
    /// Reads `words`, each of which may hold several options with commas between.
    pub(super) fn parse(words: &[String], defaults: &Defaults) -> Result<Self> {
        let mut options = Self {
            state: defaults.state.clone(),
            runtime: defaults.runtime.clone(),
            scratch: PathBuf::new(),
            scratch_limit: None,
            timeout: Duration::from_secs(30),
            checkpoint: true,
            granularity: None,
            slice_size: 8 << 20,
            backing: "{checkpoint}.qcow2".to_owned(),
            format: None,
            domain: None,
            uri: "qemu:///system".to_owned(),
            quiesce: false,
            guest_agent: None,
            tls_psk: None,
            allow_other: false,
            log: None,
        };
        let mut scratch = None;
        let mut given: Vec<&str> = Vec::new();
        for word in words.iter().flat_map(|w| w.split(',')) {
            let (name, value) = match word.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (word, None),
            };
            let Some(spec) = TABLE.iter().find(|s| s.name == name) else {
                if word.is_empty() || name.starts_with("x-") || HARMLESS.contains(&name) {
                    continue;
                }
                return Err(unknown(name));
            };
            if given.contains(&name) {
                return Err(invalid(format!("option {name} is given twice")));
            }
            given.push(name);
            let value = match (value, spec.value) {
                (None, "") => "",
                (Some(_), "") => return Err(invalid(format!("option {name} takes no value"))),
                (Some(value), _) if !value.is_empty() => value,
                (_, what) => {
                    return Err(invalid(format!(
                        "option {name} needs a value: {name}={what}"
                    )));
                }
            };
            match name {
                "state" => options.state = absolute(value)?,
                "runtime" => options.runtime = absolute(value)?,
                "scratch" => scratch = Some(absolute(value)?),
                "scratch-limit" => options.scratch_limit = Some(size(name, value)?),
                "timeout" => options.timeout = seconds(value)?,
                "checkpoint" => options.checkpoint = truth(name, value)?,
                "granularity" => {
                    options.granularity = Some(power_of_two(name, value, 512, 1 << 31)?);
                }
                "slice-size" => {
                    options.slice_size = power_of_two(name, value, 1 << 16, 1 << 40)?;
                }
                "backing" => options.backing = value.to_owned(),
                "format" => options.format = Some(value.to_owned()),
                "domain" => options.domain = Some(value.to_owned()),
                "uri" => options.uri = value.to_owned(),
                "quiesce" => options.quiesce = true,
                "guest-agent" => options.guest_agent = Some(absolute(value)?),
                "tls-psk" => options.tls_psk = Some(absolute(value)?),
                "allow_other" => options.allow_other = true,
                _ => options.log = Some(absolute(value)?),
            }
        }
        options.scratch = scratch.unwrap_or_else(|| options.state.join("scratch"));
        Ok(options)
    }

    /// Name and value of each, for `status`.
    pub(super) fn in_force(&self) -> Vec<(String, String)> {
        let path = |path: &Path| path.display().to_string();
        let mut all = vec![
            ("state", path(&self.state)),
            ("runtime", path(&self.runtime)),
            ("scratch", path(&self.scratch)),
            ("timeout", self.timeout.as_secs().to_string()),
            (
                "checkpoint",
                if self.checkpoint { "yes" } else { "no" }.to_owned(),
            ),
            ("slice-size", self.slice_size.to_string()),
            ("backing", self.backing.clone()),
            ("uri", self.uri.clone()),
            (
                "quiesce",
                if self.quiesce { "yes" } else { "no" }.to_owned(),
            ),
            (
                "allow_other",
                if self.allow_other { "yes" } else { "no" }.to_owned(),
            ),
        ];
        all.extend(self.scratch_limit.map(|n| ("scratch-limit", n.to_string())));
        all.extend(self.granularity.map(|n| ("granularity", n.to_string())));
        all.extend(self.format.clone().map(|f| ("format", f)));
        all.extend(self.domain.clone().map(|d| ("domain", d)));
        all.extend(
            self.guest_agent
                .as_deref()
                .map(|p| ("guest-agent", path(p))),
        );
        all.extend(self.tls_psk.as_deref().map(|p| ("tls-psk", path(p))));
        all.extend(self.log.as_deref().map(|l| ("log", path(l))));
        let owned = all
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value));
        owned.collect()
    }
}

/// Where things are put if nothing else is said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Defaults {
    pub(super) state: PathBuf,
    pub(super) runtime: PathBuf,
}

impl Defaults {
    /// Those of this process: the system's for root, the user's for others.
    pub(super) fn of_process() -> Self {
        let uid = rustix::process::geteuid();
        let var = |name| {
            let value = std::env::var_os(name).map(PathBuf::from);
            value.filter(|path| path.is_absolute())
        };
        if uid.is_root() {
            return Self {
                state: "/var/lib/fleecefs".into(),
                runtime: "/run/fleecefs".into(),
            };
        }
        let state = var("XDG_STATE_HOME")
            .or_else(|| Some(var("HOME")?.join(".local/state")))
            .unwrap_or_else(|| format!("/var/tmp/{}", uid.as_raw()).into());
        let runtime =
            var("XDG_RUNTIME_DIR").unwrap_or_else(|| format!("/run/user/{}", uid.as_raw()).into());
        Self {
            state: state.join("fleecefs"),
            runtime: runtime.join("fleecefs"),
        }
    }
}

/// The table for `--help`.
pub(super) fn help() -> String {
    let mut out = String::from("Options of -o, with their defaults in parentheses:\n");
    for spec in &TABLE {
        let form = match spec.value {
            "" => spec.name.to_owned(),
            value => format!("{}={value}", spec.name),
        };
        // Writing to a String cannot fail.
        let _ = writeln!(out, "  {form}\n          {}", spec.help);
    }
    out.push_str("Words of fstab such as rw, noauto, _netdev and x-* are accepted.");
    out
}

fn invalid(message: String) -> Error {
    Error::new(Kind::Invalid, message)
}

fn unknown(name: &str) -> Error {
    if name == "ro" {
        return invalid("option ro is not possible: mkdir is how a backup begins".to_owned())
            .hint("leave it off; files are read-only anyway");
    }
    let names: Vec<&str> = TABLE.iter().map(|s| s.name).collect();
    invalid(format!("there is no option {name}")).hint(format!("there are {}", names.join(", ")))
}

fn absolute(value: &str) -> Result<PathBuf> {
    std::path::absolute(value).map_err(|e| invalid(format!("{value} is no path: {e}")))
}

fn truth(name: &str, value: &str) -> Result<bool> {
    match value {
        "yes" => Ok(true),
        "no" => Ok(false),
        _ => Err(invalid(format!(
            "{name}={value} must be {name}=yes or {name}=no"
        ))),
    }
}

fn seconds(value: &str) -> Result<Duration> {
    match value.parse() {
        Ok(n @ 1..=3600) => Ok(Duration::from_secs(n)),
        _ => Err(invalid(format!(
            "timeout={value} must be a number of seconds from 1 to 3600"
        ))),
    }
}

/// A size that is not 0.
fn power_of_two(name: &str, value: &str, least: u64, most: u64) -> Result<u64> {
    let bytes = size(name, value)?;
    match bytes.is_power_of_two() && (least..=most).contains(&bytes) {
        true => Ok(bytes),
        false => Err(invalid(format!(
            "{name}={value} must be a power of two from {} to {}",
            show_size(least),
            show_size(most)
        ))),
    }
}

fn size(name: &str, value: &str) -> Result<u64> {
    parse_size(value)
        .filter(|&bytes| bytes != 0)
        .ok_or_else(|| invalid(format!("{name}={value} is no size")).hint(SIZES))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<Options> {
        let words: Vec<String> = words.iter().map(|w| (*w).to_owned()).collect();
        let defaults = Defaults {
            state: "/state".into(),
            runtime: "/run".into(),
        };
        Options::parse(&words, &defaults)
    }

    #[test]
    fn defaults_and_values() {
        let options = parse(&[]).unwrap();
        assert_eq!(options.scratch, Path::new("/state/scratch"));
        assert_eq!((options.timeout.as_secs(), options.checkpoint), (30, true));
        let options = parse(&[
            "rw,scratch-limit=10G,noauto,x-systemd.after=a",
            "state=/s,checkpoint=no,_netdev",
            "allow_other,log=/l,format=raw,domain=vm,timeout=5,tls-psk=/k",
            "granularity=64K,slice-size=1M,backing={disk}/{checkpoint}.raw",
        ])
        .unwrap();
        assert_eq!(options.scratch, Path::new("/s/scratch"));
        assert_eq!(options.scratch_limit, Some(10 << 30));
        assert!(!options.checkpoint && options.allow_other);
        assert_eq!(options.tls_psk.as_deref(), Some(Path::new("/k")));
        assert_eq!(options.granularity, Some(65536));
        assert_eq!(options.slice_size, 1 << 20);
        assert_eq!(options.in_force().len(), 16);
    }

    #[test]
    fn refused_by_name() {
        for (word, says) in [
            (
                "sratch=/x",
                "there is no option sratch (there are state, runtime,",
            ),
            ("ro", "option ro is not possible"),
            ("suid", "there is no option suid"),
            ("state", "option state needs a value: state=DIR"),
            ("state=", "option state needs a value"),
            ("timeout=1,timeout=2", "option timeout is given twice"),
            ("timeout=0", "timeout=0 must be"),
            ("timeout=-1", "timeout=-1 must be"),
            ("checkpoint=1", "checkpoint=1 must be checkpoint=yes or"),
            ("allow_other=yes", "option allow_other takes no value"),
            ("scratch-limit=10X", "scratch-limit=10X is no size"),
            ("scratch-limit=G", "scratch-limit=G is no size"),
            ("granularity=3K", "granularity=3K must be a power of two"),
            ("granularity=256", "granularity=256 must be a power of two"),
            ("slice-size=32K", "slice-size=32K must be a power of two"),
            ("scratch-limit=0", "scratch-limit=0 is no size"),
            (
                "scratch-limit=99999999P",
                "scratch-limit=99999999P is no size",
            ),
            ("scratch-limit=1é", "scratch-limit=1é is no size"),
        ] {
            let error = parse(&[word]).unwrap_err();
            assert!(error.to_string().starts_with(says), "{word}: {error}");
            assert_eq!(error.kind(), Kind::Invalid);
        }
    }

    #[test]
    fn help_names_every_option() {
        let help = help();
        assert!(
            TABLE
                .iter()
                .all(|s| help.contains(s.name) && help.contains(s.help))
        );
    }
}
