//! Runs a future that never waits: the bridge between the one measuring loop and an application on a plain thread.

use std::pin::pin;
use std::task::{Context, Poll, Waker};

use anyhow::{Result, bail};

/// Polls `future` once. Initiators on threads poll their backend inside of their futures, so that once is enough.
pub(crate) fn complete_now<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    match pin!(future).as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => {
            bail!("a polling initiator waited for a wake-up; this is a bug of corelane-bench")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_futures_complete_and_waiting_ones_are_an_error() {
        assert_eq!(complete_now(async { Ok(3) }).expect("ready"), 3);
        assert!(complete_now(std::future::pending::<Result<()>>()).is_err());
    }
}
