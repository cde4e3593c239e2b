//! The layers around a service of your own request, response and error types: a database client of a library.
//!
//! ```text
//! cargo run -p offline-examples --bin own_types
//! ```

use std::{
    fmt,
    sync::atomic::{AtomicUsize, Ordering::SeqCst},
    time::Duration,
};

use buttress::{
    Attempts, Backoff, BoxError, CircuitBreakerLayer, ConcurrencyLimitLayer, Outcome, Rejected,
    RetryLayer, Trip,
};
use tower::{ServiceBuilder, ServiceExt, service_fn};

#[derive(Clone, Debug)]
struct Query(&'static str);

#[derive(Debug)]
struct Rows(usize);

#[derive(Debug)]
enum DbError {
    /// The query violates a constraint, which is not a failure of the database.
    Constraint,
    /// The connection is closed.
    Gone,
}

impl fmt::Display for DbError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Constraint => "constraint violated",
            Self::Gone => "connection is gone",
        })
    }
}

impl std::error::Error for DbError {}

/// Classifies a result for the retry and the breaker. An inner layer that rejects makes the error a [`BoxError`].
fn classify(result: Result<&Rows, &BoxError>) -> Outcome {
    let Err(error) = result else { return Outcome::success() };
    match error.downcast_ref() {
        Some(DbError::Constraint) => Outcome::success(),
        Some(DbError::Gone) => Outcome::failure(),
        // A rejection by an inner layer, or an error of another type.
        None => Outcome::of_error(&**error),
    }
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    // Ends the example also if a call hangs.
    tokio::time::timeout(Duration::from_secs(20), tour()).await?
}

async fn tour() -> Result<(), BoxError> {
    let breaker = CircuitBreakerLayer::new(Trip::consecutive(3)).classify(classify);
    let circuit = breaker.handle();
    let db = ServiceBuilder::new()
        .layer(
            RetryLayer::new()
                .backoff(Backoff::exponential(Duration::from_millis(5)))
                .classify(classify),
        )
        .layer(breaker)
        .layer(ConcurrencyLimitLayer::new(20).per_response())
        .service(service_fn(database));

    println!("A connection that is gone twice:");
    FAILURES_LEFT.store(2, SeqCst);
    let Rows(rows) = db.clone().oneshot(Query("select")).await?;
    println!("  {rows} rows after {} calls", CALLS.load(SeqCst));
    check(CALLS.load(SeqCst) == 3, "both failures were retried")?;

    println!("A query that violates a constraint:");
    let error = db.clone().oneshot(Query("insert")).await.unwrap_err();
    println!("  {error}");
    check(matches!(error.downcast_ref(), Some(DbError::Constraint)), "the error keeps its type")?;
    check(CALLS.load(SeqCst) == 4, "it was not retried")?;

    println!("A database that is down:");
    FAILURES_LEFT.store(usize::MAX, SeqCst);
    db.clone().oneshot(Query("select")).await.unwrap_err();
    println!("  the circuit is {:?}", circuit.state());
    let before = CALLS.load(SeqCst);
    let error = db.oneshot(Query("select")).await.unwrap_err();
    let rejected = Rejected::find(&*error).ok_or("not a rejection")?;
    println!("  {rejected}");
    check(CALLS.load(SeqCst) == before, "nothing was sent")?;
    check(
        Attempts::find(&*error).is_none_or(|attempts| attempts.made <= 1),
        "the rejection was not retried",
    )
}

fn check(holds: bool, claim: &str) -> Result<(), BoxError> {
    println!("  {} {claim}", if holds { "ok:" } else { "NOT SO:" });
    if holds { Ok(()) } else { Err(claim.into()) }
}

// ===== Database =====

static CALLS: AtomicUsize = AtomicUsize::new(0);
static FAILURES_LEFT: AtomicUsize = AtomicUsize::new(0);

async fn database(query: Query) -> Result<Rows, DbError> {
    CALLS.fetch_add(1, SeqCst);
    let is_gone = FAILURES_LEFT.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).is_ok();
    match query.0 {
        _ if is_gone => Err(DbError::Gone),
        "insert" => Err(DbError::Constraint),
        _ => Ok(Rows(7)),
    }
}
