//! Where things stand in a document, and why it is refused.

use std::fmt;

use crate::model;

/// Where something stands in the document it was read from. Lines and columns count from 1; what
/// was not read from a document stands at 0.
///
/// A place says nothing about what stands there: any two are equal, so that documents are equal
/// when they say the same, however they are laid out.
#[derive(Debug, Clone, Copy, Default)]
pub struct Place {
    /// The line.
    pub line: u32,
    /// The column, in characters.
    pub column: u32,
}

impl PartialEq for Place {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Place {}

impl Place {
    /// A refusal of what stands here.
    pub fn refuse(self, reason: impl Into<String>) -> Error {
        Error {
            place: self,
            reason: reason.into(),
        }
    }
}

/// A word of a document and where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct At<T> {
    /// The word.
    pub value: T,
    /// Where it stands.
    pub place: Place,
}

impl<T> From<T> for At<T> {
    /// A word that was not read from a document.
    fn from(value: T) -> Self {
        Self {
            value,
            place: Place::default(),
        }
    }
}

/// Why a document is refused. Shown as `line 7: reason`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {}: {reason}", place.line)]
pub struct Error {
    /// Where.
    pub place: Place,
    /// Why: lower case, no full stop at the end.
    pub reason: String,
}

impl Error {
    /// The refusal that a user of the mount meets: EINVAL, with the line in its sentence.
    pub fn into_refusal(self) -> model::Error {
        model::Error::new(model::Kind::Invalid, self.to_string())
    }
}

/// Text of a document as a message shows it: in quotes, on one line, and not longer than that.
pub(super) struct Shown<'a>(pub(super) &'a str);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (text, more) = clip(self.0);
        write!(f, "{text:?}{more}")
    }
}

/// A name in a message: whatever it is, not longer than that and on one line.
pub(super) struct Clipped<'a>(pub(super) &'a str);

impl fmt::Display for Clipped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, more) = clip(self.0);
        write!(f, "{}{more}", name.escape_debug())
    }
}

/// The beginning of a text, and what says that there is more of it.
fn clip(text: &str) -> (&str, &'static str) {
    const LONGEST: usize = 64;
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => (text.get(..end).unwrap_or_default(), "…"),
        None => (text, ""),
    }
}
