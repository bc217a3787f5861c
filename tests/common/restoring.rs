//! Running `fleecefs restore` on files that a test has made.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};

use super::copies::Night;
use super::tools::temp_dir;

/// Bytes in a slice.
pub const SLICE: u64 = 65536;

/// A directory with an `out/` in it, and the command that runs there.
pub struct Place(tempfile::TempDir);

impl Place {
    pub fn new() -> Self {
        let dir = temp_dir();
        fs::create_dir(dir.path().join("out")).unwrap();
        Self(dir)
    }

    pub fn path(&self, below: &str) -> PathBuf {
        self.0.path().join(below)
    }

    pub fn restore(&self, words: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_fleecefs"))
            .arg("restore")
            .args(words)
            .current_dir(self.0.path())
            .output()
            .unwrap()
    }

    /// It succeeds, with one line, which is returned.
    #[track_caller]
    pub fn restores(&self, words: &[&str]) -> String {
        let output = self.restore(words);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{words:?}: {stderr}");
        assert_eq!(stderr, "", "no bar where there is no terminal");
        let said = String::from_utf8(output.stdout).unwrap();
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(said.ends_with(", verified\n"), "{said}");
        said
    }

    /// It refuses with one sentence, and leaves nothing.
    #[track_caller]
    pub fn refuses(&self, words: &[&str], why: &str) {
        let before = self.left();
        let output = self.restore(words);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success(), "{words:?} should fail: {why}");
        assert!(stderr.contains(why), "{words:?}: {stderr}, not {why}");
        assert_eq!(stderr.lines().count(), 1, "one sentence: {stderr}");
        assert_eq!(self.left(), before, "{words:?}");
    }

    pub fn left(&self) -> Vec<String> {
        let entries = fs::read_dir(self.path("out")).unwrap();
        let name = |e: std::io::Result<fs::DirEntry>| e.unwrap().file_name().into_string().unwrap();
        let mut names: Vec<String> = entries.map(name).collect();
        names.sort();
        names
    }

    /// mon/ with the whole disk, tue/ and so on each since the one before, with manifests.
    pub fn series(&self, nights: &[Night]) {
        for (at, night) in nights.iter().enumerate() {
            let dir = self.path(&night.name);
            let base = at.checked_sub(1).map(|i| &nights[i]);
            night.documents(&dir, base);
            let manifest = night.manifest(base, SLICE).write();
            fs::write(dir.join("manifest"), manifest).unwrap();
            match base {
                None => night.whole_raw(&dir),
                Some(base) => night.changes_raw(&dir, &base.name, &night.changes(&[])),
            }
        }
    }

    pub fn edit(&self, file: &str, old: &str, new: &str) {
        let text = fs::read_to_string(self.path(file)).unwrap();
        assert!(text.contains(old), "{file} has no {old:?}: {text}");
        fs::write(self.path(file), text.replacen(old, new, 1)).unwrap();
    }
}
