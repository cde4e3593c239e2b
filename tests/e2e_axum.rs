use axum::{Router, routing::get};
use buttress::{CircuitBreakerLayer, ConcurrencyLimitLayer, Outcome, Trip, call::Http};
use http_body_util::{BodyExt, Empty};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tower::{Service, ServiceBuilder, ServiceExt};

#[tokio::test]
async fn smoke() {
    let peak = Arc::new((AtomicUsize::new(0), AtomicUsize::new(0)));
    let p = peak.clone();
    let limit = ConcurrencyLimitLayer::new(2).queue(64, Duration::from_secs(5)).respond();
    let handle = limit.handle();
    let app: Router = Router::new()
        .route(
            "/",
            get(move || {
                let p = p.clone();
                async move {
                    let n = p.0.fetch_add(1, Ordering::SeqCst) + 1;
                    p.1.fetch_max(n, Ordering::SeqCst);
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    p.0.fetch_sub(1, Ordering::SeqCst);
                    "hello"
                }
            }),
        )
        .layer(ServiceBuilder::new().layer(CircuitBreakerLayer::http().respond()).layer(limit));
    let l = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = l.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(l, app).await.unwrap() });
    let breaker = CircuitBreakerLayer::http();
    let state = breaker.handle();
    let client = ServiceBuilder::new()
        .layer(breaker)
        .layer(ConcurrencyLimitLayer::new(50))
        .service(Client::builder(TokioExecutor::new()).build_http());
    let mut set = tokio::task::JoinSet::new();
    for _ in 0..20 {
        let client = client.clone();
        set.spawn(async move {
            let req = http::Request::get(format!("http://{addr}/"))
                .body(Empty::<bytes::Bytes>::new())
                .unwrap();
            let res = client.oneshot(req).await.unwrap();
            assert_eq!(res.status(), 200);
            assert_eq!(res.headers()["content-length"], "5");
            res.into_body().collect().await.unwrap().to_bytes()
        });
    }
    while let Some(r) = set.join_next().await {
        assert_eq!(r.unwrap(), "hello");
    }
    assert_eq!(peak.1.load(Ordering::SeqCst), 2);
    assert_eq!(handle.in_flight(), 0);
    println!("{:?} {:?}", state.snapshot(), handle.snapshot());
    #[derive(Clone, Debug)]
    struct Row;
    #[derive(Debug)]
    struct DbError;
    impl std::fmt::Display for DbError {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("db")
        }
    }
    impl std::error::Error for DbError {}
    let db = tower::service_fn(|_: u32| async { Err::<Row, _>(DbError) });
    let mut svc = ServiceBuilder::new()
        .layer(CircuitBreakerLayer::new(Trip::consecutive(2)).classify(
            |r: Result<&Row, &DbError>| match r {
                Ok(_) => Outcome::success(),
                Err(_) => Outcome::failure(),
            },
        ))
        .service(db);
    for _ in 0..3 {
        println!("{:?}", svc.ready().await.unwrap().call(1).await.unwrap_err());
    }
    let boxed = tower::util::BoxCloneSyncService::new(svc);
    let lim = ConcurrencyLimitLayer::new(9).per_response();
    tokio::spawn(async move {
        let mut s = ServiceBuilder::new().layer(lim).service(boxed);
        s.ready().await.unwrap().call(2).await.unwrap_err()
    })
    .await
    .unwrap();
    let _ = Http;
}
