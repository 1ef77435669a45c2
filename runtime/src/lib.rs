//! Lanes: one pinned thread per core that polls everything its connections need.
//!
//! ```text
//!  any thread                      the lane's thread
//!  submit(message) ──► inbox ──►  ┌────────────────── a turn of the pump ──────────────────┐
//!       │ doorbell, if it sleeps  │ messages, hot descriptors, ring, timers, Driver::on_turn │
//!       ▼                         └──────────────────────────────────────────────────────────┘
//!  assist() ─── token, where cores are few: runs a turn here instead
//! ```
//!
//! A [`Lane`] drives a [`Driver`], which owns all state of its work; the driver registers file descriptors and timers
//! through [`Cx`]. Descriptors that are *hot* are tried every turn; *quiet* ones are watched by the lane's io_uring ring,
//! in which an idle lane also sleeps. Bytes are moved by the driver with plain non-blocking system calls, so the kernel
//! never holds a pointer into user memory.
//!
//! Driver and pump belong to whoever holds the lane's token. A lane with a core of its own never gives it away; where
//! cores are few, a waiting caller takes it and runs the turn itself ([`Lane::assist`]), which saves two context switches
//! per message. On-lane tasks ([`Lane::spawn`]) run on the lane's executor, between turns.
//!
//! ```
//! use std::time::Duration;
//! use corelane_runtime::{Cx, Driver, Lane, LaneConfig, Readiness};
//!
//! struct Adder { sum: u64, answer: std::sync::mpsc::Sender<u64> }
//!
//! impl Driver for Adder {
//!     type Message = u64;
//!     fn on_message(&mut self, _: &mut Cx<'_>, number: u64) {
//!         self.sum += number;
//!         let _ = self.answer.send(self.sum);
//!     }
//!     fn on_fd(&mut self, _: &mut Cx<'_>, _: u64, _: Readiness) -> bool { false }
//!     fn on_timer(&mut self, _: &mut Cx<'_>, _: u64) {}
//!     fn on_turn(&mut self, _: &mut Cx<'_>) -> bool { false }
//!     fn on_panic(&mut self, _: &str) {}
//! }
//!
//! let (answer, answers) = std::sync::mpsc::channel();
//! let lane = Lane::start(LaneConfig::default(), move |_| Adder { sum: 0, answer })?;
//! lane.submit(2).unwrap();
//! lane.submit(3).unwrap();
//! assert_eq!((answers.recv(), answers.recv()), (Ok(2), Ok(5)));
//! lane.stop(Duration::from_secs(1))?;
//! # Ok::<(), corelane_runtime::LaneError>(())
//! ```

mod config;
mod core_watch;
mod driver;
mod error;
#[cfg_attr(loom, path = "executor_loom.rs")]
mod executor;
mod fds;
pub mod histogram;
mod inbox;
mod lane;
pub mod placement;
mod policy;
mod preflight;
mod pump;
mod ring;
mod shared;
mod sleep;
mod stats;
mod sync;
mod task;
mod thread;
mod token;
mod wheel;
mod words;

pub use config::{AssistMode, LaneConfig, ParseSpinError, Spin};
pub use driver::{Driver, Interest, Readiness, Start};
pub use error::{LaneError, SubmitError, TaskError, TrySubmitError};
pub use fds::FdId;
pub use lane::{Assist, Lane};
pub use pump::Cx;
pub use stats::LaneStats;
pub use task::{LaneTask, LocalLane, Sleep};
pub use wheel::TimerId;
pub use words::{SharedWord, WordId};
