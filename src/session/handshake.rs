//! The handshake of a link as two state machines without socket or clock.
//!
//! ```text
//! initiator                                   target
//!   Hello     versions, names, nonce  ------>
//!             <------  Challenge      nonce, proof with the target's secret
//!   Auth      proof with the target's secret, proof with the own secret ------>
//!             <------  Welcome        session state
//! ```
//!
//! A proof is HMAC-SHA256 over a label that names role and secret, and over the whole transcript so
//! far. Both nonces, both incarnations, the agent name, the versions offered and chosen and the
//! transports offered and chosen are in the transcript, so that nothing can be reflected, replayed
//! or downgraded. Secrets are never sent; proofs are compared in constant time.

use hmac::{Hmac, Mac};
use sha2::Sha256;

use crate::wire::Metadata;
use crate::wire::hello::{Auth, Challenge, Hello, LinkKind, Message, Refusal, VERSIONS, Welcome};

/// Who an engine is in a handshake.
#[derive(Clone)]
pub(crate) struct Identity {
    pub(crate) name: String,
    pub(crate) incarnation: u128,
    pub(crate) secret: [u8; 32],
    pub(crate) transports: u32,
    pub(crate) liveness_ms: u32,
}

/// What a link is to become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Intent {
    pub(crate) kind: LinkKind,
    pub(crate) session: u64,
    pub(crate) attempt: u64,
    pub(crate) expects: u64,
}

/// Why a handshake failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HandshakeError {
    /// The other side said why.
    Refused(Refusal),
    /// The other side's proof is wrong: it does not have the secret.
    Proof,
    /// The other side does not speak this protocol.
    Protocol,
}

impl HandshakeError {
    pub(crate) fn reason(self) -> &'static str {
        match self {
            Self::Refused(refusal) => refusal.reason(),
            Self::Proof => "it could not prove the secret of its metadata; exchange metadata again",
            Self::Protocol => "something else than a corelane engine answers there",
        }
    }
}

const TARGET: &[u8] = b"corelane 1: target has its own secret";
const INITIATOR: &[u8] = b"corelane 1: initiator has the target's secret";
const INITIATOR_OWN: &[u8] = b"corelane 1: initiator has its own secret";

fn mac(secret: &[u8; 32], label: &[u8], parts: &[&[u8]]) -> Hmac<Sha256> {
    // HMAC pads its key with zeros to the block of the hash (RFC 2104): doing so here takes the
    // constructor that cannot fail.
    let mut key = [0; 64];
    key[..secret.len()].copy_from_slice(secret);
    let mut mac = Hmac::<Sha256>::new(&key.into());
    mac.update(label);
    for part in parts {
        mac.update(&(part.len() as u64).to_le_bytes());
        mac.update(part);
    }
    mac
}

fn prove(secret: &[u8; 32], label: &[u8], parts: &[&[u8]]) -> [u8; 32] {
    mac(secret, label, parts).finalize().into_bytes().into()
}

fn verify(secret: &[u8; 32], label: &[u8], parts: &[&[u8]], proof: &[u8; 32]) -> bool {
    mac(secret, label, parts).verify_slice(proof).is_ok()
}

/// The side that connects.
pub(crate) struct Initiator {
    identity: Identity,
    target_secret: [u8; 32],
    target: u128,
    hello: Vec<u8>,
    offered: u32,
    challenged: bool,
}

/// What an initiator has to do next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum InitiatorStep {
    /// Send this and wait for the next message.
    Send(Vec<u8>),
    /// The link is up.
    Up(Welcome),
}

impl Initiator {
    /// Starts a handshake; the bytes are the first message to send.
    pub(crate) fn start(
        identity: Identity,
        peer: &Metadata,
        intent: Intent,
        nonce: [u8; 32],
    ) -> (Self, Vec<u8>) {
        let hello = Message::Hello(Hello {
            min_version: *VERSIONS.start(),
            max_version: *VERSIONS.end(),
            kind: intent.kind,
            transports: identity.transports,
            initiator: identity.incarnation,
            target: peer.incarnation,
            nonce,
            session: intent.session,
            attempt: intent.attempt,
            expects: intent.expects,
            liveness_ms: identity.liveness_ms,
            name: identity.name.clone(),
        });
        let bytes = hello.encode();
        let offered = identity.transports;
        let state = Self {
            identity,
            target_secret: peer.secret,
            target: peer.incarnation,
            hello: hello.body(),
            offered,
            challenged: false,
        };
        (state, bytes)
    }

    /// Takes the next message of the target, without its length.
    pub(crate) fn receive(&mut self, bytes: &[u8]) -> Result<InitiatorStep, HandshakeError> {
        match Message::decode(bytes) {
            Some(Message::Refused(refusal)) => Err(HandshakeError::Refused(refusal)),
            Some(Message::Challenge(challenge)) if !self.challenged => {
                self.challenged = true;
                self.answer(&challenge).map(InitiatorStep::Send)
            }
            Some(Message::Welcome(welcome)) if self.challenged => Ok(InitiatorStep::Up(welcome)),
            _ => Err(HandshakeError::Protocol),
        }
    }

    fn answer(&self, challenge: &Challenge) -> Result<Vec<u8>, HandshakeError> {
        let unproven = Message::Challenge(Challenge { proof: [0; 32], ..challenge.clone() }).body();
        let transcript = [&self.hello[..], &unproven[..]];
        if !verify(&self.target_secret, TARGET, &transcript, &challenge.proof)
            && !mutated!(TargetNotProven)
        {
            return Err(HandshakeError::Proof);
        }
        if challenge.target != self.target {
            return Err(HandshakeError::Refused(Refusal::Incarnation));
        }
        if !VERSIONS.contains(&challenge.version) {
            return Err(HandshakeError::Refused(Refusal::Version));
        }
        if challenge.transports & self.offered == 0 {
            return Err(HandshakeError::Refused(Refusal::Transports));
        }
        Ok(Message::Auth(Auth {
            proof: prove(&self.target_secret, INITIATOR, &transcript),
            own_proof: prove(&self.identity.secret, INITIATOR_OWN, &transcript),
        })
        .encode())
    }
}

/// The side that accepts.
pub(crate) struct Target {
    identity: Identity,
    nonce: [u8; 32],
    heard: Option<(Hello, Vec<u8>, Vec<u8>)>,
}

/// An initiator that has proven that it holds our metadata.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Proven {
    pub(crate) hello: Hello,
    /// Whether it also proved the secret asked about.
    pub(crate) own_secret: OwnSecret,
}

/// Whether the initiator proved its own secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OwnSecret {
    /// Its metadata is not loaded here, so nothing can be checked.
    NotKnown,
    /// It has the secret of the metadata that is loaded here.
    Proven,
}

/// What a target has to do next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum TargetStep {
    /// Send this and wait for the next message.
    Send(Vec<u8>),
    /// The initiator is who it says; decide on the session and send `welcome` or `refuse`.
    Proven(Box<Proven>),
}

impl Target {
    pub(crate) fn new(identity: Identity, nonce: [u8; 32]) -> Self {
        Self { identity, nonce, heard: None }
    }

    /// Takes the next message of the initiator, without its length.
    ///
    /// `secret_of` gives the secret of that incarnation when its metadata is loaded here.
    ///
    /// # Errors
    /// What to tell the initiator before the link is closed.
    pub(crate) fn receive(
        &mut self,
        bytes: &[u8],
        secret_of: impl FnOnce(u128) -> Option<[u8; 32]>,
    ) -> Result<TargetStep, HandshakeError> {
        match (Message::decode(bytes), self.heard.take()) {
            (Some(Message::Hello(hello)), None) => {
                self.challenge(hello, bytes).map(TargetStep::Send)
            }
            (Some(Message::Auth(auth)), Some((hello, hello_body, challenge))) => {
                let transcript = [&hello_body[..], &challenge[..]];
                if !verify(&self.identity.secret, INITIATOR, &transcript, &auth.proof)
                    && !mutated!(InitiatorNotProven)
                {
                    return Err(HandshakeError::Proof);
                }
                let own_secret = match secret_of(hello.initiator) {
                    None => OwnSecret::NotKnown,
                    Some(secret)
                        if verify(&secret, INITIATOR_OWN, &transcript, &auth.own_proof) =>
                    {
                        OwnSecret::Proven
                    }
                    Some(_) => return Err(HandshakeError::Proof),
                };
                Ok(TargetStep::Proven(Box::new(Proven { hello, own_secret })))
            }
            _ => Err(HandshakeError::Protocol),
        }
    }

    fn challenge(&mut self, hello: Hello, body: &[u8]) -> Result<Vec<u8>, HandshakeError> {
        if hello.target != self.identity.incarnation {
            return Err(HandshakeError::Refused(Refusal::Incarnation));
        }
        let version = hello.max_version.min(*VERSIONS.end());
        if version < hello.min_version || version < *VERSIONS.start() {
            return Err(HandshakeError::Refused(Refusal::Version));
        }
        let transports = hello.transports & self.identity.transports;
        if transports == 0 {
            return Err(HandshakeError::Refused(Refusal::Transports));
        }
        let mut challenge = Challenge {
            version,
            transports,
            target: self.identity.incarnation,
            nonce: self.nonce,
            proof: [0; 32],
        };
        let unproven = Message::Challenge(challenge.clone()).body();
        challenge.proof = prove(&self.identity.secret, TARGET, &[body, &unproven]);
        self.heard = Some((hello, body.to_vec(), unproven));
        Ok(Message::Challenge(challenge).encode())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(name: &str, incarnation: u128, secret: u8) -> Identity {
        Identity {
            name: name.into(),
            incarnation,
            secret: [secret; 32],
            transports: 1,
            liveness_ms: 3000,
        }
    }

    fn metadata(of: &Identity) -> Metadata {
        Metadata {
            name: of.name.clone(),
            incarnation: of.incarnation,
            secret: of.secret,
            transports: of.transports,
            addresses: vec![],
        }
    }

    const INTENT: Intent = Intent { kind: LinkKind::Session, session: 9, attempt: 1, expects: 0 };

    fn unframe(bytes: &[u8]) -> &[u8] {
        &bytes[2..]
    }

    /// Runs the handshake; `tamper` may change each message on the wire (0 hello, 1 challenge, 2 auth).
    fn run(
        initiator: Identity,
        loaded: &Metadata,
        target: Identity,
        known: Option<[u8; 32]>,
        tamper: impl Fn(usize, &mut Vec<u8>),
    ) -> Result<Box<Proven>, HandshakeError> {
        let (mut a, mut hello) = Initiator::start(initiator, loaded, INTENT, [1; 32]);
        let mut b = Target::new(target, [2; 32]);
        tamper(0, &mut hello);
        let TargetStep::Send(mut challenge) = b.receive(unframe(&hello), |_| known)? else {
            panic!("a hello cannot prove anything");
        };
        tamper(1, &mut challenge);
        let InitiatorStep::Send(mut auth) = a.receive(unframe(&challenge))? else {
            panic!("not up before the proof");
        };
        tamper(2, &mut auth);
        match b.receive(unframe(&auth), |_| known)? {
            TargetStep::Proven(proven) => Ok(proven),
            TargetStep::Send(_) => panic!("nothing to send"),
        }
    }

    #[test]
    fn succeeds_with_the_right_secrets() {
        let (a, b) = (identity("a", 1, 10), identity("b", 2, 20));
        let proven = run(a.clone(), &metadata(&b), b.clone(), None, |_, _| ()).unwrap();
        assert_eq!((proven.hello.name.as_str(), proven.own_secret), ("a", OwnSecret::NotKnown));
        let proven = run(a.clone(), &metadata(&b), b, Some(a.secret), |_, _| ()).unwrap();
        assert_eq!(proven.own_secret, OwnSecret::Proven);
    }

    #[test]
    fn a_wrong_secret_on_either_side_is_refused() {
        let (a, b) = (identity("a", 1, 10), identity("b", 2, 20));
        let stale = Metadata { secret: [21; 32], ..metadata(&b) };
        assert_eq!(run(a.clone(), &stale, b.clone(), None, |_, _| ()), Err(HandshakeError::Proof));
        let impostor = run(a, &metadata(&b), b, Some([11; 32]), |_, _| ());
        assert_eq!(impostor, Err(HandshakeError::Proof));
    }

    #[test]
    fn an_initiator_without_the_secret_cannot_pass_as_one_that_skips_the_check() {
        // A client that ignores the target's proof still has to send its own.
        let (a, b) = (identity("a", 1, 10), identity("b", 2, 20));
        let stale = Metadata { secret: [0; 32], ..metadata(&b) };
        let (_, hello) = Initiator::start(a, &stale, INTENT, [1; 32]);
        let mut target = Target::new(b, [2; 32]);
        assert!(target.receive(unframe(&hello), |_| None).is_ok());
        let auth = Message::Auth(Auth { proof: [7; 32], own_proof: [7; 32] });
        assert_eq!(target.receive(&auth.body(), |_| None), Err(HandshakeError::Proof));
    }

    #[test]
    fn every_altered_byte_of_every_message_is_refused() {
        let (a, b) = (identity("a", 1, 10), identity("b", 2, 20));
        let loaded = metadata(&b);
        let lens = std::cell::RefCell::new([0; 3]);
        let good = run(a.clone(), &loaded, b.clone(), Some(a.secret), |m, bytes| {
            lens.borrow_mut()[m] = bytes.len();
        });
        assert!(good.is_ok());
        for (message, len) in lens.into_inner().into_iter().enumerate() {
            for at in 2..len {
                let outcome = run(a.clone(), &loaded, b.clone(), Some(a.secret), |m, bytes| {
                    if m == message {
                        bytes[at] ^= 1;
                    }
                });
                assert!(outcome.is_err(), "message {message} byte {at} altered and accepted");
            }
        }
    }

    #[test]
    fn another_incarnation_version_or_transport_is_named() {
        let (a, b) = (identity("a", 1, 10), identity("b", 2, 20));
        let other = Metadata { incarnation: 3, ..metadata(&b) };
        let refused = |r| Err(HandshakeError::Refused(r));
        assert_eq!(
            run(a.clone(), &other, b.clone(), None, |_, _| ()),
            refused(Refusal::Incarnation)
        );
        let none = Identity { transports: 2, ..a.clone() };
        assert_eq!(
            run(none, &metadata(&b), b.clone(), None, |_, _| ()),
            refused(Refusal::Transports)
        );
        let mut hello = crate::wire::hello::tests::hello();
        (hello.min_version, hello.max_version, hello.target) = (2, 3, 2);
        let mut target = Target::new(b, [0; 32]);
        let outcome = target.receive(&Message::Hello(hello).body(), |_| None);
        assert_eq!(outcome, Err(HandshakeError::Refused(Refusal::Version)));
    }

    #[test]
    fn proofs_cannot_be_replayed_against_another_nonce() {
        let (a, b) = (identity("a", 1, 10), identity("b", 2, 20));
        let (mut first, hello) = Initiator::start(a, &metadata(&b), INTENT, [1; 32]);
        let mut target = Target::new(b.clone(), [2; 32]);
        let Ok(TargetStep::Send(challenge)) = target.receive(unframe(&hello), |_| None) else {
            panic!("a good hello is challenged");
        };
        let Ok(InitiatorStep::Send(auth)) = first.receive(unframe(&challenge)) else {
            panic!("a good challenge is answered");
        };
        let mut replayed = Target::new(b, [3; 32]);
        assert!(replayed.receive(unframe(&hello), |_| None).is_ok());
        assert_eq!(replayed.receive(unframe(&auth), |_| None), Err(HandshakeError::Proof));
    }

    #[test]
    fn messages_out_of_turn_are_a_protocol_error() {
        let b = identity("b", 2, 20);
        let mut target = Target::new(b, [2; 32]);
        let auth = Message::Auth(Auth { proof: [0; 32], own_proof: [0; 32] }).body();
        assert_eq!(target.receive(&auth, |_| None), Err(HandshakeError::Protocol));
        assert_eq!(target.receive(b"GET / HTTP/1.1", |_| None), Err(HandshakeError::Protocol));
    }
}
