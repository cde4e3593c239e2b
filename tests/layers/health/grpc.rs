//! The service `grpc.health.v1.Health` of the registry.

use std::time::Duration;

use ServingStatus::{NotServing, ServiceUnknown, Serving};
use buttress::{
    Health, Lifecycle,
    health::{GrpcHealth, HealthWatch},
};
use futures_util::StreamExt;
use tokio::time::timeout;
use tonic::{Code, Request};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_server::Health as _,
};

use crate::support::within_an_hour;

fn asking(service: &str) -> Request<HealthCheckRequest> {
    Request::new(HealthCheckRequest { service: service.to_owned() })
}

async fn check(of: &GrpcHealth, service: &str) -> Result<ServingStatus, Code> {
    let answer = of.check(asking(service)).await.map_err(|status| status.code())?;
    Ok(answer.into_inner().status())
}

async fn next(watch: &mut HealthWatch) -> Option<ServingStatus> {
    within_an_hour(watch.next()).await.map(|message| message.unwrap().status())
}

async fn says_no_more(watch: &mut HealthWatch) {
    assert!(timeout(Duration::from_secs(60), watch.next()).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn check_returns_readiness_liveness_and_each_check() {
    let health = Health::new();
    let (db, cache) =
        (health.reporter("db").unwrap(), health.reporter("cache").unwrap().degrading());
    let of = health.grpc().service("shop.Orders");
    for service in ["", "readiness", "shop.Orders", "db", "cache"] {
        assert_eq!(check(&of, service).await, Ok(NotServing), "no result yet: {service}");
    }
    assert_eq!(check(&of, "liveness").await, Ok(Serving));
    assert_eq!(check(&of, "shop.Carts").await, Err(Code::NotFound));
    db.pass();
    cache.fail();
    for service in ["", "readiness", "shop.Orders", "db"] {
        assert_eq!(check(&of, service).await, Ok(Serving), "{service}");
    }
    assert_eq!(check(&of, "cache").await, Ok(NotServing));
}

#[tokio::test(start_paused = true)]
async fn watch_reports_every_change_and_only_changes() {
    let health = Health::new();
    let db = health.reporter("db").unwrap();
    let of = health.grpc();
    let mut whole = of.watch(asking("")).await.unwrap().into_inner();
    assert_eq!(next(&mut whole).await, Some(NotServing));
    says_no_more(&mut whole).await;
    db.pass();
    assert_eq!(next(&mut whole).await, Some(Serving));
    // A change that does not change the overall status.
    let other = health.reporter("other").unwrap().degrading();
    other.fail();
    says_no_more(&mut whole).await;
    // Two changes between two polls, which restore the status.
    db.fail();
    db.pass();
    says_no_more(&mut whole).await;
    db.fail();
    assert_eq!(next(&mut whole).await, Some(NotServing));
}

#[tokio::test(start_paused = true)]
async fn watch_waits_for_a_check_that_is_not_added_yet() {
    let health = Health::new();
    let of = health.grpc();
    let mut watch = of.watch(asking("db")).await.unwrap().into_inner();
    assert_eq!(next(&mut watch).await, Some(ServiceUnknown));
    let db = health.reporter("db").unwrap();
    assert_eq!(next(&mut watch).await, Some(NotServing));
    db.pass();
    assert_eq!(next(&mut watch).await, Some(Serving));
    drop(db);
    assert_eq!(next(&mut watch).await, Some(ServiceUnknown));
}

#[tokio::test(start_paused = true)]
async fn a_watch_stores_no_invalid_name() {
    let health = Health::new();
    let of = health.grpc().service("shop/Orders");
    let long = "x".repeat(1 << 20);
    for (asked, status) in
        [(&*long, ServiceUnknown), ("a b", ServiceUnknown), ("shop/Orders", Serving)]
    {
        let mut watch = of.watch(asking(asked)).await.unwrap().into_inner();
        assert_eq!(next(&mut watch).await, Some(status));
        assert!(format!("{watch:?}").len() < 100);
        says_no_more(&mut watch).await;
    }
}

#[tokio::test(start_paused = true)]
async fn watch_ends_when_the_process_stops() {
    let health = Health::new();
    let lifecycle = Lifecycle::without_signals(&health).unwrap();
    lifecycle.ready();
    let of = health.grpc();
    let mut watch = of.watch(asking("")).await.unwrap().into_inner();
    assert_eq!(next(&mut watch).await, Some(Serving));
    lifecycle.drain();
    assert_eq!(next(&mut watch).await, Some(NotServing));
    let began = tokio::time::Instant::now();
    assert_eq!(next(&mut watch).await, None);
    assert_eq!(began.elapsed(), Duration::from_secs(5), "the watch ends after the delay");
    // A watch that begins later receives one status and ends.
    let mut late = of.watch(asking("liveness")).await.unwrap().into_inner();
    assert_eq!((next(&mut late).await, next(&mut late).await), (Some(Serving), None));
}
