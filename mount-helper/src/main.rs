//! `mount.fleecefs`: what mount(8) runs for `mount -t fleecefs SOURCE DIR -o OPTIONS` and for lines
//! of fstab. It calls `fleecefs mount` with the same source, directory and options.

use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    // mount(8) calls: mount.fleecefs SOURCE DIR [-sfnv] [-o OPTIONS] [-t TYPE]. `-s`, `-n` and `-v` need
    // nothing from us; `-f` means "do everything but mount", which for us is nothing.
    let args: Vec<String> = std::env::args().skip(1).collect();
    let mut plain = Vec::new();
    let mut options = Vec::new();
    let mut iter = args.into_iter();
    while let Some(arg) = iter.next() {
        match arg.as_str() {
            "-o" => options.extend(iter.next()),
            "-t" => drop(iter.next()),
            "-f" => return ExitCode::SUCCESS,
            flag if flag.starts_with('-') => {}
            _ => plain.push(arg),
        }
    }
    let error = Command::new("fleecefs")
        .arg("mount")
        .args(options.iter().flat_map(|o| ["-o", o.as_str()]))
        .arg("--")
        .args(plain)
        .exec();
    eprintln!("mount.fleecefs: cannot run fleecefs: {error}");
    ExitCode::FAILURE
}
