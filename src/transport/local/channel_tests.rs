use super::*;
use proptest::prelude::*;

fn pair() -> (Producer, Consumer) {
    let (producer, fd) = create().unwrap();
    let consumer = open(&*fd).unwrap();
    (producer, consumer)
}

fn notify(seq: u64, payload: &[u8]) -> Message<&[u8]> {
    Message::Notify { seq, ack: seq / 2, payload }
}

#[test]
fn messages_of_every_length_arrive_whole_and_in_order() {
    let (mut producer, mut consumer) = pair();
    for len in (0..=MAX_RING_PAYLOAD).step_by(7).chain([95, 96, 97, 216, 217, MAX_RING_PAYLOAD]) {
        let payload: Vec<u8> = (0..len).map(|i| (i * 31 + len) as u8).collect();
        assert_eq!(producer.push(&notify(len as u64, &payload)).unwrap(), Pushed::Seen);
        assert_eq!(producer.push(&Message::Ack(9)).unwrap(), Pushed::Seen);
        let expected = Message::Notify { seq: len as u64, ack: len as u64 / 2, payload };
        assert_eq!(consumer.pop().unwrap(), Some(expected));
        assert_eq!(consumer.pop().unwrap(), Some(Message::Ack(9)));
        assert_eq!(consumer.pop().unwrap(), None);
        assert!(producer.is_empty().unwrap());
    }
}

#[test]
fn a_full_ring_takes_nothing_and_loses_nothing() {
    let (mut producer, mut consumer) = pair();
    let mut sent = 0;
    while producer.push(&notify(sent, &[7; 300])).unwrap() != Pushed::Full {
        sent += 1;
    }
    assert_eq!(sent, SLOTS / 3);
    for seq in 0..sent {
        let Some(Message::Notify { seq: found, payload, .. }) = consumer.pop().unwrap() else {
            panic!("missing");
        };
        assert_eq!((found, payload.len()), (seq, 300));
    }
    assert_eq!(producer.push(&notify(sent, &[7; 300])).unwrap(), Pushed::Seen);
}

#[test]
fn a_consumer_that_sleeps_is_to_be_woken() {
    let (mut producer, consumer) = pair();
    consumer.set_asleep(true);
    assert!(!consumer.has_message());
    assert_eq!(producer.push(&Message::Ack(1)).unwrap(), Pushed::Asleep);
    assert!(consumer.has_message());
    consumer.set_asleep(false);
    assert_eq!(producer.push(&Message::Ack(2)).unwrap(), Pushed::Seen);
}

#[test]
fn a_consumer_that_lies_about_its_position_is_found_out() {
    for lie in [u64::MAX, 1 << 40, 2] {
        let (mut producer, consumer) = pair();
        producer.push(&Message::Ack(1)).unwrap();
        consumer.map.words()[HEAD].store(lie, Ordering::Relaxed);
        assert_eq!(producer.is_empty(), Err(Broken));
    }
    let (mut producer, mut consumer) = pair();
    producer.push(&Message::Ack(1)).unwrap();
    consumer.pop().unwrap();
    assert!(producer.is_empty().unwrap());
    producer.push(&Message::Ack(1)).unwrap();
    consumer.map.words()[HEAD].store(0, Ordering::Relaxed);
    assert_eq!(producer.is_empty(), Err(Broken), "it went back");
}

#[test]
fn a_payload_never_looks_like_a_message() {
    let (mut producer, mut consumer) = pair();
    // Words of every position that could come next, in every slot of the payload.
    for lap in 0..3u64 {
        let payload: Vec<u8> = (0..MAX_RING_PAYLOAD as u64 / 8)
            .flat_map(|i| (lap * SLOTS + i).to_le_bytes())
            .collect();
        for seq in 0..SLOTS {
            producer.push(&notify(seq, &payload)).unwrap();
            assert!(
                matches!(consumer.pop().unwrap(), Some(Message::Notify { seq: s, .. }) if s == seq)
            );
            assert_eq!(consumer.pop().unwrap(), None);
        }
    }
}

#[test]
fn copies_are_seen_until_they_end_whoever_begins_others() {
    let (producer, consumer) = pair();
    let (mine, theirs) = (producer.uses(), consumer.uses());
    let first = mine.begin(3).unwrap();
    let mut seen = theirs.in_progress(None);
    assert_eq!(seen.len(), 1);
    let second = mine.begin(3).unwrap();
    theirs.still(&mut seen);
    assert_eq!(seen.len(), 1);
    drop(first);
    let third = mine.begin(3).unwrap();
    theirs.still(&mut seen);
    assert!(seen.is_empty(), "what began later is not waited for");
    drop((second, third));
    let all: Vec<Use<'_>> = (0..USE_COUNT).map(|_| mine.begin(3).unwrap()).collect();
    assert!(mine.begin(3).is_none());
    drop(all);
    assert!(theirs.in_progress(None).is_empty());
}

#[test]
fn copies_are_told_apart_by_their_regions() {
    let (producer, consumer) = pair();
    let (mine, theirs) = (producer.uses(), consumer.uses());
    let count = |region| theirs.in_progress(region).len();
    let regions = [0, 1, 7, (1 << 24) - 1, SEVERAL];
    for round in 0..3 {
        let copies: Vec<_> = regions.iter().map(|region| mine.begin(*region).unwrap()).collect();
        assert_eq!(count(None), regions.len(), "round {round}");
        for region in &regions[..4] {
            assert_eq!(count(Some(*region)), 2, "its own, and the one of several: {region}");
        }
        assert_eq!(count(Some(2)), 1, "the one of several");
        let mut seen = theirs.in_progress(Some(7));
        drop(copies);
        let again: Vec<_> = regions.iter().map(|region| mine.begin(*region).unwrap()).collect();
        theirs.still(&mut seen);
        assert!(seen.is_empty(), "others began");
        drop(again);
        assert_eq!(count(None), 0);
    }
}

#[test]
fn a_channel_that_its_consumer_has_closed_says_so_to_who_begins() {
    let (producer, consumer) = pair();
    let (mine, theirs) = (producer.uses(), consumer.uses());
    let before = mine.begin(3).unwrap();
    assert!(!mine.is_closed());
    theirs.close();
    assert_eq!(theirs.in_progress(None).len(), 1, "what had begun goes on");
    drop(before);
    let after = mine.begin(3);
    assert!(after.is_some() && mine.is_closed());
}

#[test]
fn threads_hand_over_many_words_by_the_ring() {
    const COUNT: u64 = 100_000;
    let (mut producer, mut consumer) = pair();
    let thread = std::thread::spawn(move || {
        for seq in 0..COUNT {
            let payload = seq.to_le_bytes().repeat(1 + (seq % 40) as usize);
            while producer.push(&notify(seq, &payload)).unwrap() == Pushed::Full {
                std::thread::yield_now();
            }
        }
    });
    let mut next = 0;
    while next < COUNT {
        match consumer.pop().unwrap() {
            Some(Message::Notify { seq, payload, .. }) => {
                assert_eq!(seq, next);
                assert_eq!(payload, seq.to_le_bytes().repeat(1 + (seq % 40) as usize));
                next += 1;
            }
            Some(Message::Ack(_)) => panic!("none was sent"),
            None => std::thread::yield_now(),
        }
    }
    thread.join().unwrap();
}

proptest! {
    /// Whatever lies in the shared memory, the consumer gives a message, nothing, or an error.
    #[test]
    fn any_memory_is_read_without_a_panic(
        words in proptest::collection::vec((0usize..LEN / 8, prop_oneof![any::<u64>(), 0u64..600]), 0..200),
        shape in any::<u64>(),
    ) {
        let (_producer, mut consumer) = pair();
        for (index, word) in words {
            consumer.map.words()[index].store(word, Ordering::Relaxed);
        }
        consumer.map.words()[RING / 8].store(1, Ordering::Relaxed);
        consumer.map.words()[RING / 8 + 1].store(shape, Ordering::Relaxed);
        for _ in 0..2000 {
            match consumer.pop() {
                Ok(Some(Message::Notify { payload, .. })) => prop_assert!(payload.len() <= MAX_RING_PAYLOAD),
                Ok(Some(Message::Ack(_))) => {}
                Ok(None) | Err(Broken) => break,
            }
        }
    }
}
