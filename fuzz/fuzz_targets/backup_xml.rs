//! Any bytes as a `<domainbackup>` document: refused on a line of theirs, or read; and what was read
//! is written so that it reads the same.
#![no_main]

use fleecefs::xml::BackupDocument;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| match BackupDocument::read(bytes) {
    Ok(document) => {
        let text = document.write();
        assert_eq!(
            BackupDocument::read(text.as_bytes()),
            Ok(document),
            "{text}"
        );
    }
    Err(error) => {
        let lines = bytes.iter().filter(|b| matches!(b, b'\n' | b'\r')).count() + 1;
        assert!(
            (1..=lines).contains(&(error.place.line as usize)),
            "{error}"
        );
        let sentence = error.to_string();
        assert!(
            sentence.len() < 600 && !sentence.contains(char::is_control),
            "{sentence:?}"
        );
    }
});
