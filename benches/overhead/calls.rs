//! The innermost services, and the functions that call them.

use std::{
    convert::Infallible,
    fmt,
    future::{Ready, ready},
    hint::black_box,
    pin::{Pin, pin},
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use http_body_util::{Empty, Full};
use tower::{Service, ServiceExt};

/// Makes the given number of calls.
pub type Run = Box<dyn FnMut(u64) + Send>;

pub struct Made {
    pub run: Run,
    /// The calls on a clone of the service, for a second thread.
    pub clone: Option<Run>,
    /// The sizes of the service and of its future in bytes. `None` if the candidate is not a service.
    pub sizes: Option<(usize, usize)>,
}

// ===== Services =====

#[derive(Debug)]
pub struct Oops;

impl fmt::Display for Oops {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("oops")
    }
}

impl std::error::Error for Oops {}

/// Responds at once.
#[derive(Clone)]
pub struct Bare;

impl Service<u64> for Bare {
    type Response = u64;
    type Error = Oops;
    type Future = Ready<Result<u64, Oops>>;

    #[inline]
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Oops>> {
        Poll::Ready(Ok(()))
    }

    #[inline]
    fn call(&mut self, request: u64) -> Self::Future {
        ready(Ok(request))
    }
}

/// Responds at once, with the types of HTTP.
#[derive(Clone)]
pub struct BareHttp;

impl<B> Service<Request<B>> for BareHttp {
    type Response = Response<Full<Bytes>>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request<B>) -> Self::Future {
        ready(Ok(Response::new(Full::new(Bytes::from_static(b"hello")))))
    }
}

/// Never responds.
#[derive(Clone)]
pub struct Stuck;

impl Service<u64> for Stuck {
    type Response = u64;
    type Error = Oops;
    type Future = std::future::Pending<Result<u64, Oops>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Oops>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: u64) -> Self::Future {
        std::future::pending()
    }
}

/// Responds at the second poll.
#[derive(Clone)]
pub struct Later;

pub struct Second(Option<u64>, bool);

impl Future for Second {
    type Output = Result<u64, Oops>;

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Self::Output> {
        match (std::mem::replace(&mut self.1, true), self.0) {
            (true, Some(answer)) => Poll::Ready(Ok(answer)),
            _ => Poll::Pending,
        }
    }
}

impl Service<u64> for Later {
    type Response = u64;
    type Error = Oops;
    type Future = Second;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Oops>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: u64) -> Second {
        Second(Some(request), false)
    }
}

// ===== Calls =====

/// Polls the service ready, calls it and polls the future, like an executor.
pub fn drive<S>(mut service: S) -> impl FnMut(u64) + Send
where
    S: Service<u64> + Send,
{
    move |calls| {
        let mut cx = Context::from_waker(Waker::noop());
        for request in 0..calls {
            while service.poll_ready(&mut cx).is_pending() {}
            let mut future = pin!(service.call(black_box(request)));
            loop {
                if let Poll::Ready(result) = future.as_mut().poll(&mut cx) {
                    black_box(result.is_ok());
                    break;
                }
            }
        }
    }
}

pub fn drive_http<S, B>(mut service: S) -> impl FnMut(u64) + Send
where
    S: Service<Request<Empty<Bytes>>, Response = Response<B>> + Send,
    B: Body,
{
    move |calls| {
        let mut cx = Context::from_waker(Waker::noop());
        for _ in 0..calls {
            while service.poll_ready(&mut cx).is_pending() {}
            let mut future = pin!(service.call(Request::new(Empty::new())));
            if let Poll::Ready(Ok(response)) = future.as_mut().poll(&mut cx) {
                let mut body = pin!(response.into_body());
                while let Poll::Ready(Some(Ok(frame))) = body.as_mut().poll_frame(&mut cx) {
                    black_box(frame.is_data());
                }
            }
        }
    }
}

/// Acquires the only permit of a limit for the rest of the process.
pub fn filled<S: Service<u64> + Clone>(service: S) -> S
where
    S::Future: Send + 'static,
{
    let mut cx = Context::from_waker(Waker::noop());
    let mut first = service.clone();
    while first.poll_ready(&mut cx).is_pending() {}
    let mut call = Box::pin(first.call(0));
    assert!(call.as_mut().poll(&mut cx).is_pending());
    // The forgotten call never releases its permit.
    std::mem::forget(call);
    service
}

pub fn made<S>(service: S) -> Made
where
    S: Service<u64> + Clone + Send + 'static,
{
    Made {
        sizes: Some((size_of::<S>(), size_of::<S::Future>())),
        clone: Some(Box::new(drive(service.clone()))),
        run: Box::new(drive(service)),
    }
}

pub fn made_http<S, B>(service: S) -> Made
where
    S: Service<Request<Empty<Bytes>>, Response = Response<B>> + Clone + Send + 'static,
    B: Body + 'static,
{
    Made {
        sizes: Some((size_of::<S>(), size_of::<S::Future>())),
        clone: Some(Box::new(drive_http(service.clone()))),
        run: Box::new(drive_http(service)),
    }
}

/// A candidate that needs a running runtime.
pub fn made_driven<S>(mut service: S) -> Made
where
    S: Service<u64> + Clone + Send + 'static,
{
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let runtime = runtime.expect("a runtime can be built");
    let run = move |calls| {
        runtime.block_on(async {
            for request in 0..calls {
                let Ok(ready) = service.ready().await else {
                    unreachable!("poll_ready never fails")
                };
                black_box(ready.call(black_box(request)).await.is_ok());
            }
        });
    };
    Made { sizes: Some((size_of::<S>(), size_of::<S::Future>())), clone: None, run: Box::new(run) }
}

/// A candidate that is not a service.
pub fn called(run: impl FnMut(u64) + Send + 'static) -> Made {
    Made { sizes: None, clone: None, run: Box::new(run) }
}
