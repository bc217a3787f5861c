//! `fleecefs events`: follows `events` of a mount until the mount ends.
//!
//! The file is opened anew each time: one that stayed open would keep the mount from being
//! unmounted, and its end is what ends this.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use super::args::Events;
use super::mounted::{MountPoint, say};
use crate::model::Result;

/// How long an event may wait until it is shown.
const PAUSE: Duration = Duration::from_millis(250);

/// How far the file was read.
#[derive(Default)]
struct Place {
    offset: u64,
    /// The last line, without its end: where to go on when the file was cut off.
    last: String,
}

pub(super) fn run(args: &Events) -> Result<()> {
    let mount = MountPoint::at(&args.dir)?;
    let path = mount.path("events");
    let mut device = None;
    let mut place = Place::default();
    // What was there before is passed over, unless it is asked for.
    let mut shown = args.all;
    loop {
        let read = File::open(&path).and_then(|mut file| {
            let meta = file.metadata()?;
            // Another mount on the same directory is not this one.
            if *device.get_or_insert(meta.dev()) != meta.dev() {
                return Err(std::io::ErrorKind::NotFound.into());
            }
            let cut_off = meta.len() < place.offset;
            let from = if cut_off { 0 } else { place.offset };
            file.seek(SeekFrom::Start(from))?;
            let mut text = String::new();
            file.read_to_string(&mut text)?;
            Ok((from, cut_off, text))
        });
        let Ok((from, cut_off, text)) = read else {
            eprintln!("fleecefs: the mount on {} has ended", args.dir.display());
            return Ok(());
        };
        let fresh = place.go_on(from, cut_off, &text);
        if shown && !fresh.is_empty() && !say(fresh)? {
            return Ok(());
        }
        shown = true;
        std::thread::sleep(PAUSE);
    }
}

impl Place {
    /// What is new in the text that was read from `from` on.
    fn go_on<'a>(&mut self, from: u64, cut_off: bool, text: &'a str) -> &'a str {
        // Lines are added whole.
        let text = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
        self.offset = from + text.len() as u64;
        let seen = format!("{}\n", self.last);
        let fresh = match text.rfind(&seen) {
            // Everything before it was shown when it was.
            Some(at) if cut_off && !self.last.is_empty() => &text[at + seen.len()..],
            _ => text,
        };
        if let Some(last) = text.lines().last() {
            last.clone_into(&mut self.last);
        }
        fresh
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_new() {
        let mut place = Place::default();
        assert_eq!(place.go_on(0, false, "a\nb\n"), "a\nb\n");
        assert_eq!(place.go_on(4, false, ""), "");
        assert_eq!(place.go_on(4, false, "c\nhalf"), "c\n");
        assert_eq!(place.offset, 6);
        // It lost its older half.
        assert_eq!(place.go_on(0, true, "b\nc\nd\n"), "d\n");
        assert_eq!(place.offset, 6);
        assert_eq!(place.go_on(0, true, "x\n"), "x\n", "all of it is new");
    }
}
