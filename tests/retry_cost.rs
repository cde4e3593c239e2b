//! What a call costs that is not retried, against tower's own retry with its budget.
#![cfg(feature = "retry")]

use std::{
    convert::Infallible,
    future::{Future, Ready, ready},
    hint::black_box,
    pin::pin,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use buttress::RetryLayer;
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Empty;
use tokio::time::Instant;
use tower::{
    Layer, Service,
    retry::{
        Policy, Retry,
        budget::{Budget, TpsBudget},
    },
};

type Call = Request<Empty<Bytes>>;
type Answer = Response<Empty<Bytes>>;

#[derive(Clone)]
struct Plain;

impl<B> Service<Request<B>> for Plain {
    type Response = Answer;
    type Error = Infallible;
    type Future = Ready<Result<Answer, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        black_box(request);
        ready(Ok(Response::new(Empty::new())))
    }
}

/// What tower's documentation shows: retry while the budget says so, pay in what was good.
#[derive(Clone)]
struct Theirs(Arc<TpsBudget>);

impl Policy<Call, Answer, Infallible> for Theirs {
    type Future = Ready<()>;

    fn retry(
        &mut self,
        _: &mut Call,
        result: &mut Result<Answer, Infallible>,
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

fn request() -> Call {
    let request = Request::get("/orders/1").header("accept", "application/json");
    request.header("x-request-id", "0123456789").body(Empty::new()).unwrap()
}

/// How long so many calls take, each of which is answered at once.
fn calls<S: Service<Call>>(service: &mut S, calls: usize) -> Duration {
    let requests: Vec<_> = (0..calls).map(|_| request()).collect();
    let mut cx = Context::from_waker(Waker::noop());
    let start = Instant::now();
    for request in requests {
        assert!(service.poll_ready(&mut cx).is_ready());
        let mut future = pin!(service.call(request));
        assert!(black_box(future.as_mut().poll(&mut cx)).is_ready());
    }
    start.elapsed()
}

/// In turns, so that whatever else the machine does meets both.
#[test]
fn retry_costs_a_call_that_is_not_retried_no_more_than_towers() {
    let budget = TpsBudget::new(Duration::from_secs(10), 10, 0.2);
    let mut theirs = Retry::new(Theirs(Arc::new(budget)), Plain);
    let mut ours = RetryLayer::http().layer(Plain);
    let mut ratios: Vec<f64> = (0..61)
        .map(|_| calls(&mut ours, 500).as_secs_f64() / calls(&mut theirs, 500).as_secs_f64())
        .collect();
    ratios.sort_by(f64::total_cmp);
    let median = ratios[ratios.len() / 2];
    println!("{median:.2} times what tower's costs (from {:.2} to {:.2})", ratios[0], ratios[60]);
    // Measured: 1.2 as it is, 0.7 optimized, where no abstraction costs.
    let most = if cfg!(debug_assertions) { 1.8 } else { 1.0 };
    assert!(median <= most, "{median:.2} times what tower's costs");
}
