//! Names of checkpoints and backups: libvirt's rule, so that every name works there too.

use std::fmt;

use super::{Error, Kind, Result};

/// The longest name, in bytes: what a directory entry holds with `.xml` behind it.
const MAX_LEN: usize = 251;

/// A checkpoint's or backup's name: `[A-Za-z0-9_-][A-Za-z0-9_.-]*`, not ending in `.xml`.
///
/// libvirt's rule excludes the slash, the leading dot and everything a shell or a bitmap name could
/// trip over. `.xml` is kept for the documents that create checkpoints and backups.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(String);

impl Name {
    /// Checks `text`. EINVAL with the rule in words, or ENAMETOOLONG.
    pub fn new(text: &str) -> Result<Self> {
        if text.len() > MAX_LEN {
            return Err(Error::new(
                Kind::NameTooLong,
                format!("a name of {} bytes is too long", text.len()),
            )
            .hint(format!("use at most {MAX_LEN}")));
        }
        let mut chars = text.chars();
        let first_ok = chars
            .next()
            .is_some_and(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
        let rest_ok = chars.all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.'));
        if !first_ok || !rest_ok {
            return Err(
                Error::new(Kind::Invalid, format!("{text:?} cannot be a name here"))
                    .hint("use letters, digits, '_', '-' and, not first, '.'"),
            );
        }
        if text.ends_with(".xml") {
            return Err(Error::new(
                Kind::Invalid,
                format!("{text:?} cannot be a name here: .xml marks documents"),
            )
            .hint("leave .xml off"));
        }
        Ok(Self(text.to_owned()))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl serde::Serialize for Name {
    fn serialize<S: serde::Serializer>(&self, s: S) -> std::result::Result<S::Ok, S::Error> {
        s.serialize_str(&self.0)
    }
}

impl<'de> serde::Deserialize<'de> for Name {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        Name::new(&text).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libvirts_rule() {
        for good in [
            "mon",
            "2026-11-23",
            "-x",
            "_",
            "a.b",
            "A.",
            "x".repeat(251).as_str(),
        ] {
            assert_eq!(Name::new(good).unwrap().as_str(), good);
        }
        for bad in [
            "", ".", "..", ".mon", "a/b", "a b", "ä", "a\0", "a\n", "mon.xml",
        ] {
            assert_eq!(Name::new(bad).unwrap_err().kind(), Kind::Invalid, "{bad:?}");
        }
        let long = Name::new(&"x".repeat(252)).unwrap_err();
        assert_eq!(long.kind(), Kind::NameTooLong);
    }
}
