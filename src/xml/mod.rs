//! The documents of checkpoints, backups and domains, in libvirt's vocabulary.
//!
//! | document | read | written | schema |
//! |---|---|---|---|
//! | `<domaincheckpoint>` | [`CheckpointDocument::read`] | [`CheckpointDocument::write`] | `docs/domaincheckpoint.rng` |
//! | `<domainbackup>` | [`BackupDocument::read`] | [`BackupDocument::write`] | `docs/domainbackup.rng` |
//! | `<domain>` | [`DomainReference::read`] | [`domain()`] | |
//!
//! What is written can be read again and says the same. What is unknown is left out rather than
//! made up. Characters that XML cannot hold at all (a file name may have them) are written as
//! U+FFFD.
//!
//! Reading takes two steps: `tree` makes elements of bytes (with `lexical`), and the documents' readers take those
//! apart with `fields`, which refuses by name whatever they leave. Documents come from whoever may
//! write to the mount: [`MAX_BYTES`] and the other limits are in `tree`.

mod backup;
mod backup_read;
mod checkpoint;
mod domain;
mod error;
mod fields;
mod lexical;
mod tree;

pub use backup::{BackupDocument, BackupDocumentDisk, BackupMode, Server};
pub use checkpoint::{CheckpointDocument, CheckpointDocumentDisk, DocumentBitmap, DomainReference};
pub use domain::domain;
pub use error::{At, Error, Place};
pub use tree::MAX_BYTES;

use std::borrow::Cow;
use std::io;

use quick_xml::Writer;
use quick_xml::events::BytesText;

type Out = Writer<Vec<u8>>;

/// A document as text, ending in a newline.
fn document(write: impl FnOnce(&mut Out) -> io::Result<()>) -> String {
    let mut out = Writer::new_with_indent(Vec::new(), b' ', 2);
    // Writing to a Vec cannot fail.
    let _ = write(&mut out);
    let mut text = String::from_utf8_lossy(&out.into_inner()).into_owned();
    text.push('\n');
    text
}

/// `<name>text</name>`
fn text(out: &mut Out, name: &str, text: &str) -> io::Result<()> {
    let clean = clean(text);
    out.create_element(name)
        .write_text_content(BytesText::new(&clean))
        .map(drop)
}

/// The attributes that have a value.
fn attributes<'a, const N: usize>(
    all: [(&'a str, Option<&'a str>); N],
) -> impl Iterator<Item = (&'a str, Cow<'a, str>)> {
    all.into_iter()
        .filter_map(|(name, value)| Some((name, clean(value?))))
}

/// The text without the characters that XML 1.0 has no way to write.
fn clean(text: &str) -> Cow<'_, str> {
    let bad = |c: char| !lexical::is_xml_char(c);
    if text.contains(bad) {
        Cow::Owned(text.replace(bad, "\u{fffd}"))
    } else {
        Cow::Borrowed(text)
    }
}

/// Seconds since 1970.
fn seconds(time: std::time::SystemTime) -> u64 {
    time.duration_since(std::time::SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_xml_cannot_hold() {
        let written = document(|out| text(out, "a", "x<&>\u{1}\n\"y"));
        assert_eq!(written, "<a>x&lt;&amp;&gt;\u{fffd}\n&quot;y</a>\n");
    }
}
