//! Two engines with their secrets, and somebody between them who delivers, alters, repeats and invents messages.

use super::Choices;
use crate::session::handshake::{
    Identity, Initiator, InitiatorStep, Intent, OwnSecret, Target, TargetStep,
};
use crate::wire::Metadata;
use crate::wire::hello::{LinkKind, Message};

/// Where the proof of the target's secret ends in an auth: behind magic and type.
const PROOF_END: usize = 4 + 1 + 32;

fn identity(name: &str, incarnation: u128, secret: u8) -> Identity {
    Identity {
        name: name.into(),
        incarnation,
        secret: [secret; 32],
        transports: 3,
        liveness_ms: 3000,
    }
}

/// One message on its way.
#[derive(Clone)]
struct Letter {
    bytes: Vec<u8>,
    /// It is as one of the two wrote it in this conversation.
    genuine: bool,
}

/// A target is convinced only by a hello and an auth that the initiator wrote in answer to this very conversation, and an
/// initiator only goes on after this very target's challenge.
pub fn handshake(bytes: &[u8]) {
    let mut choices = Choices::new(bytes);
    let (a, b) = (identity("a", 1, 10), identity("b", 2, 20));
    let loaded = Metadata {
        name: b.name.clone(),
        incarnation: b.incarnation,
        secret: b.secret,
        transports: b.transports,
        addresses: Vec::new(),
    };
    let knows_initiator = choices.u8() & 1 == 1;
    let known = knows_initiator.then_some(a.secret);
    let intent = Intent { kind: LinkKind::Session, session: 0, attempt: 1, expects: 0 };
    let (mut initiator, hello) = Initiator::start(a.clone(), &loaded, intent, [1; 32]);
    let mut target = Target::new(b.clone(), [2; 32]);
    // What somebody has recorded of an earlier conversation of the two.
    let mut letters = earlier(&a, &b, &loaded);
    letters.push(Letter { bytes: hello[2..].to_vec(), genuine: true });
    let (mut hello_arrived, mut challenge_arrived) = (false, false);
    for _ in 0..32 {
        if choices.is_empty() {
            break;
        }
        let to_target = choices.u8() & 1 == 0;
        let letter = next_letter(&mut choices, &letters);
        if to_target {
            let is_hello = matches!(Message::decode(&letter.bytes), Some(Message::Hello(_)));
            match target.receive(&letter.bytes, |_| known) {
                Ok(TargetStep::Send(challenge)) => {
                    assert!(is_hello);
                    hello_arrived = letter.genuine;
                    letters.push(Letter { bytes: challenge[2..].to_vec(), genuine: hello_arrived });
                }
                Ok(TargetStep::Proven(proven)) => {
                    assert!(hello_arrived && challenge_arrived);
                    // The second proof says nothing to who does not know the initiator's secret.
                    let checked = if knows_initiator { letter.bytes.len() } else { PROOF_END };
                    let is_genuine = letters.iter().any(|known| {
                        known.genuine
                            && known.bytes.len() == letter.bytes.len()
                            && known.bytes[..checked] == letter.bytes[..checked]
                    });
                    assert!(is_genuine, "a forged proof was believed");
                    assert_eq!(proven.hello.initiator, a.incarnation);
                    assert_eq!(proven.own_secret == OwnSecret::Proven, knows_initiator);
                    return;
                }
                // The link is closed; the next one has another nonce.
                Err(_) => return,
            }
        } else {
            let is_challenge =
                matches!(Message::decode(&letter.bytes), Some(Message::Challenge(_)));
            match initiator.receive(&letter.bytes) {
                Ok(InitiatorStep::Send(auth)) => {
                    assert!(is_challenge && letter.genuine, "a forged challenge was answered");
                    challenge_arrived = true;
                    letters.push(Letter { bytes: auth[2..].to_vec(), genuine: true });
                }
                Ok(InitiatorStep::Up(_)) => {
                    assert!(challenge_arrived, "welcome before the target has proven itself");
                    return;
                }
                Err(_) => return,
            }
        }
    }
}

fn earlier(a: &Identity, b: &Identity, loaded: &Metadata) -> Vec<Letter> {
    let intent = Intent { kind: LinkKind::Session, session: 0, attempt: 1, expects: 0 };
    let (mut initiator, hello) = Initiator::start(a.clone(), loaded, intent, [3; 32]);
    let mut target = Target::new(b.clone(), [4; 32]);
    let mut all = vec![hello];
    if let Ok(TargetStep::Send(challenge)) = target.receive(&all[0][2..], |_| None) {
        all.push(challenge);
        if let Ok(InitiatorStep::Send(auth)) = initiator.receive(&all[1][2..]) {
            all.push(auth);
        }
    }
    assert_eq!(all.len(), 3);
    all.into_iter().map(|bytes| Letter { bytes: bytes[2..].to_vec(), genuine: false }).collect()
}

/// One of the letters, perhaps altered; or an invented one.
fn next_letter(choices: &mut Choices<'_>, letters: &[Letter]) -> Letter {
    match choices.u8() {
        invented @ 0..16 => {
            let len = usize::from(choices.u8());
            let mut bytes = choices.bytes(len).to_vec();
            if invented & 1 == 1 {
                bytes = [&b"CLNE"[..], &bytes].concat();
            }
            let genuine = letters.iter().any(|letter| letter.genuine && letter.bytes == bytes);
            Letter { bytes, genuine }
        }
        pick => {
            let mut letter = letters[usize::from(pick) % letters.len()].clone();
            let change = choices.u8();
            if change != 0 && !letter.bytes.is_empty() {
                let at = usize::from(choices.u16()) % letter.bytes.len();
                letter.bytes[at] ^= change;
                letter.genuine = false;
            }
            letter
        }
    }
}
