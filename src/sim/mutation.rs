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
    EndsTwice, "an end that has to wait for a frame is told at once, and again", "ends once";
    DoneIsToldTwice, "the end of a WRITE with a notification is told for each of them", "ends once";
    TimeoutTellsTheEnd, "the operation timeout tells the end, and the answer tells it again", "ends once";
    EachRequestTells, "a failed transfer tells its end for each of its requests", "ends once";
    MissingCancel, "cancel does nothing", "ends in time";
    NoOperationTimeout, "no transfer expires", "ends in time";
    LostLinkFailsNobody, "the requests of a lost link wait on", "ends in time";
    EndingForgotten, "nobody looks whether a transfer was waiting for its last frame to be sent, or for its last answer", "ends in time";
    EarlyCompletion, "a transfer is done when no request is without an answer, though more are to be sent", "data";
    AnyAnswerCompletes, "a transfer is done with the first answer after its last request", "data";
    PayloadShifted, "data lands where the piece before it belongs", "data";
    EndsWhileSending, "a failed WRITE ends while its frame is partly in the socket", "quiet after end";
    EndsUnanswered, "a cancelled WRITE ends though the peer has not answered what it was sent of it", "quiet after end";
    OrphansLand, "data for a transfer that has ended lands in whatever has its place", "quiet after end";
    ClosedBeforeTheLastUse, "deregistration does not wait for the last use", "quiet after end";
    ServedUsesNotKept, "a READ that is served does not count as a use until its data is sent", "quiet after end";
    NoDeduplication, "after a lost link, what has not been acknowledged is expected again", "notified once";
    SeenOnesAgain, "a new session sends again what the peer may have seen in the old one", "notified once";
    BoundSeenTwice, "a bound notification is seen on arrival, and with its data", "notified once";
    FullQueueDrops, "what the application has no room for is dropped", "nothing lost";
    LostLinkEmptiesTheOutbox, "what a lost link has not delivered is forgotten", "nothing lost";
    VoidsTheNext, "a failed transfer voids the notification behind its own", "nothing lost";
    BoundNotHeld, "a bound notification does not wait for its data", "after its data";
    OnePieceEarly, "a bound notification waits for all pieces but one", "after its data";
    ReadNotifiesEarly, "the notification of a READ is sent with its last request", "after its data";
    LastInFirstOut, "what waits for the application is handed over from the back", "in order";
    SmallOnesFirst, "small notifications overtake those that are not sent yet", "in order";
    DeadlinesPile, "deadlines of transfers that have ended are kept", "bounded";
    WindowIgnored, "eight times as many requests are sent as the window allows", "bounded";
    QueueWithoutBound, "the application's queue takes any number", "bounded";
    BudgetNotChecked, "any number of notifications may be without acknowledgement", "bounded";
    NoAbandon, "the peer is not told to forget the count of a failed transfer", "nothing left";
    BudgetKept, "a failed transfer does not give back the room of its notification", "nothing left";
    NeverAcknowledges, "notifications are never acknowledged", "nothing left";
    DroppedPayloadKeepsUses, "a WRITE that breaks off keeps its region in use", "nothing left";
    LostRepliesKeepUses, "answers that were not sent on a lost link keep their region in use", "nothing left";
    ClosingAdmits, "requests are admitted while deregistration waits", "admitted";
    KeyIgnored, "of a key, only the slot is looked at", "admitted";
    BoundsIgnored, "requests may leave their region", "admitted";
    PermissionIgnored, "every region may be read and written", "admitted";
    CopyCutShort, "a transfer that is copied ends while a thread is amid a chunk of it", "quiet after end";
    CopyNotAnnounced, "a copy is not announced to the owner of the memory while it lasts", "quiet after end";
    CopiesNotWaitedFor, "deregistration does not wait for the copies of peers on this host", "quiet after end";
    DeadCopiersCount, "the copies of a process that died are waited for", "ends in time";
    TableStaysOpen, "deregistration leaves the key in the region table", "admitted";
    WiredEndsAtOnce, "a transfer that a device has is told to have ended while the device goes on", "quiet after end";
    RedoneUnconfirmed, "what a queue pair has lost is done again at once, and the peer is not asked to destroy its own", "quiet after end";
    PairKept, "a queue pair that is down is kept by the side that did not offer it", "quiet after end";
    NotifiedRedone, "a WRITE whose notification the peer may have seen is done again by RDMA", "notified once";
    ResyncForgets, "what queue pairs have lost of the notifications is not sent again", "nothing lost";
    ResyncLoosens, "notifications no longer wait for their data once queue pairs have failed, which did not carry it", "after its data";
    LostAcknowledgementForgotten, "an acknowledgement that was lost with queue pairs is not made up for", "nothing left";
    DownWithoutEnd, "a peer that does not say that its queue pairs are gone is waited for without end", "nothing left";
    ResyncFromAcknowledged, "notifications that the peer has are sent again after queue pairs failed", "rules";
    GapLeft, "numbers of voided notifications are not sent", "rules";
    AnswersTwice, "a WRITE is answered twice", "rules";
    NoPing, "nobody asks whether a silent peer is there", "alive";
    HearsNothing, "bytes of the peer do not count as a sign of life", "alive";
    NeverDead, "a silent peer is never given up", "dead";
    OwnPingsCount, "a ping that is sent counts as a sign of life", "dead";
    LostStaysConnected, "a peer whose session is lost is said to be connected", "dead";
    SilentLinkKept, "the link of a peer that was given up is kept", "dead";
    BothRefuse, "both sides refuse when both connect at once", "meet";
    AcceptsNoSecondAttempt, "a peer that has been here is refused", "meet";
    TargetNotProven, "the initiator does not look at the target's proof", "trusted";
    InitiatorNotProven, "the target does not look at the initiator's proof", "trusted";
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
