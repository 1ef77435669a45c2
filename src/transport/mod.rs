//! How bytes move. Today: TCP.

pub(crate) mod addresses;
pub(crate) mod link;
