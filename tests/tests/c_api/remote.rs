//! A second process to move bytes with.

use corelane_tests::{Target, target};

use crate::api::*;

/// Bytes of memory on both sides.
pub(crate) const LEN: usize = 8 << 20;

/// A second process, and an engine of the C API here that knows it.
pub(crate) struct Remote {
    pub(crate) near: Side,
    pub(crate) far: Target,
}

impl Remote {
    /// As `new`, with a peer that does without `local`: its process takes part in every transfer.
    pub(crate) fn over_tcp(name: &str, settings: &str, options: &[(&str, &str)]) -> Self {
        Self::new(name, &format!("{settings} transports=tcp"), options)
    }

    pub(crate) fn new(name: &str, settings: &str, options: &[(&str, &str)]) -> Self {
        let far = target!(name, LEN, "read-write", settings);
        let near = Side::new(options, LEN, &far.metadata, &far.region.to_bytes());
        Self { near, far }
    }
}
