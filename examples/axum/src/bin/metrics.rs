//! A page of metrics for Prometheus. The handler makes it from the snapshots of the layers, so that calls pay no cost
//! for it.
//!
//! ```text
//! cargo run -p axum-examples --bin metrics
//! ```

use std::{fmt::Write, time::Duration};

use axum::{Router, routing::get};
use buttress::{
    BoxError, CircuitBreakerLayer, ConcurrencyLimitLayer, RespondLayer, RetryLayer,
    breaker::{CircuitBreakerHandle, CircuitState},
    limit::ConcurrencyLimitHandle,
    retry::RetryHandle,
};
use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tokio::net::TcpListener;
use tower::{ServiceBuilder, ServiceExt};

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    // Ends the example also if a call hangs.
    tokio::time::timeout(Duration::from_secs(20), tour()).await?
}

/// The handles of the layers. A handle is cheap to clone, and keeps the state of its layer alive.
#[derive(Clone)]
struct Watched {
    front: ConcurrencyLimitHandle,
    search: CircuitBreakerHandle,
    retries: RetryHandle,
}

impl Watched {
    fn page(&self) -> String {
        let mut page = String::new();
        let mut say = |name: &str, kind: &str, rows: &[(&str, f64)]| {
            let _ = writeln!(page, "# TYPE buttress_{name} {kind}");
            for (labels, value) in rows {
                let _ = writeln!(page, "buttress_{name}{{{labels}}} {value}");
            }
        };
        let front = self.front.snapshot();
        let of = |what: &str| format!("name=\"front\",{what}");
        let full = of("reason=\"limit_reached\"");
        let waited = of("reason=\"queue_timeout\"");
        let late = of("reason=\"deadline_passed\"");
        say("limit", "gauge", &[("name=\"front\"", front.limit.into())]);
        say("in_flight", "gauge", &[("name=\"front\"", front.in_flight.into())]);
        say("queue_depth", "gauge", &[("name=\"front\"", front.waiting.into())]);
        say(
            "shed_total",
            "counter",
            &[
                (&full, front.rejected_full as f64),
                (&waited, front.rejected_waited as f64),
                (&late, front.rejected_deadline as f64),
            ],
        );

        // A series per state, of which one is 1, is easier to query than a number that encodes the state.
        let search = self.search.snapshot();
        let states = [
            CircuitState::Closed,
            CircuitState::HalfOpen,
            CircuitState::Open,
            CircuitState::ForcedOpen,
            CircuitState::ForcedClosed,
        ];
        let rows = states.map(|state| {
            let labels = format!("name=\"search\",state=\"{}\"", state.as_str());
            (labels, f64::from(u8::from(state == search.state)))
        });
        say("breaker_state", "gauge", &rows.each_ref().map(|(labels, value)| (&**labels, *value)));
        say("breaker_opened_total", "counter", &[("name=\"search\"", search.opened as f64)]);
        say("breaker_refused_total", "counter", &[("name=\"search\"", search.rejected as f64)]);

        let retries = self.retries.snapshot();
        let balance = retries.budget_balance.unwrap_or(f64::INFINITY);
        say("retries_total", "counter", &[("name=\"search\"", retries.retries as f64)]);
        say("retry_budget_remaining", "gauge", &[("name=\"search\"", balance)]);
        page
    }
}

async fn tour() -> Result<(), BoxError> {
    let front = ConcurrencyLimitLayer::new(100).name("front");
    let breaker = CircuitBreakerLayer::http().name("search");
    let retry = RetryLayer::http().name("search");
    let watched =
        Watched { front: front.handle(), search: breaker.handle(), retries: retry.handle() };

    let pages = watched.clone();
    let app = Router::new()
        .route("/search", get(async || StatusCode::SERVICE_UNAVAILABLE))
        .layer(front.respond())
        // Outside of the limit, because the metrics are needed most when the limit is full.
        .route("/metrics", get(async move || pages.page()));
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}", listener.local_addr()?);
    tokio::spawn(async move { axum::serve(listener, app).await });

    let bare: Client<_, Empty<Bytes>> = Client::builder(TokioExecutor::new()).build_http();
    let client = ServiceBuilder::new()
        .layer(RespondLayer::new())
        .layer(retry)
        .layer(breaker)
        .service(Client::builder(TokioExecutor::new()).build_http());
    for _ in 0..5 {
        let request = Request::get(format!("{url}/search")).body(Empty::<Bytes>::new())?;
        println!("search responds with {}", client.clone().oneshot(request).await?.status());
    }
    let page = bare.get(format!("{url}/metrics").parse()?).await?.into_body().collect().await?;
    let page = String::from_utf8(page.to_bytes().to_vec())?;
    println!("\n{page}");
    if page.contains("buttress_breaker_state{name=\"search\",state=\"open\"} 1") {
        return Ok(());
    }
    Err("the circuit should be open by now".into())
}
