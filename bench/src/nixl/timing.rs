//! The timed loop over prepared transfers, on one thread or on several at the same time.

use std::sync::Barrier;

use anyhow::{Context as _, Result, anyhow};
use hdrhistogram::Histogram;

use super::driver::Transferred;
use super::wire::{Iterations, Outcome};
use crate::clock::now_ns;
use crate::measure::{histogram, points_of};
use crate::pinning::pin_current_thread;

/// Untimed operations at the beginning of a timed pass: what slept during the pause is awake again.
pub(super) const WARM_OPERATIONS: u64 = 16;
/// Timed operations, even when the time is over.
const MIN_OPERATIONS: u64 = 3;

/// How long a pass takes: a time, or a number of operations in its place.
pub(crate) type Length = (u64, Iterations);

/// Whether to go on with a timed or warming loop.
pub(super) struct Until {
    at_ns: u64,
    least: u64,
    most: u64,
}

impl Until {
    /// A part of the warm-up that a quarter of the pass's duration bounds: one operation of a long list may take long.
    pub(super) fn warm(begin_ns: u64, (duration_ns, iterations): Length) -> Self {
        match iterations.warm {
            Some(exactly) => Self { at_ns: 0, least: exactly, most: exactly },
            None => Self { at_ns: begin_ns + duration_ns / 4, least: 1, most: WARM_OPERATIONS },
        }
    }

    pub(super) fn timed(begin_ns: u64, (duration_ns, iterations): Length) -> Self {
        match iterations.timed {
            Some(exactly) => Self { at_ns: 0, least: exactly, most: exactly },
            None => Self { at_ns: begin_ns + duration_ns, least: MIN_OPERATIONS, most: u64::MAX },
        }
    }

    pub(super) fn goes_on(&self, done: u64) -> bool {
        done < self.least || (done < self.most && now_ns() < self.at_ns)
    }
}

/// Times of the transfers of one thread, or of several together.
pub(crate) struct Times {
    completion: Histogram<u64>,
    post: Histogram<u64>,
    operations: u64,
    begin_ns: u64,
    end_ns: u64,
}

impl Times {
    /// Adds those of another thread, which ran at the same time.
    fn merge(&mut self, other: &Self) -> Result<()> {
        self.completion.add(&other.completion).context("adding the latencies of a thread")?;
        self.post.add(&other.post).context("adding the latencies of a thread")?;
        self.operations += other.operations;
        self.begin_ns = self.begin_ns.min(other.begin_ns);
        self.end_ns = self.end_ns.max(other.end_ns);
        Ok(())
    }

    pub(super) fn book(&self, outcome: &mut Outcome) {
        outcome.operations = self.operations;
        outcome.elapsed_ns = self.end_ns - self.begin_ns;
        outcome.completion = points_of(&self.completion);
        outcome.post = points_of(&self.post);
    }
}

/// Transfers one after the other, in turn, untimed.
pub(super) fn warm_up<T>(
    transfers: &[T],
    length: Length,
    transfer: impl Fn(&T) -> Result<Transferred>,
) -> Result<()> {
    let until = Until::warm(now_ns(), length);
    let mut next = transfers.iter().cycle();
    let mut done = 0;
    while until.goes_on(done) {
        transfer(next.next().context("no transfer")?)?;
        done += 1;
    }
    Ok(())
}

/// The same, timed.
pub(super) fn time<T>(
    transfers: &[T],
    length: Length,
    transfer: impl Fn(&T) -> Result<Transferred>,
) -> Result<Times> {
    let begin_ns = now_ns();
    let (completion, post) = (histogram(), histogram());
    let mut times = Times { completion, post, operations: 0, begin_ns, end_ns: begin_ns };
    let until = Until::timed(begin_ns, length);
    let mut next = transfers.iter().cycle();
    while until.goes_on(times.operations) {
        let taken = transfer(next.next().context("no transfer")?)?;
        times.completion.saturating_record(taken.completed_ns);
        if let Some(posted_ns) = taken.posted_ns {
            times.post.saturating_record(posted_ns);
        }
        times.operations += 1;
    }
    times.end_ns = now_ns();
    Ok(times)
}

/// Transfers those whose turn never came while time was taken, untimed.
pub(super) fn transfer_rest<T>(
    transfers: &[T],
    times: &Times,
    transfer: impl Fn(&T) -> Result<Transferred>,
) -> Result<()> {
    let done = usize::try_from(times.operations).unwrap_or(usize::MAX);
    transfers.iter().skip(done).try_for_each(|rest| transfer(rest).map(drop))
}

/// Warms up and times each list on a thread of its own, pinned to the core of the same place. All are warm before
/// `begun` is called, and none begins before it has returned; all are over when `ended` is called, and are still there, since
/// what a thread used of the processors goes with it.
pub(crate) fn time_in_threads<T: Sync>(
    lists: &[Vec<T>],
    cores: &[usize],
    length: Length,
    transfer: impl Fn(&T) -> Result<Transferred> + Sync,
    (begun, ended): (impl FnOnce(), impl FnOnce()),
) -> Result<Times> {
    let barrier = || Barrier::new(lists.len() + 1);
    let (warm, begin, over, leave) = (barrier(), barrier(), barrier(), barrier());
    let work = |list: &[T], core: usize| -> Result<Times> {
        // Whoever fails still has to let the others begin and end.
        let prepared = pin_current_thread(core).and_then(|()| warm_up(list, length, &transfer));
        warm.wait();
        begin.wait();
        let times = prepared.and_then(|()| time(list, length, &transfer));
        over.wait();
        leave.wait();
        // The contents of all places were renewed, those of transfers whose turn never came too.
        let times = times?;
        transfer_rest(list, &times, &transfer)?;
        Ok(times)
    };
    let work = &work;
    let all: Vec<Result<Times>> = std::thread::scope(|scope| {
        let threads: Vec<_> = lists
            .iter()
            .zip(cores)
            .map(|(list, &core)| scope.spawn(move || work(list, core)))
            .collect();
        warm.wait();
        begun();
        begin.wait();
        over.wait();
        ended();
        leave.wait();
        let join = |thread: std::thread::ScopedJoinHandle<'_, Result<Times>>| {
            thread.join().unwrap_or_else(|_| Err(anyhow!("a thread of the initiator panicked")))
        };
        threads.into_iter().map(join).collect()
    });
    let mut times = all.into_iter();
    let mut all = times.next().context("no thread")??;
    for times in times {
        all.merge(&times?)?;
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::thread::ThreadId;

    use anyhow::bail;

    use super::*;
    use crate::pinning::allowed_cores;

    /// So many warming transfers, then so many timed ones, of each thread.
    fn exactly(warm: u64, timed: u64) -> Length {
        (1, Iterations { warm: Some(warm), timed: Some(timed) })
    }

    fn cores(count: usize) -> Vec<usize> {
        allowed_cores().expect("a mask").into_iter().cycle().take(count).collect()
    }

    const TAKEN: Transferred = Transferred { posted_ns: Some(10), completed_ns: 1000 };

    #[test]
    fn every_thread_does_its_own_transfers_and_no_others() {
        let lists: Vec<Vec<usize>> =
            (0..3).map(|thread| vec![2 * thread, 2 * thread + 1]).collect();
        let done: Mutex<Vec<(ThreadId, usize, bool)>> = Mutex::default();
        let begun = std::sync::atomic::AtomicBool::new(false);
        let load = || begun.load(std::sync::atomic::Ordering::SeqCst);
        let transfer = |&transfer: &usize| {
            let of = (std::thread::current().id(), transfer, load());
            done.lock().expect("nobody panics").push(of);
            Ok(TAKEN)
        };
        let begin = || begun.store(true, std::sync::atomic::Ordering::SeqCst);
        let over = std::cell::Cell::new(0);
        let end = || over.set(done.lock().expect("nobody panics").len());
        let times = time_in_threads(&lists, &cores(3), exactly(2, 7), transfer, (begin, end));
        assert_eq!(over.get(), 3 * (2 + 7), "all are over at the end");
        let mut outcome = Outcome::default();
        times.expect("all succeed").book(&mut outcome);
        assert_eq!(outcome.operations, 3 * 7);
        let count = |points: &[(u64, u64)]| points.iter().map(|(_, count)| count).sum::<u64>();
        assert_eq!((count(&outcome.completion), count(&outcome.post)), (21, 21));
        let done = done.into_inner().expect("nobody panics");
        assert_eq!(done.iter().filter(|(.., timed)| !timed).count(), 3 * 2, "before the beginning");
        for thread in 0..3 {
            let own: Vec<_> = done.iter().filter(|(_, it, _)| it / 2 == thread).collect();
            assert_eq!(own.len(), 2 + 7);
            assert!(own.iter().all(|(id, ..)| *id == own[0].0), "one thread for each list");
            // Two in turn: seven timed ones are four and three.
            let second = own.iter().filter(|(_, it, timed)| *timed && it % 2 == 1).count();
            assert_eq!(second, 3);
        }
    }

    /// What threads used must be asked for while they are there.
    #[test]
    fn the_context_switches_of_all_threads_are_counted() {
        use crate::cpu::Usage;
        let own = || Usage::of(std::process::id() as i32);
        let (begin, end) = (std::cell::Cell::default(), std::cell::Cell::default());
        let doze = |(): &()| {
            std::thread::sleep(std::time::Duration::from_micros(100));
            Ok(TAKEN)
        };
        let looks = (|| begin.set(own()), || end.set(own()));
        let lists = [vec![()], vec![()], vec![()]];
        time_in_threads(&lists, &cores(3), exactly(0, 20), doze, looks).expect("all succeed");
        let used = end.get().since(begin.get());
        assert!(used.voluntary_switches >= 3 * 20, "{used:?}");
    }

    #[test]
    fn fewer_transfers_than_there_are_places_leave_none_out() {
        let done: Mutex<Vec<usize>> = Mutex::default();
        let transfer = |&transfer: &usize| {
            done.lock().expect("nobody panics").push(transfer);
            Ok(TAKEN)
        };
        let lists = [vec![0, 1, 2, 3], vec![4, 5]];
        let looks = (|| {}, || {});
        let times = time_in_threads(&lists, &cores(2), exactly(0, 3), transfer, looks);
        assert_eq!(times.expect("all succeed").operations, 6);
        let mut done = done.into_inner().expect("nobody panics");
        done.sort_unstable();
        assert_eq!(done, [0, 1, 2, 3, 4, 4, 5]);
    }

    #[test]
    fn a_thread_that_fails_ends_the_pass_and_keeps_nobody_waiting() {
        for (warm, timed) in [(1, 1), (0, 2)] {
            let transfer = |&transfer: &usize| match transfer {
                1 => bail!("refused"),
                _ => Ok(TAKEN),
            };
            let lists = [vec![0], vec![1], vec![2]];
            let times =
                time_in_threads(&lists, &cores(3), exactly(warm, timed), transfer, (|| {}, || {}));
            assert!(times.is_err_and(|why| why.to_string() == "refused"));
        }
    }

    #[test]
    fn a_number_of_transfers_is_of_all_threads_together() {
        let iterations = Iterations { timed: Some(1000), warm: Some(7) };
        let share = iterations.share(3);
        assert_eq!((share.timed, share.warm), (Some(334), Some(3)));
        assert_eq!(Iterations::default().share(3).timed, None);
    }
}
