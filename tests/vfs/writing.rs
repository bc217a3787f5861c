//! What can be written: documents, commands, names; and what becomes of them.

use super::*;
use fleecefs::vfs::Created;

impl Fixture {
    fn create(&self, path: &str) -> Result<Created> {
        let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
        self.vfs.create(self.ino(dir), OsStr::new(name))
    }

    /// Creates, writes and closes: what `cp` does.
    fn put(&self, path: &str, text: &str) -> Result<()> {
        let handle = self.create(path)?.opened.handle;
        self.vfs.write(handle, 0, text.as_bytes())?;
        let closed = self.flush(handle);
        self.release(handle);
        closed
    }

    /// What `echo text > path` does.
    fn echo(&self, path: &str, text: &str) -> Result<()> {
        let ino = self.ino(path);
        let handle = self.open_to_write(ino)?.handle;
        self.setattr(ino, Some(0))?;
        let written = self.vfs.write(handle, 0, text.as_bytes());
        self.flush(handle)?;
        self.release(handle);
        written
    }

    fn mv(&self, from: &str, to: &str) -> Result<()> {
        let (from_dir, from) = from.rsplit_once('/').unwrap_or(("", from));
        let (to_dir, to) = to.rsplit_once('/').unwrap_or(("", to));
        let from = (self.ino(from_dir), OsStr::new(from));
        self.rename(from, (self.ino(to_dir), OsStr::new(to)))
    }
}

fn kind<T>(result: Result<T>) -> Kind {
    result.map(drop).unwrap_err().kind()
}

fn last_error(f: &Fixture) -> String {
    f.cat("last-error").lines().last().unwrap_or("").to_owned()
}

/// A name that is not there is an answer; what something lacks that was to be made is a refusal.
#[test]
fn what_is_missing_for_something_new_is_told() {
    let f = fixture();
    f.sim.fail_next("begin", Kind::NotFound);
    assert_eq!(kind(f.mkdir("backups/mon")), Kind::NotFound);
    assert!(last_error(&f).contains("mkdir backups/mon: begin backup mon"));
    let document = f.create("backups/tue.xml").unwrap().opened.handle;
    f.vfs
        .write(document, 0, b"<domainbackup mode='pull'/>")
        .unwrap();
    f.sim.fail_next("begin", Kind::NotFound);
    assert_eq!(kind(f.flush(document)), Kind::NotFound);
    assert!(last_error(&f).contains("close backups/tue.xml: begin backup tue"));
}

#[test]
fn a_document_while_it_is_written() {
    let f = fixture();
    f.mkdir("backups/mon").unwrap();
    let created = f.create("backups/tue.xml").unwrap();
    let ino = created.found.attr.ino;
    assert_eq!(created.opened.caching, Caching::Bypass);
    assert_eq!(
        (created.found.attr_ttl, created.found.name_ttl),
        Default::default()
    );
    assert_eq!(
        (created.found.attr.perm, created.found.attr.size),
        (0o600, 0)
    );
    assert_eq!(f.names("backups"), ["mon", "tue.xml"]);
    assert_eq!(f.ino("backups/tue.xml"), ino);
    let handle = created.opened.handle;
    // A shell closes one descriptor before it writes to the other.
    assert!(f.asks(ino, Ask::Write) && f.asks(ino, Ask::Flush));
    assert!(!f.asks(ino, Ask::Attributes));
    assert_eq!(f.calls(|| f.flush(handle).unwrap()), [""; 0]);
    f.vfs.write(handle, 0, b"<domainbackup").unwrap();
    f.vfs.write(handle, 13, b"/>").unwrap();
    assert_eq!(f.bytes(handle), b"<domainbackup/>");
    assert_eq!(f.stat("backups/tue.xml").size, 15);
    assert_eq!(f.lseek(handle, 3, Seek::Hole).unwrap(), 15);
    // cp -p; truncate
    assert_eq!(f.setattr(ino, None).unwrap().0.size, 15);
    assert_eq!(f.setattr(ino, Some(0)).unwrap().0.size, 0);
    assert_eq!(f.cat("last-error"), "");
    // Nobody else has it.
    assert_eq!(kind(f.create("backups/tue.xml")), Kind::Busy);
    assert_eq!(kind(f.vfs.open(ino)), Kind::Busy);
    assert_eq!(kind(f.open_to_write(ino)), Kind::Busy);
    assert!(last_error(&f).contains("open backups/tue.xml: tue.xml is being written by somebody"));
    // Too long.
    assert_eq!(kind(f.vfs.write(handle, 1 << 20, b"x")), Kind::TooLarge);
    assert!(last_error(&f).contains("write backups/tue.xml: a document may have 1048576 bytes"));
    assert_eq!(
        kind(f.flush(handle)),
        Kind::TooLarge,
        "and no part of it is done"
    );
    f.setattr(ino, Some(0)).unwrap();
    // Nothing was written when it goes: nothing is done.
    assert_eq!(
        f.calls(|| {
            f.flush(handle).unwrap();
            f.release(handle);
        }),
        [""; 0]
    );
    assert_eq!(f.names("backups"), ["mon"]);
    assert_eq!(kind(f.getattr(ino)), Kind::NotFound);
    assert_ne!(
        f.create("backups/tue.xml").unwrap().found.attr.ino,
        ino,
        "a number of its own"
    );
}

#[test]
fn a_document_that_is_refused() {
    let f = fixture();
    let handle = f.create("checkpoints/mon.xml").unwrap().opened.handle;
    f.vfs.write(handle, 0, b"<domain").unwrap();
    let first = f.flush(handle).unwrap_err();
    assert!(
        last_error(&f).contains("close checkpoints/mon.xml: "),
        "{}",
        last_error(&f)
    );
    let again = f.flush(handle).unwrap_err();
    assert_eq!(first.to_string(), again.to_string(), "the same outcome");
    // Its name is free at once, for the document put right.
    assert_eq!(kind(f.find("checkpoints/mon.xml")), Kind::NotFound);
    assert_eq!(f.names("checkpoints"), [""; 0]);
    let second = f.create("checkpoints/mon.xml").unwrap();
    // And who has it open goes on: somebody who inherited the file may only have closed it.
    f.vfs.write(handle, 7, b"checkpoint>").unwrap();
    assert_eq!(f.bytes(handle), b"<domaincheckpoint>");
    f.release(handle);
    assert_eq!(f.ino("checkpoints/mon.xml"), second.found.attr.ino);
}

#[test]
fn where_documents_can_be_made() {
    let f = fixture();
    f.mkdir("checkpoints/mon").unwrap();
    f.mkdir("backups/tue").unwrap();
    for (path, expected) in [
        ("tue.xml", Kind::NotPermitted),
        ("backups/tue/x.xml", Kind::NotPermitted),
        ("checkpoints/mon/x.xml", Kind::NotPermitted),
        ("backups/x", Kind::NotPermitted),
        ("backups/.xml", Kind::Invalid),
        ("backups/a b.xml", Kind::Invalid),
        ("checkpoints/x.xml.xml", Kind::Invalid),
        ("backups/tue.xml", Kind::Exists),
    ] {
        assert_eq!(kind(f.create(path)), expected, "{path}");
        assert!(
            last_error(&f).contains(&format!("create {path}: ")),
            "{}",
            last_error(&f)
        );
    }
    // Of a checkpoint there may be one: to be redefined.
    assert!(f.create("checkpoints/mon.xml").is_ok());
    assert!(
        f.create(&format!("backups/{}.xml", "x".repeat(251)))
            .is_ok()
    );
}

#[test]
fn commands() {
    let f = fixture();
    f.mkdir("backups/tue").unwrap();
    assert_eq!(f.cat("backups/tue/control"), "abort\n");
    assert_eq!(f.cat("checkpoints/tue/control"), "forget\n");
    let control = f.stat("backups/tue/control");
    assert_eq!((control.perm, control.size), (0o600, 6));
    assert!(f.asks(control.ino, Ask::Write) && !f.asks(control.ino, Ask::Flush));
    for (path, text, says) in [
        (
            "backups/tue/control",
            "stop\n",
            "write backups/tue/control: \"stop\" is no command here (there are: abort)",
        ),
        (
            "checkpoints/tue/control",
            "abort\n",
            "write checkpoints/tue/control: \"abort\" is no command here (there are: forget)",
        ),
        ("backups/tue/control", "\n", "\"\" is no command here"),
        (
            "backups/tue/control",
            "speed x\n",
            "\"x\" is no speed (write a number of bytes,",
        ),
    ] {
        assert_eq!(kind(f.echo(path, text)), Kind::Invalid, "{text}");
        assert!(last_error(&f).contains(says), "{}", last_error(&f));
    }
    // A command, not a file: modes stay, and only this is opened for writing.
    assert_eq!(kind(f.setattr(control.ino, None)), Kind::ReadOnly);
    assert_eq!(
        kind(f.open_to_write(f.ino("backups/tue/status"))),
        Kind::ReadOnly
    );
    assert_eq!(kind(f.setattr(f.ino("status"), Some(0))), Kind::ReadOnly);
    let status = f.open("status");
    assert_eq!(kind(f.vfs.write(status, 0, b"x")), Kind::ReadOnly);
}

#[test]
fn names_that_cannot_be_given() {
    let f = fixture();
    f.mkdir("checkpoints/mon").unwrap();
    f.mkdir("checkpoints/tue").unwrap();
    f.mkdir("backups/wed").unwrap();
    assert!(f.mv("checkpoints/mon", "checkpoints/mon").is_ok());
    for (from, to, expected) in [
        ("checkpoints/mon", "checkpoints/tue", Kind::Exists),
        ("checkpoints/mon", "checkpoints/a b", Kind::Invalid),
        ("checkpoints/mon", "checkpoints/a.xml", Kind::Invalid),
        ("checkpoints/mon", "backups/mon", Kind::NotPermitted),
        // mv into a directory that is there
        ("checkpoints/mon", "checkpoints/tue/mon", Kind::NotPermitted),
        ("backups/wed", "backups/thu", Kind::NotPermitted),
        (
            "checkpoints/mon/status",
            "checkpoints/mon/x",
            Kind::NotPermitted,
        ),
        ("status", "x", Kind::NotPermitted),
        ("checkpoints/none", "checkpoints/x", Kind::NotFound),
    ] {
        assert_eq!(kind(f.mv(from, to)), expected, "{from} {to}");
        if expected != Kind::NotFound {
            let says = format!("rename {from} to {to}: ");
            assert!(last_error(&f).contains(&says), "{}", last_error(&f));
        }
    }
}

#[test]
fn events_are_an_empty_file_at_first() {
    let f = fixture();
    let opened = f.vfs.open(f.ino("events")).unwrap();
    assert_eq!(opened.caching, Caching::Bypass);
    assert_eq!(f.bytes(opened.handle), b"");
    let found = f.find("events").unwrap();
    assert_eq!((found.attr.size, found.attr_ttl), (0, Duration::ZERO));
}

const FULL: &str = "<domainbackup><disks><disk name='vda' type='file'><target file='/t/vda.qcow2'/>\
                    <driver type='qcow2'/></disk><disk name='vdb' backup='no'/></disks></domainbackup>";

#[test]
fn documents_that_are_done() {
    let f = fixture();
    f.put(
        "checkpoints/mon.xml",
        "<domaincheckpoint><description>a b</description></domaincheckpoint>",
    )
    .unwrap();
    assert_eq!(f.names("checkpoints"), ["mon"]);
    assert!(
        f.cat("checkpoints/mon/checkpoint.xml")
            .contains("<description>a b</description>")
    );
    let created = f.create("backups/tue.xml").unwrap();
    let handle = created.opened.handle;
    f.vfs
        .write(handle, 0, b"<domainbackup mode='pull'>")
        .unwrap();
    assert_eq!(kind(f.flush(handle)), Kind::Invalid, "half of it");
    f.vfs.write(handle, 26, b"</domainbackup>").unwrap();
    assert_eq!(
        f.calls(|| f.flush(handle).unwrap())
            .iter()
            .filter(|c| *c == "begin")
            .count(),
        1
    );
    assert_eq!(f.calls(|| f.flush(handle).unwrap()), [""; 0], "once");
    assert_eq!(f.names("backups"), ["tue"]);
    assert_eq!(kind(f.find("backups/tue.xml")), Kind::NotFound);
    assert_eq!(
        f.getattr(created.found.attr.ino).unwrap().0.size,
        41,
        "open still"
    );
    assert_eq!(kind(f.vfs.write(handle, 41, b"\n")), Kind::Busy);
    assert!(
        last_error(&f).contains("write backups/tue.xml: tue.xml was closed, and what it says was")
    );
    f.release(handle);
    f.rmdir("backups/tue").unwrap();
}

#[test]
fn why_a_document_is_refused() {
    let f = fixture();
    for (path, text, expected, says) in [
        (
            "backups/a.xml",
            "<domainbackup>\n<x/></domainbackup>",
            Kind::Invalid,
            "line 2",
        ),
        ("backups/b.xml", "<domainbackup", Kind::Invalid, "line 1"),
        (
            "backups/c.xml",
            "<domainbackup mode='pull'><disks>\n<disk name='vdz'/></disks></domainbackup>",
            Kind::Invalid,
            "vdz",
        ),
        (
            "checkpoints/d.xml",
            "<domaincheckpoint>\n<name>e</name></domaincheckpoint>",
            Kind::Invalid,
            "line 2",
        ),
    ] {
        assert_eq!(kind(f.put(path, text)), expected, "{path}");
        let last = last_error(&f);
        assert!(
            last.contains(&format!("close {path}: ")) && last.contains(says),
            "{last}"
        );
    }
    assert_eq!(
        (f.names("backups").len(), f.names("checkpoints").len()),
        (0, 0)
    );
    assert_eq!(f.sim.running(), 0);
}

#[test]
fn a_push_backup() {
    let f = fixture();
    f.put("backups/tue.xml", FULL).unwrap();
    assert_eq!(
        f.names("backups/tue"),
        [
            "backup.xml",
            "checkpoint.xml",
            "domain.xml",
            "status",
            "control"
        ]
    );
    assert_eq!(
        (f.stat("backups").nlink, f.stat("backups/tue").nlink),
        (3, 2)
    );
    let xml = f.cat("backups/tue/backup.xml");
    assert!(
        xml.contains("mode=\"push\"") && xml.contains("<target file=\"/t/vda.qcow2\"/>"),
        "{xml}"
    );
    assert!(
        f.cat("backups/tue/checkpoint.xml")
            .contains("<name>tue</name>")
    );
    // Its status asks, so it is no work for an event loop; its size is not worth a question.
    let status = f.ino("backups/tue/status");
    assert!(f.asks(status, Ask::Open) && !f.asks(status, Ask::Attributes));
    let text = f.cat("backups/tue/status");
    for line in [
        "state: running",
        "mode: push",
        "job: 1",
        "base: none",
        "checkpoint: tue",
        "total: 66536",
        "done: 0",
        "  vda:",
        "    state: running",
        "    target: /t/vda.qcow2",
        "    format: qcow2",
    ] {
        assert!(text.lines().any(|l| l == line), "{line} in\n{text}");
    }
    assert_eq!(f.stat("backups/tue/status").size as usize, text.len());
    assert!(f.cat("status").contains("backups: 1\n"));
    assert_eq!(
        f.cat("backups/tue/control"),
        "abort\npause\nresume\nspeed SIZE\n"
    );
    for command in ["pause\n", "speed 50M\n", "speed 0\n"] {
        f.echo("backups/tue/control", command).unwrap();
    }
    assert!(f.cat("backups/tue/status").starts_with("state: paused\n"));
    f.echo("backups/tue/control", "resume\n").unwrap();
    assert_eq!(kind(f.rmdir("backups/tue")), Kind::Busy);
    assert!(
        last_error(&f).contains("echo abort > backups/tue/control"),
        "{}",
        last_error(&f)
    );
    f.sim.finish_pushes(None);
    assert!(
        f.cat("backups/tue/status")
            .starts_with("state: completed\n")
    );
    let events = f.cat("events");
    assert!(
        events.ends_with("\"name\":\"tue\",\"mode\":\"push\",\"outcome\":\"completed\"}\n"),
        "{events}"
    );
    assert_eq!(f.stat("events").size as usize, events.len());
    f.rmdir("backups/tue").unwrap();
    assert_eq!(f.cat("events"), events, "told once");
}

#[test]
fn a_push_backup_that_is_broken_off() {
    let f = fixture();
    f.put("backups/tue.xml", FULL).unwrap();
    f.echo("backups/tue/control", "abort\n").unwrap();
    assert!(f.cat("backups/tue/status").starts_with("state: aborted\n"));
    assert!(f.cat("events").contains("\"outcome\":\"aborted\""));
    f.rmdir("backups/tue").unwrap();
    assert_eq!(f.sim.running(), 0);
}

#[test]
fn what_a_pull_backup_is_told() {
    let f = fixture();
    f.mkdir("backups/tue").unwrap();
    for command in ["pause", "resume", "speed 1M"] {
        f.echo("backups/tue/control", command).unwrap_err();
        assert!(
            last_error(&f).contains("write backups/tue/control: "),
            "{}",
            last_error(&f)
        );
    }
    f.echo("backups/tue/control", "abort").unwrap();
    assert!(!f.cat("backups/tue/status").starts_with("state: running\n"));
    f.rmdir("backups/tue").unwrap();
}

#[test]
fn another_name() {
    let f = fixture();
    for name in ["sun", "mon", "tue"] {
        f.mkdir(&format!("checkpoints/{name}")).unwrap();
    }
    let ino = f.ino("checkpoints/mon");
    for path in ["checkpoints/mon/status", "checkpoints/tue/status"] {
        f.cat(path);
    }
    f.mv("checkpoints/mon", "checkpoints/friday").unwrap();
    assert_eq!(f.ino("checkpoints/friday"), ino);
    assert_eq!(kind(f.find("checkpoints/mon")), Kind::NotFound);
    assert_eq!(
        f.readlink(f.ino("checkpoints/tue/parent")).unwrap(),
        "../friday"
    );
    assert_eq!(f.names("checkpoints/sun/children"), ["friday"]);
    assert!(
        f.cat("checkpoints/friday/checkpoint.xml")
            .contains("<name>friday</name>")
    );
    assert!(
        f.cat("checkpoints/tue/checkpoint.xml")
            .contains("<name>friday</name>")
    );
    assert!(
        f.cat("checkpoints/friday/status")
            .starts_with("checkpoint: friday\n")
    );
    assert!(f.cat("checkpoints/tue/status").contains("parent: friday\n"));
    // Believed for no time under either name.
    assert_eq!(
        f.find("checkpoints/friday").unwrap().name_ttl,
        Duration::ZERO
    );
}

#[test]
fn forgotten() {
    let f = fixture();
    f.mkdir("checkpoints/mon").unwrap();
    f.cat("checkpoints/mon/status");
    f.echo("checkpoints/mon/control", "forget\n").unwrap();
    assert_eq!(f.names("checkpoints"), [""; 0]);
    assert!(
        f.sim.disk("vda", |d| d.bitmaps.contains_key("mon")),
        "its bitmaps stay"
    );
}
