//! The C API as a C program meets it: the header, the shared library, the example, and callers who do everything wrong.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

mod accepting;
mod allocation;
mod api;
mod arguments;
mod buffers;
mod endings;
mod notifications;
mod options;
mod program;
mod programs;
mod races;
mod remote;
mod statistics;
mod transfers;
