//! Deliberate bugs, and marks of what was reached: only in builds for the simulator (feature `sim`).
//!
//! The simulator proves that it finds bugs by running variants of the protocol that each break one promise. A place where a
//! variant differs asks `mutated!(name)`; without the feature that is `false`, and nothing of it is left in the program.

#[cfg(feature = "sim")]
macro_rules! mutated {
    ($name:ident) => {
        $crate::sim::Mutation::$name.is_on()
    };
}

#[cfg(not(feature = "sim"))]
macro_rules! mutated {
    ($name:ident) => {
        false
    };
}

/// Counts that a state of a transfer has met an event.
#[cfg(feature = "sim")]
macro_rules! reached {
    ($table:ident, $state:expr, $event:expr) => {
        $crate::sim::coverage::$table($state, $event)
    };
}

#[cfg(not(feature = "sim"))]
macro_rules! reached {
    ($table:ident, $state:expr, $event:expr) => {{}};
}
