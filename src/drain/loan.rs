//! A request body that a layer lends to the services below it, and drains if one of them rejects the request.
//!
//! A [`RespondLayer`](crate::respond::RespondLayer) converts the error of an inner layer into a response. At that time
//! the inner layer has dropped the request. The lent body therefore moves the original into a [`Loan`] when it is
//! dropped before its end. The layer drains the original if the call was rejected, and drops it otherwise.
//!
//! # States
//!
//! The lender (the layer) and the holder (the inner service) share one state. The holder may drop the body before or
//! after the lender learns of the rejection, so either of them may start the drain:
//!
//! | state | the holder drops the body | the lender drains |
//! |---|---|---|
//! | lent | returned, or ended if there is nothing to drain | rejected: the holder starts the drain later |
//! | returned | – | starts the drain |
//! | ended | – | does nothing |
//! | rejected | starts the drain | does nothing: the drain has been started once |
//!
//! The lock of the state is never held while a body is polled or dropped, because a body is user code.

use std::{any::Any, fmt, sync::Arc};

use http::Request;

/// The lender's reference to a lent body. Dropping it drops a body that has been returned. A body that its holder still
/// has is dropped when the holder returns it.
#[derive(Clone)]
pub(crate) struct Loan(Arc<dyn Reclaim>);

impl Loan {
    /// Lends the body of a request that a server received: axum's (feature `axum`) or tonic's (feature `tonic`).
    /// Returns `None` for all others, and if the body has ended or must not be drained.
    pub(crate) fn of<B: 'static>(request: &mut Request<B>) -> Option<Self> {
        let request: &mut dyn Any = request;
        #[cfg(feature = "axum")]
        if let Some(request) = request.downcast_mut() {
            return boxed::lend(request, axum::body::Body::new);
        }
        #[cfg(feature = "tonic")]
        if let Some(request) = request.downcast_mut() {
            return boxed::lend(request, tonic::body::Body::new);
        }
        let _ = request;
        None
    }

    /// Drains the body, now or when its holder drops it. Returns `false` if there is nothing to drain.
    pub(crate) fn drain(&self) -> bool {
        self.0.drain()
    }
}

impl fmt::Debug for Loan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Loan")
    }
}

/// The shared state of a loan, without the type of the body.
trait Reclaim: Send + Sync {
    /// See [`Loan::drain`].
    fn drain(&self) -> bool;
}

#[cfg(any(feature = "axum", feature = "tonic"))]
mod boxed {
    use std::{
        mem,
        pin::Pin,
        sync::Arc,
        task::{Context, Poll},
    };

    use http::Request;
    use http_body::{Body, Frame, SizeHint};

    use super::super::{Drains, drain};
    use super::{Loan, Reclaim};
    use crate::sync::Mutex;

    /// A body that can be lent: boxed, and with an empty default that replaces it.
    pub(super) trait Lendable:
        Body<Data: Send, Error: Send> + Default + Send + Unpin + 'static
    {
    }

    impl<B: Body<Data: Send, Error: Send> + Default + Send + Unpin + 'static> Lendable for B {}

    /// Replaces the body of the request by a lent body. Returns `None` if the body has ended or must not be drained.
    pub(super) fn lend<B: Lendable>(
        request: &mut Request<B>,
        boxed: impl FnOnce(LentBody<B>) -> B,
    ) -> Option<Loan> {
        let drains = Drains::of(request);
        if request.body().is_end_stream() || drains == Drains::Never {
            return None;
        }
        let state = Arc::new(Mutex::new(LoanState::Lent));
        let body = mem::take(request.body_mut());
        let can_drain = drains == Drains::Always;
        *request.body_mut() = boxed(LentBody { body, can_drain, state: state.clone() });
        Some(Loan(state))
    }

    enum LoanState<B> {
        /// The holder has the body.
        Lent,
        /// The holder has dropped the body, and the lender has the original.
        Returned(B),
        /// The holder has dropped the body, which had ended or must not be drained.
        Ended,
        /// The lender has rejected the request. The holder drains the body when it drops it.
        Rejected,
    }

    impl<B: Lendable> Reclaim for Mutex<LoanState<B>> {
        fn drain(&self) -> bool {
            let before = mem::replace(&mut *self.lock(), LoanState::Rejected);
            // The lock has been released, so the body may be user code.
            match before {
                LoanState::Returned(body) => drain(body),
                LoanState::Lent => true,
                LoanState::Ended | LoanState::Rejected => false,
            }
        }
    }

    /// A lent body. It forwards everything to the original.
    pub(super) struct LentBody<B: Lendable> {
        body: B,
        /// Whether the body can be drained: it has not ended, and polling it does not send `100 Continue`.
        can_drain: bool,
        state: Arc<Mutex<LoanState<B>>>,
    }

    impl<B: Lendable> Body for LentBody<B> {
        type Data = B::Data;
        type Error = B::Error;

        fn poll_frame(
            self: Pin<&mut Self>,
            cx: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
            let this = self.get_mut();
            let polled = Pin::new(&mut this.body).poll_frame(cx);
            this.can_drain = !matches!(polled, Poll::Ready(None | Some(Err(_))));
            polled
        }

        fn is_end_stream(&self) -> bool {
            self.body.is_end_stream()
        }

        fn size_hint(&self) -> SizeHint {
            self.body.size_hint()
        }
    }

    impl<B: Lendable> Drop for LentBody<B> {
        fn drop(&mut self) {
            if !self.can_drain || self.body.is_end_stream() {
                *self.state.lock() = LoanState::Ended;
                return;
            }
            let body = mem::take(&mut self.body);
            let mut state = self.state.lock();
            if let LoanState::Rejected = *state {
                drop(state);
                drain(body);
            } else {
                // The lender drains or drops it.
                *state = LoanState::Returned(body);
            }
        }
    }
}
