//! `key: value` lines that are valid YAML, for the `status` files: one mapping, indented by two
//! blanks a level, made for shells (`sed -n 's/^state: //p'`) as much as for parsers.
//!
//! A string is quoted unless it is plain beyond doubt, so that no name, path or sentence can be
//! taken for a number, a date, a truth value, a comment or another key.

use std::fmt::{Display, Write};

/// Text under construction.
#[derive(Debug, Default)]
pub struct Yaml {
    out: String,
    depth: usize,
}

impl Yaml {
    /// An empty mapping.
    pub fn new() -> Self {
        Self::default()
    }

    /// A number, date or other value that is written as it is.
    pub fn plain(&mut self, key: &str, value: impl Display) -> &mut Self {
        self.key(key);
        // Writing to a String cannot fail, here and below.
        let _ = writeln!(self.out, " {value}");
        self
    }

    /// A string, quoted where it must be.
    pub fn string(&mut self, key: &str, value: &str) -> &mut Self {
        self.plain(key, quoted(value))
    }

    /// `yes` or `no`.
    pub fn truth(&mut self, key: &str, value: bool) -> &mut Self {
        self.plain(key, if value { "yes" } else { "no" })
    }

    /// A string, or `none` (which is quoted where it is somebody's name).
    pub fn string_or_none(&mut self, key: &str, value: Option<&str>) -> &mut Self {
        match value {
            Some(value) => self.string(key, value),
            None => self.plain(key, "none"),
        }
    }

    /// A number, or `none`.
    pub fn number_or_none(&mut self, key: &str, value: Option<u64>) -> &mut Self {
        match value {
            Some(value) => self.plain(key, value),
            None => self.plain(key, "none"),
        }
    }

    /// A mapping below `key`, which `fill` fills with one key at least.
    pub fn nested(&mut self, key: &str, fill: impl FnOnce(&mut Self)) -> &mut Self {
        self.key(key);
        let before = self.out.len();
        self.out.push('\n');
        let filled = self.out.len();
        self.depth += 1;
        fill(self);
        self.depth -= 1;
        if self.out.len() == filled {
            self.out.truncate(before);
            self.out.push_str(" {}\n");
        }
        self
    }

    /// The text.
    pub fn finish(self) -> String {
        self.out
    }

    fn key(&mut self, key: &str) {
        let _ = write!(self.out, "{:1$}{2}:", "", self.depth * 2, quoted(key));
    }
}

/// A scalar: plain if it starts with a letter or a slash, holds nothing but letters, digits and
/// `_ - . /`, and is no word that means something else; double-quoted otherwise.
fn quoted(value: &str) -> String {
    const WORDS: [&str; 11] = [
        "true", "false", "yes", "no", "on", "off", "y", "n", "null", "none", "nan",
    ];
    let start = |c: char| c.is_ascii_alphabetic() || c == '/';
    let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | '/');
    let word = WORDS.iter().any(|w| value.eq_ignore_ascii_case(w));
    if value.starts_with(start) && value.chars().all(inner) && !word {
        return value.to_owned();
    }
    let mut out = String::from("\"");
    for c in value.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            // Also what YAML takes for a line break, or does not allow to be printed.
            c if c.is_control() || matches!(c, '\u{2028}' | '\u{2029}' | '\u{feff}') => {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            '\u{fffe}' | '\u{ffff}' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_plain_beyond_doubt() {
        for plain in ["running", "a-b_c.d", "/dev/vda", "vda", "Mon"] {
            assert_eq!(quoted(plain), plain);
        }
        for (text, out) in [
            ("", "\"\""),
            ("yes", "\"yes\""),
            ("NO", "\"NO\""),
            ("None", "\"None\""),
            ("2026-11-23", "\"2026-11-23\""),
            ("1e3", "\"1e3\""),
            (".5", "\".5\""),
            ("-", "\"-\""),
            ("a b", "\"a b\""),
            ("a: b", "\"a: b\""),
            ("a #b", "\"a #b\""),
            ("say \"x\\y\"", "\"say \\\"x\\\\y\\\"\""),
            ("a\nb\u{1}\u{85}", "\"a\\nb\\u0001\\u0085\""),
            ("grün", "\"grün\""),
        ] {
            assert_eq!(quoted(text), out, "{text:?}");
        }
    }

    #[test]
    fn nesting() {
        let mut y = Yaml::new();
        y.string("state", "running")
            .truth("current", false)
            .string_or_none("base", None)
            .string_or_none("checkpoint", Some("none"))
            .number_or_none("limit", Some(7))
            .nested("disks", |y| {
                y.nested("vda", |y| {
                    y.plain("size", 4096);
                });
                y.nested("2", |_| ());
            });
        assert_eq!(
            y.finish(),
            "state: running\ncurrent: no\nbase: none\ncheckpoint: \"none\"\nlimit: 7\ndisks:\n  \
             vda:\n    size: 4096\n  \"2\": {}\n"
        );
    }
}
