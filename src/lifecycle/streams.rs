//! The calls of a connection, and the time limit of a response that its client does not read.
//!
//! Over HTTP/1 the IO object detects a client that does not read: its writes are blocked. Over HTTP/2 the connection
//! continues for the other streams, and only the flow-control window of the stream is closed. hyper runs each stream as
//! a task, polls the response body in this task, and does not poll the body again before the stream has capacity. The
//! result of the last poll of the body therefore determines what the stream waits for:
//!
//! | last poll of the body in a poll of the task | the stream waits for | limit |
//! |---|---|---|
//! | a frame | its client | the write timeout |
//! | `Pending` | the handler (server-sent events) | none |
//! | no poll of the body | the same as after the previous poll of the task | unchanged |
//!
//! A thread-local cell passes the result from [`StagedBody`] to [`StreamTask`], because hyper's future between them has
//! no interface for it. Both run in the same poll, so the cell is read before another task can run on the thread.
//! [`StreamTask`] saves and restores the cell around its poll, because a body can itself run a runtime on this thread.

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
use crate::{
    event::event,
    listener::LazyTimer,
    outcome::{LayerKind, TimeoutPhase},
};

/// Number of bytes of a frame for which the time limit is extended by one write timeout.
///
/// h2 sends a whole frame of the body before hyper polls the body again, so progress within a frame is not visible. The
/// extension prevents the reset of a slow but steady client in the middle of a large frame.
const BYTES_PER_TIMEOUT: u64 = 256 * 1024;

/// The last poll of a response body in the current poll of its stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BodyPoll {
    None,
    Pending,
    /// A frame, with the maximum number of bytes that are still unsent.
    Frame(u64),
}

thread_local! {
    /// The last poll of a response body, passed from [`StagedBody`] to the [`StreamTask`] around it.
    static BODY_POLL: Cell<BodyPoll> = const { Cell::new(BodyPoll::None) };
    /// The guard of a call that becomes a tunnel over HTTP/2. hyper spawns the tunnel's task in the same poll, and
    /// [`StreamExecutor`] moves the guard into that task.
    static TUNNEL: Cell<Option<CallGuard>> = const { Cell::new(None) };
}

// ===== The service =====

/// A service that counts the calls of a connection. A call ends with its response body.
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
            // If the stream has no capacity, hyper does not poll the body. The stream then waits for its client.
            if !*this.is_http1 && !is_tunnel && !response.body().is_end_stream() {
                BODY_POLL.set(BodyPoll::Frame(0));
            }
            response.map(|body| {
                // An empty body ends its call here, so that the call has ended when hyper sends the end of the stream.
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
        // Length of the previous frame in bytes. h2 can still hold a part of it.
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

/// Spawns the tasks of HTTP/2 streams on tokio, and resets a stream whose client does not read its response for the
/// [write timeout](super::server::Server::write_timeout).
///
/// It is the executor of the builder that [`Server::configure`](super::server::Server::configure) changes.
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
            // tokio moves the future of a task four times, and hyper's future has 2 KiB, so the box costs fewer
            // instructions than the moves.
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
    /// The end of the time limit, while the stream waits for its client.
    deadline: Option<Instant>,
    /// Made at the first wait for the client.
    timer: Option<LazyTimer>,
    /// The call of a tunnel. It ends with the task.
    _tunnel: Option<CallGuard>,
}

impl<F: Future> Future for StreamTask<F> {
    type Output = ();

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.get_mut();
        // The future can run another runtime on this thread, and so poll another stream within this poll.
        let outer = BODY_POLL.replace(BodyPoll::None);
        let polled = this.future.as_mut().poll(cx);
        let body = BODY_POLL.replace(outer);
        // If hyper has rejected the response, no tunnel task has taken the guard.
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
                            let (layer, reason) =
                                (LayerKind::Lifecycle.as_str(), TimeoutPhase::Unread.as_str());
                            event!(lifecycle, DEBUG, layer, "", reason = reason, "stream reset");
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
