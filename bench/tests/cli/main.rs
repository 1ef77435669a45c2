//! End-to-end tests of the binary: real processes, real sockets, both backends.

mod common;
mod loopback;
mod nixl;
mod options;
mod processes;
