//! How bytes move: frames over sockets (TCP, or a Unix socket between engines of one host), and copies by
//! the initiator on one host ([`local`]).

pub(crate) mod addresses;
mod ahead;
pub(crate) mod link;
pub(crate) mod local;
pub(crate) mod receive;
pub(crate) mod send;
