//! Prints a table of the decisions of the retry layer for many kinds of failures, over real connections.
//!
//! ```text
//! cargo run -p check-examples --bin retry_decisions
//! ```
//!
//! Each row is one call to a server of its own, which fails the first attempt. The exit code is 1 if a decision differs
//! from the documentation.

use std::{
    io,
    net::SocketAddr,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use buttress::{
    Attempts, BoxError, CircuitBreakerLayer, ConcurrencyLimitLayer, Deadline, RetryBudget,
    RetryLayer,
    retry::{Backoff, GiveUpReason, ReplayBody},
};
use bytes::Bytes;
use futures_util::future::join_all;
use http::{Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Full};
use hyper_util::{
    client::legacy::Client,
    rt::{TokioExecutor, TokioIo},
};
use tokio::net::{TcpListener, TcpStream};
use tower::{Layer, ServiceBuilder, ServiceExt};

// ===== Rows =====

#[derive(Clone, Copy, PartialEq)]
enum Failure {
    /// No listener on the port.
    Refused,
    /// HTTP/2: the server refuses the stream before it processes the request.
    RefusedStream,
    /// The server reads the request and closes the connection.
    Cut,
    /// No response within the timeout of an attempt, 200 ms.
    Silent,
    Status(u16),
    /// 503, with a `Retry-After` in seconds.
    RetryAfter(&'static str),
    /// The same 503, for a call with a deadline in 5 s.
    Late(&'static str),
    /// 503, with an empty retry budget.
    Broke,
    /// `UNAVAILABLE`, for `RetryLayer::grpc`.
    Unavailable,
    /// The same, with a pushback.
    Pushback(&'static str),
    /// A response with this status and this header.
    Header(u16, &'static str, &'static str),
    /// A status that the layer lists as unprocessed.
    Unprocessed(u16),
    /// A gRPC status, and a pushback that forbids the retry.
    Forbidden(&'static str),
    /// Two values of pushback.
    TwoPushbacks,
    /// The host name has no address.
    NoAddress,
    /// An inner circuit breaker is open.
    OpenCircuit,
    /// An inner limit is full.
    FullLimit,
}

#[derive(Clone, Copy)]
enum How {
    Get,
    Put,
    Post,
    PostWithKey,
}

/// The documented decision: a retry with or without a withdrawal from the retry budget, or the reason of the stop.
type Decision = Result<Charged, GiveUpReason>;
#[derive(Clone, Copy, Debug, PartialEq)]
enum Charged {
    Yes,
    No,
}

const SHORT: usize = 5;
/// Larger than the maximum that is saved for a replay.
const LONG: usize = 100 * 1024;

fn rows() -> Vec<(Failure, How, usize, Decision)> {
    use Charged::{No, Yes};
    use Failure::*;
    use How::*;
    vec![
        (Refused, Get, 0, Ok(Yes)),
        (Refused, Post, SHORT, Ok(Yes)),
        (Refused, Post, LONG, Ok(Yes)),
        (RefusedStream, Get, 0, Ok(No)),
        (RefusedStream, Post, SHORT, Ok(No)),
        (Cut, Get, 0, Ok(No)),
        (Cut, Put, SHORT, Ok(No)),
        (Cut, Put, LONG, Err(GiveUpReason::BodyGone)),
        (Cut, Post, 0, Err(GiveUpReason::Unsafe)),
        (Cut, Post, SHORT, Err(GiveUpReason::Unsafe)),
        (Cut, PostWithKey, SHORT, Ok(No)),
        (Silent, Get, 0, Ok(Yes)),
        (Silent, Post, SHORT, Err(GiveUpReason::Unsafe)),
        (Status(503), Get, 0, Ok(Yes)),
        (Status(503), Put, SHORT, Ok(Yes)),
        (Status(503), Put, LONG, Err(GiveUpReason::BodyGone)),
        (Status(503), Post, SHORT, Err(GiveUpReason::Unsafe)),
        (Status(503), PostWithKey, SHORT, Ok(Yes)),
        (Status(429), Get, 0, Ok(Yes)),
        (Status(408), Get, 0, Ok(Yes)),
        (Status(500), Get, 0, Err(GiveUpReason::Responded)),
        (Status(501), Get, 0, Err(GiveUpReason::Responded)),
        (Status(404), Get, 0, Err(GiveUpReason::Responded)),
        (RetryAfter("1"), Get, 0, Ok(Yes)),
        (RetryAfter("1"), Post, 0, Err(GiveUpReason::Unsafe)),
        (RetryAfter("60"), Get, 0, Err(GiveUpReason::DelayTooLong)),
        (Late("10"), Get, 0, Err(GiveUpReason::DeadlineTooNear)),
        (Late("0"), Get, 0, Ok(Yes)),
        (Broke, Get, 0, Err(GiveUpReason::BudgetUsedUp)),
        (Unavailable, Post, SHORT, Ok(Yes)),
        (Pushback("20"), Post, SHORT, Ok(Yes)),
        (Pushback("-1"), Post, SHORT, Err(GiveUpReason::Pushback)),
        (OpenCircuit, Get, 0, Err(GiveUpReason::Rejected)),
        (FullLimit, Get, 0, Err(GiveUpReason::Rejected)),
        (Header(503, "retry-after", "0.02"), Get, 0, Ok(Yes)),
        (Header(429, "x-ms-retry-after-ms", "20"), Get, 0, Ok(Yes)),
        (Header(429, "x-ratelimit-reset-after", "0.02"), Get, 0, Ok(Yes)),
        (Header(503, "x-envoy-ratelimited", "true"), Get, 0, Err(GiveUpReason::RateLimited)),
        (Unprocessed(429), Post, SHORT, Ok(Yes)),
        (Unprocessed(529), Post, SHORT, Ok(Yes)),
        (Status(429), Post, SHORT, Err(GiveUpReason::Unsafe)),
        (Status(529), Get, 0, Ok(Yes)),
        (Status(522), Get, 0, Ok(Yes)),
        (Status(522), Post, SHORT, Err(GiveUpReason::Unsafe)),
        (Status(425), Post, SHORT, Ok(No)),
        (Status(421), Get, 0, Ok(Yes)),
        (Status(421), Post, SHORT, Err(GiveUpReason::Unsafe)),
        (NoAddress, Post, SHORT, Ok(Yes)),
        (TwoPushbacks, Post, SHORT, Err(GiveUpReason::Pushback)),
        (Forbidden("3"), Post, SHORT, Err(GiveUpReason::Pushback)),
    ]
}

impl Failure {
    fn name(self) -> String {
        match self {
            Self::Refused => "connection refused".into(),
            Self::RefusedStream => "REFUSED_STREAM".into(),
            Self::Cut => "closed without a response".into(),
            Self::Silent => "no response in time".into(),
            Self::Status(status) => status.to_string(),
            Self::RetryAfter(seconds) => format!("503, Retry-After: {seconds}"),
            Self::Late(seconds) => format!("503, Retry-After: {seconds}, 5 s left"),
            Self::Broke => "503, budget empty".into(),
            Self::Unavailable => "gRPC UNAVAILABLE".into(),
            Self::Pushback(ms) => format!("gRPC UNAVAILABLE, pushback {ms}"),
            Self::Header(status, name, value) => format!("{status}, {name}: {value}"),
            Self::Unprocessed(status) => format!("{status}, listed as unprocessed"),
            Self::Forbidden(code) => format!("gRPC status {code}, pushback -1"),
            Self::TwoPushbacks => "gRPC UNAVAILABLE, two pushbacks".into(),
            Self::NoAddress => "host name without an address".into(),
            Self::OpenCircuit => "rejected by an open circuit".into(),
            Self::FullLimit => "rejected by a full limit".into(),
        }
    }

    fn is_grpc(self) -> bool {
        let with_pushback =
            matches!(self, Self::Pushback(_) | Self::Forbidden(_) | Self::TwoPushbacks);
        self == Self::Unavailable || with_pushback
    }

    /// Returns the response to the first attempt. `None` if there is no response.
    fn answer(self) -> Option<Response<Full<Bytes>>> {
        let answer = Response::builder();
        let grpc = || Response::builder().header("content-type", "application/grpc");
        let answer = match self {
            Self::Status(status) => answer.status(status),
            Self::Broke => answer.status(503),
            Self::RetryAfter(seconds) | Self::Late(seconds) => {
                answer.status(503).header("retry-after", seconds)
            }
            Self::Unavailable => grpc().header("grpc-status", "14"),
            Self::Pushback(ms) => {
                grpc().header("grpc-status", "14").header("grpc-retry-pushback-ms", ms)
            }
            Self::Header(status, name, value) => answer.status(status).header(name, value),
            Self::Unprocessed(status) => answer.status(status),
            Self::Forbidden(code) => {
                grpc().header("grpc-status", code).header("grpc-retry-pushback-ms", "-1")
            }
            Self::TwoPushbacks => grpc()
                .header("grpc-status", "14")
                .header("grpc-retry-pushback-ms", "20")
                .header("grpc-retry-pushback-ms", "20"),
            Self::Refused
            | Self::RefusedStream
            | Self::Cut
            | Self::Silent
            | Self::NoAddress
            | Self::OpenCircuit
            | Self::FullLimit => return None,
        };
        answer.body(Full::default()).ok()
    }
}

impl How {
    fn name(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Put => "PUT",
            Self::Post => "POST",
            Self::PostWithKey => "POST with key",
        }
    }

    fn request(self, addr: SocketAddr, body: usize) -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::from(vec![b'x'; body]));
        *request.method_mut() = match self {
            Self::Get => Method::GET,
            Self::Put => Method::PUT,
            Self::Post | Self::PostWithKey => Method::POST,
        };
        *request.uri_mut() = format!("http://{addr}/").parse().expect("an address is an authority");
        if let Self::PostWithKey = self {
            request.headers_mut().insert("idempotency-key", http::HeaderValue::from_static("k-1"));
        }
        request
    }
}

// ===== Call =====

struct Told {
    attempts: Attempts,
    charged: bool,
}

async fn call(failure: Failure, method: How, body: usize) -> Result<Told, BoxError> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let addr = listener.local_addr()?;
    if failure == Failure::Refused {
        drop(listener);
    } else {
        tokio::spawn(serve(listener, failure));
    }
    let client = Client::builder(TokioExecutor::new())
        .http2_only(failure == Failure::RefusedStream)
        .build_http::<ReplayBody<Full<Bytes>>>();
    let breaker = CircuitBreakerLayer::http();
    if failure == Failure::OpenCircuit {
        breaker.handle().force_open();
    }
    let limit = ConcurrencyLimitLayer::new(1);
    let permit = match failure {
        Failure::FullLimit => Some(limit.handle().try_acquire()?),
        _ => None,
    };
    let budget = RetryBudget::with(0.2, 0, 100);
    // The deposits allow a few retries.
    let deposits = if failure == Failure::Broke { 0 } else { 50 };
    (0..deposits).for_each(|_| budget.deposit());
    let retry = if failure.is_grpc() { RetryLayer::grpc() } else { RetryLayer::http() };
    // Without jitter the delays are the same in every run.
    let backoff = Backoff::exponential(Duration::from_millis(10)).without_jitter();
    let mut retry = retry.backoff(backoff).budget(budget.clone());
    if failure == Failure::Silent {
        retry = retry.attempt_timeout(Duration::from_millis(200));
    }
    if let Failure::Unprocessed(status) = failure {
        retry = retry.unprocessed([StatusCode::from_u16(status)?]);
    }
    let retry = retry.checked()?;
    let before = budget.balance();
    let client = ServiceBuilder::new().layer(retry).service(breaker.layer(limit.layer(client)));
    let mut request = method.request(addr, body);
    if failure == Failure::NoAddress {
        *request.uri_mut() = Uri::from_static("http://nothing.invalid/");
    }
    if let Failure::Late(_) = failure {
        request.extensions_mut().insert(Deadline::after(Duration::from_secs(5)));
    }
    let call = client.oneshot(request);
    let attempts = match tokio::time::timeout(Duration::from_secs(10), call).await? {
        Ok(response) => Attempts::of(&response),
        Err(error) => Attempts::find(&*error).ok_or(error)?,
    };
    drop(permit);
    // The deposit of the call itself is a fifth of a withdrawal.
    Ok(Told { attempts, charged: budget.balance() < before })
}

/// Fails the first request, and responds with 200 to the others.
async fn serve(listener: TcpListener, failure: Failure) {
    let failed = Arc::new(AtomicBool::new(false));
    while let Ok((tcp, _)) = listener.accept().await {
        if failure == Failure::RefusedStream {
            tokio::spawn(refuse_first_stream(tcp));
            continue;
        }
        let failed = failed.clone();
        let answers = hyper::service::service_fn(move |request: Request<hyper::body::Incoming>| {
            let first = !failed.swap(true, Ordering::Relaxed);
            async move {
                request.into_body().collect().await.map_err(io::Error::other)?;
                if first && failure == Failure::Silent {
                    std::future::pending::<()>().await;
                }
                let answer = if first { failure.answer() } else { Some(Response::default()) };
                answer.ok_or_else(|| io::Error::other("no response"))
            }
        });
        let connection = hyper::server::conn::http1::Builder::new();
        tokio::spawn(connection.serve_connection(TokioIo::new(tcp), answers));
    }
}

async fn refuse_first_stream(tcp: TcpStream) -> Result<(), h2::Error> {
    let mut connection = h2::server::handshake(tcp).await?;
    let mut first = true;
    while let Some(stream) = connection.accept().await {
        let (_, mut respond) = stream?;
        if std::mem::take(&mut first) {
            respond.send_reset(h2::Reason::REFUSED_STREAM);
        } else {
            respond.send_response(Response::default(), true)?;
        }
    }
    Ok(())
}

// ===== Table =====

fn size(body: usize) -> String {
    match body {
        0 => "none".into(),
        SHORT => format!("{body} B"),
        _ => format!("{} KiB", body / 1024),
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let line = |cells: [&str; 5]| {
        let [failure, method, body, decision, reason] = cells;
        println!("{failure:<32} {method:<14} {body:<8} {decision:<8} {reason}");
    };
    line(["failure", "method", "body", "retry?", "reason"]);
    let calls = rows().into_iter().map(|row| async move { (row, call(row.0, row.1, row.2).await) });
    let mut wrong = 0;
    for ((failure, method, body, documented), told) in join_all(calls).await {
        let (decision, mut reason) = match told {
            Ok(Told { attempts, charged }) if attempts.made > 1 => {
                let by = if charged { Charged::Yes } else { Charged::No };
                let budget = if charged { "charged" } else { "not charged" };
                // The outcome of the first attempt, and the delay after it.
                let told = attempts.records().first().map_or("not recorded".into(), |first| {
                    format!("{:?}: after {} ms", first.outcome.reason(), first.waited.as_millis())
                });
                (Some(Ok(by)), format!("{told}, {budget}"))
            }
            Ok(Told { attempts, .. }) => (Some(Err(attempts.stop)), attempts.stop.to_string()),
            Err(error) => (None, error.to_string()),
        };
        if decision != Some(documented) {
            wrong += 1;
            reason.push_str(&format!(" (documented: {documented:?})"));
        }
        let again = if let Some(Ok(_)) = decision { "yes" } else { "no" };
        line([&failure.name(), method.name(), &size(body), again, &reason]);
    }
    println!("{wrong} rows differ from the documentation");
    if wrong == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
