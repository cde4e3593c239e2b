//! The calls of a connection, and the end of a response that its client does not read.
//!
//! Over HTTP/1 the IO object observes a client that does not read. Over HTTP/2 the other streams of a connection
//! continue, and only the flow-control window of the stream is closed. hyper runs each stream as a task, polls the
//! response body in it, and does not poll the body again before the stream has capacity. The state of the body at the
//! end of a poll of the task therefore distinguishes both cases:
//!
//! | the body's last poll in it | the stream waits for | limit |
//! |---|---|---|
//! | a frame | its client | the write timeout |
//! | `Pending` | the handler (server-sent events) | none |
//! | none | the same as after the previous poll | as before |
//!
//! A thread-local cell passes the state from [`StagedBody`] to [`StreamTask`], because the body is deep inside of a
//! future of hyper. Both run in the same poll.

use std::{
    cell::Cell,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use http::{Method, Request, Response, StatusCode, Version};
use http_body::{Body, Frame, SizeHint};
use hyper::{body::Incoming, rt::Executor, service::Service};
use pin_project_lite::pin_project;
use tokio::time::Instant;

use super::stages::{CallGuard, ConnectionState};
use crate::{event, listener::LazyTimer};

/// h2 sends a whole frame of the body before hyper polls the body again. A large frame extends the time: each
/// block of this many bytes has one write timeout, so that a slow but steady client is not ended.
const BYTES_PER_TIMEOUT: u64 = 256 * 1024;

/// The last poll of a response body in the current poll of its stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BodyPoll {
    None,
    Pending,
    /// A frame, with the number of bytes that can be unsent.
    Frame(u64),
}

thread_local! {
    static BODY_POLL: Cell<BodyPoll> = const { Cell::new(BodyPoll::None) };
    /// The guard of a call that becomes a tunnel over HTTP/2. hyper spawns the tunnel's task next.
    static TUNNEL: Cell<Option<CallGuard>> = const { Cell::new(None) };
}

// ===== The service =====

/// Counts the calls of a connection, each to the end of its response body.
#[derive(Debug)]
pub(super) struct StagedService<S> {
    inner: S,
    state: Arc<ConnectionState>,
}

impl<S> StagedService<S> {
    pub(super) fn new(inner: S, state: Arc<ConnectionState>) -> Self {
        Self { inner, state }
    }
}

impl<S, B> Service<Request<Incoming>> for StagedService<S>
where
    S: Service<Request<Incoming>, Response = Response<B>>,
    B: Body,
{
    type Response = Response<StagedBody<B>>;
    type Error = S::Error;
    type Future = StagedFuture<S::Future>;

    #[inline]
    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let has_body = !request.body().is_end_stream();
        let call = Some(CallGuard::new(&self.state, has_body));
        let is_http1 = request.version() < Version::HTTP_2;
        let is_connect = request.method() == Method::CONNECT;
        StagedFuture { inner: self.inner.call(request), call, is_http1, is_connect }
    }
}

pin_project! {
    /// The future of a call.
    pub(super) struct StagedFuture<F> {
        #[pin]
        inner: F,
        call: Option<CallGuard>,
        is_http1: bool,
        is_connect: bool,
    }
}

impl<F, B, E> Future for StagedFuture<F>
where
    F: Future<Output = Result<Response<B>, E>>,
    B: Body,
{
    type Output = Result<Response<StagedBody<B>>, E>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        this.inner.poll(cx).map_ok(|response| {
            let mut call = this.call.take();
            let status = response.status();
            let is_tunnel = *this.is_connect && status.is_success();
            if is_tunnel || status == StatusCode::SWITCHING_PROTOCOLS {
                if *this.is_http1 {
                    call.iter().for_each(|call| call.connection().upgrade());
                } else {
                    TUNNEL.set(call.take());
                }
            }
            // Without capacity of its stream, hyper does not poll the body at all.
            if !*this.is_http1 && !is_tunnel && !response.body().is_end_stream() {
                BODY_POLL.set(BodyPoll::Frame(0));
            }
            response.map(|body| {
                // The end of a call is to be visible when hyper sends the end of its stream.
                let call = call.filter(|_| !body.is_end_stream());
                StagedBody { body, call, previous: 0 }
            })
        })
    }
}

pin_project! {
    /// A response body that holds its call.
    pub(super) struct StagedBody<B> {
        #[pin]
        body: B,
        call: Option<CallGuard>,
        // Length of the previous frame, of which h2 can still hold a part.
        previous: u64,
    }
}

impl<B: Body> Body for StagedBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    #[inline]
    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let mut this = self.project();
        let polled = this.body.as_mut().poll_frame(cx);
        match &polled {
            Poll::Pending => BODY_POLL.set(BodyPoll::Pending),
            Poll::Ready(Some(Ok(frame))) => {
                let bytes = frame.data_ref().map_or(0, bytes::Buf::remaining) as u64;
                BODY_POLL.set(BodyPoll::Frame(this.previous.saturating_add(bytes)));
                *this.previous = bytes;
                if this.body.is_end_stream() || frame.is_trailers() {
                    *this.call = None;
                }
            }
            Poll::Ready(None | Some(Err(_))) => *this.call = None,
        }
        polled
    }

    #[inline]
    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    #[inline]
    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

// ===== The tasks of HTTP/2 streams =====

/// Spawns the tasks of HTTP/2 streams on tokio, and ends a stream whose client does not read its response for the
/// [write timeout](super::Server::write_timeout). hyper-util's builder has this executor under
/// [`Server::configure`](super::Server::configure).
#[derive(Clone, Debug)]
pub struct StreamExecutor {
    write_timeout: Option<Duration>,
}

impl StreamExecutor {
    pub(super) fn new(write_timeout: Option<Duration>) -> Self {
        Self { write_timeout }
    }
}

impl<F> Executor<F> for StreamExecutor
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    #[inline]
    fn execute(&self, future: F) {
        tokio::spawn(StreamTask {
            // tokio moves the future of a task four times. hyper's has 2 KiB: the box costs fewer instructions.
            future: Box::pin(future),
            limit: self.write_timeout,
            deadline: None,
            timer: None,
            _tunnel: TUNNEL.take(),
        });
    }
}

struct StreamTask<F> {
    future: Pin<Box<F>>,
    limit: Option<Duration>,
    /// While the stream waits for its client.
    deadline: Option<Instant>,
    /// Since the first wait for the client.
    timer: Option<LazyTimer>,
    /// The call of a tunnel, which ends with the task.
    _tunnel: Option<CallGuard>,
}

impl<F: Future> Future for StreamTask<F> {
    type Output = ();

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.get_mut();
        // A poll can run another one inside of it, on a runtime of its own.
        let outer = BODY_POLL.replace(BodyPoll::None);
        let polled = this.future.as_mut().poll(cx);
        let body = BODY_POLL.replace(outer);
        // A response that hyper has rejected does not become a tunnel.
        drop(TUNNEL.take());
        if polled.is_ready() {
            return Poll::Ready(());
        }
        let Some(limit) = this.limit else { return Poll::Pending };
        match body {
            BodyPoll::Frame(unsent) => {
                let now = Instant::now();
                let factor = 1.0 + unsent as f64 / BYTES_PER_TIMEOUT as f64;
                let time = Duration::try_from_secs_f64(limit.as_secs_f64() * factor);
                this.deadline = time.ok().and_then(|time| now.checked_add(time));
                if let Some(deadline) = this.deadline {
                    this.timer.get_or_insert_with(LazyTimer::new).arm(deadline, now, cx);
                }
            }
            BodyPoll::Pending => this.deadline = None,
            BodyPoll::None => {
                if let (Some(deadline), Some(timer)) = (this.deadline, &mut this.timer) {
                    if timer.has_fired(cx) {
                        let now = Instant::now();
                        if now >= deadline {
                            event!(DEBUG, "stream reset: the client does not read");
                            return Poll::Ready(());
                        }
                        timer.arm(deadline, now, cx);
                    }
                }
            }
        }
        Poll::Pending
    }
}
