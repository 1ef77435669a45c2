//! Two cores against each other on virtual time, without a socket.
//!
//! [`world`] has the two engines, [`net`] the links between them, [`memory`] the registered buffers,
//! [`clock`] the time. What happens next is chosen by a seeded generator, so that a failing run is
//! replayed by its seed.

mod cancelling;
mod clock;
mod hostile;
mod memory;
mod net;
mod notifications;
mod passive;
mod random;
mod sessions;
mod timing;
mod transfers;
mod world;
