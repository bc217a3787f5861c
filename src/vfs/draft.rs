//! Documents while they are written: `checkpoints/C.xml` and `backups/B.xml`.
//!
//! What a document asks for is done when its file is closed, because close(2) is the last call whose
//! error a program can still see. But one file is closed several times: a shell closes the
//! descriptor that it made a redirection from before anything is written, and every program that
//! inherited it closes it when it ends, in the middle of `( a; b ) > B.xml` too. So a close with
//! nothing new does nothing, and one whose document is refused keeps what was written, for more to
//! follow and a later close to try again.
//!
//! ```text
//!             ┌── write ──┐
//!             ▼           │
//!   ──────▶ Written ──▶ Refused
//!             │  close
//!             └───────▶ Taken
//! ```
//!
//! A name shows only a document that was never tried. From then on it is what its open file has,
//! so that the same document, put right, can be written anew at once.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;

use super::Vfs;
use super::node::{DraftId, Ino, Node};
use super::open::File;
use super::types::{Caching, Created, Handle, Opened};
use crate::model::{Error, Kind, Name, Result};
use crate::xml::MAX_BYTES;

/// The ending that marks a document.
const ENDING: &str = ".xml";

/// A document that is being written.
pub(super) struct Draft {
    node: Node,
    /// The checkpoint or backup that it describes.
    name: Name,
    /// Held by whoever changes it or has it done, which may take as long as the domain does.
    turn: Mutex<()>,
    text: Mutex<Text>,
}

struct Text {
    bytes: Vec<u8>,
    stage: Stage,
    changed: SystemTime,
    /// Was tried before, so that the name does not show it any more.
    tried: bool,
}

enum Stage {
    /// There may be something that was not tried.
    Written,
    /// As it is, it was refused.
    Refused(Error),
    /// It was done.
    Taken,
}

impl Draft {
    fn new(node: Node, name: Name) -> Self {
        Self {
            node,
            name,
            turn: Mutex::new(()),
            text: Mutex::new(Text {
                bytes: Vec::new(),
                stage: Stage::Written,
                changed: SystemTime::now(),
                tried: false,
            }),
        }
    }

    pub(super) fn node(&self) -> Node {
        self.node
    }

    pub(super) fn file_name(&self) -> String {
        format!("{}{ENDING}", self.name)
    }

    /// Bytes so far, and when the last of them came.
    pub(super) fn extent(&self) -> (usize, SystemTime) {
        let text = self.text.lock();
        (text.bytes.len(), text.changed)
    }

    /// Copies what was written from `offset` on; the count of bytes.
    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) -> usize {
        let text = self.text.lock();
        let part = super::open::window(&text.bytes, offset, buf.len());
        buf[..part.len()].copy_from_slice(part);
        part.len()
    }

    /// Puts `bytes` at `offset`. EFBIG beyond what a document may hold, EBUSY once it was done. Waits
    /// while the domain is asked.
    fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = start.saturating_add(bytes.len());
        self.change(|text| {
            let end = fits(end)?;
            if text.len() < end {
                text.resize(end, 0);
            }
            text[start..end].copy_from_slice(bytes);
            Ok(())
        })
    }

    /// Cuts it off, or fills it up with zeros.
    fn truncate(&self, size: u64) -> Result<()> {
        self.change(|text| {
            let size = fits(usize::try_from(size).unwrap_or(usize::MAX))?;
            text.resize(size, 0);
            Ok(())
        })
    }

    fn change(&self, change: impl FnOnce(&mut Vec<u8>) -> Result<()>) -> Result<()> {
        let _turn = self.turn.lock();
        let mut text = self.text.lock();
        if matches!(text.stage, Stage::Taken) {
            let name = self.file_name();
            return Err(Error::new(
                Kind::Busy,
                format!("{name} was closed, and what it says was done: nothing can be added"),
            ));
        }
        let changed = change(&mut text.bytes);
        text.changed = SystemTime::now();
        text.stage = match &changed {
            Ok(()) => Stage::Written,
            // What there is of it is not what was meant.
            Err(error) => Stage::Refused(error.clone()),
        };
        changed
    }

    /// Has `act` do what the document says, unless that was tried already: then the same outcome
    /// again. May wait for the domain.
    fn apply(&self, act: impl FnOnce(&[u8]) -> Result<()>) -> Result<()> {
        let _turn = self.turn.lock();
        let bytes = {
            let mut text = self.text.lock();
            match &text.stage {
                Stage::Taken => return Ok(()),
                Stage::Refused(error) => return Err(error.clone()),
                _ if text.bytes.is_empty() => return Ok(()),
                _ => {}
            }
            text.tried = true;
            text.bytes.clone()
        };
        let outcome = act(&bytes);
        self.text.lock().stage = match &outcome {
            Ok(()) => Stage::Taken,
            Err(error) => Stage::Refused(error.clone()),
        };
        outcome
    }
}

fn fits(size: usize) -> Result<usize> {
    if size <= MAX_BYTES {
        return Ok(size);
    }
    Err(Error::new(
        Kind::TooLarge,
        format!("a document may have {MAX_BYTES} bytes"),
    ))
}

/// The documents that are open, by number.
#[derive(Default)]
pub(super) struct Drafts(Mutex<Open>);

#[derive(Default)]
struct Open {
    last: DraftId,
    drafts: BTreeMap<DraftId, Arc<Draft>>,
}

impl Drafts {
    fn begin(&self, node: impl FnOnce(DraftId) -> Node, name: Name) -> Result<Arc<Draft>> {
        let mut open = self.0.lock();
        let id = open.last + 1;
        let draft = Arc::new(Draft::new(node(id), name));
        draft.node.ino()?;
        if open.drafts.values().any(|d| d.shown_as(&draft)) {
            return Err(being_written(&draft));
        }
        open.last = id;
        open.drafts.insert(id, Arc::clone(&draft));
        Ok(draft)
    }

    fn end(&self, draft: &Draft) {
        self.0.lock().drafts.retain(|_, d| d.node != draft.node);
    }

    /// What a node of a draft stands for, as long as its file is open.
    pub(super) fn get(&self, node: Node) -> Result<Arc<Draft>> {
        let (Node::CheckpointDraft(id) | Node::BackupDraft(id)) = node else {
            return Err(Error::new(Kind::Invalid, "not a document"));
        };
        let gone = || Error::new(Kind::NotFound, "the document was closed");
        self.0.lock().drafts.get(&id).cloned().ok_or_else(gone)
    }

    /// Those that a directory shows.
    pub(super) fn shown_in(&self, dir: Node) -> Vec<Arc<Draft>> {
        let open = self.0.lock();
        let shown = open
            .drafts
            .values()
            .filter(|d| d.shown() && d.node.parent() == dir);
        shown.cloned().collect()
    }
}

impl Draft {
    fn shown(&self) -> bool {
        !self.text.lock().tried
    }

    fn shown_as(&self, other: &Self) -> bool {
        self.node.parent() == other.node.parent() && self.name == other.name && self.shown()
    }
}

fn being_written(draft: &Draft) -> Error {
    Error::new(
        Kind::Busy,
        format!("{} is being written by somebody else", draft.file_name()),
    )
    .hint("try again when they have closed it")
}

impl Vfs {
    /// Creates and opens a file: a document, in `checkpoints/` or `backups/`.
    pub fn create(&self, parent: Ino, name: &OsStr) -> Result<Created> {
        let created = self.draft(parent, name).and_then(|draft| {
            let found = self.found(draft.node)?;
            let opened = Opened {
                handle: self.files.insert(File::Draft(draft)),
                caching: Caching::Bypass,
            };
            Ok(Created { found, opened })
        });
        self.noted(|| format!("create {}", self.path_in(parent, name)), created)
    }

    fn draft(&self, parent: Ino, name: &OsStr) -> Result<Arc<Draft>> {
        let no_document = |what: &str| Err(Error::new(Kind::NotPermitted, what));
        let parent = Self::node(parent)?;
        if !matches!(parent, Node::Checkpoints | Node::Backups) {
            return no_document("files cannot be made here");
        }
        let text = name.to_string_lossy();
        let Some(name) = text.strip_suffix(ENDING) else {
            return no_document("only documents can be made here, such as tue.xml");
        };
        let name = Name::new(name)?;
        // Of a checkpoint there may be one: the document may redefine it.
        if parent == Node::Backups && self.domain.job(name.as_str()).is_some() {
            return Err(
                Error::new(Kind::Exists, format!("there is a backup {name} already"))
                    .hint("choose another name, or end it with rmdir"),
            );
        }
        match parent {
            Node::Backups => self.drafts.begin(Node::BackupDraft, name),
            _ => self.drafts.begin(Node::CheckpointDraft, name),
        }
    }

    /// What close(2) is told: of a document, whether what it says could be done. Asks the domain
    /// where [`asks`](Self::asks) says so.
    pub fn flush(&self, handle: Handle) -> Result<()> {
        let file = self.files.get(handle)?;
        let File::Draft(draft) = &*file else {
            return Ok(());
        };
        let done = draft.apply(|bytes| {
            match draft.node {
                Node::BackupDraft(_) => drop(self.domain.begin_backup_from(&draft.name, bytes)?),
                _ => self.domain.create_checkpoint_from(&draft.name, bytes)?,
            }
            self.touch();
            Ok(())
        });
        self.made(|| format!("close {}", self.path(draft.node)), done)
    }

    pub(super) fn write_draft(&self, draft: &Draft, offset: u64, bytes: &[u8]) -> Result<()> {
        let written = draft.write(offset, bytes);
        self.noted(|| format!("write {}", self.path(draft.node)), written)
    }

    pub(super) fn truncate_draft(&self, draft: &Draft, size: u64) -> Result<()> {
        let cut = draft.truncate(size);
        self.noted(|| format!("truncate {}", self.path(draft.node)), cut)
    }

    pub(super) fn end_draft(&self, draft: &Draft) {
        self.drafts.end(draft);
    }

    /// Nobody but who made it opens it.
    pub(super) fn refuse_draft(&self, node: Node) -> Error {
        match self.drafts.get(node) {
            Ok(draft) => being_written(&draft),
            Err(gone) => gone,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draft() -> Draft {
        Draft::new(Node::BackupDraft(1), Name::new("tue").unwrap())
    }

    fn close(draft: &Draft) -> (Vec<String>, Option<Kind>) {
        let mut asked = Vec::new();
        let outcome = draft.apply(|bytes| {
            let text = String::from_utf8(bytes.to_vec()).unwrap();
            let whole = text.ends_with("</d>\n");
            asked.push(text);
            match whole {
                true => Ok(()),
                false => Err(Error::new(Kind::Invalid, "no end")),
            }
        });
        (asked, outcome.err().map(|e| e.kind()))
    }

    #[test]
    fn a_shell_closes_before_it_writes() {
        let draft = draft();
        assert_eq!(close(&draft), (vec![], None));
        assert!(draft.shown());
        draft.write(0, b"<d></d>\n").unwrap();
        assert_eq!(close(&draft), (vec!["<d></d>\n".to_owned()], None));
        assert!(!draft.shown());
        // And again: once is enough.
        assert_eq!(close(&draft), (vec![], None));
        assert_eq!(draft.write(8, b"x").unwrap_err().kind(), Kind::Busy);
        assert_eq!(draft.truncate(0).unwrap_err().kind(), Kind::Busy);
    }

    #[test]
    fn a_part_is_refused_and_the_whole_is_taken() {
        let draft = draft();
        draft.write(0, b"<d>").unwrap();
        assert_eq!(close(&draft), (vec!["<d>".to_owned()], Some(Kind::Invalid)));
        assert_eq!(
            close(&draft),
            (vec![], Some(Kind::Invalid)),
            "not asked again"
        );
        draft.write(3, b"</d>\n").unwrap();
        assert_eq!(close(&draft), (vec!["<d></d>\n".to_owned()], None));
    }

    #[test]
    fn writes_anywhere_up_to_the_limit() {
        let draft = draft();
        draft.write(4, b"e").unwrap();
        draft.write(0, b"abc").unwrap();
        let mut buf = [9; 8];
        assert_eq!(draft.read(0, &mut buf), 5);
        assert_eq!(&buf[..5], b"abc\0e");
        draft.truncate(2).unwrap();
        assert_eq!(draft.read(1, &mut buf), 1);
        assert_eq!(draft.read(2, &mut buf), 0);
        draft.write(MAX_BYTES as u64 - 1, b"x").unwrap();
        for offset in [MAX_BYTES as u64, u64::MAX] {
            let error = draft.write(offset, b"x").unwrap_err();
            assert_eq!(error.kind(), Kind::TooLarge);
        }
        assert_eq!(draft.truncate(u64::MAX).unwrap_err().kind(), Kind::TooLarge);
        assert_eq!(draft.extent().0, MAX_BYTES);
        assert_eq!(
            close(&draft),
            (vec![], Some(Kind::TooLarge)),
            "not a part of it"
        );
    }

    #[test]
    fn one_writer_a_name_until_it_was_tried() {
        let drafts = Drafts::default();
        let name = || Name::new("tue").unwrap();
        let first = drafts.begin(Node::BackupDraft, name()).unwrap();
        let second = drafts.begin(Node::BackupDraft, name());
        assert_eq!(second.err().unwrap().kind(), Kind::Busy);
        assert!(drafts.begin(Node::CheckpointDraft, name()).is_ok());
        first.write(0, b"<").unwrap();
        close(&first);
        assert!(drafts.begin(Node::BackupDraft, name()).is_ok());
        assert_eq!(drafts.shown_in(Node::Backups).len(), 1);
        assert!(drafts.get(first.node).is_ok(), "still open");
        drafts.end(&first);
        assert_eq!(drafts.get(first.node).err().unwrap().kind(), Kind::NotFound);
    }
}
