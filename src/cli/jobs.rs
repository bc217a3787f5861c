//! `fleecefs jobs`: the backups that run, as a table.

use super::args::Jobs;
use super::mounted::{MountPoint, say};
use super::status::Status;
use super::table::table;
use crate::model::{Result, show_size};

pub(super) fn run(args: &Jobs) -> Result<()> {
    let mount = MountPoint::at(&args.dir)?;
    let mut jobs = Vec::new();
    for name in mount.directories("backups")? {
        // Ended meanwhile: no job any more.
        if let Some(text) = mount.read(&format!("backups/{name}/status"))? {
            let status = Status::read(&text);
            jobs.push((status.keys.number("job"), name, status));
        }
    }
    jobs.sort_by_key(|job| job.0);
    let head = ["Id", "Name", "Mode", "State", "Done", "Total"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for (_, name, status) in jobs {
        let word = |key| status.keys.get(key).unwrap_or("").to_owned();
        let (done, total) = progress(&status);
        rows.push(vec![
            word("job"),
            name,
            word("mode"),
            word("state"),
            show_size(done),
            show_size(total),
        ]);
    }
    say(&table(&rows)).map(drop)
}

/// Bytes copied and bytes there are. Of a pull backup: bytes fetched, and the size of the disks.
fn progress(status: &Status) -> (u64, u64) {
    let keys = &status.keys;
    let done = keys.number("done").or(keys.number("bytes-pulled"));
    let sizes = status
        .disks
        .iter()
        .filter_map(|(_, disk)| disk.number("size"));
    let total = keys.number("total").unwrap_or_else(|| sizes.sum());
    (done.unwrap_or(0), total)
}
