//! The allocations of a call that is not retried, alone and compared with the retry of tower.
//!
//! The benchmark of overhead counts the other costs: instructions and atomic operations.

use std::{
    convert::Infallible,
    future::{Future, Ready, ready},
    hint::black_box,
    pin::pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use allocation_counter::measure;
use buttress::{BoxError, Outcome, RetryLayer, retry::ReplayBody};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use http_body::Body;
use http_body_util::{Empty, Full};
use tower::{
    Layer, Service,
    retry::{
        Policy, Retry,
        budget::{Budget, TpsBudget},
    },
};

/// Counts the allocations of the second call on a service.
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
fn a_call_that_is_not_retried_allocates_nothing() {
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
fn a_call_that_matches_no_retry_rule_of_the_user_allocates_nothing() {
    let layer = RetryLayer::http().retry_on(http::StatusCode::CONFLICT);
    let mut service = layer.retry_if(|seen| (seen.attempt() > 9).then_some(true)).layer(Plain(200));
    let get = || Request::get("/").body(Empty::<Bytes>::new()).unwrap();
    assert_eq!(allocations(&mut service, get), 0);
}

/// A URI made from a `String`, as in most clients. A URI without an authority has an unshared buffer, which its first
/// clone converts to a shared one.
#[test]
fn a_uri_made_at_run_time_costs_what_its_first_clone_costs() {
    let mut service = RetryLayer::http().layer(Plain(200));
    for (uri, cost) in [("http://127.0.0.1:8080/a", 0), ("/a/b?c=d", 1)] {
        let get = || Request::get(uri.to_owned()).body(Empty::<Bytes>::new()).unwrap();
        let fresh = get();
        assert_eq!(measure(|| drop(black_box(fresh.uri().clone()))).count_total, cost, "{uri}");
        assert_eq!(allocations(&mut service, get), cost, "{uri}");
    }
}

/// The layer saves the headers, because the call consumes the request.
#[test]
fn headers_cost_one_allocation_half_of_what_a_clone_costs() {
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
    // A layer with one attempt saves the headers, too, for a transparent retry.
    let mut service = RetryLayer::http().attempts(1).layer(Plain(200));
    assert_eq!(allocations(&mut service, request), 1);
    // A layer that never repeats a request saves nothing.
    let mut service = RetryLayer::http().attempts(0).layer(Plain(200));
    assert_eq!(allocations(&mut service, request), 0);
    let put = || Request::put("/").body(Full::new(Bytes::from_static(b"hello"))).unwrap();
    assert_eq!(allocations(&mut service, put), 0);
}

#[test]
fn a_call_of_any_clone_type_that_is_not_retried_allocates_nothing() {
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
    let mut service = RetryLayer::new().classify(judge).layer(Echo);
    assert_eq!(allocations(&mut service, || 7), 0);
}

// ===== The retry of tower =====

type Call = Request<Full<Bytes>>;

/// The policy in the documentation of tower: it retries while the budget permits it, and deposits for each success.
#[derive(Clone, Default)]
struct Theirs(Arc<TpsBudget>);

impl Policy<Call, Response<Full<Bytes>>, Infallible> for Theirs {
    type Future = Ready<()>;

    fn retry(
        &mut self,
        _: &mut Call,
        result: &mut Result<Response<Full<Bytes>>, Infallible>,
    ) -> Option<Ready<()>> {
        match result {
            Ok(answer) if answer.status().is_server_error() => self.0.withdraw().then(|| ready(())),
            _ => {
                self.0.deposit();
                None
            }
        }
    }

    fn clone_request(&mut self, request: &Call) -> Option<Call> {
        Some(request.clone())
    }
}

/// A service that reads the request body, as a client does.
#[derive(Clone)]
struct Reads;

impl<B: Body> Service<Request<B>> for Reads {
    type Response = Response<Full<Bytes>>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let (mut body, mut cx) = (pin!(request.into_body()), Context::from_waker(Waker::noop()));
        while let Poll::Ready(Some(Ok(frame))) = body.as_mut().poll_frame(&mut cx) {
            black_box(frame.is_data());
        }
        ready(Ok(Response::default()))
    }
}

#[test]
fn a_call_that_is_not_retried_allocates_no_more_than_under_towers_retry() {
    let shared = Bytes::from(vec![b'x'; 1024]);
    drop(shared.clone());
    for (headers, body) in [(0, ""), (1, ""), (6, ""), (30, ""), (6, "a body")] {
        let request = || {
            let body = if body.is_empty() { Bytes::new() } else { shared.clone() };
            let mut request = Request::put("/").body(Full::new(body)).unwrap();
            for n in 0..headers {
                // A header name that is allocated for this request, as in most requests.
                let name = HeaderName::try_from(format!("x-header-{n}")).unwrap();
                request.headers_mut().insert(name, HeaderValue::from(n));
            }
            request
        };
        let ours = allocations(&mut RetryLayer::http().layer(Reads), request);
        let theirs = allocations(&mut Retry::new(Theirs::default(), Reads), request);
        println!(
            "{headers} headers, {} bytes: {ours} allocations, tower makes {theirs}",
            request().body().size_hint().lower()
        );
        assert!(ours <= theirs, "{headers} headers: {ours} allocations, tower makes {theirs}");
    }
}
