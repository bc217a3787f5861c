//! `status` files, read back: the part of YAML that they are written in.

/// Keys and values of one level.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Keys(Vec<(String, String)>);

/// What a `status` says: its own keys, and those of each disk.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Status {
    pub(super) keys: Keys,
    pub(super) disks: Vec<(String, Keys)>,
}

impl Keys {
    /// The value, or nothing if it is missing.
    pub(super) fn get(&self, key: &str) -> Option<&str> {
        let mut all = self.0.iter();
        all.find(|(name, _)| name == key).map(|(_, value)| &**value)
    }

    /// The value, if it is a number.
    pub(super) fn number(&self, key: &str) -> Option<u64> {
        self.get(key)?.parse().ok()
    }
}

impl Status {
    /// Takes a text apart. What it does not know is skipped.
    pub(super) fn read(text: &str) -> Self {
        let mut status = Self::default();
        let mut section = "";
        for line in text.lines() {
            let inner = line.trim_start();
            let Some((key, value)) = split(inner) else {
                continue;
            };
            match line.len() - inner.len() {
                0 => {
                    section = inner;
                    status.keys.0.push((key, value));
                }
                2 if section == "disks:" => status.disks.push((key, Keys::default())),
                4 if section == "disks:" => {
                    if let Some((_, keys)) = status.disks.last_mut() {
                        keys.0.push((key, value));
                    }
                }
                _ => {}
            }
        }
        status
    }
}

/// Key and value of a line. No colon is in a key that is not quoted.
fn split(line: &str) -> Option<(String, String)> {
    let colon = match line.strip_prefix('"') {
        Some(quoted) => quoted.find("\":")? + 2,
        None => line.find(':')?,
    };
    Some((unquoted(&line[..colon]), unquoted(line[colon + 1..].trim())))
}

/// Quotes and escapes are those of JSON.
fn unquoted(text: &str) -> String {
    serde_json::from_str::<String>(text).unwrap_or_else(|_| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let status = Status::read(
            "state: failed\nwhy: \"full: \\\"up\\\"\"\njob: 7\noptions:\n  a: b\ndisks:\n  \"2\":\n    \
             state: trusted\n    changed-at-most: 4096\n  vdb:\n    state: broken\nend: yes\n",
        );
        assert_eq!(status.keys.get("why"), Some("full: \"up\""));
        assert_eq!(
            (status.keys.number("job"), status.keys.number("why")),
            (Some(7), None)
        );
        assert_eq!(status.keys.get("end"), Some("yes"));
        assert_eq!(status.disks.len(), 2);
        assert_eq!(status.disks[0].0, "2");
        assert_eq!(status.disks[0].1.number("changed-at-most"), Some(4096));
        assert_eq!(status.disks[1].1.get("state"), Some("broken"));
    }
}
