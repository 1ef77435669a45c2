//! Broken on purpose, as [`crate::sabotage`] is: an initiator that says that transfers are over without their bytes moving.

use std::cell::Cell;

use anyhow::Result;

use super::driver::{Driver, Transferred};
use super::timing::{Length, Times, time_in_threads};
use crate::arena::Arena;
use crate::case::{Operation, Sabotage};

/// Passes every call on to `inner`, except for transfers that `mode` drops.
pub(crate) struct Sabotaged<D> {
    inner: D,
    mode: Sabotage,
    /// Whether contents were renewed for transfers that are timed.
    timed: Cell<bool>,
}

impl<D> Sabotaged<D> {
    pub(crate) fn new(inner: D, mode: Sabotage) -> Self {
        Self { inner, mode, timed: Cell::new(false) }
    }

    fn drops(&self) -> bool {
        match self.mode {
            Sabotage::Stale => self.timed.get(),
            Sabotage::Noop | Sabotage::Rare => true,
        }
    }
}

const DROPPED: Transferred = Transferred { posted_ns: Some(100), completed_ns: 1000 };

impl<D: Driver> Driver for Sabotaged<D> {
    const PREPARES: bool = D::PREPARES;

    type Prepared = D::Prepared;
    type Request = D::Request;

    fn arena(&self) -> &Arena {
        self.inner.arena()
    }

    fn metadata(&self) -> Result<Vec<u8>> {
        self.inner.metadata()
    }

    fn meet(&mut self, metadata: &[u8], address: u64) -> Result<()> {
        self.inner.meet(metadata, address)
    }

    fn prepare(
        &self,
        operation: Operation,
        places: (&[u64], &[u64]),
        block_bytes: usize,
    ) -> Result<D::Prepared> {
        self.inner.prepare(operation, places, block_bytes)
    }

    fn request(&self, prepared: &D::Prepared) -> Result<D::Request> {
        self.inner.request(prepared)
    }

    fn begin_pass(&self) {
        self.timed.set(false);
    }

    fn timing(&self) {
        self.timed.set(true);
    }

    fn transfer(&self, prepared: &D::Prepared) -> Result<Transferred> {
        if self.drops() { Ok(DROPPED) } else { self.inner.transfer(prepared) }
    }

    fn time_in_threads(
        &self,
        lists: &[Vec<D::Prepared>],
        cores: &[usize],
        length: Length,
        looks: (impl FnOnce(), impl FnOnce()),
    ) -> Result<Times> {
        let lists: Vec<Vec<()>> = lists.iter().map(|list| vec![(); list.len()]).collect();
        time_in_threads(&lists, cores, length, |()| Ok(DROPPED), looks)
    }

    fn post(&self, prepared: &D::Prepared) -> Result<bool> {
        if self.drops() { Ok(true) } else { self.inner.post(prepared) }
    }

    fn is_finished(&self, prepared: &D::Prepared) -> Result<bool> {
        if self.drops() { Ok(true) } else { self.inner.is_finished(prepared) }
    }

    fn notify(&mut self, text: &str) -> Result<()> {
        self.inner.notify(text)
    }

    fn await_answer(&mut self, text: &str) -> Result<()> {
        self.inner.await_answer(text)
    }

    fn answer(&mut self, seen: impl FnMut(&[u8], u64)) -> Result<()> {
        self.inner.answer(seen)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::case::NixlCase;
    use super::super::case::tests::all;
    use super::super::fake::Fake;
    use super::super::initiator::{Meter, pass};
    use super::super::target::{renew_case, verify_case};
    use super::super::trace::{Request, Trace};
    use super::super::wire::{Iterations, Outcome};
    use super::*;
    use crate::measure::LoadShape;

    const SEED: u64 = 42;

    fn case(id: &str) -> NixlCase {
        let case = all().into_iter().find(|case| case.id() == id).expect("one of the cases");
        // Small, so that a test is soon over.
        let load = case.load.map(|_| LoadShape { reads_per_s: 1000, bulk_bytes: 1 << 16 });
        NixlCase { load, ..case }
    }

    fn recording() -> NixlCase {
        let request = |at_ns, blocks| Request { at_ns, blocks };
        let requests = vec![request(0, 3), request(1000, 1)];
        let trace = Trace { name: "r".to_owned(), block_bytes: 4096, requests };
        NixlCase { blocks: 4, trace: Some(trace), ..case("read/64B") }
    }

    /// A pass with both sides, as two processes run it.
    fn run(case: &NixlCase, mode: Option<Sabotage>, length: Length) -> Result<Outcome> {
        let fake = Fake::new(case.arena_bytes().expect("small"));
        let target = fake.target();
        let sequence = 2;
        renew_case(&target, case, sequence, SEED);
        let pid = std::process::id() as i32;
        let meter = Meter { own: pid, target: pid };
        let outcome = match mode {
            None => pass(&mut { fake }, case, sequence, length, SEED, (meter, &[])),
            Some(mode) => {
                let mut broken = Sabotaged::new(fake, mode);
                pass(&mut broken, case, sequence, length, SEED, (meter, &[]))
            }
        }?;
        verify_case(&target, case, sequence, SEED)?;
        Ok(outcome)
    }

    fn ms(ms: u64) -> Length {
        (Duration::from_millis(ms).as_nanos() as u64, Iterations::default())
    }

    #[test]
    fn timed_transfers_that_move_nothing_are_found_whatever_untimed_ones_moved() {
        let ids = [
            "read/64B",
            "write/64B",
            "kv/read/256x16KiB",
            "kv/write/256x16KiB",
            "post/read/4096x4KiB",
            "decode-under-prefill/4KiB@1000+64MiB",
        ];
        let cases: Vec<NixlCase> = ids.iter().map(|id| case(id)).chain([recording()]).collect();
        for case in &cases {
            let id = case.id();
            let outcome = run(case, None, ms(20)).unwrap_or_else(|error| panic!("{id}: {error:#}"));
            assert!(outcome.operations > 0, "{id}");
            for mode in [Sabotage::Stale, Sabotage::Noop] {
                let error = run(case, Some(mode), ms(20)).expect_err(&id).to_string();
                assert!(error.contains("verification failed"), "{id}: {error}");
            }
        }
    }

    /// Those whose turn never comes are transferred at the end: their contents were renewed like all others.
    #[test]
    fn fewer_transfers_than_places_are_verified_too() {
        for id in ["read/64B", "write/64B"] {
            let few = (1_000_000, Iterations { timed: Some(3), warm: Some(0) });
            assert_eq!(run(&case(id), None, few).expect(id).operations, 3);
            let error = run(&case(id), Some(Sabotage::Stale), few).expect_err(id).to_string();
            assert!(error.contains("verification failed"), "{id}: {error}");
        }
    }

    #[test]
    fn an_untimed_pass_is_verified() {
        for id in ["read/64B", "write/64B", "decode-under-prefill/4KiB@1000+64MiB"] {
            run(&case(id), None, ms(0)).expect(id);
            run(&case(id), Some(Sabotage::Stale), ms(0)).expect(id);
            let error = run(&case(id), Some(Sabotage::Noop), ms(0)).expect_err(id).to_string();
            assert!(error.contains("verification failed"), "{id}: {error}");
        }
    }
}
