//! What a file shows: extents in, bytes out. Pure; nothing here asks anybody for anything.

pub mod bmap;
pub mod coarse;
pub mod json;
pub mod manifest;
pub mod map;
pub mod qcow2;
pub mod raw;
pub mod slices;
pub mod yaml;

pub use map::changes;
