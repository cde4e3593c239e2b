use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
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
        Calling { #[pin] future: F },
        // The head is here; a gRPC answer's first frame may have to be waited for.
        Weighing { held: Option<H>, #[pin] patience: Option<Sleep> },
    }
}

impl<F, H> Weighed<F, H> {
    pub(super) fn new(future: F) -> Self {
        Self { state: State::Calling { future } }
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
                StateProj::Calling { future } => {
                    let held = protocol.hold(ready!(future.poll(cx)));
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
