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
            let distance = occupied.rotate_right(now_slot as u32).trailing_zeros() as usize;
            let slot = (now_slot + distance) % SLOTS;
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
