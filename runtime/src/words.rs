//! Words in memory that processes share, which the ring watches.

use std::{
    fmt, io,
    sync::{Arc, atomic::AtomicU32},
};

use slab::Slab;

use crate::ring::WordOp;

/// In the user data of a watch: it is one of a word, and not of a descriptor.
const WORD: u64 = 1 << 31;

/// A futex word in memory that several processes map. Whoever holds the value keeps the word where it is.
pub trait SharedWord: Send + Sync {
    /// The word, always at the same address.
    fn word(&self) -> &AtomicU32;
}

/// Names a watch of [`Cx::watch_word`](crate::Cx::watch_word). It stays harmless after the watch has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WordId {
    index: u32,
    generation: u32,
}

struct Entry {
    word: Arc<dyn SharedWord>,
    expected: u32,
    token: u64,
    generation: u32,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    New,
    /// The ring has it.
    Armed,
    /// Nobody wants it any more. The kernel may look at the word until the ring has completed the watch, so the word is kept.
    Unwanted,
}

enum Pending {
    Arm(WordId),
    Cancel(WordId),
}

/// How a watch that is wanted ends.
#[derive(Debug)]
pub(crate) enum WordEnd {
    /// Woken, or the word holds something else.
    Fired,
    /// The kernel does not watch it.
    Lost(io::Error),
}

/// The watches of a lane. Each ends when it fires.
pub(crate) struct WordTable {
    entries: Slab<Entry>,
    pending: Vec<Pending>,
    ended: Vec<(u64, WordEnd)>,
    next_generation: u32,
    supported: bool,
}

impl fmt::Debug for WordTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WordTable").field("watches", &self.entries.len()).finish_non_exhaustive()
    }
}

impl WordTable {
    /// `supported`: the ring can wait for words.
    pub(crate) fn new(supported: bool) -> Self {
        Self {
            entries: Slab::new(),
            pending: Vec::new(),
            ended: Vec::new(),
            next_generation: 0,
            supported,
        }
    }

    pub(crate) fn watch(
        &mut self,
        word: Arc<dyn SharedWord>,
        expected: u32,
        token: u64,
    ) -> Option<WordId> {
        if !self.supported {
            return None;
        }
        self.next_generation = (self.next_generation + 1) & 0x7fff_ffff;
        let generation = self.next_generation;
        let entry = Entry { word, expected, token, generation, state: State::New };
        let index = self.entries.insert(entry) as u32;
        let id = WordId { index, generation };
        self.pending.push(Pending::Arm(id));
        Some(id)
    }

    pub(crate) fn remove(&mut self, id: WordId) -> bool {
        match self.get(id).map(|entry| entry.state) {
            None | Some(State::Unwanted) => return false,
            Some(State::New) => {
                self.entries.remove(id.index as usize);
            }
            Some(State::Armed) => {
                self.entries[id.index as usize].state = State::Unwanted;
                self.pending.push(Pending::Cancel(id));
            }
        }
        true
    }

    #[inline]
    pub(crate) fn has_ring_work(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Lane's thread: the next piece of ring work. A watch that is handed out counts as armed.
    pub(crate) fn next_ring_op(&mut self) -> Option<WordOp> {
        loop {
            match self.pending.pop()? {
                Pending::Cancel(id) => {
                    // Where it has fired meanwhile there is nothing to cancel.
                    if self.get(id).is_some() {
                        return Some(WordOp::Cancel { user_data: user_data(id) });
                    }
                }
                Pending::Arm(id) => {
                    if self.get(id).is_some() {
                        let entry = &mut self.entries[id.index as usize];
                        entry.state = State::Armed;
                        return Some(WordOp::Wait {
                            word: entry.word.clone(),
                            expected: entry.expected,
                            user_data: user_data(id),
                        });
                    }
                }
            }
        }
    }

    /// Whether a completion is one of a word.
    #[inline]
    pub(crate) fn is_word(user_data: u64) -> bool {
        user_data & WORD != 0
    }

    /// The ring completed a watch, which ends. True: its driver is to be told.
    pub(crate) fn completed(&mut self, user_data: u64, result: i32) -> bool {
        let id = WordId { index: (user_data & !WORD) as u32, generation: (user_data >> 32) as u32 };
        if self.get(id).is_none() {
            return false;
        }
        let entry = self.entries.remove(id.index as usize);
        if entry.state == State::Unwanted {
            return false;
        }
        let end = if result >= 0 || result == -libc::EAGAIN {
            WordEnd::Fired
        } else {
            WordEnd::Lost(io::Error::from_raw_os_error(-result))
        };
        self.ended.push((entry.token, end));
        true
    }

    #[inline]
    pub(crate) fn has_ended(&self) -> bool {
        !self.ended.is_empty()
    }

    pub(crate) fn pop_ended(&mut self) -> Option<(u64, WordEnd)> {
        self.ended.pop()
    }

    fn get(&self, id: WordId) -> Option<&Entry> {
        self.entries.get(id.index as usize).filter(|entry| entry.generation == id.generation)
    }
}

fn user_data(id: WordId) -> u64 {
    u64::from(id.index) | WORD | u64::from(id.generation) << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Word(AtomicU32);

    impl SharedWord for Word {
        fn word(&self) -> &AtomicU32 {
            &self.0
        }
    }

    fn word() -> Arc<Word> {
        Arc::new(Word(AtomicU32::new(7)))
    }

    fn armed(table: &mut WordTable) -> u64 {
        match table.next_ring_op() {
            Some(WordOp::Wait { expected: 7, user_data, .. }) => user_data,
            other => panic!("{other:?}"),
        }
    }

    fn ended(table: &mut WordTable) -> Option<(u64, Option<i32>)> {
        table.pop_ended().map(|(token, end)| match end {
            WordEnd::Fired => (token, None),
            WordEnd::Lost(error) => (token, error.raw_os_error()),
        })
    }

    #[test]
    fn a_watch_fires_once_and_keeps_its_word_until_then() {
        let (mut table, word) = (WordTable::new(true), word());
        table.watch(word.clone(), 7, 42).unwrap();
        let user_data = armed(&mut table);
        assert!(WordTable::is_word(user_data) && !table.has_ring_work());
        assert_eq!(Arc::strong_count(&word), 2);
        assert!(table.completed(user_data, 0) && !table.completed(user_data, 0));
        assert_eq!((ended(&mut table), ended(&mut table)), (Some((42, None)), None));
        assert_eq!(Arc::strong_count(&word), 1);
    }

    #[test]
    fn a_watch_that_is_taken_back_never_fires_and_keeps_its_word_until_the_ring_has_let_go() {
        let (mut table, word) = (WordTable::new(true), word());
        let early = table.watch(word.clone(), 7, 1).unwrap();
        assert!(table.remove(early) && !table.remove(early));
        assert!(table.next_ring_op().is_none(), "it was never armed");
        assert_eq!(Arc::strong_count(&word), 1);
        let late = table.watch(word.clone(), 7, 2).unwrap();
        let armed = armed(&mut table);
        assert!(table.remove(late) && !table.remove(late));
        let op = table.next_ring_op();
        assert!(matches!(op, Some(WordOp::Cancel { user_data }) if user_data == armed));
        drop(op);
        assert!(table.next_ring_op().is_none());
        assert_eq!(Arc::strong_count(&word), 2, "the ring may still look at it");
        assert!(!table.completed(armed, -libc::ECANCELED) && !table.has_ended());
        assert_eq!(Arc::strong_count(&word), 1);
    }

    #[test]
    fn a_watch_that_fires_while_it_is_taken_back_is_over_and_is_not_cancelled() {
        let (mut table, word) = (WordTable::new(true), word());
        let watch = table.watch(word.clone(), 7, 1).unwrap();
        let armed = armed(&mut table);
        assert!(table.remove(watch) && table.has_ring_work());
        assert!(!table.completed(armed, 0) && !table.has_ended());
        assert_eq!(Arc::strong_count(&word), 1);
        assert!(table.next_ring_op().is_none(), "what takes its place is not cancelled");
    }

    #[test]
    fn a_watch_that_failed_is_over_and_its_driver_is_told() {
        let (mut table, word) = (WordTable::new(true), word());
        table.watch(word.clone(), 7, 1).unwrap();
        let user_data = armed(&mut table);
        assert!(table.completed(user_data, -libc::ENOMEM));
        assert_eq!(ended(&mut table), Some((1, Some(libc::ENOMEM))));
        assert_eq!(Arc::strong_count(&word), 1);
        table.watch(word.clone(), 7, 2).unwrap();
        let user_data = armed(&mut table);
        assert!(table.completed(user_data, -libc::EAGAIN), "it holds another value");
        assert_eq!(ended(&mut table), Some((2, None)));
        assert!(WordTable::new(false).watch(word, 7, 1).is_none());
    }
}
