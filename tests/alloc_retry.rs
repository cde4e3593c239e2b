//! A retry that does not retry allocates nothing.
#![cfg(feature = "retry")]

use std::{
    convert::Infallible,
    future::{Future, Ready, ready},
    hint::black_box,
    pin::pin,
    task::{Context, Poll, Waker},
};

use allocation_counter::measure;
use buttress::{BoxError, Outcome, RetryLayer, retry::ReplayBody};
use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::{Empty, Full};
use tower::{Layer, Service};

/// How many allocations one call makes, in a second call on the same service.
fn allocations<S, Req>(service: &mut S, request: impl Fn() -> Req) -> u64
where
    S: Service<Req>,
    S::Error: std::fmt::Debug,
{
    let mut call = |request| {
        let mut cx = Context::from_waker(Waker::noop());
        assert!(service.poll_ready(&mut cx).is_ready());
        let mut future = pin!(service.call(request));
        let Poll::Ready(answer) = future.as_mut().poll(&mut cx) else { panic!("pending") };
        black_box(answer.unwrap());
    };
    call(request());
    let request = request();
    measure(move || call(request)).count_total
}

#[derive(Clone)]
struct Plain(u16);

impl<B> Service<Request<ReplayBody<B>>> for Plain {
    type Response = Response<Full<Bytes>>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<ReplayBody<B>>) -> Self::Future {
        black_box(request);
        let mut response = Response::new(Full::from(Bytes::from_static(b"hello")));
        *response.status_mut() = http::StatusCode::from_u16(self.0).unwrap();
        ready(Ok(response))
    }
}

#[test]
fn a_retry_that_does_not_retry_allocates_nothing() {
    for status in [200, 404, 500] {
        let mut service = RetryLayer::http().layer(Plain(status));
        for uri in ["/", "http://127.0.0.1:8080/", "https://example.com/a?b"] {
            let get = || Request::get(uri).body(Empty::<Bytes>::new()).unwrap();
            assert_eq!(allocations(&mut service, get), 0, "{status} {uri}");
        }
        let post = || Request::post("/").body(Full::new(Bytes::new())).unwrap();
        assert_eq!(allocations(&mut service, post), 0, "a POST without a body");
    }
}

#[test]
fn nor_does_one_that_a_user_has_a_say_in() {
    let layer = RetryLayer::http().retry_on(http::StatusCode::CONFLICT);
    let mut service = layer.retry_if(|seen| (seen.attempt() > 9).then_some(true)).layer(Plain(200));
    let get = || Request::get("/").body(Empty::<Bytes>::new()).unwrap();
    assert_eq!(allocations(&mut service, get), 0);
}

/// A URI out of a `String`, as most clients have it. One of a path alone is an unshared buffer, which is
/// made a shared one when it is copied for the first time.
#[test]
fn a_uri_made_at_run_time_costs_what_its_first_copy_costs() {
    let mut service = RetryLayer::http().layer(Plain(200));
    for (uri, cost) in [("http://127.0.0.1:8080/a", 0), ("/a/b?c=d", 1)] {
        let get = || Request::get(uri.to_owned()).body(Empty::<Bytes>::new()).unwrap();
        let fresh = get();
        assert_eq!(measure(|| drop(black_box(fresh.uri().clone()))).count_total, cost, "{uri}");
        assert_eq!(allocations(&mut service, get), cost, "{uri}");
    }
}

/// They have to be kept, because the call takes them away.
#[test]
fn headers_cost_one_allocation_half_of_what_a_copy_of_them_costs() {
    let mut service = RetryLayer::http().layer(Plain(200));
    let headers: HeaderMap = [("host", "x"), ("accept", "*/*"), ("x-mine", "1")]
        .into_iter()
        .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
        .collect();
    drop(headers.clone());
    let copy = measure(|| drop(black_box(headers.clone()))).count_total;
    let request = || {
        let mut request = Request::get("/").body(Empty::<Bytes>::new()).unwrap();
        *request.headers_mut() = headers.clone();
        request
    };
    assert_eq!((allocations(&mut service, request), copy), (1, 2));
    // One attempt alone may be repeated too, where no server has seen it.
    let mut service = RetryLayer::http().attempts(1).layer(Plain(200));
    assert_eq!(allocations(&mut service, request), 1);
    // With nothing to be repeated there is nothing to keep.
    let mut service = RetryLayer::http().attempts(0).layer(Plain(200));
    assert_eq!(allocations(&mut service, request), 0);
    let put = || Request::put("/").body(Full::new(Bytes::from_static(b"hello"))).unwrap();
    assert_eq!(allocations(&mut service, put), 0);
}

#[test]
fn nor_does_one_of_any_clone_type() {
    #[derive(Clone)]
    struct Echo;
    impl Service<u64> for Echo {
        type Response = u64;
        type Error = BoxError;
        type Future = Ready<Result<u64, BoxError>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, n: u64) -> Self::Future {
            ready(Ok(n))
        }
    }
    fn judge(result: Result<&u64, &BoxError>) -> Outcome {
        result.map_or(Outcome::failure(), |_| Outcome::success())
    }
    let mut service = RetryLayer::http().classify(judge).layer(Echo);
    assert_eq!(allocations(&mut service, || 7), 0);
}
