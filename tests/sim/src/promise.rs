//! What is checked.

macro_rules! promises {
    ($($name:ident, $short:literal, $text:literal;)*) => {
        /// A promise of the protocol.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub(crate) enum Promise { $($name,)* }

        impl Promise {
            pub(crate) const ALL: &'static [Self] = &[$(Self::$name,)*];

            pub(crate) fn name(self) -> &'static str {
                match self { $(Self::$name => $short,)* }
            }

            pub(crate) fn text(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

promises! {
    EndsOnce, "ends once", "a posting ends exactly once";
    EndsInTime, "ends in time", "a posting, and every slow call, ends within its timeout; after the death of the peer within that of liveness; a cancelled READ at once";
    Data, "data", "every byte that lands is the one that was sent there, and a transfer that is done has all of them";
    QuietAfterEnd, "quiet after end", "after its end nothing touches a transfer's local memory, nor writes the peer's for one that is done or ended in `Cancelled`; nothing touches that of a deregistered region";
    NotifiedOnce, "notified once", "no notification is seen twice";
    NothingLost, "nothing lost", "a notification that was taken is seen, unless its session ended and it was counted as dropped";
    AfterData, "after its data", "a bound notification is seen when its data is there, and not if its READ has failed";
    InOrder, "in order", "free-standing notifications of one thread are seen in order";
    Bounded, "bounded", "every queue keeps to its bound";
    NothingLeft, "nothing left", "at rest no request, count, use, budget or link is left over";
    Admitted, "admitted", "a request without key, bounds or permission touches nothing and is refused, and nothing begins after deregistration did";
    Rules, "rules", "no engine breaks the protocol in the eyes of another, and none panics";
    Alive, "alive", "a peer that answers is not taken for dead";
    Dead, "dead", "a peer that has died is not connected after the liveness timeout";
    Meet, "meet", "two engines that can reach each other have one session";
    Trusted, "trusted", "who cannot prove the secret never has a session";
}

/// A promise that was broken.
#[derive(Debug, Clone)]
pub(crate) struct Violation {
    pub(crate) promise: Promise,
    pub(crate) text: String,
}
