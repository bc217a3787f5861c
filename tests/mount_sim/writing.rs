//! What programs write: documents with cp and a shell, commands, new names. And what they follow.

use super::*;
use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;

impl Mount {
    /// Runs a script that fails; what it said on stderr.
    fn sh_fails(&self, script: &str) -> String {
        let output = Command::new("sh")
            .args(["-ec", script])
            .current_dir(self.dir.path())
            .env("LC_ALL", "C")
            .output()
            .unwrap();
        assert!(!output.status.success(), "{script}");
        String::from_utf8(output.stderr).unwrap()
    }

    fn last_error(&self) -> String {
        let text = fs::read_to_string(self.path("last-error")).unwrap();
        text.lines().last().unwrap_or("").to_owned()
    }
}

#[test]
fn documents_that_are_refused() {
    let Some(m) = mounted() else { return };
    m.sh("echo nonsense > bad.xml; mkdir mnt/backups/tue");
    for command in [
        "cp bad.xml mnt/checkpoints/mon.xml",
        "cp -p bad.xml mnt/checkpoints/mon.xml",
        "cat bad.xml > mnt/checkpoints/mon.xml",
        "cat > mnt/checkpoints/mon.xml <<EOF\nnonsense\nEOF",
        "dd if=bad.xml of=mnt/checkpoints/mon.xml bs=3 status=none",
    ] {
        let said = m.sh_fails(command);
        assert!(
            said.contains("mon.xml") || said.contains("cat: "),
            "{command}: {said}"
        );
        assert!(
            m.last_error().contains("close checkpoints/mon.xml: "),
            "{command}"
        );
        assert!(!m.path("checkpoints/mon.xml").exists());
        assert!(!m.path("checkpoints/mon").exists());
    }
    // No content, no document.
    m.sh(": > mnt/checkpoints/mon.xml; touch mnt/checkpoints/tue.xml");
    until("released", || m.sh("ls mnt/checkpoints") == "tue\n");
    // Told at once, so that the shell says it.
    let said = m.sh_fails("echo '<domainbackup/>' > mnt/backups/tue.xml");
    assert!(
        said.contains("tue.xml") && said.contains("File exists"),
        "{said}"
    );
    assert_eq!(errno(File::create(m.path("backups/x"))), libc::EPERM);
    assert_eq!(errno(File::create(m.path("backups/a b.xml"))), libc::EINVAL);
    assert_eq!(errno(File::create(m.path("x.xml"))), libc::EPERM);
    let mut file = File::create(m.path("backups/long.xml")).unwrap();
    assert_eq!(errno(File::create(m.path("backups/long.xml"))), libc::EBUSY);
    assert_eq!(errno(File::open(m.path("backups/long.xml"))), libc::EBUSY);
    let wide = vec![b' '; 1 << 20];
    file.write_all(&wide).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 1 << 20);
    assert_eq!(errno(file.write(b"x")), libc::EFBIG);
}

#[test]
fn commands() {
    let Some(m) = mounted() else { return };
    m.sh("mkdir mnt/backups/tue");
    assert_eq!(m.sh("cat mnt/backups/tue/control"), "abort\n");
    assert_eq!(m.sh("cat mnt/checkpoints/tue/control"), "forget\n");
    for command in [
        "echo stop > mnt/backups/tue/control",
        "echo stop >> mnt/backups/tue/control",
        "echo stop | tee mnt/backups/tue/control",
        "echo stop > stop; cp stop mnt/backups/tue/control",
    ] {
        m.sh_fails(command);
        assert!(m.last_error().ends_with(
            "write backups/tue/control: \"stop\" is no command here (there are: abort)"
        ));
    }
    assert_eq!(m.sh("stat -c %a mnt/backups/tue/control"), "600\n");
}

#[test]
fn a_slow_document_holds_up_only_who_closes_it() {
    let Some(m) = mounted() else { return };
    m.sim.hold("disks");
    thread::scope(|scope| {
        let mut file = File::create(m.path("checkpoints/mon.xml")).unwrap();
        file.write_all(b"<domaincheckpoint/>").unwrap();
        let closing = scope.spawn(move || drop(file));
        // No process is started here: it would inherit the file, and close it.
        assert!(fs::read_dir(m.path("checkpoints")).unwrap().count() <= 1);
        for text in ["status", "last-error", "events"] {
            fs::read(m.path(text)).unwrap();
        }
        m.sim.release();
        closing.join().unwrap();
    });
}

#[test]
fn following_events_of_nothing() {
    let Some(m) = mounted() else { return };
    assert_eq!(
        m.sh("cat mnt/events; tail -n 3 mnt/events; wc -c < mnt/events"),
        "0\n"
    );
    let mut tail = Command::new("tail")
        .args(["-n", "+1", "-f", "mnt/events"])
        .current_dir(m.dir.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    thread::sleep(Duration::from_millis(300));
    assert!(tail.try_wait().unwrap().is_none(), "it goes on");
    tail.kill().unwrap();
    tail.wait().unwrap();
}

#[test]
fn documents_by_cp_and_shell() {
    let Some(m) = mounted() else { return };
    m.sh("echo '<domaincheckpoint/>' > c.xml; echo '<domainbackup mode=\"pull\"/>' > b.xml");
    for (i, command) in [
        "cp c.xml mnt/checkpoints/$N.xml",
        "cp -p c.xml mnt/checkpoints/$N.xml",
        "cp -a c.xml mnt/checkpoints/$N.xml",
        "cat c.xml > mnt/checkpoints/$N.xml",
        "cat c.xml >> mnt/checkpoints/$N.xml",
        "cat > mnt/checkpoints/$N.xml <<EOF\n<domaincheckpoint/>\nEOF",
        "echo '<domaincheckpoint/>' > mnt/checkpoints/$N.xml",
        "dd if=c.xml of=mnt/checkpoints/$N.xml bs=3 status=none",
        "( echo '<domaincheckpoint>'; echo '</domaincheckpoint>' ) > mnt/checkpoints/$N.xml",
        // Each of these closes what it inherited: the first is told that half a document is none.
        "set +e; ( /bin/echo '<domaincheckpoint>'; /bin/echo '</domaincheckpoint>' ) > mnt/checkpoints/$N.xml 2> said",
        "tee mnt/checkpoints/$N.xml < c.xml > /dev/null",
        "python3 -c 'import sys; open(sys.argv[1], \"w\").write(open(\"c.xml\").read())' mnt/checkpoints/$N.xml",
        // They set the mode by name afterwards, when there is none.
        "install c.xml mnt/checkpoints/$N.xml 2> said || true",
        "! command -v rsync || rsync --inplace c.xml mnt/checkpoints/$N.xml 2> said || cat said",
    ]
    .into_iter()
    .enumerate()
    {
        m.sh(&format!("N=c{i}\n{command}"));
        assert!(m.path(&format!("checkpoints/c{i}/checkpoint.xml")).exists(), "{command}");
        assert!(!m.path(&format!("checkpoints/c{i}.xml")).exists(), "{command}");
    }
    m.sh("cp b.xml mnt/backups/tue.xml; cat mnt/backups/tue/disk.raw > /dev/null");
    assert_eq!(m.sh("ls mnt/backups"), "tue\n");
    // Once it was taken, nothing can be added.
    let mut file = File::create(m.path("backups/wed.xml")).unwrap();
    file.write_all(b"<domainbackup mode='pull'/>").unwrap();
    drop(file.try_clone().unwrap());
    assert!(m.path("backups/wed").exists());
    assert_eq!(errno(file.write(b" ")), libc::EBUSY);
    assert_eq!(m.sim.running(), 2);
}

#[test]
fn renaming() {
    let Some(m) = mounted() else { return };
    m.sh("mkdir mnt/checkpoints/sun mnt/checkpoints/mon mnt/checkpoints/tue");
    let ino = fs::metadata(m.path("checkpoints/mon")).unwrap().ino();
    m.sh("cat mnt/checkpoints/*/status > /dev/null; ls -lR mnt/checkpoints > /dev/null");
    m.sh("mv mnt/checkpoints/mon mnt/checkpoints/friday");
    assert_eq!(
        fs::metadata(m.path("checkpoints/friday")).unwrap().ino(),
        ino
    );
    assert_eq!(
        m.sh("ls mnt/checkpoints; ls mnt/checkpoints/sun/children"),
        "friday\nsun\ntue\nfriday\n"
    );
    assert_eq!(m.sh("readlink mnt/checkpoints/tue/parent"), "../friday\n");
    assert!(
        m.sh("cat mnt/checkpoints/friday/checkpoint.xml")
            .contains("<name>friday</name>")
    );
    assert!(
        m.sh("cat mnt/checkpoints/tue/checkpoint.xml")
            .contains("<name>friday</name>")
    );
    assert!(
        m.sh("cat mnt/checkpoints/friday/status")
            .contains("checkpoint: friday\n")
    );
    assert!(
        m.sh("cat mnt/checkpoints/tue/status")
            .contains("parent: friday\n")
    );
    m.sh("rmdir mnt/checkpoints/friday");
}

#[test]
fn forgetting() {
    let Some(m) = mounted() else { return };
    m.sh("mkdir mnt/checkpoints/mon; ls -lR mnt > /dev/null; echo forget > mnt/checkpoints/mon/control");
    assert!(!m.path("checkpoints/mon").exists());
    assert!(
        m.sim.disk("vda", |d| d.bitmaps.contains_key("mon")),
        "its bitmaps stay"
    );
}

#[test]
fn events_of_a_backup() {
    let Some(m) = mounted() else { return };
    m.sh("mkdir mnt/backups/tue");
    let mut tail = Command::new("timeout")
        .args(["20", "tail", "-n", "+1", "-s", "0.1", "-f", "mnt/events"])
        .current_dir(m.dir.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    thread::sleep(Duration::from_millis(300));
    m.sh("rmdir mnt/backups/tue");
    let mut line = String::new();
    let mut lines = BufReader::new(tail.stdout.take().unwrap());
    lines.read_line(&mut line).unwrap();
    assert!(
        line.contains("\"event\":\"job-completed\",\"job\":1,\"name\":\"tue\",\"mode\":\"pull\""),
        "{line}"
    );
    assert_eq!(m.sh("cat mnt/events"), line);
    tail.kill().unwrap();
    tail.wait().unwrap();
}
