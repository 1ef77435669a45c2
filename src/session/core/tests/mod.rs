//! Two cores against each other on virtual time, without a socket.
//!
//! [`world`] has the two engines and the clock, [`net`] the links between them, [`memory`] the
//! registered buffers. What happens next is chosen by a seeded generator, so that a failing run is
//! replayed by its seed.

mod hostile;
mod memory;
mod net;
mod notifications;
mod random;
mod sessions;
mod transfers;
mod world;
