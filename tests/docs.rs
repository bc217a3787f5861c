//! The documents against the code, both read as text, so that neither goes stale unnoticed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

fn top() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(top().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// README, CHANGELOG and all of docs/, as paths below the top.
fn documents() -> Vec<String> {
    let mut all = vec!["README.md".to_owned(), "CHANGELOG.md".to_owned()];
    for entry in fs::read_dir(top().join("docs")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if name.ends_with(".md") {
            all.push(format!("docs/{name}"));
        }
    }
    assert!(all.len() > 4, "documents are missing: {all:?}");
    all.sort();
    all
}

/// The fenced blocks of a document, as (tag, text).
fn blocks(text: &str) -> Vec<(String, String)> {
    let mut found: Vec<(String, String)> = Vec::new();
    let mut inside = false;
    for line in text.lines() {
        match line.strip_prefix("```") {
            Some(tag) if !inside => {
                found.push((tag.trim().to_owned(), String::new()));
                inside = true;
            }
            Some(_) => inside = false,
            None if inside => {
                let block = &mut found.last_mut().unwrap().1;
                block.push_str(line);
                block.push('\n');
            }
            None => {}
        }
    }
    assert!(!inside, "a fenced block has no end");
    found
}

/// The text of a document outside its fenced blocks.
fn prose(text: &str) -> String {
    let mut inside = false;
    let mut out = String::new();
    for line in text.lines() {
        if line.starts_with("```") {
            inside = !inside;
        } else if !inside {
            out.push_str(line);
            out.push('\n');
        }
    }
    out
}

/// The section under a heading, down to the next one of its level or above.
fn section<'a>(text: &'a str, heading: &str) -> &'a str {
    let level = heading.bytes().take_while(|&b| b == b'#').count();
    let begin = text
        .find(&format!("\n{heading}\n"))
        .unwrap_or_else(|| panic!("there is no section {heading:?}"))
        + heading.len()
        + 2;
    let rest = &text[begin..];
    let mut at = 0;
    for line in rest.split_inclusive('\n') {
        let hashes = line.bytes().take_while(|&b| b == b'#').count();
        if (1..=level).contains(&hashes) {
            break;
        }
        at += line.len();
    }
    &rest[..at]
}

/// The rows of all tables in a text, without heads and rules, cut into trimmed cells.
fn rows(text: &str) -> Vec<Vec<String>> {
    let lines: Vec<&str> = text.lines().collect();
    let is_rule = |line: &str| line.starts_with("|--");
    lines
        .iter()
        .enumerate()
        .filter(|(i, line)| {
            let head = lines.get(i + 1).is_some_and(|next| is_rule(next));
            line.starts_with('|') && !is_rule(line) && !head
        })
        .map(|(_, line)| {
            let inner = line.trim().trim_start_matches('|').replace("\\|", "\u{1}");
            let inner = inner.trim_end_matches('|');
            let cell = |c: &str| c.trim().replace('\u{1}', "|");
            inner.split('|').map(cell).collect()
        })
        .collect()
}

fn unquoted(cell: &str) -> String {
    cell.trim_matches('`').to_owned()
}

/// Rust without comments (`//` only) and without what follows its unit tests' attribute.
fn code(text: &str) -> String {
    let shipped = text.split("#[cfg(test)]").next().unwrap_or_default();
    let lines = shipped.lines().map(|l| l.split("//").next().unwrap_or(l));
    lines.collect::<Vec<_>>().join("\n")
}

/// The identifier that a text begins with.
fn ident(text: &str) -> &str {
    let end = text
        .find(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .unwrap_or(text.len());
    &text[..end]
}

/// Kinds and the errno that the comment of each names, from the enum's source.
fn kinds() -> BTreeMap<String, String> {
    let source = read("src/model/error.rs");
    let (_, rest) = source.split_once("pub enum Kind {").expect("enum Kind");
    let (body, _) = rest.split_once("\n}").expect("the end of enum Kind");
    let mut found = BTreeMap::new();
    let mut errno = String::new();
    for line in body.lines().map(str::trim) {
        if let Some(comment) = line.strip_prefix("///") {
            if errno.is_empty() {
                let word = comment.split(':').next().unwrap_or_default().trim();
                errno = word.to_owned();
            }
        } else if line.starts_with(|c: char| c.is_ascii_uppercase()) {
            found.insert(ident(line).to_owned(), std::mem::take(&mut errno));
        }
    }
    assert!(found.len() > 10, "cannot parse enum Kind: {found:?}");
    found
}

/// What the match of `src/fuse/errno.rs` says: `Kind::A | Kind::B => … libc::EX` or `Errno::EX`.
fn matched(source: &str) -> BTreeMap<String, String> {
    let source = code(source);
    let mut found = BTreeMap::new();
    let mut waiting: Vec<String> = Vec::new();
    let mut rest = source.as_str();
    let mut past_arrow = false;
    while let Some(c) = rest.chars().next() {
        if let Some(tail) = rest.strip_prefix("Kind::") {
            if past_arrow {
                waiting.clear();
                past_arrow = false;
            }
            waiting.push(ident(tail).to_owned());
        } else if rest.starts_with("=>") {
            past_arrow = true;
        } else if past_arrow
            && let Some(tail) = ["libc::E", "Errno::E"].iter().find_map(|p| {
                let tail = rest.strip_prefix(p)?;
                tail.starts_with(|c: char| c.is_ascii_uppercase() || c.is_ascii_digit())
                    .then_some(tail)
            })
        {
            let errno = match format!("E{}", ident(tail)) {
                // One number on Linux.
                same if same == "ENOTSUP" => "EOPNOTSUPP".to_owned(),
                errno => errno,
            };
            for kind in waiting.drain(..) {
                found.insert(kind, errno.clone());
            }
            past_arrow = false;
        }
        rest = &rest[c.len_utf8()..];
    }
    found
}

fn assert_same(left: (&str, &BTreeMap<String, String>), right: (&str, &BTreeMap<String, String>)) {
    for (key, value) in left.1 {
        match right.1.get(key) {
            None => panic!("{} has Kind::{key} ({value}), {} has not", left.0, right.0),
            Some(other) => assert_eq!(
                value, other,
                "Kind::{key} is {value} in {} and {other} in {}",
                left.0, right.0
            ),
        }
    }
    for key in right.1.keys() {
        assert!(
            left.1.contains_key(key),
            "{} has Kind::{key}, {} has not",
            right.0,
            left.0
        );
    }
}

#[test]
fn the_table_of_errors_is_complete() {
    let text = read("docs/semantics.md");
    let mut table = BTreeMap::new();
    for row in rows(section(&text, "## Errors")) {
        assert_eq!(row.len(), 3, "errno, kind, when: {row:?}");
        let (errno, kind) = (unquoted(&row[0]), unquoted(&row[1]));
        assert!(
            table.insert(kind.clone(), errno).is_none(),
            "two rows for Kind::{kind}"
        );
    }
    let in_doc = ("docs/semantics.md", &table);
    assert_same(in_doc, ("the comments of src/model/error.rs", &kinds()));
    let errnos: BTreeSet<&String> = table.values().collect();
    assert_eq!(errnos.len(), table.len(), "one row an errno");

    let path = "src/fuse/errno.rs";
    if top().join(path).exists() {
        assert_same(in_doc, (path, &matched(&read(path))));
    }
}

#[test]
fn the_match_is_read_right() {
    let source = "
        use crate::model::Kind;
        /// Kind::Nothing => libc::ENONE
        fn errno(kind: Kind) -> i32 {
            match kind {
                Kind::Exists => libc::EEXIST, // taken
                Kind::Busy | Kind::Stale => fuser::Errno::EBUSY,
                Kind::Io => { Errno::from_i32(libc::EIO) }
                Kind::Unsupported => Errno::ENOTSUP,
            }
        }
        #[cfg(test)]
        mod tests { fn t() { let _ = Kind::Io => libc::EPERM; } }";
    let expected = [
        ("Busy", "EBUSY"),
        ("Exists", "EEXIST"),
        ("Io", "EIO"),
        ("Stale", "EBUSY"),
        ("Unsupported", "EOPNOTSUPP"),
    ];
    let expected = expected.map(|(k, e)| (k.to_owned(), e.to_owned()));
    assert_eq!(matched(source), BTreeMap::from(expected));
}

/// How GitHub makes a heading an anchor.
fn anchor(heading: &str) -> String {
    heading
        .trim()
        .to_lowercase()
        .chars()
        .filter_map(|c| match c {
            ' ' => Some('-'),
            '-' | '_' => Some(c),
            c if c.is_alphanumeric() => Some(c),
            _ => None,
        })
        .collect()
}

#[test]
fn links_between_documents_lead_somewhere() {
    let mut checked = 0;
    for document in documents() {
        let text = prose(&read(&document));
        for part in text.split("](").skip(1) {
            let target = part.split(')').next().unwrap_or_default();
            if target.contains("://") {
                continue;
            }
            let (path, fragment) = target.split_once('#').unwrap_or((target, ""));
            let from = top().join(&document);
            let file: PathBuf = match path {
                "" => from.clone(),
                path => from.parent().unwrap().join(path),
            };
            assert!(file.exists(), "{document}: {target} leads nowhere");
            if !fragment.is_empty() {
                let there = prose(&fs::read_to_string(&file).unwrap());
                let mut headings = there.lines().filter(|l| l.starts_with('#'));
                assert!(
                    headings.any(|h| anchor(h.trim_start_matches('#')) == fragment),
                    "{document}: {target}: no such heading"
                );
            }
            checked += 1;
        }
    }
    assert!(checked > 10, "only {checked} links found");
}

/// The options after `-o` in a text, without their values.
fn options_in(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for part in text.split("-o ").skip(1) {
        let word = part.split([' ', '\n', '`', ']', ')']).next().unwrap_or("");
        for option in word.split(',') {
            let name = option.split('=').next().unwrap_or_default();
            let is_name = |c: char| c.is_ascii_lowercase() || c == '-' || c == '_';
            // `-o OPTION` stands for any of them.
            if !name.is_empty() && name.chars().all(is_name) {
                found.push(name.to_owned());
            }
        }
    }
    found
}

/// All of `src/cli`, without comments and unit tests.
fn command_line() -> String {
    let mut text = String::new();
    for entry in fs::read_dir(top().join("src/cli")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "rs") {
            text += &code(&fs::read_to_string(path).unwrap());
        }
    }
    text
}

#[test]
fn options_that_are_named_exist() {
    let semantics = read("docs/semantics.md");
    let mut named: BTreeMap<String, String> = BTreeMap::new();
    for row in rows(section(&semantics, "## Mounting")) {
        if row.len() == 3 {
            let name = unquoted(&row[0]).split('=').next().unwrap().to_owned();
            named.insert(name, "the table in docs/semantics.md".to_owned());
        }
    }
    assert!(
        named.contains_key("scratch-limit"),
        "the table of options is not where this test looks: {named:?}"
    );
    for document in documents() {
        for option in options_in(&read(&document)) {
            assert!(
                named.contains_key(&option),
                "{document} names -o {option}, which is not in the table of docs/semantics.md"
            );
        }
    }
    let source = command_line();
    if source.len() < 1000 {
        eprintln!("src/cli has no options yet: not compared");
        return;
    }
    for (option, place) in named {
        let known = [format!("\"{option}\""), format!("\"{option}=")];
        assert!(
            known.iter().any(|k| source.contains(k)),
            "{place} names the option {option}, which src/cli does not know"
        );
    }
}

/// Every file in a picture of the tree, by its path.
fn tree(text: &str) -> Vec<String> {
    let mut pictures = blocks(text)
        .into_iter()
        .filter(|(_, block)| block.starts_with("MNT/\n"));
    let (_, picture) = pictures.next().expect("a picture of the tree");
    assert!(pictures.next().is_none(), "two pictures of the tree");
    let mut path: Vec<String> = Vec::new();
    let mut found = Vec::new();
    for line in picture.lines().skip(1) {
        let (lead, rest) = line.split_once("── ").expect("a branch");
        // Each level is drawn four characters wide; `├` or `└` is the first of the last.
        path.truncate(lead.chars().count() / 4);
        let mut words = rest.split_whitespace();
        let mut name = words.next().expect("a name").to_owned();
        if let (Some("->"), Some(target)) = (words.next(), words.next()) {
            name = format!("{name} -> {target}");
        }
        path.push(name.trim_end_matches('/').to_owned());
        found.push(path.join("/"));
    }
    found
}

#[test]
fn both_pictures_show_the_same_tree() {
    let pictured = tree(&read("README.md"));
    assert!(
        pictured.contains(&"backups/tue/since/mon/vda.map".to_owned()),
        "{pictured:?}"
    );
    assert_eq!(pictured, tree(&read("docs/semantics.md")));
}

/// Names that the vfs gives out are in the picture, and the other way round.
#[test]
fn the_picture_shows_what_the_vfs_has() {
    let path = "src/vfs";
    let source = code(&read("src/vfs/tree.rs")) + &code(&read("src/vfs/slices.rs"));
    let strings: BTreeSet<&str> = source.split('"').skip(1).step_by(2).collect();
    let mut shown = BTreeSet::new();
    for file in tree(&read("README.md")) {
        let name = file.rsplit('/').next().unwrap();
        let name = match file.rsplit_once(" -> ") {
            Some((link, _)) => link.rsplit('/').next().unwrap(),
            None => name,
        };
        // Names of disks, checkpoints and backups are examples.
        let number = name.bytes().all(|b| b.is_ascii_digit());
        if !["mon", "tue", "sun"].contains(&name) && !name.starts_with("vd") && !number {
            shown.insert(name.to_owned());
        }
    }
    for name in &shown {
        assert!(strings.contains(name.as_str()), "{path} has no {name}");
    }
    for name in strings {
        let is_name = name.ends_with(".xml") || name.ends_with(".raw") || name.ends_with(".map");
        if is_name && !name.contains(['{', ' ']) {
            assert!(shown.contains(name), "the picture of the tree lacks {name}");
        }
    }
}

#[test]
fn commands_in_the_readme_are_scripts_that_exist() {
    let mut found = 0;
    for (tag, block) in blocks(&read("README.md")) {
        if tag != "sh" {
            continue;
        }
        for line in block.lines().filter(|l| !l.trim().is_empty()) {
            let script = line.split_whitespace().next().unwrap();
            let meta = fs::metadata(top().join(script))
                .unwrap_or_else(|e| panic!("README.md says {line:?}: {e}"));
            assert!(
                meta.is_file() && meta.permissions().mode() & 0o111 != 0,
                "README.md says {line:?}, which cannot be run"
            );
            found += 1;
        }
    }
    assert_eq!(found, 2, "the README promises two commands");
}

/// Numbers and words that a document takes from the code: (document, its words, file, its words).
const QUOTES: &[(&str, &str, &str, &str)] = &[
    (
        "docs/semantics.md",
        "at most 251 bytes",
        "src/model/name.rs",
        "MAX_LEN: usize = 251",
    ),
    (
        "docs/semantics.md",
        "writing more than 1 MiB",
        "src/xml/tree.rs",
        "MAX_BYTES: usize = 1 << 20",
    ),
    (
        "docs/semantics.md",
        "Beyond 1 MiB",
        "src/vfs/events.rs",
        "MOST: usize = 1 << 20",
    ),
    (
        "README.md",
        "QEMU 7.2 or newer",
        "src/backend/qemu/link.rs",
        "major: 7,\n    minor: 2,",
    ),
    (
        "README.md",
        "Rust (1.89 or newer)",
        "Cargo.toml",
        "rust-version = \"1.89\"",
    ),
    (
        "CHANGELOG.md",
        "## [0.1.0]",
        "Cargo.toml",
        "version = \"0.1.0\"",
    ),
    (
        "docs/semantics.md",
        "less than 1 GiB",
        "src/backend/scratch.rs",
        "RESERVE: u64 = 1 << 30",
    ),
    (
        "docs/semantics.md",
        "less than a twentieth",
        "src/backend/scratch.rs",
        "(stat.f_blocks) / 20",
    ),
    (
        "docs/semantics.md",
        "five times a second",
        "src/backend/qemu/guard.rs",
        "from_millis(200)",
    ),
    (
        "docs/performance.md",
        "up to 32 KiB",
        "src/view/raw.rs",
        "BRIDGE: u64 = 32 * 1024",
    ),
    (
        "docs/performance.md",
        "up to eight NBD connections",
        "src/backend/over_nbd.rs",
        "CONNECTIONS: usize = 8",
    ),
    // Flaws of a checkpoint.
    (
        "docs/semantics.md",
        "is not on the disk's active image",
        "src/engine/history.rs",
        "is not on the disk's active image",
    ),
    (
        "docs/semantics.md",
        "bitmap is inconsistent",
        "src/engine/history.rs",
        "is inconsistent",
    ),
    (
        "docs/semantics.md",
        "another size then",
        "src/engine/history.rs",
        "bytes then and has",
    ),
    (
        "docs/semantics.md",
        "bitmap is not recording",
        "src/engine/history.rs",
        "is not recording",
    ),
    // Words of maps.
    (
        "docs/semantics.md",
        "| 0 | `data` |",
        "src/view/map.rs",
        "(0, \"data\")",
    ),
    (
        "docs/semantics.md",
        "| 1 | `hole` |",
        "src/view/map.rs",
        "(1, \"hole\")",
    ),
    (
        "docs/semantics.md",
        "| 2 | `zero` |",
        "src/view/map.rs",
        "(2, \"zero\")",
    ),
    (
        "docs/semantics.md",
        "| 3 | `hole,zero` |",
        "src/view/map.rs",
        "(3, \"hole,zero\")",
    ),
    (
        "docs/semantics.md",
        "| 0 | `clean` |",
        "src/view/map.rs",
        "(0, \"clean\")",
    ),
    (
        "docs/semantics.md",
        "| 1 | `dirty` |",
        "src/view/map.rs",
        "(1, \"dirty\")",
    ),
    (
        "docs/semantics.md",
        "| 3 | `dirty,zero` |",
        "src/view/map.rs",
        "(3, \"dirty,zero\")",
    ),
];

#[test]
fn what_is_quoted_is_still_so() {
    for (document, said, file, meant) in QUOTES {
        assert!(
            read(document).contains(said),
            "{document} no longer says {said:?}; keep it in step with {file}, or this test"
        );
        assert!(
            read(file).contains(meant),
            "{file} no longer has {meant:?}, from which {document} has {said:?}"
        );
    }
}

/// Every row of the RFC's table names the test that makes the call on a real QEMU.
#[test]
fn the_calls_of_the_rfc_are_tested() {
    let dir = top().join("tests");
    let sources: String = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "rs"))
        .map(|path| std::fs::read_to_string(path).unwrap())
        .collect();
    let document = read("docs/rfc.md");
    let table = document.split("\n## ").next().unwrap();
    let rows = rows(table);
    assert!(rows.len() > 20, "{} rows", rows.len());
    for row in rows {
        let test = unquoted(row.last().unwrap());
        assert!(sources.contains(&format!("fn {test}()")), "no test {test}");
    }
}
