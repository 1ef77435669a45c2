//! `corelane-bench many-peers`: one engine with many peers, what each of these gets of it, and what each costs it.
//!
//! ```text
//!   many-peers ──lines (pipe)──> hub process:    one engine, one application thread
//!   rounds, table, report        peers' process: N engines, one application thread      (--processes: several)
//!                                    └── every engine is connected to the hub, and to nobody else
//! ```
//!
//! Either the hub reads and writes the memory of all peers (`from-one`) or all peers read and write the hub's (`to-one`),
//! each with one transfer outstanding. All processes are fresh in every round of every case. They run on one host and
//! share its clock, so all begin at the same moment.
//!
//! In the place of engines the nodes may be agents of NIXL with one backend each. Several backends run every case in turn
//! within a round.

#[cfg(feature = "nixl")]
mod agent_node;
mod node;
mod options;
mod processes;
mod report;
mod run;
mod side;
mod tally;
mod wire;

pub(crate) use options::PeersArgs;
#[cfg(test)]
pub(crate) use report::tests::{compared, results as engines};
pub(crate) use report::{PeerFigures, PeersResults, PeersSeries, SCHEMA, SCHEMA_VERSION};
pub(crate) use run::measure;
pub(crate) use side::serve as serve_side;
