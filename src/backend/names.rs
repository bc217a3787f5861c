//! Names of what fleecefs puts into QEMU.
//!
//! A node name has at most 31 characters and begins with a letter, so generated ones are short:
//! `fleece-<mount>-<job>-<disk><role>`. The mount's six digits keep the names of a killed fleecefs
//! apart from those of the next one; the prefix is how the next one finds them.

/// Begins every name of ours.
const PREFIX: &str = "fleece-";

/// Ends them.
const ROLES: [&str; 10] = [
    "file", "over", "filt", "acc", "new", "job", "exp", "map", "pub", "bits",
];

/// The names that belong to one disk of one backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Names {
    stem: String,
}

impl Names {
    pub(super) fn new(mount: &str, job: u32, disk: usize) -> Self {
        Self {
            stem: format!("{PREFIX}{mount}-{job}-{disk}"),
        }
    }

    /// Node: the scratch file, or the file that a push backup writes.
    pub(super) fn file(&self) -> String {
        self.with("file")
    }

    /// Node: the scratch overlay, a qcow2 in the scratch file; or a push backup's target.
    pub(super) fn overlay(&self) -> String {
        self.with("over")
    }

    /// Node: the filter that copies before the guest writes.
    pub(super) fn filter(&self) -> String {
        self.with("filt")
    }

    /// Node: the frozen disk, by snapshot-access.
    pub(super) fn access(&self) -> String {
        self.with("acc")
    }

    /// Job: formats the scratch file.
    pub(super) fn create(&self) -> String {
        self.with("new")
    }

    /// Job: the backup of this disk.
    pub(super) fn job(&self) -> String {
        self.with("job")
    }

    /// Export: the frozen disk.
    pub(super) fn export(&self) -> String {
        self.with("exp")
    }

    /// Export: the frozen disk with a bitmap, while a map is made.
    pub(super) fn map_export(&self) -> String {
        self.with("map")
    }

    /// Export: the frozen disk as NBD clients from outside have it.
    pub(super) fn public_export(&self) -> String {
        self.with("pub")
    }

    /// Bitmap on the live node: what a push backup copies.
    pub(super) fn bits(&self) -> String {
        self.with("bits")
    }

    fn with(&self, role: &str) -> String {
        format!("{}{role}", self.stem)
    }
}

/// The mount whose generated name this is. A checkpoint, and so its bitmaps, may be called anything
/// that begins like one.
pub(super) fn mount_of(name: &str) -> Option<&str> {
    let mut parts = name.strip_prefix(PREFIX)?.splitn(3, '-');
    let (mount, job, rest) = (parts.next()?, parts.next()?, parts.next()?);
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let role = rest.trim_start_matches(|c: char| c.is_ascii_digit());
    let ours = mount.len() == 6
        && mount.bytes().all(|b| b.is_ascii_hexdigit())
        && digits(job)
        && role.len() < rest.len()
        && ROLES.contains(&role);
    ours.then_some(mount)
}

/// Text of somebody else's as part of a file name: what does not belong there becomes `_`.
pub(super) fn plain(text: &str) -> String {
    text.chars()
        .map(|c| match c {
            c if c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.') => c,
            _ => '_',
        })
        .collect()
}

/// Bitmap on the overlay: the frozen copy of what recorded up to the instant.
pub(super) const TAIL: &str = "fleece-tail";

/// Bitmap on the overlay: a union, while a map is made of it.
pub(super) const UNION: &str = "fleece-union";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_names_fit() {
        let names = Names::new("abcdef", 9_999_999, 999);
        for name in [
            names.file(),
            names.overlay(),
            names.filter(),
            names.access(),
        ] {
            assert!(name.len() <= 31, "{name}");
        }
        assert_eq!(
            Names::new("0a1b2c", 3, 1).overlay(),
            "fleece-0a1b2c-3-1over"
        );
    }

    #[test]
    fn our_names_are_told_from_those_that_begin_alike() {
        let names = Names::new("0a1b2c", 3, 11);
        for name in [
            names.file(),
            names.overlay(),
            names.filter(),
            names.access(),
            names.create(),
            names.job(),
            names.export(),
            names.map_export(),
            names.public_export(),
            names.bits(),
        ] {
            assert_eq!(mount_of(&name), Some("0a1b2c"), "{name}");
        }
        for name in [
            "fleece-mon",
            "fleece-mon-1-2",
            "fleece-0a1b2c-3-1",
            "fleece-0a1b2c-3-bits",
            "fleece-0a1b2c--1bits",
            "my-fleece-0a1b2c-3-1bits",
        ] {
            assert_eq!(mount_of(name), None, "{name}");
        }
    }
}
