//! Reads bodies that no caller reads: requests that a layer has responded to before it read them, and responses whose
//! connection is to be reused ([`poll_drain`], [`drain_response`]).
//!
//! # Requests
//!
//! A client that still writes its request when the server closes the connection receives a TCP reset, and the reset
//! discards the response that the client has not read yet (RFC 9112 §9.6). Over HTTP/2 the server resets the stream
//! with `NO_ERROR` (RFC 9113 §8.1), and clients such as curl 7.88 then report an error in place of the response. Both
//! happen when the body of the request is dropped before its end. A drain prevents them: the response is sent at once,
//! while a task reads the rest of the body and discards it.
//!
//! # Bounds
//!
//! A drain ends after [`MAX_BYTES`] or [`TIMEOUT`], whichever is first; then the body is dropped. At most
//! [`MAX_DRAINS`] drains run at once. The cap is one for the process, because the connections and the memory that
//! drains occupy belong to the process: a cap per layer would multiply with the number of routes. A body above the cap
//! is dropped.
//!
//! # Which bodies
//!
//! The layers are generic in the body of the request and do not require `Body + Send`, so the bodies of servers are
//! recognized by their type: hyper's `Incoming` (feature `hyper`), axum's (feature `axum`) and tonic's (feature
//! `tonic`). All other bodies are dropped. tonic uses one body type for its servers and its clients:
//! [`is_from_tonic_client`] distinguishes them.
//!
//! After `Expect: 100-continue` the client waits for an invitation, which hyper sends when the body is polled for the
//! first time. The body of such a request is drained only if it has been polled before.

mod loan;
mod read;

use std::{
    any::Any,
    cell::Cell,
    pin::Pin,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    time::Duration,
};

pub(crate) use self::{
    loan::Loan,
    read::{
        MAX_RESPONSE_BYTES, MIN_FRAME, RESPONSE_TIMEOUT, ReadEnd, drain_response, poll_drain,
        poll_read,
    },
};

use http::{Request, Version, header};
#[cfg(any(feature = "hyper", feature = "axum"))]
use {
    http_body::Body,
    std::future::poll_fn,
    tokio::{runtime::Handle, time::timeout},
};

/// The maximum number of bytes that a drain reads.
pub(crate) const MAX_BYTES: u64 = 16 * 1024 * 1024;
/// The maximum duration of a drain.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(1);
/// The maximum number of drains at one time in the process.
const MAX_DRAINS: usize = 1024;

/// The number of drains in progress. It orders no other memory, so all its operations are relaxed.
static DRAINS: AtomicUsize = AtomicUsize::new(0);

/// Drains the body of a request that a layer responds to before the body was polled.
///
/// Drops the request and returns `false` if there is nothing to drain: see the [module](self).
#[cold]
#[inline(never)]
pub(crate) fn drain_request<Req: 'static>(request: Req) -> bool {
    let mut request = Some(request);
    let request: &mut dyn Any = &mut request;
    #[cfg(feature = "hyper")]
    if let Some(request) = downcast::<hyper::body::Incoming>(request) {
        return drain_body_of(request);
    }
    #[cfg(feature = "axum")]
    if let Some(request) = downcast::<axum::body::Body>(request) {
        return drain_body_of(request);
    }
    #[cfg(feature = "tonic")]
    if let Some(request) = downcast::<tonic::body::Body>(request) {
        return drain_body_of(request);
    }
    let _ = request;
    false
}

#[cfg(any(feature = "hyper", feature = "axum"))]
fn downcast<B: 'static>(request: &mut dyn Any) -> Option<Request<B>> {
    request.downcast_mut().and_then(Option::take)
}

#[cfg(any(feature = "hyper", feature = "axum"))]
fn drain_body_of<B>(request: Request<B>) -> bool
where
    B: Body<Data: Send, Error: Send> + Send + Unpin + 'static,
{
    !request.body().is_end_stream()
        && Drains::of(&request) == Drains::Always
        && drain(request.into_body())
}

/// The condition for a drain of the body, according to the head of the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Drains {
    /// The body comes from a client of this process, so no connection depends on it.
    Never,
    /// The client waits for an invitation to send the body.
    IfPolled,
    /// The client sends the body without an invitation.
    Always,
}

impl Drains {
    /// Returns the condition for this request.
    pub(crate) fn of<B: 'static>(request: &Request<B>) -> Self {
        if is_from_tonic_client(request) {
            Self::Never
        } else if expects_continue(request) {
            Self::IfPolled
        } else {
            Self::Always
        }
    }
}

/// RFC 9110 §10.1.1: the expectation of an HTTP/1.0 client is ignored. hyper never sends `100 Continue` over HTTP/2.
fn expects_continue<B>(request: &Request<B>) -> bool {
    let expects = |value: &http::HeaderValue| {
        value.as_bytes().trim_ascii().eq_ignore_ascii_case(b"100-continue")
    };
    request.version() == Version::HTTP_11
        && request.headers().get_all(header::EXPECT).iter().any(expects)
}

/// Returns whether a tonic client made this request. The body of such a request is the message stream of the
/// application: no connection depends on it.
///
/// The channel adds the authority after all layers. A request that a server received over HTTP/2 has one
/// (RFC 9113 §8.3.1).
fn is_from_tonic_client<B: 'static>(request: &Request<B>) -> bool {
    #[cfg(feature = "tonic")]
    if std::any::TypeId::of::<B>() == std::any::TypeId::of::<tonic::body::Body>() {
        return request.version() == Version::HTTP_2 && request.uri().authority().is_none();
    }
    let _ = request;
    false
}

/// Returns whether [`drain_pinned`] can drain a body of this type.
pub(crate) fn can_drain_pinned<B: 'static>() -> bool {
    let body = std::any::TypeId::of::<B>();
    #[cfg(feature = "axum")]
    if body == std::any::TypeId::of::<axum::body::Body>() {
        return true;
    }
    #[cfg(feature = "tonic")]
    if body == std::any::TypeId::of::<tonic::body::Body>() {
        return true;
    }
    let _ = body;
    false
}

/// Drains `body` if `B` is axum's or tonic's body. Returns whether it is drained.
pub(crate) fn drain_pinned<B: 'static>(body: Pin<&mut B>) -> bool {
    #[cfg(any(feature = "axum", feature = "tonic"))]
    fn of<B: Body<Data: Send, Error: Send> + Default + Send + Unpin + 'static>(
        body: Pin<&mut B>,
    ) -> bool {
        drain(std::mem::take(body.get_mut()))
    }
    // A pinned `B` cannot be downcast. A function that takes a pinned `B` can be.
    #[cfg(feature = "axum")]
    let function: fn(Pin<&mut axum::body::Body>) -> bool = of;
    #[cfg(feature = "axum")]
    if let Some(drain) = (&function as &dyn Any).downcast_ref::<fn(Pin<&mut B>) -> bool>() {
        return drain(body);
    }
    #[cfg(feature = "tonic")]
    let function: fn(Pin<&mut tonic::body::Body>) -> bool = of;
    #[cfg(feature = "tonic")]
    if let Some(drain) = (&function as &dyn Any).downcast_ref::<fn(Pin<&mut B>) -> bool>() {
        return drain(body);
    }
    let _ = body;
    false
}

/// Reads `body` to its end in a task of its own, within the bounds of the [module](self).
///
/// Drops it and returns `false` if it has ended, outside of a Tokio runtime, and above the cap.
#[cfg(any(feature = "hyper", feature = "axum"))]
pub(crate) fn drain<B>(body: B) -> bool
where
    B: Body<Data: Send, Error: Send> + Send + Unpin + 'static,
{
    if body.is_end_stream() {
        return false;
    }
    // A body that is lent twice contains a lent body. If the drain of the outer body ends at its bounds, it drops the
    // inner one, whose destructor must not start a second drain.
    if DROPS_DRAINED.get() {
        return false;
    }
    let Ok(runtime) = Handle::try_current() else { return false };
    let Some(slot) = DrainSlot::acquire(&DRAINS) else { return false };
    runtime.spawn(async move {
        let (mut body, mut read) = (DrainedBody(Some(body)), 0);
        if let Some(body) = &mut body.0 {
            // The drain ends at the frame that reaches the maximum.
            let bounds = (MIN_FRAME, MAX_BYTES - 1);
            let end = poll_fn(|cx| poll_read(Pin::new(&mut *body), &mut read, bounds, cx, drop));
            let _ = timeout(TIMEOUT, end).await;
        }
        drop(body);
        drop(slot);
    });
    true
}

thread_local! {
    /// This thread is dropping a body whose drain has ended.
    static DROPS_DRAINED: Cell<bool> = const { Cell::new(false) };
}

/// A body that is being drained. Its destructor marks the drop of the body, so that it starts no second drain.
#[cfg(any(feature = "hyper", feature = "axum"))]
struct DrainedBody<B>(Option<B>);

#[cfg(any(feature = "hyper", feature = "axum"))]
impl<B> Drop for DrainedBody<B> {
    fn drop(&mut self) {
        let before = DROPS_DRAINED.replace(true);
        self.0 = None;
        DROPS_DRAINED.set(before);
    }
}

/// The right to run one drain. Released when dropped.
struct DrainSlot(&'static AtomicUsize);

impl DrainSlot {
    /// Returns a slot, or `None` if [`MAX_DRAINS`] are in use.
    fn acquire(drains: &'static AtomicUsize) -> Option<Self> {
        let more = |now| (now < MAX_DRAINS).then_some(now + 1);
        drains.fetch_update(Relaxed, Relaxed, more).ok().map(|_| Self(drains))
    }
}

impl Drop for DrainSlot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

#[cfg(all(test, feature = "axum"))]
mod tests {
    use std::{
        convert::Infallible,
        sync::{Arc, atomic::Ordering::SeqCst},
        task::{Context, Poll, Waker},
    };

    use axum::body::Body as AxumBody;
    use bytes::Bytes;
    use http_body::Frame;
    use tokio::time::{Instant, sleep};

    use super::*;

    /// A body of frames of this size without an end, or one that is never ready. Counts polls.
    struct Endless {
        size: Option<usize>,
        polls: Arc<AtomicUsize>,
    }

    impl Body for Endless {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            self.polls.fetch_add(1, SeqCst);
            match self.size {
                None => Poll::Pending,
                Some(size) => Poll::Ready(Some(Ok(Frame::data(Bytes::from(vec![0; size]))))),
            }
        }
    }

    fn endless(size: Option<usize>) -> (AxumBody, Arc<AtomicUsize>) {
        let polls = Arc::new(AtomicUsize::new(0));
        (AxumBody::new(Endless { size, polls: polls.clone() }), polls)
    }

    /// Returns the time until the body is dropped.
    async fn dropped(polls: &Arc<AtomicUsize>) -> Duration {
        let began = Instant::now();
        while Arc::strong_count(polls) > 1 {
            assert!(began.elapsed() < Duration::from_secs(10), "the body is still alive");
            sleep(Duration::from_millis(10)).await;
        }
        began.elapsed()
    }

    fn request(version: Version, expect: &'static str) -> Request<AxumBody> {
        let request = Request::post("/").version(version).header(header::EXPECT, expect);
        request.body(endless(None).0).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn silent_body_is_dropped_after_the_timeout() {
        let (body, polls) = endless(None);
        assert!(drain(body));
        let took = dropped(&polls).await;
        assert!(took >= TIMEOUT && took <= TIMEOUT + Duration::from_millis(20), "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn body_is_dropped_after_16_mib() {
        let (body, polls) = endless(Some(1024 * 1024));
        assert!(drain(body));
        dropped(&polls).await;
        assert_eq!(polls.load(SeqCst), 16);
    }

    /// The timeout ends a body of empty frames, each of which counts as one byte. The clock is real: a paused one
    /// stands still while a task is ready.
    #[tokio::test]
    async fn body_of_empty_frames_does_not_occupy_its_thread() {
        let (body, polls) = endless(Some(0));
        assert!(drain(body));
        let took = dropped(&polls).await;
        assert!(took < Duration::from_secs(3), "{took:?}");
    }

    #[tokio::test]
    async fn ended_body_starts_no_task() {
        assert!(!drain_request(Request::new(AxumBody::empty())));
        assert!(!drain_request(Request::new(())));
        assert!(!drain_request("not HTTP"));
        assert_eq!(Handle::current().metrics().num_alive_tasks(), 0);
    }

    #[test]
    fn body_is_dropped_outside_of_a_runtime() {
        let (body, polls) = endless(None);
        assert!(!drain_request(Request::new(body)));
        assert_eq!((polls.load(SeqCst), Arc::strong_count(&polls)), (0, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn body_is_not_invited() {
        for (version, expect, drains) in [
            (Version::HTTP_11, "100-continue", Drains::IfPolled),
            (Version::HTTP_11, "100-Continue", Drains::IfPolled),
            (Version::HTTP_11, "something else", Drains::Always),
            (Version::HTTP_10, "100-continue", Drains::Always),
            (Version::HTTP_2, "100-continue", Drains::Always),
        ] {
            let request = request(version, expect);
            assert_eq!(Drains::of(&request), drains, "{version:?} {expect}");
            assert_eq!(drain_request(request), drains == Drains::Always, "{version:?} {expect}");
        }
    }

    #[test]
    fn drains_are_capped() {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let mut slots: Vec<_> =
            (0..MAX_DRAINS).filter_map(|_| DrainSlot::acquire(&COUNT)).collect();
        assert_eq!(slots.len(), MAX_DRAINS);
        assert!(DrainSlot::acquire(&COUNT).is_none());
        slots.pop();
        assert!(DrainSlot::acquire(&COUNT).is_some());
        drop(slots);
        assert_eq!(COUNT.load(SeqCst), 0);
    }

    // ===== Lent bodies =====

    fn lent(request: Request<AxumBody>) -> (Option<Loan>, Request<AxumBody>) {
        let mut request = request;
        (Loan::of(&mut request), request)
    }

    #[tokio::test(start_paused = true)]
    async fn lent_body_is_drained_whether_it_is_dropped_before_or_after_the_rejection() {
        for is_dropped_before in [true, false] {
            let (body, polls) = endless(None);
            let (loan, request) = lent(Request::new(body));
            if is_dropped_before {
                drop(request);
                loan.unwrap().drain();
            } else {
                loan.unwrap().drain();
                drop(request);
            }
            assert!(dropped(&polls).await >= TIMEOUT);
            assert!(polls.load(SeqCst) > 0);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn lent_body_is_dropped_with_its_loan() {
        let (body, polls) = endless(None);
        let (loan, request) = lent(Request::new(body));
        drop(request);
        drop(loan);
        assert_eq!((polls.load(SeqCst), Arc::strong_count(&polls)), (0, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn lent_body_is_not_invited_but_drained_once_it_has_been_polled() {
        for is_polled in [false, true] {
            let (loan, mut request) = lent(request(Version::HTTP_11, "100-continue"));
            if is_polled {
                let mut cx = Context::from_waker(Waker::noop());
                assert!(Pin::new(request.body_mut()).poll_frame(&mut cx).is_pending());
            }
            loan.unwrap().drain();
            let before = Handle::current().metrics().num_alive_tasks();
            drop(request);
            let started = Handle::current().metrics().num_alive_tasks() - before;
            assert_eq!(started, usize::from(is_polled));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn loan_returns_whether_the_body_is_drained() {
        let mut cx = Context::from_waker(Waker::noop());
        for (body, is_drained) in [
            (endless(None).0, true),
            (endless(Some(1)).0, true),
            (AxumBody::from("read to its end"), false),
        ] {
            let (loan, mut request) = lent(Request::new(body));
            while let Poll::Ready(Some(Ok(frame))) =
                Pin::new(request.body_mut()).poll_frame(&mut cx)
            {
                if is_drained {
                    drop(frame);
                    break;
                }
            }
            drop(request);
            let loan = loan.unwrap();
            assert_eq!(loan.drain(), is_drained);
            assert!(!loan.drain(), "a body is drained once");
        }
    }

    /// The drain of the outer body ends by dropping the inner one. That must not start a second drain.
    #[tokio::test(start_paused = true)]
    async fn body_that_is_lent_twice_is_drained_once() {
        let (body, polls) = endless(None);
        let (inner, request) = lent(Request::new(body));
        let (outer, request) = lent(request);
        let began = Instant::now();
        drop(request);
        // The body belongs to the outer loan.
        assert!(inner.unwrap().drain());
        assert!(outer.unwrap().drain());
        assert_eq!(Handle::current().metrics().num_alive_tasks(), 1);
        dropped(&polls).await;
        assert!(began.elapsed() < 2 * TIMEOUT);
        sleep(Duration::from_millis(1)).await;
        assert_eq!(Handle::current().metrics().num_alive_tasks(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn pinned_body_of_a_server_is_drained() {
        assert!(can_drain_pinned::<AxumBody>());
        assert!(!can_drain_pinned::<Endless>());
        let (mut body, polls) = endless(None);
        assert!(drain_pinned(Pin::new(&mut body)));
        assert!(body.is_end_stream(), "an empty body has replaced it");
        assert!(dropped(&polls).await >= TIMEOUT);
        let (size, polls) = (None, Arc::new(AtomicUsize::new(0)));
        assert!(!drain_pinned(Pin::new(&mut Endless { size, polls })));
    }

    #[test]
    fn ended_body_is_not_lent() {
        assert!(lent(Request::new(AxumBody::empty())).0.is_none());
    }
}
