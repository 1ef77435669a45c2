//! How bytes move: frames over sockets (TCP, or a Unix socket between engines of one host), and copies by
//! the initiator on one host ([`local`]), work requests of a device ([`rdma`]).

pub(crate) mod addresses;
mod ahead;
pub(crate) mod link;
pub(crate) mod local;
#[cfg(feature = "rdma")]
pub(crate) mod rdma;
#[cfg(not(feature = "rdma"))]
#[path = "no_rdma.rs"]
pub(crate) mod rdma;
pub(crate) mod receive;
pub(crate) mod send;
