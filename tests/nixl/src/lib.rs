//! What the tests of the NIXL plugin share.
//!
//! A test is one process with NIXL agents of its own; others are `corelane-nixl-peer` processes, driven line by line. NIXL is
//! the one that users install: the crate `nixl-sys` finds its C library at run time. Its safe layer puts one lock around an
//! agent and folds most status codes into one, so [`Agent`] stands on the crate's C functions and asks the C++ agent
//! behind a handle for the code itself; [`Engine`] does without an agent and calls the plugin's virtual functions.
//! Nothing here asserts a time, unless it says so: whatever is waited for may take [`corelane_tests::BOUND`].

mod agent;
mod capi;
mod couple;
mod cxx;
mod environment;
mod layouts;
mod plugin;
mod request;
mod script;
mod southbound;
mod status;
mod target;
mod wait;

pub use agent::{Agent, Settings, TCP, params};
pub use couple::Couple;
pub use environment::{backend, plugin_file, require_nixl, shared_core, wheel_plugin};
pub use layouts::{Handle, MetaDescriptor, Metadata, descriptor};
pub use plugin::{PLUGIN_API_VERSION, accepts, layout, plugin_name};
pub use request::{Notify, Operation, Request};
pub use script::{exchange, run_script};
pub use southbound::Engine;
pub use status::Status;
pub use target::{Target, range};
pub use wait::{Message, assert_quiet, collect};

/// A range of memory: address and length.
pub type Range = (u64, usize);

/// Starts the second process of a test.
#[macro_export]
macro_rules! peer_process {
    () => {{
        $crate::require_nixl();
        corelane_tests::PeerProcess::start(env!("CARGO_BIN_EXE_corelane-nixl-peer"))
    }};
}

/// Starts a second process with one agent and one region that holds pattern 1: `(name, bytes, parameters)`.
#[macro_export]
macro_rules! target {
    ($name:expr, $len:expr, $params:expr) => {
        $crate::Target::start($crate::peer_process!(), $name, $len, $params)
    };
    ($name:expr, $len:expr) => {
        $crate::target!($name, $len, "")
    };
}
