//! Making and reading disk images with QEMU's own tools.

use std::path::Path;

use super::model::Disk;
use super::tools::{run, text};

/// An empty image. `options` as with `qemu-img create -o`, or "".
pub fn create(path: &Path, format: &str, size: u64, options: &str) {
    let size = size.to_string();
    let mut args = vec!["create", "-q", "-f", format];
    if !options.is_empty() {
        args.extend(["-o", options]);
    }
    args.extend([text(path), &size]);
    run("qemu-img", &args);
}

/// A qcow2 image that holds what the model holds.
pub fn from_model(path: &Path, disk: &Disk) {
    let raw = path.with_extension("from.raw");
    std::fs::write(&raw, disk.bytes()).unwrap();
    convert(&raw, "raw", path, "qcow2");
    std::fs::remove_file(raw).unwrap();
}

/// A qcow2 image with an empty ext4 in it.
pub fn ext4(path: &Path, size: u64) {
    let raw = path.with_extension("ext4.raw");
    std::fs::File::create(&raw).unwrap().set_len(size).unwrap();
    run("mkfs.ext4", &["-q", "-F", text(&raw)]);
    convert(&raw, "raw", path, "qcow2");
    std::fs::remove_file(raw).unwrap();
}

/// A qcow2 image with an ext4 in it that holds what a directory holds.
pub fn ext4_of(path: &Path, size: u64, files: &Path) {
    let raw = path.with_extension("ext4.raw");
    std::fs::File::create(&raw).unwrap().set_len(size).unwrap();
    run("mkfs.ext4", &["-q", "-F", "-d", text(files), text(&raw)]);
    convert(&raw, "raw", path, "qcow2");
    std::fs::remove_file(raw).unwrap();
}

/// `qemu-img convert`.
pub fn convert(from: &Path, format: &str, to: &Path, to_format: &str) {
    run(
        "qemu-img",
        &[
            "convert",
            "-f",
            format,
            "-O",
            to_format,
            text(from),
            text(to),
        ],
    );
}

/// All bytes of an image, as QEMU sees them.
pub fn bytes(path: &Path, format: &str) -> Vec<u8> {
    let raw = path.with_extension("bytes.raw");
    convert(path, format, &raw, "raw");
    let bytes = std::fs::read(&raw).unwrap();
    std::fs::remove_file(raw).unwrap();
    bytes
}

/// Writes a pattern into an image that nobody has open: `qemu-io`, which keeps its bitmaps up.
pub fn write(path: &Path, offset: u64, length: u64, pattern: u8) {
    let command = format!("write -P {pattern} {offset} {length}");
    let said = run("qemu-io", &["-f", "qcow2", "-c", &command, text(path)]);
    assert!(said.contains("wrote"), "{said}");
}
