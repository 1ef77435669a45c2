use super::*;
use std::collections::VecDeque;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

/// A system that takes `service_ns` per operation, one after the other, and stalls once.
struct Model {
    service_ns: u64,
    stall_at: Option<(u64, u64)>,
    posted: u64,
    busy_until: u64,
    queue: VecDeque<(usize, u64)>,
    most_in_flight: usize,
    answers: VecDeque<u64>,
}

impl Model {
    fn new(service_ns: u64) -> Self {
        Self {
            service_ns,
            stall_at: None,
            posted: 0,
            busy_until: 0,
            queue: VecDeque::new(),
            most_in_flight: 0,
            answers: VecDeque::new(),
        }
    }
}

impl Initiator for Model {
    fn post(&mut self, slot: usize) -> Result<()> {
        let stall = self.stall_at.filter(|&(at, _)| at == self.posted).map_or(0, |(_, ns)| ns);
        self.busy_until = self.busy_until.max(now_ns()) + self.service_ns + stall;
        self.posted += 1;
        self.queue.push_back((slot, self.busy_until));
        self.most_in_flight = self.most_in_flight.max(self.queue.len());
        Ok(())
    }

    fn post_with_notification(&mut self, slot: usize, payload: &[u8]) -> Result<()> {
        self.post(slot)?;
        self.notify(payload)
    }

    fn poll_finished(&mut self) -> Result<Option<usize>> {
        Ok(self.queue.pop_front_if(|(_, ready)| *ready <= now_ns()).map(|(slot, _)| slot))
    }

    async fn finished(&mut self) -> Result<usize> {
        loop {
            if let Some(slot) = self.poll_finished()? {
                return Ok(slot);
            }
        }
    }

    fn notify(&mut self, payload: &[u8]) -> Result<()> {
        let stamp = Stamp::decode(payload).expect("the loop sends stamps");
        self.answers.push_back(stamp.sequence);
        Ok(())
    }

    async fn answer(&mut self) -> Result<u64> {
        self.answers.pop_front().ok_or_else(|| anyhow::anyhow!("no answer"))
    }

    async fn idle_until(&mut self, at_ns: u64) {
        while now_ns() < at_ns {}
    }

    async fn relax(&mut self) {}
}

fn pass(window: usize, operations: u64, rate: Option<f64>) -> Pass {
    Pass {
        operation: Operation::Read,
        slots: window.max(4),
        window,
        operations,
        until_ns: None,
        rate,
        sequence: 1,
        notification_bytes: 32,
        last_words: Vec::new(),
        first_notification: 0,
        phase: None,
    }
}

fn run(model: &mut Model, pass: &Pass, recorder: &mut Recorder) -> Result<PassOutcome> {
    let mut future = pin!(run_pass(model, pass, recorder));
    match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(outcome) => outcome,
        Poll::Pending => panic!("a polling initiator never waits"),
    }
}

#[test]
fn a_closed_loop_does_exactly_what_was_asked() {
    let mut recorder = Recorder::new(false);
    let outcome = run(&mut Model::new(2_000), &pass(1, 100, None), &mut recorder).expect("runs");
    assert_eq!((outcome.operations, outcome.unserved), (100, 0));
    assert_eq!(recorder.response().len(), 100);
    assert!(recorder.response().min() >= 1_990, "three digits of precision");
    assert!(outcome.span_ns >= 200_000);
}

#[test]
fn the_window_is_filled_and_never_exceeded() {
    let mut model = Model::new(5_000);
    let mut recorder = Recorder::new(false);
    let outcome = run(&mut model, &pass(8, 400, None), &mut recorder).expect("runs");
    assert_eq!((outcome.operations, model.most_in_flight), (400, 8));
}

#[test]
fn an_end_time_ends_a_pass() {
    let mut until = pass(1, u64::MAX, None);
    until.until_ns = Some(now_ns() + 3_000_000);
    let outcome = run(&mut Model::new(10_000), &until, &mut Recorder::new(false)).expect("runs");
    assert!(outcome.operations > 0 && outcome.span_ns < 1_000_000_000);
}

#[test]
fn an_open_loop_shows_a_stall_in_the_operations_behind_it() {
    // 2000 operations per second; the 10th (after warm-up) stalls for 30 ms, that is for 60 intervals.
    let mut model = Model::new(1_000);
    model.stall_at = Some((WARM_OPERATIONS as u64 + 10, 30_000_000));
    let mut recorder = Recorder::new(true);
    let outcome = run(&mut model, &pass(1, 120, Some(2_000.0)), &mut recorder).expect("runs");
    assert_eq!((outcome.operations, outcome.unserved), (120, 0));
    let slow = |histogram: &hdrhistogram::Histogram<u64>| {
        histogram.len() - histogram.count_between(0, 2_000_000)
    };
    let service = recorder.service().expect("kept in an open loop");
    // Other programs of the test machine may add a few; the stall itself accounts for fifty and more.
    assert!(slow(recorder.response()) >= 50, "{} waited", slow(recorder.response()));
    assert!(slow(service) < 20, "{} served slowly", slow(service));
}

#[test]
fn an_overloaded_open_loop_is_cut_off_and_accounts_for_the_rest() {
    // 20,000 per second asked, 1,000 per second served: at most 270 in the 20 ms planned and the overrun.
    let mut recorder = Recorder::new(true);
    let outcome = run(&mut Model::new(1_000_000), &pass(2, 400, Some(20_000.0)), &mut recorder);
    let outcome = outcome.expect("runs");
    assert!(outcome.unserved >= 128, "{outcome:?}");
    assert_eq!(outcome.operations + outcome.unserved, 400);
    assert_eq!(recorder.response().len(), 400);
    assert!(recorder.response().value_at_quantile(0.5) > 20_000_000);
}

#[test]
fn answers_are_checked_for_order() {
    let mut notify = pass(1, 10, None);
    notify.operation = Operation::Notify;
    let mut recorder = Recorder::new(false);
    let outcome = run(&mut Model::new(0), &notify, &mut recorder).expect("in order");
    assert_eq!(outcome.notifications, 10 + WARM_OPERATIONS as u64);
    let mut repeated = Model::new(0);
    repeated.answers.push_back(99);
    let failure = run(&mut repeated, &notify, &mut recorder).expect_err("repeated").to_string();
    assert!(failure.contains("notification 0 was answered as 99"), "{failure}");
}
