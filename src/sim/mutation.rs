//! Variants of the protocol that each break one promise.

use std::cell::Cell;

macro_rules! mutations {
    ($($name:ident, $text:literal, $breaks:literal;)*) => {
        /// A deliberate bug.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[allow(missing_docs)]
        pub enum Mutation { $($name,)* }

        impl Mutation {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// As it is called on the command line.
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)* }
            }

            /// What it does.
            pub fn describe(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// The promise that it was written to break.
            pub fn breaks(self) -> &'static str {
                match self { $(Self::$name => $breaks,)* }
            }
        }
    };
}

mutations! {
    CancelTellsTheEnd, "cancel tells the end at once, and the transfer goes on to its own", "ends once";
}

thread_local! {
    static ACTIVE: Cell<Option<Mutation>> = const { Cell::new(None) };
}

impl Mutation {
    /// Whether this thread runs this variant.
    pub(crate) fn is_on(self) -> bool {
        ACTIVE.get() == Some(self)
    }

    /// Runs this variant on this thread from now on; `None`: the protocol as it is.
    pub fn activate(mutation: Option<Self>) {
        ACTIVE.set(mutation);
    }
}
