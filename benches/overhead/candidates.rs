//! Who is measured: bare services, the peers, and ours.

use std::{
    convert::Infallible,
    fmt,
    future::{Ready, ready},
    hint::black_box,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use buttress::{
    CircuitBreakerLayer, ConcurrencyLimitLayer, HealthProbeLayer, Outcome, RetryLayer,
    TimeoutLayer, Trip,
    call::{PerResponse, Protocol},
    limit::adaptive::Knee,
};
use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use http_body_util::{Empty, Full};
use tower::{
    Layer, Service,
    retry::{
        Policy,
        budget::{Budget, TpsBudget},
    },
};

/// Makes so many calls.
pub type Run = Box<dyn FnMut(u64) + Send>;

pub struct Candidate {
    /// `peer/what`, or `buttress/what`.
    pub name: &'static str,
    /// The figure's name, for ours.
    pub case: Option<&'static str>,
    /// What the cost is added to.
    pub over: &'static str,
    /// What it is compared with, in the same run.
    pub peers: &'static [&'static str],
    /// Makes it, warm.
    pub make: fn() -> Made,
}

pub struct Made {
    pub run: Run,
    /// The same on a clone of the service, for a second thread.
    pub clone: Option<Run>,
    /// Bytes of the service and of its future.
    pub sizes: (usize, usize),
}

#[derive(Debug)]
pub struct Oops;

impl fmt::Display for Oops {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("oops")
    }
}

impl std::error::Error for Oops {}

/// Answers at once.
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

/// Answers at once, over HTTP's types.
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

/// Readies, calls and polls, as an executor would.
fn drive<S>(mut service: S) -> impl FnMut(u64) + Send
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

fn drive_http<S, B>(mut service: S) -> impl FnMut(u64) + Send
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

// ===== Ours =====

fn judged<M>(
    layer: CircuitBreakerLayer<M>,
) -> CircuitBreakerLayer<impl Protocol<u64, u64, Oops, Response = u64>> {
    layer.classify(|result: Result<&u64, &Oops>| match result {
        Ok(_) => Outcome::success(),
        Err(_) => Outcome::failure(),
    })
}

fn count_rule(calls: u32) -> Trip {
    Trip::failure_ratio(0.5).over(calls).min_calls(20.min(calls))
}

fn ours_breaker(trip: Trip) -> impl Service<u64> + Clone + Send {
    let service = judged(CircuitBreakerLayer::new(trip)).layer(Bare);
    // Full windows, as in a service that has been up for a minute.
    drive(service.clone())(1_000_100);
    service
}

fn ours_limit() -> impl Service<u64> + Clone + Send {
    ConcurrencyLimitLayer::new(100).per_response().layer(Bare)
}

fn ours_adaptive() -> impl Service<u64> + Clone + Send {
    ConcurrencyLimitLayer::adaptive(Knee::default()).per_response().layer(Bare)
}

fn ours_retry() -> impl Service<u64> + Clone + Send {
    let service = RetryLayer::http()
        .classify(|result: Result<&u64, &Oops>| match result {
            Ok(_) => Outcome::success(),
            Err(_) => Outcome::failure(),
        })
        .layer(Bare);
    // The budget is full, as in a service that has been up for a minute.
    drive(service.clone())(10_000);
    service
}

fn ours_probe() -> HealthProbeLayer<buttress::health::Ask<impl Fn() -> u64 + Clone>, PerResponse> {
    HealthProbeLayer::new(|| 0)
}

fn ours_stack() -> impl Service<u64> + Clone + Send {
    let fails = |result: Result<&u64, &buttress::BoxError>| match result {
        Ok(_) => Outcome::success(),
        Err(_) => Outcome::failure(),
    };
    let service = RetryLayer::http().classify(fails).layer(
        CircuitBreakerLayer::new(count_rule(100))
            .classify(fails)
            .layer(ConcurrencyLimitLayer::new(100).per_response().layer(ours_probe().layer(Bare))),
    );
    drive(service.clone())(10_000);
    service
}

fn ours_open() -> impl Service<u64> + Clone + Send {
    let layer = judged(CircuitBreakerLayer::http().open_for(Duration::from_secs(3600)));
    layer.handle().record_failures(5);
    layer.layer(Bare)
}

trait RecordFailures {
    fn record_failures(&self, count: usize);
}

impl RecordFailures for buttress::breaker::CircuitBreakerHandle {
    fn record_failures(&self, count: usize) {
        for _ in 0..count {
            self.record(Outcome::failure());
        }
    }
}

/// Never answers.
#[derive(Clone)]
struct Stuck;

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

/// Answers at the second look.
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

fn ours_timeout<S>(inner: S) -> impl Service<u64> + Clone + Send
where
    S: Service<u64, Response = u64, Error = Oops> + Clone + Send,
{
    TimeoutLayer::http().per_response().layer(inner)
}

fn tower_timeout<S: Clone + Send>(inner: S) -> tower::timeout::Timeout<S> {
    tower::timeout::Timeout::new(inner, Duration::from_secs(30))
}

/// Fills a limit of one for good.
fn filled<S: Service<u64> + Clone>(service: S) -> S
where
    S::Future: Send + 'static,
{
    let mut cx = Context::from_waker(Waker::noop());
    let mut first = service.clone();
    while first.poll_ready(&mut cx).is_pending() {}
    let mut call = Box::pin(first.call(0));
    assert!(call.as_mut().poll(&mut cx).is_pending());
    // Held to the end of the process: the place never comes back.
    std::mem::forget(call);
    service
}

fn ours_full() -> impl Service<u64> + Clone + Send {
    filled(ConcurrencyLimitLayer::new(1).per_response().layer(Stuck))
}

// ===== Peers =====

#[derive(Clone)]
struct Budgeted(Arc<TpsBudget>);

impl Policy<u64, u64, Oops> for Budgeted {
    type Future = Ready<()>;

    fn retry(&mut self, _: &mut u64, result: &mut Result<u64, Oops>) -> Option<Ready<()>> {
        match result {
            Ok(_) => {
                self.0.deposit();
                None
            }
            Err(_) => self.0.withdraw().then(|| ready(())),
        }
    }

    fn clone_request(&mut self, request: &u64) -> Option<u64> {
        Some(*request)
    }
}

fn tower_limit() -> impl Service<u64> + Clone + Send {
    tower::limit::GlobalConcurrencyLimitLayer::new(100).layer(Bare)
}

fn tower_retry() -> impl Service<u64> + Clone + Send {
    tower::retry::Retry::new(Budgeted(Arc::default()), Bare)
}

#[derive(Clone)]
struct BudgetedHttp(Arc<TpsBudget>);

type AnswerHttp = Result<Response<Full<Bytes>>, Infallible>;

impl Policy<Request<Empty<Bytes>>, Response<Full<Bytes>>, Infallible> for BudgetedHttp {
    type Future = Ready<()>;

    fn retry(
        &mut self,
        _: &mut Request<Empty<Bytes>>,
        result: &mut AnswerHttp,
    ) -> Option<Ready<()>> {
        match result {
            Ok(answer) if answer.status().is_server_error() => self.0.withdraw().then(|| ready(())),
            _ => {
                self.0.deposit();
                None
            }
        }
    }

    fn clone_request(&mut self, request: &Request<Empty<Bytes>>) -> Option<Request<Empty<Bytes>>> {
        Some(request.clone())
    }
}

fn tower_http_retry() -> tower::retry::Retry<BudgetedHttp, BareHttp> {
    tower::retry::Retry::new(BudgetedHttp(Arc::default()), BareHttp)
}

fn tower_full() -> impl Service<u64> + Clone + Send {
    let limited = filled(tower::limit::GlobalConcurrencyLimitLayer::new(1).layer(Stuck));
    tower::load_shed::LoadShed::new(limited)
}

mod resilience {
    pub(super) use tower_resilience::{
        adaptive::{AdaptiveLimiterLayer, Aimd},
        bulkhead::BulkheadLayer,
        circuitbreaker::{CircuitBreakerLayer, SlidingWindowType},
        retry::{RetryBudgetBuilder, RetryLayer},
    };
}
use resilience as tr;

fn tr_breaker(window: usize) -> impl Service<u64> + Clone + Send {
    let layer = tr::CircuitBreakerLayer::builder()
        .failure_rate_threshold(0.5)
        .sliding_window_size(window)
        .build()
        .unwrap();
    layer.layer(Bare)
}

fn tr_breaker_time() -> impl Service<u64> + Clone + Send {
    let layer = tr::CircuitBreakerLayer::builder()
        .failure_rate_threshold(0.5)
        .sliding_window_type(tr::SlidingWindowType::TimeBased)
        .sliding_window_duration(Duration::from_secs(1))
        .build()
        .unwrap();
    layer.layer(Bare)
}

fn tr_limit() -> impl Service<u64> + Clone + Send {
    tr::BulkheadLayer::builder().max_concurrent_calls(100).build().unwrap().layer(Bare)
}

fn tr_retry() -> impl Service<u64, Response = u64, Future: Send> + Clone + Send {
    let budget = tr::RetryBudgetBuilder::new().token_bucket().build().unwrap();
    let layer = tr::RetryLayer::<u64, u64, Oops>::builder().max_attempts(3).budget(budget).build();
    layer.layer(Bare)
}

fn tr_adaptive() -> impl Service<u64> + Clone + Send {
    tr::AdaptiveLimiterLayer::new(tr::Aimd::builder().build().unwrap()).layer(Bare)
}

fn tr_stack() -> impl Service<u64> + Clone + Send {
    // Its errors are not `Clone`, nor is its own retry's bound met over them: retry goes innermost here.
    let retried = tr_retry();
    let limited = tr::BulkheadLayer::builder()
        .max_concurrent_calls(100)
        .build()
        .unwrap()
        .layer(Erase(retried));
    let breaker = tr::CircuitBreakerLayer::builder()
        .failure_rate_threshold(0.5)
        .sliding_window_size(100)
        .build()
        .unwrap();
    tr::AdaptiveLimiterLayer::new(tr::Aimd::builder().build().unwrap())
        .layer(breaker.layer(Erase(limited)))
}

/// Gives any service our error type, so that layers can be stacked whatever they ask of it.
#[derive(Clone)]
struct Erase<S>(S);

impl<S: Service<u64>> Service<u64> for Erase<S> {
    type Response = S::Response;
    type Error = Oops;
    type Future = futures_map::MapOops<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Oops>> {
        self.0.poll_ready(cx).map_err(|_| Oops)
    }

    fn call(&mut self, request: u64) -> Self::Future {
        futures_map::MapOops { future: self.0.call(request) }
    }
}

mod futures_map {
    use std::{
        future::Future,
        pin::Pin,
        task::{Context, Poll},
    };

    pin_project_lite::pin_project! {
        pub struct MapOops<F> {
            #[pin]
            pub(super) future: F,
        }
    }

    impl<T, E, F: Future<Output = Result<T, E>>> Future for MapOops<F> {
        type Output = Result<T, super::Oops>;

        fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
            self.project().future.poll(cx).map_err(|_| super::Oops)
        }
    }
}

fn shedder() -> impl Service<u64> + Clone + Send {
    little_loadshedder::LoadShed::new(Bare, 0.01, Duration::from_secs(1))
}

/// Breakers that are called with a closure.
fn failsafe() -> Run {
    use failsafe::CircuitBreaker;
    let breaker = failsafe::Config::new().build();
    Box::new(move |calls| {
        for request in 0..calls {
            black_box(breaker.call(|| Ok::<_, Oops>(black_box(request))).is_ok());
        }
    })
}

fn recloser() -> Run {
    let breaker = recloser::Recloser::default();
    Box::new(move |calls| {
        for request in 0..calls {
            black_box(breaker.call(|| Ok::<_, Oops>(black_box(request))).is_ok());
        }
    })
}

// ===== All of them =====

fn made<S: Service<u64> + Clone + Send + 'static>(service: S) -> Made {
    Made {
        sizes: (size_of::<S>(), size_of::<S::Future>()),
        clone: Some(Box::new(drive(service.clone()))),
        run: Box::new(drive(service)),
    }
}

fn made_http<S, B>(service: S) -> Made
where
    S: Service<Request<Empty<Bytes>>, Response = Response<B>> + Send + 'static,
    B: Body + 'static,
{
    Made {
        sizes: (size_of::<S>(), size_of::<S::Future>()),
        clone: None,
        run: Box::new(drive_http(service)),
    }
}

fn called(run: Run) -> Made {
    Made { sizes: (0, 0), clone: None, run }
}

fn peer(name: &'static str, make: fn() -> Made) -> Candidate {
    Candidate { name, case: None, over: "bare", peers: &[], make }
}

fn ours(
    name: &'static str,
    case: &'static str,
    peers: &'static [&'static str],
    make: fn() -> Made,
) -> Candidate {
    Candidate { name, case: Some(case), over: "bare", peers, make }
}

fn http(name: &'static str, case: Option<&'static str>, make: fn() -> Made) -> Candidate {
    Candidate { name, case, over: "bare/http", peers: &[], make }
}

/// Everybody.
pub fn all() -> Vec<Candidate> {
    const BREAKERS: &[&str] = &["tower-resilience/breaker", "recloser/breaker", "failsafe/breaker"];
    const TIMES: &[&str] = &["tower-resilience/breaker_time", "failsafe/breaker"];
    const LIMITS: &[&str] = &["tower-resilience/limit", "tower/limit"];
    const ADAPTIVES: &[&str] = &["tower-resilience/adaptive", "little-loadshedder/adaptive"];
    const RETRIES: &[&str] = &["tower-resilience/retry", "tower/retry"];
    vec![
        peer("bare", || made(Bare)),
        peer("tower-resilience/breaker", || made(tr_breaker(100))),
        peer("tower-resilience/breaker_time", || made(tr_breaker_time())),
        peer("failsafe/breaker", || called(failsafe())),
        peer("recloser/breaker", || called(recloser())),
        ours("buttress/breaker", "breaker", BREAKERS, || made(ours_breaker(count_rule(100)))),
        ours("buttress/breaker_consecutive", "breaker_consecutive", BREAKERS, || {
            made(ours_breaker(Trip::consecutive(5)))
        }),
        ours("buttress/breaker_time", "breaker_time", TIMES, || {
            made(ours_breaker(Trip::failure_ratio(0.5)))
        }),
        ours("buttress/breaker_coarse", "breaker_coarse", TIMES, || {
            made(ours_breaker(Trip::failure_ratio(0.5).coarse_clock()))
        }),
        ours("buttress/breaker_window_1000000", "breaker_window_1000000", BREAKERS, || {
            made(ours_breaker(count_rule(1_000_000)))
        }),
        peer("tower/limit", || made(tower_limit())),
        peer("tower-resilience/limit", || made(tr_limit())),
        peer("tower-resilience/adaptive", || made(tr_adaptive())),
        peer("little-loadshedder/adaptive", || made(shedder())),
        ours("buttress/limit", "limit", LIMITS, || made(ours_limit())),
        ours("buttress/adaptive", "adaptive", ADAPTIVES, || made(ours_adaptive())),
        peer("tower/retry", || made(tower_retry())),
        peer("tower-resilience/retry", || made(tr_retry())),
        ours("buttress/retry", "retry", RETRIES, || made(ours_retry())),
        peer("tower-resilience/stack4", || made(tr_stack())),
        ours("buttress/stack4", "stack4", &["tower-resilience/stack4"], || made(ours_stack())),
        ours("buttress/refused_open", "refused_open", &[], || made(ours_open())),
        peer("tower/refused_full", || made(tower_full())),
        ours(
            "buttress/refused_full",
            "refused_full",
            &["tower/refused_full"],
            || made(ours_full()),
        ),
        peer("tower/timeout", || made(tower_timeout(Bare))),
        ours("buttress/timeout", "timeout", &["tower/timeout"], || made(ours_timeout(Bare))),
        peer("bare/later", || made(Later)),
        Candidate {
            over: "bare/later",
            ..peer("tower/timeout_waits", || made(tower_timeout(Later)))
        },
        Candidate {
            over: "bare/later",
            ..ours("buttress/timeout_waits", "timeout_waits", &["tower/timeout_waits"], || {
                made(ours_timeout(Later))
            })
        },
        http("bare/http", None, || made_http(BareHttp)),
        http("buttress/http_breaker", Some("http_breaker"), || {
            made_http(CircuitBreakerLayer::http().layer(BareHttp))
        }),
        http("buttress/http_limit", Some("http_limit"), || {
            made_http(ConcurrencyLimitLayer::new(100).respond().layer(BareHttp))
        }),
        // A request that is no probe.
        http("buttress/http_endpoints", Some("http_endpoints"), || {
            made_http(buttress::Health::new().endpoints().layer(BareHttp))
        }),
        http("tower/http_retry", None, || made_http(tower_http_retry())),
        Candidate {
            peers: &["tower/http_retry"],
            ..http("buttress/http_retry", Some("http_retry"), || {
                made_http(RetryLayer::http().layer(BareHttp))
            })
        },
        http("buttress/http_timeout", Some("http_timeout"), || {
            made_http(TimeoutLayer::http().layer(BareHttp))
        }),
    ]
}
