//! RDMA READ and WRITE by reliable-connection queue pairs.
//!
//! An engine opens its devices once: each is a rail, with one protection domain in which every region is registered. A lane
//! polls completion queues of its own. A connection has one queue pair for small transfers and messages, and some on each rail
//! for large transfers; all belong to the lane that owns the peer.
//!
//! What is sent when is decided here ([`Link`]); that the session agrees on it is the business of the engine's lane.

mod address;
mod buffers;
mod gpu;
mod lane;
mod link;
mod near;
mod pair;
mod rails;
mod slots;

pub(crate) use address::{Candidate, nearest};
pub(crate) use lane::{LaneRdma, PairId, WorkId};
pub(crate) use link::{EndedJob, Job, Late, Link, Phase};
pub(crate) use near::near_all;
pub(crate) use pair::Pair;
pub(crate) use rails::{Rail, Rails, Registrations};

pub(crate) use crate::verbs::AsyncEvent;
