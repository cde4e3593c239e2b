//! An inner service with a handler, and helpers for the tests of the retry layer.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicI64, AtomicU32, Ordering::SeqCst},
    },
    task::{Context, Poll, Waker},
};

use buttress::{Attempts, BoxError, RetryBudget, retry::ReplayBody};
use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response};
use http_body::Body;
use http_body_util::BodyExt;
use tower::{Service, ServiceExt};

pub use crate::support::{BodyReads, Oops, Piece, ScriptBody, ms};

// ===== An inner service with counters =====

pub type Answer = Result<Response<ScriptBody>, BoxError>;
type Answering = Pin<Box<dyn Future<Output = Answer> + Send>>;
type Handler<B> = dyn Fn(u32, Request<ReplayBody<B>>) -> Answering + Send + Sync;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Gate {
    Open,
    Shut,
    Broken,
    /// Each readiness takes two polls.
    Slow,
    Panics,
}

#[derive(Debug)]
pub struct Log {
    calls: AtomicU32,
    without_ready: AtomicU32,
    readied: AtomicU32,
    reserved: AtomicI64,
    in_flight: AtomicI64,
    gate: Mutex<(Gate, Vec<Waker>)>,
}

impl Log {
    pub fn calls(&self) -> u32 {
        self.calls.load(SeqCst)
    }

    pub fn readied(&self) -> u32 {
        self.readied.load(SeqCst)
    }

    /// Returns the number of ready instances that were not called, and the number of calls in flight.
    pub fn taken(&self) -> (i64, i64) {
        (self.reserved.load(SeqCst), self.in_flight.load(SeqCst))
    }

    pub fn gate(&self, gate: Gate) {
        let wakers = {
            let mut now = self.gate.lock().unwrap();
            now.0 = gate;
            std::mem::take(&mut now.1)
        };
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Asserts that no call was made without readiness.
    #[track_caller]
    pub fn assert_strict(&self) {
        assert_eq!(self.without_ready.load(SeqCst), 0, "called without readiness");
    }
}

/// A service whose handler receives the number and the request of each call. [`Strict`](crate::support::Strict) does not
/// read requests, and panics at a call without readiness. This service counts such a call.
pub struct Inner<B = ScriptBody> {
    handler: Arc<Handler<B>>,
    pub log: Arc<Log>,
    ready: bool,
    polled: bool,
}

impl<B: Body + Send + 'static> Inner<B>
where
    B::Error: Into<BoxError> + fmt::Debug + Send,
{
    /// Responds to the nth call after its request body has been read. The first call has the number 1.
    pub fn new(answer: impl Fn(u32) -> Answer + Send + Sync + 'static) -> Self {
        let answer = Arc::new(answer);
        Self::with(move |n, request| {
            let answer = answer.clone();
            async move {
                let body = request.into_body().collect().await;
                body.map_err(Into::into)?;
                answer(n)
            }
        })
    }

    pub fn with<F>(
        handler: impl Fn(u32, Request<ReplayBody<B>>) -> F + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = Answer> + Send + 'static,
    {
        Self {
            handler: Arc::new(move |n, request| Box::pin(handler(n, request))),
            log: Arc::new(Log {
                calls: AtomicU32::new(0),
                without_ready: AtomicU32::new(0),
                readied: AtomicU32::new(0),
                reserved: AtomicI64::new(0),
                in_flight: AtomicI64::new(0),
                gate: Mutex::new((Gate::Open, Vec::new())),
            }),
            ready: false,
            polled: false,
        }
    }
}

impl<B> Clone for Inner<B> {
    fn clone(&self) -> Self {
        Self { handler: self.handler.clone(), log: self.log.clone(), ready: false, polled: false }
    }
}

impl<B> Drop for Inner<B> {
    fn drop(&mut self) {
        self.log.reserved.fetch_sub(i64::from(self.ready), SeqCst);
    }
}

impl<B: 'static> Service<Request<ReplayBody<B>>> for Inner<B> {
    type Response = Response<ScriptBody>;
    type Error = BoxError;
    type Future = Flight;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        if self.ready {
            return Poll::Ready(Ok(()));
        }
        let mut gate = self.log.gate.lock().unwrap();
        match gate.0 {
            Gate::Broken => return Poll::Ready(Err(Oops("not ready").into())),
            Gate::Shut => {
                gate.1.push(cx.waker().clone());
                return Poll::Pending;
            }
            Gate::Slow if !self.polled => {
                self.polled = true;
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            Gate::Panics => {
                drop(gate);
                panic!("scripted panic");
            }
            Gate::Open | Gate::Slow => {}
        }
        drop(gate);
        self.ready = true;
        self.log.reserved.fetch_add(1, SeqCst);
        self.log.readied.fetch_add(1, SeqCst);
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<ReplayBody<B>>) -> Flight {
        if std::mem::replace(&mut self.ready, false) {
            self.log.reserved.fetch_sub(1, SeqCst);
        } else {
            self.log.without_ready.fetch_add(1, SeqCst);
        }
        self.polled = false;
        let n = self.log.calls.fetch_add(1, SeqCst) + 1;
        self.log.in_flight.fetch_add(1, SeqCst);
        Flight { answering: (self.handler)(n, request), log: self.log.clone() }
    }
}

/// A call in flight, counted until it is dropped.
pub struct Flight {
    answering: Answering,
    log: Arc<Log>,
}

impl Future for Flight {
    type Output = Answer;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Answer> {
        self.answering.as_mut().poll(cx)
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.log.in_flight.fetch_sub(1, SeqCst);
    }
}

// ===== Frames and headers =====

pub fn data(text: &'static str) -> Piece {
    Piece::data(text)
}

pub fn trailers(pairs: &[(&'static str, &'static str)]) -> Piece {
    Piece::Trailers(map(pairs))
}

pub fn map(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
    pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
}

/// Reads a body to its end. Returns its data and its trailers.
pub async fn read<B: Body<Error: fmt::Debug>>(body: B) -> (Bytes, Option<HeaderMap>) {
    let body = body.collect().await.unwrap();
    let trailers = body.trailers().cloned();
    (body.to_bytes(), trailers)
}

// ===== Requests and responses =====

pub fn request(method: Method, body: ScriptBody) -> Request<ScriptBody> {
    Request::builder().method(method).uri("/").body(body).unwrap()
}

pub fn get() -> Request<ScriptBody> {
    request(Method::GET, ScriptBody::empty())
}

pub fn put(body: ScriptBody) -> Request<ScriptBody> {
    request(Method::PUT, body)
}

pub fn post(body: ScriptBody) -> Request<ScriptBody> {
    request(Method::POST, body)
}

pub fn status(status: u16) -> Response<ScriptBody> {
    Response::builder().status(status).body(ScriptBody::empty()).unwrap()
}

pub fn with_headers(code: u16, pairs: &[(&'static str, &'static str)]) -> Response<ScriptBody> {
    let mut response = status(code);
    *response.headers_mut() = map(pairs);
    response
}

pub fn io(kind: std::io::ErrorKind) -> BoxError {
    Box::new(std::io::Error::from(kind))
}

pub async fn send<S, Q>(service: &S, request: Q) -> Result<S::Response, S::Error>
where
    S: Service<Q> + Clone,
{
    service.clone().oneshot(request).await
}

/// Returns the record of the retry layer, from the response or from the error.
pub fn told<B>(result: &Result<Response<B>, BoxError>) -> Attempts {
    match result {
        Ok(response) => Attempts::of(response),
        Err(error) => Attempts::find(&**error).expect("every error has a record"),
    }
}

/// Returns a budget with this balance, which gains nothing over time.
pub fn purse(retries: u32) -> RetryBudget {
    let budget = RetryBudget::with(1.0, 0, retries);
    (0..retries).for_each(|_| budget.deposit());
    budget
}
