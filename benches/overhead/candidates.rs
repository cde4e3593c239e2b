//! The candidates: bare services, the peers and this crate.

use buttress::{
    CircuitBreakerLayer, ConcurrencyLimitLayer, Health, RetryLayer, TimeoutLayer, Trip,
};
use tower::{Layer, util::BoxCloneSyncService};

use crate::{
    calls::{Bare, BareHttp, Later, Made, called, made, made_driven, made_http},
    ours, peers, uploads,
};

pub struct Candidate {
    /// `crate/layer`.
    pub name: &'static str,
    /// The name of the figure, for candidates of this crate.
    pub case: Option<&'static str>,
    /// The candidate without the layer, whose time is subtracted.
    pub over: &'static str,
    /// The candidates with which it is compared.
    pub peers: &'static [&'static str],
    /// Creates the candidate, warmed up.
    pub make: fn() -> Made,
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

impl Candidate {
    /// Sets the candidate without the layer.
    fn over(self, over: &'static str) -> Self {
        Self { over, ..self }
    }
}

fn boxed() -> BoxCloneSyncService<u64, u64, crate::calls::Oops> {
    BoxCloneSyncService::new(Bare)
}

/// Returns all candidates.
pub fn all() -> Vec<Candidate> {
    [breakers(), limits(), retries(), stacks(), refusing(), timeouts(), http(), uploads()]
        .into_iter()
        .flatten()
        .collect()
}

fn breakers() -> Vec<Candidate> {
    const PEERS: &[&str] = &["tower-resilience/breaker", "recloser/breaker", "failsafe/breaker"];
    const TIMES: &[&str] = &["tower-resilience/breaker_time", "failsafe/breaker"];
    vec![
        peer("bare", || made(Bare)),
        peer("tower-resilience/breaker", || made(peers::tr_breaker(100))),
        peer("tower-resilience/breaker_time", || made(peers::tr_breaker_time())),
        peer("failsafe/breaker", || called(peers::failsafe())),
        peer("recloser/breaker", || called(peers::recloser())),
        ours("buttress/breaker", "breaker", PEERS, || made(ours::count_breaker(100))),
        ours("buttress/breaker_consecutive", "breaker_consecutive", PEERS, || {
            made(ours::breaker(Trip::consecutive(5)))
        }),
        ours("buttress/breaker_time", "breaker_time", TIMES, || {
            made(ours::breaker(Trip::failure_ratio(0.5)))
        }),
        ours("buttress/breaker_coarse", "breaker_coarse", TIMES, || {
            made(ours::breaker(Trip::failure_ratio(0.5).coarse_clock()))
        }),
        ours("buttress/breaker_window_1000000", "breaker_window_1000000", PEERS, || {
            made(ours::count_breaker(1_000_000))
        }),
    ]
}

fn limits() -> Vec<Candidate> {
    const LIMITS: &[&str] = &["tower-resilience/limit", "tower/limit"];
    const ADAPTIVES: &[&str] = &["tower-resilience/adaptive", "little-loadshedder/adaptive"];
    vec![
        peer("tower/limit", || made(peers::tower_limit())),
        peer("tower-resilience/limit", || made(peers::tr_limit())),
        peer("tower-resilience/adaptive", || made(peers::tr_adaptive())),
        peer("little-loadshedder/adaptive", || made(peers::shedder())),
        peer("governor/rate", || called(peers::governor())),
        ours("buttress/limit", "limit", LIMITS, || made(ours::limit())),
        ours("buttress/adaptive", "adaptive", ADAPTIVES, || made(ours::adaptive())),
    ]
}

fn retries() -> Vec<Candidate> {
    const RETRIES: &[&str] = &["tower-resilience/retry", "tower/retry"];
    vec![
        peer("tower/retry", || made(peers::tower_retry())),
        peer("tower-resilience/retry", || made(peers::tr_retry())),
        ours("buttress/retry", "retry", RETRIES, || made(ours::retry())),
    ]
}

fn stacks() -> Vec<Candidate> {
    const STACKS: &[&str] = &["tower-resilience/stack4", "tower/stack3"];
    vec![
        peer("tower/stack3", || made(peers::tower_stack())),
        peer("tower-resilience/stack4", || made(peers::tr_stack())),
        ours("buttress/stack4", "stack4", STACKS, || made(ours::stack(Bare))),
        peer("bare/boxed", || made(boxed())),
        ours("buttress/stack4_boxed", "stack4_boxed", &[], || made(ours::stack(boxed())))
            .over("bare/boxed"),
        peer("bare/later", || made(Later)),
        ours("buttress/stack4_later", "stack4_later", &[], || made(ours::stack(Later)))
            .over("bare/later"),
    ]
}

fn refusing() -> Vec<Candidate> {
    const OPEN: &[&str] =
        &["tower-resilience/rejected_open", "recloser/rejected_open", "failsafe/rejected_open"];
    const FULL: &[&str] = &["tower-resilience/rejected_full", "tower/rejected_full"];
    vec![
        // Rejections on two threads at once leave some callers without a wake-up.
        peer("tower-resilience/rejected_open", || Made { clone: None, ..made(peers::tr_open()) }),
        peer("recloser/rejected_open", || called(peers::recloser_open())),
        peer("failsafe/rejected_open", || called(peers::failsafe_open())),
        ours("buttress/rejected_open", "rejected_open", OPEN, || made(ours::open())),
        peer("tower/rejected_full", || made(peers::tower_full())),
        peer("tower-resilience/rejected_full", || made_driven(peers::tr_full())),
        ours("buttress/rejected_full", "rejected_full", FULL, || made(ours::full())),
    ]
}

fn timeouts() -> Vec<Candidate> {
    vec![
        peer("tower/timeout", || made(peers::tower_timeout(Bare))),
        ours("buttress/timeout", "timeout", &["tower/timeout"], || made(ours::timeout(Bare))),
        peer("tower/timeout_waits", || made(peers::tower_timeout(Later))).over("bare/later"),
        ours("buttress/timeout_waits", "timeout_waits", &["tower/timeout_waits"], || {
            made(ours::timeout(Later))
        })
        .over("bare/later"),
    ]
}

fn http() -> Vec<Candidate> {
    let all = vec![
        peer("bare/http", || made_http(BareHttp)),
        ours("buttress/http_breaker", "http_breaker", &[], || {
            made_http(CircuitBreakerLayer::http().layer(BareHttp))
        }),
        ours("buttress/http_limit", "http_limit", &[], || {
            made_http(ConcurrencyLimitLayer::new(100).respond().layer(BareHttp))
        }),
        // A request to another path than the health routes.
        ours("buttress/http_endpoints", "http_endpoints", &[], || {
            made_http(Health::new().endpoints().layer(BareHttp))
        }),
        ours("buttress/http_lifecycle", "http_lifecycle", &[], || {
            let lifecycle = buttress::Lifecycle::without_signals(&Health::new());
            made_http(lifecycle.expect("in a runtime").layer().layer(BareHttp))
        }),
        peer("tower/http_retry", || made_http(peers::tower_http_retry())),
        ours("buttress/http_retry", "http_retry", &["tower/http_retry"], || {
            made_http(RetryLayer::http().layer(BareHttp))
        }),
        ours("buttress/http_timeout", "http_timeout", &[], || {
            made_http(TimeoutLayer::http().layer(BareHttp))
        }),
    ];
    all.into_iter().map(|candidate| candidate.over("bare/http")).collect()
}

fn uploads() -> Vec<Candidate> {
    vec![
        peer("bare/upload", uploads::bare),
        peer("tower/upload_retry", uploads::tower).over("bare/upload"),
        ours("buttress/upload_retry", "upload_retry", &["tower/upload_retry"], uploads::ours)
            .over("bare/upload"),
    ]
}
