//! `control`: one word is written and done at once; write(2) returns the error.

use super::Vfs;
use super::node::Node;
use crate::engine::Job;
use crate::model::{Control, Error, Kind, Mode, Result, SIZES, parse_size};

/// What a running push backup can be told.
const OF_A_PUSH: [&str; 4] = ["abort", "pause", "resume", "speed SIZE"];
/// A pull backup goes as fast as it is read.
const OF_A_PULL: [&str; 1] = ["abort"];
const OF_A_CHECKPOINT: [&str; 1] = ["forget"];

impl Vfs {
    /// The words that a `control` takes.
    pub(super) fn controls(&self, node: Node) -> Result<&'static [&'static str]> {
        Ok(match node {
            Node::BackupControl(job) => words(&self.job(job)?),
            Node::CheckpointControl(c) => {
                self.checkpoint(c)?;
                &OF_A_CHECKPOINT
            }
            _ => return Err(Error::new(Kind::Invalid, "not a control")),
        })
    }

    /// Does what was written to a `control`. Asks the domain.
    pub(super) fn control(&self, node: Node, written: &[u8]) -> Result<()> {
        let path = self.path(node);
        let done = self.obey(node, &String::from_utf8_lossy(written));
        self.noted(|| format!("write {path}"), done)
    }

    fn obey(&self, node: Node, written: &str) -> Result<()> {
        let command: Vec<&str> = written.split_whitespace().collect();
        match (node, &command[..]) {
            (Node::BackupControl(job), command) => {
                let job = self.job(job)?;
                let command =
                    parse(command).unwrap_or_else(|| Err(unknown(written, words(&job))))?;
                self.domain.control(job.id(), command)
            }
            (Node::CheckpointControl(c), ["forget"]) => {
                let entry = self.checkpoint(c)?;
                self.domain.forget_checkpoint(&entry.checkpoint.name)?;
                self.texts.forget(Node::Checkpoint(c));
                self.touch();
                Ok(())
            }
            _ => Err(unknown(written, self.controls(node)?)),
        }
    }
}

fn words(job: &Job) -> &'static [&'static str] {
    match job.mode() {
        Mode::Push => &OF_A_PUSH,
        Mode::Pull => &OF_A_PULL,
    }
}

/// What a backup is told; `None` if there is no such word.
fn parse(command: &[&str]) -> Option<Result<Control>> {
    Some(Ok(match command {
        ["abort"] => Control::Abort,
        ["pause"] => Control::Pause,
        ["resume"] => Control::Resume,
        ["speed", size] => match parse_size(size) {
            Some(bytes) => Control::Speed(bytes),
            None => {
                let error = Error::new(Kind::Invalid, format!("{size:?} is no speed"));
                return Some(Err(error.hint(format!("{SIZES}, a second; 0 is no limit"))));
            }
        },
        _ => return None,
    }))
}

fn unknown(written: &str, words: &[&str]) -> Error {
    Error::new(
        Kind::Invalid,
        format!("{:?} is no command here", written.trim()),
    )
    .hint(format!("there are: {}", words.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands() {
        let parsed = |text: &str| {
            let words: Vec<&str> = text.split_whitespace().collect();
            parse(&words)
        };
        for (text, command) in [
            ("abort\n", Control::Abort),
            (" pause", Control::Pause),
            ("resume", Control::Resume),
            ("speed 50M", Control::Speed(50 << 20)),
            ("speed 0", Control::Speed(0)),
        ] {
            assert_eq!(parsed(text).unwrap().unwrap(), command);
        }
        for text in ["", "Abort", "abort pause", "speed", "stop"] {
            assert!(parsed(text).is_none(), "{text}");
        }
        let error = parsed("speed fast").unwrap().unwrap_err();
        assert!(
            error.to_string().contains("\"fast\" is no speed (write"),
            "{error}"
        );
    }
}
