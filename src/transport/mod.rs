//! How bytes move. Today: TCP.

pub(crate) mod addresses;
mod ahead;
pub(crate) mod link;
pub(crate) mod receive;
pub(crate) mod send;
