//! The worlds.

#[cfg(feature = "libvirt")]
pub mod libvirt;
pub mod qmp;
pub mod sim;
