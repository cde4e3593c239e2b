use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use pin_project_lite::pin_project;
use tokio::time::{Sleep, sleep};

use super::{exchange::Weigh, policy::Class};
use crate::call::Outcome;

pin_project! {
    /// One attempt, up to where it is known what its answer is worth.
    pub(super) struct Weighed<F, H> {
        #[pin]
        state: State<F, H>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<F, H> {
        // No timer before the first wait.
        Calling { #[pin] future: F, limit: Option<Duration>, #[pin] timer: Option<Sleep> },
        // The head is here; a gRPC answer's first frame may have to be waited for.
        Weighing { held: Option<H>, #[pin] patience: Option<Sleep> },
    }
}

impl<F, H> Weighed<F, H> {
    /// An attempt whose head may take so long.
    pub(super) fn new(future: F, limit: Option<Duration>) -> Self {
        Self { state: State::Calling { future, limit, timer: None } }
    }

    /// What the answer is.
    pub(super) fn poll<M, Res, E>(
        self: Pin<&mut Self>,
        protocol: &M,
        cx: &mut Context<'_>,
    ) -> Poll<(Class, Outcome)>
    where
        F: Future<Output = Result<Res, E>>,
        M: Weigh<Res, E, Held = H>,
    {
        let mut state = self.project().state;
        loop {
            match state.as_mut().project() {
                StateProj::Calling { future, limit, mut timer } => {
                    // The answer before the timer: one that is here is not too late.
                    let held = match future.poll(cx) {
                        Poll::Ready(result) => protocol.hold(result),
                        Poll::Pending => {
                            if timer.is_none() {
                                timer.set(limit.map(sleep));
                            }
                            let Some(over) = timer.as_pin_mut() else { return Poll::Pending };
                            ready!(over.poll(cx));
                            let late = M::timed_out("no response head in the attempt's time");
                            // No such error in these types: then no limit either.
                            *limit = None;
                            let Some(late) = late else { return Poll::Pending };
                            late
                        }
                    };
                    state.set(State::Weighing { held: Some(held), patience: None });
                }
                StateProj::Weighing { held, mut patience } => {
                    let Some(held) = held else { unreachable!("polled after completion") };
                    if let Poll::Ready(weight) = M::poll_weigh(held, cx) {
                        return Poll::Ready(weight);
                    }
                    if patience.is_none() {
                        patience.set(Some(sleep(M::PATIENCE)));
                    }
                    ready!(patience.as_pin_mut().map_or(Poll::Ready(()), |over| over.poll(cx)));
                    // A stream that has begun slowly: the caller's.
                    return Poll::Ready((Class::Final, Outcome::success()));
                }
            }
        }
    }

    /// The answer. Only asked when it has been weighed, and once.
    pub(super) fn take(self: Pin<&mut Self>) -> H {
        match self.project().state.project() {
            StateProj::Weighing { held, .. } => held.take(),
            StateProj::Calling { .. } => None,
        }
        .unwrap_or_else(|| unreachable!("taken once, when it is here"))
    }
}
