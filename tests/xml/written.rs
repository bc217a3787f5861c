//! Documents made up at random, written, and read again.

use fleecefs::model::{Format, Image, Mode, Name, ServerAddress};
use fleecefs::xml::{
    BackupDocument, BackupDocumentDisk, BackupMode, CheckpointDocument, CheckpointDocumentDisk,
    DocumentBitmap, DomainReference, Place, Server,
};
use proptest::prelude::*;

/// Any text that XML can hold.
fn any_text() -> impl Strategy<Value = String> {
    prop_oneof![
        "[ -~]{0,20}",
        "[\\t\\n\\r -~\u{80}-\u{d7ff}\u{e000}-\u{fffd}\u{10000}-\u{10ffff}]{0,20}",
        "[&<>'\"\\]\\r\\n]{0,12}",
    ]
}

fn label() -> impl Strategy<Value = String> {
    any_text().prop_filter("a label", |t| {
        !t.is_empty() && !t.contains(char::is_control)
    })
}

fn path() -> impl Strategy<Value = String> {
    label().prop_map(|l| format!("/{l}"))
}

fn name() -> impl Strategy<Value = Name> {
    "[A-Za-z0-9_-][A-Za-z0-9_.-]{0,12}"
        .prop_filter_map("not a document's", |text| Name::new(&text).ok())
}

fn maybe<T: std::fmt::Debug + Clone>(
    of: impl Strategy<Value = T>,
) -> impl Strategy<Value = Option<T>> {
    proptest::option::of(of)
}

fn checkpoint_disk() -> impl Strategy<Value = CheckpointDocumentDisk> {
    let bitmap = (maybe(label()), maybe(any::<u64>()))
        .prop_map(|(name, size)| DocumentBitmap { name, size });
    (label(), maybe(bitmap)).prop_map(|(name, bitmap)| CheckpointDocumentDisk {
        place: Place::default(),
        name,
        bitmap,
    })
}

/// Drops what has been there before: a disk cannot be listed twice.
fn distinct<T>(all: Vec<T>, key: impl Fn(&T) -> String) -> Vec<T> {
    let mut seen = std::collections::HashSet::new();
    all.into_iter().filter(|t| seen.insert(key(t))).collect()
}

fn checkpoint() -> impl Strategy<Value = CheckpointDocument> {
    let domain = (maybe(any_text()), maybe(any_text())).prop_map(|(name, uuid)| DomainReference {
        place: Place::default(),
        name,
        uuid,
    });
    (
        maybe(name()),
        maybe(any_text()),
        maybe(0..=253_402_300_799_u64),
        maybe(name()),
        proptest::collection::vec(checkpoint_disk(), 0..4),
        maybe(domain),
    )
        .prop_map(
            |(name, description, creation_time, parent, disks, domain)| CheckpointDocument {
                place: Place::default(),
                name: name.map(Into::into),
                description,
                creation_time,
                parent: parent.map(Into::into),
                disks: distinct(disks, |d| d.name.clone()),
                domain,
            },
        )
}

fn backup_disk(mode: Mode) -> impl Strategy<Value = BackupDocumentDisk> {
    let change = prop_oneof![
        Just((None, None)),
        Just((Some(BackupMode::Full), None)),
        name().prop_map(|n| (None, Some(n))),
        name().prop_map(|n| (Some(BackupMode::Incremental), Some(n))),
    ];
    let image = prop_oneof![path().prop_map(Image::File), path().prop_map(Image::Block)];
    let format = match mode {
        Mode::Push => prop_oneof![Just(Format::Raw), Just(Format::Qcow2)].boxed(),
        Mode::Pull => Just(Format::Qcow2).boxed(),
    };
    (
        label(),
        any::<bool>(),
        change,
        maybe(label()),
        maybe(label()),
        maybe(image),
        maybe(format),
    )
        .prop_map(
            move |(name, backup, change, export, bitmap, image, format)| {
                let pull = mode == Mode::Pull;
                BackupDocumentDisk {
                    place: Place::default(),
                    // Not to be mistaken for an export's name.
                    name: format!("disk {name}"),
                    backup,
                    backup_mode: change.0,
                    incremental: change.1,
                    export_name: export.filter(|_| pull),
                    export_bitmap: bitmap.filter(|_| pull),
                    image: image.filter(|_| backup),
                    format: format.filter(|_| backup),
                }
            },
        )
}

fn backup() -> impl Strategy<Value = BackupDocument> {
    let address = prop_oneof![
        path().prop_map(|p| ServerAddress::Unix(p.chars().take(25).collect())),
        ("[a-z0-9.:-]{1,20}", 1..=65535_u16, any::<bool>())
            .prop_map(|(host, port, tls)| ServerAddress::Tcp { host, port, tls }),
    ];
    let server = address.prop_map(|address| Server {
        place: Place::default(),
        address,
    });
    let mode = prop_oneof![Just(Mode::Push), Just(Mode::Pull)];
    (mode, maybe(name()), maybe(server), maybe(checkpoint())).prop_flat_map(
        |(mode, incremental, server, checkpoint)| {
            let disks = proptest::collection::vec(backup_disk(mode), 0..4);
            disks.prop_map(move |disks| {
                let disks = distinct(disks, |d| d.name.clone());
                BackupDocument {
                    place: Place::default(),
                    mode,
                    incremental: incremental.clone().map(Into::into),
                    server: server.clone().filter(|_| mode == Mode::Pull),
                    disks: distinct(disks, |d| {
                        d.export_name.clone().unwrap_or_else(|| d.name.clone())
                    }),
                    checkpoint: checkpoint.clone(),
                }
            })
        },
    )
}

proptest! {
    #[test]
    fn a_checkpoint_document_is_read_as_it_was_written(document in checkpoint()) {
        let text = document.write();
        prop_assert_eq!(CheckpointDocument::read(text.as_bytes()), Ok(document), "{}", text);
    }

    #[test]
    fn a_backup_document_is_read_as_it_was_written(document in backup()) {
        let text = document.write();
        prop_assert_eq!(BackupDocument::read(text.as_bytes()), Ok(document), "{}", text);
    }
}
