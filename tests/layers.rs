//! Holds the shape of the code: the layers of DESIGN's section 7 name only those below them, only
//! src/fuse/ names fuser, the pure layers do no I/O, and nothing can panic outside tests.
//!
//! Works on the text with comments and strings blanked out; no compiler is asked. The second half
//! of this file shows the checker code that it must reject.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

/// Each layer, and those that it may name. Nothing else may be named by it.
const LAYERS: &[(&str, &[&str])] = &[
    ("main", &["cli"]),
    (
        "cli",
        &[
            "fuse", "vfs", "engine", "restore", "view", "backend", "xml", "model",
        ],
    ),
    ("restore", &["view", "xml", "model"]),
    ("fuse", &["vfs", "engine", "view", "model"]),
    ("vfs", &["engine", "view", "backend", "xml", "model"]),
    ("engine", &["view", "backend", "xml", "model"]),
    ("view", &["model"]),
    ("backend", &["qmp", "nbd", "xml", "model"]),
    ("qmp", &["model"]),
    ("nbd", &["model"]),
    ("xml", &["model"]),
    ("model", &[]),
];

/// Modules of the standard library that do I/O, and the layers that must not name them.
const PURE: &[&str] = &["view", "model", "xml"];
const IO: &[&str] = &[
    "std::fs",
    "std::net",
    "std::os::unix::net",
    "std::process",
    "std::thread",
];

/// Code that ends the process instead of refusing.
const PANICS: &[&str] = &[
    ".unwrap()",
    ".expect(",
    "panic!(",
    "unreachable!(",
    "todo!(",
    "unimplemented!(",
];

const LONGEST: usize = 600;

/// A file of the crate, as the checks see it.
struct Source {
    /// Where it is, for messages.
    name: String,
    /// Its module path: `["fuse", "errno"]`; `["main"]` for main.rs; empty for lib.rs.
    module: Vec<String>,
    /// The text with comments, strings and characters blanked, line by line as in the file.
    code: String,
    lines: usize,
}

impl Source {
    fn new(name: &str, text: &str) -> Self {
        let mut module: Vec<String> = name
            .strip_prefix("src/")
            .unwrap_or(name)
            .trim_end_matches(".rs")
            .split('/')
            .map(str::to_owned)
            .collect();
        if matches!(module.last().map(String::as_str), Some("mod" | "lib")) {
            module.pop();
        }
        Self {
            name: name.to_owned(),
            module,
            code: blank(text),
            lines: text.lines().count(),
        }
    }

    fn layer(&self) -> &str {
        self.module.first().map_or("lib", String::as_str)
    }

    /// The code ahead of the file's tests.
    fn shipped(&self) -> &str {
        self.code.split("#[cfg(test)]").next().unwrap_or_default()
    }

    /// Which layers the file names: `(line, layer)`.
    fn named(&self) -> Vec<(usize, String)> {
        let mut found = Vec::new();
        for path in paths(&self.code) {
            let mut words: Vec<&str> = path.words.iter().map(String::as_str).collect();
            let mut absolute: Vec<&str> = Vec::new();
            match words[0] {
                // In main.rs, crate is another crate than the library.
                "crate" | "fleecefs" => drop(words.remove(0)),
                "super" | "self" => {
                    absolute = self.module.iter().map(String::as_str).collect();
                    // An inline module (its tests) is one level deeper than the file; then the
                    // path stays within the layer all the more.
                    while let Some(&first) = words.first() {
                        match first {
                            "super" => drop(absolute.pop()),
                            "self" => {}
                            _ => break,
                        }
                        words.remove(0);
                    }
                }
                _ => continue,
            }
            absolute.extend(words);
            // A lone `crate::{…}` comes here once for each of its branches.
            if let Some(layer) = absolute.first()
                && LAYERS.iter().any(|(name, _)| name == layer)
            {
                found.push((path.line, (*layer).to_owned()));
            }
        }
        found
    }

    /// Everything that is wrong with the file.
    fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let mut fault = |line: usize, what: String| {
            faults.push(format!("{}:{line}: {what}", self.name));
        };
        let layer = self.layer();
        if layer != "lib" {
            match LAYERS.iter().find(|(name, _)| *name == layer) {
                None => fault(1, format!("{layer} is no layer")),
                Some((_, below)) => {
                    for (line, named) in self.named() {
                        if named != layer && !below.contains(&named.as_str()) {
                            fault(line, format!("{layer} must not know {named}"));
                        }
                    }
                }
            }
        }
        for path in paths(&self.code) {
            if path.words[0] == "fuser" && layer != "fuse" {
                fault(path.line, "only src/fuse/ knows fuser".into());
            }
            let joined = path.words.join("::");
            if PURE.contains(&layer) {
                for io in IO.iter().filter(|io| starts(&joined, io)) {
                    fault(path.line, format!("{layer} does no I/O, but names {io}"));
                }
            }
        }
        for (at, line) in self.shipped().lines().enumerate() {
            for panic in PANICS.iter().filter(|p| contains(line, p)) {
                fault(at + 1, format!("{panic} outside tests"));
            }
        }
        if self.lines > LONGEST {
            fault(self.lines, format!("over {LONGEST} lines"));
        }
        faults
    }
}

/// Is `path` this module, or in it?
fn starts(path: &str, module: &str) -> bool {
    path.strip_prefix(module)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

/// Does a line hold this, and not as the end of a longer name?
fn contains(line: &str, what: &str) -> bool {
    line.match_indices(what).any(|(at, _)| {
        what.starts_with('.') || !line[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_')
    })
}

/// A path in the code, such as `crate::qmp::Client`.
struct CodePath {
    line: usize,
    words: Vec<String>,
}

/// All paths of a text, those in braces multiplied out: `a::{b, c::d}` is `a::b` and `a::c::d`.
fn paths(code: &str) -> Vec<CodePath> {
    let mut found = Vec::new();
    // Prefixes of the braces that are open: None for a brace that is not a path's.
    let mut open: Vec<Option<Vec<String>>> = Vec::new();
    let mut words: Vec<String> = Vec::new();
    let mut joined = false; // the last thing was `::`
    let mut line = 1;
    let mut chars = code.chars().peekable();
    while let Some(c) = chars.next() {
        if c.is_alphanumeric() || c == '_' {
            let mut word = String::from(c);
            while let Some(&next) = chars.peek() {
                if !next.is_alphanumeric() && next != '_' {
                    break;
                }
                word.push(next);
                chars.next();
            }
            if !joined {
                finish(&mut words, &open, line, &mut found);
            }
            words.push(word);
            joined = false;
        } else if c == ':' && chars.peek() == Some(&':') {
            chars.next();
            if words.is_empty() {
                joined = false; // `::std::…`, `<T>::new`
            } else {
                joined = true;
            }
        } else if c == '\n' {
            line += 1;
        } else if c.is_whitespace() {
        } else if c == '{' {
            if joined {
                let mut prefix = open.iter().flatten().last().cloned().unwrap_or_default();
                prefix.append(&mut words);
                open.push(Some(prefix));
            } else {
                finish(&mut words, &open, line, &mut found);
                open.push(None);
            }
            joined = false;
        } else {
            finish(&mut words, &open, line, &mut found);
            joined = false;
            if c == '}' {
                open.pop();
            }
        }
    }
    finish(&mut words, &open, line, &mut found);
    found
}

fn finish(
    words: &mut Vec<String>,
    open: &[Option<Vec<String>>],
    line: usize,
    found: &mut Vec<CodePath>,
) {
    if words.is_empty() {
        return;
    }
    let mut all = match open.last() {
        Some(Some(prefix)) => prefix.clone(),
        _ => Vec::new(),
    };
    all.append(words);
    found.push(CodePath { line, words: all });
}

/// Replaces comments (with the links in them), strings and characters by blanks.
fn blank(text: &str) -> String {
    let bytes: Vec<char> = text.chars().collect();
    let at = |i: usize| bytes.get(i).copied().unwrap_or('\0');
    let mut out = String::with_capacity(text.len());
    let mut i = 0;
    while i < bytes.len() {
        let end = if at(i) == '/' && at(i + 1) == '/' {
            (i..bytes.len()).find(|&j| at(j) == '\n')
        } else if at(i) == '/' && at(i + 1) == '*' {
            let mut depth = 0;
            (i..bytes.len())
                .find(|&j| {
                    match (at(j), at(j + 1)) {
                        ('/', '*') => depth += 1,
                        ('*', '/') => depth -= 1,
                        _ => {}
                    }
                    depth == 0
                })
                .map(|j| j + 2)
        } else if at(i) == 'r'
            && matches!(at(i + 1), '"' | '#')
            && !(i > 0 && (at(i - 1).is_alphanumeric() || at(i - 1) == '_'))
        {
            let hashes = (i + 1..bytes.len()).take_while(|&j| at(j) == '#').count();
            let open = i + 1 + hashes;
            if at(open) == '"' {
                (open + 1..bytes.len())
                    .find(|&j| at(j) == '"' && (1..=hashes).all(|k| at(j + k) == '#'))
                    .map(|j| j + 1 + hashes)
            } else {
                Some(i) // r#raw_identifier
            }
        } else if at(i) == '"' {
            string_end(&bytes, i + 1, '"')
        } else if at(i) == '\'' && (at(i + 1) == '\\' || at(i + 2) == '\'') {
            string_end(&bytes, i + 1, '\'')
        } else {
            Some(i)
        };
        let end = end.unwrap_or(bytes.len());
        if end == i {
            out.push(bytes[i]);
            i += 1;
        } else {
            out.extend(bytes[i..end].iter().map(|&c| match c {
                '\n' => '\n',
                _ => ' ',
            }));
            i = end;
        }
    }
    out
}

fn string_end(chars: &[char], mut i: usize, quote: char) -> Option<usize> {
    while i < chars.len() {
        match chars[i] {
            '\\' => i += 1,
            c if c == quote => return Some(i + 1),
            _ => {}
        }
        i += 1;
    }
    None
}

fn read(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            read(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

fn sources(dir: &str) -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    read(&root.join(dir), &mut files);
    files.sort();
    files
        .iter()
        .map(|file| {
            let name = file.strip_prefix(root).unwrap().to_str().unwrap();
            Source::new(name, &fs::read_to_string(file).unwrap())
        })
        .collect()
}

#[test]
fn the_crate_keeps_its_shape() {
    let sources = sources("src");
    assert!(sources.len() > 10, "where is the source?");
    for layer in LAYERS.iter().map(|(name, _)| *name) {
        assert!(
            sources.iter().any(|s| s.layer() == layer),
            "no file of {layer}"
        );
    }
    let faults: Vec<String> = sources.iter().flat_map(Source::faults).collect();
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

#[test]
fn the_mount_helper_does_not_panic() {
    let sources = sources("mount-helper/src");
    assert!(!sources.is_empty());
    for source in sources {
        let faults = source.faults();
        let of_layers = |f: &&String| !f.ends_with("is no layer");
        let faults: Vec<_> = faults.iter().filter(of_layers).collect();
        assert!(faults.is_empty(), "{faults:?}");
    }
}

#[cfg(test)]
mod the_checker {
    use super::*;

    fn faults(name: &str, text: &str) -> Vec<String> {
        Source::new(name, text).faults()
    }

    #[track_caller]
    fn rejects(name: &str, text: &str, why: &str) {
        let faults = faults(name, text);
        assert!(
            faults.iter().any(|f| f.contains(why)),
            "{name}: {text:?} gave {faults:?}"
        );
    }

    #[track_caller]
    fn accepts(name: &str, text: &str) {
        assert_eq!(faults(name, text), Vec::<String>::new(), "{name}: {text:?}");
    }

    #[test]
    fn finds_arrows_that_point_up_or_aside() {
        let up = "engine must not know vfs";
        rejects("src/engine/mod.rs", "use crate::vfs::Node;", up);
        rejects("src/engine/a.rs", "fn f(n: crate::vfs::Node) {}", up);
        rejects("src/engine/a.rs", "use super::super::vfs::Node;", up);
        rejects("src/engine/mod.rs", "use super::vfs;", up);
        rejects("src/engine/a/b.rs", "use super::super::super::vfs;", up);
        rejects("src/engine/a.rs", "use fleecefs::vfs::Node;", up);
        rejects(
            "src/engine/a.rs",
            "use crate::{model::Name, vfs::Node};",
            up,
        );
        rejects(
            "src/engine/a.rs",
            "use crate::{\n  model::{A, B},\n  vfs,\n};",
            up,
        );
        rejects("src/engine/a.rs", "use super::super::{vfs::Node};", up);
        rejects("src/engine/a.rs", "use crate :: vfs;", up);
        rejects(
            "src/qmp/a.rs",
            "use crate::nbd::X;",
            "qmp must not know nbd",
        );
        rejects("src/view/a.rs", "use crate::backend::X;", "view must not");
        rejects(
            "src/restore/a.rs",
            "use crate::engine::X;",
            "restore must not",
        );
        rejects("src/model/a.rs", "use crate::xml::X;", "model must not");
        rejects("src/main.rs", "use fleecefs::engine::X;", "main must not");
        rejects("src/fuse/a.rs", "use crate::nbd::X;", "fuse must not");
        rejects("src/novel/mod.rs", "", "novel is no layer");
        let tests = "#[cfg(test)]\nmod tests { use crate::vfs::X; }";
        rejects("src/engine/a.rs", tests, up);
    }

    #[test]
    fn says_the_line() {
        rejects("src/engine/a.rs", "\n\nuse crate::vfs;\n", "a.rs:3: ");
        let split = "use crate::{\n    model,\n    vfs,\n};";
        rejects("src/engine/a.rs", split, "a.rs:3: ");
    }

    #[test]
    fn lets_the_rest_pass() {
        accepts("src/engine/a.rs", "use crate::{backend::A, model::B};");
        accepts("src/engine/a.rs", "use super::b; use crate::engine::c;");
        accepts("src/engine/mod.rs", "use self::vfs_like; mod vfs_like;");
        accepts("src/engine/a.rs", "// crate::vfs\n/// [`crate::vfs`]\n");
        accepts("src/engine/a.rs", "/* crate::vfs /* */ fuser::X */");
        accepts("src/engine/a.rs", "const A: &str = \"crate::vfs\";");
        accepts("src/engine/a.rs", "const A: &str = r#\"\"crate::vfs\"#;");
        accepts("src/engine/a.rs", "const A: char = '\"'; // crate::vfs");
        accepts("src/engine/a.rs", "fn f<'a>(x: &'a str) {} // '\"'");
        accepts("src/main.rs", "fn main() { fleecefs::cli::main() }");
        accepts("src/fuse/a.rs", "use fuser::Session;");
        accepts("src/lib.rs", "pub mod vfs; pub mod fuse;");
    }

    #[test]
    fn fuser_and_io_have_their_places() {
        let only = "only src/fuse/ knows fuser";
        rejects("src/vfs/a.rs", "use fuser::FileAttr;", only);
        rejects("src/cli/a.rs", "fn f(a: ::fuser::X) {}", only);
        rejects("src/lib.rs", "pub use fuser as f;", only);
        rejects("src/view/a.rs", "use std::fs::File;", "names std::fs");
        rejects("src/view/a.rs", "use std::{fs, io};", "names std::fs");
        let socket = "use std::os::unix::{net::UnixStream, fs::FileExt};";
        rejects("src/view/a.rs", socket, "names std::os::unix::net");
        accepts("src/view/a.rs", "use std::{fmt, io::Write};");
        accepts("src/view/a.rs", "use std::fsync;");
        accepts("src/backend/a.rs", "use std::fs::File;");
    }

    #[test]
    fn finds_what_panics() {
        for bad in [
            "x.unwrap();",
            "x.expect(\"y\");",
            "panic!(\"no\");",
            "core::panic!(\"no\");",
            "todo!();",
            "unimplemented!();",
            "unreachable!();",
        ] {
            rejects("src/engine/a.rs", bad, "outside tests");
        }
        accepts("src/engine/a.rs", "x.unwrap_or(1); x.expect_err(1);");
        accepts("src/engine/a.rs", "dont_panic!(); // panic!()");
        accepts("src/engine/a.rs", "#[cfg(test)]\nmod t { x.unwrap(); }");
    }

    #[test]
    fn finds_long_files() {
        rejects("src/engine/a.rs", &"\n".repeat(601), "over 600 lines");
        accepts("src/engine/a.rs", &"\n".repeat(600));
    }
}
