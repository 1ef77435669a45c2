//! End-to-end tests of the binary: real processes, real sockets, all backends.

mod common;
mod loopback;
mod many_peers;
mod nixl;
mod options;
mod plot;
mod processes;
mod vram;
