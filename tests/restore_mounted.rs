//! What `fleecefs restore` puts together from copies of a real mount, made with cp, is the disk.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::Path;

use common::mount::FLEECEFS;
use common::tools::{self, need, run, text};
use common::{Disk, Fleecefs, Qemu, Rng, Write, image};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 24 * MIB + 512;

fn restore(source: &Path, more: &[&str], output: &Path) {
    run(
        FLEECEFS,
        &[&["restore"], more, &[text(source), text(output)]].concat(),
    );
}

#[test]
fn slices_series_and_chains_copied_from_a_mount() {
    need!("qemu-system-x86_64", "qemu-img", "cp");
    let Some(()) = tools::fuse() else { return };
    let mut rng = Rng::from_env();
    let dir = tools::temp_dir();
    let path = |name: &str| dir.path().join(name);
    let image = path("vda.qcow2");
    image::create(&image, "qcow2", SIZE, "");
    let qemu = Qemu::build().disk("vda", &image, "qcow2").paused().start();
    let mount = Fleecefs::qmp(&qemu.socket())
        .option("slice-size=64K")
        .mount();
    let mut model = Disk::new(SIZE);
    let mut nights = Vec::new();
    for (i, night) in ["mon", "tue", "wed", "thu"].iter().enumerate() {
        for _ in 0..15 {
            let write = rng.write(SIZE);
            qemu.write("vda", write);
            model.apply(write);
        }
        // Zeros where there was data.
        let zeros = Write {
            offset: i as u64 * 5 * MIB,
            length: MIB,
            pattern: 0,
        };
        qemu.write("vda", zeros);
        model.apply(zeros);
        let backup = format!("backups/{night}");
        mount.mkdir(&backup).unwrap();
        let (series, chain) = (path(&format!("series/{night}")), path("chain"));
        let script = r#"set -e
            backup=$1 series=$2 chain=$3 night=$4 current=$5 slices=$6
            mkdir -p "$series" "$chain"
            cp "$backup"/*.xml "$backup/slices/manifest" "$series"
            base=$(sed -n 's/^base: "\{0,1\}\([^"]*\)"\{0,1\}$/\1/p' "$backup/status")
            if [ "$base" = none ]; then
                cp -r "$backup/raw" "$series"
                cp "$backup/qcow2/vda.qcow2" "$chain/$night.qcow2"
            else
                mkdir "$series/since"
                cp -r "$backup/since/$base" "$series/since"
                cp "$backup/since/$base/vda.qcow2" "$chain/$night.qcow2"
            fi
            rm -rf "$slices"
            cp -a "$current" "$slices"
            chmod -R u+rw "$series" "$chain" "$slices""#;
        let (backup, current) = (mount.path(&backup), mount.path("current"));
        let slices = path("slices");
        run(
            "sh",
            &[
                "-c",
                script,
                "sh",
                text(&backup),
                text(&series),
                text(&chain),
                night,
                text(&current),
                text(&slices),
            ],
        );
        nights.push((night.to_string(), model.clone()));
        mount.rmdir(&format!("backups/{night}")).unwrap();
        restore(&slices, &[], &path(&format!("{night}.slices")));
        model.assert_file(&path(&format!("{night}.slices")));
    }
    mount.umount().assert_clean();
    restore(&path("series"), &[], &path("newest"));
    model.assert_file(&path("newest"));
    for (night, model) in &nights {
        let output = path(&format!("{night}.series"));
        restore(&path("series"), &["--until", night], &output);
        model.assert_file(&output);
        let output = path(&format!("{night}.chain"));
        restore(&path(&format!("chain/{night}.qcow2")), &[], &output);
        model.assert_file(&output);
    }
}
