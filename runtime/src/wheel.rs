//! A hierarchical timer wheel: setting, cancelling and firing a timer are O(1).
//!
//! Six levels of 64 slots. A timer sits on the level of the highest six-bit digit in which its tick differs from the
//! current one; when time enters its slot it moves down or is due. A bitmap per level finds the next slot.

use slab::Slab;

const LEVELS: usize = 6;
const SLOT_BITS: u32 = 6;
const SLOTS: usize = 1 << SLOT_BITS;
/// Ticks that the wheel spans; later timers wait in its last slots and are placed again from there.
const SPAN: u64 = 1 << (SLOT_BITS * LEVELS as u32);
const NIL: u32 = u32::MAX;
/// Index of the list of timers that are due, behind the lists of the slots.
const DUE: usize = LEVELS * SLOTS;

/// Names a timer of [`Cx::set_timer`](crate::Cx::set_timer). It stays harmless after the timer has fired or was cancelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TimerId {
    index: u32,
    generation: u32,
}

struct Node<T> {
    when: u64,
    payload: T,
    generation: u32,
    list: u16,
    previous: u32,
    next: u32,
}

pub(crate) struct Wheel<T> {
    /// All up to and including this tick has been moved to the due list.
    elapsed: u64,
    nodes: Slab<Node<T>>,
    heads: Box<[u32; DUE + 1]>,
    /// Last of the due list, so that timers fire in the order in which they came due.
    due_tail: u32,
    due_count: usize,
    occupied: [u64; LEVELS],
    next_generation: u32,
}

impl<T: Copy> Wheel<T> {
    pub(crate) fn with_capacity(capacity: usize) -> Self {
        Self {
            elapsed: 0,
            nodes: Slab::with_capacity(capacity),
            heads: Box::new([NIL; DUE + 1]),
            due_tail: NIL,
            due_count: 0,
            occupied: [0; LEVELS],
            next_generation: 0,
        }
    }

    /// A timer for tick `when`; one that lies in the past is due at once.
    pub(crate) fn insert(&mut self, when: u64, payload: T) -> TimerId {
        self.next_generation = self.next_generation.wrapping_add(1);
        let generation = self.next_generation;
        let index = self.nodes.insert(Node {
            when,
            payload,
            generation,
            list: 0,
            previous: NIL,
            next: NIL,
        }) as u32;
        self.place(index);
        TimerId { index, generation }
    }

    /// Takes a timer out. None if it has fired or was cancelled before.
    pub(crate) fn cancel(&mut self, id: TimerId) -> Option<T> {
        let node = self.nodes.get(id.index as usize)?;
        if node.generation != id.generation {
            return None;
        }
        self.unlink(id.index);
        Some(self.nodes.remove(id.index as usize).payload)
    }

    /// Moves all timers up to tick `now` to the due list. Returns the length of that list.
    pub(crate) fn advance(&mut self, now: u64) -> usize {
        while let Some((level, slot, start)) = self.next_slot() {
            if start > now {
                break;
            }
            self.elapsed = self.elapsed.max(start);
            let mut index = std::mem::replace(&mut self.heads[level * SLOTS + slot], NIL);
            self.occupied[level] &= !(1 << slot);
            while index != NIL {
                let next = self.nodes[index as usize].next;
                self.place(index);
                index = next;
            }
        }
        self.elapsed = self.elapsed.max(now);
        self.due_count
    }

    /// The oldest timer that is due.
    pub(crate) fn pop_due(&mut self) -> Option<T> {
        let index = self.heads[DUE];
        if index == NIL {
            return None;
        }
        self.unlink(index);
        Some(self.nodes.remove(index as usize).payload)
    }

    /// A tick before which no timer comes due: exact within the next 64 ticks, rounded down beyond.
    pub(crate) fn next_tick(&self) -> Option<u64> {
        if self.due_count > 0 {
            return Some(self.elapsed);
        }
        self.next_slot().map(|(_, _, start)| start)
    }

    /// True while nothing can be due at tick `now`. The cheap test of every turn.
    #[inline]
    pub(crate) fn is_current(&self, now: u64) -> bool {
        now <= self.elapsed && self.due_count == 0
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// The first occupied slot in time, with the tick at which it starts.
    fn next_slot(&self) -> Option<(usize, usize, u64)> {
        for level in 0..LEVELS {
            let occupied = self.occupied[level];
            if occupied == 0 {
                continue;
            }
            let shift = SLOT_BITS * level as u32;
            let now_slot = ((self.elapsed >> shift) as usize) % SLOTS;
            // The current slot itself comes last: a timer in it (top level only) is nearly a whole turn away.
            let after =
                occupied.rotate_right((now_slot + 1) as u32 % SLOTS as u32).trailing_zeros();
            let slot = (now_slot + 1 + after as usize) % SLOTS;
            let range = 1u64 << (shift + SLOT_BITS);
            let mut start = (self.elapsed & !(range - 1)) + ((slot as u64) << shift);
            if start <= self.elapsed {
                // Only the top level wraps: lower levels hold slots after the current one only.
                start += range;
            }
            return Some((level, slot, start));
        }
        None
    }

    fn place(&mut self, index: u32) {
        let when = self.nodes[index as usize].when;
        let list = if when <= self.elapsed {
            DUE
        } else {
            let when = when.min(self.elapsed + (SPAN - 1));
            let differing = ((self.elapsed ^ when) | (SLOTS as u64 - 1)).min(SPAN - 1);
            let level = ((63 - differing.leading_zeros()) / SLOT_BITS) as usize;
            let slot = ((when >> (SLOT_BITS * level as u32)) as usize) % SLOTS;
            self.occupied[level] |= 1 << slot;
            level * SLOTS + slot
        };
        let (previous, next) = if list == DUE {
            self.due_count += 1;
            (std::mem::replace(&mut self.due_tail, index), NIL)
        } else {
            (NIL, self.heads[list])
        };
        if previous == NIL {
            self.heads[list] = index;
        } else {
            self.nodes[previous as usize].next = index;
        }
        if next != NIL {
            self.nodes[next as usize].previous = index;
        }
        let node = &mut self.nodes[index as usize];
        (node.list, node.previous, node.next) = (list as u16, previous, next);
    }

    fn unlink(&mut self, index: u32) {
        let node = &self.nodes[index as usize];
        let (list, previous, next) = (node.list as usize, node.previous, node.next);
        if previous == NIL {
            self.heads[list] = next;
        } else {
            self.nodes[previous as usize].next = next;
        }
        if next != NIL {
            self.nodes[next as usize].previous = previous;
        }
        if list == DUE {
            self.due_count -= 1;
            if next == NIL {
                self.due_tail = previous;
            }
        } else if self.heads[list] == NIL {
            self.occupied[list / SLOTS] &= !(1 << (list % SLOTS));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_cancelled_or_fired_timer_is_harmless() {
        let mut wheel = Wheel::with_capacity(4);
        let first = wheel.insert(5, 'a');
        assert_eq!(wheel.cancel(first), Some('a'));
        assert_eq!(wheel.cancel(first), None);
        let second = wheel.insert(7, 'b');
        assert_eq!(wheel.cancel(first), None, "the slot was used again");
        assert_eq!(wheel.advance(7), 1);
        assert_eq!(wheel.pop_due(), Some('b'));
        assert_eq!(wheel.cancel(second), None);
        assert_eq!(wheel.len(), 0);
    }

    #[test]
    fn a_timer_that_is_due_can_still_be_cancelled() {
        let mut wheel = Wheel::with_capacity(4);
        let ids = [1, 2, 3].map(|payload| wheel.insert(1, payload));
        assert_eq!(wheel.advance(1), 3);
        assert_eq!(wheel.cancel(ids[2]), Some(3));
        assert_eq!(wheel.insert(0, 4).index, ids[2].index);
        let fired: Vec<_> = std::iter::from_fn(|| wheel.pop_due()).collect();
        assert_eq!((fired.len(), fired[2]), (3, 4));
        assert!(wheel.is_current(1));
    }

    #[test]
    fn timers_beyond_the_span_fire_on_their_tick() {
        let mut wheel = Wheel::with_capacity(4);
        let when = 3 * SPAN + 12_345;
        wheel.insert(when, ());
        let mut steps = 0;
        while wheel.pop_due().is_none() {
            let next = wheel.next_tick().unwrap();
            assert!(next <= when);
            wheel.advance(next);
            steps += 1;
        }
        assert_eq!(wheel.elapsed, when);
        assert!(steps < 20, "{steps} wake-ups for one timer");
    }

    #[test]
    fn a_timer_nearly_a_turn_of_the_top_level_away_hides_no_nearer_one() {
        let mut wheel = Wheel::with_capacity(4);
        wheel.insert(1 << 30, 'n');
        wheel.advance(1);
        wheel.insert(SPAN, 'f');
        assert_eq!(wheel.next_tick(), Some(1 << 30));
        wheel.advance(1 << 30);
        assert_eq!((wheel.pop_due(), wheel.pop_due()), (Some('n'), None));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Insert(u64),
        Cancel(usize),
        Advance(u64),
    }

    fn ticks() -> impl Strategy<Value = u64> {
        prop_oneof![0..70u64, 0..5_000u64, 0..300_000u64, 0..(1u64 << 37)]
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => ticks().prop_map(Step::Insert),
            2 => any::<usize>().prop_map(Step::Cancel),
            3 => ticks().prop_map(Step::Advance),
        ]
    }

    proptest! {
        /// Against a model: never early, never late by a tick, each once, and never slept past.
        #[test]
        fn behaves_like_a_sorted_map(steps in proptest::collection::vec(step(), 1..200)) {
            let mut wheel = Wheel::with_capacity(4);
            let mut model: BTreeMap<(u64, usize), TimerId> = BTreeMap::new();
            let mut all = Vec::new();
            let mut now = 0;
            for (number, step) in steps.into_iter().enumerate() {
                match step {
                    Step::Insert(delay) => {
                        let when = now + delay;
                        let id = wheel.insert(when, number);
                        model.insert((when, number), id);
                        all.push(((when, number), id));
                    }
                    Step::Cancel(which) if !all.is_empty() => {
                        let (key, id) = all[which % all.len()];
                        let expected = model.remove(&key).map(|_| key.1);
                        prop_assert_eq!(wheel.cancel(id), expected);
                    }
                    Step::Cancel(_) => {}
                    Step::Advance(by) => {
                        now += by;
                        wheel.advance(now);
                        let mut fired: Vec<usize> = std::iter::from_fn(|| wheel.pop_due()).collect();
                        fired.sort_unstable();
                        let later = model.split_off(&(now + 1, 0));
                        let mut expected: Vec<usize> = model.keys().map(|key| key.1).collect();
                        expected.sort_unstable();
                        model = later;
                        prop_assert_eq!(fired, expected);
                    }
                }
                prop_assert_eq!(wheel.len(), model.len());
                let next = wheel.next_tick();
                match model.keys().next() {
                    None => prop_assert_eq!(next, None),
                    Some((when, _)) => prop_assert!(next.is_some_and(|next| next <= (*when).max(now))),
                }
            }
        }
    }
}
